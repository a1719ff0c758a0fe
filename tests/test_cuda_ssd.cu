// Claims: every rung of ssd, and its step, computes what ssm_reference.hpp says in double, up to
// rounding, for any size: outputs and final states, with and without every optional input.
#include "support_cuda.hpp"

using namespace test;
using namespace mamba;

namespace {

struct SsdCase {
  Index batch, L, H, P, N, groups;
  int options;  // bits: D, bias, h0, limits of delta
};

const char* const kRungNames[] = {"naive", "fused", "warpgroup"};

// As ssd would on a GPU where `rung` is the fastest; with another split if segments are given.
template <class T>
void run_rung(SsdArgs<T> a, SsdRung rung, SsdSegments segments = {}) {
  if (segments.length == 0 && rung != SsdRung::kNaive) segments = ssd_segments(a, rung);
  const DeviceBuffer<std::byte> workspace(segments.count *
                                          (ssd_state_bytes(a) + 4 * a.batch * a.n_heads));
  a.workspace = workspace.data();
  if constexpr (sizeof(T) == 2)
    if (rung != SsdRung::kNaive) ssd_split(a, rung, segments, nullptr);
  if (rung == SsdRung::kNaive) ssd_naive(a, nullptr);
  CUDA_CHECK(cudaDeviceSynchronize());
}

template <class T>
void ssd_matches(const SsdCase& c, std::uint64_t seed, Worst& naive, Worst& fused, Worst& step) {
  Random random(seed);
  const Index rows = c.batch * c.L, GN = c.groups * c.N, d = c.H * c.P;
  const auto make = [&](Index r, Index k) { return stored<T>(random.matrix<double>(r, k)); };
  const auto make_float = [&](Index r, Index k) {
    return stored<float>(random.matrix<double>(r, k));
  };
  const Matrix<double> x = make(rows, d), dt = make(rows, c.H), B = make(rows, GN),
                       C = make(rows, GN);
  const Matrix<double> A = -make_float(c.H, 1).cwiseAbs(),
                       D = c.options & 1 ? make_float(1, c.H) : Matrix<double>();
  const Matrix<double> bias = c.options & 2 ? make_float(1, c.H) : Matrix<double>();
  const Matrix<double> h0 = c.options & 4 ? make_float(c.batch * d, c.N)
                                          : Matrix<double>(Matrix<double>::Zero(c.batch * d, c.N));
  Matrix<Bounded> out(rows, d), hT(c.batch * d, c.N);
  const StateMatrix<Bounded> A_b = bounded(A);
  const Matrix<Bounded> D_b = bounded(D), bias_b = bounded(bias);
  const float dt_min = c.options & 8 ? 0.25f : 0.f, dt_max = c.options & 8 ? 0.75f : INFINITY;
  for (Index b = 0; b < c.batch; ++b) {
    const auto part = [&](const Matrix<double>& m) { return bounded(of(m, b, c.batch)); };
    const Matrix<Bounded> x_b = part(x), dt_b = part(dt), B_b = part(B), C_b = part(C);
    ssm::SsdInputs<Bounded> in;
    in.x = x_b, in.dt = dt_b, in.A = A_b, in.B = B_b, in.C = C_b;
    if (D.size()) in.D = D_b;
    if (bias.size()) in.dt_bias = bias_b;
    in.dt_min = dt_min, in.dt_max = dt_max;
    StateMatrix<Bounded> h = part(h0);
    of(out, b, c.batch) = ssm::ssd_sequential<Bounded>(in, h);
    of(hT, b, c.batch) = h;
  }
  const DeviceBuffer<T> x_d = up<T>(x), dt_d = up<T>(dt), B_d = up<T>(B), C_d = up<T>(C);
  const DeviceBuffer<float> A_d = up<float>(A), D_d = up<float>(D), bias_d = up<float>(bias);
  SsdArgs<T> args;
  args.batch = c.batch, args.L = c.L, args.n_heads = int(c.H), args.head_dim = int(c.P);
  args.d_state = int(c.N), args.n_groups = int(c.groups);
  args.x = x_d.data(), args.dt = dt_d.data(), args.B = B_d.data(), args.C = C_d.data();
  args.A = A_d.data(), args.D = optional(D_d), args.dt_bias = optional(bias_d);
  args.dt_min = dt_min, args.dt_max = dt_max;
  args.x_stride = args.out_stride = d, args.dt_stride = c.H, args.B_stride = args.C_stride = GN;
  const auto check = [&](const char* what, SsdRung rung, Worst& worst, const auto& run) {
    const DeviceBuffer<T> out_d = poisoned<T>(rows * d);
    const DeviceBuffer<float> h_d = up<float>(h0);
    SsdArgs<T> a = args;
    a.h0 = h_d.data(), a.hT = h_d.data(), a.out = out_d.data();
    run(a);
    INFO(what << ": batch " << c.batch << ", L " << c.L << ", H " << c.H << ", P " << c.P << ", N "
              << c.N << ", groups " << c.groups << ", options " << c.options
              << ", bytes of a number " << sizeof(T));
    // the tensor-core rungs round the weighted x of the state to 16 bits as well
    const bool rounds = rung != SsdRung::kNaive;
    worst.of_out =
        std::max(worst.of_out, check_bounded("out", down(out_d, rows, d), out, kRule<T>));
    worst.of_state = std::max(worst.of_state, check_bounded("hT", down(h_d, c.batch * d, c.N), hT,
                                                            rounds ? kRule<T> : kRule<float>));
  };
  args.out = const_cast<T*>(x_d.data());  // aligned as the buffer that takes its place
  const SsdRung best = ssd_rung(args);
  for (const SsdRung rung : {SsdRung::kNaive, SsdRung::kFused, SsdRung::kWarpgroup})
    if (rung <= best)
      check(kRungNames[int(rung)], rung, rung == SsdRung::kNaive ? naive : fused,
            [&](const SsdArgs<T>& a) { run_rung(a, rung); });
  check("ssd", best, best == SsdRung::kNaive ? naive : fused, [](SsdArgs<T> a) {
    const DeviceBuffer<std::byte> workspace(ssd_workspace_bytes(a));
    a.workspace = workspace.data();
    ssd(a, nullptr);
    CUDA_CHECK(cudaDeviceSynchronize());
  });
  if (c.batch == 1 && c.L > 0 && c.L < 40)
    check("step", SsdRung::kNaive, step, [&](SsdArgs<T> a) {
      a.L = 1;
      for (Index t = 0; t < c.L; ++t, a.x += d, a.dt += c.H, a.B += GN, a.C += GN, a.out += d)
        ssd_step(a, nullptr);
    });
}

template <class T>
void ssd_rungs_match(const char* type) {
  Worst naive{std::string("ssd naive ") + type}, fused{std::string("ssd fused ") + type},
      step{std::string("ssd_step ") + type};
  std::uint64_t seed = 1;
  const SsdCase shapes[] = {
      {1, 0, 1, 1, 4, 1, 7},    {3, 0, 3, 5, 16, 1, 7},   {1, 0, 4, 16, 24, 2, 15},
      {1, 0, 2, 64, 128, 1, 7}, {2, 0, 6, 64, 64, 2, 3},  {1, 0, 3, 64, 200, 1, 6},
      {1, 0, 8, 64, 128, 2, 0}, {1, 0, 3, 64, 24, 1, 15}, {1, 0, 2, 192, 72, 1, 5}};
  for (SsdCase c : shapes)
    for (const Index L : {0, 1, 2, 3, 31, 32, 33, 63, 64, 129, 257, 700}) {
      c.L = L;
      ssd_matches<T>(c, ++seed, naive, fused, step);
    }
}

}  // namespace

