// Claims: every rung of selective_scan_backward computes the gradients that ssm_reference.hpp says
// in double, up to rounding, for any size, with and without every optional input, cut anywhere; the
// same bits on every run.
#include "support_cuda.hpp"

#include <map>

using namespace test;
using namespace mamba;

namespace {

struct GradientCase {
  Index batch, L, d, N, groups;
  int options;  // bits: D, z, bias, softplus, h0, dhT
};

using NamedGradients = std::map<std::string, Matrix<double>>;  // by the name of the input
using Truth = std::map<std::string, Matrix<Bounded>>;

// The buffers of a call.
template <class T>
struct GradientBuffers {
  DeviceBuffer<T> x, delta, B, C, z;
  DeviceBuffer<float> A, D, bias, h0;
};

template <class T>
struct GradientProblem {
  GradientCase c;
  std::vector<Index> lengths;                                   // of the sequences
  Matrix<double> x, delta, A, B, C, D, z, bias, h0, dout, dhT;  // sequences one behind another
  Truth want;
  DeviceBuffer<T> x_d, delta_d, B_d, C_d, z_d, dout_d;
  DeviceBuffer<float> A_d, D_d, bias_d, h0_d, dhT_d;
  DeviceBuffer<int64_t> cu_seqlens_d;

  GradientProblem(const GradientCase& given, std::uint64_t seed, std::vector<Index> ragged = {})
      : c(given), lengths(std::move(ragged)) {
    const bool same = lengths.empty();
    if (same) lengths.assign(static_cast<std::size_t>(c.batch), c.L);
    Random random(seed);
    const auto make = [&](Index rows, Index cols) {
      return stored<T>(random.matrix<double>(rows, cols));
    };
    const auto make_float = [&](Index rows, Index cols) {
      return stored<float>(random.matrix<double>(rows, cols));
    };
    std::vector<int64_t> starts = {0};
    for (const Index L : lengths) starts.push_back(starts.back() + L);
    const Index rows = starts.back();
    x = make(rows, c.d), delta = make(rows, c.d), dout = make(rows, c.d);
    B = make(rows, c.groups * c.N), C = make(rows, c.groups * c.N);
    A = -2 * make_float(c.d, c.N).cwiseAbs();
    if (c.options & 1) D = make_float(1, c.d);
    if (c.options & 2) z = make(rows, c.d);
    if (c.options & 4) bias = make_float(1, c.d);
    if (!(c.options & 8)) {  // without softplus: steps are positive
      delta = delta.cwiseAbs().eval(), bias = bias.cwiseAbs().eval();
    }
    if (c.options & 16) h0 = make_float(c.batch * c.d, c.N);
    if (c.options & 32) dhT = make_float(c.batch * c.d, c.N);
    x_d = up<T>(x), delta_d = up<T>(delta), B_d = up<T>(B), C_d = up<T>(C), z_d = up<T>(z);
    A_d = up<float>(A), D_d = up<float>(D), bias_d = up<float>(bias), h0_d = up<float>(h0);
    dout_d = up<T>(dout), dhT_d = up<float>(dhT);
    if (!same) cu_seqlens_d = DeviceBuffer<int64_t>(starts.data(), starts.size());
    want = expected(starts);
  }

