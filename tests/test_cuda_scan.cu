// Claims: every rung of selective_scan computes what ssm_reference.hpp says in double, up to
// rounding, for any size: outputs and final states, with and without every optional input, cut
// anywhere.
#include "support_cuda.hpp"

#include "random_model.hpp"

using namespace test;
using namespace mamba;

namespace {

struct ScanCase {
  Index batch, L, d, N, groups;
  int options;  // bits: D, z, bias, softplus, h0, and with softplus: tiny and huge steps
};

template <class T>
struct ScanProblem {
  ScanCase c;
  Matrix<double> x, delta, A, B, C, D, z, bias, h0;  // sequences one behind another
  Matrix<Bounded> out, hT;                           // what is expected
  DeviceBuffer<T> x_d, delta_d, B_d, C_d, z_d;
  DeviceBuffer<float> A_d, D_d, bias_d, h0_d;

  ScanProblem(const ScanCase& c, std::uint64_t seed) : c(c) {
    Random random(seed);
    const auto make = [&](Index rows, Index cols) {
      return stored<T>(random.matrix<double>(rows, cols));
    };
    const auto make_float = [&](Index rows, Index cols) {
      return stored<float>(random.matrix<double>(rows, cols));
    };
    const Index rows = c.batch * c.L;
    x = make(rows, c.d), delta = make(rows, c.d), B = make(rows, c.groups * c.N),
    C = make(rows, c.groups * c.N);
    if (!(c.options & 8)) delta = delta.cwiseAbs();
    for (Index d = 0; d < c.d && c.options & 32; ++d)  // softplus: 1e-13, around 1, 100
      delta.col(d).array() += d % 3 == 0 ? -30 : d % 3 == 1 ? 0 : 100;
    delta = stored<T>(delta);
    A = -2 * make_float(c.d, c.N).cwiseAbs();
    if (c.options & 1) D = make_float(1, c.d);
    if (c.options & 2) z = make(rows, c.d);
    if (c.options & 4) bias = make_float(1, c.d);
    if (!(c.options & 8)) bias = bias.cwiseAbs().eval();  // without softplus: steps are positive
    if (c.options & 16) h0 = make_float(c.batch * c.d, c.N);
    x_d = up<T>(x), delta_d = up<T>(delta), B_d = up<T>(B), C_d = up<T>(C), z_d = up<T>(z);
    A_d = up<float>(A), D_d = up<float>(D), bias_d = up<float>(bias), h0_d = up<float>(h0);
    out.resize(rows, c.d), hT.resize(c.batch * c.d, c.N);
    for (Index b = 0; b < c.batch; ++b) reference(b);
  }

  void reference(Index b) {
    const auto part = [&](const Matrix<double>& m) { return bounded(of(m, b, c.batch)); };
    const Matrix<Bounded> x_b = part(x), delta_b = part(delta), B_b = part(B), C_b = part(C),
                          z_b = part(z), D_b = bounded(D), bias_b = bounded(bias);
    const StateMatrix<Bounded> A_b = bounded(A);
    const auto in = scan_inputs(x_b, delta_b, A_b, B_b, C_b, D_b, z_b, bias_b, c.options & 8);
    StateMatrix<Bounded> h = StateMatrix<Bounded>::Zero(c.d, c.N);
    if (h0.size()) h = part(h0);
    of(out, b, c.batch) = ssm::selective_scan_sequential<Bounded>(in, h);
    of(hT, b, c.batch) = h;
  }

  ScanArgs<T> args() const {
    ScanArgs<T> a;
    a.batch = c.batch, a.L = c.L, a.d_inner = c.d, a.d_state = c.N, a.n_groups = c.groups;
    a.x = x_d.data(), a.delta = delta_d.data(), a.A = A_d.data(), a.B = B_d.data(),
    a.C = C_d.data();
    a.D = optional(D_d), a.z = optional(z_d), a.delta_bias = optional(bias_d),
    a.h0 = optional(h0_d);
    a.x_stride = a.delta_stride = a.z_stride = a.out_stride = c.d;
    a.B_stride = a.C_stride = c.groups * c.N;
    a.delta_softplus = c.options & 8;
    return a;
  }

