// Claims: every backward of ssm_reference.hpp is the gradient of its forward: it agrees with
// central differences, with outsiders' numbers and, where there are two forms, with the other one;
// and a sequence may be cut anywhere when the gradient of its state is carried over.
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
  ScanProblem many_states(2, 2, 130, 1, 15);
  check_differences(many_states);
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

// --- golden data ---

namespace {

/// Sequence b of a tensor (batch, ..) as a matrix of that many rows; empty if it is not in the
/// file.
Matrix<double> sequence(const mamba::Checkpoint& file, const std::string& name, Index b,
                        Index batch, Index rows) {
  if (!file.find(name)) return {};
  const std::vector<double> all = mamba::values<double>(file.at(name));
  const Index size = static_cast<Index>(all.size()) / batch;
  return Eigen::Map<const Matrix<double>>(all.data() + b * size, rows, size / rows);
}

/// A tensor that all sequences share.
Matrix<double> shared(const mamba::Checkpoint& file, const std::string& name, Index rows) {
  return sequence(file, name, 0, 1, rows);
}

template <class Sum, class M>
void add(Sum& sum, const M& m) {
  if (m.size() == 0) return;
  if (sum.size() == 0) sum = Sum::Zero(m.rows(), m.cols());
  sum += m;
}

template <class F>
void for_each_golden(const char* start, const F& check) {
  std::size_t files = 0;
  for (const std::string& folder : golden_folders())
    for (const std::string& path : files_matching(folder, start)) {
      CAPTURE(path);
      check(mamba::read_safetensors(path));
      ++files;
    }
  REQUIRE(files > 0);
}

}  // namespace

TEST_CASE("selective_scan: the backward agrees with golden gradients to 1e-9 of the largest") {
  for_each_golden("scan_", [](const mamba::Checkpoint& file) {
    const auto& shape = file.at("u").shape;  // (batch, d, L)
    const Index batch = shape[0], d = shape[1], N = file.at("A").shape[1];
    const Index GN = file.at("B").shape[1] * N;
    ssm::ScanGradients<double> sum;  // over the sequences, of what they share
    for (Index b = 0; b < batch; ++b) {
      const auto by_channel = [&](const char* name, Index rows) -> Matrix<double> {
        return sequence(file, name, b, batch, rows).transpose();
      };
      ScanProblem p;
      p.x = by_channel("u", d), p.delta = by_channel("delta", d), p.z = by_channel("z", d);
      p.B = by_channel("B", GN), p.C = by_channel("C", GN), p.dout = by_channel("dout", d);
      p.A = shared(file, "A", d);
      if (file.find("D")) p.D = shared(file, "D", 1);
      if (file.find("delta_bias")) p.bias = shared(file, "delta_bias", 1);
      p.h0 = p.dhT = StateMatrix<double>::Zero(d, N);
      if (file.find("h0")) p.h0 = sequence(file, "h0", b, batch, d);
      if (file.find("dhT")) p.dhT = sequence(file, "dhT", b, batch, d);
      p.bind(file.metadata.at("softplus") == "1");
      StateMatrix<double> dh;
      const auto got = p.backward(dh);
      check_gradient("u", got.x, by_channel("du", d), kGolden);
      check_gradient("delta", got.delta, by_channel("ddelta", d), kGolden);
      check_gradient("z", got.z, by_channel("dz", d), kGolden);
      check_gradient("B", got.B, by_channel("dB", GN), kGolden);
      check_gradient("C", got.C, by_channel("dC", GN), kGolden);
      if (file.find("h0")) check_gradient("h0", dh, sequence(file, "dh0", b, batch, d), kGolden);
      add(sum.A, got.A), add(sum.D, got.D), add(sum.delta_bias, got.delta_bias);
    }
    check_gradient("A", sum.A, shared(file, "dA", d), kGolden);
    check_gradient("D", sum.D, shared(file, "dD", 1), kGolden);
    check_gradient("delta_bias", sum.delta_bias, shared(file, "ddelta_bias", 1), kGolden);
  });
}