TEST_CASE("cuda ssd: every rung and the step match the reference, float") {
  ssd_rungs_match<float>("f32");
}
TEST_CASE("cuda ssd: every rung and the step match the reference, bf16") {
  ssd_rungs_match<bf16>("bf16");
}
TEST_CASE("cuda ssd: every rung and the step match the reference, f16") {
  ssd_rungs_match<half>("f16");
}

TEST_CASE(
    "cuda ssd: sequences of different lengths, end to end, are each as if alone, on every rung") {
  const Index H = 3, P = 64, N = 64, d = H * P, longest = 200;
  const std::vector<int64_t> starts = {0, 5, 5, 69, 269, 398};
  const Index batch = Index(starts.size()) - 1, rows = starts.back();
  Random random(7);
  const auto make = [&](Index r, Index k) { return up<bf16>(random.matrix<double>(r, k)); };
  const DeviceBuffer<bf16> x = make(rows, d), dt = make(rows, H), B = make(rows, N),
                           C = make(rows, N);
  const DeviceBuffer<float> A = up<float>(Matrix<double>(-random.matrix<double>(H, 1).cwiseAbs())),
                            h0 = up<float>(random.matrix<double>(batch * d, N));
  const DeviceBuffer<int64_t> cu_seqlens(starts.data(), starts.size());
  const auto run = [&](SsdRung rung, int64_t segment, bool alone) {
    const DeviceBuffer<bf16> out = poisoned<bf16>(rows * d);
    const DeviceBuffer<float> hT = poisoned<float>(batch * d * N);
    for (Index b = 0; b < (alone ? batch : 1); ++b) {
      const Index first = starts[b], L = alone ? starts[b + 1] - first : longest;
      SsdArgs<bf16> a;
      a.batch = alone ? 1 : batch, a.L = L, a.n_heads = int(H), a.head_dim = int(P);
      a.d_state = int(N), a.cu_seqlens = alone ? nullptr : cu_seqlens.data();
      a.x = x.data() + first * d, a.dt = dt.data() + first * H, a.out = out.data() + first * d;
      a.B = B.data() + first * N, a.C = C.data() + first * N, a.A = A.data();
      a.x_stride = a.out_stride = d, a.dt_stride = H, a.B_stride = a.C_stride = N;
      a.h0 = h0.data() + b * d * N, a.hT = hT.data() + b * d * N;
      run_rung(a, std::min(rung, ssd_rung(a)),
               {segment, std::max<int64_t>(1, ceil_div(L, segment)), nullptr, nullptr});
    }
    return std::pair{down(out, rows, d), down(hT, batch * d, N)};
  };
  for (const SsdRung rung : {SsdRung::kNaive, SsdRung::kFused, SsdRung::kWarpgroup})
    for (const int64_t segment : {64, 128, 256}) {
      INFO(kRungNames[int(rung)] << ", segments of " << segment);
      CHECK(run(rung, segment, false) == run(rung, segment, true));
    }
}
