// Claims: every form of selective_scan and of ssd gives the same outputs and the same final state,
// wherever the sequence is cut, and they agree with outsiders' numbers.
#include "support.hpp"

using namespace test;
using ssm::Form;
using ssm::kForms;

namespace {

const char* name(Form form) {
  return form == Form::sequential ? "sequential" : form == Form::parallel ? "parallel" : "chunked";
}

// Multiples of eps that the forms of the reference may differ by: they add the same
// terms in other orders, and a decay exp(sum of delta A) is as inexact as that sum is long.
// Measured worst: 79 in double, 179 in float. One constant for all shapes.
constexpr double kFormsBound = 256;

// --- selective_scan ---

struct ScanCase {
  Index L, d, N, groups;
  bool D, z, bias, softplus;
};

template <class Scalar>
struct ScanData {
  Matrix<Scalar> x, delta, B, C, D, z, bias;
  StateMatrix<Scalar> A, h0;
  ssm::ScanInputs<Scalar> in;
  ScanData() = default;
  ScanData(const ScanData&) = delete;
  ScanData& operator=(const ScanData&) = delete;

  void bind(bool softplus) {
    in.x = x, in.delta = delta, in.A = A, in.B = B, in.C = C;
    if (D.size()) in.D = D;
    if (z.size()) in.z = z;
    if (bias.size()) in.delta_bias = bias;
    in.delta_softplus = softplus;
  }
};

template <class Scalar>
void fill(ScanData<Scalar>& s, const ScanCase& c, std::uint64_t seed) {
  Random random(seed);
  s.x = random.matrix<Scalar>(c.L, c.d);
  s.delta = random.matrix<Scalar>(c.L, c.d);
  if (!c.softplus) s.delta = s.delta.cwiseAbs();
  s.A = -random.matrix<Scalar>(c.d, c.N).cwiseAbs() * 2;
  s.B = random.matrix<Scalar>(c.L, c.groups * c.N);
  s.C = random.matrix<Scalar>(c.L, c.groups * c.N);
  if (c.D) s.D = random.matrix<Scalar>(1, c.d);
  if (c.z) s.z = random.matrix<Scalar>(c.L, c.d);
  if (c.bias) s.bias = random.matrix<Scalar>(1, c.d);
  s.h0 = random.matrix<Scalar>(c.d, c.N);
  s.bind(c.softplus);
}

// The same recurrence on absolute values: how large the terms are that an entry is the sum of.
template <class Scalar>
void magnitude(const ScanData<Scalar>& s, Matrix<Scalar>& out, StateMatrix<Scalar>& hT) {
  ScanData<Scalar> a;
  a.x = s.x.cwiseAbs(), a.delta = ssm::step_size(s.in), a.A = s.A, a.B = s.B.cwiseAbs();
  a.C = s.C.cwiseAbs(), a.D = s.D.cwiseAbs(), a.h0 = s.h0.cwiseAbs();
  a.bind(false);
  hT = a.h0;
  out = ssm::selective_scan<Scalar>(a.in, hT);
  if (s.z.size()) out.array() *= ssm::silu(s.z.array()).abs();
}

const std::vector<ScanCase> kScanCases = [] {
  std::vector<ScanCase> cases;
  for (const Index L : {0, 1, 2, 3, 31, 32, 33, 63, 129, 257})
    cases.push_back({L, 5, 16, 1, true, true, true, true});
  for (const Index N : {1, 3, 8, 64}) cases.push_back({33, 7, N, 1, true, true, true, true});
  for (int options = 0; options < 16; ++options)
    cases.push_back(
        {17, 6, 4, 3, bool(options & 1), bool(options & 2), bool(options & 4), bool(options & 8)});
  cases.push_back({40, 1, 1, 1, false, false, false, false});
  return cases;
}();

template <class Scalar>
Matrix<Scalar> scan_in_pieces(const ScanData<Scalar>& s, const std::vector<Index>& cuts, Form form,
                              StateMatrix<Scalar>& h) {
  h = s.h0;
  Matrix<Scalar> out(s.in.length(), h.rows());
  for (std::size_t i = 0; i + 1 < cuts.size(); ++i) {
    const Index first = cuts[i], count = cuts[i + 1] - first;
    out.middleRows(first, count) =
        ssm::selective_scan<Scalar>(s.in.tokens(first, count), h, form, 7);
  }
  return out;
}

}  // namespace

