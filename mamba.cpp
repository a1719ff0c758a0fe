// mamba.cpp - the CPU program. Build and run:
//
//   g++ -std=c++17 -O3 -march=native -isystem /usr/include/eigen3 mamba.cpp -o mamba
//       -ltbb -lpcre2-8 -lutf8proc
//   ./mamba "Once upon a time"
//
// The maths is ssm_reference.hpp in float, the loader, generator and command line are mamba.hpp.
// What is here is how the CPU does the work: matrices as stored in the file (f32, bf16 or f16,
// mapped into memory), the matrix product on all cores, and the loops over channels and heads
// spread over them.

#include "train.hpp"

#include <tbb/global_control.h>
#include <tbb/parallel_for.h>
#if defined(__F16C__)
#include <immintrin.h>
#endif
#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace mamba {

// ------------------------------------------------------------------------------------------
// Threads
// ------------------------------------------------------------------------------------------

// Calls f(begin, count) for consecutive pieces of [0, n), each of `grain` (the last one shorter),
// on all threads. What makes a piece does not depend on the number of threads, so neither do the
// bits of a result. Every piece is a task of its own: a thread that another program holds up keeps
// one piece from the others, not its share of all.
template <class Function>
void parallel_for(Index n, Index grain, const Function& f) {
  tbb::parallel_for(
      Index{0}, (n + grain - 1) / grain,
      [&](Index i) { f(i * grain, std::min(grain, n - i * grain)); }, tbb::simple_partitioner());
}

// As many as --threads says, as long as the result lives; 0: all cores.
inline std::unique_ptr<tbb::global_control> limit_threads(int threads) {
  if (threads == 0) return nullptr;
  return std::make_unique<tbb::global_control>(tbb::global_control::max_allowed_parallelism,
                                               threads);
}

// ------------------------------------------------------------------------------------------
// The matrix product y = x W^T over weights as stored
// ------------------------------------------------------------------------------------------

// A (rows x cols) row-major matrix of weights as stored: F32, BF16 or F16.
struct Weight {
  DType dtype = DType::F32;
  Index rows = 0, cols = 0;
  const void* data = nullptr;
  std::shared_ptr<const void> keep_alive;  // the mapping or buffer that data points into
};

// Calls f with a pointer to the numbers of W in their own type.
template <class Function>
void with_type(const Weight& W, const Function& f) {
  if (W.dtype == DType::F32) return f(static_cast<const float*>(W.data));
  if (W.dtype == DType::BF16) return f(static_cast<const Eigen::bfloat16*>(W.data));
  if (W.dtype == DType::F16) return f(static_cast<const Eigen::half*>(W.data));
  fail("linear: weights: expected F32, BF16 or F16");
}

// out[0..n) = w[0..n). The compiler makes vector instructions of the shift, for a bfloat16 is the
// upper half of a float, but not of the conversion of half.
inline void to_floats(const float* w, Index n, float* out) { std::copy_n(w, n, out); }

inline void to_floats(const Eigen::bfloat16* w, Index n, float* out) {
  for (Index k = 0; k < n; ++k) {
    const std::uint32_t bits = std::uint32_t{w[k].value} << 16;
    std::memcpy(out + k, &bits, sizeof bits);
  }
}

inline void to_floats(const Eigen::half* w, Index n, float* out) {
  Index k = 0;
#if defined(__AVX512F__)
  for (; k + 16 <= n; k += 16) {
    const auto halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + k));
    _mm512_storeu_ps(out + k, _mm512_cvtph_ps(halves));
  }
#elif defined(__F16C__)
  for (; k + 8 <= n; k += 8) {
    const auto halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w + k));
    _mm256_storeu_ps(out + k, _mm256_cvtph_ps(halves));
  }
#endif
  for (; k < n; ++k) out[k] = static_cast<float>(w[k]);
}

// w[0..n) as floats: where they are, or at out.
inline const float* as_floats(const float* w, Index, float*) { return w; }

template <class Half>
const float* as_floats(const Half* w, Index n, float* out) {
  to_floats(w, n, out);
  return out;
}