TEST_CASE("ssd: the backward of each form agrees with golden gradients to 1e-9 of the largest") {
  for_each_golden("ssd_", [](const mamba::Checkpoint& file) {
    const auto& shape = file.at("x").shape;  // (batch, L, H, P)
    const Index batch = shape[0], L = shape[1], H = shape[2], HP = H * shape[3];
    const Index N = file.at("B").shape[3];
    for (const Form form : kForms) {
      CAPTURE(int(form));
      ssm::SsdGradients<double> sum;
      for (Index b = 0; b < batch; ++b) {
        const auto by_token = [&](const char* name) { return sequence(file, name, b, batch, L); };
        SsdProblem p;
        p.x = by_token("x"), p.dt = by_token("dt"), p.B = by_token("B"), p.C = by_token("C");
        p.dout = by_token("dout"), p.A = shared(file, "A", H);
        if (file.find("D")) p.D = shared(file, "D", 1);
        if (file.find("dt_bias")) p.bias = shared(file, "dt_bias", 1);
        p.h0 = p.dhT = StateMatrix<double>::Zero(HP, N);
        if (file.find("h0")) p.h0 = sequence(file, "h0", b, batch, HP);
        if (file.find("dhT")) p.dhT = sequence(file, "dhT", b, batch, HP);
        p.bind(true);
        StateMatrix<double> dh;
        const auto got = p.backward(dh, form, 64);
        check_gradient("x", got.x, by_token("dx"), kGolden);
        check_gradient("dt", got.dt, by_token("ddt"), kGolden);
        check_gradient("B", got.B, by_token("dB"), kGolden);
        check_gradient("C", got.C, by_token("dC"), kGolden);
        if (file.find("h0")) check_gradient("h0", dh, sequence(file, "dh0", b, batch, HP), kGolden);
        add(sum.A, got.A), add(sum.D, got.D), add(sum.dt_bias, got.dt_bias);
      }
      check_gradient("A", sum.A, shared(file, "dA", H), kGolden);
      check_gradient("D", sum.D, shared(file, "dD", 1), kGolden);
      check_gradient("dt_bias", sum.dt_bias, shared(file, "ddt_bias", 1), kGolden);
    }
  });
}

// --- cuts, and the forms of ssd ---

namespace {

/// Pieces [0, cut) and [cut, L) of a problem, last to first, against the whole. forward advances a
/// state over tokens, backward returns their gradients and takes the state's along.
template <class Problem, class Forward, class Backward>
void check_cuts(const Problem& p, const Forward& forward, const Backward& backward) {
  const Index L = p.in.length();
  REQUIRE(L % 2 ==
          1);  // below, two tensors of L rows together are of the tokens, others are shared
  StateMatrix<double> want_dh0 = p.dhT;
  const auto want = backward(p.in, p.h0, p.dout, want_dh0);
  for (Index cut = 0; cut <= L; ++cut) {
    CAPTURE(cut);
    StateMatrix<double> between = p.h0, dh = p.dhT;
    forward(p.in.tokens(0, cut), between);
    const auto late = backward(p.in.tokens(cut, L - cut), between, p.dout.bottomRows(L - cut), dh);
    const auto early = backward(p.in.tokens(0, cut), p.h0, p.dout.topRows(cut), dh);
    std::map<std::string, Matrix<double>> joined;
    for_each_gradient(early, late, [&](const char* name, const auto& a, const auto& b) {
      const bool by_token = a.rows() + b.rows() == L;
      auto& all = joined[name] = Matrix<double>(by_token ? L : a.rows(), a.cols());
      if (by_token)
        all << a, b;
      else
        all = a + b;
    });
    for_each_gradient(want, want, [&](const char* name, const auto& w, const auto&) {
      check_gradient(name, joined[name], w, kForm);
    });
    check_gradient("h0", dh, want_dh0, kForm);
  }
}

}  // namespace