TEST_CASE("selective_scan: sequential, parallel and chunked forms agree, final state included") {
  for (const ScanCase& c : kScanCases) {
    ScanData<double> s;
    fill(s, c, 1);
    CAPTURE(c.L, c.d, c.N, c.groups, c.D, c.z, c.bias, c.softplus);
    StateMatrix<double> want_h = s.h0, size_h;
    Matrix<double> size;
    const Matrix<double> want = ssm::selective_scan<double>(s.in, want_h);
    magnitude(s, size, size_h);
    for (const Form form : kForms) {
      for (const Index chunk : {1, 7, 64}) {
        CAPTURE(name(form), chunk);
        StateMatrix<double> h = s.h0;
        const Matrix<double> got = ssm::selective_scan<double>(s.in, h, form, chunk);
        check_close("out", got, want, size, kFormsBound, 0x1p-53);
        check_close("hT", h, want_h, size_h, kFormsBound, 0x1p-53);
      }
    }
  }
}

TEST_CASE("selective_scan: float forms stay within the bound of the double reference") {
  for (const ScanCase& c : kScanCases) {
    ScanData<float> f;
    fill(f, c, 2);
    ScanData<double> s;
    s.x = f.x.cast<double>(), s.delta = f.delta.cast<double>(), s.A = f.A.cast<double>();
    s.B = f.B.cast<double>(), s.C = f.C.cast<double>(), s.D = f.D.cast<double>();
    s.z = f.z.cast<double>(), s.bias = f.bias.cast<double>(), s.h0 = f.h0.cast<double>();
    s.bind(c.softplus);
    StateMatrix<double> want_h = s.h0, size_h;
    Matrix<double> size;
    const Matrix<double> want = ssm::selective_scan<double>(s.in, want_h);
    magnitude(s, size, size_h);
    for (const Form form : kForms) {
      CAPTURE(c.L, c.d, c.N, name(form));
      StateMatrix<float> h = f.h0;
      const Matrix<float> got = ssm::selective_scan<float>(f.in, h, form);
      check_close("out", got, want, size, kFormsBound, 0x1p-24);
      check_close("hT", h, want_h, size_h, kFormsBound, 0x1p-24);
    }
  }
}

TEST_CASE("selective_scan: a sequence may be cut anywhere, empty pieces included") {
  ScanData<double> s;
  fill(s, {33, 6, 4, 2, true, true, true, true}, 3);
  StateMatrix<double> want_h = s.h0, h, size_h;
  Matrix<double> size;
  const Matrix<double> want = ssm::selective_scan<double>(s.in, want_h);
  magnitude(s, size, size_h);
  for (const Form form : kForms) {
    for (Index cut = 0; cut <= 33; ++cut) {
      CAPTURE(name(form), cut);
      check_close("out", scan_in_pieces(s, {0, cut, cut, 33}, form, h), want, size, kFormsBound,
                  0x1p-53);
      check_close("hT", h, want_h, size_h, kFormsBound, 0x1p-53);
    }
  }
}

TEST_CASE(
    "selective_scan: agrees with golden data in double to 1e-10, every form, cut "
    "everywhere") {
  std::size_t files = 0;
  for (const std::string& folder : golden_folders()) {
    for (const std::string& path : files_matching(folder, "scan_")) {
      ++files;
      const mamba::Checkpoint file = mamba::read_safetensors(path);
      const auto& shape = file.at("u").shape;  // (batch, d, L)
      const Index batch = shape[0], d = shape[1], L = shape[2], N = file.at("A").shape[1];
      const auto at = [&](const std::string& key,
                          Index b) -> Matrix<double> {  // of batch b
        if (!file.find(key)) return {};
        const Matrix<double> all = matrix<double>(file.at(key));
        return all.middleRows(b * all.rows() / batch, all.rows() / batch);
      };
      for (Index b = 0; b < batch; ++b) {
        ScanData<double> s;
        s.x = at("u", b).transpose(), s.delta = at("delta", b).transpose(),
        s.z = at("z", b).transpose();
        s.B = at("B", b).transpose(),
        s.C = at("C", b).transpose();  // (groups N, L) -> (L, groups N)
        s.A = matrix<double>(file.at("A"));
        if (file.find("D")) s.D = matrix<double>(file.at("D"));
        if (file.find("delta_bias")) s.bias = matrix<double>(file.at("delta_bias"));
        s.h0 = StateMatrix<double>::Zero(d, N);
        if (file.find("h0")) s.h0 = at("h0", b);
        s.bind(file.metadata.at("softplus") == "1");
        const Matrix<double> out = at("out", b).transpose(), hT = at("hT", b);
        const double scale = out.cwiseAbs().maxCoeff(), scale_h = hT.cwiseAbs().maxCoeff();
        for (const Form form : kForms) {
          const Index step = form == Form::sequential ? 1 : std::max<Index>(1, L / 5);
          for (Index cut = 0; cut <= L; cut += L > 300 ? L / 3 : step) {
            CAPTURE(path, b, name(form), cut);
            StateMatrix<double> h;
            CHECK(max_difference(scan_in_pieces(s, {0, cut, L}, form, h), out) <= 1e-10 * scale);
            CHECK(max_difference(h, hT) <= 1e-10 * scale_h);
          }
        }
      }
    }
  }
  REQUIRE(files > 0);
}