  // run(args): the operation. Checks out and hT.
  template <class Run>
  void check(const char* rung, Worst& worst, const Run& run) const {
    const DeviceBuffer<T> out_d = poisoned<T>(c.batch * c.L * c.d);
    const DeviceBuffer<float> hT_d = poisoned<float>(c.batch * c.d * c.N);
    ScanArgs<T> a = args();
    a.out = out_d.data(), a.hT = hT_d.data();
    run(a);
    INFO(rung << ": batch " << c.batch << ", L " << c.L << ", d " << c.d << ", N " << c.N
              << ", groups " << c.groups << ", options " << c.options << ", bytes of a number "
              << sizeof(T));
    worst.of_out =
        std::max(worst.of_out, check_bounded("out", down(out_d, out.rows(), c.d), out, kRule<T>));
    worst.of_state =
        std::max(worst.of_state, check_bounded("hT", down(hT_d, hT.rows(), c.N), hT, kRule<float>));
  }
};

template <class T>
void run_scan(const ScanArgs<T>& a) {
  const DeviceBuffer<std::byte> workspace(selective_scan_workspace(a));
  selective_scan(a, reinterpret_cast<float*>(workspace.data()), nullptr);
  CUDA_CHECK(cudaDeviceSynchronize());
}

template <class T>
void scan_rungs_match(const char* type) {
  Worst naive{std::string("selective_scan naive ") + type},
      registers{std::string("selective_scan registers ") + type},
      lanes{std::string("selective_scan lanes ") + type},
      fused{std::string("selective_scan fused ") + type};
  std::uint64_t seed = 1;
  const ScanCase shapes[] = {{1, 0, 1, 1, 1, 31},   {3, 0, 5, 16, 1, 15},  {1, 0, 64, 16, 2, 31},
                             {3, 0, 40, 16, 1, 8},  {1, 0, 33, 17, 3, 24}, {2, 0, 12, 64, 1, 28},
                             {1, 0, 8, 256, 2, 26}, {1, 0, 36, 5, 1, 0},   {1, 0, 130, 16, 1, 29},
                             {1, 0, 516, 2, 1, 23}, {1, 0, 36, 12, 1, 29}, {2, 0, 8, 20, 1, 31},
                             {1, 0, 64, 16, 2, 63}, {3, 0, 40, 16, 1, 40}};
  for (ScanCase c : shapes)
    for (const Index L : kLengths) {
      c.L = L;
      const ScanProblem<T> p(c, ++seed);
      p.check("naive", naive, [](const ScanArgs<T>& a) { selective_scan_naive(a, nullptr); });
      if (c.N <= 64)
        p.check("registers", registers,
                [](const ScanArgs<T>& a) { selective_scan_registers(a, nullptr); });
      p.check("lanes", lanes, [](const ScanArgs<T>& a) { selective_scan_lanes(a, nullptr); });
      p.check("fused", fused, run_scan<T>);
    }
  // Few channels, long: the sequence itself is split.
  const ScanProblem<T> cut({1, 9000, 8, 16, 1, 31}, 99);
  CHECK(scan_chunks(cut.args()) > 1);
  cut.check("fused, split", fused, run_scan<T>);
}

}  // namespace

TEST_CASE("cuda selective_scan: every rung matches the reference, float") {
  scan_rungs_match<float>("f32");
}
TEST_CASE("cuda selective_scan: every rung matches the reference, bf16") {
  scan_rungs_match<bf16>("bf16");
}
TEST_CASE("cuda selective_scan: every rung matches the reference, f16") {
  scan_rungs_match<half>("f16");
}

TEST_CASE("cuda selective_scan: few channels for each multiprocessor, or many") {
  Worst worst{"selective_scan, few to many channels"};
  for (const Index channels : {4, 9, 14, 19, 23, 27, 38, 45, 70, 94, 170, 257}) {
    const ScanProblem<bf16> p({1, 67, channels * multiprocessors() - 4, 16, 1, 31}, 11);
    p.check("fused", worst, run_scan<bf16>);
  }
  const ScanProblem<bf16> sequences({3 * multiprocessors() + 1, 5, 12, 16, 1, 31}, 12);
  sequences.check("fused", worst, run_scan<bf16>);
}

