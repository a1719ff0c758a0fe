// ssm_reference.hpp - selective state-space models, Mamba and Mamba-2, as maths.
//
// This file is the specification. Every operation, block and model is here once, for one sequence
// at a time, in the order in which the papers introduce them; `mamba.cu` holds the same functions,
// by the same names, as fused kernels. With Scalar = double it is the truth that kernels are judged
// by; with Scalar = float it is what the CPU program computes.
//
// Reading list (numbers of arXiv)
//   Gu, Dao 2023       Mamba: Linear-Time Sequence Modeling with Selective State Spaces  2312.00752
//   Dao, Gu 2024       Transformers are SSMs (Mamba-2, state space duality)              2405.21060
//   Gu et al. 2021     Efficiently Modeling Long Sequences with Structured State Spaces  2111.00396
//   Smith et al. 2022  S5: the associative scan for state spaces                         2208.04933
//   Blelloch 1990      Prefix Sums and Their Applications                            CMU-CS-90-190
//   Vaswani et al.     Attention Is All You Need, 2017                                   1706.03762
//   Su et al. 2021     RoFormer: Enhanced Transformer with Rotary Position Embedding     2104.09864
//   Dao et al. 2022    FlashAttention: exact attention by blocks                         2205.14135
//
// Glossary: name here = symbol in the papers, shape
//   L            length of the sequence
//   d_model      D    width of the residual stream         d_inner  E D  width inside a block
//   d_state      N    states per channel                   d_conv        taps of the convolution
//   dt_rank      R    rank of the input to delta
//   x            x or u  input of the scan   (L, d_inner)  y             its output   (L, d_inner)
//   z            gate                        (L, d_inner)  h             hidden state (d_inner, N)
//   delta        step size, after softplus   (L, d_inner)  dt            what delta is made from
//   A            diagonal of the state matrix (d_inner, N), always negative: A = -exp(A_log)
//   B, C         input and output vectors     (L, N)       D             skip weight (d_inner)
//   Mamba-2:  n_heads H, head_dim P (d_inner = H P), n_groups G, A (H), delta (L, H), B, C (L, G N)
//   attention:  q  queries (L, H P), k, v  keys and values (L, G P), T  tokens so far, L included
//
// The Mamba block (Mamba, Figure 3 and section 3.4)
//
//   u (L, d_model) ── in_proj ──┬── x (L, d_inner) ── causal_conv1d ── silu ─┬─ selective_scan ── y
//                               │                                            │        ^ ^ ^      │
//                               │                                            └ x_proj ─ dt B C   │
//                               └── z (L, d_inner) ──────────────────────────────────── silu(z) * y
//                                                                                           │
//   u + out (L, d_model) <──────────────────────────────────────────────── out_proj ────────┘
//
// Where the code departs from the papers, on purpose, as every published checkpoint does
//   - A is discretized by zero-order hold, B by Euler's simpler rule delta B (see discretization).
//   - D x, the skip connection, belongs to the scan; the papers leave it out of their formulas.
//   - A is real, not complex; conjugate pairs of S4 are gone (Mamba, section 3.6).
//
// Every function that walks time takes the state it starts from and leaves the state it ends in:
// a sequence may be cut anywhere, empty pieces included, and nothing changes. Every operation
// checks the shapes of its inputs where it begins, and throws std::invalid_argument with one line.
//
// After each operation stands its backward: given dout, the gradient of one number (the loss) with
// respect to the output, it returns the gradient with respect to every input, dx for x; that of an
// input left out is empty. The gradient of a state goes the other way through time: on entry it is
// that of the state after the piece, on return that of the state before it. So pieces are walked
// from the last to the first, and again cutting changes nothing.
#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace ssm {

// ============================================================================================
// Types
// ============================================================================================

using Eigen::Index;
using std::exp;  // unqualified below, so that a Scalar may bring its own
using std::expm1;
using std::sqrt;

template <class Scalar>  // rows are time, columns are channels
using Matrix = Eigen::Matrix<Scalar, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

template <class Scalar>  // one number per channel
using Row = Eigen::Matrix<Scalar, 1, Eigen::Dynamic, Eigen::RowMajor>;

// What is kept per channel and state, (d, N), lies column by column: state n of all channels
// together, so that here, too, neighbours in memory are neighbouring channels.
template <class Scalar>
using StateMatrix = Eigen::Matrix<Scalar, Eigen::Dynamic, Eigen::Dynamic, Eigen::ColMajor>;

// Whether the numbers of an Eigen expression lie in memory as those of a Plain do. A product or a
// sum lies nowhere, a transposed matrix in the other order, a column of a row-major one with gaps.
template <class Expression, class Plain>
constexpr bool lies_as() {
  if constexpr (!(int(Expression::Flags) & Eigen::DirectAccessBit)) return false;
  return std::is_same_v<typename Expression::Scalar, typename Plain::Scalar> &&
         int(Expression::IsRowMajor) == int(Plain::IsRowMajor) &&
         int(Expression::InnerStrideAtCompileTime) == 1;
}

// A window onto somebody's numbers. It owns nothing, so a matrix that is about to vanish is refused
// (a block or a map of one that stays is not). It may be empty: an optional input left out.
template <class Plain>
struct ViewOf : Eigen::Map<const Plain, 0, Eigen::OuterStride<>> {
  using Map = Eigen::Map<const Plain, 0, Eigen::OuterStride<>>;
  ViewOf() : Map(nullptr, 0, 0, Eigen::OuterStride<>(0)) {}
  ViewOf(const ViewOf&) = default;
  template <class Derived, class = std::enable_if_t<lies_as<Derived, Plain>()>>
  ViewOf(const Eigen::MatrixBase<Derived>& m)
      : Map(m.derived().data(), m.rows(), m.cols(),
            Eigen::OuterStride<>(m.derived().outerStride())) {}
  template <class Derived>
  ViewOf(const Eigen::PlainObjectBase<Derived>&&) = delete;
  ViewOf& operator=(const ViewOf& other) {  // looks elsewhere; copies no numbers
    new (this) ViewOf(other);
    return *this;
  }
  explicit operator bool() const { return this->size() > 0; }
};
template <class Scalar>
using View = ViewOf<Matrix<Scalar>>;
template <class Scalar>
using StateView = ViewOf<StateMatrix<Scalar>>;

// A state that a function reads, advances and leaves behind. Blocks of a matrix bind to it, too. As
// in std::type_identity (C++20), the Scalar of such an argument is not deduced from what is passed.
template <class Plain>
using InOut = Eigen::Ref<Plain, 0, Eigen::OuterStride<>>;
template <class T>
struct TypeIdentity {
  using Type = T;
};
template <class Scalar>  // (d, N)
using ScanState = InOut<StateMatrix<typename TypeIdentity<Scalar>::Type>>;
template <class Scalar>  // (d_conv - 1, d)
using ConvState = InOut<Matrix<typename TypeIdentity<Scalar>::Type>>;

// An input that does not fit is refused with one line: which, what was expected, what was found.
struct Extents {
  Index rows, cols;
  template <class M>
  Extents(const M& m) : rows(m.rows()), cols(m.cols()) {}
};

[[noreturn]] inline void refuse(const char* operation, const char* input,
                                const std::string& expected, Extents m) {
  throw std::invalid_argument(std::string(operation) + ": " + input + ": expected " + expected +
                              ", found (" + std::to_string(m.rows) + ", " + std::to_string(m.cols) +
                              ")");
}

inline void expect_shape(const char* operation, const char* input, Extents m, Index rows,
                         Index cols) {
  if (m.rows == rows && m.cols == cols) return;
  refuse(operation, input, "(" + std::to_string(rows) + ", " + std::to_string(cols) + ")", m);
}

// m (any, n k): n heads or groups side by side.
inline void expect_split(const char* operation, const char* input, Extents m, Index n) {
  if (n > 0 && m.cols % n == 0) return;
  refuse(operation, input, "a multiple of " + std::to_string(n) + " columns", m);
}

// B and C (L, G N): G groups, a divisor of the number of channels or heads that share them.
inline void expect_groups(const char* operation, const char* input, Extents m, Index L, Index N,
                          Index sharing) {
  const Index G = N > 0 ? m.cols / N : 0;
  if (m.rows == L && G > 0 && m.cols == G * N && sharing % G == 0) return;
  refuse(operation, input,
         "(" + std::to_string(L) + ", G * " + std::to_string(N) + ") with G a divisor of " +
             std::to_string(sharing),
         m);
}

// ============================================================================================
// Pointwise functions and norms
// ============================================================================================

// softplus(x) = log(1 + e^x), written so that e^x cannot overflow: max(x, 0) + log(1 + e^-|x|).
template <class Derived>
auto softplus(const Eigen::ArrayBase<Derived>& x) {
  using Scalar = typename Derived::Scalar;
  return x.max(Scalar(0)) + (-x.abs()).exp().log1p();
}

// silu(x) = x sigmoid(x) = x / (1 + e^-x)
template <class Derived>
auto silu(const Eigen::ArrayBase<Derived>& x) {
  using Scalar = typename Derived::Scalar;
  return x / (Scalar(1) + (-x).exp());
}

// softplus'(x) = e^x / (1 + e^x) = sigmoid(x)
template <class Derived>
auto softplus_derivative(const Eigen::ArrayBase<Derived>& x) {
  using Scalar = typename Derived::Scalar;
  return (Scalar(1) + (-x).exp()).inverse();
}

// silu(x) = x sigmoid(x) and sigmoid' = sigmoid (1 - sigmoid), so
// silu'(x) = sigmoid(x) (1 + x (1 - sigmoid(x)))
template <class Derived>
auto silu_derivative(const Eigen::ArrayBase<Derived>& x) {
  using Scalar = typename Derived::Scalar;
  return softplus_derivative(x) * (Scalar(1) + x * (Scalar(1) - softplus_derivative(x)));
}

// rms_norm(x)_t = x_t / sqrt(mean(x_t^2) + eps) * weight.           x (L, d), weight (d) -> (L, d)
template <class Scalar>
Matrix<Scalar> rms_norm(const Matrix<Scalar>& x, const Row<Scalar>& weight, Scalar eps) {
  expect_shape("rms_norm", "weight", weight, 1, x.cols());
  Matrix<Scalar> out(x.rows(), x.cols());
  for (Index t = 0; t < x.rows(); ++t) {
    const Scalar mean_square = x.row(t).squaredNorm() / Scalar(x.cols());
    out.row(t) = x.row(t).cwiseProduct(weight) / sqrt(mean_square + eps);
  }
  return out;
}

template <class Scalar>
struct NormGradients {
  Matrix<Scalar> x;    // (L, d)
  Row<Scalar> weight;  // (d)
};

// With r = 1 / sqrt(mean(x^2) + eps) and n = r x the output is n * weight, so dn = dout * weight.
// r depends on all channels: dr/dx = -r^3 x / d = -r^2 n / d. Together
//   dx = r dn + (dn . x) dr/dx = r (dn - n mean(dn * n)),      dweight = sum_t dout * n
template <class Scalar>
NormGradients<Scalar> rms_norm_backward(const Matrix<Scalar>& x, const Row<Scalar>& weight,
                                        Scalar eps, const Matrix<Scalar>& dout) {
  expect_shape("rms_norm_backward", "weight", weight, 1, x.cols());
  expect_shape("rms_norm_backward", "dout", dout, x.rows(), x.cols());
  NormGradients<Scalar> d = {Matrix<Scalar>(x.rows(), x.cols()), Row<Scalar>::Zero(x.cols())};
  for (Index t = 0; t < x.rows(); ++t) {
    const Scalar r = 1 / sqrt(x.row(t).squaredNorm() / Scalar(x.cols()) + eps);
    const Row<Scalar> n = r * x.row(t), dn = dout.row(t).cwiseProduct(weight);
    d.x.row(t) = r * (dn - n * (dn.dot(n) / Scalar(x.cols())));
    d.weight += dout.row(t).cwiseProduct(n);
  }
  return d;
}

// Every row less its mean.  x (L, d)
template <class Scalar>
Matrix<Scalar> centred(const Matrix<Scalar>& x) {
  return x.colwise() - x.rowwise().mean();
}

// layer_norm(x) = rms_norm(x - mean(x)) + bias, in models with "rms_norm": false.  bias (d)
template <class Scalar>
Matrix<Scalar> layer_norm(const Matrix<Scalar>& x, const Row<Scalar>& weight,
                          const Row<Scalar>& bias, Scalar eps) {
  expect_shape("layer_norm", "bias", bias, 1, x.cols());
  return rms_norm(centred(x), weight, eps).rowwise() + bias;
}

// The mean depends on all channels alike: of c = x - mean(x), dx = dc - mean(dc). dbias = sum_t
// dout_t is left to the caller.
template <class Scalar>
NormGradients<Scalar> layer_norm_backward(const Matrix<Scalar>& x, const Row<Scalar>& weight,
                                          Scalar eps, const Matrix<Scalar>& dout) {
  const NormGradients<Scalar> d = rms_norm_backward(centred(x), weight, eps, dout);
  return {centred(d.x), d.weight};
}

// The norm at the end of a Mamba-2 block (Mamba-2, section 7.1): gate first, then normalize each of
// the n_groups groups of channels by itself, as all published models were trained.
//   g = y * silu(z),   out = g / sqrt(mean over its group(g^2) + eps) * weight
// y, z (L, d), weight (d) -> (L, d)
template <class Scalar>
Matrix<Scalar> gated_rms_norm(const Matrix<Scalar>& y, const View<Scalar>& z,
                              const Row<Scalar>& weight, Scalar eps, Index n_groups) {
  expect_shape("gated_rms_norm", "z", z, y.rows(), y.cols());
  expect_shape("gated_rms_norm", "weight", weight, 1, y.cols());
  expect_split("gated_rms_norm", "y", y, n_groups);
  const Index L = y.rows(), width = y.cols() / n_groups;
  Matrix<Scalar> out = y.array() * silu(z.array());
  for (Index t = 0; t < L; ++t) {
    for (Index g = 0; g < n_groups; ++g) {
      auto channels = out.row(t).segment(g * width, width);
      channels /= sqrt(channels.squaredNorm() / Scalar(width) + eps);
    }
    out.row(t).array() *= weight.array();
  }
  return out;
}