// w . x over n numbers, added in the same order whatever their type: 64 sums side by side, which
// stay in registers.
template <class Stored>
float dot(const Stored* w, const float* x, Index n) {
  constexpr Index kSums = 64;
  using Block = Eigen::Array<float, kSums, 1>;
  using Rest = Eigen::Map<const Eigen::ArrayXf>;
  Block sums = Block::Zero(), floats;
  Index k = 0;
  for (; k + kSums <= n; k += kSums)
    sums += Eigen::Map<const Block>(as_floats(w + k, kSums, floats.data())) *
            Eigen::Map<const Block>(x + k);
  sums.head(n - k) += Rest(as_floats(w + k, n - k, floats.data()), n - k) * Rest(x + k, n - k);
  return sums.sum();
}

// One vector register of floats, by the vector extension that GCC and Clang share, and the tile of
// sums, kTileX rows of x by kTileW rows of W, that fits the registers with its operands.
#if defined(__AVX512F__)  // 32 registers of 16 floats
constexpr Index kLanes = 16, kTileX = 4, kTileW = 6;
#elif defined(__AVX__)      // 16 registers of 8
constexpr Index kLanes = 8, kTileX = 3, kTileW = 4;
#elif defined(__aarch64__)  // 32 registers of 4
constexpr Index kLanes = 4, kTileX = 4, kTileW = 6;
#else
constexpr Index kLanes = 4, kTileX = 3, kTileW = 4;
#endif
using Lanes = float __attribute__((vector_size(4 * kLanes)));

// The numbers at p, in a register. (Without the asm GCC loads them again for each use.)
inline Lanes load(const float* p) {
  Lanes v;
  std::memcpy(&v, p, sizeof v);
#if defined(__x86_64__)
  asm("" : "+v"(v));
#endif
  return v;
}

inline float sum(Lanes v) {
  Eigen::Array<float, kLanes, 1> floats;
  std::memcpy(floats.data(), &v, sizeof v);
  return floats.sum();
}

constexpr Index kDepth = 768;  // columns that a tile takes at once: its rows fit the L1 cache
using Panel = float[kTileW][kDepth];

// y[t, i] += sum over k < n of x[t, k] panel[i, k]  for t < T and i < rows; n a multiple of kLanes.
template <Index T>
void add_tile(const float* x, Index x_stride, const Panel& panel, Index n, Index rows, float* y,
              Index y_stride) {
  Lanes sums[T][kTileW] = {};
  for (Index k = 0; k < n; k += kLanes) {
    Lanes w_k[kTileW];
#pragma GCC unroll 8
    for (Index i = 0; i < kTileW; ++i) w_k[i] = load(&panel[i][k]);
#pragma GCC unroll 8
    for (Index t = 0; t < T; ++t) {
      const Lanes x_tk = load(x + t * x_stride + k);
#pragma GCC unroll 8
      for (Index i = 0; i < kTileW; ++i) sums[t][i] += x_tk * w_k[i];
    }
  }
#pragma GCC unroll 8
  for (Index t = 0; t < T; ++t)
#pragma GCC unroll 8
    for (Index i = 0; i < kTileW; ++i)
      if (i < rows) y[t * y_stride + i] += sum(sums[t][i]);
}

// y = x W^T for the rows of W that begin at w: kTileW at a time become floats and are
// multiplied by all rows of x, which have zeros from cols up to a whole register.
template <class Stored>
void multiply(const float* x, Index L, Index x_stride, const Stored* w, Index cols,
              ssm::InOut<Matrix<float>> y) {
  const Index y_stride = y.outerStride();
  alignas(64) Panel panel = {};
  y.setZero();
  for (Index k = 0; k < cols; k += kDepth)
    for (Index i = 0; i < y.cols(); i += kTileW) {
      const Index rows = std::min(kTileW, y.cols() - i), n = std::min(kDepth, cols - k);
      const Index padded = (n + kLanes - 1) / kLanes * kLanes;
      for (Index r = 0; r < rows; ++r) {
        to_floats(w + (i + r) * cols + k, n, panel[r]);
        std::fill(panel[r] + n, panel[r] + padded, 0.f);
      }
      Index t = 0;
      for (; t + kTileX <= L; t += kTileX)
        add_tile<kTileX>(x + t * x_stride + k, x_stride, panel, padded, rows, &y(t, i), y_stride);
      for (; t < L; ++t) add_tile<1>(x + t * x_stride + k, 0, panel, padded, rows, &y(t, i), 0);
    }
}