TEST_CASE("selective_scan: a backward may be cut anywhere, the state's gradient carried over") {
  for (const Index L : {5, 71}) {
    const ScanProblem p(L, 4, 3, 2, 15);
    check_cuts(
        p, [](const auto& in, auto& h) { ssm::selective_scan<double>(in, h); },
        [](const auto& in, const auto& h0, const ssm::View<double>& dout, auto& dh) {
          return ssm::selective_scan_backward<double>(in, h0, dout, dh);
        });
  }
}

TEST_CASE("ssd: a backward may be cut anywhere, the state's gradient carried over, in each form") {
  const SsdProblem p(33, 4, 3, 2, 2, 7);
  for (const Form form : kForms) {
    CAPTURE(int(form));
    check_cuts(
        p, [&](const auto& in, auto& h) { ssm::ssd<double>(in, h, form); },
        [&](const auto& in, const auto& h0, const ssm::View<double>& dout, auto& dh) {
          return ssm::ssd_backward<double>(in, h0, dout, dh, form, 7);
        });
  }
}

TEST_CASE("ssd: the recurrence's backward and the chunked and quadratic forms' agree") {
  for (const Index L : {1, 2, 63, 64, 65, 129}) {
    const SsdProblem p(L, 4, 5, 6, 2, 7);
    StateMatrix<double> want_dh0, dh0;
    const auto want = p.backward(want_dh0, Form::sequential);
    for (const Form form : {Form::parallel, Form::chunked})
      for (const Index chunk : {1, 7, 64}) {
        CAPTURE(L, int(form), chunk);
        const auto got = p.backward(dh0, form, chunk);
        for_each_gradient(got, want, [](const char* name, const auto& g, const auto& w) {
          check_gradient(name, g, w, kForm);
        });
        check_gradient("h0", dh0, want_dh0, kForm);
      }
  }
}

TEST_CASE("gradients: inputs that do not fit are refused with one line") {
  ScanProblem p(3, 4, 2, 1, 15);
  StateMatrix<double> dh = p.dhT;
  const Matrix<double> wide(3, 5);
  CHECK_THROWS_WITH(ssm::selective_scan_backward<double>(p.in, p.h0, wide, dh),
                    "selective_scan_backward: dout: expected (3, 4), found (3, 5)");
  const StateMatrix<double> small(3, 2);
  CHECK_THROWS_WITH(ssm::selective_scan_backward<double>(p.in, small, p.dout, dh),
                    "selective_scan_backward: h0: expected (4, 2), found (3, 2)");
}

// --- attention, rotary, layer_norm ---

TEST_CASE(
    "causal_attention: the backward is the finite differences, states included, cut anywhere") {
  for (const Index kv_heads : {1, 2, 4}) {
    Random random(9);
    const Index L = 7, P = 3, before = 2;
    Matrix<double> q = random.matrix<double>(L, 4 * P), k = random.matrix<double>(L, kv_heads * P);
    Matrix<double> v = random.matrix<double>(L, kv_heads * P);
    const Matrix<double> dout = random.matrix<double>(L, 4 * P);
    using State = ssm::AttentionState<double>;
    const auto random_past = [&](Index T) {
      return State{random.matrix<double>(T, kv_heads * P), random.matrix<double>(T, kv_heads * P)};
    };
    State past = random_past(before);
    const State dend = random_past(before + L);
    const auto loss = [&] {
      State state = past;
      const auto out = ssm::causal_attention<double>({q, k, v, P}, state);
      return dot(out, dout) + dot(state.keys, dend.keys) + dot(state.values, dend.values);
    };
    const Matrix<double> dq = differences(q, loss), dk = differences(k, loss);
    const Matrix<double> dv = differences(v, loss), dkeys = differences(past.keys, loss);
    for (Index cut = 0; cut <= L; ++cut) {
      const auto piece = [&](Index first, Index count) {
        return ssm::AttentionInputs<double>{q.middleRows(first, count), k.middleRows(first, count),
                                            v.middleRows(first, count), P};
      };
      State middle = past, dstate = dend;
      ssm::causal_attention(piece(0, cut), middle);
      const auto late = ssm::causal_attention_backward<double>(piece(cut, L - cut), middle,
                                                               dout.bottomRows(L - cut), dstate);
      const auto early =
          ssm::causal_attention_backward<double>(piece(0, cut), past, dout.topRows(cut), dstate);
      Matrix<double> got_q(L, 4 * P), got_k(L, k.cols()), got_v(L, k.cols());
      got_q << early.q, late.q;
      got_k << early.k, late.k;
      got_v << early.v, late.v;
      CAPTURE(kv_heads, cut);
      check_gradient("q", got_q, dq, kDifferences);
      check_gradient("k", got_k, dk, kDifferences);
      check_gradient("v", got_v, dv, kDifferences);
      check_gradient("keys", dstate.keys, dkeys, kDifferences);
    }
  }
}