template <class Scalar>
struct GatedNormGradients {
  Matrix<Scalar> y, z;  // (L, d)
  Row<Scalar> weight;   // (d)
};

// Each group of channels is an rms_norm of g = y * silu(z), which gives dg; then
//   dy = dg * silu(z),      dz = dg * y * silu'(z)
template <class Scalar>
GatedNormGradients<Scalar> gated_rms_norm_backward(const Matrix<Scalar>& y, const View<Scalar>& z,
                                                   const Row<Scalar>& weight, Scalar eps,
                                                   Index n_groups, const Matrix<Scalar>& dout) {
  expect_shape("gated_rms_norm_backward", "z", z, y.rows(), y.cols());
  expect_shape("gated_rms_norm_backward", "weight", weight, 1, y.cols());
  expect_shape("gated_rms_norm_backward", "dout", dout, y.rows(), y.cols());
  expect_split("gated_rms_norm_backward", "y", y, n_groups);
  const Index width = y.cols() / n_groups;
  const Matrix<Scalar> g = y.array() * silu(z.array());
  Matrix<Scalar> dg(y.rows(), y.cols());
  Row<Scalar> dweight(y.cols());
  for (Index first = 0; first < y.cols(); first += width) {
    const auto group =
        rms_norm_backward<Scalar>(g.middleCols(first, width), weight.segment(first, width), eps,
                                  dout.middleCols(first, width));
    dg.middleCols(first, width) = group.x;
    dweight.segment(first, width) = group.weight;
  }
  return {dg.array() * silu(z.array()), dg.array() * y.array() * silu_derivative(z.array()),
          dweight};
}

// ============================================================================================
// Causal convolution
// ============================================================================================

// The inputs fit each other and the state, see below.
template <class Scalar>
void check_conv1d(const char* operation, const View<Scalar>& x, const View<Scalar>& weight,
                  const View<Scalar>& bias, const ConvState<Scalar>& state) {
  expect_shape(operation, "weight", weight, x.cols(), weight.cols());
  if (bias) expect_shape(operation, "bias", bias, 1, x.cols());
  expect_shape(operation, "state", state, weight.cols() - 1, x.cols());
}

// Depthwise convolution over the last d_conv inputs of each channel:
//   out[t] = bias + sum_k weight[:, k] * x[t - (d_conv - 1) + k]
// x (L, d), weight (d, d_conv), bias (d) or empty -> (L, d). `state` (d_conv - 1, d) holds the
// inputs just before x, oldest first (zeros at the start of a text), and afterwards the last
// d_conv - 1 of state and x together, so pieces shorter than the window work like any other.
template <class Scalar>
Matrix<Scalar> causal_conv1d(const View<Scalar>& x, const View<Scalar>& weight,
                             const View<Scalar>& bias, ConvState<Scalar> state) {
  check_conv1d<Scalar>("causal_conv1d", x, weight, bias, state);
  const Index L = x.rows(), d = x.cols(), d_conv = weight.cols();
  Matrix<Scalar> past_and_present(d_conv - 1 + L, d);
  past_and_present << state, x;
  const Matrix<Scalar> taps = weight.transpose();  // (d_conv, d)
  Matrix<Scalar> out = Matrix<Scalar>::Zero(L, d);
  if (bias) out.rowwise() += bias.row(0);
  for (Index k = 0; k < d_conv; ++k) {
    out += past_and_present.middleRows(k, L) * taps.row(k).asDiagonal();
  }
  state = past_and_present.bottomRows(d_conv - 1);
  return out;
}

// The same for one token: x_t (d) -> (d). The window slides by one.
template <class Scalar>
Row<Scalar> causal_conv1d_step(const View<Scalar>& x_t, const View<Scalar>& weight,
                               const View<Scalar>& bias, ConvState<Scalar> state) {
  check_conv1d<Scalar>("causal_conv1d_step", x_t, weight, bias, state);
  expect_shape("causal_conv1d_step", "x_t", x_t, 1, x_t.cols());
  const Index d_conv = weight.cols();
  Row<Scalar> out = x_t.row(0).cwiseProduct(weight.col(d_conv - 1).transpose());
  if (bias) out += bias.row(0);
  for (Index k = 0; k < d_conv - 1; ++k) {
    out += state.row(k).cwiseProduct(weight.col(k).transpose());
    state.row(k) = k + 1 < d_conv - 1 ? Row<Scalar>(state.row(k + 1)) : Row<Scalar>(x_t.row(0));
  }
  return out;
}

template <class Scalar>
struct ConvGradients {
  Matrix<Scalar> x;       // (L, d)
  Matrix<Scalar> weight;  // (d, d_conv)
  Row<Scalar> bias;       // (d) or empty
};

// p = [state; x], all inputs in a row. out[t] has weight[:, k] * p[t + k], so for every tap k
//   dp[t + k] += weight[:, k] * dout[t],      dweight[:, k] = sum_t dout[t] * p[t + k]
// and dbias = sum_t dout[t]. The last d_conv - 1 rows of p are the state afterwards: dp starts
// there from dstate (d_conv - 1, d). Its first rows are that of the state before. `state` is the
// latter.
template <class Scalar>
ConvGradients<Scalar> causal_conv1d_backward(const View<Scalar>& x, const View<Scalar>& weight,
                                             const View<Scalar>& bias, const View<Scalar>& state,
                                             const View<Scalar>& dout, ConvState<Scalar> dstate) {
  check_conv1d<Scalar>("causal_conv1d_backward", x, weight, bias, dstate);
  expect_shape("causal_conv1d_backward", "state", state, dstate.rows(), dstate.cols());
  expect_shape("causal_conv1d_backward", "dout", dout, x.rows(), x.cols());
  const Index L = x.rows(), d = x.cols(), past = weight.cols() - 1;
  Matrix<Scalar> p(past + L, d), dp = Matrix<Scalar>::Zero(past + L, d), dweight(d, past + 1);
  p << state, x;
  dp.bottomRows(past) = dstate;
  for (Index k = 0; k <= past; ++k) {
    dp.middleRows(k, L) += dout * weight.col(k).asDiagonal();
    dweight.col(k) = dout.cwiseProduct(p.middleRows(k, L)).colwise().sum().transpose();
  }
  dstate = dp.topRows(past);
  return {dp.bottomRows(L), dweight, bias ? Row<Scalar>(dout.colwise().sum()) : Row<Scalar>()};
}

// ============================================================================================
// Discretization (Mamba, section 2; equation 4)
// ============================================================================================
//
// The continuous system h'(t) = A h(t) + B x(t) is sampled with step delta, x held constant between
// samples (zero-order hold). The exact solution is then h_t = A_bar h_{t-1} + B_bar x_t with
//   A_bar = exp(delta A)
//   B_bar = (delta A)^-1 (exp(delta A) - I) delta B = expm1(delta A) / A * B
// Mamba keeps A_bar and replaces B_bar by the first term of its series, delta B: training absorbs
// the difference into B and delta, and one division less is done per state. `B_bar_zoh` is here so
// that the difference can be seen; no model uses it.

template <class Scalar>
Scalar A_bar(Scalar delta, Scalar A) {
  return exp(delta * A);
}

template <class Scalar>
Scalar B_bar_euler(Scalar delta, Scalar B) {
  return delta * B;
}

template <class Scalar>
Scalar B_bar_zoh(Scalar delta, Scalar A, Scalar B) {  // -> delta B as delta A -> 0
  return A == Scalar(0) ? delta * B : expm1(delta * A) / A * B;
}

// ============================================================================================
// Selective scan (Mamba, section 3.2 and Algorithm 2)
// ============================================================================================
//
//   delta_t = delta_ratio softplus(delta_raw_t + delta_bias)          bias and softplus optional
//   h_t     = exp(delta_t A) * h_{t-1} + (delta_t x_t) B_t        (2a) with A_bar, B_bar from above
//   y_t     = h_t C_t + D x_t                                         (2b), D optional
//   out_t   = y_t * silu(z_t)                                         z optional
//
// "Selective": delta, B and C are functions of the input, so each token decides how much of the
// state decays (delta_t A), how much of itself it writes (delta_t B_t), and what it reads (C_t).

template <class Scalar>
struct ScanInputs {
  View<Scalar> x, delta;         // (L, d)  delta before bias and softplus
  StateView<Scalar> A;           // (d, N)
  View<Scalar> B, C;             // (L, G N)  for G groups of d / G neighbouring channels
  View<Scalar> D = {};           // (d)    or empty
  View<Scalar> z = {};           // (L, d) or empty
  View<Scalar> delta_bias = {};  // (d)    or empty
  bool delta_softplus = true;
  Scalar delta_ratio = Scalar(1);  // stretches every step; 1 is the model as trained

  Index length() const { return x.rows(); }
  Index n_groups() const { return B.cols() / A.cols(); }
  Index group(Index channel) const { return channel * n_groups() / x.cols(); }

  // The same call for tokens [first, first + count) of the sequence.
  ScanInputs tokens(Index first, Index count) const {
    using Member = View<Scalar> ScanInputs::*;
    ScanInputs part = *this;
    for (const Member m :
         {&ScanInputs::x, &ScanInputs::delta, &ScanInputs::B, &ScanInputs::C, &ScanInputs::z}) {
      if (this->*m) part.*m = (this->*m).middleRows(first, count);
    }
    return part;
  }
};

// The inputs fit each other and the state h (d, N).
template <class Scalar>
void check_inputs(const char* operation, const ScanInputs<Scalar>& in, const ScanState<Scalar>& h) {
  const Index L = in.length(), d = in.x.cols(), N = in.A.cols();
  expect_shape(operation, "delta", in.delta, L, d);
  expect_shape(operation, "A", in.A, d, N);
  expect_shape(operation, "h", h, d, N);
  expect_groups(operation, "B", in.B, L, N, d);
  expect_shape(operation, "C", in.C, L, in.B.cols());
  if (in.D) expect_shape(operation, "D", in.D, 1, d);
  if (in.z) expect_shape(operation, "z", in.z, L, d);
  if (in.delta_bias) expect_shape(operation, "delta_bias", in.delta_bias, 1, d);
}

// delta_t for all t at once: (L, d)
template <class Scalar>
Matrix<Scalar> step_size(const ScanInputs<Scalar>& in) {
  Matrix<Scalar> delta = in.delta;
  if (in.delta_bias) delta.rowwise() += in.delta_bias.row(0);
  if (in.delta_softplus) delta = softplus(delta.array()).eval();
  return delta * in.delta_ratio;
}

// y -> (y + D x) * silu(z), the part of the operation that has no memory.
template <class Scalar>
void skip_and_gate(const ScanInputs<Scalar>& in, Matrix<Scalar>& y) {
  if (in.D) y += in.x * in.D.row(0).asDiagonal();
  if (in.z) y.array() *= silu(in.z.array());
}

// The recurrence, token by token (Algorithm 2, lines 5 and 6). This is the definition; the forms
// below must agree with it.
template <class Scalar>
Matrix<Scalar> selective_scan_sequential(const ScanInputs<Scalar>& in, ScanState<Scalar> h) {
  const Index L = in.length(), d = h.rows(), N = h.cols();
  const Index width = d / in.n_groups();  // of a group
  const Matrix<Scalar> delta = step_size(in), delta_x = delta.cwiseProduct(in.x);
  Matrix<Scalar> y(L, d);
  for (Index t = 0; t < L; ++t) {
    for (Index g = 0; g * width < d; ++g) {              // the channels that share B_t and C_t
      const auto A = in.A.middleRows(g * width, width);  // (width, N)
      const auto B_t = in.B.row(t).segment(g * N, N);    // (N)
      const auto C_t = in.C.row(t).segment(g * N, N);    // (N)
      const auto delta_t = delta.row(t).segment(g * width, width).transpose();      // (width)
      const auto delta_x_t = delta_x.row(t).segment(g * width, width).transpose();  // (width)
      auto h_t = h.middleRows(g * width, width);                                    // (width, N)
      auto y_t = y.row(t).segment(g * width, width).transpose();                    // (width)

      const auto A_bar = (delta_t.asDiagonal() * A).array().exp().matrix();
      h_t = A_bar.cwiseProduct(h_t) + delta_x_t.lazyProduct(B_t);  // (2a)
      y_t.noalias() = h_t * C_t.transpose();                       // (2b)
    }
  }
  skip_and_gate(in, y);
  return y;
}

// One token in, one token out, as a model generates: in holds L = 1. Returns (1, d).
template <class Scalar>
Matrix<Scalar> selective_scan_step(const ScanInputs<Scalar>& in, ScanState<Scalar> h) {
  check_inputs("selective_scan_step", in, h);
  expect_shape("selective_scan_step", "x", in.x, 1, in.x.cols());
  return selective_scan_sequential<Scalar>(in, h);
}

// --- The associative form (Mamba, section 3.3.2; Blelloch 1990) ---
//
// Token t maps the state h to a_t h + b_t, with a_t = exp(delta_t A) and b_t = delta_t x_t B_t. To
// apply map 1 and then map 2 is again such a map, h -> a2 (a1 h + b1) + b2:
//   (a1, b1) then (a2, b2)  =  (a2 a1, a2 b1 + b2)
// Grouping does not matter, so all prefixes can be made in O(log L) parallel rounds:
//   (1 then 2) then 3  =  (a2 a1, a2 b1 + b2) then 3  =  (a3 a2 a1, a3 a2 b1 + a3 b2 + b3)
//   1 then (2 then 3)  =  1 then (a3 a2, a3 b2 + b3)  =  (a3 a2 a1, a3 a2 b1 + a3 b2 + b3)
// Order does matter: the earlier token is always the one that gets multiplied by the later one's a.
// Example with a = 1/2 and b = 8 0 0 4 (h0 = 0):
//   up-sweep    neighbours      (1/2, 8) (1/4, 4) (1/2, 0) (1/4, 4)
//               then fours      (1/2, 8) (1/4, 4) (1/2, 0) (1/16, 5)
//   down-sweep  odd positions   (1/2, 8) (1/4, 4) (1/8, 2) (1/16, 5)      b is now h_1 .. h_4

