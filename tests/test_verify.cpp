// Claims: the kernel checker accepts what is right, whoever made it, at every length; finds and
// places an error of three bounds in any one entry of any tensor; and names what is wrong.
#include "support.hpp"

#include "verify.hpp"

using namespace mamba;
using namespace mamba::verify;

namespace {

const Operation& operation(const std::string& name) {
  return *std::find_if(kOperations.begin(), kOperations.end(),
                       [&](const Operation& op) { return op.name == name; });
}

Case case_of(const std::string& op, std::map<char, Index> extent, DType dtype = DType::F32,
             Style style = Style::usual, unsigned options = ~0u) {
  return Case(op, make_case({&operation(op), op, std::move(extent), options, style}, dtype, 7));
}

/// A small case of every operation.
std::vector<Case> small_cases(DType dtype = DType::F32) {
  return {case_of("selective_scan", {{'b', 2}, {'t', 37}, {'d', 6}, {'g', 2}, {'n', 5}}, dtype),
          case_of("ssd", {{'b', 2}, {'t', 37}, {'h', 4}, {'p', 3}, {'g', 2}, {'n', 5}}, dtype),
          case_of("causal_conv1d", {{'b', 2}, {'t', 37}, {'d', 5}, {'w', 4}}, dtype),
          case_of("rms_norm", {{'b', 2}, {'t', 9}, {'d', 33}}, dtype),
          case_of("gated_rms_norm", {{'b', 2}, {'t', 9}, {'d', 32}, {'g', 2}}, dtype)};
}

double& entry(Case& c, const std::string& name, Index i) {
  return static_cast<double*>(const_cast<void*>(c.file.tensors.at(name).data))[i];
}

/// What of an output would be stored in a dtype.
void round_outputs(Case& c, DType dtype) {
  for (const Part& part : c.outputs())
    c.file.tensors[part.name] = to_dtype(c.file.at(part.name), part.dtype(dtype));
}

/// The recurrence of one channel in float, as a simple kernel has it: out and the last state.
struct Simple {
  std::vector<float> out;
  std::vector<float> h;
};
Simple simple_scan(const Case& c, bool guarded = true) {
  const auto get = [&](const char* name) { return values<float>(c.file.at(name)); };
  const auto u = get("u"), delta = get("delta"), A = get("A"), B = get("B"), C = get("C"),
             D = get("D"), z = get("z"), bias = get("delta_bias"), h0 = get("h0");
  const Index batch = c.extent.at('b'), d = c.extent.at('d'), L = c.extent.at('t'),
              N = c.extent.at('n');
  Simple s{std::vector<float>(batch * d * L), h0};
  for (Index b = 0; b < batch; ++b)
    for (Index i = 0; i < d; ++i)
      for (Index t = 0; t < L; ++t) {
        const Index at = (b * d + i) * L + t;
        const float raw = delta[at] + bias[i];
        const float step = guarded && raw > 20 ? raw : std::log1p(std::exp(raw));
        float y = 0;
        for (Index n = 0; n < N; ++n) {
          float& h = s.h[(b * d + i) * N + n];
          h = std::exp(step * A[i * N + n]) * h + step * B[(b * N + n) * L + t] * u[at];
          y += h * C[(b * N + n) * L + t];
        }
        s.out[at] = (y + D[i] * u[at]) * z[at] / (1 + std::exp(-z[at]));
      }
  return s;
}

}  // namespace

TEST_CASE("verify: golden files of outsiders are within the bound") {
  for (const std::string& folder : test::golden_folders())
    for (const char* start : {"scan_", "ssd_"})
      for (const std::string& path : test::files_matching(folder, start)) {
        const Case c(path, read_safetensors(path));
        for (const auto& [name, v] : Judge(c).run()) {
          INFO(path << ": " << name << ": " << v.got << ", " << v.expected << ", " << v.worst);
          CHECK(v.ok());
          CHECK(v.worst < 0.001);  // they are float64
        }
      }
}