// y = x W^T.  x (L, cols), y (L, rows). Bound by reading W once while L is small, by multiply-adds
// when it is large.
inline Matrix<float> linear(const ssm::View<float>& x, const Weight& W) {
  constexpr Index kFewRows = 4, kBlock = 256;  // rows of x; a block of them stays in the L2 cache
  const Index L = x.rows(), cols = W.cols;
  if (x.cols() != cols) fail("linear: x: expected ", cols, " columns, found ", x.cols());
  Matrix<float> y(L, W.rows);
  // rows of W in a piece: for 32 pieces in all, but with at least 16,384 multiply-adds in each
  const Index grain = std::max(W.rows / 32, (1 << 14) / std::max<Index>(1, L * cols) + 1);
  if (L <= kFewRows) {
    with_type(W, [&](const auto* w) {
      parallel_for(W.rows, grain, [&](Index begin, Index count) {
        for (Index i = begin; i < begin + count; ++i)
          for (Index t = 0; t < L; ++t) y(t, i) = dot(w + i * cols, x.row(t).data(), cols);
      });
    });
    return y;
  }
  Matrix<float> with_zeros;
  if (cols % kLanes != 0) {
    with_zeros = Matrix<float>::Zero(L, cols + kLanes - cols % kLanes);
    with_zeros.leftCols(cols) = x;
  }
  const ssm::View<float> rows = cols % kLanes == 0 ? x : ssm::View<float>(with_zeros);
  const Index tiles = std::clamp<Index>(grain / kTileW, 1, 32), strip = tiles * kTileW;
  const Index strips = (W.rows + strip - 1) / strip, blocks = (L + kBlock - 1) / kBlock;
  with_type(W, [&](const auto* w) {
    parallel_for(strips * blocks, 1, [&](Index piece, Index) {
      const Index i = piece / blocks * strip, t = piece % blocks * kBlock;
      const Index n = std::min(kBlock, L - t);
      multiply(rows.row(t).data(), n, rows.outerStride(), w + i * cols, cols,
               y.block(t, i, n, std::min(strip, W.rows - i)));
    });
  });
  return y;
}

// Row i of W as floats: the embedding of token i.
inline ssm::Row<float> row(const Weight& W, Index i) {
  if (i < 0 || i >= W.rows) fail("row: expected an index below ", W.rows, ", found ", i);
  ssm::Row<float> out(W.cols);
  with_type(W, [&](const auto* w) { to_floats(w + i * W.cols, W.cols, out.data()); });
  return out;
}

// The two products of linear's backward, see ssm::Compute: strips of columns on all threads.
inline Matrix<float> linear_backward(const ssm::View<float>& x, const Weight& W,
                                     const ssm::View<float>& dy, Matrix<float>& dW) {
  constexpr Index kStrip = 64;
  Matrix<float> dx(dy.rows(), W.cols);
  with_type(W, [&](const auto* w) {
    parallel_for(W.cols, kStrip, [&](Index first, Index count) {
      Matrix<float> strip(W.rows, count);  // of W, as floats
      for (Index i = 0; i < W.rows; ++i)
        to_floats(w + i * W.cols + first, count, strip.row(i).data());
      dx.middleCols(first, count).noalias() = dy * strip;
      dW.middleCols(first, count).noalias() += dy.transpose() * x.middleCols(first, count);
    });
  });
  return dx;
}

inline Matrix<float> zeros_like(const Weight& W) { return Matrix<float>::Zero(W.rows, W.cols); }

// The type that --dtype asks for, or the file's own: a window into the file where that can be. A
// file may hold a tensor at any address; then, too, a copy is kept.
inline void assign(const Tensor& tensor, std::optional<DType> storage, Weight& weight) {
  const bool stored =
      tensor.dtype == DType::F32 || tensor.dtype == DType::BF16 || tensor.dtype == DType::F16;
  const DType dtype = storage.value_or(stored ? tensor.dtype : DType::F32);
  const bool aligned = reinterpret_cast<std::uintptr_t>(tensor.data) % dtype_size(dtype) == 0;
  const Tensor kept = tensor.dtype == dtype && aligned ? tensor : to_dtype(tensor, dtype);
  weight = {dtype, tensor.shape[0], tensor.shape[1], kept.data, kept.keep_alive};
}

}  // namespace mamba