// Row t of a and b becomes the composition of rows 0..t. a, b (L, any). L need not be a power of 2.
template <class Scalar>
void associative_scan(Matrix<Scalar>& a, Matrix<Scalar>& b) {
  const Index L = a.rows();
  // row(later) = row(earlier) then row(later)
  const auto then = [&](Index earlier, Index later) {
    b.row(later) += a.row(later).cwiseProduct(b.row(earlier));
    a.row(later) = a.row(later).cwiseProduct(a.row(earlier));
  };
  Index stride = 1;
  // up-sweep: blocks of 2 stride tokens end in their own composition
  for (; stride < L; stride *= 2) {
    for (Index t = 2 * stride - 1; t < L; t += 2 * stride) then(t - stride, t);
  }
  // down-sweep: put the finished prefix before the first half of each block
  for (stride /= 2; stride >= 1; stride /= 2) {
    for (Index t = 3 * stride - 1; t < L; t += 2 * stride) then(t - stride, t);
  }
}

// All tokens at once. Needs memory for every state, L d N numbers, which is what kernels avoid.
template <class Scalar>
Matrix<Scalar> selective_scan_parallel(const ScanInputs<Scalar>& in, ScanState<Scalar> h) {
  const Index L = in.length(), d = h.rows(), N = h.cols();
  Matrix<Scalar> y(L, d);
  if (L == 0) return y;
  const Matrix<Scalar> delta = step_size(in);
  Matrix<Scalar> a(L, d * N), b(L, d * N);  // row t holds (d, N)
  for (Index t = 0; t < L; ++t) {
    for (Index c = 0; c < d; ++c) {
      const auto B_t = in.B.row(t).segment(in.group(c) * N, N);
      a.row(t).segment(c * N, N) = (delta(t, c) * in.A.row(c).array()).exp();
      b.row(t).segment(c * N, N) = delta(t, c) * in.x(t, c) * B_t;
    }
  }
  for (Index c = 0; c < d; ++c) {  // h_0 = a_0 h_{-1} + b_0
    b.row(0).segment(c * N, N) += a.row(0).segment(c * N, N).cwiseProduct(h.row(c));
  }
  associative_scan(a, b);  // row t of b is now h_t
  for (Index t = 0; t < L; ++t) {
    for (Index c = 0; c < d; ++c) {
      y(t, c) = b.row(t).segment(c * N, N).dot(in.C.row(t).segment(in.group(c) * N, N));
    }
  }
  for (Index c = 0; c < d; ++c) h.row(c) = b.row(L - 1).segment(c * N, N);
  skip_and_gate(in, y);
  return y;
}

// Chunks of `chunk` tokens, the form to use when the sequence itself must be split over processors:
//   1. each chunk by itself: the map (a, b) of the whole chunk. a = exp(A sum delta_t), and b is
//      where the chunk ends when it starts from zero;
//   2. one short walk over the chunks: the state in which each of them really starts;
//   3. each chunk by itself, from that state.
template <class Scalar>
Matrix<Scalar> selective_scan_chunked(const ScanInputs<Scalar>& in, ScanState<Scalar> h,
                                      Index chunk) {
  const Index L = in.length(), d = h.rows(), N = h.cols();
  const Index n_chunks = (L + chunk - 1) / chunk;
  const auto part = [&](Index i) { return in.tokens(i * chunk, std::min(chunk, L - i * chunk)); };

  std::vector<StateMatrix<Scalar>> a(n_chunks), b(n_chunks), start(n_chunks);
  for (Index i = 0; i < n_chunks; ++i) {
    const Row<Scalar> total = step_size(part(i)).colwise().sum();
    a[i] = (total.transpose().asDiagonal() * in.A).array().exp();
    b[i] = StateMatrix<Scalar>::Zero(d, N);
    selective_scan_sequential<Scalar>(part(i), b[i]);
  }
  for (Index i = 0; i < n_chunks; ++i) {
    start[i] = h;
    h = a[i].cwiseProduct(h) + b[i];
  }
  Matrix<Scalar> out(L, d);
  for (Index i = 0; i < n_chunks; ++i) {
    out.middleRows(i * chunk, part(i).length()) =
        selective_scan_sequential<Scalar>(part(i), start[i]);
  }
  return out;
}

// The forms that tests and programs loop over. (The step is what `sequential` repeats.)
enum class Form { sequential, parallel, chunked };
constexpr Form kForms[] = {Form::sequential, Form::parallel, Form::chunked};
constexpr Index kScanChunk = 64;

// in: see ScanInputs.  h (d, N): h_{-1} on entry, h_{L-1} on return.  Returns out (L, d).
template <class Scalar>
Matrix<Scalar> selective_scan(const ScanInputs<Scalar>& in, ScanState<Scalar> h,
                              Form form = Form::sequential, Index chunk = kScanChunk) {
  check_inputs("selective_scan", in, h);
  if (form == Form::parallel) return selective_scan_parallel(in, h);
  if (form == Form::chunked) return selective_scan_chunked(in, h, chunk);
  return selective_scan_sequential(in, h);
}

// --- Its backward ---
//
// Each equation above by the chain rule, last to first. dh_t is the gradient of h_t through all
// that follows: through y_t, and through h_{t+1} what the walk back hands over. States are not kept
// by the forward but made again (Mamba, section 3.3.2), chunk by chunk from the state each starts
// in.
//   out_t  dy_t = dout_t * silu(z_t),  dz_t = dout_t * (y_t with D x_t) * silu'(z_t)
//   (2b)   dC_t = sum_d dy_t h_t,  dh_t += dy_t C_t,  dD = sum_t dy_t * x_t,  dx_t = D dy_t
//   (2a)   d(delta_t x_t) = dh_t B_t,  dB_t = sum_d delta_t x_t dh_t,  dh_{t-1} = A_bar_t * dh_t
//          d(delta_t A) = dA_bar_t * A_bar_t = dh_t * h_{t-1} * A_bar_t = dh_{t-1} * h_{t-1}
//          ddelta_t = sum_n d(delta_t A) A + d(delta_t x_t) x_t,  dA = sum_t delta_t d(delta_t A)
//          dx_t += delta_t d(delta_t x_t)
//   delta  ddelta_raw_t = delta_ratio ddelta_t * softplus'(delta_raw_t + delta_bias)
//          ddelta_bias = sum_t ddelta_raw_t
// Sums over d are over the channels of one group.

template <class Scalar>
struct ScanGradients {  // shapes as in ScanInputs
  Matrix<Scalar> x, delta;
  StateMatrix<Scalar> A;
  Matrix<Scalar> B, C;
  Row<Scalar> D;
  Matrix<Scalar> z;
  Row<Scalar> delta_bias;
};

// ddelta (L, d) -> ddelta_raw (L, d)
template <class Scalar>
Matrix<Scalar> step_size_backward(const ScanInputs<Scalar>& in, const Matrix<Scalar>& ddelta) {
  if (!in.delta_softplus) return in.delta_ratio * ddelta;
  Matrix<Scalar> biased = in.delta;
  if (in.delta_bias) biased.rowwise() += in.delta_bias.row(0);
  return in.delta_ratio * ddelta.array() * softplus_derivative(biased.array());
}

// Gradients of D, z and, so far, x.  y: with D x, before the gate.  Returns dy (L, d).
template <class Scalar>
Matrix<Scalar> skip_and_gate_backward(const ScanInputs<Scalar>& in, const Matrix<Scalar>& y,
                                      const View<Scalar>& dout, ScanGradients<Scalar>& d) {
  Matrix<Scalar> dy = dout;
  d.z.resize(in.z.rows(), in.z.cols());
  if (in.z) {
    d.z = dout.array() * y.array() * silu_derivative(in.z.array());
    dy.array() *= silu(in.z.array());
  }
  d.x = Matrix<Scalar>::Zero(dy.rows(), dy.cols());
  if (in.D) {
    d.x = dy * in.D.row(0).asDiagonal();
    d.D = dy.cwiseProduct(in.x).colwise().sum();
  }
  return dy;
}

// Token t, (2b) and (2a). Adds to d, writes row t of ddelta (L, d).  dh: from h_t's to h_{t-1}'s.
// h, h_before (d, N): h_t and h_{t-1}
template <class Scalar>
void selective_scan_step_backward(const ScanInputs<Scalar>& in, Index t, const Row<Scalar>& delta,
                                  const StateView<Scalar>& h, const StateView<Scalar>& h_before,
                                  const Row<Scalar>& dy, ScanState<Scalar> dh,
                                  Matrix<Scalar>& ddelta, ScanGradients<Scalar>& d) {
  const Index N = h.cols(), width = h.rows() / in.n_groups();
  for (Index g = 0; g < in.n_groups(); ++g) {
    const auto channels = Eigen::seqN(g * width, width);  // those that share B_t and C_t
    const auto A = in.A.middleRows(g * width, width);     // (width, N)
    const auto B_t = in.B.row(t).segment(g * N, N), C_t = in.C.row(t).segment(g * N, N);  // (N)
    const Row<Scalar> x_t = in.x(t, channels), delta_t = delta(channels), dy_t = dy(channels);
    auto dh_t = dh.middleRows(g * width, width);  // (width, N)

    d.C.row(t).segment(g * N, N) = dy_t * h.middleRows(g * width, width);
    dh_t += dy_t.transpose() * C_t;
    const Row<Scalar> ddelta_x = B_t * dh_t.transpose();  // (width)
    d.B.row(t).segment(g * N, N) = delta_t.cwiseProduct(x_t) * dh_t;
    dh_t.array() *= (delta_t.asDiagonal() * A).array().exp();  // dh_{t-1}
    const StateMatrix<Scalar> ddelta_A = dh_t.cwiseProduct(h_before.middleRows(g * width, width));
    ddelta.row(t).segment(g * width, width) =
        ddelta_A.cwiseProduct(A).rowwise().sum().transpose() + ddelta_x.cwiseProduct(x_t);
    d.A.middleRows(g * width, width) += delta_t.asDiagonal() * ddelta_A;
    d.x.row(t).segment(g * width, width) += delta_t.cwiseProduct(ddelta_x);
  }
}

// in: see ScanInputs.  h0 (d, N): h_{-1}.  dout (L, d).  dh (d, N): of h_{L-1} on entry, of h_{-1}
// on return.
template <class Scalar>
ScanGradients<Scalar> selective_scan_backward(const ScanInputs<Scalar>& in,
                                              const StateView<Scalar>& h0, const View<Scalar>& dout,
                                              ScanState<Scalar> dh) {
  check_inputs("selective_scan_backward", in, dh);
  expect_shape("selective_scan_backward", "h0", h0, dh.rows(), dh.cols());
  expect_shape("selective_scan_backward", "dout", dout, in.x.rows(), in.x.cols());
  const Index L = in.length(), d_inner = dh.rows(), N = dh.cols();
  ScanInputs<Scalar> ungated = in;
  ungated.z = {};
  Matrix<Scalar> y(L, d_inner), ddelta(L, d_inner);
  std::vector<StateMatrix<Scalar>> start = {h0};  // the state in which each chunk starts
  for (Index t = 0; t < L; t += kScanChunk) {
    const Index count = std::min(kScanChunk, L - t);
    start.push_back(start.back());
    y.middleRows(t, count) =
        selective_scan_sequential<Scalar>(ungated.tokens(t, count), start.back());
  }
  ScanGradients<Scalar> d;
  d.A = StateMatrix<Scalar>::Zero(d_inner, N);
  d.B = d.C = Matrix<Scalar>(L, in.B.cols());
  const Matrix<Scalar> delta = step_size(in), dy = skip_and_gate_backward(in, y, dout, d);
  for (Index first = Index(start.size() - 2) * kScanChunk; first >= 0; first -= kScanChunk) {
    std::vector<StateMatrix<Scalar>> h = {start[first / kScanChunk]};  // before each token
    for (Index t = first; t < std::min(first + kScanChunk, L); ++t) {
      h.push_back(h.back());
      selective_scan_sequential<Scalar>(ungated.tokens(t, 1), h.back());
    }
    for (Index t = first + Index(h.size()) - 1; t-- > first;) {
      selective_scan_step_backward<Scalar>(in, t, delta.row(t), h[t - first + 1], h[t - first],
                                           dy.row(t), dh, ddelta, d);
    }
  }
  d.delta = step_size_backward(in, ddelta);
  if (in.delta_bias) d.delta_bias = d.delta.colwise().sum();
  return d;
}

// ============================================================================================
// SSD, the scan of Mamba-2 (Mamba-2, sections 5 and 6)
// ============================================================================================
//
// The selective scan with A a single number per head: all P x N states of a head decay alike.
//   delta_t = delta_ratio clamp(softplus(dt_t + dt_bias), dt_min, dt_max)      one per head
//   h_t     = exp(delta_t A) h_{t-1} + (delta_t x_t) B_t^T                     (P, N)
//   y_t     = h_t C_t + D x_t
// Written out over time it is one lower-triangular matrix per head, y = M (delta x) with
//   M[t, s] = exp(A (delta_{s+1} + .. + delta_t)) C_t . B_s    for s <= t,
// masked attention without softmax: that is the duality. The quadratic form multiplies by M; the
// chunked form does so for short chunks and hands the state on, which is what matrix units like.

template <class Scalar>
struct SsdInputs {
  View<Scalar> x;             // (L, H P)  head after head
  View<Scalar> dt;            // (L, H)    before bias and softplus
  StateView<Scalar> A;        // (H, 1)
  View<Scalar> B, C;          // (L, G N)  for G groups of H / G neighbouring heads
  View<Scalar> D = {};        // (H) or empty
  View<Scalar> dt_bias = {};  // (H) or empty
  bool dt_softplus = true;
  Scalar dt_min = Scalar(0);  // "time_step_limit"
  Scalar dt_max = std::numeric_limits<Scalar>::infinity();
  Scalar delta_ratio = Scalar(1);

  Index length() const { return x.rows(); }
  Index n_heads() const { return A.rows(); }
  Index head_dim() const { return x.cols() / n_heads(); }
  Index group(Index head, Index N) const { return head * (B.cols() / N) / n_heads(); }

  SsdInputs tokens(Index first, Index count) const {
    using Member = View<Scalar> SsdInputs::*;
    SsdInputs part = *this;
    for (const Member m : {&SsdInputs::x, &SsdInputs::dt, &SsdInputs::B, &SsdInputs::C}) {
      part.*m = (this->*m).middleRows(first, count);
    }
    return part;
  }
};