TEST_CASE("cuda selective_scan: what its threads work with is in registers") {
  // Arrays that the compiler leaves in memory cost more than twice the time, and change no result.
  const auto in_memory = [](auto* kernel) {
    cudaFuncAttributes attributes;
    CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel));
    return attributes.localSizeBytes;
  };
  CHECK(in_memory(selective_scan_registers_kernel<bf16, 16>) == 0);
  CHECK(in_memory(selective_scan_lanes_kernel<bf16, 1>) == 0);
  CHECK(in_memory(selective_scan_fused_kernel<bf16, FewScan, 1>) == 0);
  CHECK(in_memory(selective_scan_fused_kernel<bf16, NarrowScan, 1>) == 0);
  CHECK(in_memory(selective_scan_fused_kernel<bf16, WideScan, 1>) == 0);
  CHECK(in_memory(selective_scan_fused_kernel<bf16, ManyScan, 2>) == 0);
  CHECK(in_memory(selective_scan_fused_kernel<float, NarrowScan, 1>) == 0);
}

TEST_CASE("cuda selective_scan: cut anywhere, empty pieces included, nothing changes") {
  Worst worst{"selective_scan cut"};
  const ScanProblem<float> p({1, 70, 24, 16, 1, 31}, 5);
  for (Index cut = 0; cut <= 70; cut += 7)
    p.check("fused", worst, [&](ScanArgs<float> a) {
      const DeviceBuffer<float> h = up<float>(p.h0);
      float* const hT = a.hT;
      a.h0 = h.data(), a.hT = h.data(), a.L = cut;
      run_scan(a);
      for (const float** q : {&a.x, &a.delta, &a.z}) *q += cut * 24;
      a.B += cut * 16, a.C += cut * 16, a.out += cut * 24, a.L = 70 - cut;
      run_scan(a);
      CUDA_CHECK(cudaMemcpy(hT, h.data(), h.bytes(), cudaMemcpyDeviceToDevice));
    });
}

TEST_CASE("cuda selective_scan: a ragged batch is each of its sequences alone, on every rung") {
  using Rung = void (*)(const ScanArgs<float>&);
  const std::pair<const char*, Rung> rungs[] = {
      {"naive", [](const ScanArgs<float>& a) { selective_scan_naive(a, nullptr); }},
      {"registers", [](const ScanArgs<float>& a) { selective_scan_registers(a, nullptr); }},
      {"lanes", [](const ScanArgs<float>& a) { selective_scan_lanes(a, nullptr); }},
      {"fused", run_scan<float>}};
  const std::vector<std::int64_t> starts = {0, 7, 7, 90};
  const DeviceBuffer<std::int64_t> cu_seqlens(starts.data(), starts.size());
  for (const Index d : {23, 24}) {  // 23: a warp of the third rung has lanes of two sequences
    const ScanProblem<float> p({1, 90, d, 16, 1, 15}, 8);
    const DeviceBuffer<float> out = poisoned<float>(90 * d), hT = poisoned<float>(3 * d * 16),
                              out_alone = poisoned<float>(90 * d),
                              hT_alone = poisoned<float>(3 * d * 16);
    for (const auto& [name, rung] : rungs) {
      ScanArgs<float> all = p.args();
      all.batch = 3, all.L = 83, all.cu_seqlens = cu_seqlens.data();
      all.out = out.data(), all.hT = hT.data();
      rung(all);
      for (int b = 0; b < 3; ++b) {
        ScanArgs<float> one = p.args();
        for (const float** q : {&one.x, &one.delta, &one.z}) *q += starts[b] * d;
        one.B += starts[b] * 16, one.C += starts[b] * 16, one.L = starts[b + 1] - starts[b];
        one.out = out_alone.data() + starts[b] * d, one.hT = hT_alone.data() + b * d * 16;
        rung(one);
      }
      INFO(name << ", d " << d);
      CHECK(max_difference(down(out, 90, d), down(out_alone, 90, d)) == 0);
      CHECK(max_difference(down(hT, 3 * d, 16), down(hT_alone, 3 * d, 16)) == 0);
    }
  }
}

TEST_CASE("cuda selective_scan_step: one token after another is the whole sequence") {
  Worst worst{"selective_scan_step"};
  for (const ScanCase& c :
       {ScanCase{1, 9, 40, 16, 1, 31}, {1, 9, 7, 5, 1, 29}, {1, 9, 6, 64, 2, 31}}) {
    const ScanProblem<float> p(c, 7);
    p.check("step", worst, [&](ScanArgs<float> a) {
      CUDA_CHECK(cudaMemcpy(a.hT, a.h0, p.h0_d.bytes(), cudaMemcpyDeviceToDevice));
      a.L = 1;
      for (Index t = 0; t < c.L; ++t) {
        selective_scan_step(a, nullptr);
        a.x += c.d, a.delta += c.d, a.out += c.d, a.z += a.z ? c.d : 0;
        a.B += a.B_stride, a.C += a.C_stride;
      }
    });
  }
}