TEST_CASE("causal_attention: the backward of more queries than are taken at a time") {
  Random random(10);
  Matrix<double> q = random.matrix<double>(70, 2), k = random.matrix<double>(70, 2);
  const Matrix<double> v = random.matrix<double>(70, 2), dout = random.matrix<double>(70, 2);
  ssm::AttentionState<double> none, dstate;
  none.keys = none.values = Matrix<double>(0, 2);
  dstate.keys = dstate.values = Matrix<double>::Zero(70, 2);
  const auto loss = [&] {
    auto state = none;
    return dot(ssm::causal_attention<double>({q, k, v, 2}, state), dout);
  };
  const auto got = ssm::causal_attention_backward<double>({q, k, v, 2}, none, dout, dstate);
  check_gradient("q", got.q, differences(q, loss), kDifferences);
  check_gradient("k", got.k, differences(k, loss), kDifferences);
}

TEST_CASE("rotary, layer_norm: the backward is the finite differences") {
  Random random(11);
  Matrix<double> x = random.matrix<double>(3, 10);
  Row<double> weight = random.matrix<double>(1, 10);
  const Row<double> bias = random.matrix<double>(1, 10);
  const Matrix<double> dout = random.matrix<double>(3, 10);
  const auto turned = [&] { return dot(ssm::rotary<double>(x, 5, 4, 6, 50), dout); };
  check_gradient("rotary", ssm::rotary_backward<double>(dout, 5, 4, 6, 50), differences(x, turned),
                 kDifferences);
  const auto normed = [&] { return dot(ssm::layer_norm(x, weight, bias, 1e-3), dout); };
  const auto d = ssm::layer_norm_backward(x, weight, 1e-3, dout);
  check_gradient("x", d.x, differences(x, normed), kDifferences);
  check_gradient("weight", d.weight, differences(weight, normed), kDifferences);
}

// --- whole models ---

namespace {

/// A small model of random weights, all of its options on or off. Its vocabulary is padded by a
/// row.
struct SmallModel {
  mamba::Config config;
  ssm::Model<double> model;
  std::vector<Token> ids;