// The inputs fit each other and the state h (H P, N).
template <class Scalar>
void check_inputs(const char* operation, const SsdInputs<Scalar>& in, const ScanState<Scalar>& h) {
  const Index L = in.length(), H = in.n_heads(), N = h.cols();
  expect_shape(operation, "A", in.A, H, 1);
  expect_split(operation, "x", in.x, H);
  expect_shape(operation, "h", h, in.x.cols(), N);
  expect_shape(operation, "dt", in.dt, L, H);
  expect_groups(operation, "B", in.B, L, N, H);
  expect_shape(operation, "C", in.C, L, in.B.cols());
  if (in.D) expect_shape(operation, "D", in.D, 1, H);
  if (in.dt_bias) expect_shape(operation, "dt_bias", in.dt_bias, 1, H);
}

// delta_t for all t and heads at once: (L, H)
template <class Scalar>
Matrix<Scalar> step_size(const SsdInputs<Scalar>& in) {
  Matrix<Scalar> delta = in.dt;
  if (in.dt_bias) delta.rowwise() += in.dt_bias.row(0);
  if (in.dt_softplus) delta = softplus(delta.array()).eval();
  return delta.array().max(in.dt_min).min(in.dt_max) * in.delta_ratio;
}

template <class Scalar>
void skip(const SsdInputs<Scalar>& in, Matrix<Scalar>& y) {  // y -> y + D x
  const Index P = in.head_dim();
  for (Index i = 0; in.D && i < in.n_heads(); ++i) {
    y.middleCols(i * P, P) += in.D(0, i) * in.x.middleCols(i * P, P);
  }
}

// One token. in: L = 1.  h (H P, N): the (P, N) state of each head, one below the other.
template <class Scalar>
Matrix<Scalar> ssd_step(const SsdInputs<Scalar>& in, ScanState<Scalar> h) {
  check_inputs("ssd_step", in, h);
  expect_shape("ssd_step", "x", in.x, 1, in.x.cols());
  const Index H = in.n_heads(), P = in.head_dim(), N = h.cols();
  const Row<Scalar> delta = step_size(in);
  Matrix<Scalar> y_t(1, H * P);
  for (Index i = 0; i < H; ++i) {
    const Index g = in.group(i, N);
    const auto x_t = in.x.row(0).segment(i * P, P);
    const auto B_t = in.B.row(0).segment(g * N, N);
    const auto C_t = in.C.row(0).segment(g * N, N);
    auto h_t = h.middleRows(i * P, P);

    h_t = exp(delta(i) * in.A(i, 0)) * h_t + (delta(i) * x_t).transpose().lazyProduct(B_t);
    y_t.middleCols(i * P, P).transpose().noalias() = h_t * C_t.transpose();
  }
  skip(in, y_t);
  return y_t;
}

// The recurrence, token by token: the definition.
template <class Scalar>
Matrix<Scalar> ssd_sequential(const SsdInputs<Scalar>& in, ScanState<Scalar> h) {
  Matrix<Scalar> y(in.length(), in.x.cols());
  for (Index t = 0; t < in.length(); ++t) y.row(t) = ssd_step(in.tokens(t, 1), h);
  return y;
}

// exp(l_{s+1} + .. + l_t) at [t, s] for s <= t, else 0.  l (L) -> (L, L). Each sum is made by
// addition alone: differences of totals would cancel, quotients of products would be 0 / 0.
template <class Scalar, class Derived>
Matrix<Scalar> decay_mask(const Eigen::MatrixBase<Derived>& l) {
  const Index L = l.size();
  Matrix<Scalar> mask = Matrix<Scalar>::Zero(L, L);
  Row<Scalar> sum = Row<Scalar>::Zero(L);  // sum[s] = l_{s+1} + .. + l_t
  for (Index t = 0; t < L; ++t) {
    sum.head(t).array() += l(t);
    mask.row(t).head(t + 1) = sum.head(t + 1).array().exp();
  }
  return mask;
}

// The quadratic dual form, for one stretch of L tokens from state h. With l_t = delta_t A:
//   y_t = sum_{s<=t} mask[t, s] (C_t . B_s) delta_s x_s  +  exp(l_0 + .. + l_t) h C_t
//   h'  = exp(l_0 + .. + l_{L-1}) h  +  sum_s mask[L-1, s] (delta_s x_s) B_s^T
template <class Scalar>
Matrix<Scalar> ssd_quadratic(const SsdInputs<Scalar>& in, ScanState<Scalar> h) {
  const Index L = in.length(), H = in.n_heads(), P = in.head_dim(), N = h.cols();
  Matrix<Scalar> y(L, H * P);
  if (L == 0) return y;
  const Matrix<Scalar> delta = step_size(in);
  for (Index i = 0; i < H; ++i) {
    const Index g = in.group(i, N);
    const Matrix<Scalar> B = in.B.middleCols(g * N, N), C = in.C.middleCols(g * N, N);
    const Matrix<Scalar> l = delta.col(i).transpose() * in.A(i, 0);  // (1, L)
    const Matrix<Scalar> mask = decay_mask<Scalar>(l);               // (L, L)
    const Matrix<Scalar> delta_x = delta.col(i).asDiagonal() * in.x.middleCols(i * P, P);
    const Matrix<Scalar> from_start = mask.col(0) * exp(l(0));             // (L, 1)
    const Matrix<Scalar> at_end = mask.row(L - 1).asDiagonal() * delta_x;  // (L, P)
    auto h_i = h.middleRows(i * P, P);

    const Matrix<Scalar> M = mask.cwiseProduct(C * B.transpose());
    y.middleCols(i * P, P) = M * delta_x + from_start.col(0).asDiagonal() * (C * h_i.transpose());
    h_i = from_start(L - 1) * h_i + at_end.transpose() * B;
  }
  skip(in, y);
  return y;
}

// The form of the Mamba-2 paper (section 6): quadratic inside chunks, recurrent between them.
template <class Scalar>
Matrix<Scalar> ssd_chunked(const SsdInputs<Scalar>& in, ScanState<Scalar> h, Index chunk) {
  Matrix<Scalar> y(in.length(), in.x.cols());
  for (Index t = 0; t < in.length(); t += chunk) {
    const SsdInputs<Scalar> part = in.tokens(t, std::min(chunk, in.length() - t));
    y.middleRows(t, part.length()) = ssd_quadratic<Scalar>(part, h);
  }
  return y;
}

// in: see SsdInputs.  h (H P, N): h_{-1} on entry, h_{L-1} on return.  Returns y (L, H P).
// Form::parallel is the quadratic dual: every position at once, L^2 numbers per head.
template <class Scalar>
Matrix<Scalar> ssd(const SsdInputs<Scalar>& in, ScanState<Scalar> h, Form form = Form::chunked,
                   Index chunk = kScanChunk) {
  check_inputs("ssd", in, h);
  if (form == Form::parallel) return ssd_quadratic(in, h);
  if (form == Form::chunked) return ssd_chunked(in, h, chunk);
  return ssd_sequential(in, h);
}

// --- Its backward ---
//
// As that of the selective scan, with d(delta_t A) a single number per head. The chunked form makes
// matrix products of it, too; the state's gradient passes from the last chunk to the first.

template <class Scalar>
struct SsdGradients {  // shapes as in SsdInputs
  Matrix<Scalar> x, dt;
  StateMatrix<Scalar> A;
  Matrix<Scalar> B, C;
  Row<Scalar> D, dt_bias;
};

// ddelta (L, H) -> gradient of dt (L, H). Where delta was clamped it does not depend on dt.
template <class Scalar>
Matrix<Scalar> step_size_backward(const SsdInputs<Scalar>& in, const Matrix<Scalar>& ddelta) {
  Matrix<Scalar> biased = in.dt;
  if (in.dt_bias) biased.rowwise() += in.dt_bias.row(0);
  Matrix<Scalar> d = in.delta_ratio * ddelta, delta = biased;
  if (in.dt_softplus) {
    d.array() *= softplus_derivative(biased.array());
    delta = softplus(biased.array());
  }
  return (delta.array() >= in.dt_min && delta.array() <= in.dt_max).select(d, Scalar(0));
}

// The gradients of y -> y + D x; those that the recurrence adds to are zero. d.dt is the gradient
// of delta until the function after this one makes that of dt.
template <class Scalar>
SsdGradients<Scalar> skip_backward(const SsdInputs<Scalar>& in, const View<Scalar>& dout) {
  const Index L = in.length(), H = in.n_heads(), P = in.head_dim();
  SsdGradients<Scalar> d;
  d.x = Matrix<Scalar>::Zero(L, H * P);
  d.dt = Matrix<Scalar>::Zero(L, H);
  d.A = StateMatrix<Scalar>::Zero(H, 1);
  d.B = d.C = Matrix<Scalar>::Zero(L, in.B.cols());
  if (in.D) d.D.resize(H);
  for (Index i = 0; in.D && i < H; ++i) {
    const auto dy = dout.middleCols(i * P, P);
    d.x.middleCols(i * P, P) = in.D(0, i) * dy;
    d.D(i) = dy.cwiseProduct(in.x.middleCols(i * P, P)).sum();
  }
  return d;
}

template <class Scalar>
SsdGradients<Scalar> finish_ssd_backward(const SsdInputs<Scalar>& in, SsdGradients<Scalar> d) {
  d.dt = step_size_backward(in, d.dt);
  if (in.dt_bias) d.dt_bias = d.dt.colwise().sum();
  return d;
}

// The recurrence, walked back token by token.
template <class Scalar>
SsdGradients<Scalar> ssd_sequential_backward(const SsdInputs<Scalar>& in,
                                             const StateView<Scalar>& h0, const View<Scalar>& dout,
                                             ScanState<Scalar> dh) {
  const Index L = in.length(), P = in.head_dim(), N = dh.cols();
  const Matrix<Scalar> delta = step_size(in);
  std::vector<StateMatrix<Scalar>> h = {h0};  // h[t + 1] is h_t
  for (Index t = 0; t < L; ++t) {
    h.push_back(h[t]);
    ssd_step<Scalar>(in.tokens(t, 1), h[t + 1]);
  }
  SsdGradients<Scalar> d = skip_backward(in, dout);
  for (Index t = L; t-- > 0;) {
    for (Index i = 0; i < in.n_heads(); ++i) {
      const Index g = in.group(i, N);
      const auto B_t = in.B.row(t).segment(g * N, N), C_t = in.C.row(t).segment(g * N, N);
      const auto x_t = in.x.row(t).segment(i * P, P), dy_t = dout.row(t).segment(i * P, P);
      const Scalar delta_t = delta(t, i), A = in.A(i, 0);
      auto dh_t = dh.middleRows(i * P, P);  // (P, N)

      d.C.row(t).segment(g * N, N) += dy_t * h[t + 1].middleRows(i * P, P);
      dh_t += dy_t.transpose() * C_t;
      const Row<Scalar> ddelta_x = B_t * dh_t.transpose();  // (P)
      d.B.row(t).segment(g * N, N) += delta_t * x_t * dh_t;
      d.x.row(t).segment(i * P, P) += delta_t * ddelta_x;
      dh_t *= exp(delta_t * A);  // dh_{t-1}
      const Scalar ddelta_A = dh_t.cwiseProduct(h[t].middleRows(i * P, P)).sum();
      d.A(i, 0) += delta_t * ddelta_A;
      d.dt(t, i) = A * ddelta_A + ddelta_x.dot(x_t);
    }
  }
  return finish_ssd_backward(in, std::move(d));
}

// dl (1, L), given dmask * mask, the gradient of the sums in the exponents: l_u is a term of all
// [t, s] with s < u <= t. As in decay_mask, by addition alone.
template <class Scalar>
Row<Scalar> decay_mask_backward(const Matrix<Scalar>& dsum) {
  const Index L = dsum.rows();
  Row<Scalar> dl(L), later = Row<Scalar>::Zero(L);  // later[s] = sum over t >= u of dsum[t, s]
  for (Index u = L; u-- > 0;) {
    later.head(u) += dsum.row(u).head(u);
    dl(u) = later.head(u).sum();
  }
  return dl;
}

// The quadratic form. With M = mask * (C B^T), f = from_start, e = mask[L-1, :] and X = delta x:
//   y  = M X + f * (C h^T)        dM = dy X^T,  d(C B^T) = mask * dM,  dmask * mask = M * dM
//   h' = f_{L-1} h + (e * X)^T B
//   dX = M^T dy + e * (B dh'^T)                   dC = d(C B^T) B + f * (dy h)
//   dh = (f * dy)^T C + f_{L-1} dh'               dB = d(C B^T)^T C + e * (X dh')
// e, the last row of the mask, and f, its first column times exp(l_0), add to dmask * mask the sums
// of what they multiply. Then l = delta A as before.
template <class Scalar>
SsdGradients<Scalar> ssd_quadratic_backward(const SsdInputs<Scalar>& in,
                                            const StateView<Scalar>& h0, const View<Scalar>& dout,
                                            ScanState<Scalar> dh) {
  const Index L = in.length(), P = in.head_dim(), N = dh.cols();
  SsdGradients<Scalar> d = skip_backward(in, dout);
  if (L == 0) return finish_ssd_backward(in, std::move(d));
  const Matrix<Scalar> delta = step_size(in);
  for (Index i = 0; i < in.n_heads(); ++i) {
    const Index g = in.group(i, N);
    const Matrix<Scalar> B = in.B.middleCols(g * N, N), C = in.C.middleCols(g * N, N);
    const Matrix<Scalar> x = in.x.middleCols(i * P, P), dy = dout.middleCols(i * P, P);
    const Matrix<Scalar> h = h0.middleRows(i * P, P), dh_after = dh.middleRows(i * P, P);
    const Matrix<Scalar> X = delta.col(i).asDiagonal() * x;
    const Matrix<Scalar> l = delta.col(i).transpose() * in.A(i, 0);  // (1, L)
    const Matrix<Scalar> mask = decay_mask<Scalar>(l);               // (L, L)
    const auto f = (mask.col(0) * exp(l(0))).eval();                 // (L)
    const auto e = mask.row(L - 1).transpose().eval();               // (L)

    const Matrix<Scalar> M = mask.cwiseProduct(C * B.transpose()), dM = dy * X.transpose();
    const Matrix<Scalar> dCB = mask.cwiseProduct(dM);
    const Matrix<Scalar> e_dX = e.asDiagonal() * B * dh_after.transpose();  // (L, P)
    const Matrix<Scalar> f_dC = f.asDiagonal() * dy * h;                    // (L, N)
    const Matrix<Scalar> dX = M.transpose() * dy + e_dX;
    d.C.middleCols(g * N, N) += dCB * B + f_dC;
    d.B.middleCols(g * N, N) += dCB.transpose() * C + e.asDiagonal() * X * dh_after;
    dh.middleRows(i * P, P) = dy.transpose() * f.asDiagonal() * C + f(L - 1) * dh_after;

    Matrix<Scalar> dsum = M.cwiseProduct(dM);  // dmask * mask
    dsum.row(L - 1) += e_dX.cwiseProduct(X).rowwise().sum().transpose();
    auto f_df = f_dC.cwiseProduct(C).rowwise().sum().eval();
    f_df(L - 1) += f(L - 1) * dh_after.cwiseProduct(h).sum();
    dsum.col(0) += f_df;
    Row<Scalar> dl = decay_mask_backward(dsum);
    dl(0) += f_df.sum();
    d.A(i, 0) = dl.dot(delta.col(i));
    d.dt.col(i) = dl.transpose() * in.A(i, 0) + dX.cwiseProduct(x).rowwise().sum();
    d.x.middleCols(i * P, P) += delta.col(i).asDiagonal() * dX;
  }
  return finish_ssd_backward(in, std::move(d));
}