TEST_CASE("verify: an error of three bounds in one entry is found and placed, for every tensor") {
  for (const DType dtype : {DType::F32, DType::BF16})
    for (Case& c : small_cases(dtype)) {
      add_expected(c);
      for (const auto& [name, verdict] : Judge(c).run()) {
        CHECK(verdict.ok());
        CHECK(verdict.worst < 1e-6);
        const Index size = static_cast<Index>(c.file.at(name).size());
        for (const Index i : {Index(0), size / 2, size - 1}) {
          CAPTURE(c.name, name, i);
          double& value = entry(c, name, i);
          const double right = value;
          // What a bound is: the distance of a value far off says how many bounds that was.
          value = right + 1e6;
          const double bound = 1e6 / Judge(c).run().at(name).worst;
          value = right + 3 * bound;
          const Verdict found = Judge(c).run().at(name);
          CHECK(std::abs(found.worst - 3) < 0.003);
          CHECK(found.at == i);
          value = right + 0.9 * bound;
          CHECK(Judge(c).run().at(name).ok());
          value = std::nan("");
          CHECK(std::isinf(Judge(c).run().at(name).worst));
          value = right;
        }
      }
    }
}

TEST_CASE("verify: in float32 0.3 % is found wherever an entry is at least m / 150") {
  const auto check = [](const Matrix<Bounded>& m) {
    for (Index i = 0; i < m.size(); ++i) {
      const Bounded& w = m.data()[i];
      if (std::abs(w.value) >= w.size / 150)
        CHECK(distance(w.value * 1.003, w, rule(DType::F32)) > 1);
    }
  };
  for (const Case& c : small_cases())
    for (Index b = 0; b < c.extent.at('b'); ++b) {
      Named in;
      for (const Part& part : c.op->parts)
        if (const Tensor* tensor = c.file.find(part.name))
          in[part.name] = read(*tensor, c.block(part, {b, 0, c.judged, 0, c.splits()}));
      Matrix<Bounded> h = in[c.op->start], dh = in["d" + c.op->end];
      for (const auto& [name, d] : backward(c, in, h, dh)) check(d);
      check(forward(c, in, h));
      check(h), check(dh);
    }
}

TEST_CASE("verify: a right float32 scan passes at every length, and as bfloat16") {
  for (const DType dtype : {DType::F32, DType::BF16})
    for (const Style style : {Style::usual, Style::positive, Style::weak_decay})
      for (const Index L : {1, 100, 4097, 262144}) {
        Case c = case_of("selective_scan", {{'b', 1}, {'t', L}, {'d', 1}, {'g', 1}, {'n', 2}},
                         dtype, style);
        const Simple s = simple_scan(c);
        c.file.tensors["out"] =
            to_dtype(tensor_view("out", c.shape(*c.op->find("out")), s.out.data()), c.dtype);
        c.file.tensors["hT"] = tensor_view("hT", c.shape(*c.op->find("hT")), s.h.data());
        for (const auto& [name, v] : Judge(c).run()) {
          INFO(name << " of length " << L << ": " << v.got << ", " << v.expected << ", "
                    << v.worst);
          CHECK(v.ok());
        }
      }
}

TEST_CASE("verify: outputs that are rounded to 16 bits are right") {
  for (const DType dtype : {DType::BF16, DType::F16})
    for (Case& c : small_cases(dtype)) {
      add_expected(c);
      round_outputs(c, dtype);
      for (const auto& [name, v] : Judge(c).run()) {
        CAPTURE(c.name, name, v.worst);
        CHECK(v.ok());
      }
    }
}

TEST_CASE("verify: memory in pieces changes nothing: a long case equals one computed whole") {
  Case c = case_of("selective_scan", {{'b', 2}, {'t', 3000}, {'d', 34}, {'g', 2}, {'n', 16}});
  add_expected(c);  // by a walk in one piece
  for (const auto& [name, v] : Judge(c).run()) {
    CAPTURE(name, v.worst);
    CHECK(v.worst < 1e-6);
  }
}

