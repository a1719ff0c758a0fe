// Claims: every kernel, and every rung of its ladder, computes what ssm_reference.hpp says in double, up
// to rounding, for any size: outputs and final states, with and without every optional input, cut anywhere.
#include "support.hpp"

#define MAMBA_NO_MAIN
#include "../mamba.cu"

using namespace test;
using namespace mamba;
using bf16 = __nv_bfloat16;
using half = __half;

namespace {

// Before the first test: where there is no GPU there is nothing to test.
const bool gpu_here = [] {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess && count > 0) return true;
  std::cout << "GPU tests: skipped, no GPU here\n";
  std::exit(0);
}();

// Numerics (DESIGN): |got - want| <= k eps m. One k for each storage type. float: as for the forms of the
// reference, sums in other orders and decays exp(sum of delta A). 16 bits: what is stored is rounded once,
// tensor cores read factors rounded once more each; the rest is float.
template <class T>
constexpr double kEps = 0x1p-24;
template <>
constexpr double kEps<bf16> = 0x1p-8;
template <>
constexpr double kEps<half> = 0x1p-11;
template <class T>
constexpr double kTiny = 0;  // below the smallest normal number, spacing is that of it
template <>
constexpr double kTiny<half> = 0x1p-14;
template <class T>
constexpr double kBound = sizeof(T) == 4 ? 256 : 4;

struct Worst {  // the largest multiples of eps m that were seen, printed at the end of a test
  std::string what;
  double of_out = 0, of_state = 0;
  ~Worst() {
    std::cout << what << ": worst output " << of_out << ", worst state " << of_state
              << " roundings\n";
  }
};

template <class T>
float stored(double v) {
  return static_cast<float>(static_cast<T>(static_cast<float>(v)));
}
template <class T>
Matrix<double> stored(const Matrix<double>& m) {
  return m.unaryExpr([](double v) { return static_cast<double>(stored<T>(v)); });
}
template <class T, class M>
DeviceBuffer<T> up(const M& m) {
  std::vector<T> host(static_cast<std::size_t>(m.size()));
  for (Index r = 0, i = 0; r < m.rows(); ++r)
    for (Index c = 0; c < m.cols(); ++c)
      host[static_cast<std::size_t>(i++)] = static_cast<T>(static_cast<float>(m(r, c)));
  return DeviceBuffer<T>(host.data(), host.size());
}
template <class T>
Matrix<double> down(const DeviceBuffer<T>& buffer, Index rows, Index cols) {
  CUDA_CHECK(cudaDeviceSynchronize());
  std::vector<T> host(buffer.size());
  if (!host.empty()) buffer.copy_to(host.data());
  Matrix<double> m(rows, cols);
  for (Index i = 0; i < m.size(); ++i)
    m.data()[i] = static_cast<double>(static_cast<float>(host[static_cast<std::size_t>(i)]));
  return m;
}
template <class T>
DeviceBuffer<T> poisoned(Index size) {  // NaN in every type
  DeviceBuffer<T> buffer(static_cast<std::size_t>(size));
  if (size > 0) CUDA_CHECK(cudaMemset(buffer.data(), 0xff, buffer.bytes()));
  return buffer;
}
template <class T>
const T* optional(const DeviceBuffer<T>& buffer) {
  return buffer.size() ? buffer.data() : nullptr;
}

// Blocks of rows of one matrix, one for each sequence.
auto of(Matrix<double>& m, Index b, Index batch) {
  return m.middleRows(b * m.rows() / batch, m.rows() / batch);
}

// --- selective_scan ---

struct ScanCase {
  Index batch, L, d, N, groups;
  int options;  // bits: D, z, bias, softplus, h0
};