  Truth expected(const std::vector<int64_t>& starts) const {
    Truth all = {
        {"x", bounded(x)}, {"delta", bounded(x)},   {"A", bounded(A)},
        {"B", bounded(B)}, {"C", bounded(C)},       {"D", bounded(D)},
        {"z", bounded(z)}, {"bias", bounded(bias)}, {"h0", Matrix<Bounded>(c.batch * c.d, c.N)}};
    for (auto& [name, m] : all) m.setZero();
    const StateMatrix<Bounded> A_b = bounded(A);
    const Matrix<Bounded> D_b = bounded(D), bias_b = bounded(bias);
    for (Index b = 0; b < c.batch; ++b) {
      const Index first = starts[static_cast<std::size_t>(b)],
                  L = lengths[static_cast<std::size_t>(b)];
      const auto part = [&](const Matrix<double>& m) {
        return bounded(m.size() ? Matrix<double>(m.middleRows(first, L)) : m);
      };
      const auto state = [&](const Matrix<double>& m) -> StateMatrix<Bounded> {
        if (m.size()) return bounded(m.middleRows(b * c.d, c.d));
        return StateMatrix<Bounded>::Zero(c.d, c.N);
      };
      const Matrix<Bounded> x_b = part(x), delta_b = part(delta), B_b = part(B), C_b = part(C),
                            z_b = part(z), dout_b = part(dout);
      const auto in = scan_inputs(x_b, delta_b, A_b, B_b, C_b, D_b, z_b, bias_b, c.options & 8);
      const StateMatrix<Bounded> before = state(h0);
      StateMatrix<Bounded> dh = state(dhT);
      const auto d = ssm::selective_scan_backward<Bounded>(in, before, dout_b, dh);
      all["x"].middleRows(first, L) = d.x, all["delta"].middleRows(first, L) = d.delta;
      all["B"].middleRows(first, L) = d.B, all["C"].middleRows(first, L) = d.C;
      if (z.size()) all["z"].middleRows(first, L) = d.z;
      all["A"] += d.A, all["h0"].middleRows(b * c.d, c.d) = dh;
      if (D.size()) all["D"] += d.D;
      if (bias.size()) all["bias"] += d.delta_bias;
    }
    for (const char* weight : {"A", "D", "bias"})  // they are added to ones
      for (Bounded& v : all[weight].reshaped()) v.size += 1;
    return all;
  }

  ScanBackwardArgs<T> args() const {
    ScanBackwardArgs<T> a;
    a.in.batch = c.batch, a.in.L = *std::max_element(lengths.begin(), lengths.end());
    a.in.d_inner = c.d, a.in.d_state = c.N, a.in.n_groups = c.groups;
    a.in.x = x_d.data(), a.in.delta = delta_d.data(), a.in.A = A_d.data();
    a.in.B = B_d.data(), a.in.C = C_d.data(), a.in.D = optional(D_d), a.in.z = optional(z_d);
    a.in.delta_bias = optional(bias_d), a.in.h0 = optional(h0_d);
    a.in.x_stride = a.in.delta_stride = a.in.z_stride = c.d;
    a.in.B_stride = a.in.C_stride = c.groups * c.N;
    a.in.delta_softplus = c.options & 8;
    a.in.cu_seqlens = optional(cu_seqlens_d), a.n_rows = x.rows();
    a.dout = dout_d.data(), a.dhT = optional(dhT_d);
    a.dout_stride = a.dx_stride = a.ddelta_stride = a.dz_stride = c.d;
    a.dB_stride = a.dC_stride = c.groups * c.N;
    return a;
  }

  // run(args): the operation. Returns every gradient; those of weights are added to ones.
  template <class Run>
  NamedGradients run(const Run& run) const {
    const Index rows = x.rows(), width = c.groups * c.N;
    const DeviceBuffer<T> dx = poisoned<T>(rows * c.d), ddelta = poisoned<T>(rows * c.d),
                          dz = poisoned<T>(z.size()), dB = poisoned<T>(rows * width),
                          dC = poisoned<T>(rows * width);
    const DeviceBuffer<float> dh0 = poisoned<float>(c.batch * c.d * c.N);
    const auto ones = [](const Matrix<double>& m) {
      return up<float>(Matrix<double>::Ones(m.rows(), m.cols()));
    };
    const DeviceBuffer<float> dA = ones(A), dD = ones(D), dbias = ones(bias);
    ScanBackwardArgs<T> a = args();
    a.dx = dx.data(), a.ddelta = ddelta.data(), a.dz = dz.data(), a.dB = dB.data();
    a.dC = dC.data(), a.dA = dA.data(), a.dD = dD.data(), a.dbias = dbias.data();
    a.dh0 = dh0.data();
    run(a);
    NamedGradients got = {
        {"x", down(dx, rows, c.d)},           {"delta", down(ddelta, rows, c.d)},
        {"B", down(dB, rows, width)},         {"C", down(dC, rows, width)},
        {"z", down(dz, z.rows(), z.cols())},  {"A", down(dA, c.d, c.N)},
        {"D", down(dD, D.rows(), D.cols())},  {"bias", down(dbias, bias.rows(), bias.cols())},
        {"h0", down(dh0, c.batch * c.d, c.N)}};
    for (const char* weight : {"A", "D", "bias"}) got[weight].array() -= 1;
    return got;
  }