// Quadratic inside chunks; between them the states go forward and their gradients back.
template <class Scalar>
SsdGradients<Scalar> ssd_chunked_backward(const SsdInputs<Scalar>& in, const StateView<Scalar>& h0,
                                          const View<Scalar>& dout, ScanState<Scalar> dh,
                                          Index chunk) {
  using Rows = Matrix<Scalar> SsdGradients<Scalar>::*;
  const auto part = [&](Index t) { return in.tokens(t, std::min(chunk, in.length() - t)); };
  std::vector<StateMatrix<Scalar>> start = {h0};
  for (Index t = 0; t < in.length(); t += chunk) {
    start.push_back(start.back());
    ssd_quadratic<Scalar>(part(t), start.back());
  }
  SsdGradients<Scalar> all = finish_ssd_backward(in, skip_backward(in, dout));
  all.D.setZero();
  for (Index i = Index(start.size()) - 1; i-- > 0;) {
    const Index t = i * chunk, count = part(t).length();
    const auto d = ssd_quadratic_backward<Scalar>(part(t), start[i], dout.middleRows(t, count), dh);
    for (const Rows m : {&SsdGradients<Scalar>::x, &SsdGradients<Scalar>::dt,
                         &SsdGradients<Scalar>::B, &SsdGradients<Scalar>::C}) {
      (all.*m).middleRows(t, count) = d.*m;
    }
    all.A += d.A;
    all.D += d.D;
    all.dt_bias += d.dt_bias;
  }
  return all;
}

// in: see SsdInputs.  h0 (H P, N): h_{-1}.  dout (L, H P).  dh (H P, N): of h_{L-1} on entry, of
// h_{-1} on return.
template <class Scalar>
SsdGradients<Scalar> ssd_backward(const SsdInputs<Scalar>& in, const StateView<Scalar>& h0,
                                  const View<Scalar>& dout, ScanState<Scalar> dh,
                                  Form form = Form::sequential, Index chunk = kScanChunk) {
  check_inputs("ssd_backward", in, dh);
  expect_shape("ssd_backward", "h0", h0, dh.rows(), dh.cols());
  expect_shape("ssd_backward", "dout", dout, in.x.rows(), in.x.cols());
  if (form == Form::parallel) return ssd_quadratic_backward(in, h0, dout, dh);
  if (form == Form::chunked) return ssd_chunked_backward(in, h0, dout, dh, chunk);
  return ssd_sequential_backward(in, h0, dout, dh);
}

// ============================================================================================
// The matrix that a scan multiplies by
// ============================================================================================
//
// From a zero state, and with delta, B and C given, both scans are linear in x: y = M x for each
// channel, with M (L, L) lower triangular. Written out, before the gate:
//   selective scan   M[t, s] = sum_n C_t[n] exp(A[n] (delta_{s+1} + .. + delta_t)) delta_s B_s[n]
//   SSD              M[t, s] = exp(A (delta_{s+1} + .. + delta_t)) (C_t . B_s) delta_s
// and D on the diagonal. Row t says how much of every earlier token is in y_t, as a row of an
// attention matrix would (Mamba-2, section 3). It costs L^2: something to look at.

// Channel c of a selective scan.  delta (L, d): step_size(in)
template <class Scalar>
Matrix<Scalar> implied_attention(const ScanInputs<Scalar>& in, const Matrix<Scalar>& delta,
                                 Index c) {
  const Index L = in.length(), N = in.A.cols(), g = in.group(c);
  const auto delta_c = delta.col(c);
  Matrix<Scalar> M = Matrix<Scalar>::Zero(L, L);
  for (Index n = 0; n < N; ++n) {
    const auto B_n = in.B.col(g * N + n), C_n = in.C.col(g * N + n);
    M += C_n.asDiagonal() * decay_mask<Scalar>(delta_c * in.A(c, n)) *
         delta_c.cwiseProduct(B_n).asDiagonal();
  }
  if (in.D) M.diagonal().array() += in.D(0, c);
  return M;
}

// Head i of an SSD; its head_dim channels share one matrix.  delta (L, H): step_size(in)
template <class Scalar>
Matrix<Scalar> implied_attention(const SsdInputs<Scalar>& in, const Matrix<Scalar>& delta, Index i,
                                 Index N) {
  const auto B = in.B.middleCols(in.group(i, N) * N, N), C = in.C.middleCols(in.group(i, N) * N, N);
  const Matrix<Scalar> mask = decay_mask<Scalar>(delta.col(i) * in.A(i, 0));
  Matrix<Scalar> M = mask.cwiseProduct(C * B.transpose()) * delta.col(i).asDiagonal();
  if (in.D) M.diagonal().array() += in.D(0, i);
  return M;
}

// ============================================================================================
// Causal attention, which a scan takes the place of
// ============================================================================================
//
// Hybrid models keep it in some layers; a Transformer has nothing else. Every token has a query q,
// a key k and a value v, and per head of P numbers (Vaswani et al., section 3.2.1)
//   S[t, s] = q_t . k_s / sqrt(P)                                for s <= t
//   p[t, s] = exp(S[t, s]) / sum_{s' <= t} exp(S[t, s'])
//   out_t   = sum_{s <= t} p[t, s] v_s
// Heads of queries that are neighbours may share a key and a value. Nothing of the past is summed
// up: the state is all keys and values so far. It grows with the text, and with it what a token
// costs, where a scan's state and cost stay the same.

template <class Scalar>
struct AttentionInputs {
  View<Scalar> q;      // (L, H P)  head after head
  View<Scalar> k, v;   // (L, G P)  for G groups of H / G neighbouring heads
  Index head_dim = 0;  // P

  Index n_heads() const { return q.cols() / head_dim; }
  Index group(Index head) const { return head * (k.cols() / head_dim) / n_heads(); }
};

template <class Scalar>
struct AttentionState {
  Matrix<Scalar> keys, values;  // (T, G P)  of all T tokens so far
};

// The inputs fit each other and the state.
template <class Scalar>
void check_inputs(const char* operation, const AttentionInputs<Scalar>& in,
                  const AttentionState<Scalar>& state) {
  expect_split(operation, "q", in.q, in.head_dim);
  expect_groups(operation, "k", in.k, in.q.rows(), in.head_dim, in.n_heads());
  expect_shape(operation, "v", in.v, in.k.rows(), in.k.cols());
  expect_shape(operation, "keys", state.keys, state.keys.rows(), in.k.cols());
  expect_shape(operation, "values", state.values, state.keys.rows(), in.k.cols());
}

// The state takes the keys and values of L more tokens: T grows by L.
template <class Scalar>
void remember(const AttentionInputs<Scalar>& in, AttentionState<Scalar>& state) {
  const Index T = state.keys.rows() + in.k.rows();
  state.keys.conservativeResize(T, in.k.cols());
  state.values.conservativeResize(T, in.v.cols());
  state.keys.bottomRows(in.k.rows()) = in.k;
  state.values.bottomRows(in.v.rows()) = in.v;
}

// p (L, T) of one head. q (L, P); keys (T, P); the queries are those of the last L of T tokens. The
// largest S of a row is subtracted from all, so that exp cannot overflow.
template <class Scalar>
Matrix<Scalar> attention_weights(const View<Scalar>& q, const View<Scalar>& keys) {
  const Index L = q.rows(), T = keys.rows();
  Matrix<Scalar> p = q * keys.transpose() / sqrt(Scalar(q.cols()));
  for (Index t = 0; t < L; ++t) {
    auto seen = p.row(t).head(T - L + t + 1).array();
    seen = (seen - seen.maxCoeff()).exp();
    seen /= seen.sum();
    p.row(t).tail(L - t - 1).setZero();
  }
  return p;
}

// One query after the other: the definition.  -> out (L, P)
template <class Scalar>
Matrix<Scalar> attend_sequential(const View<Scalar>& q, const View<Scalar>& keys,
                                 const View<Scalar>& values) {
  const Index L = q.rows(), past = keys.rows() - L;
  Matrix<Scalar> out(L, q.cols());
  for (Index t = 0; t < L; ++t) {
    const Index T = past + t + 1;
    out.row(t) = attention_weights<Scalar>(q.middleRows(t, 1), keys.topRows(T)) * values.topRows(T);
  }
  return out;
}

// A block of keys after the other, with a running softmax (Dao et al., algorithm 1): no row of p is
// ever whole. A query keeps the largest S of the blocks so far, m, and in units of e^m
//   total = sum_s exp(S[t, s] - m),      out = sum_s exp(S[t, s] - m) v_s
// A block that raises m to m' first shrinks both by exp(m - m'). In the end out / total is left.
template <class Scalar>
Matrix<Scalar> attend_chunked(const View<Scalar>& q, const View<Scalar>& keys,
                              const View<Scalar>& values, Index chunk) {
  const Index L = q.rows(), T = keys.rows(), past = T - L;
  Matrix<Scalar> out = Matrix<Scalar>::Zero(L, q.cols());
  Row<Scalar> total = Row<Scalar>::Zero(L), m = Row<Scalar>::Zero(L);
  for (Index first = 0; first < T; first += chunk) {
    const Index count = std::min(chunk, T - first);
    const Index begin = std::max<Index>(0, first - past);  // queries before it see nothing here
    Matrix<Scalar> p = q.bottomRows(L - begin) * keys.middleRows(first, count).transpose() /
                       sqrt(Scalar(q.cols()));
    for (Index t = begin; t < L; ++t) {
      const Index n = std::min(count, past + t + 1 - first);
      auto seen = p.row(t - begin).head(n).array();
      const Scalar largest = first == 0 ? seen.maxCoeff() : std::max(m(t), seen.maxCoeff());
      const Scalar shrink = first == 0 ? Scalar(0) : exp(m(t) - largest);
      seen = (seen - largest).exp();
      p.row(t - begin).tail(count - n).setZero();
      total(t) = shrink * total(t) + seen.sum();
      out.row(t) *= shrink;
      m(t) = largest;
    }
    out.bottomRows(L - begin) += p * values.middleRows(first, count);
  }
  return total.cwiseInverse().asDiagonal() * out;
}

// One head. q (L, P); keys, values (T, P), those of the queries' tokens last.  -> out (L, P)
template <class Scalar>
Matrix<Scalar> attend(const View<Scalar>& q, const View<Scalar>& keys, const View<Scalar>& values,
                      Form form, Index chunk = kScanChunk) {
  if (form == Form::parallel) return attention_weights(q, keys) * values;  // L T numbers
  if (form == Form::chunked) return attend_chunked(q, keys, values, chunk);
  return attend_sequential(q, keys, values);
}

// in: see AttentionInputs.  state: of the tokens before on entry, with these on return.
// Returns out (L, H P).
template <class Scalar>
Matrix<Scalar> causal_attention(const AttentionInputs<Scalar>& in, AttentionState<Scalar>& state,
                                Form form = Form::sequential, Index chunk = kScanChunk) {
  check_inputs("causal_attention", in, state);
  const Index P = in.head_dim;
  remember(in, state);
  Matrix<Scalar> out(in.q.rows(), in.q.cols());
  for (Index i = 0; i < in.n_heads(); ++i) {
    const Index g = in.group(i);
    out.middleCols(i * P, P) =
        attend<Scalar>(in.q.middleCols(i * P, P), state.keys.middleCols(g * P, P),
                       state.values.middleCols(g * P, P), form, chunk);
  }
  return out;
}

// --- Its backward ---
//
//   dv_s     = sum_t p[t, s] dout_t,       dp[t, s] = dout_t . v_s
//   dS[t, s] = p[t, s] (dp[t, s] - sum_s' p[t, s'] dp[t, s'])             of the softmax
//   dq_t     = sum_s dS[t, s] k_s / sqrt(P),      dk_s = sum_t dS[t, s] q_t / sqrt(P)
// The sum over s' is dout_t . out_t. Sums over t are over the queries of all heads of a group.

template <class Scalar>
struct AttentionGradients {  // shapes as in AttentionInputs
  Matrix<Scalar> q, k, v;
};