namespace {

/// What a kernel with the bug gives: the outputs of a case that the bug has changed.
std::optional<Case> with_bug(const Case& right, const Change& change) {
  Case changed = right;
  if (!change(changed)) return {};
  const Index padded = changed.extent.at('t');
  add_expected(changed);
  Case c = right;
  add_expected(c);
  for (const Part& part : changed.outputs()) {
    if (padded > c.judged) reorder(changed, part, 't', c.judged, [](Index t) { return t; });
    c.file.tensors[part.name] = changed.file.at(part.name);
  }
  return c;
}

/// The hints for a case's outputs.
Verdicts explained(const Case& c) {
  Verdicts verdicts = Judge(c).run();
  std::string last;
  explain(c, verdicts, last);
  return verdicts;
}

bool starts_with(const std::string& text, const std::string& start) {
  return text.rfind(start, 0) == 0;
}

}  // namespace

TEST_CASE("verify: a bug in the table is found and named by its own hint") {
  std::set<std::string> named;
  for (Case& right : small_cases()) {
    for (const Bug& bug : bugs(right, {7})) {
      const bool of_outputs = starts_with(bug.hint, "the gate") ||
                              starts_with(bug.hint, "groups") ||
                              starts_with(bug.hint, "B is discretized");  // see the next test
      if (of_outputs || bug.hint.find("last 7") != std::string::npos) continue;
      const auto c = with_bug(right, bug.change);
      if (!c) continue;
      const Verdicts verdicts = explained(*c);
      const bool backward = starts_with(bug.hint, "dhT") || starts_with(bug.hint, "dfinal") ||
                            starts_with(bug.hint, "the gradient");
      const std::string out = backward                            ? "d" + c->op->parts[0].name
                              : starts_with(bug.hint, "the tail") ? "hT"
                                                                  : "out";
      const Verdict& v = verdicts.at(out);
      CAPTURE(right.name, bug.hint, v.hint, v.worst);
      if (v.ok()) continue;  // some change nothing here: a state in float16
      if (v.hint == bug.hint) named.insert(bug.hint);
      // Some are the same for a short sequence: tails of 32 and of 64, chunks of 32 and of 35.
      const std::string what = bug.hint.substr(0, bug.hint.find_first_of("0123456789"));
      CHECK((v.hint == bug.hint || (what != bug.hint && starts_with(v.hint, what))));
    }
  }
  CHECK(named.size() >= 45);
}

TEST_CASE("verify: bugs that mix up channels or come after all else are named") {
  const auto scans = small_cases();
  for (const std::size_t i : {0, 1}) {  // channel or head s reads group s % G
    const Case& right = scans[i];
    const Index S = right.splits(), G = right.groups();
    const auto c = with_bug(right, [&](Case& changed) {
      reorder_all(changed, 'g', S, [=](Index s) { return s % G; });
      changed.extent['g'] = S;
      return true;
    });
    Case forward = *c;
    for (const Part& part : c->outputs())
      if (part.role == Role::gradient) forward.file.tensors.erase(part.name);
    CHECK(starts_with(explained(forward).at("out").hint, "groups of B and C are repeated"));
    CHECK(starts_with(explained(forward).at("hT").hint, "groups of B and C are repeated"));
  }
  const auto out_hint = [](Case c, const std::function<double(double y, double z)>& gate) {
    Case ungated = c;
    ungated.file.tensors.erase("z");
    add_expected(ungated), add_expected(c);
    const Numbers y = numbers(ungated, "out"), z = numbers(c, "z");
    Numbers out = numbers(c, "out");
    for (Index k = 0; k < out.size(); ++k) out[k] = gate(y[k], z[k]);
    return explained(c).at("out").hint;
  };
  CHECK(starts_with(out_hint(scans[0], [](double y, double z) { return y * z; }),
                    "the gate has no sigmoid"));
  CHECK(starts_with(out_hint(scans[0], [](double y, double z) { return y / (1 + std::exp(-z)); }),
                    "the gate is the sigmoid alone"));
  CHECK(starts_with(out_hint(scans[0], [](double y, double) { return 0.5 * y; }), "z is ignored") ==
        false);
  Case norm = scans[4], plain = scans[4];  // rms_norm(x) silu(z)
  for (double& z : numbers(plain, "z")) z = kOpen;
  add_expected(norm), add_expected(plain);
  const Numbers z = numbers(norm, "z"), y = numbers(plain, "out");
  Numbers out = numbers(norm, "out");
  for (Index k = 0; k < out.size(); ++k) out[k] = y[k] * silu_of(z[k]);
  CHECK(explained(norm).at("out").hint == "the gate comes after the norm");
  Case half = scans[0];
  add_expected(half);
  numbers(half, "hT") *= 0.5;
  CHECK(explained(half).at("hT").hint == "all of it is 0.5 times what is right");
}