  /// Version 3 is a hybrid: attention in the first layer, Mamba-2 in the second, MLPs in both.
  SmallModel(int version, bool options) : ids{3, 0, 6, 6, 2, 5, 1, 3, 4} {
    if (version == 3) make_hybrid(options), version = 2;
    config.version = version, config.n_layer = 2, config.vocab_size = 7, config.d_model = 6;
    config.d_inner = 8, config.d_state = 3, config.d_conv = 4, config.dt_rank = 2;
    config.n_heads = 4, config.head_dim = 2, config.n_groups = options ? 2 : 1;
    config.use_bias = config.use_conv_bias = options;
    config.tie_embeddings = model.tied = !options;
    if (version == 2 && options) config.dt_min = 0.4, config.dt_max = 1.5;
    model.sizes = config;
    model.layers.resize(2);
    Random random(static_cast<std::uint64_t>(version));
    mamba::for_each_weight(config, model, [&](const std::string& name, const auto& shape, auto& w) {
      Index size = 1;
      for (const auto extent : shape) size *= extent;
      const bool padded = name.find("embeddings") != std::string::npos || name[0] == 'l';
      const Index cols = w.RowsAtCompileTime == 1 ? size : size / shape[0];
      w = random.matrix<double>(size / cols + padded, cols, padded ? 1 : 0.5);
      if (name.find("A_log") != std::string::npos) w = -w.cwiseAbs();
    });
  }
  void make_hybrid(bool options) {
    config.attention_layers = {0};
    config.attention = {4, options ? 2 : 4, 4, options ? 2 : 4, options ? 3 : 0, 100};
    config.attention_in_bias = config.attention_out_bias = options;
    config.d_intermediate = 5, config.rms_norm = !options;
  }
  Index length() const { return static_cast<Index>(ids.size()) - 1; }
};

/// past: tokens that attention looks back to.
ssm::State<double> random_state(const ssm::Sizes& sizes, std::uint64_t seed, Index past) {
  Random random(seed);
  ssm::State<double> state(sizes);
  for (auto& layer : state.layers) {
    for (auto* m : {&layer.past.keys, &layer.past.values})
      *m = random.matrix<double>(m->cols() ? past : 0, m->cols());
    layer.conv = random.matrix<double>(layer.conv.rows(), layer.conv.cols());
    layer.h = random.matrix<double>(layer.h.rows(), layer.h.cols());
  }
  return state;
}

using Named = std::map<std::string, Matrix<double>>;

Named by_name(const mamba::Config& config, const ssm::Model<double>& gradients) {
  Named all;
  mamba::for_each_weight(
      config, gradients,
      [&](const std::string& name, const auto&, const auto& g) { all[name] = g; });
  return all;
}

}  // namespace

TEST_CASE("cross_entropy: the mean and its gradient, a target below 0 left out") {
  Random random(5);
  Matrix<double> logits = random.matrix<double>(4, 9, 3);
  const std::vector<Token> targets = {8, -1, 0, 3};
  const auto loss = [&] { return ssm::cross_entropy(logits, targets.data(), 1.0 / 3).loss; };
  double want = 0;
  for (const Index t : {0, 2, 3})
    want -= std::log(std::exp(logits(t, targets[t])) / logits.row(t).array().exp().sum()) / 3;
  CHECK(loss() == Approx(want).epsilon(1e-14));
  const auto got = ssm::cross_entropy(logits, targets.data(), 1.0 / 3).dlogits;
  check_gradient("logits", got, differences(logits, loss), kDifferences);
  logits.array() += 1000;  // e^1000 is no number
  check_gradient("far", ssm::cross_entropy(logits, targets.data(), 1.0 / 3).dlogits, got, 1e-9);
}

TEST_CASE("models: gradients of every weight and of the state are the finite differences") {
  for (const int version : {1, 2, 3})
    for (const bool options : {false, true}) {
      CAPTURE(version, options);
      SmallModel m(version, options);
      auto start = random_state(m.config, 7, 3);
      const auto dend = random_state(m.config, 8, 3 + m.length());
      ssm::Options<double> how;
      how.form = options ? Form::chunked : Form::sequential;
      how.delta_ratio = options ? 0.9 : 1;
      auto& model = m.model;
      const Token* ids = m.ids.data();
      const auto loss = [&] {
        auto state = start;
        const Matrix<double> logits = ssm::forward(model, ids, m.length(), state, how);
        double sum = ssm::cross_entropy(logits, ids + 1, 1.0 / m.length()).loss;
        for (std::size_t l = 0; l < 2; ++l) {
          const auto &layer = state.layers[l], &d = dend.layers[l];
          sum += dot(layer.conv, d.conv) + dot(layer.h, d.h) + dot(layer.past.keys, d.past.keys) +
                 dot(layer.past.values, d.past.values);
        }
        return sum;
      };
      auto gradients = ssm::zeros_like(model);
      auto state = start, dstate = dend;
      const double without_state = ssm::loss_and_gradients(
          model, ids, ids + 1, m.length(), state, 1.0 / m.length(), gradients, how, &dstate);
      CHECK(without_state > 0);
      const Named got = by_name(m.config, gradients);
      mamba::for_each_weight(m.config, model, [&](const std::string& name, const auto&, auto& w) {
        Matrix<double> want = differences(w, loss);
        if (name.find("A_log") != std::string::npos) want = want.cwiseProduct(w);
        check_gradient(name.c_str(), got.at(name), want, kDifferences);
      });
      for (std::size_t l = 0; l < 2; ++l) {
        auto& layer = start.layers[l];
        CAPTURE(l);
        check_gradient("conv", dstate.layers[l].conv, differences(layer.conv, loss), kDifferences);
        check_gradient("h", dstate.layers[l].h, differences(layer.h, loss), kDifferences);
        const auto& dpast = dstate.layers[l].past;
        check_gradient("keys", dpast.keys, differences(layer.past.keys, loss), kDifferences);
        check_gradient("values", dpast.values, differences(layer.past.values, loss), kDifferences);
      }
    }
}

