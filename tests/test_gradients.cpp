// Claims: every backward of ssm_reference.hpp is the gradient of its forward: it agrees with central
// differences, with outsiders' numbers and, where there are two forms, with the other one; and a
// sequence may be cut anywhere when the gradient of its state is carried over.
#include "support.hpp"

using namespace test;
using ssm::Form;
using ssm::kForms;

namespace {

/// The gradient of loss() in every entry of m, which it reads: error of order step^2.
template <class M, class Loss>
M differences(M& m, const Loss& loss) {
  constexpr double step = 1e-5;
  M d(m.rows(), m.cols());
  for (Index i = 0; i < m.size(); ++i) {
    const double kept = m.data()[i];
    m.data()[i] = kept + step;
    const double up = loss();
    m.data()[i] = kept - step;
    d.data()[i] = (up - loss()) / (2 * step);
    m.data()[i] = kept;
  }
  return d;
}

/// Entry by entry within `part` of the tensor's largest; an input left out has no gradient.
template <class Got, class Want>
void check_gradient(const char* name, const Got& got, const Want& want, double part) {
  CAPTURE(name);
  CHECK(got.size() == want.size());
  if (got.size() != want.size() || want.size() == 0) return;
  CHECK(max_difference(got, want) <= part * want.cwiseAbs().maxCoeff());
}

constexpr double kDifferences = 1e-6, kGolden = 1e-9, kForm = 1e-12;

template <class A, class B>
double dot(const A& a, const B& b) {
  return a.size() ? a.cwiseProduct(b).sum() : 0;
}

// --- selective_scan ---

struct ScanProblem {
  Matrix<double> x, delta, B, C, z, dout;
  Row<double> D, bias;
  StateMatrix<double> A, h0, dhT;
  ssm::ScanInputs<double> in;

  ScanProblem() = default;
  ScanProblem(const ScanProblem&) = delete;
  ScanProblem& operator=(const ScanProblem&) = delete;
  /// options: a bit each for D, z, delta_bias, softplus
  ScanProblem(Index L, Index d, Index N, Index groups, int options) {
    Random random(static_cast<std::uint64_t>(L * 100 + options));
    x = random.matrix<double>(L, d), delta = random.matrix<double>(L, d);
    A = -random.matrix<double>(d, N).cwiseAbs();
    B = random.matrix<double>(L, groups * N), C = random.matrix<double>(L, groups * N);
    if (options & 1) D = random.matrix<double>(1, d);
    if (options & 2) z = random.matrix<double>(L, d);
    if (options & 4) bias = random.matrix<double>(1, d);
    if (!(options & 8)) delta = delta.cwiseAbs(), bias = bias.cwiseAbs();  // steps are positive
    h0 = random.matrix<double>(d, N), dhT = random.matrix<double>(d, N);
    dout = random.matrix<double>(L, d);
    bind(options & 8);
  }
  void bind(bool softplus) {
    in.x = x, in.delta = delta, in.A = A, in.B = B, in.C = C;
    in.D = D, in.z = z, in.delta_bias = bias, in.delta_softplus = softplus;
  }
  double loss() const {
    StateMatrix<double> h = h0;
    return dot(ssm::selective_scan<double>(in, h), dout) + dot(h, dhT);
  }
  ssm::ScanGradients<double> backward(StateMatrix<double>& dh) const {
    dh = dhT;
    return ssm::selective_scan_backward<double>(in, h0, dout, dh);
  }
};

template <class F>  // visit(name, one's gradient, the other's)
void for_each_gradient(const ssm::ScanGradients<double>& a, const ssm::ScanGradients<double>& b,
                       const F& visit) {
  visit("x", a.x, b.x), visit("delta", a.delta, b.delta), visit("A", a.A, b.A);
  visit("B", a.B, b.B), visit("C", a.C, b.C), visit("D", a.D, b.D), visit("z", a.z, b.z);
  visit("delta_bias", a.delta_bias, b.delta_bias);
}

ssm::ScanGradients<double> differences(ScanProblem& p) {
  const auto of = [&](auto& m) { return differences(m, [&] { return p.loss(); }); };
  return {of(p.x), of(p.delta), of(p.A), of(p.B), of(p.C), of(p.D), of(p.z), of(p.bias)};
}

void check_differences(ScanProblem& p) {
  StateMatrix<double> dh0;
  const auto got = p.backward(dh0), want = differences(p);
  for_each_gradient(got, want, [](const char* name, const auto& g, const auto& w) {
    check_gradient(name, g, w, kDifferences);
  });
  check_gradient("h0", dh0, differences(p.h0, [&] { return p.loss(); }), kDifferences);
}

// --- ssd ---

struct SsdProblem {
  Matrix<double> x, dt, B, C, dout;
  Row<double> D, bias;
  StateMatrix<double> A, h0, dhT;
  ssm::SsdInputs<double> in;