TEST_CASE("verify: wrong entries without a bug that fits are described by their places") {
  const auto hint = [](const std::function<void(Case&)>& spoil) {
    Case c = case_of("selective_scan", {{'b', 2}, {'t', 37}, {'d', 40}, {'g', 1}, {'n', 3}});
    add_expected(c);
    spoil(c);
    return explained(c).at("out").hint;
  };
  const auto at = [](Index b, Index d, Index t) { return (b * 40 + d) * 37 + t; };
  CHECK(hint([&](Case& c) { entry(c, "out", at(1, 5, 8)) += 1; }) ==
        "wrong: only b 1, only d 5, only t 8");
  CHECK(hint([&](Case& c) {
          for (Index t = 0; t < 37; ++t)
            entry(c, "out", at(0, 9, t)) += 1, entry(c, "out", at(1, 9, t)) += 1;
        }) == "wrong: only d 9");
  CHECK(hint([&](Case& c) {
          for (Index d = 32; d < 40; ++d) entry(c, "out", at(0, d, 36)) += 1;
        }) == "wrong: only b 0, d from 32 on, only t 36");
  const auto at_channels = [&](const std::vector<Index>& channels) {
    return hint([&](Case& c) {
      for (const Index d : channels) entry(c, "out", at(0, d, 3)) += 1;
    });
  };
  CHECK(at_channels({3, 4, 5}) == "wrong: only b 0, d 3 to 5, only t 3");
  CHECK(at_channels({0, 5, 10, 15}) == "wrong: only b 0, every 5th d from 0, only t 3");
  CHECK(at_channels({2, 3, 10, 11, 18, 19, 26, 27, 34, 35}) ==
        "wrong: only b 0, d 2 to 3 of every 8, only t 3");
  CHECK(at_channels({1, 4}) == "wrong: only b 0, 2 of 40 d from 1, only t 3");
  CHECK(hint([](Case& c) { numbers(c, "out") *= 0; }) == "all zeros");
  CHECK(hint([](Case& c) { numbers(c, "out") *= std::nan(""); }) == "all NaN");
}

