// Claims: every attention kernel agrees with the double reference, for every storage type, head_dim
// and number of queries a key, with and without a past, in batches of different lengths; so do
// rotary, the gated MLP and layer_norm.
#include "support_cuda.hpp"

using namespace test;
using mamba::AttentionArgs;

namespace {

/// q, k and v side by side for sequences of some lengths, each with a past in a cache.
struct AttentionProblem {
  Index P, heads, kv_heads;
  std::vector<Index> lengths, pasts;
  std::vector<Matrix<double>> qkv;                // (L, (heads + 2 kv_heads) P) each
  std::vector<ssm::AttentionState<double>> past;  // (past, kv_heads P)

  Index width() const { return (heads + 2 * kv_heads) * P; }
  template <class T>
  void fill(std::uint64_t seed) {
    Random random(seed);
    for (std::size_t b = 0; b < lengths.size(); ++b) {
      const auto rows = [&](Index count, Index cols) {
        return stored<T>(random.matrix<double>(count, cols));
      };
      qkv.push_back(rows(lengths[b], width()));
      past.push_back({rows(pasts[b], kv_heads * P), rows(pasts[b], kv_heads * P)});
    }
  }
  ssm::AttentionInputs<double> inputs(std::size_t b, const Matrix<double>& m) const {
    return {m.leftCols(heads * P), m.middleCols(heads * P, kv_heads * P), m.rightCols(kv_heads * P),
            P};
  }
  Matrix<double> want(std::size_t b) const {
    auto state = past[b];
    return ssm::causal_attention(inputs(b, qkv[b]), state);
  }
  /// sum_s p_s |v_s|, the terms that are added. In float, p itself is off by the roundings of S:
  /// times 1 + the largest sum of |q| |k| / sqrt(P). (With 16 bits S is float, too.)
  Matrix<double> magnitude(std::size_t b, bool is_float) const {
    auto state = past[b];
    Matrix<double> m = qkv[b];
    m.rightCols(kv_heads * P) = m.rightCols(kv_heads * P).cwiseAbs();
    state.values = state.values.cwiseAbs();
    double largest = m.cwiseAbs().maxCoeff();
    if (state.keys.size()) largest = std::max(largest, state.keys.cwiseAbs().maxCoeff());
    const double of_S = is_float ? largest * largest * std::sqrt(double(P)) / 4 : 0;
    return ssm::causal_attention(inputs(b, m), state) * (1 + of_S);
  }
};

template <class Parts>
Matrix<double> rows_of_all(const std::vector<Parts>& parts, Index cols) {
  Index rows = 0;
  for (const auto& part : parts) rows += part.rows();
  Matrix<double> all(rows, cols);
  rows = 0;
  for (const auto& part : parts) all.middleRows(rows, part.rows()) = part, rows += part.rows();
  return all;
}

double worst_attention = 0;

enum class AttentionKernel { naive, best, step };

/// Keys and values in a cache of `capacity` rows a sequence; with `cached` false there is no past
/// and they lie beside the queries.
template <class T>
void check_attention(AttentionProblem p, AttentionKernel kernel, bool cached) {
  p.fill<T>(static_cast<std::uint64_t>(p.P + 10 * p.heads));
  const auto batch = static_cast<Index>(p.lengths.size());
  const Index kv = p.kv_heads * p.P,
              longest = *std::max_element(p.lengths.begin(), p.lengths.end());
  const Index capacity = longest + *std::max_element(p.pasts.begin(), p.pasts.end()) + 3;
  Matrix<double> keys = Matrix<double>::Constant(batch * capacity, kv, NAN), values = keys;
  std::vector<int64_t> begin = {0}, before(p.pasts.begin(), p.pasts.end());
  for (Index b = 0; b < batch; ++b) {
    auto state = p.past[b];
    ssm::remember(p.inputs(b, p.qkv[b]), state);
    keys.middleRows(b * capacity, state.keys.rows()) = state.keys;
    values.middleRows(b * capacity, state.keys.rows()) = state.values;
    begin.push_back(begin.back() + p.lengths[b]);
  }
  const auto qkv = up<T>(rows_of_all(p.qkv, p.width()));
  const auto k = up<T>(keys), v = up<T>(values);
  const DeviceBuffer<int64_t> past(before.data(), before.size()), cu(begin.data(), begin.size());
  auto out = poisoned<T>(begin.back() * p.heads * p.P);
  AttentionArgs<T> a;
  a.batch = batch, a.L = longest,
  a.cu_seqlens = kernel == AttentionKernel::step ? nullptr : cu.data();
  a.n_heads = int(p.heads), a.n_kv_heads = int(p.kv_heads), a.head_dim = int(p.P);
  a.q = qkv.data(), a.q_stride = p.width(), a.out = out.data(), a.out_stride = p.heads * p.P;
  if (cached) {
    a.keys = k.data(), a.values = v.data(), a.kv_stride = kv, a.capacity = capacity;
    a.past = past.data();
  } else {
    a.keys = a.q + p.heads * p.P, a.values = a.keys + kv, a.kv_stride = p.width();
  }
  DeviceBuffer<float> parts(
      size_t(mamba::attention_parts(batch, a.n_heads, a.n_kv_heads, a.head_dim)));
  if (kernel == AttentionKernel::naive) mamba::causal_attention_naive(a, nullptr);
  if (kernel == AttentionKernel::best) mamba::causal_attention(a, nullptr);
  if (kernel == AttentionKernel::step) mamba::causal_attention_step(a, parts.data(), nullptr);
  const Matrix<double> got = down(out, begin.back(), p.heads * p.P);
  for (Index b = 0; b < batch; ++b) {
    CAPTURE(b, p.P, p.heads, p.kv_heads, int(kernel), cached);
    if (p.lengths[b] == 0) continue;
    const Matrix<double> m = p.magnitude(b, sizeof(T) == 4);
    const double worst = check_close("out", got.middleRows(begin[b], p.lengths[b]), p.want(b), m,
                                     sizeof(T) == 4 ? 8 : kRule<T>.k, kRule<T>.eps);
    worst_attention = std::max(worst_attention, worst);
  }
}

template <class T>
void check_attention_kernels() {
  worst_attention = 0;
  for (const Index P : {8, 12, 24, 64, 72, 128})
    for (const auto& [heads, kv_heads] : {std::pair<Index, Index>{2, 2}, {6, 2}, {5, 1}}) {
      const AttentionProblem ragged{P,  heads, kv_heads, {1, 70, 0, 64, 33}, {5, 0, 2, 61, 130},
                                    {}, {}};
      check_attention<T>(ragged, AttentionKernel::best, true);
      if (P <= 24) check_attention<T>(ragged, AttentionKernel::naive, true);
      const AttentionProblem alone{P, heads, kv_heads, {65, 3}, {0, 0}, {}, {}};
      check_attention<T>(alone, AttentionKernel::best, false);
      const AttentionProblem tokens{P, heads, kv_heads, {1, 1, 1}, {0, 300, 7}, {}, {}};
      check_attention<T>(tokens, AttentionKernel::step, true);
    }
  std::cout << "cuda causal_attention: worst output " << worst_attention << " roundings\n";
}

}  // namespace