// ------------------------------------------------------------------------------------------
// How the reference's operations are carried out here: channels and heads in pieces, on all threads
// ------------------------------------------------------------------------------------------

template <>
struct ssm::Compute<float, mamba::Weight> : ssm::Compute<float, ssm::Matrix<float>> {
  static constexpr Index kChannels =
      128;  // a piece: its part of a long sequence stays in the cache

  static Matrix<float> linear(const View<float>& x, const mamba::Weight& W) {
    return mamba::linear(x, W);
  }
  static Row<float> row(const mamba::Weight& W, Index i) { return mamba::row(W, i); }
  static Matrix<float> linear_backward(const View<float>& x, const mamba::Weight& W,
                                       const View<float>& dy, Matrix<float>& dW) {
    return mamba::linear_backward(x, W, dy, dW);
  }

  static Matrix<float> causal_conv1d(const View<float>& x, const View<float>& weight,
                                     const View<float>& bias, ConvState<float> state) {
    Matrix<float> y(x.rows(), x.cols());
    mamba::parallel_for(x.cols(), kChannels, [&](Index first, Index count) {
      y.middleCols(first, count) =
          ssm::causal_conv1d<float>(columns(x, first, count), weight.middleRows(first, count),
                                    columns(bias, first, count), state.middleCols(first, count));
    });
    return y;
  }

  static Matrix<float> selective_scan(const ScanInputs<float>& in, ScanState<float> h, Form form) {
    Matrix<float> y(in.x.rows(), in.x.cols());
    mamba::parallel_for(in.x.cols(), kChannels, [&](Index first, Index count) {
      ScanInputs<float> part = in;
      for (const auto m : {&ScanInputs<float>::x, &ScanInputs<float>::delta, &ScanInputs<float>::z,
                           &ScanInputs<float>::D, &ScanInputs<float>::delta_bias})
        part.*m = columns(in.*m, first, count);
      part.A = in.A.middleRows(first, count);
      y.middleCols(first, count) =
          ssm::selective_scan<float>(part, h.middleRows(first, count), form);
    });
    return y;
  }

  static Matrix<float> ssd(const SsdInputs<float>& in, ScanState<float> h, Form form) {
    const Index P = in.head_dim(), N = h.cols();
    Matrix<float> y(in.x.rows(), in.x.cols());
    mamba::parallel_for(in.n_heads(), 1, [&](Index i, Index) {
      SsdInputs<float> head = in;
      for (const auto m : {&SsdInputs<float>::dt, &SsdInputs<float>::D, &SsdInputs<float>::dt_bias})
        head.*m = columns(in.*m, i, 1);
      head.x = in.x.middleCols(i * P, P);
      head.A = in.A.middleRows(i, 1);
      head.B = in.B.middleCols(in.group(i, N) * N, N);
      head.C = in.C.middleCols(in.group(i, N) * N, N);
      y.middleCols(i * P, P) = ssm::ssd<float>(head, h.middleRows(i * P, P), form);
    });
    return y;
  }

  // Keys by blocks, whatever the form: matrix products of few numbers at a time.
  static Matrix<float> causal_attention(const AttentionInputs<float>& in,
                                        AttentionState<float>& state, Form) {
    const Index P = in.head_dim;
    check_inputs("causal_attention", in, state);
    remember(in, state);
    Matrix<float> y(in.q.rows(), in.q.cols());
    mamba::parallel_for(in.n_heads(), 1, [&](Index i, Index) {
      const Index g = in.group(i) * P;
      y.middleCols(i * P, P) =
          attend<float>(in.q.middleCols(i * P, P), state.keys.middleCols(g, P),
                        state.values.middleCols(g, P), Form::chunked, kChannels);
    });
    return y;
  }

 private:
  static View<float> columns(const View<float>& m, Index first, Index count) {
    return m ? View<float>(m.middleCols(first, count)) : m;  // an input left out stays so
  }
};