TEST_CASE("selective_scan: groups repeat B and C interleaved, neighbouring channels together") {
  ScanData<double> s;
  fill(s, {9, 6, 2, 3, false, false, false, true}, 4);
  for (const Form form : kForms) {
    StateMatrix<double> h = s.h0;
    const Matrix<double> out = ssm::selective_scan<double>(s.in, h, form, 4);
    for (Index c = 0; c < 6; ++c) {  // each channel alone, with the B and C of its group
      const Index g = c / 2;
      const Matrix<double> x = s.x.col(c), delta = s.delta.col(c), B = s.B.middleCols(2 * g, 2),
                           C = s.C.middleCols(2 * g, 2);
      const StateMatrix<double> A = s.A.row(c);
      StateMatrix<double> h_c = s.h0.row(c);
      ssm::ScanInputs<double> in;
      in.x = x, in.delta = delta, in.A = A, in.B = B, in.C = C;
      CAPTURE(name(form), c);
      CHECK(max_difference(ssm::selective_scan<double>(in, h_c), out.col(c)) <= 1e-13);
    }
  }
}

TEST_CASE("associative_scan: the pair operator keeps order for every length") {
  for (Index L = 0; L <= 70; ++L) {
    Random random(static_cast<std::uint64_t>(L));
    Matrix<double> a = random.matrix<double>(L, 3), b = random.matrix<double>(L, 3);
    Matrix<double> want = b;
    for (Index t = 1; t < L; ++t) want.row(t) += a.row(t).cwiseProduct(want.row(t - 1));
    Matrix<double> size = b.cwiseAbs();
    for (Index t = 1; t < L; ++t) size.row(t) += a.row(t).cwiseAbs().cwiseProduct(size.row(t - 1));
    ssm::associative_scan(a, b);
    CAPTURE(L);
    check_close("h", b, want, size, kFormsBound, 0x1p-53);
  }
}

TEST_CASE("selective_scan: extreme steps neither overflow nor divide by an underflowed decay") {
  ScanData<float> s;
  fill(s, {50, 4, 3, 1, true, true, true, true}, 5);
  s.delta.topRows(20).array() += 1000;     // softplus(1000) = 1000: decay is exactly zero
  s.delta.bottomRows(20).array() -= 1000;  // softplus(-1000) = 0: nothing moves
  for (const Form form : kForms) {
    CAPTURE(name(form));
    StateMatrix<float> h = s.h0;
    const Matrix<float> out = ssm::selective_scan<float>(s.in, h, form);
    CHECK(out.allFinite());
    CHECK(h.allFinite());
  }
}

TEST_CASE("discretization: Euler's B_bar is the first term of zero-order hold") {
  const double A = -1.5, B = 0.7;
  for (const double delta : {1e-1, 1e-2, 1e-3}) {
    // expm1(dA)/A B = dB (1 + dA/2 + ...)
    const double relative = ssm::B_bar_zoh(delta, A, B) / ssm::B_bar_euler(delta, B) - 1;
    CHECK(std::abs(relative - delta * A / 2) < delta * delta);
  }
  CHECK(ssm::B_bar_zoh(0.1, 0.0, B) == ssm::B_bar_euler(0.1, B));
  CHECK(ssm::A_bar(2.0, A) == Approx(ssm::A_bar(1.0, A) * ssm::A_bar(1.0, A)));
}

// --- ssd ---