TEST_CASE("cuda causal_attention: every kernel agrees with the reference, float") {
  check_attention_kernels<float>();
}
TEST_CASE("cuda causal_attention: every kernel agrees with the reference, bfloat16") {
  check_attention_kernels<bf16>();
}
TEST_CASE("cuda causal_attention: every kernel agrees with the reference, float16") {
  check_attention_kernels<half>();
}

namespace {

/// Gradients of ragged sequences without a past, q, k and v side by side.
template <class T>
void check_attention_backward(AttentionProblem p, double bound, bool naive = false) {
  p.fill<T>(7);
  const auto batch = static_cast<Index>(p.lengths.size());
  std::vector<int64_t> begin = {0};
  for (const Index L : p.lengths) begin.push_back(begin.back() + L);
  const Index rows = begin.back(), width = p.heads * p.P;
  Random random(8);
  const Matrix<double> dout = stored<T>(random.matrix<double>(rows, width));
  const auto qkv = up<T>(rows_of_all(p.qkv, p.width())), dout_ = up<T>(dout);
  const DeviceBuffer<int64_t> cu(begin.data(), begin.size());
  auto out = poisoned<T>(rows * width), d = poisoned<T>(rows * p.width());
  auto sums = poisoned<float>(2 * rows * p.heads);
  mamba::AttentionBackwardArgs<T> a;
  a.in.batch = batch, a.in.L = *std::max_element(p.lengths.begin(), p.lengths.end());
  a.in.cu_seqlens = cu.data(), a.in.n_heads = int(p.heads), a.in.n_kv_heads = int(p.kv_heads);
  a.in.head_dim = int(p.P), a.in.q = qkv.data(), a.in.q_stride = a.in.kv_stride = p.width();
  a.in.keys = a.in.q + width, a.in.values = a.in.keys + p.kv_heads * p.P;
  a.in.out = out.data(), a.in.out_stride = width, a.in.log_sums = sums.data();
  a.along = sums.data() + rows * p.heads;
  a.dout = dout_.data(), a.dout_stride = width, a.d_stride = p.width();
  a.dq = d.data(), a.dk = a.dq + width, a.dv = a.dk + p.kv_heads * p.P;
  mamba::causal_attention(a.in, nullptr);
  mamba::causal_attention_backward(a, nullptr);
  if (naive) mamba::causal_attention_backward_naive(a, nullptr);
  const Matrix<double> got = down(d, rows, p.width());
  for (Index b = 0; b < batch; ++b) {
    const Index L = p.lengths[b];
    ssm::AttentionState<double> dstate = {Matrix<double>::Zero(L, p.kv_heads * p.P),
                                          Matrix<double>::Zero(L, p.kv_heads * p.P)};
    const auto want = ssm::causal_attention_backward<double>(p.inputs(b, p.qkv[b]), p.past[b],
                                                             dout.middleRows(begin[b], L), dstate);
    Matrix<double> all(L, p.width());
    all << want.q, want.k, want.v;
    CAPTURE(p.P, p.heads, p.kv_heads, b);
    if (L > 0)
      CHECK(max_difference(got.middleRows(begin[b], L), all) <= bound * all.cwiseAbs().maxCoeff());
  }
}

}  // namespace

