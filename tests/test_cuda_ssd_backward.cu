// Claims: every rung of ssd's backward computes the gradients that ssm_reference.hpp says in
// double, up to rounding, for any size, with and without every optional input; a sequence may be
// cut, and sequences of different lengths lie end to end; a second run gives the same bits.
#include "support_cuda.hpp"

using namespace test;
using namespace mamba;

namespace {

struct SsdBackwardCase {
  Index batch, L, H, P, N, groups;
  int options;  // bits: D, bias, h0, limits of delta, dhT, strong decays, weak decays
};

// The inputs of a batch: numbers that T can hold.
struct SsdProblem {
  SsdBackwardCase c;
  Matrix<double> x, dt, B, C, A, D, bias, h0, dout, dhT;
  float dt_min, dt_max;
};

template <class T>
SsdProblem make_ssd_problem(const SsdBackwardCase& c, Index rows, std::uint64_t seed) {
  Random random(seed);
  const Index GN = c.groups * c.N, d = c.H * c.P;
  const auto make = [&](Index r, Index k) { return stored<T>(random.matrix<double>(r, k)); };
  const auto optional_float = [&](int bit, Index r, Index k) {
    return c.options & bit ? stored<float>(random.matrix<double>(r, k)) : Matrix<double>();
  };
  SsdProblem p{c};
  p.x = make(rows, d), p.dt = make(rows, c.H), p.B = make(rows, GN), p.C = make(rows, GN);
  p.dout = make(rows, d);
  const double decay = c.options & 32 ? 30 : c.options & 64 ? 0.01 : 1;
  p.A = -stored<float>(random.matrix<double>(c.H, 1, decay)).cwiseAbs();
  p.D = optional_float(1, 1, c.H), p.bias = optional_float(2, 1, c.H);
  p.h0 = optional_float(4, c.batch * d, c.N), p.dhT = optional_float(16, c.batch * d, c.N);
  p.dt_min = c.options & 8 ? 0.25f : 0.f, p.dt_max = c.options & 8 ? 0.75f : INFINITY;
  return p;
}

// All gradients of a batch; those that each sequence has of its own one below the other.
template <class Number>
struct SsdBatch {
  Matrix<Number> x, dt, B, C, A, D, dt_bias, h0;
  std::array<Matrix<Number>*, 8> all() { return {&x, &dt, &B, &C, &A, &D, &dt_bias, &h0}; }
  std::array<const Matrix<Number>*, 8> all() const {
    return {&x, &dt, &B, &C, &A, &D, &dt_bias, &h0};
  }
};
using SsdBatchGradients = SsdBatch<double>;
struct SsdGradientMember {
  const char* name;
  bool of_sequence, of_data;  // not a sum over the batch; stored as data is
};
const SsdGradientMember kSsdGradientMembers[] = {
    {"dx", true, true},   {"ddt", true, true},  {"dB", true, true},         {"dC", true, true},
    {"dA", false, false}, {"dD", false, false}, {"ddt_bias", false, false}, {"dh0", true, false}};

// The reference on sequence b.
SsdBatch<Bounded> ssd_backward_reference(const SsdProblem& p, Index b) {
  const SsdBackwardCase& c = p.c;
  const auto part = [&](const Matrix<double>& m) { return bounded(of(m, b, c.batch)); };
  const auto state = [&](const Matrix<double>& m) -> StateMatrix<Bounded> {
    if (m.size()) return part(m);
    return StateMatrix<Bounded>::Zero(c.H * c.P, c.N);
  };
  const Matrix<Bounded> x = part(p.x), B = part(p.B), C = part(p.C), dout = part(p.dout),
                        dt = part(p.dt), D = bounded(p.D), bias = bounded(p.bias);
  const StateMatrix<Bounded> A = bounded(p.A), h0 = state(p.h0);
  ssm::SsdInputs<Bounded> in;
  in.x = x, in.dt = dt, in.A = A, in.B = B, in.C = C;
  if (D.size()) in.D = D;
  if (bias.size()) in.dt_bias = bias;
  in.dt_min = p.dt_min, in.dt_max = p.dt_max;
  StateMatrix<Bounded> dh = state(p.dhT);
  const auto d = ssm::ssd_sequential_backward<Bounded>(in, h0, dout, dh);
  return {d.x, d.dt, d.B, d.C, d.A, d.D, d.dt_bias, dh};
}

SsdBatch<Bounded> ssd_backward_reference(const SsdProblem& p) {
  SsdBatch<Bounded> all;
  for (Index b = 0; b < p.c.batch; ++b) {
    const SsdBatch<Bounded> one = ssd_backward_reference(p, b);
    for (std::size_t i = 0; i < one.all().size(); ++i) {
      const bool of_sequence = kSsdGradientMembers[i].of_sequence;
      const Matrix<Bounded>& from = *one.all()[i];
      Matrix<Bounded>& to = *all.all()[i];
      if (b == 0) to.setZero(from.rows() * (of_sequence ? p.c.batch : 1), from.cols());
      to.middleRows(of_sequence ? b * from.rows() : 0, from.rows()) += from;
    }
  }
  return all;
}

// The same on the GPU.
template <class T>
struct DeviceSsdProblem {
  DeviceBuffer<T> x, dt, B, C, dout, dx, ddt, dB, dC;
  DeviceBuffer<float> A, D, bias, h0, dhT, dA, dD, ddt_bias, dh0;
  SsdBackwardArgs<T> args;
  Index rows, d, H, GN, N;