  template <class Run>
  void check(const char* rung, Worst& worst, const Run& run) const {
    INFO(rung << ": batch " << c.batch << ", L " << c.L << ", d " << c.d << ", N " << c.N
              << ", groups " << c.groups << ", options " << c.options << ", bytes of a number "
              << sizeof(T));
    for (const auto& [name, got] : this->run(run)) {
      const bool is_state = name == "A" || name == "D" || name == "bias" || name == "h0";
      double& of = is_state ? worst.of_state : worst.of_out;  // float whatever the type
      of = std::max(of, check_bounded(("d" + name).c_str(), got, want.at(name),
                                      is_state ? kRule<float> : kRule<T>));
    }
  }
};

template <class T>
void run_backward_naive(const ScanBackwardArgs<T>& a) {
  const DeviceBuffer<float> workspace =
      poisoned<float>(Index(selective_scan_backward_naive_workspace(a) / sizeof(float)));
  selective_scan_backward_naive(a, workspace.data(), nullptr);
  CUDA_CHECK(cudaDeviceSynchronize());
}
template <class T>
void run_backward(const ScanBackwardArgs<T>& a) {
  const DeviceBuffer<float> workspace =
      poisoned<float>(Index(selective_scan_backward_workspace(a) / sizeof(float)));
  selective_scan_backward(a, workspace.data(), nullptr);
  CUDA_CHECK(cudaDeviceSynchronize());
}

template <class T>
void backward_rungs_match(const char* type, const std::vector<Index>& some_lengths) {
  Worst naive{std::string("selective_scan_backward naive ") + type},
      fused{std::string("selective_scan_backward fused ") + type};
  std::uint64_t seed = 1;
  const GradientCase shapes[] = {
      {1, 0, 1, 1, 1, 63},    {3, 0, 5, 16, 1, 15},  {1, 0, 64, 16, 2, 63}, {3, 0, 40, 16, 1, 8},
      {1, 0, 33, 17, 3, 56},  {2, 0, 12, 64, 1, 44}, {1, 0, 8, 256, 2, 58}, {1, 0, 36, 5, 1, 0},
      {1, 0, 130, 16, 1, 61}, {1, 0, 516, 2, 1, 55}, {1, 0, 36, 12, 1, 29}, {2, 0, 8, 20, 1, 63},
      {2, 0, 75, 13, 3, 47},  {2, 0, 420, 8, 3, 47}, {1, 0, 132, 16, 1, 32}};
  for (GradientCase c : shapes)
    for (const Index L : some_lengths) {
      c.L = L;
      const GradientProblem<T> p(c, ++seed);
      p.check("naive", naive, run_backward_naive<T>);
      p.check("fused", fused, run_backward<T>);
    }
  const GradientProblem<T> split({1, 500, 264, 12, 2, 63}, 99);
  CHECK(scan_backward_is_fused(split.args()));
  CHECK(scan_pieces(split.args()).count > 1);
  split.check("fused, split", fused, run_backward<T>);
}

}  // namespace