namespace {

template <class Scalar>
struct SsdData {
  Matrix<Scalar> x, dt, B, C, D, bias;
  StateMatrix<Scalar> A, h0;
  ssm::SsdInputs<Scalar> in;
  SsdData() = default;
  SsdData(const SsdData&) = delete;
  SsdData& operator=(const SsdData&) = delete;

  void bind() {
    in.x = x, in.dt = dt, in.A = A, in.B = B, in.C = C;
    if (D.size()) in.D = D;
    if (bias.size()) in.dt_bias = bias;
  }
};

template <class Scalar>
void fill(SsdData<Scalar>& s, Index L, Index H, Index P, Index N, Index groups,
          std::uint64_t seed) {
  Random random(seed);
  s.x = random.matrix<Scalar>(L, H * P), s.dt = random.matrix<Scalar>(L, H);
  s.A = -random.matrix<Scalar>(H, 1).cwiseAbs();
  s.B = random.matrix<Scalar>(L, groups * N), s.C = random.matrix<Scalar>(L, groups * N);
  s.D = random.matrix<Scalar>(1, H), s.bias = random.matrix<Scalar>(1, H);
  s.h0 = random.matrix<Scalar>(H * P, N);
  s.bind();
}

void magnitude(const SsdData<double>& s, Matrix<double>& out, StateMatrix<double>& hT) {
  SsdData<double> a;
  a.x = s.x.cwiseAbs(), a.dt = ssm::step_size(s.in), a.A = s.A, a.B = s.B.cwiseAbs();
  a.C = s.C.cwiseAbs(), a.D = s.D.cwiseAbs(), a.h0 = s.h0.cwiseAbs();
  a.bind();
  a.in.dt_softplus = false;
  hT = a.h0;
  out = ssm::ssd<double>(a.in, hT, Form::sequential);
}

Matrix<double> ssd_in_pieces(const SsdData<double>& s, const std::vector<Index>& cuts, Form form,
                             StateMatrix<double>& h) {
  Matrix<double> out(s.in.length(), h.rows());
  for (std::size_t i = 0; i + 1 < cuts.size(); ++i)
    out.middleRows(cuts[i], cuts[i + 1] - cuts[i]) =
        ssm::ssd<double>(s.in.tokens(cuts[i], cuts[i + 1] - cuts[i]), h, form, 7);
  return out;
}

}  // namespace

TEST_CASE(
    "ssd: recurrence, chunked and quadratic dual forms agree, final state included, cut "
    "anywhere") {
  for (const Index L : {0, 1, 2, 3, 31, 32, 33, 63, 129}) {
    for (const Index groups : {1, 3}) {
      SsdData<double> s;
      fill(s, L, 6, 5, 4, groups, 6);
      StateMatrix<double> want_h = s.h0, size_h;
      Matrix<double> size;
      const Matrix<double> want = ssm::ssd<double>(s.in, want_h, Form::sequential);
      magnitude(s, size, size_h);
      for (const Form form : kForms) {
        for (Index cut = 0; cut <= L; cut += std::max<Index>(1, L / 7)) {
          CAPTURE(L, groups, name(form), cut);
          StateMatrix<double> h = s.h0;
          check_close("out", ssd_in_pieces(s, {0, cut, cut, L}, form, h), want, size, kFormsBound,
                      0x1p-53);
          check_close("hT", h, want_h, size_h, kFormsBound, 0x1p-53);
        }
      }
    }
  }
}

TEST_CASE("ssd: is the selective scan with one decay per head") {
  SsdData<double> s;
  const Index L = 21, H = 4, P = 3, N = 5;
  fill(s, L, H, P, N, 2, 7);
  ScanData<double> scan;  // delta, A and D repeated over the channels of a head
  const Matrix<double> repeat = [&] {
    Matrix<double> r = Matrix<double>::Zero(H, H * P);
    for (Index i = 0; i < H * P; ++i) r(i / P, i) = 1;
    return r;
  }();
  scan.x = s.x, scan.delta = ssm::step_size(s.in) * repeat, scan.B = s.B, scan.C = s.C,
  scan.D = s.D * repeat;
  scan.A = repeat.transpose() * s.A * Matrix<double>::Ones(1, N);
  scan.h0 = s.h0;
  scan.bind(false);
  StateMatrix<double> h_ssd = s.h0, h_scan = s.h0;
  const Matrix<double> y = ssm::ssd<double>(s.in, h_ssd),
                       out = ssm::selective_scan<double>(scan.in, h_scan);
  CHECK(max_difference(y, out) <= 1e-13);
  CHECK(max_difference(h_ssd, h_scan) <= 1e-13);
}