// One head; adds to dkeys and dvalues (T, P), returns dq (L, P). p is made again, some queries at a
// time.
template <class Scalar>
Matrix<Scalar> attend_backward(const View<Scalar>& q, const View<Scalar>& keys,
                               const View<Scalar>& values, const View<Scalar>& dout,
                               ConvState<Scalar> dkeys, ConvState<Scalar> dvalues) {
  const Index L = q.rows(), past = keys.rows() - L;
  const Scalar scale = 1 / sqrt(Scalar(q.cols()));
  Matrix<Scalar> dq(L, q.cols());
  for (Index t = 0; t < L; t += kScanChunk) {
    const Index count = std::min(kScanChunk, L - t), T = past + t + count;
    const auto q_t = q.middleRows(t, count), dout_t = dout.middleRows(t, count);
    const Matrix<Scalar> p = attention_weights<Scalar>(q_t, keys.topRows(T));
    const Matrix<Scalar> p_dp = p.cwiseProduct(dout_t * values.topRows(T).transpose());
    const Matrix<Scalar> dS = scale * (p_dp - p_dp.rowwise().sum().asDiagonal() * p);
    dq.middleRows(t, count) = dS * keys.topRows(T);
    dkeys.topRows(T) += dS.transpose() * q_t;
    dvalues.topRows(T) += p.transpose() * dout_t;
  }
  return dq;
}

// in: see AttentionInputs.  past: the state before.  dout (L, H P).  dstate: of the state after on
// entry, (T, G P) each, of that before on return.
template <class Scalar>
AttentionGradients<Scalar> causal_attention_backward(const AttentionInputs<Scalar>& in,
                                                     const AttentionState<Scalar>& past,
                                                     const View<Scalar>& dout,
                                                     AttentionState<Scalar>& dstate) {
  check_inputs("causal_attention_backward", in, past);
  expect_shape("causal_attention_backward", "dout", dout, in.q.rows(), in.q.cols());
  const Index P = in.head_dim, L = in.q.rows(), before = past.keys.rows();
  AttentionState<Scalar> state = past;
  remember(in, state);
  for (const auto* d : {&dstate.keys, &dstate.values})
    expect_shape("causal_attention_backward", "dstate", *d, before + L, in.k.cols());
  AttentionGradients<Scalar> d = {Matrix<Scalar>(L, in.q.cols()), {}, {}};
  for (Index i = 0; i < in.n_heads(); ++i) {
    const Index g = in.group(i) * P;
    d.q.middleCols(i * P, P) = attend_backward<Scalar>(
        in.q.middleCols(i * P, P), state.keys.middleCols(g, P), state.values.middleCols(g, P),
        dout.middleCols(i * P, P), dstate.keys.middleCols(g, P), dstate.values.middleCols(g, P));
  }
  d.k = dstate.keys.bottomRows(L);
  d.v = dstate.values.bottomRows(L);
  dstate.keys.conservativeResize(before, Eigen::NoChange);
  dstate.values.conservativeResize(before, Eigen::NoChange);
  return d;
}

// Attention itself does not know the order of tokens. Rotary position (Su et al., section 3.2): the
// first `turning` numbers of a head of P are points of the plane, the first half of them paired
// with the second half, and point i of token t is turned by an angle:
//   theta_i = t base^(-2 i / turning)
//   out_i        = x_i cos(theta_i) - x_{i + half} sin(theta_i)
//   out_{i+half} = x_i sin(theta_i) + x_{i + half} cos(theta_i)
// A query and a key turned so have a product that depends on how far they are apart, and not on
// where they are. x (L, heads P); `first`: the position of its first token. Angles are double:
// in float, t theta would be far off at large t.
template <class Scalar>
Matrix<Scalar> rotary(const View<Scalar>& x, Index head_dim, Index turning, Index first,
                      double base = 10000, double direction = 1) {
  expect_split("rotary", "x", x, head_dim);
  const Index half = turning / 2;
  Matrix<Scalar> out = x;
  for (Index t = 0; t < x.rows(); ++t) {
    for (Index i = 0; i < half; ++i) {
      const double frequency = std::pow(base, -2.0 * double(i) / double(turning));
      const double theta = direction * double(first + t) * frequency;
      const Scalar cosine = Scalar(std::cos(theta)), sine = Scalar(std::sin(theta));
      for (Index c = i; c < x.cols(); c += head_dim) {
        out(t, c) = x(t, c) * cosine - x(t, c + half) * sine;
        out(t, c + half) = x(t, c) * sine + x(t, c + half) * cosine;
      }
    }
  }
  return out;
}

// A rotation's transpose turns the other way.
template <class Scalar>
Matrix<Scalar> rotary_backward(const View<Scalar>& dout, Index head_dim, Index turning, Index first,
                               double base = 10000) {
  return rotary(dout, head_dim, turning, first, base, -1);
}

// ============================================================================================
// Blocks
// ============================================================================================

// Layers of a hybrid that have attention in place of a scan.
struct AttentionSizes {
  Index n_heads = 0, n_kv_heads = 0;  // H heads of queries, G of keys and values
  Index head_dim = 0;                 // P
  Index rotary_dim = 0;               // numbers of a head that turn; 0: none
  Index d_conv = 0;                   // taps of a convolution over q, k and v; 0: none
  double rotary_base = 10000;

  Index q_width() const { return n_heads * head_dim; }
  Index kv_width() const { return n_kv_heads * head_dim; }
  Index in_proj_width() const { return q_width() + 2 * kv_width(); }
};

struct Sizes {
  int version = 1;  // 1: Mamba, 2: Mamba-2
  Index d_model = 0, n_layer = 0, vocab_size = 0;
  Index d_inner = 0, d_state = 0, d_conv = 0;
  Index dt_rank = 0;                              // Mamba
  Index n_heads = 0, head_dim = 0, n_groups = 1;  // Mamba-2
  double norm_eps = 1e-5;
  double dt_min = 0;  // Mamba-2: limits of delta
  double dt_max = std::numeric_limits<double>::infinity();
  bool rms_norm = true;                 // false: layer_norm
  Index d_intermediate = 0;             // width of the MLP after each block; 0: none
  std::vector<Index> attention_layers;  // of a hybrid, ascending
  AttentionSizes attention;

  bool attends(Index layer) const {
    return std::binary_search(attention_layers.begin(), attention_layers.end(), layer);
  }
  // What passes through the convolution: x in Mamba, [x | B | C] in Mamba-2.
  Index conv_width() const { return version == 1 ? d_inner : d_inner + 2 * n_groups * d_state; }
  Index in_proj_width() const {
    return version == 1 ? 2 * d_inner : d_inner + conv_width() + n_heads;
  }
};

// The operations that a model is made of. A program may bring its own storage of weights and its
// own threads by saying here how they are carried out (mamba.cpp does); this is the plain meaning.
template <class Scalar, class Weight>
struct Compute {
  // y = x W^T.  x (L, in), W (out, in) -> (L, out)
  static Matrix<Scalar> linear(const View<Scalar>& x, const Weight& W) {
    expect_shape("linear", "x", x, x.rows(), W.cols());
    return x * W.transpose();
  }
  static Row<Scalar> row(const Weight& W, Index i) { return W.row(i); }
  static Matrix<Scalar> causal_conv1d(const View<Scalar>& x, const View<Scalar>& weight,
                                      const View<Scalar>& bias, ConvState<Scalar> state) {
    return ssm::causal_conv1d<Scalar>(x, weight, bias, state);
  }
  static Matrix<Scalar> selective_scan(const ScanInputs<Scalar>& in, ScanState<Scalar> h,
                                       Form form) {
    return ssm::selective_scan<Scalar>(in, h, form);
  }
  static Matrix<Scalar> ssd(const SsdInputs<Scalar>& in, ScanState<Scalar> h, Form form) {
    return ssm::ssd<Scalar>(in, h, form);
  }
  static Matrix<Scalar> causal_attention(const AttentionInputs<Scalar>& in,
                                         AttentionState<Scalar>& state, Form form) {
    return ssm::causal_attention<Scalar>(in, state, form);
  }

  // dx = dy W, and dW = dy^T x is added to what is there: weights are used by many tokens.
  static Matrix<Scalar> linear_backward(const View<Scalar>& x, const Weight& W,
                                        const View<Scalar>& dy, Matrix<Scalar>& dW) {
    dW.noalias() += dy.transpose() * x;
    return dy * W;
  }
  static ConvGradients<Scalar> causal_conv1d_backward(
      const View<Scalar>& x, const View<Scalar>& weight, const View<Scalar>& bias,
      const View<Scalar>& state, const View<Scalar>& dout, ConvState<Scalar> dstate) {
    return ssm::causal_conv1d_backward<Scalar>(x, weight, bias, state, dout, dstate);
  }
  static ScanGradients<Scalar> selective_scan_backward(const ScanInputs<Scalar>& in,
                                                       const StateView<Scalar>& h0,
                                                       const View<Scalar>& dout,
                                                       ScanState<Scalar> dh) {
    return ssm::selective_scan_backward<Scalar>(in, h0, dout, dh);
  }
  static SsdGradients<Scalar> ssd_backward(const SsdInputs<Scalar>& in, const StateView<Scalar>& h0,
                                           const View<Scalar>& dout, ScanState<Scalar> dh,
                                           Form form) {
    return ssm::ssd_backward<Scalar>(in, h0, dout, dh, form);
  }
};

template <class Scalar, class Weight = Matrix<Scalar>>
struct Layer {                 // widths of a layer with attention: see AttentionSizes
  Row<Scalar> norm;            // (d_model)
  Weight in_proj;              // (in_proj_width, d_model)
  Row<Scalar> in_proj_bias;    // (in_proj_width) or empty
  Matrix<Scalar> conv_weight;  // (conv_width, d_conv)
  Row<Scalar> conv_bias;       // (conv_width) or empty
  Weight x_proj, dt_proj;      // Mamba: (dt_rank + 2 N, d_inner), (d_inner, dt_rank)
  Row<Scalar> dt_bias;         // (d_inner) or (n_heads)
  StateMatrix<Scalar> A;       // (d_inner, N) or (n_heads, 1);  -exp(A_log)
  Row<Scalar> D;               // (d_inner) or (n_heads)
  Row<Scalar> gated_norm;      // Mamba-2: (d_inner)
  Weight out_proj;             // (d_model, d_inner)
  Row<Scalar> out_proj_bias;   // (d_model) or empty
  Row<Scalar> norm_bias;       // (d_model) of layer_norm, else empty
  Row<Scalar> norm2;           // (d_model) with an MLP, else these are empty
  Row<Scalar> norm2_bias;      // (d_model) of layer_norm
  Weight fc1, fc2;             // (2 d_intermediate, d_model), (d_model, d_intermediate)
};

// All that a layer remembers of the past. With a scan its size does not depend on the length of the
// past; with attention it does: `past` grows with every token.
template <class Scalar>
struct LayerState {
  Matrix<Scalar> conv;  // (d_conv - 1, conv_width)  the inputs the convolution still looks back to
  StateMatrix<Scalar> h;        // (d_inner, N)
  AttentionState<Scalar> past;  // (T, G P) twice; keys as rotary has turned them
  LayerState(const Sizes& sizes, Index layer) {
    const AttentionSizes& a = sizes.attention;
    if (sizes.attends(layer)) {
      conv = Matrix<Scalar>::Zero(std::max<Index>(0, a.d_conv - 1), a.in_proj_width());
      past.keys = past.values = Matrix<Scalar>::Zero(0, a.kv_width());
    } else {
      conv = Matrix<Scalar>::Zero(sizes.d_conv - 1, sizes.conv_width());
      h = StateMatrix<Scalar>::Zero(sizes.d_inner, sizes.d_state);
    }
  }
};

// What passed through one layer, for those who want to look inside: scan_inputs and ssd_inputs
// below turn it into the inputs of the layer's scan.
template <class Scalar>
struct Trace {
  Index layer = 0;           // the one to follow
  Matrix<Scalar> projected;  // (L, in_proj_width)
  Matrix<Scalar> convolved;  // (L, conv_width); attention: q, k and v, turned
  Matrix<Scalar> dt_B_C;     // Mamba: (L, dt_rank + 2 N)
  Matrix<Scalar> delta;      // Mamba: (L, d_inner)  before bias and softplus
  Matrix<Scalar> conv_out;   // (L, conv_width)  convolved, before silu
  Matrix<Scalar> y;          // (L, d_inner)  output of the scan; attention: (L, H P)
};

// How a sequence is walked; delta_ratio as in ScanInputs.
template <class Scalar>
struct Options {
  Form form = Form::sequential;
  Scalar delta_ratio = Scalar(1);
  Trace<Scalar>* trace = nullptr;  // filled if given
  // Filled if given: the residual stream, (L, d_model), before each block and each MLP, and after
  // the last.
  std::vector<Matrix<Scalar>>* residuals = nullptr;
};

template <class Scalar, class Weight>
Matrix<Scalar> linear(const View<Scalar>& x, const Weight& W, const Row<Scalar>& bias = {}) {
  Matrix<Scalar> y = Compute<Scalar, Weight>::linear(x, W);
  if (bias.size()) y.rowwise() += bias;
  return y;
}

// y = x W^T + bias:  dx = dy W,  dW += dy^T x,  dbias += sum_t dy_t, which is empty if bias is.
template <class Scalar, class Weight>
Matrix<Scalar> linear_backward(const View<Scalar>& x, const Weight& W, const View<Scalar>& dy,
                               Matrix<Scalar>& dW, Row<Scalar>& dbias) {
  if (dbias.size()) dbias += dy.colwise().sum();
  return Compute<Scalar, Weight>::linear_backward(x, W, dy, dW);
}

// What the scan of a Mamba layer reads. xz: output of in_proj, x: of the convolution, dt_B_C: of
// x_proj, delta: of dt_proj.
template <class Scalar, class Weight>
ScanInputs<Scalar> scan_inputs(const Layer<Scalar, Weight>& w, const Sizes& sizes,
                               const Matrix<Scalar>& xz, const Matrix<Scalar>& x,
                               const Matrix<Scalar>& dt_B_C, const Matrix<Scalar>& delta) {
  ScanInputs<Scalar> in;
  in.x = x;
  in.delta = delta;
  in.A = w.A;
  in.B = dt_B_C.middleCols(sizes.dt_rank, sizes.d_state);
  in.C = dt_B_C.rightCols(sizes.d_state);
  in.D = w.D;
  in.z = xz.rightCols(sizes.d_inner);
  in.delta_bias = w.dt_bias;
  return in;
}