TEST_CASE("cuda selective_scan_backward: naive and fused kernels match the reference, float") {
  backward_rungs_match<float>("f32", kLengths);
}
TEST_CASE("cuda selective_scan_backward: naive and fused kernels match the reference, bf16") {
  backward_rungs_match<bf16>("bf16", kLengths);
}
TEST_CASE("cuda selective_scan_backward: naive and fused kernels match the reference, f16") {
  backward_rungs_match<half>("f16", kLengths);
}
TEST_CASE("cuda selective_scan_backward in short: naive and fused kernels match the reference") {
  backward_rungs_match<float>("f32, some lengths", {0, 1, 3, 33});
  backward_rungs_match<bf16>("bf16, some lengths", {19});
}

TEST_CASE("cuda selective_scan_backward: sequences of different lengths are each on their own") {
  Worst naive{"selective_scan_backward naive, ragged"}, fused{"selective_scan_backward ragged"};
  const std::vector<Index> lengths = {0, 70, 1, 0, 33, 150, 8};
  for (const GradientCase& c : {GradientCase{7, 0, 72, 16, 2, 63}, {7, 0, 9, 3, 1, 29}}) {
    const GradientProblem<float> p(c, 21, lengths);
    p.check("naive", naive, run_backward_naive<float>);
    p.check("fused", fused, run_backward<float>);
    p.check("fused, rows not told", fused, [](ScanBackwardArgs<float> a) {
      a.n_rows = 0;
      run_backward(a);
    });
  }
}

TEST_CASE("cuda selective_scan_backward: cut anywhere, the gradient of the state carried") {
  Worst naive{"selective_scan_backward naive, cut"}, fused{"selective_scan_backward cut"};
  const GradientProblem<float> p({1, 70, 24, 16, 1, 63}, 5);
  const auto cut_at = [&](Index cut, const auto& run) {
    return [&p, cut, run](ScanBackwardArgs<float> a) {
      // The state at the cut: forward over the first part.
      const DeviceBuffer<float> h(24 * 16), out(70 * 24);
      ScanArgs<float> forward = a.in;
      forward.L = cut, forward.out = out.data(), forward.out_stride = 24, forward.hT = h.data();
      selective_scan_naive(forward, nullptr);
      ScanBackwardArgs<float> last = a;
      last.in.L = last.n_rows = 70 - cut, last.in.h0 = h.data();
      for (const float** q : {&last.in.x, &last.in.delta, &last.in.z, &last.dout}) *q += cut * 24;
      for (float** q : {&last.dx, &last.ddelta, &last.dz}) *q += cut * 24;
      last.in.B += cut * 16, last.in.C += cut * 16, last.dB += cut * 16, last.dC += cut * 16;
      run(last);
      a.in.L = a.n_rows = cut, a.dhT = a.dh0;  // in place
      run(a);
    };
  };
  for (Index cut = 0; cut <= 70; cut += 7) {
    p.check("naive", naive, cut_at(cut, run_backward_naive<float>));
    p.check("fused", fused, cut_at(cut, run_backward<float>));
  }
}

TEST_CASE("cuda selective_scan_backward: what its threads work with is in registers") {
  const auto in_memory = [](auto* kernel) {
    cudaFuncAttributes attributes;
    CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel));
    return attributes.localSizeBytes;
  };
  CHECK(in_memory(selective_scan_backward_summary_kernel<bf16>) == 0);
  CHECK(in_memory(selective_scan_backward_fused_kernel<bf16>) == 0);
  CHECK(in_memory(selective_scan_backward_fused_kernel<float>) == 0);
}

TEST_CASE("cuda selective_scan_backward: the same bits on every run") {
  const GradientProblem<bf16> p({2, 300, 520, 16, 1, 63}, 3);
  const NamedGradients first = p.run(run_backward<bf16>);
  for (int again = 0; again < 4; ++again)
    for (const auto& [name, got] : p.run(run_backward<bf16>)) {
      INFO(name);
      CHECK(max_difference(got, first.at(name)) == 0);
    }
}