TEST_CASE("cuda causal_attention_backward: agrees with the reference, every type") {
  for (const Index P : {8, 12, 64, 128})
    for (const auto& [heads, kv_heads] : {std::pair<Index, Index>{2, 2}, {6, 2}}) {
      const AttentionProblem p{P, heads, kv_heads, {1, 70, 0, 65}, {0, 0, 0, 0}, {}, {}};
      check_attention_backward<float>(p, 1e-5);
      check_attention_backward<bf16>(p, 4 * kRule<bf16>.eps);
      check_attention_backward<half>(p, 4 * kRule<half>.eps);
      if (P == 64) check_attention_backward<half>(p, 4 * kRule<half>.eps, true);
    }
  const AttentionProblem many{16, 2, 1, {200, 3}, {0, 0}, {}, {}};  // several blocks of keys
  check_attention_backward<half>(many, 4 * kRule<half>.eps);
}

TEST_CASE("cuda rotary: q and k turn in place, and keys and values go to the cache") {
  Random random(5);
  const Index L = 5, P = 12, heads = 3, kv_heads = 1, turning = 8, capacity = 2000, past = 1900;
  const Matrix<double> qkv = random.matrix<double>(2 * L, (heads + 2 * kv_heads) * P);
  const auto data = up<float>(qkv);
  auto keys = poisoned<float>(2 * capacity * P), values = poisoned<float>(2 * capacity * P);
  const int64_t pasts[] = {past, 0};
  const DeviceBuffer<int64_t> before(pasts, 2);
  mamba::RotaryArgs<float> a;
  a.batch = 2, a.L = L, a.n_heads = int(heads), a.n_kv_heads = int(kv_heads);
  a.head_dim = int(P), a.turning = int(turning), a.qkv = data.data(), a.stride = qkv.cols();
  a.keys = keys.data(), a.values = values.data(), a.capacity = capacity, a.past = before.data();
  mamba::rotary(a, nullptr);
  const Matrix<double> got = down(data, 2 * L, qkv.cols());
  const Matrix<double> all_keys = down(keys, 2 * capacity, P),
                       all_values = down(values, 2 * capacity, P);
  for (Index b = 0; b < 2; ++b) {
    const Matrix<double> rows = qkv.middleRows(b * L, L);
    const Matrix<double> want =
        ssm::rotary<double>(rows.leftCols((heads + kv_heads) * P), P, turning, pasts[b]);
    CHECK(max_difference(got.block(b * L, 0, L, want.cols()), want) < 1e-6);
    const Index first = b * capacity + pasts[b];
    CHECK(max_difference(all_keys.middleRows(first, L), want.rightCols(P)) < 1e-6);
    CHECK(max_difference(all_values.middleRows(first, L),
                         stored<float>(Matrix<double>(rows.rightCols(P)))) == 0);
    CHECK(std::isnan(all_keys(first + L, 0)));
  }
}

TEST_CASE("cuda layer_norm, gated_mlp: agree with the reference") {
  Random random(6);
  const Matrix<double> x = stored<float>(random.matrix<double>(7, 1032));
  const Matrix<double> w = stored<float>(random.matrix<double>(1, 1032));
  const Matrix<double> bias = stored<float>(random.matrix<double>(1, 1032));
  const auto x_ = up<float>(x), w_ = up<float>(w), b_ = up<float>(bias);
  auto out = poisoned<float>(x.size());
  mamba::layer_norm(x_.data(), w_.data(), b_.data(), 1e-5f, 7, 1032, out.data(), nullptr);
  const Row<double> weight = w, b = bias;
  CHECK(max_difference(down(out, 7, 1032), ssm::layer_norm(x, weight, b, 1e-5)) < 1e-5);
  auto gated = poisoned<float>(7 * 516);
  mamba::gated_mlp(x_.data(), 7, 516, gated.data(), nullptr);
  const Matrix<double> want = x.leftCols(516).array() * ssm::silu(x.rightCols(516).array());
  CHECK(max_difference(down(gated, 7, 516), want) < 1e-5);
}