TEST_CASE("models: pieces of a text, last to first, add up to the gradients of the whole") {
  for (const int version : {1, 2, 3}) {
    SmallModel m(version, true);
    const Index L = m.length();
    const Token* ids = m.ids.data();
    const auto gradients_of = [&](const std::vector<Index>& cuts) {
      std::vector<ssm::State<double>> starts = {random_state(m.config, 7, 3)};
      for (std::size_t i = 0; i + 1 < cuts.size(); ++i) {
        starts.push_back(starts.back());
        ssm::forward(m.model, ids + cuts[i], cuts[i + 1] - cuts[i], starts.back());
      }
      auto gradients = ssm::zeros_like(m.model);
      auto dstate = ssm::zeros_like(starts.back());
      for (std::size_t i = cuts.size() - 1; i-- > 0;)
        ssm::loss_and_gradients(m.model, ids + cuts[i], ids + cuts[i] + 1, cuts[i + 1] - cuts[i],
                                starts[i], 1.0 / L, gradients, {}, &dstate);
      return by_name(m.config, gradients);
    };
    const Named whole = gradients_of({0, L});
    for (Index cut = 0; cut <= L; ++cut)
      for (const auto& [name, got] : gradients_of({0, cut, cut, L})) {
        CAPTURE(version, cut);
        check_gradient(name.c_str(), got, whole.at(name), kForm);
      }
  }
}

TEST_CASE("models: gradients in double agree with golden training to 1e-9 of the largest") {
  const auto data = extra_data();
  for (int version = 1; data && version <= 2; ++version) {
    const std::string name = "mamba" + std::to_string(version);
    const auto truth = mamba::read_safetensors(*data + "/golden/training_" + name + ".safetensors");
    const std::string folder = *data + "/golden/" + name + "-hf";
    const mamba::Config config = mamba::read_config(folder);
    const auto model =
        mamba::load_model<ssm::Model<double>>(mamba::read_checkpoint(folder), config);
    const Index sequences = truth.at("ids").shape[1], L = truth.at("ids").shape[2] - 1;
    for (const Form form : {Form::sequential, Form::chunked}) {
      auto gradients = ssm::zeros_like(model);
      double loss = 0;
      for (Index b = 0; b < sequences; ++b) {
        const auto ids = tokens(truth.at("ids"), b * (L + 1), L + 1);
        ssm::State<double> state(config);
        ssm::Options<double> options;
        options.form = form;
        loss += ssm::loss_and_gradients(model, ids.data(), ids.data() + 1, L, state,
                                        1.0 / (sequences * L), gradients, options);
      }
      CAPTURE(name, int(form));
      CHECK(loss == Approx(mamba::values<double>(truth.at("loss"))[0]).epsilon(1e-12));
      for (const auto& [weight, got] : by_name(config, gradients)) {
        const auto want = mamba::values<double>(truth.at("grad." + weight));
        const Eigen::Map<const Matrix<double>> as_got(want.data(), got.rows(), got.cols());
        REQUIRE(static_cast<Index>(want.size()) == got.size());
        check_gradient(weight.c_str(), got, as_got, kGolden);
      }
    }
  }
}