  explicit DeviceSsdProblem(const SsdProblem& p)
      : x(up<T>(p.x)),
        dt(up<T>(p.dt)),
        B(up<T>(p.B)),
        C(up<T>(p.C)),
        dout(up<T>(p.dout)),
        A(up<float>(p.A)),
        D(up<float>(p.D)),
        bias(up<float>(p.bias)),
        h0(up<float>(p.h0)),
        dhT(up<float>(p.dhT)),
        rows(p.x.rows()),
        d(p.x.cols()),
        H(p.c.H),
        GN(p.B.cols()),
        N(p.c.N) {
    dx = poisoned<T>(rows * d), ddt = poisoned<T>(rows * H);
    dB = poisoned<T>(rows * GN), dC = poisoned<T>(rows * GN);
    dA = poisoned<float>(H), dD = poisoned<float>(H), ddt_bias = poisoned<float>(H);
    dh0 = poisoned<float>(p.c.batch * d * N);
    SsdBackwardArgs<T>& a = args;
    a.batch = p.c.batch, a.L = p.c.L, a.n_heads = int(H), a.head_dim = int(p.c.P);
    a.d_state = int(N), a.n_groups = int(p.c.groups);
    a.x = x.data(), a.dt = dt.data(), a.B = B.data(), a.C = C.data(), a.dout = dout.data();
    a.A = A.data(), a.D = optional(D), a.dt_bias = optional(bias);
    a.h0 = optional(h0), a.dhT = optional(dhT);
    a.dt_min = p.dt_min, a.dt_max = p.dt_max;
    a.dx = dx.data(), a.ddt = ddt.data(), a.dB = dB.data(), a.dC = dC.data();
    a.dA = dA.data(), a.dD = p.D.size() ? dD.data() : nullptr;
    a.ddt_bias = p.bias.size() ? ddt_bias.data() : nullptr, a.dh0 = dh0.data();
    a.x_stride = a.dout_stride = a.dx_stride = d, a.dt_stride = a.ddt_stride = H;
    a.B_stride = a.C_stride = a.dB_stride = a.dC_stride = GN;
  }
  SsdBatchGradients results() const {
    const auto row = [&](const float* wanted, const DeviceBuffer<float>& from) {
      return wanted ? down(from, 1, H) : Matrix<double>(1, 0);
    };
    return {down(dx, rows, d),
            down(ddt, rows, H),
            down(dB, rows, GN),
            down(dC, rows, GN),
            down(dA, H, 1),
            row(args.dD, dD),
            row(args.ddt_bias, ddt_bias),
            down(dh0, Index(dh0.size()) / std::max<Index>(N, 1), N)};
  }
};

const char* const kSsdBackwardRungNames[] = {"naive", "fused"};

template <class T>
void run_ssd_backward(SsdBackwardArgs<T> a, SsdBackwardRung rung) {
  const DeviceBuffer<std::byte> workspace(ssd_backward_workspace_bytes(a, rung));
  CUDA_CHECK(cudaMemset(workspace.data(), 0xff, workspace.bytes()));
  a.workspace = workspace.data();
  float* const sums[] = {a.dA, a.dD, a.ddt_bias};
  for (float* sum : sums)  // what they are added to
    if (sum) CUDA_CHECK(cudaMemset(sum, 0, sizeof(float) * a.n_heads));
  ssd_backward(a, rung, nullptr);
  CUDA_CHECK(cudaDeviceSynchronize());
}

struct WorstSsdGradients {
  std::string what;
  double worst[std::size(kSsdGradientMembers)] = {};
  ~WorstSsdGradients() {
    std::cout << what << ": worst";
    for (std::size_t i = 0; i < std::size(kSsdGradientMembers); ++i)
      std::cout << (i ? ", " : " ") << kSsdGradientMembers[i].name << " " << worst[i];
    std::cout << " bounds\n";
  }
};

template <class T>
void check_ssd_gradients(const SsdBatchGradients& got, const SsdBatch<Bounded>& want, bool rounds,
                         WorstSsdGradients& worst) {
  for (std::size_t i = 0; i < std::size(kSsdGradientMembers); ++i) {
    const SsdGradientMember& m = kSsdGradientMembers[i];
    worst.worst[i] =
        std::max(worst.worst[i], check_bounded(m.name, *got.all()[i], *want.all()[i],
                                               m.of_data || rounds ? kRule<T> : kRule<float>));
  }
}

bool same_ssd_bits(const SsdBatchGradients& a, const SsdBatchGradients& b) {
  for (std::size_t i = 0; i < a.all().size(); ++i)
    if (*a.all()[i] != *b.all()[i]) return false;
  return true;
}

template <class T>
void ssd_backward_matches(const SsdBackwardCase& c, std::uint64_t seed, WorstSsdGradients& naive,
                          WorstSsdGradients& fused) {
  const SsdProblem problem = make_ssd_problem<T>(c, c.batch * c.L, seed);
  const SsdBatch<Bounded> want = ssd_backward_reference(problem);
  for (const SsdBackwardRung rung : {SsdBackwardRung::kNaive, SsdBackwardRung::kFused}) {
    const DeviceSsdProblem<T> on_device(problem);
    if (rung > ssd_backward_rung(on_device.args)) continue;
    const bool is_naive = rung == SsdBackwardRung::kNaive;
    INFO(kSsdBackwardRungNames[int(rung)]
         << ": batch " << c.batch << ", L " << c.L << ", H " << c.H << ", P " << c.P << ", N "
         << c.N << ", groups " << c.groups << ", options " << c.options << ", bytes of a number "
         << sizeof(T));
    run_ssd_backward(on_device.args, rung);
    const SsdBatchGradients first = on_device.results();
    check_ssd_gradients<T>(first, want, !is_naive, is_naive ? naive : fused);
    run_ssd_backward(on_device.args, rung);
    CHECK(same_ssd_bits(on_device.results(), first));
  }
}

template <class T>
void ssd_backward_rungs_match(const char* type, std::vector<Index> lengths) {
  WorstSsdGradients naive{std::string("ssd backward naive ") + type},
      fused{std::string("ssd backward fused ") + type};
  std::uint64_t seed = 1;
  const SsdBackwardCase shapes[] = {
      {1, 0, 1, 1, 4, 1, 23},   {3, 0, 3, 5, 16, 1, 7},   {1, 0, 4, 16, 24, 2, 31},
      {1, 0, 2, 64, 128, 1, 7}, {2, 0, 6, 64, 64, 2, 19}, {1, 0, 3, 64, 200, 1, 22},
      {1, 0, 8, 64, 128, 2, 0}, {1, 0, 3, 64, 24, 1, 31}, {1, 0, 2, 192, 72, 1, 21},
      {1, 0, 2, 64, 64, 1, 55}, {1, 0, 2, 64, 64, 1, 87}};
  for (SsdBackwardCase c : shapes)
    for (const Index L : lengths) {
      c.L = L;
      ssd_backward_matches<T>(c, ++seed, naive, fused);
    }
}

const std::vector<Index> kSsdBackwardLengths = {0, 1, 2, 3, 31, 32, 33, 63, 64, 129, 257, 700};

}  // namespace