// The Mamba block (Mamba, Figure 3) without its norm and residual.  u (L, d_model) -> (L, d_model).
// With L = 1 it is the step of a model that generates: `state` carries all that came before.
template <class Scalar, class Weight>
Matrix<Scalar> mamba_block(const Layer<Scalar, Weight>& w, const Sizes& sizes,
                           const Matrix<Scalar>& u, LayerState<Scalar>& state,
                           const Options<Scalar>& options) {
  using Op = Compute<Scalar, Weight>;
  const Matrix<Scalar> xz = linear<Scalar>(u, w.in_proj, w.in_proj_bias);  // (L, 2 d_inner)
  const Matrix<Scalar> x_conv =
      Op::causal_conv1d(xz.leftCols(sizes.d_inner), w.conv_weight, w.conv_bias, state.conv);
  const Matrix<Scalar> x = silu(x_conv.array());              // (L, d_inner)
  const Matrix<Scalar> dt_B_C = linear<Scalar>(x, w.x_proj);  // (L, dt_rank + 2 N)
  const Matrix<Scalar> delta = linear<Scalar>(dt_B_C.leftCols(sizes.dt_rank), w.dt_proj);
  auto in = scan_inputs(w, sizes, xz, x, dt_B_C, delta);
  in.delta_ratio = options.delta_ratio;
  const Matrix<Scalar> y = Op::selective_scan(in, state.h, options.form);  // (L, d_inner)
  if (options.trace) *options.trace = {options.trace->layer, xz, x, dt_B_C, delta, x_conv, y};
  return linear<Scalar>(y, w.out_proj, w.out_proj_bias);
}

// Where both blocks' backwards add to the gradients of a layer, dw, those of their convolution and
// scan. The parameter behind A is A_log: A = -exp(A_log), so dA_log = dA * A. This is the one place
// where it is made; dw.A is the gradient of A_log.
template <class Scalar, class Weight, class Scan>
void add_gradients(const Layer<Scalar, Weight>& w, const ConvGradients<Scalar>& conv,
                   const Scan& scan, const Row<Scalar>& dt_bias, Layer<Scalar>& dw) {
  dw.conv_weight += conv.weight;
  dw.conv_bias += conv.bias;
  dw.A += scan.A.cwiseProduct(w.A);
  dw.D += scan.D;
  dw.dt_bias += dt_bias;
}

// The block's way back, arrow by arrow. Nothing is kept of the forward but its input u and the
// state it began with: the block runs again. dout (L, d_model) -> du (L, d_model); dstate as dh
// above; the weights' gradients are added to dw.
template <class Scalar, class Weight>
Matrix<Scalar> mamba_block_backward(const Layer<Scalar, Weight>& w, const Sizes& sizes,
                                    const Matrix<Scalar>& u, const LayerState<Scalar>& start,
                                    const Matrix<Scalar>& dout, LayerState<Scalar>& dstate,
                                    Layer<Scalar>& dw, const Options<Scalar>& options) {
  using Op = Compute<Scalar, Weight>;
  Trace<Scalar> kept;
  LayerState<Scalar> state = start;
  mamba_block(w, sizes, u, state, {options.form, options.delta_ratio, &kept});
  const auto& [_, xz, x, dt_B_C, delta, x_conv, y] = kept;
  auto in = scan_inputs(w, sizes, xz, x, dt_B_C, delta);
  in.delta_ratio = options.delta_ratio;

  const Matrix<Scalar> dy =
      linear_backward<Scalar>(y, w.out_proj, dout, dw.out_proj, dw.out_proj_bias);
  const auto scan = Op::selective_scan_backward(in, start.h, dy, dstate.h);
  Matrix<Scalar> ddt_B_C(u.rows(), dt_B_C.cols()), dxz(u.rows(), xz.cols());
  ddt_B_C << Op::linear_backward(dt_B_C.leftCols(sizes.dt_rank), w.dt_proj, scan.delta, dw.dt_proj),
      scan.B, scan.C;
  Matrix<Scalar> dx = scan.x + Op::linear_backward(x, w.x_proj, ddt_B_C, dw.x_proj);
  dx.array() *= silu_derivative(x_conv.array());
  const auto conv = Op::causal_conv1d_backward(xz.leftCols(sizes.d_inner), w.conv_weight,
                                               w.conv_bias, start.conv, dx, dstate.conv);
  dxz << conv.x, scan.z;
  add_gradients(w, conv, scan, scan.delta_bias, dw);
  return linear_backward<Scalar>(u, w.in_proj, dxz, dw.in_proj, dw.in_proj_bias);
}

// What the SSD of a Mamba-2 layer reads. zxBCdt: output of in_proj, xBC: of the convolution.
template <class Scalar, class Weight>
SsdInputs<Scalar> ssd_inputs(const Layer<Scalar, Weight>& w, const Sizes& sizes,
                             const Matrix<Scalar>& zxBCdt, const Matrix<Scalar>& xBC) {
  const Index GN = sizes.n_groups * sizes.d_state;
  SsdInputs<Scalar> in;
  in.x = xBC.leftCols(sizes.d_inner);
  in.dt = zxBCdt.rightCols(sizes.n_heads);
  in.A = w.A;
  in.B = xBC.middleCols(sizes.d_inner, GN);
  in.C = xBC.rightCols(GN);
  in.D = w.D;
  in.dt_bias = w.dt_bias;
  in.dt_min = Scalar(sizes.dt_min);
  in.dt_max = Scalar(sizes.dt_max);
  return in;
}

// The Mamba-2 block (Mamba-2, Figure 6): one projection makes z, x, B, C and dt side by side, x, B
// and C pass through the convolution, and a gated norm stands before the last projection.
//
//   u ── in_proj ──┬── z (d_inner) ───────────────────────────────────────┐
//                  ├── x B C (conv_width) ── causal_conv1d ─ silu ─ ssd ─ gated_rms_norm ─ out_proj
//                  └── dt (n_heads) ─────────────────────────────────┘
template <class Scalar, class Weight>
Matrix<Scalar> mamba2_block(const Layer<Scalar, Weight>& w, const Sizes& sizes,
                            const Matrix<Scalar>& u, LayerState<Scalar>& state,
                            const Options<Scalar>& options) {
  using Op = Compute<Scalar, Weight>;
  const Matrix<Scalar> zxBCdt = linear<Scalar>(u, w.in_proj, w.in_proj_bias);  // (L, in_proj_width)
  const Matrix<Scalar> xBC_conv = Op::causal_conv1d(
      zxBCdt.middleCols(sizes.d_inner, sizes.conv_width()), w.conv_weight, w.conv_bias, state.conv);
  const Matrix<Scalar> xBC = silu(xBC_conv.array());  // (L, conv_width)
  auto in = ssd_inputs(w, sizes, zxBCdt, xBC);
  in.delta_ratio = options.delta_ratio;
  const Matrix<Scalar> y = Op::ssd(in, state.h, options.form);  // (L, d_inner)
  if (options.trace) *options.trace = {options.trace->layer, zxBCdt, xBC, {}, {}, xBC_conv, y};
  const Matrix<Scalar> normed = gated_rms_norm<Scalar>(
      y, zxBCdt.leftCols(sizes.d_inner), w.gated_norm, Scalar(sizes.norm_eps), sizes.n_groups);
  return linear<Scalar>(normed, w.out_proj, w.out_proj_bias);
}

// As mamba_block_backward.
template <class Scalar, class Weight>
Matrix<Scalar> mamba2_block_backward(const Layer<Scalar, Weight>& w, const Sizes& sizes,
                                     const Matrix<Scalar>& u, const LayerState<Scalar>& start,
                                     const Matrix<Scalar>& dout, LayerState<Scalar>& dstate,
                                     Layer<Scalar>& dw, const Options<Scalar>& options) {
  using Op = Compute<Scalar, Weight>;
  Trace<Scalar> kept;
  LayerState<Scalar> state = start;
  mamba2_block(w, sizes, u, state, {options.form, options.delta_ratio, &kept});
  const auto& [_, zxBCdt, xBC, none, no_delta, xBC_conv, y] = kept;
  auto in = ssd_inputs(w, sizes, zxBCdt, xBC);
  in.delta_ratio = options.delta_ratio;
  const ViewOf<Matrix<Scalar>> z = zxBCdt.leftCols(sizes.d_inner);
  const Scalar eps = Scalar(sizes.norm_eps);

  const Matrix<Scalar> normed = gated_rms_norm<Scalar>(y, z, w.gated_norm, eps, sizes.n_groups);
  const Matrix<Scalar> dnormed =
      linear_backward<Scalar>(normed, w.out_proj, dout, dw.out_proj, dw.out_proj_bias);
  const auto norm =
      gated_rms_norm_backward<Scalar>(y, z, w.gated_norm, eps, sizes.n_groups, dnormed);
  const auto scan = Op::ssd_backward(in, start.h, norm.y, dstate.h, options.form);
  Matrix<Scalar> dxBC(u.rows(), xBC.cols()), dzxBCdt(u.rows(), zxBCdt.cols());
  dxBC << scan.x, scan.B, scan.C;
  dxBC.array() *= silu_derivative(xBC_conv.array());
  const auto conv =
      Op::causal_conv1d_backward(zxBCdt.middleCols(sizes.d_inner, sizes.conv_width()),
                                 w.conv_weight, w.conv_bias, start.conv, dxBC, dstate.conv);
  dzxBCdt << norm.z, conv.x, scan.dt;
  dw.gated_norm += norm.weight;
  add_gradients(w, conv, scan, scan.dt_bias, dw);
  return linear_backward<Scalar>(u, w.in_proj, dzxBCdt, dw.in_proj, dw.in_proj_bias);
}

// What attention reads. qkv: output of in_proj or the convolution, turned.
template <class Scalar>
AttentionInputs<Scalar> attention_inputs(const AttentionSizes& a, const Matrix<Scalar>& qkv) {
  return {qkv.leftCols(a.q_width()), qkv.middleCols(a.q_width(), a.kv_width()),
          qkv.rightCols(a.kv_width()), a.head_dim};
}

// The attention block of a hybrid.
//
//   u ── in_proj ── q k v ── [causal_conv1d] ──┬── q, k ── rotary ──┐
//                                              └── v ───── causal_attention ── out_proj
// The convolution, if there is one, has no activation, and like every other its state is the last
// of its inputs.
template <class Scalar, class Weight>
Matrix<Scalar> attention_block(const Layer<Scalar, Weight>& w, const Sizes& sizes,
                               const Matrix<Scalar>& u, LayerState<Scalar>& state,
                               const Options<Scalar>& options) {
  using Op = Compute<Scalar, Weight>;
  const AttentionSizes& a = sizes.attention;
  const Index before = state.past.keys.rows(), P = a.head_dim, turning = a.rotary_dim;
  const Matrix<Scalar> projected = linear<Scalar>(u, w.in_proj, w.in_proj_bias);
  Matrix<Scalar> qkv = projected;  // (L, H P + 2 G P)
  if (a.d_conv > 0) qkv = Op::causal_conv1d(projected, w.conv_weight, w.conv_bias, state.conv);
  auto qk = qkv.leftCols(a.q_width() + a.kv_width());
  qk = rotary<Scalar>(qk, P, turning, before, a.rotary_base);
  const auto in = attention_inputs<Scalar>(a, qkv);
  const Matrix<Scalar> y = Op::causal_attention(in, state.past, options.form);  // (L, H P)
  if (options.trace) *options.trace = {options.trace->layer, projected, qkv, {}, {}, {}, y};
  return linear<Scalar>(y, w.out_proj, w.out_proj_bias);
}

// As mamba_block_backward.
template <class Scalar, class Weight>
Matrix<Scalar> attention_block_backward(const Layer<Scalar, Weight>& w, const Sizes& sizes,
                                        const Matrix<Scalar>& u, const LayerState<Scalar>& start,
                                        const Matrix<Scalar>& dout, LayerState<Scalar>& dstate,
                                        Layer<Scalar>& dw, const Options<Scalar>& options) {
  using Op = Compute<Scalar, Weight>;
  const AttentionSizes& a = sizes.attention;
  const Index before = start.past.keys.rows();
  Trace<Scalar> kept;
  LayerState<Scalar> state = start;
  attention_block(w, sizes, u, state, {options.form, options.delta_ratio, &kept});
  const Matrix<Scalar> dy =
      linear_backward<Scalar>(kept.y, w.out_proj, dout, dw.out_proj, dw.out_proj_bias);
  const auto d = causal_attention_backward<Scalar>(attention_inputs<Scalar>(a, kept.convolved),
                                                   start.past, dy, dstate.past);
  Matrix<Scalar> dqkv(u.rows(), kept.convolved.cols());
  dqkv << d.q, d.k, d.v;
  auto dqk = dqkv.leftCols(a.q_width() + a.kv_width());
  dqk = rotary_backward<Scalar>(dqk, a.head_dim, a.rotary_dim, before, a.rotary_base);
  if (a.d_conv > 0) {
    const auto conv = Op::causal_conv1d_backward(kept.projected, w.conv_weight, w.conv_bias,
                                                 start.conv, dqkv, dstate.conv);
    dqkv = conv.x;
    dw.conv_weight += conv.weight;
    dw.conv_bias += conv.bias;
  }
  return linear_backward<Scalar>(u, w.in_proj, dqkv, dw.in_proj, dw.in_proj_bias);
}

// The gated MLP, a layer's second step where there is one: fc1 makes x and a gate side by side,
//   out = fc2 (x * silu(gate))                                          u (L, d_model) -> the same
template <class Scalar, class Weight>
Matrix<Scalar> gated_mlp(const Layer<Scalar, Weight>& w, const Matrix<Scalar>& u) {
  const Matrix<Scalar> x_gate = linear<Scalar>(u, w.fc1);  // (L, 2 d_intermediate)
  const Index width = x_gate.cols() / 2;
  const Matrix<Scalar> x = x_gate.leftCols(width).array() * silu(x_gate.rightCols(width).array());
  return linear<Scalar>(x, w.fc2);
}

//   dx = d(x * silu(gate)) * silu(gate),      dgate = d(x * silu(gate)) * x * silu'(gate)
template <class Scalar, class Weight>
Matrix<Scalar> gated_mlp_backward(const Layer<Scalar, Weight>& w, const Matrix<Scalar>& u,
                                  const Matrix<Scalar>& dout, Layer<Scalar>& dw) {
  using Op = Compute<Scalar, Weight>;
  const Matrix<Scalar> x_gate = linear<Scalar>(u, w.fc1);
  const Index width = x_gate.cols() / 2;
  const auto x = x_gate.leftCols(width).array(), gate = x_gate.rightCols(width).array();
  const Matrix<Scalar> gated = x * silu(gate);
  const Matrix<Scalar> d = Op::linear_backward(gated, w.fc2, dout, dw.fc2);
  Matrix<Scalar> dx_gate(u.rows(), 2 * width);
  dx_gate.leftCols(width) = d.array() * silu(gate);
  dx_gate.rightCols(width) = d.array() * x * silu_derivative(gate);
  return Op::linear_backward(u, w.fc1, dx_gate, dw.fc1);
}