TEST_CASE("ssd: extreme steps neither overflow nor divide by an underflowed decay") {
  SsdData<float> s;
  fill(s, 50, 4, 3, 5, 2, 5);
  s.dt.topRows(20).array() += 1000;     // decay is exactly zero
  s.dt.bottomRows(20).array() -= 1000;  // nothing moves
  for (const Form form : kForms) {
    CAPTURE(name(form));
    StateMatrix<float> h = s.h0;
    CHECK(ssm::ssd<float>(s.in, h, form).allFinite());
    CHECK(h.allFinite());
  }
}

TEST_CASE("ssd: delta is clamped to its limits") {
  SsdData<double> s;
  fill(s, 11, 2, 3, 4, 1, 8);
  s.in.dt_min = 0.3, s.in.dt_max = 0.9;
  const Matrix<double> delta = ssm::step_size(s.in);
  CHECK(delta.minCoeff() == 0.3);
  CHECK(delta.maxCoeff() == 0.9);
}

TEST_CASE("ssd: agrees with golden data in double to 1e-10, every form, cut everywhere") {
  std::size_t files = 0;
  for (const std::string& folder : golden_folders()) {
    for (const std::string& path : files_matching(folder, "ssd_")) {
      ++files;
      const mamba::Checkpoint file = mamba::read_safetensors(path);
      const auto& shape = file.at("x").shape;  // (batch, L, H, P)
      const Index batch = shape[0], L = shape[1], H = shape[2], P = shape[3];
      const Index N = file.at("B").shape[3];
      const auto at = [&](const std::string& key, Index b, Index rows) -> Matrix<double> {
        const auto all = mamba::values<double>(file.at(key));
        const Index size = static_cast<Index>(all.size()) / batch;
        return Eigen::Map<const Matrix<double>>(all.data() + b * size, rows, size / rows);
      };
      for (Index b = 0; b < batch; ++b) {
        SsdData<double> s;
        s.x = at("x", b, L), s.dt = at("dt", b, L), s.B = at("B", b, L), s.C = at("C", b, L);
        s.A = matrix<double>(file.at("A")).transpose();
        if (file.find("D")) s.D = matrix<double>(file.at("D"));
        if (file.find("dt_bias")) s.bias = matrix<double>(file.at("dt_bias"));
        s.h0 = StateMatrix<double>::Zero(H * P, N);
        if (file.find("h0")) s.h0 = at("h0", b, H * P);
        s.bind();
        const Matrix<double> out = at("out", b, L), hT = at("hT", b, H * P);
        for (const Form form : kForms) {
          for (Index cut = 0; cut <= L; cut += std::max<Index>(1, L / 5)) {
            CAPTURE(path, b, name(form), cut);
            StateMatrix<double> h = s.h0;
            CHECK(max_difference(ssd_in_pieces(s, {0, cut, L}, form, h), out) <=
                  1e-10 * out.cwiseAbs().maxCoeff());
            CHECK(max_difference(h, hT) <= 1e-10 * hT.cwiseAbs().maxCoeff());
          }
        }
      }
    }
  }
  REQUIRE(files > 0);
}

// --- causal_conv1d ---

TEST_CASE(
    "causal_conv1d: equals its sum, cut anywhere, pieces shorter than the window "
    "included") {
  for (const Index d_conv : {1, 2, 4, 5}) {
    for (const Index L : {0, 1, 2, 3, 4, 9}) {
      Random random(9);
      const Index d = 3;
      const Matrix<double> x = random.matrix<double>(L, d), w = random.matrix<double>(d, d_conv);
      const Matrix<double> bias = random.matrix<double>(1, d),
                           state = random.matrix<double>(d_conv - 1, d);
      Matrix<double> all(d_conv - 1 + L, d);
      all << state, x;
      Matrix<double> want(L, d);
      for (Index t = 0; t < L; ++t)
        for (Index c = 0; c < d; ++c) {
          want(t, c) = bias(0, c);
          for (Index k = 0; k < d_conv; ++k) want(t, c) += w(c, k) * all(t + k, c);
        }
      for (Index cut = 0; cut <= L; ++cut) {
        CAPTURE(d_conv, L, cut);
        Matrix<double> s = state, got(L, d);
        got.topRows(cut) = ssm::causal_conv1d<double>(x.topRows(cut), w, bias, s);
        got.bottomRows(L - cut) = ssm::causal_conv1d<double>(x.bottomRows(L - cut), w, bias, s);
        CHECK(max_difference(got, want) <= 1e-14);
        CHECK(max_difference(s, all.bottomRows(d_conv - 1)) == 0);
      }
      Matrix<double> s = state, got(L, d);
      for (Index t = 0; t < L; ++t)
        got.row(t) = ssm::causal_conv1d_step<double>(x.row(t), w, bias, s);
      CHECK(max_difference(got, want) <= 1e-14);
      CHECK(max_difference(s, all.bottomRows(d_conv - 1)) == 0);
    }
  }
}