  SsdProblem() = default;
  SsdProblem(const SsdProblem&) = delete;
  SsdProblem& operator=(const SsdProblem&) = delete;
  /// options: a bit each for D, dt_bias, softplus
  SsdProblem(Index L, Index H, Index P, Index N, Index groups, int options) {
    Random random(static_cast<std::uint64_t>(L * 100 + options));
    x = random.matrix<double>(L, H * P), dt = random.matrix<double>(L, H);
    A = -random.matrix<double>(H, 1).cwiseAbs();
    B = random.matrix<double>(L, groups * N), C = random.matrix<double>(L, groups * N);
    if (options & 1) D = random.matrix<double>(1, H);
    if (options & 2) bias = random.matrix<double>(1, H);
    if (!(options & 4)) dt = dt.cwiseAbs(), bias = bias.cwiseAbs();  // steps are positive
    h0 = random.matrix<double>(H * P, N), dhT = random.matrix<double>(H * P, N);
    dout = random.matrix<double>(L, H * P);
    bind(options & 4);
  }
  void bind(bool softplus) {
    in.x = x, in.dt = dt, in.A = A, in.B = B, in.C = C;
    in.D = D, in.dt_bias = bias, in.dt_softplus = softplus;
  }
  double loss() const {
    StateMatrix<double> h = h0;
    return dot(ssm::ssd<double>(in, h, Form::sequential), dout) + dot(h, dhT);
  }
  ssm::SsdGradients<double> backward(StateMatrix<double>& dh, Form form, Index chunk = 7) const {
    dh = dhT;
    return ssm::ssd_backward<double>(in, h0, dout, dh, form, chunk);
  }
};

template <class F>
void for_each_gradient(const ssm::SsdGradients<double>& a, const ssm::SsdGradients<double>& b,
                       const F& visit) {
  visit("x", a.x, b.x), visit("dt", a.dt, b.dt), visit("A", a.A, b.A), visit("B", a.B, b.B);
  visit("C", a.C, b.C), visit("D", a.D, b.D), visit("dt_bias", a.dt_bias, b.dt_bias);
}

ssm::SsdGradients<double> differences(SsdProblem& p) {
  const auto of = [&](auto& m) { return differences(m, [&] { return p.loss(); }); };
  return {of(p.x), of(p.dt), of(p.A), of(p.B), of(p.C), of(p.D), of(p.bias)};
}

void check_differences(SsdProblem& p) {
  const auto want = differences(p);
  const auto want_h0 = differences(p.h0, [&] { return p.loss(); });
  for (const Form form : kForms) {
    CAPTURE(int(form));
    StateMatrix<double> dh0;
    const auto got = p.backward(dh0, form);
    for_each_gradient(got, want, [](const char* name, const auto& g, const auto& w) {
      check_gradient(name, g, w, kDifferences);
    });
    check_gradient("h0", dh0, want_h0, kDifferences);
  }
}

}  // namespace

TEST_CASE("softplus and silu: the derivatives are the finite differences, the extremes finite") {
  Matrix<double> x(1, 9);
  x << -30, -3, -1, -1e-3, 0, 1e-3, 1, 3, 30;
  const auto sum = [&](auto f) { return [&x, f] { return f(x.array()).sum(); }; };
  const auto want_softplus = differences(x, sum([](auto v) { return ssm::softplus(v).eval(); }));
  const auto want_silu = differences(x, sum([](auto v) { return ssm::silu(v).eval(); }));
  const Matrix<double> softplus = ssm::softplus_derivative(x.array());
  const Matrix<double> silu = ssm::silu_derivative(x.array());
  check_gradient("softplus", softplus, want_softplus, kDifferences);
  check_gradient("silu", silu, want_silu, kDifferences);
  Eigen::ArrayXf far(4);
  far << -1e30f, -1000, 1000, 1e30f;
  CHECK((ssm::softplus_derivative(far) == Eigen::Array4f(0, 0, 1, 1)).all());
  CHECK((ssm::silu_derivative(far) == Eigen::Array4f(0, 0, 1, 1)).all());
}