TEST_CASE("verify: a tensor of another shape is wrong, not a crash; a broken case is one line") {
  Case c = case_of("selective_scan", {{'b', 1}, {'t', 5}, {'d', 2}, {'g', 1}, {'n', 3}});
  const std::vector<float> few(4);
  c.file.tensors["out"] = tensor_view("out", {1, 2, 2}, few.data());
  const auto verdicts = Judge(c).run();
  CHECK(verdicts.at("out").hint == "expected real numbers of shape (1, 2, 5), found F32 (1, 2, 2)");
  CHECK_FALSE(verdicts.at("out").ok());
  const auto refused = [](const Checkpoint& file, const std::string& why) {
    try {
      Case("x", file);
    } catch (const std::runtime_error& error) {
      return std::string(error.what()).find(why) != std::string::npos;
    }
    return false;
  };
  Checkpoint file = c.file;
  file.tensors.erase("out");
  file.metadata["kind"] = "attention";
  CHECK(refused(file, "kind: expected one of selective_scan"));
  file.metadata["kind"] = "selective_scan";
  file.metadata["softplus"] = "yes";
  CHECK(refused(file, "softplus: expected a number, found 'yes'"));
  file.metadata["softplus"] = "1";
  file.tensors["delta"] = file.tensors["A"];
  CHECK(refused(file, "'delta': expected (1, 2, 5), found (2, 3)"));
  file.tensors.erase("delta");
  CHECK(refused(file, "missing tensor"));
  file = c.file;
  std::vector<float> bad(10, 1.f);
  bad[3] = NAN;
  file.tensors["u"] = tensor_view("u", {1, 2, 5}, bad.data());
  CHECK(refused(file, "'u': expected finite inputs, found 1 of 10 values"));
  const std::vector<std::int64_t> ids(10);
  file.tensors["u"] = tensor_view("u", {1, 2, 5}, ids.data());
  CHECK(refused(file, "'u': expected F64, F32, F16 or BF16, found I64"));
  file = c.file;
  file.tensors["B"] = file.tensors["C"] = empty_tensor("B", DType::F32, {1, 3, 3, 5});
  std::memset(const_cast<void*>(file.tensors["B"].data), 0, file.tensors["B"].byte_size());
  CHECK(refused(file, "'B': expected a divisor of 2 groups, found 3"));
  file = small_cases().back().file;
  file.metadata["group_size"] = "5";
  CHECK(refused(file, "group_size: expected a divisor of 32, found 5"));
}

TEST_CASE("verify: every case of the suite is well-formed and its expected outputs are right") {
  for (const Operation& op : kOperations) {
    std::uint64_t seed = 0;
    for (const Recipe& r : recipes(op, false)) {
      Case c(r.label, make_case(r, DType::F32, ++seed));
      if (c.extent.at('t') > 600) continue;
      add_expected(c);
      for (const auto& [name, v] : Judge(c).run()) {
        CAPTURE(op.name, r.label, name, v.worst, v.got, v.expected);
        CHECK(v.ok());
      }
    }
  }
}

TEST_CASE("verify: a softplus whose exp overflows is found by a case of either scan") {
  for (const char* op : {"selective_scan", "ssd"})
    for (const Recipe& r : recipes(operation(op), false)) {
      if (r.label.find("huge_delta") != 0) continue;
      Case c(r.label, make_case(r, DType::F32, 3));
      Case raw = c;
      raw.softplus = false;
      CHECK(used_step(raw).maxCoeff() > 89);
      if (c.op->split == 'h') continue;
      for (const bool guarded : {true, false}) {
        const Simple s = simple_scan(c, guarded);
        c.file.tensors["out"] = tensor_view("out", c.shape(*c.op->find("out")), s.out.data());
        const Verdict v = explained(c).at("out");
        CHECK(v.ok() == guarded);
        CHECK((guarded || v.hint == "softplus is log(1 + exp(v)), and exp overflows"));
      }
    }
}

TEST_CASE("verify: the verdict is the same to the last bit every time") {
  Case c = case_of("ssd", {{'b', 1}, {'t', 300}, {'h', 16}, {'p', 3}, {'g', 2}, {'n', 5}});
  add_expected(c);
  round_outputs(c, DType::F32);
  const Verdicts first = Judge(c).run();
  for (int again = 0; again < 5; ++again)
    for (const auto& [name, v] : Judge(c).run()) {
      CAPTURE(name);
      CHECK(v.worst == first.at(name).worst);
      CHECK(v.expected == first.at(name).expected);
      CHECK(v.squares == first.at(name).squares);
    }
}