// --- what does not fit is refused ---

namespace {

using View = ssm::View<double>;
using Block = decltype(std::declval<const Matrix<double>&>().middleCols(0, 1));
using Column = decltype(std::declval<const Matrix<double>&>().col(0));
using Transposed = decltype(std::declval<const Matrix<double>&>().transpose());
using Sum = decltype(std::declval<Matrix<double>&>() + std::declval<Matrix<double>&>());

// A View looks at numbers that stay where they are, ...
static_assert(std::is_constructible_v<View, Matrix<double>&>);
static_assert(std::is_constructible_v<View, const Matrix<double>&>);
static_assert(std::is_constructible_v<View, const Row<double>&>);
static_assert(std::is_constructible_v<View, Block>);
static_assert(std::is_constructible_v<View, Eigen::Map<const Matrix<double>>>);
static_assert(std::is_constructible_v<ssm::StateView<double>, StateMatrix<double>&>);
// ... not at a matrix that is about to vanish, ...
static_assert(!std::is_constructible_v<View, Matrix<double>>);
static_assert(!std::is_constructible_v<View, const Matrix<double>>);
static_assert(!std::is_constructible_v<View, Row<double>>);
static_assert(!std::is_assignable_v<View&, Matrix<double>>);
static_assert(!std::is_assignable_v<ssm::StateView<double>&, StateMatrix<double>>);
// ... and not at numbers that lie nowhere, in another order, or with gaps.
static_assert(!std::is_constructible_v<View, Sum>);
static_assert(!std::is_constructible_v<View, StateMatrix<double>&>);
static_assert(!std::is_constructible_v<View, Transposed>);
static_assert(!std::is_constructible_v<View, Column>);
static_assert(!std::is_constructible_v<View, Matrix<float>&>);

template <class Function>
void refuses(const std::string& message, const Function& f) {
  CHECK_THROWS_AS(f(), std::invalid_argument);
  CHECK_THROWS_WITH(f(), message);
}

}  // namespace

TEST_CASE("selective_scan: inputs that do not fit are refused with one line") {
  ScanData<double> s;
  fill(s, {5, 6, 4, 3, true, true, true, true}, 11);
  const auto with = [&](View ssm::ScanInputs<double>::*member, const Matrix<double>& wrong,
                        const std::string& message) {
    CAPTURE(message);
    ssm::ScanInputs<double> in = s.in;
    in.*member = wrong;
    StateMatrix<double> h = s.h0;
    for (const Form form : kForms)
      refuses("selective_scan: " + message, [&] { ssm::selective_scan<double>(in, h, form); });
    CHECK(h == s.h0);
  };
  using In = ssm::ScanInputs<double>;
  const Matrix<double> wrong = Matrix<double>::Zero(5, 7);
  with(&In::delta, wrong, "delta: expected (5, 6), found (5, 7)");
  with(&In::z, wrong, "z: expected (5, 6), found (5, 7)");
  with(&In::D, wrong, "D: expected (1, 6), found (5, 7)");
  with(&In::delta_bias, wrong, "delta_bias: expected (1, 6), found (5, 7)");
  with(&In::B, wrong, "B: expected (5, G * 4) with G a divisor of 6, found (5, 7)");
  with(&In::B, Matrix<double>::Zero(5, 16),
       "B: expected (5, G * 4) with G a divisor of 6, found (5, 16)");
  with(&In::B, Matrix<double>::Zero(4, 4),
       "B: expected (5, G * 4) with G a divisor of 6, found (4, 4)");
  with(&In::B, {}, "B: expected (5, G * 4) with G a divisor of 6, found (0, 0)");
  with(&In::C, Matrix<double>::Zero(5, 4), "C: expected (5, 12), found (5, 4)");

  StateMatrix<double> h = StateMatrix<double>::Zero(6, 5), A = StateMatrix<double>::Zero(5, 4);
  refuses("selective_scan: h: expected (6, 4), found (6, 5)",
          [&] { ssm::selective_scan<double>(s.in, h); });
  refuses("selective_scan_step: x: expected (1, 6), found (5, 6)",
          [&] { ssm::selective_scan_step<double>(s.in, s.h0); });
  s.in.A = A;
  refuses("selective_scan: A: expected (6, 4), found (5, 4)",
          [&] { ssm::selective_scan<double>(s.in, s.h0); });
}