TEST_CASE("cuda selective_scan: the same bits on every run") {
  const ScanProblem<bf16> p({2, 300, 520, 16, 1, 31}, 3);
  Matrix<double> first;
  for (int run = 0; run < 5; ++run) {
    const DeviceBuffer<bf16> out = poisoned<bf16>(2 * 300 * 520);
    ScanArgs<bf16> a = p.args();
    a.out = out.data();
    run_scan(a);
    const Matrix<double> got = down(out, 600, 520);
    if (run == 0) first = got;
    CHECK(max_difference(got, first) == 0);
  }
}

TEST_CASE("cuda selective_scan, causal_conv1d: offsets past 2^31 elements") {
  std::size_t available = 0, total = 0;
  CUDA_CHECK(cudaMemGetInfo(&available, &total));
  if (available < std::size_t{20} << 30) {
    WARN("skipped: needs 20 GiB of GPU memory");
    return;
  }
  constexpr std::int64_t d = 1024, L = (std::int64_t{1} << 21) + 5, N = 16, tail = 600;
  const DeviceBuffer<bf16> x(L * d), out(L * d), BC(L * 2 * N);
  const DeviceBuffer<float> A(d * N), weight(d * 4);
  random_kernel<<<1024, 256>>>(x.data(), L * d, 1.f, 0.f, 1);
  random_kernel<<<1024, 256>>>(BC.data(), L * 2 * N, 1.f, 0.f, 2);
  random_kernel<<<64, 256>>>(A.data(), d * N, 0.5f, -1.f, 3);
  random_kernel<<<64, 256>>>(weight.data(), d * 4, 1.f, 0.f, 4);
  ScanArgs<bf16>
      a;  // decays by e^-0.03 a token at least: after `tail` tokens the start is forgotten
  a.L = L, a.d_inner = d, a.d_state = N, a.A = A.data(), a.x = x.data(), a.delta = x.data(),
  a.B = BC.data(), a.C = BC.data() + N;
  a.x_stride = a.delta_stride = a.out_stride = d, a.B_stride = a.C_stride = 2 * N,
  a.out = out.data();
  ConvArgs<bf16> conv;
  conv.L = L, conv.d = d, conv.x = x.data(), conv.weight = weight.data(), conv.out = out.data();
  conv.x_stride = conv.out_stride = d;
  const auto tails_agree = [&](const char* what, const auto& whole, const auto& short_run) {
    CUDA_CHECK(cudaMemset(out.data(), 0xff, out.bytes()));
    whole();
    std::vector<bf16> got(50 * d), want(50 * d);
    CUDA_CHECK(
        cudaMemcpy(got.data(), out.data() + (L - 50) * d, got.size() * 2, cudaMemcpyDeviceToHost));
    const DeviceBuffer<bf16> again(tail * d);
    short_run(again.data());
    CUDA_CHECK(cudaMemcpy(want.data(), again.data() + (tail - 50) * d, want.size() * 2,
                          cudaMemcpyDeviceToHost));
    double worst = 0;
    for (std::size_t i = 0; i < got.size(); ++i) {
      const double g = static_cast<float>(got[i]), w = static_cast<float>(want[i]);
      worst = std::max(worst, std::isnan(g) ? INFINITY : std::abs(g - w) / (std::abs(w) + 1e-3));
    }
    INFO(what);
    CHECK(worst <= 0x1p-6);
  };
  tails_agree(
      "selective_scan", [&] { run_scan(a); },
      [&](bf16* to) {
        ScanArgs<bf16> last = a;
        last.L = tail, last.x += (L - tail) * d, last.delta = last.x, last.B += (L - tail) * 2 * N,
        last.C += (L - tail) * 2 * N, last.out = to;
        selective_scan_naive(last, nullptr);
      });
  tails_agree(
      "causal_conv1d", [&] { causal_conv1d(conv, nullptr); },
      [&](bf16* to) {
        ConvArgs<bf16> last = conv;
        last.L = tail, last.x += (L - tail) * d, last.out = to;
        causal_conv1d_naive(last, nullptr);
      });
}