TEST_CASE("cuda ssd_backward: short sequences match the reference on every rung") {
  ssd_backward_rungs_match<float>("f32", {0, 3, 17});
  ssd_backward_rungs_match<bf16>("bf16", {1, 65});
}
TEST_CASE("cuda ssd_backward: every rung matches the reference, float") {
  ssd_backward_rungs_match<float>("f32", kSsdBackwardLengths);
}
TEST_CASE("cuda ssd_backward: every rung matches the reference, bf16") {
  ssd_backward_rungs_match<bf16>("bf16", kSsdBackwardLengths);
}
TEST_CASE("cuda ssd_backward: every rung matches the reference, f16") {
  ssd_backward_rungs_match<half>("f16", kSsdBackwardLengths);
}

TEST_CASE(
    "cuda ssd_backward: sequences of different lengths, end to end, are each as if alone, on every "
    "rung") {
  const std::vector<int64_t> starts = {0, 5, 5, 69, 269, 398};
  const Index batch = Index(starts.size()) - 1, rows = starts.back();
  const SsdProblem problem = make_ssd_problem<bf16>({batch, 200, 3, 64, 64, 1, 23}, rows, 7);
  const DeviceBuffer<int64_t> cu_seqlens(starts.data(), starts.size());
  for (const SsdBackwardRung rung : {SsdBackwardRung::kNaive, SsdBackwardRung::kFused}) {
    INFO(kSsdBackwardRungNames[int(rung)]);
    DeviceSsdProblem<bf16> together(problem), apart(problem);
    together.args.cu_seqlens = cu_seqlens.data();
    run_ssd_backward(together.args, rung);
    Matrix<double> dA = Matrix<double>::Zero(3, 1);
    for (Index b = 0; b < batch; ++b) {
      SsdBackwardArgs<bf16> a = apart.args;
      const Index first = starts[b], state = b * apart.d * apart.N;
      a.batch = 1, a.L = starts[b + 1] - first;
      a.x += first * a.x_stride, a.dt += first * a.dt_stride, a.dout += first * a.dout_stride;
      a.B += first * a.B_stride, a.C += first * a.C_stride, a.dx += first * a.dx_stride;
      a.ddt += first * a.ddt_stride, a.dB += first * a.dB_stride, a.dC += first * a.dC_stride;
      a.h0 += state, a.dhT += state, a.dh0 += state;
      run_ssd_backward(a, rung);
      dA += down(apart.dA, 3, 1);
    }
    SsdBatchGradients got = together.results(), want = apart.results();
    CHECK((got.A - dA).cwiseAbs().maxCoeff() <= 1e-5 * dA.cwiseAbs().maxCoeff());
    got.A = want.A, got.D = want.D, got.dt_bias = want.dt_bias;  // sums over the batch
    CHECK(same_ssd_bits(got, want));
  }
}