TEST_CASE("ssd: inputs that do not fit are refused with one line") {
  SsdData<double> s;
  fill(s, 5, 6, 2, 4, 3, 12);
  const auto with = [&](View ssm::SsdInputs<double>::*member, const Matrix<double>& wrong,
                        const std::string& message) {
    CAPTURE(message);
    ssm::SsdInputs<double> in = s.in;
    in.*member = wrong;
    StateMatrix<double> h = s.h0;
    for (const Form form : kForms)
      refuses("ssd: " + message, [&] { ssm::ssd<double>(in, h, form); });
    CHECK(h == s.h0);
  };
  using In = ssm::SsdInputs<double>;
  const Matrix<double> wrong = Matrix<double>::Zero(5, 7);
  with(&In::x, wrong, "x: expected a multiple of 6 columns, found (5, 7)");
  with(&In::dt, wrong, "dt: expected (5, 6), found (5, 7)");
  with(&In::D, wrong, "D: expected (1, 6), found (5, 7)");
  with(&In::dt_bias, wrong, "dt_bias: expected (1, 6), found (5, 7)");
  with(&In::B, Matrix<double>::Zero(5, 16),
       "B: expected (5, G * 4) with G a divisor of 6, found (5, 16)");
  with(&In::C, Matrix<double>::Zero(5, 4), "C: expected (5, 12), found (5, 4)");

  StateMatrix<double> h = StateMatrix<double>::Zero(11, 4), A = StateMatrix<double>::Zero(6, 2);
  refuses("ssd: h: expected (12, 4), found (11, 4)", [&] { ssm::ssd<double>(s.in, h); });
  refuses("ssd_step: x: expected (1, 12), found (5, 12)",
          [&] { ssm::ssd_step<double>(s.in, s.h0); });
  s.in.A = A;
  refuses("ssd: A: expected (6, 1), found (6, 2)", [&] { ssm::ssd<double>(s.in, s.h0); });
}

TEST_CASE("causal_conv1d, norms, linear: inputs that do not fit are refused with one line") {
  const Matrix<double> x = Matrix<double>::Ones(2, 6), w = Matrix<double>::Ones(6, 4),
                       bias = Matrix<double>::Ones(1, 6), other = Matrix<double>::Ones(3, 5);
  Matrix<double> state = Matrix<double>::Zero(3, 6), short_state = Matrix<double>::Zero(2, 6);
  const Row<double> weight = Row<double>::Ones(6), short_weight = Row<double>::Ones(5);
  const auto conv = [&](const Matrix<double>& weights, const Matrix<double>& b, Matrix<double>& s) {
    ssm::causal_conv1d<double>(x, weights, b, s);
  };
  refuses("causal_conv1d: weight: expected (6, 5), found (3, 5)",
          [&] { conv(other, bias, state); });
  refuses("causal_conv1d: bias: expected (1, 6), found (3, 5)", [&] { conv(w, other, state); });
  refuses("causal_conv1d: state: expected (3, 6), found (2, 6)",
          [&] { conv(w, bias, short_state); });
  refuses("causal_conv1d_step: state: expected (3, 6), found (2, 6)",
          [&] { ssm::causal_conv1d_step<double>(x.row(0), w, bias, short_state); });
  refuses("causal_conv1d_step: x_t: expected (1, 6), found (2, 6)",
          [&] { ssm::causal_conv1d_step<double>(x, w, bias, state); });
  refuses("rms_norm: weight: expected (1, 6), found (1, 5)",
          [&] { ssm::rms_norm<double>(x, short_weight, 1e-5); });
  const auto gated = [&](const Matrix<double>& z, const Row<double>& ws, Index groups) {
    ssm::gated_rms_norm<double>(x, z, ws, 1e-5, groups);
  };
  refuses("gated_rms_norm: z: expected (2, 6), found (3, 5)", [&] { gated(other, weight, 2); });
  refuses("gated_rms_norm: weight: expected (1, 6), found (1, 5)",
          [&] { gated(x, short_weight, 2); });
  refuses("gated_rms_norm: y: expected a multiple of 4 columns, found (2, 6)",
          [&] { gated(x, weight, 4); });
  refuses("linear: x: expected (2, 5), found (2, 6)", [&] { ssm::linear<double>(x, other); });
}