namespace mamba {

// ------------------------------------------------------------------------------------------
// The engine: ssm_reference.hpp on stored weights and all cores
// ------------------------------------------------------------------------------------------

template <class Scalar>
class CpuLearner;  // the last section

class CpuEngine {
 public:
  using Learner = CpuLearner<float>;
  static constexpr const char* kName = "mamba";
  static constexpr const char* kDescription = "the readable reference, on the CPU";
  static constexpr bool kHasDevice = false;
  static constexpr Index kPiece = 256;      // tokens that the parallel form takes at once
  static constexpr std::size_t kBatch = 1;  // one text after the other

  using State = ssm::State<float>;

  CpuEngine(const Checkpoint& checkpoint, const Config& config, const EngineOptions& options)
      : config_(config),
        model_(load_model<ssm::Model<float, Weight>>(checkpoint, config, options.dtype)) {
    threads_ = limit_threads(options.threads);
    options_.form = cpu_form(config);
    options_.delta_ratio = options.delta_ratio;
  }

  const Config& config() const { return config_; }
  State new_state() const { return State(config_); }
  State from_host(State state) const { return state; }
  const State& to_host(const State& state) const { return state; }

  /// One token goes by the recurrence itself, whichever form a whole sequence takes.
  Matrix<float> prefill(State& state, const Token* ids, Index L) {
    ssm::Options<float> options = options_;
    if (L == 1) options.form = ssm::Form::sequential;
    const Matrix<float> hidden = ssm::backbone(model_, ids, L, state, options);
    return ssm::lm_head<float>(model_, hidden.bottomRows(1));
  }

  void forward(State& state, const Token* ids, Index L, const LogitsSink& sink) {
    constexpr Index kRows = 64;  // logits are wide: a few rows at a time
    const Matrix<float> hidden = ssm::backbone(model_, ids, L, state, options_);
    for (Index t = 0; t < L; t += kRows)
      sink(t, ssm::lm_head<float>(model_, hidden.middleRows(t, std::min(kRows, L - t))));
  }

  /// Of the first request: the threads share the work of one.
  std::vector<Likelihood> likelihoods(const Request* requests, std::size_t) {
    return {likelihood(*this, *requests)};
  }

  double gradients(const std::vector<Token>& ids, ssm::Model<float>& gradients) {
    gradients = zeros_like(model_);
    return loss_of_text(model_, ids, options_, gradients);
  }

  void generate(std::vector<Sequence<State>>& sequences, const GenerateOptions& options,
                const OnToken& on_token) {
    generate_on_host(*this, sequences, options, on_token);
  }

 private:
  Config config_;
  ssm::Model<float, Weight> model_;
  ssm::Options<float> options_;
  std::unique_ptr<tbb::global_control> threads_;  // as many as --threads says
};

// ------------------------------------------------------------------------------------------
// Training: the reference's gradients, pieces of text side by side on all threads
// ------------------------------------------------------------------------------------------

/// See train.hpp. Scalar = double is for tests.
template <class Number>
class CpuLearner {
 public:
  using Scalar = Number;
  using State = ssm::State<Scalar>;

  CpuLearner(const Config& config, Learned<Scalar> learned, const EngineOptions& options)
      : config_(config), learned_(std::move(learned)), model_(computed(learned_.weights)) {
    if (options.dtype.value_or(DType::F32) != DType::F32)
      fail("--dtype: the CPU trains in f32 only, found ", dtype_name(*options.dtype));
    threads_ = limit_threads(options.threads);
    options_.form = ssm::Form::sequential;  // rounds least
    options_.delta_ratio = Scalar(options.delta_ratio);
    for (auto& part : gradients_) part = ssm::zeros_like(model_);
  }

  Index steps() const { return learned_.steps; }
  const Learned<Scalar>& learned() const { return learned_; }
  const std::vector<State>& carried() const { return slots_; }
  void carry(std::vector<State> slots) { slots_ = std::move(slots); }