TEST_CASE("rms_norm, gated_rms_norm: the backward is the finite difference") {
  Random random(1);
  const auto weight = [&] { return Row<double>(random.matrix<double>(1, 12)); };
  for (const Index L : {0, 1, 5}) {
    Matrix<double> x = random.matrix<double>(L, 12), z = random.matrix<double>(L, 12);
    const Matrix<double> dout = random.matrix<double>(L, 12);
    Row<double> w = weight();
    CAPTURE(L);
    const auto loss = [&] { return dot(ssm::rms_norm(x, w, 0.1), dout); };
    const auto d = ssm::rms_norm_backward(x, w, 0.1, dout);
    check_gradient("x", d.x, differences(x, loss), kDifferences);
    check_gradient("weight", d.weight, differences(w, loss), kDifferences);
    for (const Index groups : {1, 3}) {
      CAPTURE(groups);
      const auto gated = [&] {
        return dot(ssm::gated_rms_norm<double>(x, z, w, 0.1, groups), dout);
      };
      const auto g = ssm::gated_rms_norm_backward<double>(x, z, w, 0.1, groups, dout);
      check_gradient("y", g.y, differences(x, gated), kDifferences);
      check_gradient("z", g.z, differences(z, gated), kDifferences);
      check_gradient("gated weight", g.weight, differences(w, gated), kDifferences);
    }
  }
}

TEST_CASE("causal_conv1d: the backward is the finite difference, and may be cut anywhere") {
  for (const Index L : {0, 1, 2, 3, 9}) {
    for (const Index d_conv : {1, 2, 4}) {
      for (const bool with_bias : {false, true}) {
        CAPTURE(L, d_conv, with_bias);
        Random random(3);
        const Index d = 5;
        Matrix<double> x = random.matrix<double>(L, d), weight = random.matrix<double>(d, d_conv);
        Matrix<double> bias, start = random.matrix<double>(d_conv - 1, d);
        if (with_bias) bias = random.matrix<double>(1, d);
        const Matrix<double> dout = random.matrix<double>(L, d);
        const Matrix<double> dend = random.matrix<double>(d_conv - 1, d);
        const auto loss = [&] {
          Matrix<double> state = start;
          return dot(ssm::causal_conv1d<double>(x, weight, bias, state), dout) + dot(state, dend);
        };
        Matrix<double> dstart = dend;
        const auto got = ssm::causal_conv1d_backward<double>(x, weight, bias, start, dout, dstart);
        check_gradient("x", got.x, differences(x, loss), kDifferences);
        check_gradient("weight", got.weight, differences(weight, loss), kDifferences);
        check_gradient("bias", got.bias, differences(bias, loss), kDifferences);
        check_gradient("state", dstart, differences(start, loss), kDifferences);
        for (Index cut = 0; cut <= L; ++cut) {
          CAPTURE(cut);
          Matrix<double> between = start, dstate = dend;
          ssm::causal_conv1d<double>(x.topRows(cut), weight, bias, between);
          const auto late = ssm::causal_conv1d_backward<double>(
              x.bottomRows(L - cut), weight, bias, between, dout.bottomRows(L - cut), dstate);
          const auto early = ssm::causal_conv1d_backward<double>(x.topRows(cut), weight, bias,
                                                                 start, dout.topRows(cut), dstate);
          Matrix<double> dx(L, d);
          dx << early.x, late.x;
          check_gradient("x", dx, got.x, kForm);
          check_gradient("weight", (early.weight + late.weight).eval(), got.weight, kForm);
          check_gradient("bias", (early.bias + late.bias).eval(), got.bias, kForm);
          check_gradient("state", dstate, dstart, kForm);
        }
      }
    }
  }
}

TEST_CASE("selective_scan: the backward is the finite difference in every input and state") {
  for (const Index L : {0, 1, 2, 3, 70}) {
    CAPTURE(L);
    ScanProblem p(L, 4, 3, 1, 15);
    check_differences(p);
  }
  for (int options = 0; options < 16; ++options) {
    CAPTURE(options);
    ScanProblem p(5, 6, 2, 3, options);
    check_differences(p);
  }
  ScanProblem stretched(5, 3, 2, 1, 15);
  stretched.in.delta_ratio = 0.7;
  check_differences(stretched);
}

TEST_CASE("ssd: the backward of each form is the finite difference in every input and state") {
  for (const Index L : {0, 1, 2, 3, 20}) {
    CAPTURE(L);
    SsdProblem p(L, 3, 2, 4, 1, 7);
    check_differences(p);
  }
  for (int options = 0; options < 8; ++options) {
    CAPTURE(options);
    SsdProblem p(9, 6, 2, 3, 3, options);
    check_differences(p);
  }
  SsdProblem clamped(9, 4, 2, 3, 2, 7);
  clamped.in.dt_min = 0.3, clamped.in.dt_max = 1.2, clamped.in.delta_ratio = 0.7;
  check_differences(clamped);
  StateMatrix<double> dh0;
  const auto d = clamped.backward(dh0, Form::chunked);
  const auto inside = (d.dt.array() != 0).count();
  CHECK((inside > 0 && inside < d.dt.size()));
}