template <class T>
struct ScanProblem {
  ScanCase c;
  Matrix<double> x, delta, A, B, C, D, z, bias, h0;  // sequences one behind another
  Matrix<double> out, hT, out_size, hT_size;         // what is expected, and m
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
    A = -2 * make_float(c.d, c.N).cwiseAbs();
    if (c.options & 1) D = make_float(1, c.d);
    if (c.options & 2) z = make(rows, c.d);
    if (c.options & 4) bias = make_float(1, c.d);
    if (!(c.options & 8)) bias = bias.cwiseAbs().eval();  // without softplus: steps are positive
    if (c.options & 16) h0 = make_float(c.batch * c.d, c.N);
    x_d = up<T>(x), delta_d = up<T>(delta), B_d = up<T>(B), C_d = up<T>(C), z_d = up<T>(z);
    A_d = up<float>(A), D_d = up<float>(D), bias_d = up<float>(bias), h0_d = up<float>(h0);
    out.resize(rows, c.d), out_size = out;
    hT.resize(c.batch * c.d, c.N), hT_size = hT;
    for (Index b = 0; b < c.batch; ++b) reference(b);
  }

  void reference(Index b) {
    const StateMatrix<double> A_columns = A;
    const auto run = [&](bool sizes, Matrix<double>& to, Matrix<double>& h_to) {
      const auto part = [&](Matrix<double>& m) -> Matrix<double> {
        const Matrix<double> rows = of(m, b, c.batch);
        return sizes ? Matrix<double>(rows.cwiseAbs()) : rows;
      };
      const Matrix<double> xb = part(x), Bb = part(B), Cb = part(C), db = of(delta, b, c.batch);
      const Matrix<double> Db = sizes ? Matrix<double>(D.cwiseAbs()) : D;
      ssm::ScanInputs<double> in;
      in.x = xb, in.delta = db, in.A = A_columns, in.B = Bb, in.C = Cb;
      if (D.size()) in.D = Db;
      if (bias.size()) in.delta_bias = bias;
      in.delta_softplus = c.options & 8;
      in.channels_per_group = c.d / c.groups;
      StateMatrix<double> h = StateMatrix<double>::Zero(c.d, c.N);
      if (h0.size()) h = part(h0);
      Matrix<double> y = ssm::selective_scan<double>(in, h);
      if (z.size()) {
        const Matrix<double> gate = ssm::silu(Matrix<double>(of(z, b, c.batch)).array());
        y.array() *= (sizes ? Matrix<double>(gate.cwiseAbs()) : gate).array();
      }
      of(to, b, c.batch) = y, of(h_to, b, c.batch) = Matrix<double>(h);
    };
    run(false, out, hT);
    run(true, out_size, hT_size);
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
    worst.of_out = std::max(
        worst.of_out, check_close("out", down(out_d, out.rows(), c.d), out,
                                  Matrix<double>(out_size.array() + kTiny<T>), kBound<T>, kEps<T>));
    worst.of_state = std::max(worst.of_state, check_close("hT", down(hT_d, hT.rows(), c.N), hT,
                                                          hT_size, kBound<float>, kEps<float>));
  }
};

template <class T>
void run_scan(const ScanArgs<T>& a) {
  const DeviceBuffer<std::byte> workspace(selective_scan_workspace(a));
  selective_scan(a, reinterpret_cast<float*>(workspace.data()), nullptr);
  CUDA_CHECK(cudaDeviceSynchronize());
}

const std::vector<Index> kLengths = {0, 1, 2, 3, 31, 32, 33, 63, 257, 513};

template <class T>
void scan_rungs_match(const char* type) {
  Worst naive{std::string("selective_scan naive ") + type},
      fused{std::string("selective_scan fused ") + type};
  std::uint64_t seed = 1;
  const ScanCase shapes[] = {{1, 0, 1, 1, 1, 31},   {3, 0, 5, 16, 1, 15},  {1, 0, 64, 16, 2, 31},
                             {3, 0, 40, 16, 1, 8},  {1, 0, 33, 17, 3, 24}, {2, 0, 12, 64, 1, 28},
                             {1, 0, 8, 256, 2, 26}, {1, 0, 36, 5, 1, 0},   {1, 0, 130, 16, 1, 29},
                             {1, 0, 516, 2, 1, 23}, {1, 0, 36, 12, 1, 29}, {2, 0, 8, 20, 1, 31}};
  for (ScanCase c : shapes)
    for (const Index L : kLengths) {
      c.L = L;
      const ScanProblem<T> p(c, ++seed);
      p.check("naive", naive, [](const ScanArgs<T>& a) { selective_scan_naive(a, nullptr); });
      p.check("fused", fused, run_scan<T>);
    }
  const ScanProblem<T> cut({1, 9000, 8, 16, 1, 31},
                           99);  // few channels, long: the sequence itself is split
  CHECK(scan_chunks(1, 9000, 8) > 1);
  cut.check("fused, split", fused, run_scan<T>);
}

}  // namespace