// --- implied_attention ---

TEST_CASE("implied_attention: the matrix of each channel reproduces selective_scan") {
  for (const ScanCase& c : kScanCases) {
    ScanData<double> s;
    fill(s, c, 8);
    s.in.z = {};  // the matrix stands before the gate
    s.h0.setZero();
    CAPTURE(c.L, c.d, c.N, c.groups, c.D, c.bias, c.softplus);
    StateMatrix<double> h = s.h0, size_h;
    const Matrix<double> want = ssm::selective_scan<double>(s.in, h);
    Matrix<double> size, got(c.L, c.d);
    s.z.resize(0, 0);
    magnitude(s, size, size_h);
    const Matrix<double> delta = ssm::step_size(s.in);
    for (Index i = 0; i < c.d; ++i) {
      const Matrix<double> M = ssm::implied_attention(s.in, delta, i);
      REQUIRE((M.rows() == c.L && M.cols() == c.L));
      for (Index t = 0; t < c.L; ++t)
        REQUIRE((M.row(t).tail(c.L - 1 - t).array() == 0).all());  // no look ahead
      got.col(i) = M * s.x.col(i);
    }
    check_close("M x", got, want, size, kFormsBound, 0x1p-53);
  }
}

TEST_CASE("implied_attention: the matrix of each head reproduces ssd") {
  for (const Index L : {0, 1, 2, 33, 65}) {
    for (const Index groups : {1, 3}) {
      const Index H = 6, P = 5, N = 4;
      SsdData<double> s;
      fill(s, L, H, P, N, groups, 9);
      s.h0.setZero();
      StateMatrix<double> h = s.h0, size_h;
      const Matrix<double> want = ssm::ssd<double>(s.in, h, Form::sequential);
      Matrix<double> size, got(L, H * P);
      magnitude(s, size, size_h);
      const Matrix<double> delta = ssm::step_size(s.in);
      for (Index i = 0; i < H; ++i)
        got.middleCols(i * P, P) =
            ssm::implied_attention(s.in, delta, i, N) * s.x.middleCols(i * P, P);
      CAPTURE(L, groups);
      check_close("M x", got, want, size, kFormsBound, 0x1p-53);
    }
  }
}

// --- pointwise functions ---

TEST_CASE("softplus and silu: exact far out, no overflow") {
  Row<float> x(6);
  x << -1000, -20, 0, 20, 1000, 88;
  const Row<float> s = ssm::softplus(x.array());
  CHECK(s(0) <= 4e-38f);  // Eigen's exp stops at e^-87 or at 0, as the instruction set has it
  CHECK(s(1) == Approx(std::log1p(std::exp(-20.0))));
  CHECK(s(2) == Approx(std::log(2.0)));
  CHECK(s(4) == 1000);
  const Row<float> g = ssm::silu(x.array());
  CHECK(std::abs(g(0)) < 1e-30f);
  CHECK(g(4) == 1000);
  CHECK(g.allFinite());
}

TEST_CASE("gated_rms_norm: normalizes each group by itself, gate first") {
  Random random(10);
  const Matrix<double> y = random.matrix<double>(4, 6), z = random.matrix<double>(4, 6);
  const Row<double> w = random.matrix<double>(1, 6);
  const Matrix<double> got = ssm::gated_rms_norm<double>(y, z, w, 1e-5, 2);
  for (Index t = 0; t < 4; ++t)
    for (Index g = 0; g < 2; ++g) {
      double sum = 0;
      const auto gated = [&](Index c) { return y(t, c) * z(t, c) / (1 + std::exp(-z(t, c))); };
      for (Index c = 3 * g; c < 3 * g + 3; ++c) sum += gated(c) * gated(c);
      for (Index c = 3 * g; c < 3 * g + 3; ++c)
        CHECK(got(t, c) == Approx(gated(c) / std::sqrt(sum / 3 + 1e-5) * w(c)));
    }
}