  /// Piece i goes to part i modulo kParts of the gradient, and the parts are added up in order: the
  /// same bits for every number of threads.
  double accumulate(const Batch& batch, double scale) {
    std::vector<double> loss(batch.size());
    for (const Piece& piece : batch)
      while (piece.slot >= static_cast<Index>(slots_.size())) slots_.emplace_back(config_);
    parallel_for(kParts, 1, [&](Index part, Index) {
      for (std::size_t i = part; i < batch.size(); i += kParts) {
        const Piece& piece = batch[i];
        State state = piece.begins ? State(config_) : slots_[piece.slot];
        std::vector<Token> targets(piece.ids.begin() + 1, piece.ids.end());
        std::fill_n(targets.begin(), piece.first - 1, -1);
        loss[i] = ssm::loss_and_gradients(model_, piece.ids.data(), targets.data(), targets.size(),
                                          state, scale * piece.weight, gradients_[part], options_);
        if (piece.slot >= 0) slots_[piece.slot] = std::move(state);
      }
    });
    return std::accumulate(loss.begin(), loss.end(), 0.0) / scale;
  }

  std::vector<double> losses(const Batch& batch) {
    std::vector<double> loss(batch.size());
    parallel_for(batch.size(), 1, [&](Index i, Index) {
      const std::vector<Token>& ids = batch[i].ids;
      State state(config_);
      const auto hidden =
          ssm::backbone(model_, ids.data(), static_cast<Index>(ids.size()) - 1, state, options_);
      for (Index t = batch[i].first - 1; t < hidden.rows(); ++t) {
        const Matrix<Scalar> logits = ssm::lm_head<Scalar>(model_, hidden.middleRows(t, 1));
        loss[i] += negative_log_likelihood(logits, 0, ids[t + 1]);
      }
    });
    return loss;
  }

  double gradient_norm() {
    double squares = 0;
    const auto sum = parameters(config_, gradients_[0]);
    for (Index part = 1; part < kParts; ++part) {
      const auto more = parameters(config_, gradients_[part]);
      for (std::size_t i = 0; i < sum.size(); ++i) {
        sum[i].values() += more[i].values();
        more[i].values().setZero();
      }
    }
    for (const auto& g : sum) squares += static_cast<double>(g.values().square().sum());
    return std::sqrt(squares);
  }

  /// After gradient_norm(), which has put the parts together.
  void update(const ssm::AdamW& adamw, double scale) {
    ++learned_.steps;
    const auto w = parameters(config_, learned_.weights), m = parameters(config_, learned_.m),
               v = parameters(config_, learned_.v), g = parameters(config_, gradients_[0]);
    for (std::size_t i = 0; i < w.size(); ++i) {
      g[i].values() *= Scalar(scale);
      ssm::adamw_step<Scalar>(adamw, learned_.steps, w[i].decays(), g[i].values(), m[i].values(),
                              v[i].values(), w[i].values());
      g[i].values().setZero();
    }
    model_ = computed(learned_.weights);
  }

  // --- LoRA, see train.hpp ---

  void merge(std::size_t which, const Matrix<Scalar>& A, const Matrix<Scalar>& B) {
    parameters(config_, model_)[which].matrix() =
        parameters(config_, learned_.weights)[which].matrix() + B * A;
  }
  /// After gradient_norm().
  std::pair<Matrix<Scalar>, Matrix<Scalar>> pull_back(std::size_t which, const Matrix<Scalar>& A,
                                                      const Matrix<Scalar>& B) {
    const auto dW = parameters(config_, gradients_[0])[which].matrix();
    return {B.transpose() * dW, dW * A.transpose()};
  }
  void forget_gradients() {
    for (const auto& g : parameters(config_, gradients_[0])) g.values().setZero();
  }

 private:
  static constexpr Index kParts = 8;

  Config config_;
  Learned<Scalar> learned_;
  ssm::Model<Scalar> model_, gradients_[kParts];
  ssm::Options<Scalar> options_;
  std::vector<State> slots_;
  std::unique_ptr<tbb::global_control> threads_;
};

}  // namespace mamba

#ifndef MAMBA_NO_MAIN
#include "verify.hpp"

int main(int argc, char** argv) {
#if defined(__GLIBC__)
  // Keep freed memory: pages that come back from the kernel must be zeroed anew.
  mallopt(M_MMAP_THRESHOLD, 1 << 30);
  mallopt(M_TRIM_THRESHOLD, 1 << 30);
#endif
  using namespace mamba;
  std::vector<Command> more = verify::commands();
  more.push_back(command<Train<CpuEngine>>("train", "train a model, from nothing or onward"));
  return run<CpuEngine>(argc, argv, more);
}
#endif