TEST_CASE("cuda selective_scan: naive and fused kernels match the reference, float") {
  scan_rungs_match<float>("f32");
}
TEST_CASE("cuda selective_scan: naive and fused kernels match the reference, bf16") {
  scan_rungs_match<bf16>("bf16");
}
TEST_CASE("cuda selective_scan: naive and fused kernels match the reference, f16") {
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

// --- causal_conv1d ---

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
          Matrix<double> after = state, size_state = state.cwiseAbs();
          const Matrix<double> sum = ssm::causal_conv1d<double>(x, w, b, after);
          const Matrix<double> want = ssm::silu(sum.array());
          const Matrix<double> size =
              ssm::causal_conv1d<double>(Matrix<double>(x.cwiseAbs()), Matrix<double>(w.cwiseAbs()),
                                         Matrix<double>(b.cwiseAbs()), size_state)
                  .array() +
              kTiny<T>;
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
            worst.of_out = std::max(
                worst.of_out, check_close("out", down(out, L, d), want, size, kBound<T>, kEps<T>));
            if (!simple) CHECK(max_difference(down(state_out, width - 1, d), after) == 0);
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

// --- ssd ---

namespace {

struct SsdCase {
  Index batch, L, H, P, N, groups;
  int options;  // bits: D, bias, h0, limits of delta
};

template <class T>
void ssd_matches(const SsdCase& c, std::uint64_t seed, Worst& naive, Worst& fused, Worst& step) {
  Random random(seed);
  const Index rows = c.batch * c.L, GN = c.groups * c.N, d = c.H * c.P;
  const auto make = [&](Index r, Index k) { return stored<T>(random.matrix<double>(r, k)); };
  const auto make_float = [&](Index r, Index k) {
    return stored<float>(random.matrix<double>(r, k));
  };
  Matrix<double> x = make(rows, d), dt = make(rows, c.H), B = make(rows, GN), C = make(rows, GN);
  const Matrix<double> A = -make_float(c.H, 1).cwiseAbs(),
                       D = c.options & 1 ? make_float(1, c.H) : Matrix<double>();
  const Matrix<double> bias = c.options & 2 ? make_float(1, c.H) : Matrix<double>();
  Matrix<double> h0 = c.options & 4 ? make_float(c.batch * d, c.N)
                                    : Matrix<double>(Matrix<double>::Zero(c.batch * d, c.N));
  Matrix<double> out(rows, d), size(rows, d), hT(c.batch * d, c.N), hT_size(c.batch * d, c.N);
  const StateMatrix<double> A_columns = A;
  const float dt_min = c.options & 8 ? 0.25f : 0.f, dt_max = c.options & 8 ? 0.75f : INFINITY;
  for (Index b = 0; b < c.batch; ++b)
    for (const bool sizes : {false, true}) {
      const auto part = [&](Matrix<double>& m) -> Matrix<double> {
        const Matrix<double> r = of(m, b, c.batch);
        return sizes ? Matrix<double>(r.cwiseAbs()) : r;
      };
      const Matrix<double> xb = part(x), Bb = part(B), Cb = part(C), dtb = of(dt, b, c.batch),
                           Db = sizes ? Matrix<double>(D.cwiseAbs()) : D;
      ssm::SsdInputs<double> in;
      in.x = xb, in.dt = dtb, in.A = A_columns, in.B = Bb, in.C = Cb;
      if (D.size()) in.D = Db;
      if (bias.size()) in.dt_bias = bias;
      in.dt_min = dt_min, in.dt_max = dt_max, in.heads_per_group = c.H / c.groups;
      StateMatrix<double> h = part(h0);
      of(sizes ? size : out, b, c.batch) = ssm::ssd<double>(in, h, ssm::Form::sequential);
      of(sizes ? hT_size : hT, b, c.batch) = Matrix<double>(h);
    }
  const DeviceBuffer<T> x_d = up<T>(x), dt_d = up<T>(dt), B_d = up<T>(B), C_d = up<T>(C);
  const DeviceBuffer<float> A_d = up<float>(A), D_d = up<float>(D), bias_d = up<float>(bias);
  const auto check = [&](const char* rung, Worst& worst, const auto& run) {
    const DeviceBuffer<T> out_d = poisoned<T>(rows * d);
    const DeviceBuffer<float> h_d = up<float>(h0);
    SsdArgs<T> a;
    a.batch = c.batch, a.L = c.L, a.n_heads = int(c.H), a.head_dim = int(c.P), a.d_state = int(c.N),
    a.n_groups = int(c.groups);
    a.x = x_d.data(), a.dt = dt_d.data(), a.B = B_d.data(), a.C = C_d.data(), a.A = A_d.data(),
    a.D = optional(D_d);
    a.dt_bias = optional(bias_d), a.dt_min = dt_min, a.dt_max = dt_max;
    a.x_stride = a.out_stride = d, a.dt_stride = c.H, a.B_stride = a.C_stride = GN;
    a.h0 = h_d.data(), a.hT = h_d.data(), a.out = out_d.data();
    run(a);
    INFO(rung << ": batch " << c.batch << ", L " << c.L << ", H " << c.H << ", P " << c.P << ", N "
              << c.N << ", groups " << c.groups << ", options " << c.options
              << ", bytes of a number " << sizeof(T));
    // the tensor-core rungs round the weighted x of the state to 16 bits as well
    const bool rounds = std::string(rung) == "fused" && sizeof(T) == 2;
    worst.of_out = std::max(
        worst.of_out, check_close("out", down(out_d, rows, d), out,
                                  Matrix<double>(size.array() + kTiny<T>), kBound<T>, kEps<T>));
    worst.of_state =
        std::max(worst.of_state,
                 check_close("hT", down(h_d, c.batch * d, c.N), hT, hT_size,
                             rounds ? kBound<T> : kBound<float>, rounds ? kEps<T> : kEps<float>));
  };
  check("naive", naive, [](const SsdArgs<T>& a) { ssd_naive(a, nullptr); });
  check("fused", fused, [](SsdArgs<T> a) {
    const DeviceBuffer<std::byte> workspace(ssd_workspace_bytes(a));
    a.workspace = workspace.data();
    ssd(a, nullptr);
    CUDA_CHECK(cudaDeviceSynchronize());
  });
  // what other GPUs take where this one has warpgroups
  if constexpr (sizeof(T) == 2) {
    check("fused", fused, [](SsdArgs<T> a) {
      const SsdRung rung = std::min(ssd_rung(a), SsdRung::kFused);
      const DeviceBuffer<std::byte> workspace(ssd_workspace_bytes(a, rung));
      a.workspace = workspace.data();
      if (rung == SsdRung::kFused) ssd_split(a, rung, ssd_segments(a, rung), nullptr);
      if (rung == SsdRung::kNaive) ssd_naive(a, nullptr);
      CUDA_CHECK(cudaDeviceSynchronize());
    });
  }
  if (c.batch == 1 && c.L > 0 && c.L < 40)
    check("step", step, [&](SsdArgs<T> a) {
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
  const SsdCase shapes[] = {{1, 0, 1, 1, 4, 1, 7},    {3, 0, 3, 5, 16, 1, 7},
                            {1, 0, 4, 16, 24, 2, 15}, {1, 0, 2, 64, 128, 1, 7},
                            {2, 0, 6, 64, 64, 2, 3},  {1, 0, 3, 32, 200, 1, 6},
                            {1, 0, 8, 64, 128, 2, 0}};
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

// --- norms ---

TEST_CASE("cuda rms_norm, gated_rms_norm: match the reference, per group") {
  for (const Index d : {4, 12, 768, 5120})
    for (const Index groups : {1, 2}) {
      if (d / groups % 4) continue;
      Random random(3);
      const Index L = 5;
      const Matrix<double> r = stored<float>(random.matrix<double>(L, d)),
                           y = stored<bf16>(random.matrix<double>(L, d)),
                           z = stored<bf16>(random.matrix<double>(L, d));
      const Row<double> w = stored<float>(random.matrix<double>(1, d)).row(0);
      const DeviceBuffer<float> r_d = up<float>(r), w_d = up<float>(Matrix<double>(w)),
                                plain = poisoned<float>(L * d);
      const DeviceBuffer<bf16> y_d = up<bf16>(y), z_d = up<bf16>(z), gated = poisoned<bf16>(L * d);
      rms_norm<float, float>(r_d.data(), nullptr, 0, w_d.data(), 1e-5f, L, int(d), plain.data(), d,
                             nullptr);
      const Matrix<double> want = ssm::rms_norm<double>(r, w, 1e-5);
      check_close("rms_norm", down(plain, L, d), want, Matrix<double>(want.cwiseAbs()), 256,
                  0x1p-24);
      gated_rms_norm(y_d.data(), d, z_d.data(), d, w_d.data(), 1e-5f, L, int(d), int(groups),
                     gated.data(), d, nullptr);
      const Matrix<double> want_gated = ssm::gated_rms_norm<double>(y, z, w, 1e-5, groups);
      check_close("gated_rms_norm", down(gated, L, d), want_gated,
                  Matrix<double>(want_gated.cwiseAbs()), 4, 0x1p-8);
    }
}

// --- the product of decode ---

namespace {

// Few rows and many, pieces that do not fill a warp, several rounds; between them all splits of a row, and
// rows longer than the ring.
template <class T>
void linear_step_matches(const char* dtype) {
  Random random(17);
  constexpr Index n = 16 / sizeof(T);
  for (const Index rows : {1, 3, 30, 517, 13000})
    for (const Index cols : {n, 5 * n, 33 * n, 100 * n, 2000 * n})
      for (const Index batch : {1, 2, 3, 4}) {
        if (rows > 5000 && (cols > 5 * n || batch == 3)) continue;
        if (rows > 30 && cols > 100 * n) continue;
        const Matrix<double> W = stored<T>(random.matrix<double>(rows, cols)),
                             x = stored<T>(random.matrix<double>(batch, cols)),
                             r = stored<float>(random.matrix<double>(batch, cols)),
                             before = stored<float>(random.matrix<double>(batch, rows));
        const Row<double> w = stored<float>(random.matrix<double>(1, cols)).row(0);
        const DeviceBuffer<T> W_d = up<T>(W), x_d = up<T>(x);
        const DeviceBuffer<float> r_d = up<float>(r), w_d = up<float>(Matrix<double>(w)),
                                  out = poisoned<float>(batch * rows);
        INFO(dtype << ": rows " << rows << ", cols " << cols << ", batch " << batch);
        linear_step(W_d.data(), rows, cols, int(batch), PlainInput<T>{x_d.data(), cols},
                    PlainOutput{out.data(), rows}, nullptr);
        check_close("W x", down(out, batch, rows), Matrix<double>(x * W.transpose()),
                    Matrix<double>(x.cwiseAbs() * W.cwiseAbs().transpose()), 256, 0x1p-24);
        const Matrix<double> u = ssm::rms_norm<double>(r, w, 1e-5);
        const auto check_normed = [&](const char* what, const auto& input) {
          const DeviceBuffer<float> residual = up<float>(before);
          linear_step(W_d.data(), rows, cols, int(batch), input,
                      ResidualOutput{residual.data(), nullptr, rows}, nullptr);
          check_close(what, down(residual, batch, rows), Matrix<double>(before + u * W.transpose()),
                      Matrix<double>(before.cwiseAbs() + u.cwiseAbs() * W.cwiseAbs().transpose()),
                      256, 0x1p-24);
        };
        check_normed("residual + W rms_norm(r)", NormedInput{r_d.data(), w_d.data(), cols, 1e-5f});
        check_normed("residual + W gated_rms_norm(r), gate applied, one group",
                     GatedNormInput{r_d.data(), nullptr, w_d.data(), cols, 1, 0, 1e-5f});
      }
}

}  // namespace

TEST_CASE("cuda linear_step: the product, its norm and its residual match the reference") {
  linear_step_matches<float>("f32");
  linear_step_matches<bf16>("bf16");
  linear_step_matches<half>("f16");
}

// --- the sampler ---

TEST_CASE("cuda sampler: the same tokens as on the CPU, all rules") {
  Random random(11);
  Queue queue;
  int drawn = 0;
  for (const Index V : {1, 2, 37, 4096, 50280})
    for (int trial = 0; trial < (V > 5000 ? 12 : 40); ++trial) {
      SamplerOptions o;
      o.temperature = trial % 7 == 0 ? 0.f : float(0.3 + 1.2 * random.uniform());
      o.top_k = trial % 3 == 0 ? int(random.uniform() * 50) : 0;
      o.top_p = trial % 2 == 0 ? float(0.05 + 0.95 * random.uniform()) : 1.f;
      o.min_p = trial % 5 == 0 ? float(0.2 * random.uniform()) : 0.f;
      o.repetition_penalty = trial % 4 == 0 ? float(0.5 + random.uniform()) : 1.f;
      o.seed = 1000u + static_cast<unsigned>(trial);
      constexpr Index batch = 3;
      Matrix<double> logits = stored<float>(random.matrix<double>(batch, V, 3));
      if (trial % 6 == 1)
        logits = logits.unaryExpr([](double v) { return std::round(v); });  // ties
      if (trial % 6 == 2 && V > 1) logits(0, 0) = -INFINITY, logits(batch - 1, V - 1) = 9;
      std::vector<std::vector<Token>> history(batch);
      std::vector<unsigned char> seen(batch * V);
      std::vector<std::uint64_t> numbers, positions;
      for (Index b = 0; b < batch; ++b) {
        for (int i = 0; i < 20; ++i)
          history[b].push_back(static_cast<Token>(random.uniform() * double(V)));
        for (const Token id : history[b]) seen[static_cast<std::size_t>(b * V + id)] = 1;
        numbers.push_back(static_cast<std::uint64_t>(b)), positions.push_back(20);
      }
      const DeviceBuffer<float> logits_d = up<float>(logits),
                                embedding = up<float>(Matrix<double>::Zero(V, 1)), residual(batch);
      const DeviceBuffer<std::uint64_t> numbers_d(numbers.data(), batch),
          positions_d(positions.data(), batch);
      const DeviceBuffer<unsigned char> seen_d(seen.data(), seen.size());
      DeviceBuffer<std::int64_t> made(batch);
      DeviceBuffer<int> done(batch);
      const DeviceBuffer<Token> next(batch), candidates(batch * V), log(batch);
      const DeviceBuffer<double> weights(batch * V);
      const DeviceBuffer<Best> best(batch * kBestStretches);
      made.zero(), done.zero();
      const SampleArgs args{logits_d.data(),
                            V,
                            batch,
                            o.temperature,
                            o.top_p,
                            o.min_p,
                            o.repetition_penalty,
                            o.top_k,
                            o.seed,
                            numbers_d.data(),
                            positions_d.data(),
                            made.data(),
                            o.repetition_penalty != 1 ? seen_d.data() : nullptr,
                            weights.data(),
                            candidates.data(),
                            best.data(),
                            done.data(),
                            -1,
                            next.data(),
                            log.data()};
      CUDA_CHECK(cudaDeviceSynchronize());
      sample_step(args, {embedding.data(), DType::F32}, 1, residual.data(), queue.stream());
      queue.wait();
      std::vector<Token> got(batch);
      next.copy_to(got.data());
      for (Index b = 0; b < batch; ++b) {
        const Matrix<float> row = logits.row(b).cast<float>();
        CAPTURE(V, trial, b, o.temperature, o.top_k, o.top_p, o.min_p, o.repetition_penalty);
        CHECK(got[b] == sample(row.data(), static_cast<std::size_t>(V), history[b], o,
                               static_cast<std::uint64_t>(b), 20));
        ++drawn;
      }
    }
  std::cout << "sampler: " << drawn << " draws\n";
}