TEST_CASE("cuda ssd_backward: a cut sequence, its state's gradient carried over, is as one") {
  const SsdBackwardCase c = {1, 150, 2, 64, 64, 1, 23};
  const SsdProblem problem = make_ssd_problem<bf16>(c, c.L, 11);
  const SsdBatch<Bounded> want = ssd_backward_reference(problem);
  WorstSsdGradients naive{"ssd backward naive, cut"}, fused{"ssd backward fused, cut"};
  for (const SsdBackwardRung rung : {SsdBackwardRung::kNaive, SsdBackwardRung::kFused})
    for (const Index cut : {0, 1, 64, 77, 149, 150}) {
      INFO(kSsdBackwardRungNames[int(rung)] << ", cut at " << cut);
      const DeviceSsdProblem<bf16> whole(problem);
      const DeviceBuffer<float> h = up<float>(problem.h0);
      const DeviceBuffer<bf16> out = poisoned<bf16>(c.L * whole.d);
      SsdBackwardArgs<bf16> first = whole.args, second = whole.args;
      first.L = cut, second.L = c.L - cut;
      first.out = out.data(), first.out_stride = whole.d, first.hT = h.data();
      ssd_naive(static_cast<const SsdArgs<bf16>&>(first), nullptr);
      auto& a = second;
      a.x += cut * a.x_stride, a.dt += cut * a.dt_stride, a.dout += cut * a.dout_stride;
      a.B += cut * a.B_stride, a.C += cut * a.C_stride, a.dx += cut * a.dx_stride;
      a.ddt += cut * a.ddt_stride, a.dB += cut * a.dB_stride, a.dC += cut * a.dC_stride;
      a.h0 = h.data();
      run_ssd_backward(second, rung);
      SsdBatchGradients of_second = whole.results();
      first.dhT = whole.dh0.data();  // in place
      run_ssd_backward(first, rung);
      SsdBatchGradients got = whole.results();
      got.A += of_second.A, got.D += of_second.D, got.dt_bias += of_second.dt_bias;
      const bool is_naive = rung == SsdBackwardRung::kNaive;
      check_ssd_gradients<bf16>(got, want, !is_naive, is_naive ? naive : fused);
    }
}
