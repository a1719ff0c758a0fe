// Claims: every rung of causal_conv1d computes what ssm_reference.hpp says in double, up to
// rounding, for any size, with and without every optional input.
#include "support_cuda.hpp"

#include "random_model.hpp"

using namespace test;
using namespace mamba;

namespace {

template <class T>
void conv_rungs_match(const char* type) {
  Worst naive{std::string("causal_conv1d naive ") + type},
      fused{std::string("causal_conv1d fused ") + type};
  std::uint64_t seed = 1;
  for (const Index width : {2, 3, 4, 7})
    for (const Index d : {1, 5, 64, 132})
      for (const Index L : kLengths)
        for (const bool bias : {false, true}) {
          Random random(++seed);
          const Matrix<double> x = stored<T>(random.matrix<double>(L, d)),
                               state = stored<T>(random.matrix<double>(width - 1, d));
          const Matrix<double> w = stored<float>(random.matrix<double>(d, width)),
                               b = bias ? stored<float>(random.matrix<double>(1, d))
                                        : Matrix<double>();
          const Matrix<Bounded> x_b = bounded(x), w_b = bounded(w), b_b = bounded(b);
          Matrix<Bounded> after = bounded(state);
          const Matrix<Bounded> sum = ssm::causal_conv1d<Bounded>(x_b, w_b, b_b, after);
          const Matrix<Bounded> want = ssm::silu(sum.array());
          const DeviceBuffer<T> x_d = up<T>(x), state_d = up<T>(state);
          const DeviceBuffer<float> w_d = up<float>(w), b_d = up<float>(b);
          for (const bool simple : {true, false}) {
            const DeviceBuffer<T> out = poisoned<T>(L * d), state_out = up<T>(state);
            ConvArgs<T> a;
            a.L = L, a.d = d, a.width = int(width), a.x = x_d.data(), a.weight = w_d.data(),
            a.bias = optional(b_d);
            a.state = state_d.data(), a.out = out.data(), a.x_stride = a.out_stride = d;
            if (!simple) a.state = a.state_out = state_out.data();
            simple ? causal_conv1d_naive(a, nullptr) : causal_conv1d(a, nullptr);
            INFO("width " << width << ", d " << d << ", L " << L << ", bias " << bias);
            Worst& worst = simple ? naive : fused;
            worst.of_out =
                std::max(worst.of_out, check_bounded("out", down(out, L, d), want, kRule<T>));
            if (!simple) CHECK((bounded(down(state_out, width - 1, d)) == after));
          }
        }
}

}  // namespace

TEST_CASE("cuda causal_conv1d: naive and fused kernels match the reference, state included") {
  conv_rungs_match<float>("f32");
  conv_rungs_match<bf16>("bf16");
  conv_rungs_match<half>("f16");
}

TEST_CASE(
    "cuda causal_conv1d: fused kernel matches the naive one in a batch of strided rows, "
    "without a state, with and without silu") {
  constexpr std::int64_t batch = 3, d = 264, stride = 268;
  const DeviceBuffer<float> weight(d * 4), bias(d);
  random_kernel<<<64, 256>>>(weight.data(), d * 4, 1.f, 0.f, 1);
  random_kernel<<<64, 256>>>(bias.data(), d, 1.f, 0.f, 2);
  for (const Index L : kLengths)
    for (const bool activate : {true, false}) {
      const Index rows = batch * L;
      const DeviceBuffer<float> x(rows * stride), naive = poisoned<float>(rows * d),
                                                  fused = poisoned<float>(rows * d);
      random_kernel<<<64, 256>>>(x.data(), rows * stride, 1.f, 0.f, 3);
      ConvArgs<float> a;
      a.batch = batch, a.L = L, a.d = d, a.activate = activate;
      a.x = x.data(), a.weight = weight.data(), a.bias = bias.data(), a.x_stride = stride;
      a.out_stride = d, a.out = naive.data();
      causal_conv1d_naive(a, nullptr);
      a.out = fused.data();
      causal_conv1d(a, nullptr);
      INFO("L " << L << ", silu " << activate);
      CHECK(max_difference(down(fused, rows, d), down(naive, rows, d)) <= 0x1p-20);
    }
}

TEST_CASE("cuda causal_conv1d: sequences of different lengths, end to end, are each as if alone") {
  const std::vector<std::int64_t> starts = {0, 2, 35, 40};
  constexpr Index d = 132, width = 4, past = width - 1;
  Random random(5);
  const Matrix<double> x = stored<float>(random.matrix<double>(40, d)),
                       state = stored<float>(random.matrix<double>(3 * past, d)),
                       w = stored<float>(random.matrix<double>(d, width));
  Matrix<double> want(40, d), after = state;
  for (Index b = 0; b < 3; ++b) {
    const Index first = starts[static_cast<std::size_t>(b)],
                count = starts[static_cast<std::size_t>(b) + 1] - first;
    const Matrix<double> sum = ssm::causal_conv1d<double>(x.middleRows(first, count), w, {},
                                                          after.middleRows(b * past, past));
    want.middleRows(first, count) = ssm::silu(sum.array());
  }
  const DeviceBuffer<float> x_d = up<float>(x), w_d = up<float>(w), state_d = up<float>(state),
                            out = poisoned<float>(40 * d);
  const DeviceBuffer<std::int64_t> cu_seqlens(starts.data(), starts.size());
  ConvArgs<float> a;
  a.batch = 3, a.L = 33, a.d = d, a.width = width, a.x = x_d.data(), a.weight = w_d.data();
  a.state = a.state_out = state_d.data(), a.out = out.data(), a.x_stride = a.out_stride = d;
  a.cu_seqlens = cu_seqlens.data();
  causal_conv1d(a, nullptr);
  CHECK(max_difference(down(out, 40, d), want) <= 1e-5);
  CHECK(max_difference(down(state_d, 3 * past, d), after) == 0);
}