// The norm before a block, an MLP and the head.  x (L, d_model)
template <class Scalar>
Matrix<Scalar> norm(const Sizes& sizes, const Matrix<Scalar>& x, const Row<Scalar>& weight,
                    const Row<Scalar>& bias) {
  const Scalar eps = Scalar(sizes.norm_eps);
  return sizes.rms_norm ? rms_norm(x, weight, eps) : layer_norm(x, weight, bias, eps);
}

// dout -> dx; adds to the gradients of weight and bias.
template <class Scalar>
Matrix<Scalar> norm_backward(const Sizes& sizes, const Matrix<Scalar>& x, const Row<Scalar>& weight,
                             const Matrix<Scalar>& dout, Row<Scalar>& dweight, Row<Scalar>& dbias) {
  const Scalar eps = Scalar(sizes.norm_eps);
  const auto d = sizes.rms_norm ? rms_norm_backward(x, weight, eps, dout)
                                : layer_norm_backward(x, weight, eps, dout);
  dweight += d.weight;
  if (dbias.size()) dbias += dout.colwise().sum();
  return d.x;
}

// ============================================================================================
// The language model
// ============================================================================================
//
//   embedding ── [residual + block(norm(residual))] x n_layer ── norm ── lm_head ── logits
//
// block: a Mamba block; in some layers of a hybrid an attention block. In models with MLPs each
// layer has a second step, residual + gated_mlp(norm2(residual)).

using Token = std::int32_t;

template <class Scalar, class Weight = Matrix<Scalar>>
struct Model {
  Sizes sizes;
  Weight embedding;  // (vocab_size or padded beyond, d_model)
  std::vector<Layer<Scalar, Weight>> layers;
  Row<Scalar> norm_f;  // (d_model)
  Weight lm_head;      // (vocab_size or padded beyond, d_model), unless tied: then the embedding
  bool tied = true;
  Row<Scalar> norm_f_bias;  // (d_model) of layer_norm, else empty
};

template <class Scalar>
struct State {
  std::vector<LayerState<Scalar>> layers;
  explicit State(const Sizes& sizes) {
    for (Index l = 0; l < sizes.n_layer; ++l) layers.emplace_back(sizes, l);
  }
};

// ids (L) -> last hidden states after the final norm (L, d_model). `state` advances by L tokens: a
// whole text at once, or, with L = 1, the next token of one.
template <class Scalar, class Weight>
Matrix<Scalar> backbone(const Model<Scalar, Weight>& model, const Token* ids, Index L,
                        State<Scalar>& state, const Options<Scalar>& options = {}) {
  const Sizes& sizes = model.sizes;
  const auto keep = [&](const Matrix<Scalar>& residual) {
    if (options.residuals) options.residuals->push_back(residual);
  };
  Matrix<Scalar> residual(L, sizes.d_model);
  for (Index t = 0; t < L; ++t) {
    residual.row(t) = Compute<Scalar, Weight>::row(model.embedding, ids[t]);
  }
  for (Index l = 0; l < sizes.n_layer; ++l) {
    const auto& w = model.layers[l];
    const auto block = sizes.attends(l)     ? attention_block<Scalar, Weight>
                       : sizes.version == 1 ? mamba_block<Scalar, Weight>
                                            : mamba2_block<Scalar, Weight>;
    Options<Scalar> here = options;
    if (here.trace && here.trace->layer != l) here.trace = nullptr;
    keep(residual);
    residual += block(w, sizes, norm(sizes, residual, w.norm, w.norm_bias), state.layers[l], here);
    if (sizes.d_intermediate == 0) continue;
    keep(residual);
    residual += gated_mlp(w, norm(sizes, residual, w.norm2, w.norm2_bias));
  }
  keep(residual);
  return norm(sizes, residual, model.norm_f, model.norm_f_bias);
}

// hidden (L, d_model) -> logits (L, vocab_size); columns that only pad the vocabulary are cut off.
template <class Scalar, class Weight>
Matrix<Scalar> lm_head(const Model<Scalar, Weight>& model, const Matrix<Scalar>& hidden) {
  const Weight& W = model.tied ? model.embedding : model.lm_head;
  return linear<Scalar>(hidden, W).leftCols(model.sizes.vocab_size);
}

// ids (L) -> logits (L, vocab_size): row t scores the token that follows ids[t].
template <class Scalar, class Weight>
Matrix<Scalar> forward(const Model<Scalar, Weight>& model, const Token* ids, Index L,
                       State<Scalar>& state, const Options<Scalar>& options = {}) {
  return lm_head(model, backbone(model, ids, L, state, options));
}

// --- The loss and the gradients of all weights ---

// Gradients have the shapes of what they belong to: those of a model are again a Model, of plain
// matrices whatever Weight is. (A program with a Weight of its own adds a zeros_like of its own.)
template <class Plain>
Plain zeros_like(const Plain& m) {
  return Plain::Zero(m.rows(), m.cols());
}
template <class Scalar, class Weight>
Model<Scalar> zeros_like(const Model<Scalar, Weight>& model) {
  Model<Scalar> d{model.sizes,
                  zeros_like(model.embedding),
                  {},
                  zeros_like(model.norm_f),
                  zeros_like(model.lm_head),
                  model.tied,
                  zeros_like(model.norm_f_bias)};
  for (const Layer<Scalar, Weight>& w : model.layers) {
    d.layers.push_back({zeros_like(w.norm), zeros_like(w.in_proj), zeros_like(w.in_proj_bias),
                        zeros_like(w.conv_weight), zeros_like(w.conv_bias), zeros_like(w.x_proj),
                        zeros_like(w.dt_proj), zeros_like(w.dt_bias), zeros_like(w.A),
                        zeros_like(w.D), zeros_like(w.gated_norm), zeros_like(w.out_proj),
                        zeros_like(w.out_proj_bias), zeros_like(w.norm_bias), zeros_like(w.norm2),
                        zeros_like(w.norm2_bias), zeros_like(w.fc1), zeros_like(w.fc2)});
  }
  return d;
}
template <class Scalar>
State<Scalar> zeros_like(State<Scalar> state) {
  for (LayerState<Scalar>& layer : state.layers) {
    for (auto* m : {&layer.conv, &layer.past.keys, &layer.past.values}) m->setZero();
    layer.h.setZero();
  }
  return state;
}

template <class Scalar>
struct CrossEntropy {
  double loss;
  Matrix<Scalar> dlogits;  // (L, vocab_size)
};

//   loss = scale sum_t -log p_t[target_t],   p_t = softmax(logits_t) = exp(logits_t) / sum exp(..)
//   dlogits_t = scale (p_t - e), with e = 1 at the target and 0 elsewhere
// scale = 1 / tokens makes it the mean. A target below 0 is not scored.
template <class Scalar>
CrossEntropy<Scalar> cross_entropy(const Matrix<Scalar>& logits, const Token* targets,
                                   Scalar scale) {
  CrossEntropy<Scalar> result{0, Matrix<Scalar>::Zero(logits.rows(), logits.cols())};
  for (Index t = 0; t < logits.rows(); ++t) {
    if (targets[t] < 0) continue;
    const Scalar largest = logits.row(t).maxCoeff();  // so that exp cannot overflow
    auto dlogits = result.dlogits.row(t);
    dlogits = (logits.row(t).array() - largest).exp();
    const Scalar sum = dlogits.sum();
    dlogits *= scale / sum;
    dlogits(targets[t]) -= scale;
    result.loss += double(scale) * (std::log(sum) + largest - logits(t, targets[t]));
  }
  return result;
}

// The head and the loss, a few rows at a time: logits are wide.  Returns the loss; dhidden
// (L, d_model). A tied head adds its gradient to the embedding's.
template <class Scalar, class Weight>
double lm_head_backward(const Model<Scalar, Weight>& model, const Matrix<Scalar>& hidden,
                        const Token* targets, Scalar scale, Matrix<Scalar>& dhidden,
                        Model<Scalar>& gradients) {
  constexpr Index kRows = 64;
  const Weight& W = model.tied ? model.embedding : model.lm_head;
  Matrix<Scalar>& dW = model.tied ? gradients.embedding : gradients.lm_head;
  double loss = 0;
  for (Index t = 0; t < hidden.rows(); t += kRows) {
    const Matrix<Scalar> rows = hidden.middleRows(t, std::min(kRows, hidden.rows() - t));
    const auto part = cross_entropy<Scalar>(lm_head(model, rows), targets + t, scale);
    Matrix<Scalar> dlogits = Matrix<Scalar>::Zero(rows.rows(), dW.rows());  // with the padding
    dlogits.leftCols(model.sizes.vocab_size) = part.dlogits;
    dhidden.middleRows(t, rows.rows()) =
        Compute<Scalar, Weight>::linear_backward(rows, W, dlogits, dW);
    loss += part.loss;
  }
  return loss;
}

// residuals: of backbone's forward, the inputs of blocks and MLPs; all else is made again. start:
// the state that the forward began with. The gradient of residual + block(norm(residual)) is that
// of both paths, added.
template <class Scalar, class Weight>
void backbone_backward(const Model<Scalar, Weight>& model, const Token* ids,
                       const std::vector<Matrix<Scalar>>& residuals, const State<Scalar>& start,
                       const Matrix<Scalar>& dhidden, State<Scalar>& dstate,
                       Model<Scalar>& gradients, const Options<Scalar>& options) {
  const Sizes& sizes = model.sizes;
  auto residual = residuals.end();  // the one that was kept last
  Matrix<Scalar> dresidual = norm_backward(sizes, *--residual, model.norm_f, dhidden,
                                           gradients.norm_f, gradients.norm_f_bias);
  for (Index l = sizes.n_layer; l-- > 0;) {
    const auto& w = model.layers[l];
    auto& dw = gradients.layers[l];
    const auto block_backward = sizes.attends(l)     ? attention_block_backward<Scalar, Weight>
                                : sizes.version == 1 ? mamba_block_backward<Scalar, Weight>
                                                     : mamba2_block_backward<Scalar, Weight>;
    if (sizes.d_intermediate > 0) {
      const auto& x = *--residual;
      const Matrix<Scalar> u = norm(sizes, x, w.norm2, w.norm2_bias);
      const Matrix<Scalar> du = gated_mlp_backward(w, u, dresidual, dw);
      dresidual += norm_backward(sizes, x, w.norm2, du, dw.norm2, dw.norm2_bias);
    }
    const auto& x = *--residual;
    const Matrix<Scalar> u = norm(sizes, x, w.norm, w.norm_bias);
    const Matrix<Scalar> du =
        block_backward(w, sizes, u, start.layers[l], dresidual, dstate.layers[l], dw, options);
    dresidual += norm_backward(sizes, x, w.norm, du, dw.norm, dw.norm_bias);
  }
  for (Index t = 0; t < dresidual.rows(); ++t) gradients.embedding.row(ids[t]) += dresidual.row(t);
}

// ids (L), targets (L): the tokens that follow, ids + 1 in a text. The loss, see cross_entropy, of
// a piece of text that begins in `state`, which advances; its gradients are added to `gradients`,
// begun with zeros_like(model). Several sequences with scale = 1 / all their tokens make the mean
// over all. dstate, if given: the gradient of the state after the piece on entry, before it on
// return; otherwise the loss is this piece's alone.
template <class Scalar, class Weight>
double loss_and_gradients(const Model<Scalar, Weight>& model, const Token* ids,
                          const Token* targets, Index L, State<Scalar>& state, double scale,
                          Model<Scalar>& gradients, Options<Scalar> options = {},
                          State<Scalar>* dstate = nullptr) {
  const State<Scalar> start = state;
  std::vector<Matrix<Scalar>> residuals;
  options.residuals = &residuals;
  const Matrix<Scalar> hidden = backbone(model, ids, L, state, options);
  Matrix<Scalar> dhidden(L, model.sizes.d_model);
  const double loss = lm_head_backward(model, hidden, targets, Scalar(scale), dhidden, gradients);
  State<Scalar> alone = zeros_like(state);
  backbone_backward(model, ids, residuals, start, dhidden, dstate ? *dstate : alone, gradients,
                    options);
  return loss;
}

// --- AdamW (Loshchilov, Hutter 2019, algorithm 2) ---
//
// Step s = 1, 2, .. of weights w with gradient g and its moments m and v, all of one shape:
//   m = beta1 m + (1 - beta1) g,      v = beta2 v + (1 - beta2) g^2
//   w = (1 - lr weight_decay) w - lr (m / (1 - beta1^s)) / (sqrt(v / (1 - beta2^s)) + eps)
// Matrices and the convolution's weight decay; A_log, D, norms and biases do not.
struct AdamW {
  double lr = 1e-3, beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0.1;
};

template <class Scalar>
using Numbers = Eigen::Map<Eigen::Array<Scalar, Eigen::Dynamic, 1>>;

template <class Scalar>
void adamw_step(const AdamW& o, Index step, bool decays, Numbers<Scalar> g, Numbers<Scalar> m,
                Numbers<Scalar> v, Numbers<Scalar> w) {
  const auto s = static_cast<double>(step);
  const Scalar lr = Scalar(o.lr), eps = Scalar(o.eps), decay = Scalar(o.lr * o.weight_decay);
  const Scalar m_scale = Scalar(1 / (1 - std::pow(o.beta1, s)));
  const Scalar v_scale = Scalar(1 / (1 - std::pow(o.beta2, s)));
  m = Scalar(o.beta1) * m + Scalar(1 - o.beta1) * g;
  v = Scalar(o.beta2) * v + Scalar(1 - o.beta2) * g.square();
  if (decays) w -= decay * w;
  w -= lr * (m * m_scale) / ((v * v_scale).sqrt() + eps);
}

}  // namespace ssm
