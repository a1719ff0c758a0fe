// verify.hpp - is this kernel right? Cases that break real ones, truth, bound, verdict.
//
//   1. A number that knows its bound    ssm_reference.hpp run on it gives truth and bound at once
//   2. Operations and cases             names, layouts and options; what a file holds
//   3. The reference by name            forward and backward of every operation
//   4. The verdict                      every entry of every output, piece by piece
//   5. The suite                        mamba vectors
//   6. Hints                            bugs of the field, tried on the case: do the numbers fit?
//   7. Doors                            raw files; kernels in a shared object (verify.h)
//   8. Command line                     mamba vectors, mamba verify
//
// Nothing here is a second copy of the maths, and nothing knows the kernels of this project.
#pragma once

#include <dlfcn.h>
#include <tbb/parallel_for.h>

#include "mamba.hpp"
#include "verify.h"

// ================================ 1. A number that knows its bound ===============================
//
// Beside its value each number carries, through every operation that made it,
//   size    the same arithmetic on absolute values: the natural size m of the terms added so far
//   error   what rounding may have done to the value, in units of the unit roundoff eps: each
//           operation hands on the errors of its operands and rounds once itself
// Run on the recurrence h = a h + b with a = exp(delta A) that is E_t = |a_t| E_{t-1} +
// eps (|a_t h_{t-1}| (1 + |delta_t A|) + |b_t| + |h_t|); run on a backward function, its reverse.

namespace mamba::verify {

struct Bounded {
  double value = 0, size = 0, error = 0;
  Bounded(double v = 0) : value(v), size(std::abs(v)) {}
  Bounded(double v, double size, double error) : value(v), size(size), error(error) {}
};

// What becomes smaller than the smallest normal float may be zero on a GPU: 2^-126 / eps.
constexpr double kFlush = 0x1p-102;

inline Bounded operator-(const Bounded& a) { return {-a.value, a.size, a.error}; }
inline Bounded operator+(const Bounded& a, const Bounded& b) {
  const double v = a.value + b.value;
  return {v, a.size + b.size, a.error + b.error + std::abs(v)};
}
inline Bounded operator-(const Bounded& a, const Bounded& b) { return a + -b; }
inline Bounded operator*(const Bounded& a, const Bounded& b) {
  const double v = a.value * b.value;
  return {v, a.size * b.size,
          std::abs(a.value) * b.error + std::abs(b.value) * a.error + std::abs(v) + kFlush};
}
inline Bounded operator/(const Bounded& a, const Bounded& b) {
  if (std::isinf(b.value)) return 0;  // a gate that is shut: z / (1 + e^-z)
  const double v = a.value / b.value, by = std::abs(b.value);
  return {v, a.size / by, (a.error + std::abs(v) * b.error) / by + std::abs(v) + kFlush};
}
inline Bounded& operator+=(Bounded& a, const Bounded& b) { return a = a + b; }
inline Bounded& operator-=(Bounded& a, const Bounded& b) { return a = a - b; }
inline Bounded& operator*=(Bounded& a, const Bounded& b) { return a = a * b; }
inline Bounded& operator/=(Bounded& a, const Bounded& b) { return a = a / b; }
inline bool operator==(const Bounded& a, const Bounded& b) { return a.value == b.value; }
inline bool operator!=(const Bounded& a, const Bounded& b) { return a.value != b.value; }
inline bool operator<(const Bounded& a, const Bounded& b) { return a.value < b.value; }
inline bool operator>(const Bounded& a, const Bounded& b) { return a.value > b.value; }
inline bool operator<=(const Bounded& a, const Bounded& b) { return a.value <= b.value; }
inline bool operator>=(const Bounded& a, const Bounded& b) { return a.value >= b.value; }
inline Bounded abs(const Bounded& a) { return {std::abs(a.value), a.size, a.error}; }
inline Bounded exp(const Bounded& a) {
  const double v = std::exp(a.value);
  return {v, v, v * (a.error + 1) + kFlush};
}
inline Bounded log1p(const Bounded& a) {
  const double v = std::log1p(a.value);
  return {v, std::abs(v), a.error / (1 + a.value) + std::abs(v)};
}
inline Bounded sqrt(const Bounded& a) {
  const double v = std::sqrt(a.value);
  return {v, v, v > 0 ? a.error / (2 * v) + v : a.error};
}

}  // namespace mamba::verify

template <>
struct std::numeric_limits<mamba::verify::Bounded> : std::numeric_limits<double> {
  static mamba::verify::Bounded infinity() { return std::numeric_limits<double>::infinity(); }
};
template <>
struct Eigen::NumTraits<mamba::verify::Bounded> : Eigen::GenericNumTraits<mamba::verify::Bounded> {
  using Real = mamba::verify::Bounded;
  using NonInteger = Real;
  using Literal = Real;
  enum { IsComplex = 0, IsInteger = 0, IsSigned = 1, RequireInitialization = 1 };
  enum { ReadCost = 3, AddCost = 5, MulCost = 9 };
};

namespace mamba::verify {

/// |got - want| <= max(k eps (size + smallest), kRunning eps' error): eps is the unit roundoff of
/// the type that the data passes through, eps' that of the arithmetic. These are all the constants.
///   F32, F64   k = 256: sums in any order, decays as exp of a sum, exp and log of a few ulp
///   16 bits    k = 4: stored once, and factors rounded once more before matrix units; the rest,
///              states too, is float
/// kRunning = 2, since exp, log and their arguments cost a kernel more than the one rounding here.
struct Rule {
  double k, eps, smallest, running_eps, largest;
  double bound(const Bounded& want) const {
    constexpr double kRunning = 2;
    return std::max(k * eps * (want.size + smallest), kRunning * running_eps * want.error);
  }
};

constexpr Rule rule(DType dtype) {
  constexpr double kLargest = 3.4028234663852886e38;
  if (dtype == DType::F64) return {256, 0x1p-53, 0, 0x1p-53, 1.7976931348623157e308};
  if (dtype == DType::F16) return {4, 0x1p-11, 0x1p-14, 0x1p-24, 65504};
  if (dtype == DType::BF16) return {4, 0x1p-8, 0x1p-126, 0x1p-24, kLargest};
  return {256, 0x1p-24, 0x1p-126, 0x1p-24, kLargest};
}

// ================================ 2. Operations and cases ========================================

enum class Role { input, cotangent, output, gradient };

/// A tensor of an operation. A letter is an extent: b batch, t time, d channel, g group, n state,
/// h head, p channel of a head, w tap, v tap before the last.
struct Part {
  std::string name;
  const char* file;          // the letters in the order of the official interface
  const char *rows, *cols;   // and as a matrix of ssm_reference.hpp
  bool optional = false;     // may be left out
  bool stays_float = false;  // parameters and states are float32 in 16-bit cases, too
  Role role = Role::input;
  bool has(char letter) const { return std::strchr(file, letter); }
  bool is_given() const { return role == Role::input || role == Role::cotangent; }
  DType dtype(DType of_case) const {
    return stays_float && of_case != DType::F64 ? DType::F32 : of_case;
  }
};

/// Inputs and, by the official names, what is made of them. The values of the letter `split` go
/// their own way, but for sums over the values of a group.
struct Operation {
  const char* name;
  char split;  // or 0
  std::vector<Part> parts;
  std::string start = {}, end = {};  // the state, if there is one

  Operation(const char* name, char split, const std::vector<Part>& inputs, Part out,
            const std::string& last = "")
      : name(name), split(split), parts(inputs), end(last) {
    const auto add = [&](Part part, const std::string& as, Role role) {
      part.name = as, part.role = role, parts.push_back(part);
    };
    add(out, "out", Role::output), add(out, "dout", Role::cotangent);
    for (const Part& part : inputs) add(part, "d" + part.name, Role::gradient);
    if (end.empty()) return;
    start = inputs.back().name;
    add(inputs.back(), end, Role::output), add(inputs.back(), "d" + end, Role::cotangent);
  }
  const std::string& step() const { return parts[1].name; }  // of a scan
  const Part* find(const std::string& name) const {
    for (const Part& part : parts)
      if (part.name == name) return &part;
    return nullptr;
  }
};

// clang-format off
inline const std::vector<Operation> kOperations = {
    {"selective_scan", 'd',
     {{"u", "bdt", "t", "d"}, {"delta", "bdt", "t", "d"}, {"A", "dn", "d", "n", false, true},
      {"B", "bgnt", "t", "gn"}, {"C", "bgnt", "t", "gn"}, {"D", "d", "", "d", true, true},
      {"z", "bdt", "t", "d", true}, {"delta_bias", "d", "", "d", true, true},
      {"h0", "bdn", "d", "n", true, true}},
     {"out", "bdt", "t", "d"}, "hT"},
    {"ssd", 'h',
     {{"x", "bthp", "t", "hp"}, {"dt", "bth", "t", "h"}, {"A", "h", "h", "", false, true},
      {"B", "btgn", "t", "gn"}, {"C", "btgn", "t", "gn"}, {"D", "h", "", "h", true, true},
      {"dt_bias", "h", "", "h", true, true}, {"h0", "bhpn", "hp", "n", true, true}},
     {"out", "bthp", "t", "hp"}, "hT"},
    {"causal_conv1d", 'd',
     {{"x", "bdt", "t", "d"}, {"weight", "dw", "d", "w"}, {"bias", "d", "", "d", true},
      {"initial_states", "bdv", "v", "d", true}},
     {"out", "bdt", "t", "d"}, "final_states"},
    {"rms_norm", 0,
     {{"x", "btd", "t", "d"}, {"weight", "d", "", "d"}}, {"out", "btd", "t", "d"}},
    {"gated_rms_norm", 0,
     {{"x", "btd", "t", "d"}, {"z", "btd", "t", "d"}, {"weight", "d", "", "d"}},
     {"out", "btd", "t", "d"}}};
// clang-format on
inline constexpr const char *kScans = "selective_scan ssd", *kNorms = "rms_norm gated_rms_norm",
                            *kStates = "selective_scan ssd causal_conv1d",
                            *kAll = "selective_scan ssd causal_conv1d rms_norm gated_rms_norm";

/// Whether a list of operations has this one.
inline bool is_of(const std::string& list, const Operation& op) {
  return (" " + list + " ").find(std::string(" ") + op.name + " ") != std::string::npos;
}

/// Part of a case: of sequence b, tokens from t on, values of the split letter from s on.
struct Slice {
  Index b = 0, t = 0, t_count = 0, s = 0, s_count = 0;
};

/// A block of a tensor in a file as the matrix of the reference that it stands for.
struct Block {
  Index at = 0, rows = 1, row_step = 0, cols = 1, col_step = 0;
  Index index(Index r, Index c) const { return at + r * row_step + c * col_step; }
};

/// Ways in which a kernel may go wrong between its inputs and its outputs, for hints.
struct Flaws {
  Index chunk = 0;
  bool loses_state = false, loses_gradient = false;  // at every boundary of chunks
  std::optional<DType> state_dtype = {};             // 16 bits
  bool has_linear_decay = false;                     // 1 + delta A, not exp(delta A); chunk = 1
};

struct Case {
  std::string name;
  Checkpoint file;
  const Operation* op = nullptr;
  bool softplus = false, silu = false;  // of delta; after the convolution
  double eps = 1e-5;                    // of the norms
  Index norm_groups = 1;
  DType dtype = DType::F32;
  std::map<char, Index> extent;
  Index judged = 0;  // tokens; padding may follow
  Flaws flaws;
  bool is_guess = false;  // changed by a bug that is tried: what overflows may be anything

  Case(std::string name, Checkpoint from) : name(std::move(name)), file(std::move(from)) {
    const std::string kind = file.metadata.count("kind") ? file.metadata.at("kind") : "";
    for (const Operation& each : kOperations)
      if (each.name == kind) op = &each;
    if (!op)
      fail("bad option: ", file.where, ": kind: expected one of ", kAll, " in the metadata, found ",
           quote(kind));
    softplus = number("softplus", kind == "ssd") != 0, silu = number("silu", 0) != 0;
    eps = number("eps", 1e-5);
    for (const Role role : {Role::input, Role::cotangent})
      for (const Part& part : op->parts) {
        if (part.role != role) continue;
        const bool needed = role == Role::input && !part.optional;
        if (const Tensor* tensor = needed ? &file.at(part.name) : file.find(part.name))
          bind(part, *tensor);
        if (extent.count('w')) extent['v'] = extent['w'] - 1;
      }
    dtype = file.at(op->parts[0].name).dtype, judged = extent.at('t');
    if (splits() % groups())
      fail("bad shape: ", file.where, ": 'B': expected a divisor of ", splits(), " groups, found ",
           groups());
    if (kind != "gated_rms_norm") return;
    const auto d = static_cast<double>(extent.at('d')), group = number("group_size", d);
    norm_groups = group >= 1 ? static_cast<Index>(d / group) : 0;
    if (norm_groups < 1 || static_cast<double>(norm_groups) * group != d)
      fail("bad option: ", file.where, ": group_size: expected a divisor of ", d, ", found ",
           group);
  }
  Index size(char letter) const { return extent.count(letter) ? extent.at(letter) : 1; }
  Index splits() const { return size(op->split); }
  Index groups() const { return size('g'); }
  Shape shape(const Part& part) const {
    Shape shape;
    for (const char* c = part.file; *c; ++c) shape.push_back(extent.at(*c));
    return shape;
  }
  Block block(const Part& part, const Slice& slice) const {
    std::map<char, Index> step;
    Index inner = 1;
    for (std::size_t i = std::strlen(part.file); i-- > 0; inner *= extent.at(part.file[i]))
      step[part.file[i]] = inner;
    Block block;
    block.at = part.has('b') ? slice.b * step['b'] : 0;
    const auto place = [&](const char* letters, Index& count, Index& by) {
      if (!*letters) return;
      by = step[letters[std::strlen(letters) - 1]];
      Index each = 1, first = 0;  // columns for each value of the first letter
      for (const char* c = letters + 1; *c; ++c) each *= extent.at(*c);
      count = extent.at(*letters);
      if (*letters == 't') first = slice.t, count = slice.t_count;
      if (*letters == op->split) first = slice.s, count = slice.s_count;
      if (*letters == 'g' && slice.s_count < splits())
        first = slice.s * groups() / splits(), count = 1;
      count *= each, block.at += first * each * by;
    };
    place(part.rows, block.rows, block.row_step);
    place(part.cols, block.cols, block.col_step);
    return block;
  }
  /// All that a kernel may give back: forward, and the gradient of every input there is.
  std::vector<Part> outputs() const {
    std::vector<Part> all;
    for (const Part& part : op->parts)
      if (part.role == Role::output ||
          (part.role == Role::gradient && file.find(part.name.substr(1))))
        all.push_back(part);
    return all;
  }

 private:
  /// An option in the metadata.
  double number(const std::string& key, double otherwise) const {
    const auto found = file.metadata.find(key);
    if (found == file.metadata.end()) return otherwise;
    char* end = nullptr;
    const double value = std::strtod(found->second.c_str(), &end);
    if (found->second.empty() || *end)
      fail("bad option: ", file.where, ": ", key, ": expected a number, found ",
           quote(found->second));
    return value;
  }
  /// The extents that a tensor gives; those already known must be the same, and its values numbers.
  void bind(const Part& part, const Tensor& tensor) {
    const std::string where = file.where + ": " + quote(part.name);
    if (tensor.dtype > DType::BF16)
      fail("wrong dtype: ", where, ": expected F64, F32, F16 or BF16, found ",
           dtype_name(tensor.dtype));
    const std::size_t n = std::strlen(part.file);
    std::string expected;
    bool fits = tensor.shape.size() == n;
    for (std::size_t i = 0; i < n; ++i) {
      const Index found = i < tensor.shape.size() ? tensor.shape[i] : -1;
      const auto [known, is_new] = extent.emplace(part.file[i], found);
      fits = fits && known->second == found && (found > 0 || part.file[i] == 'v');
      expected += i ? ", " : "";
      expected += is_new ? std::string(1, part.file[i]) : std::to_string(known->second);
    }
    if (!fits)
      fail("bad shape: ", where, ": expected (", expected, "), found ", shape_text(tensor.shape));
    if (const auto bad =
            count_values(tensor, [](auto v, std::size_t) { return !isfinite(double(v)); }))
      fail("not a number: ", where, ": expected finite inputs, found ", bad, " of ", tensor.size(),
           " values NaN or infinite");
  }
};

inline Matrix<Bounded> read(const Tensor& tensor, const Block& block) {
  Matrix<Bounded> m(block.rows, block.cols);
  with_type(tensor.dtype, [&](auto value) {
    const char* data = static_cast<const char*>(tensor.data);
    for (Index r = 0; r < m.rows(); ++r)
      for (Index c = 0; c < m.cols(); ++c) {
        std::memcpy(&value, data + block.index(r, c) * static_cast<Index>(sizeof value),
                    sizeof value);
        m(r, c) = static_cast<double>(value);
      }
  });
  return m;
}

/// A tensor that is all NaN, to be filled by somebody.
inline Tensor empty_tensor(const std::string& name, DType dtype, Shape shape) {
  Tensor tensor{name, dtype, std::move(shape), nullptr, nullptr};
  const auto bytes = std::make_shared<std::vector<unsigned char>>(tensor.byte_size(), 0xff);
  tensor.data = bytes->data(), tensor.keep_alive = bytes;
  return tensor;
}

/// The numbers of a tensor in double, of one of a case its own, to be changed; none: not there.
using Numbers = Eigen::Map<Eigen::ArrayXd>;
inline Numbers numbers(const Tensor& tensor) {
  return {static_cast<double*>(const_cast<void*>(tensor.data)), static_cast<Index>(tensor.size())};
}
inline Numbers numbers(Case& c, const std::string& name) {
  const auto found = c.file.tensors.find(name);
  if (found == c.file.tensors.end()) return {nullptr, 0};
  found->second = to_dtype(found->second, DType::F64);
  return numbers(found->second);
}

// ================================ 3. The reference by name =======================================

using Named = std::map<std::string, Matrix<Bounded>>;
using State = ssm::StateMatrix<Bounded>;

inline ssm::View<Bounded> view(const Named& in, const std::string& name) {
  const auto found = in.find(name);
  return found == in.end() ? ssm::View<Bounded>() : ssm::View<Bounded>(found->second);
}

/// Calls use with the inputs of a scan as the reference has them.
template <class Use>
void with_scan(const Case& c, const Named& in, const Use& use) {
  const State A = in.at("A");
  const std::string &x = c.op->parts[0].name, &step = c.op->step();
  const auto fill = [&](auto& to, auto& delta, auto& bias, bool& softplus) {
    to.x = view(in, x), delta = view(in, step), bias = view(in, step + "_bias"), to.A = A;
    to.B = view(in, "B"), to.C = view(in, "C"), to.D = view(in, "D"), softplus = c.softplus;
    use(to);
  };
  ssm::ScanInputs<Bounded> scan;
  ssm::SsdInputs<Bounded> ssd;
  scan.z = view(in, "z");
  if (c.op->split == 'h') return fill(ssd, ssd.dt, ssd.dt_bias, ssd.dt_softplus);
  fill(scan, scan.delta, scan.delta_bias, scan.delta_softplus);
}

// The forms are the sequential ones: rounding is bounded along the recurrence itself.

inline Matrix<Bounded> run(const ssm::ScanInputs<Bounded>& in, State& h) {
  return ssm::selective_scan_sequential<Bounded>(in, h);
}
inline Matrix<Bounded> run(const ssm::SsdInputs<Bounded>& in, State& h) {
  return ssm::ssd_sequential<Bounded>(in, h);
}
inline Named run_back(const ssm::ScanInputs<Bounded>& in, const State& h0,
                      const Matrix<Bounded>& dout, State& dh) {
  const auto g = ssm::selective_scan_backward<Bounded>(in, h0, dout, dh);
  return {{"u", g.x}, {"delta", g.delta}, {"A", g.A}, {"B", g.B},
          {"C", g.C}, {"D", g.D},         {"z", g.z}, {"delta_bias", g.delta_bias}};
}
inline Named run_back(const ssm::SsdInputs<Bounded>& in, const State& h0,
                      const Matrix<Bounded>& dout, State& dh) {
  const auto g = ssm::ssd_sequential_backward<Bounded>(in, h0, dout, dh);
  return {{"x", g.x}, {"dt", g.dt},          {"A", g.A}, {"B", g.B}, {"C", g.C},
          {"D", g.D}, {"dt_bias", g.dt_bias}};
}

inline Matrix<Bounded> convolve(const Named& in, Matrix<Bounded>& state) {
  return ssm::causal_conv1d<Bounded>(view(in, "x"), view(in, "weight"), view(in, "bias"), state);
}

/// The operation on the inputs, by name. `state` advances.
inline Matrix<Bounded> forward(const Case& c, const Named& in, Matrix<Bounded>& state) {
  if (is_of("rms_norm", *c.op))
    return ssm::rms_norm<Bounded>(in.at("x"), in.at("weight").row(0), c.eps);
  if (is_of("gated_rms_norm", *c.op))
    return ssm::gated_rms_norm<Bounded>(in.at("x"), view(in, "z"), in.at("weight").row(0), c.eps,
                                        c.norm_groups);
  Matrix<Bounded> y;
  if (is_of("causal_conv1d", *c.op)) {
    y = convolve(in, state);
    return c.silu ? Matrix<Bounded>(ssm::silu(y.array())) : y;
  }
  State h = state;
  with_scan(c, in, [&](const auto& scan) { y = run(scan, h); });
  state = h;
  return y;
}

/// The gradient of every input, by the input's name. `dstate` goes from the end to the start.
inline Named backward(const Case& c, const Named& in, const Matrix<Bounded>& state,
                      Matrix<Bounded>& dstate) {
  Matrix<Bounded> dout = in.at("dout");
  if (is_of("rms_norm", *c.op)) {
    const auto g = ssm::rms_norm_backward<Bounded>(in.at("x"), in.at("weight").row(0), c.eps, dout);
    return {{"x", g.x}, {"weight", g.weight}};
  }
  if (is_of("gated_rms_norm", *c.op)) {
    const auto g = ssm::gated_rms_norm_backward<Bounded>(
        in.at("x"), view(in, "z"), in.at("weight").row(0), c.eps, c.norm_groups, dout);
    return {{"x", g.y}, {"z", g.z}, {"weight", g.weight}};
  }
  if (is_of("causal_conv1d", *c.op)) {
    Matrix<Bounded> end = state;
    if (c.silu) dout.array() *= ssm::silu_derivative(convolve(in, end).array());
    const auto g = ssm::causal_conv1d_backward<Bounded>(view(in, "x"), view(in, "weight"),
                                                        view(in, "bias"), state, dout, dstate);
    return {{"x", g.x}, {"weight", g.weight}, {"bias", g.bias}};
  }
  Named all;
  const State h0 = state;
  State dh = dstate;
  with_scan(c, in, [&](const auto& scan) { all = run_back(scan, h0, dout, dh); });
  dstate = dh;
  return all;
}

/// 1 + delta A where exp(delta A) belongs, for each state, which a token of A = 0 leaves alone.
inline Matrix<Bounded> linear_decay(const Case& c, Named& in, const Matrix<Bounded>& state) {
  Matrix<Bounded> a;
  with_scan(c, in, [&](const auto& scan) {
    a = ssm::step_size(scan).transpose().asDiagonal() * in.at("A");
  });
  in.at("A").setZero();
  a.array() += 1;
  return a.replicate(state.rows() / a.rows(), state.cols() / a.cols());
}

// ================================ 4. The verdict =================================================

/// One output: its worst entry, in units of the bound, and where entries are beyond it.
struct Verdict {
  Part part;
  Rule rule;
  double worst = 0, got = 0, expected = 0;
  Index at = 0;  // of the worst
  std::size_t entries = 0, zeros = 0, nans = 0;
  double squares = 0, got_want = 0, want_want = 0;   // sums: of units; of products
  std::map<char, std::vector<Index>> wrong_at = {};  // how many are wrong at each value of a letter
  bool is_shaped = true;                             // else the hint says what it is
  std::string hint = {};
  bool ok() const { return worst <= 1; }
  double rms() const { return std::sqrt(squares / static_cast<double>(entries)); }
  double scale() const { return got_want / want_want; }  // got is this times what is right
};
using Verdicts = std::map<std::string, Verdict>;

inline std::vector<Index> unravel(Index at, const Shape& shape) {
  std::vector<Index> index(shape.size());
  for (std::size_t i = shape.size(); i-- > 0;) {
    const Index extent = std::max<Index>(shape[i], 1);  // a window of one tap keeps a state of none
    index[i] = at % extent, at /= extent;
  }
  return index;
}

/// |got - want| in units of the bound. NaN is infinitely far; what overflows may be infinite.
inline double distance(double got, const Bounded& want, const Rule& rule) {
  const double bound = rule.bound(want), error = std::abs(got - want.value);
  if (error <= 0) return 0;
  if (std::isinf(got) && got * want.value > 0 && std::abs(want.value) + bound >= rule.largest)
    return 0;
  return std::isfinite(error) ? error / bound : std::numeric_limits<double>::infinity();
}

/// Compares what a file holds with the reference, piece by piece: memory does not grow with the
/// length but for the states in which pieces begin. Or fills the outputs of the file with it. Units
/// are computed side by side, added up and compared one by one: the same bits every time.
class Judge {
 public:
  explicit Judge(const Case& c, bool fills = false)
      : case_(c), fills_(fills), length_(c.extent.at('t')), piece_(piece()) {
    for (const Part& part : c.outputs())
      if (const Tensor* tensor = c.file.find(part.name)) open(part, *tensor);
    if (gradients_) c.file.at("dout");
  }

  Verdicts run() {
    for (Index b = 0; any_ && b < case_.extent.at('b'); ++b) run_sequence(b);
    for (const auto& [name, sum] : sums_)
      compare(verdicts_.at(name), {0, sum.rows(), 1}, sum, sum.rows());
    return std::move(verdicts_);
  }

 private:
  void open(const Part& part, const Tensor& tensor) {
    Verdict v{part, rule(case_.dtype)};
    // A state of the scan that is stored as float was never anything else; that of an ssd may have
    // been summed from factors rounded for a matrix unit.
    const bool is_scans_state = case_.op->split == 'd' && part.name == "hT";
    if (is_scans_state && tensor.dtype <= DType::F32 && case_.dtype > DType::F32)
      v.rule = rule(DType::F32);
    v.is_shaped = tensor.shape == case_.shape(part) && tensor.dtype <= DType::BF16;
    if (!v.is_shaped) {
      v.worst = std::numeric_limits<double>::infinity(), v.got = v.expected = std::nan("");
      v.hint = "expected real numbers of shape " + shape_text(case_.shape(part)) + ", found " +
               dtype_name(tensor.dtype) + " " + shape_text(tensor.shape);
    }
    for (const char* c = part.file; *c; ++c) v.wrong_at[*c].resize(case_.extent.at(*c));
    any_ |= v.is_shaped, gradients_ |= part.role == Role::gradient;
    verdicts_.emplace(part.name, std::move(v));
  }

  /// Tokens that are walked at once: their states stay in the cache.
  Index piece() const {
    if (case_.flaws.chunk > 0) return case_.flaws.chunk;
    const Index channels = case_.op->split == 'd' ? kChannels : case_.size('p');
    const Index state = case_.extent.count('n') ? channels * case_.extent.at('n') : 64;
    return std::clamp<Index>((1 << 18) / state, 32, 2048);
  }
  /// Of piece i: some channels of a group, or a head, or all.
  std::vector<Slice> units(Index b, Index i) const {
    const Index all = case_.op->split ? case_.splits() : 1, group = all / case_.groups();
    const Index width = case_.op->split == 'd' ? std::min(kChannels, group) : 1;
    std::vector<Slice> units;
    for (Index g = 0; g < all; g += group)
      for (Index s = 0; s < group; s += width)
        units.push_back({b, i * piece_, std::min(piece_, length_ - i * piece_), g + s,
                         std::min(width, group - s)});
    return units;
  }

  /// An input or cotangent of a slice; zero if it is not there.
  Matrix<Bounded> get(const std::string& name, const Slice& slice) const {
    const Block block = case_.block(*case_.op->find(name), slice);
    const Tensor* tensor = case_.file.find(name);
    return tensor ? read(*tensor, block) : Matrix<Bounded>::Zero(block.rows, block.cols);
  }
  Named source(const Slice& slice) const {
    Named in;
    for (const Part& part : case_.op->parts)
      if (part.is_given() && case_.file.find(part.name)) in[part.name] = get(part.name, slice);
    return in;
  }

  /// Calls make(unit, its inputs) for the units of piece i side by side, and takes what they give.
  template <class Make>
  void each_unit(Index b, Index i, const Make& make) {
    const std::vector<Slice> all = units(b, i);
    std::vector<Named> made(all.size());
    tbb::parallel_for(std::size_t{0}, all.size(),
                      [&](std::size_t u) { made[u] = make(u, source(all[u])); });
    take(all, made);
  }

  /// Forward through all pieces and, for gradients, back.
  void run_sequence(Index b) {
    const Operation& op = *case_.op;
    const Flaws& flaws = case_.flaws;
    const Index pieces = (length_ + piece_ - 1) / piece_;
    std::vector<Matrix<Bounded>> h, dh;                // of units
    std::vector<std::vector<Matrix<Bounded>>> starts;  // of pieces: h before them
    for (const Slice& unit : units(b, 0)) {
      h.push_back(op.end.empty() ? Matrix<Bounded>() : get(op.start, unit));
      dh.push_back(op.end.empty() ? Matrix<Bounded>() : get("d" + op.end, unit));
    }
    for (Index i = 0; i < pieces; ++i) {
      for (Matrix<Bounded>& state : h)
        if (flaws.loses_state && i > 0) state.setZero();
      if (gradients_) starts.push_back(h);
      each_unit(b, i, [&](std::size_t u, Named in) {
        if (flaws.has_linear_decay) h[u] = h[u].cwiseProduct(linear_decay(case_, in, h[u]));
        Named made = {{"out", forward(case_, in, h[u])}};
        if (flaws.state_dtype)
          for (Bounded& v : h[u].reshaped())
            with_type(*flaws.state_dtype, [&](auto t) { v.value = double(decltype(t)(v.value)); });
        if (i + 1 == pieces) made[op.end] = h[u];
        return made;
      });
    }
    for (Index i = gradients_ ? pieces : 0; i-- > 0; starts.pop_back())
      each_unit(b, i, [&](std::size_t u, Named in) {
        if ((flaws.loses_state || flaws.loses_gradient) && i + 1 < pieces) dh[u].setZero();
        Matrix<Bounded>& start = starts[i][u];
        Matrix<Bounded> decay;
        if (flaws.has_linear_decay)
          decay = linear_decay(case_, in, start), start = start.cwiseProduct(decay);
        Named made;
        for (auto& [name, d] : backward(case_, in, start, dh[u])) made["d" + name] = d;
        if (flaws.has_linear_decay) {  // it may be differentiated as what it is or as exp
          dh[u] = dh[u].cwiseProduct(decay);
          for (const std::string& name : {op.step(), op.step() + "_bias", std::string("A")})
            made.erase("d" + name);
        }
        if (i == 0) made["d" + op.start] = dh[u];
        return made;
      });
  }

  /// What the units have made. What several of a group, or several sequences, give to one output
  /// is added up first.
  void take(const std::vector<Slice>& units, std::vector<Named>& made) {
    const auto group = [&](std::size_t u) { return units[u].s * case_.groups() / case_.splits(); };
    for (std::size_t u = 0; u < units.size(); ++u)
      for (const auto& [name, m] : made[u]) {
        const auto found = verdicts_.find(name);
        if (found == verdicts_.end() || !found->second.is_shaped) continue;
        const Part& part = found->second.part;
        const Block block = case_.block(part, units[u]);
        if (!part.has('b')) {
          Matrix<Bounded>& sum = sums_[name];
          if (sum.size() == 0) sum.setZero(static_cast<Index>(case_.file.at(name).size()), 1);
          for (Index r = 0; r < m.rows(); ++r)
            for (Index c = 0; c < m.cols(); ++c) sum(block.index(r, c)) += m(r, c);
        } else if (part.has('g') && u + 1 < units.size() && group(u + 1) == group(u)) {
          made[u + 1].at(name) += m;
        } else {
          const Index padding = units[u].t + units[u].t_count - case_.judged;
          compare(found->second, block, m,
                  m.rows() - (*part.rows == 't' ? std::max<Index>(padding, 0) : 0));
        }
      }
  }

  void compare(Verdict& v, const Block& block, const Matrix<Bounded>& want, Index rows) const {
    const Tensor& tensor = case_.file.at(v.part.name);
    const Matrix<Bounded> got = read(tensor, block);
    for (Index r = 0; r < rows; ++r)
      for (Index c = 0; c < want.cols(); ++c) {
        const Index at = block.index(r, c);
        if (fills_)
          numbers(tensor)[at] = want(r, c).value;
        else
          compare(v, got(r, c).value, want(r, c), at);
      }
  }
  void compare(Verdict& v, double got, const Bounded& want, Index at) const {
    const bool overflows = case_.is_guess && !std::isfinite(got) && !(want.size < v.rule.largest);
    const double units = overflows ? 0 : distance(got, want, v.rule), most = std::min(units, 1e100);
    if (units > v.worst || (units == v.worst && at <= v.at))
      v.worst = units, v.at = at, v.got = got, v.expected = want.value;
    ++v.entries, v.zeros += got == 0, v.nans += std::isnan(got), v.squares += most * most;
    v.got_want += got * want.value, v.want_want += want.value * want.value;
    if (units <= 1) return;
    const std::vector<Index> index = unravel(at, case_.shape(v.part));
    for (std::size_t i = 0; i < index.size(); ++i) ++v.wrong_at[v.part.file[i]][index[i]];
  }

  static constexpr Index kChannels = 16;
  const Case& case_;
  const bool fills_;
  const Index length_, piece_;
  bool any_ = false, gradients_ = false;  // there is something to compare; a gradient
  Verdicts verdicts_;
  Named sums_;  // over all sequences
};

/// Adds the outputs themselves to a case, in double.
inline void add_expected(Case& c) {
  for (const Part& part : c.outputs())
    c.file.tensors[part.name] = empty_tensor(part.name, DType::F64, c.shape(part));
  Judge(c, true).run();
}

// ================================ 5. The suite ===================================================

/// What the numbers of a case are like: of normal v, with a = |v|,
///   A = -decay (a + least), delta = spread v + middle before a softplus, else step a
struct Style {
  double decay, least, spread, middle, step, bias = 0.1;  // bias a, or before a softplus v / 2
  double jump = 0;  // where v > 1.5: of delta beyond 89, exp is no float
  bool has_scales = false, is_positive = false;  // each channel its order of magnitude; all else a
  static const Style usual, no_decay, weak_decay, total_decay, tiny_delta, huge_delta, scales,
      positive;
};
// clang-format off
inline constexpr Style Style::usual       = {2,    0.01, 1,    -1,  0.3},
                       Style::no_decay    = {1e-9, 0,    0.25, -6,  3e-3},
                       Style::weak_decay  = {1e-3, 0,    1,    -1,  0.3},
                       Style::total_decay = {1e4,  0.01, 1,    -1,  0.3},
                       Style::tiny_delta  = {2,    0.01, 1,    -14, 1e-6, 1e-6},
                       Style::huge_delta  = {2,    0.01, 5,    20,  30,   0.1, 65},
                       Style::scales      = {2,    0.01, 1,    -1,  0.3,  0.1, 0, true},
                       Style::positive    = {1e-9, 0,    0.25, -6,  3e-3, 0.1, 0, false, true};
// clang-format on

struct Recipe {
  const Operation* op;
  std::string label;
  std::map<char, Index> extent;
  unsigned options = ~0u;  // bits: the optional inputs, in order; the next: softplus or silu
  Style style = Style::usual;

  bool option(std::size_t bit) const { return options >> bit & 1; }
};

/// One value of an input; channel: the index in the split letter.
inline double draw(Random& random, const Style& style, const std::string& name, bool softplus,
                   Index channel) {
  const double v = random.normal(), a = std::abs(v);
  if (name == "A") return -style.decay * (a + style.least);
  if (name == "delta_bias" || name == "dt_bias") return softplus ? v / 2 : style.bias * a;
  if (name == "delta" || name == "dt")
    return softplus ? style.spread * v + style.middle + (v > 1.5 ? style.jump : 0) : style.step * a;
  if (style.has_scales && (name == "u" || name == "x"))
    return v * std::pow(10, static_cast<double>(channel % 7) / 2 - 2);
  return style.is_positive ? a : v;
}

/// The case as a file in memory: inputs and cotangents, rounded to their dtype, and options.
inline Checkpoint make_case(Recipe r, DType dtype, std::uint64_t seed) {
  Random random(seed);
  Checkpoint file;
  file.where = r.label;
  if (r.extent.count('w')) r.extent['v'] = r.extent['w'] - 1;
  const std::string op = r.op->name;
  const char split = r.op->split ? r.op->split : 'd';
  std::size_t options = 0;
  for (const Part& part : r.op->parts) options += part.role == Role::input && part.optional;
  const bool last = r.option(options), softplus = op == "ssd" || (op == "selective_scan" && last);
  std::size_t bit = 0;
  for (const Part& part : r.op->parts) {
    if (!part.is_given()) continue;
    if (part.role == Role::input && part.optional && !r.option(bit++)) continue;
    Tensor tensor{part.name, DType::F64, {}, nullptr, nullptr};
    Index inner = 1;  // values for each value of the split letter
    for (const char* c = part.file; *c; ++c) {
      tensor.shape.push_back(r.extent.at(*c));
      inner = *c == split ? 1 : inner * r.extent.at(*c);
    }
    std::vector<double> values(tensor.size());
    for (std::size_t i = 0; i < values.size(); ++i)
      values[i] = draw(random, r.style, part.name, softplus,
                       static_cast<Index>(i) / inner % r.extent.at(split));
    tensor.data = values.data();
    file.tensors[part.name] = to_dtype(tensor, part.dtype(dtype));
  }
  file.metadata = {{"kind", op}};
  if (is_of(kScans, *r.op)) file.metadata["softplus"] = softplus ? "1" : "0";
  if (op == "causal_conv1d") file.metadata["silu"] = last ? "1" : "0";
  if (is_of(kNorms, *r.op)) file.metadata["eps"] = "1e-5";
  if (op == "gated_rms_norm")
    file.metadata["group_size"] = std::to_string(r.extent.at('d') / r.extent.at('g'));
  return file;
}

/// Cases that differ in one extent.
struct Sweep {
  const char *of, *label;  // operations
  char letter;
  std::vector<Index> values;
  std::map<char, Index> others = {};
  Style style = Style::usual;
  unsigned options = ~0u;
  bool large = false;
};

// What breaks real kernels: lengths around those of a warp, a block and a chunk, sizes that no tile
// divides, groups, and numbers at the edges. (And options left out: see recipes.)
constexpr unsigned kNoSoftplus = ~16u;  // of the scan's options
// clang-format off
inline const std::vector<Sweep> kSweeps = {
    {kAll, "length", 't', {1, 2, 3, 31, 32, 63, 64, 65, 127, 128, 129, 255, 256, 257}, {{'b', 3}}},
    {kAll, "length", 't', {511, 513, 1025, 2049, 8193}, {{'b', 1}}},
    {kAll, "scales", 't', {100}, {}, Style::scales},
    {kScans, "state", 'n', {1, 3, 16, 64, 128, 256}, {{'t', 130}}},
    {"selective_scan causal_conv1d", "width", 'd', {1, 3, 7, 33, 64, 65, 130},
     {{'b', 3}, {'t', 67}}},
    {kNorms, "width", 'd', {1, 3, 7, 33, 64, 65, 130, 257, 1024, 2560}, {{'b', 3}, {'t', 9}}},
    {"ssd", "head", 'p', {1, 3, 16, 32, 64, 128}, {{'h', 3}, {'n', 32}, {'t', 70}}},
    {"causal_conv1d", "taps", 'w', {1, 2, 3, 8}},
    {"causal_conv1d", "taps", 'w', {1, 2, 3, 8}, {{'t', 2}}},
    {"selective_scan gated_rms_norm", "groups", 'g', {2, 3, 6}, {{'t', 65}}},
    {"ssd", "groups", 'g', {2, 4}, {{'t', 65}}},
    {kScans, "no_decay", 't', {300, 4097}, {{'b', 1}}, Style::no_decay},
    {kScans, "positive", 't', {300, 4097}, {{'b', 1}}, Style::positive},
    {kScans, "weak_decay", 't', {300}, {}, Style::weak_decay},
    {kScans, "total_decay", 't', {300}, {}, Style::total_decay},
    {kScans, "tiny_delta", 't', {300}, {}, Style::tiny_delta},
    {kScans, "huge_delta", 't', {300}, {}, Style::huge_delta},
    {"selective_scan", "tiny_step", 't', {300}, {}, Style::tiny_delta, kNoSoftplus},
    {"selective_scan", "huge_step", 't', {300}, {}, Style::huge_delta, kNoSoftplus},
    {kScans, "very_long", 't', {262144}, {{'b', 1}, {'d', 2}, {'h', 1}, {'n', 4}, {'g', 1}},
     Style::positive, ~0u, true},
    {kScans, "very_long", 't', {262145}, {{'b', 1}, {'d', 2}, {'h', 1}, {'n', 4}, {'g', 1}},
     Style::weak_decay, ~0u, true},
    {"selective_scan causal_conv1d", "large", 't', {2051}, {{'b', 3}, {'d', 1536}},
     Style::usual, ~0u, true},
    {"ssd", "large", 't', {2051}, {{'b', 3}, {'h', 24}, {'p', 64}, {'n', 128}},
     Style::usual, ~0u, true}};
// clang-format on

/// The cases of one operation: all combinations of options, then the sweeps.
inline std::vector<Recipe> recipes(const Operation& op, bool large) {
  std::map<char, Index> usual = {{'b', 2},  {'t', 33}, {'d', op.split ? 6 : 48},
                                 {'n', 16}, {'g', 1},  {'h', 4},
                                 {'p', 8},  {'w', 4}};
  std::vector<Recipe> all;
  unsigned choices = is_of("selective_scan causal_conv1d", op);  // softplus; silu
  std::string letters = "g";
  for (const Part& part : op.parts)
    if (part.role == Role::input) choices += part.optional, letters += part.file;
  for (unsigned bits = 0; bits < 1u << choices; ++bits) {
    usual['t'] = 29 + bits % 8;
    all.push_back({&op, "options" + std::to_string(bits), usual, bits, Style::usual});
  }
  usual['t'] = 33;
  for (const Sweep& sweep : kSweeps)
    for (const Index value : sweep.values) {
      if (!is_of(sweep.of, op) || (sweep.large && !large)) continue;
      Recipe r{&op, sweep.label, usual, sweep.options, sweep.style};
      std::map<char, Index> others = sweep.others;
      others[sweep.letter] = value;
      for (const auto& [letter, extent] : others) {
        r.extent[letter] = extent;
        if (letters.find(letter) != std::string::npos)
          r.label += std::string("_") + letter + std::to_string(extent);
      }
      all.push_back(r);
    }
  return all;
}

// ================================ 6. Hints =======================================================
//
// A hint is a bug that was tried: the case is changed so that the reference gives what a kernel
// with this bug would give, or the kernel's outputs so that they would be right, and is judged
// again. Where no bug fits, the places of the wrong entries say what they can.

// --- changes of a case; false: it is not one for this case ---

using Change = std::function<bool(Case&)>;

/// Entry i of the letter's axis of a tensor becomes what was entry from(i), or 0 if that is < 0.
template <class From>
void reorder(Case& c, const Part& part, char letter, Index extent, const From& from) {
  if (!part.has(letter) || !c.file.find(part.name)) return;
  const Numbers old = numbers(c, part.name);
  const Tensor before = c.file.at(part.name);
  Shape shape = before.shape;
  const auto axis = static_cast<std::size_t>(std::strchr(part.file, letter) - part.file);
  const Index n = std::exchange(shape[axis], extent);
  Index inner = 1;
  for (std::size_t i = axis + 1; i < shape.size(); ++i) inner *= shape[i];
  Numbers to = numbers(c.file.tensors.at(part.name) = empty_tensor(part.name, DType::F64, shape));
  for (Index i = 0; i < to.size(); ++i) {
    const Index j = from(i / inner % extent);
    to[i] = j < 0 ? 0 : old[(i / inner / extent * n + j) * inner + i % inner];
  }
}
/// The same for every tensor of the case.
template <class From>
void reorder_all(Case& c, char letter, Index extent, const From& from) {
  for (const Part& part : c.op->parts) reorder(c, part, letter, extent, from);
}

inline Change drop(const std::string& name) {
  return [=](Case& c) { return c.file.tensors.erase(name) > 0; };
}
inline Change values_are(const std::string& name, const std::function<double(double)>& f) {
  return [=](Case& c) {
    for (double& v : numbers(c, name)) v = f(v);
    return c.file.find(name) != nullptr;
  };
}
inline Change times(const std::string& name, double by) {
  return values_are(name, [=](double v) { return by * v; });
}
template <class T>
Change set(T Case::*option, T value) {  // it was another
  return [=](Case& c) { return std::exchange(c.*option, value) != value; };
}
inline Change flawed(const Flaws& flaws) {
  return [=](Case& c) { return c.flaws = flaws, flaws.chunk < c.judged || flaws.chunk == 1; };
}

/// What stands at the end where a shifted tensor has no value.
enum class Edge { zero, same, wrapped };
inline Change shifted(const Part& part, Index by, Edge edge) {
  return [=](Case& c) {
    const Index L = c.judged;
    reorder(c, part, 't', L, [=](Index t) {
      const Index s = t - by;
      if (edge == Edge::wrapped) return (s + L) % L;
      return s >= 0 && s < L ? s : edge == Edge::same ? t : -1;
    });
    return L > 1 && c.file.find(part.name);
  };
}

/// The groups one behind another again and again (0 1 0 1) instead of side by side (0 0 1 1): the
/// reference is right for channels put in another order, as those of a group are neighbours there.
inline bool repeat_groups(Case& c) {
  const Index G = c.groups(), S = c.splits(), width = S / G;
  reorder_all(c, c.op->split, S, [=](Index s) { return s % width * G + s / width; });
  return G > 1 && G < S;
}

/// The last chunk computed to its end, zeros behind the sequence: there delta is softplus(bias).
inline Change padded_to(Index K) {
  return [=](Case& c) {
    const Index L = c.judged, padded = (L + K - 1) / K * K;
    reorder_all(c, 't', padded, [=](Index t) { return t < L ? t : -1; });
    c.extent['t'] = padded;
    return padded != L;
  };
}

inline double softplus_of(double v) { return std::max(v, 0.) + std::log1p(std::exp(-std::abs(v))); }

/// delta as it is used, in the file's place of delta: (b, d, t) or (b, t, h).
inline Numbers used_step(Case& c) {
  const std::string step = c.op->step(), bias = step + "_bias";
  Numbers delta = numbers(c, step);
  const Numbers add = numbers(c, bias);
  const Index S = c.splits(), inner = c.op->split == 'd' ? c.extent.at('t') : 1;
  for (Index i = 0; i < delta.size(); ++i) {
    if (add.data()) delta[i] += add[i / inner % S];
    if (c.softplus) delta[i] = softplus_of(delta[i]);
  }
  if (add.data()) numbers(c, bias) *= 0;
  return delta;
}
inline bool softplus_twice(Case& c) { return c.softplus && used_step(c).size() > 0; }

/// log(1 + exp(v)) as it stands, in float: infinite where exp is.
inline bool softplus_overflows(Case& c) {
  const double most = std::log(rule(DType::F32).largest);
  Case plain = c;
  plain.softplus = false;
  const Numbers raw = used_step(plain);
  if (!c.softplus || raw.maxCoeff() <= most) return false;
  Numbers delta = numbers(c, c.op->step());
  delta = (raw > most).select(std::numeric_limits<double>::infinity(), delta);
  return true;
}

/// B_bar = expm1(delta A) / A B, which depends on the channel: each becomes a group of its own.
inline bool exact_zoh(Case& c) {
  const Index S = c.splits(), G = c.groups(), N = c.extent.at('n'), L = c.judged;
  reorder_all(c, 'g', S, [=](Index s) { return s * G / S; });
  c.extent['g'] = S;
  c.file.tensors.erase("dB"), c.file.tensors.erase("dC");
  const Numbers A = numbers(c, "A"), delta = used_step(c);
  c.softplus = false;
  Numbers B = numbers(c, "B");  // (b, d, n, t)
  for (Index i = 0; i < B.size(); ++i)
    if (const double a = delta[i / (N * L) * L + i % L] * A[i / L % (S * N)]; a != 0)
      B[i] *= std::expm1(a) / a;
  return true;
}

/// D x + y silu(z) instead of (y + D x) silu(z): without D x, the output is that of no D.
inline bool gate_first(Case& c) {
  const Numbers D = numbers(c, "D"), u = numbers(c, "u");
  Numbers out = numbers(c, "out");
  if (!D.data() || !c.file.find("z")) return false;
  for (Index i = 0; i < out.size(); ++i) out[i] -= D[i / c.judged % D.size()] * u[i];
  return drop("D")(c);
}

/// A gate by which the output is multiplied at its end: without it, the output is that of silu 1.
constexpr double kOpen = 1.2784645427610738;  // silu of it is 1
inline double silu_of(double v) { return v / (1 + std::exp(-v)); }
inline Change gated_by(double (*gate)(double)) {
  return [=](Case& c) {
    Numbers z = numbers(c, "z"), out = numbers(c, "out");
    if (!z.data()) return false;
    for (Index i = 0; i < out.size(); ++i) out[i] = z[i] == 0 ? 0 : out[i] / gate(z[i]);
    z = z.unaryExpr([](double v) { return v == 0 ? 0 : kOpen; });
    return true;
  };
}

inline bool center(Case& c) {
  const Index d = c.extent.at('d');
  Numbers x = numbers(c, "x");
  for (Index i = 0; i < x.size(); i += d) x.segment(i, d) -= x.segment(i, d).mean();
  return true;
}

/// A bug of the operations that `of` names.
struct Bug {
  const char* of;
  std::string hint;
  Change change;
};

inline const std::vector<Bug> kBugs = {
    {kScans, "groups of B and C are repeated (0 1 0 1), not neighbours (0 0 1 1)", repeat_groups},
    {kScans, "softplus is not applied", set(&Case::softplus, false)},
    {kScans, "softplus is applied where it is not asked for", set(&Case::softplus, true)},
    {kScans, "softplus is applied twice", softplus_twice},
    {kScans, "softplus is log(1 + exp(v)), and exp overflows", softplus_overflows},
    {kScans, "A_log is used as A", values_are("A", [](double a) { return std::log(-a); })},
    {kScans, "A is used as A_log", values_are("A", [](double a) { return -std::exp(a); })},
    {kScans, "A has lost its sign", times("A", -1)},
    {"selective_scan", "the gate comes before D: y silu(z) + D x", gate_first},
    {"selective_scan", "the gate has no sigmoid: y z, not y silu(z)",
     gated_by([](double z) { return z; })},
    {"selective_scan", "the gate is the sigmoid alone, not silu(z)",
     gated_by([](double z) { return silu_of(z) / z; })},
    {"selective_scan", "z is ignored", drop("z")},
    {"selective_scan", "B is discretized by the exact zero-order hold, not as delta B", exact_zoh},
    {kScans, "the decay is 1 + delta A, not exp(delta A)", flawed({1, false, false, {}, true})},
    {kScans, "the state is stored in bfloat16", flawed({1, false, false, DType::BF16})},
    {kScans, "the state is stored in float16", flawed({1, false, false, DType::F16})},
    {"causal_conv1d", "the taps are in reverse order",
     [](Case& c) {
       const Index w = c.extent.at('w');
       reorder_all(c, 'w', w, [=](Index i) { return w - 1 - i; });
       return w > 1;
     }},
    {"causal_conv1d", "silu is not applied", set(&Case::silu, false)},
    {"causal_conv1d", "silu is applied where it is not asked for", set(&Case::silu, true)},
    {kNorms, "eps is ignored", set(&Case::eps, 0.0)},
    {"gated_rms_norm", "all channels are normalized together, not each group",
     set(&Case::norm_groups, Index{1})},
    {"gated_rms_norm", "the gate comes after the norm", gated_by(silu_of)},
    {kNorms, "weight is used as 1 + weight", values_are("weight", [](double w) { return 1 + w; })},
    {"rms_norm", "the mean is subtracted, as in a layer norm", center}};

/// The bugs to try on a case; with chunks of powers of two and of the lengths that are given, the
/// longest first.
inline std::vector<Bug> bugs(const Case& c, std::set<Index> chunks) {
  std::vector<Bug> all;
  const auto add = [&](const Bug& bug) {
    if (is_of(bug.of, *c.op)) all.push_back(bug);
  };
  for (const Part& part : c.op->parts) {
    const std::string& name = part.name;
    const bool is_input = part.role == Role::input;
    if ((is_input && part.optional && name != "z") || name == "d" + c.op->end)
      add({kStates, name + " is ignored", times(name, 0)});
    if (is_input && (name == "D" || name.find("bias") != std::string::npos))
      add({kStates, name + " is added twice", times(name, 2)});
  }
  for (const Bug& bug : kBugs) add(bug);
  for (const Part& part : c.op->parts)
    for (const Index by : {1, -1})
      for (const Edge edge : {Edge::zero, Edge::same, Edge::wrapped})
        if (part.role == Role::input && part.has('t'))
          add({kStates, part.name + " is one token " + (by > 0 ? "late" : "early"),
               shifted(part, by, edge)});
  for (Index K = 2; K <= 4096; K *= 2) chunks.insert(K);
  for (auto K = chunks.rbegin(); K != chunks.rend() && *K > 1; ++K) {
    const std::string n = std::to_string(*K), at = " lost at every boundary of chunks of " + n;
    add({kStates, "the state is" + at, flawed({*K, true})});
    add({kStates, "the gradient of the state is" + at, flawed({*K, false, true})});
    add({kScans, "the tail of the last " + n + " tokens is not masked: the state goes on",
         padded_to(*K)});
  }
  return all;
}

// --- places of what is wrong ---

/// The values of a letter at which something is wrong.
inline std::vector<Index> where(const std::vector<Index>& wrong) {
  std::vector<Index> at;
  for (std::size_t i = 0; i < wrong.size(); ++i)
    if (wrong[i] > 0) at.push_back(static_cast<Index>(i));
  return at;
}

/// Those of one letter, where only some are wrong: "only d 5", "t from 64 on", ...
inline std::string places(const std::string& name, const std::vector<Index>& wrong) {
  const std::vector<Index> at = where(wrong);
  const Index n = static_cast<Index>(wrong.size()), count = static_cast<Index>(at.size());
  if (count == 0 || count == n) return "";
  const Index first = at.front(), last = at.back();
  if (count == 1) return one_line("only ", name, " ", first);
  if (last - first + 1 == count)
    return last == n - 1 ? one_line(name, " from ", first, " on")
                         : one_line(name, " ", first, " to ", last);
  const Index period = at[1] - first;
  bool regular = count > 2;
  for (Index i = 0; i < count; ++i) regular = regular && at[i] == first + i * period;
  if (regular) return one_line("every ", period, "th ", name, " from ", first);
  for (Index lanes = 8; lanes <= 256 && lanes < n; lanes *= 2) {  // groups of lanes of a block
    std::set<Index> in_block;
    for (const Index i : at) in_block.insert(i % lanes);
    const Index low = *in_block.begin(), high = *in_block.rbegin(), size = in_block.size();
    if (size == high - low + 1 && size < lanes && count >= n / lanes * size)
      return one_line(name, " ", low, " to ", high, " of every ", lanes);
  }
  return one_line(count, " of ", n, " ", name, " from ", first);
}

inline std::string pattern(const Verdict& v) {
  std::string text;
  for (const char* c = v.part.file; *c; ++c)
    if (const std::string some = places(std::string(1, *c), v.wrong_at.at(*c)); !some.empty())
      text += (text.empty() ? "wrong: " : ", ") + some;
  return text;
}

/// Lengths of chunks at whose boundaries something may be lost: forward the first wrong token
/// begins the second chunk; backward the last one ends a chunk.
inline void add_suspects(const std::vector<Index>& wrong, std::set<Index>& chunks) {
  const std::vector<Index> at = where(wrong);
  if (at.empty()) return;
  chunks.insert(at.front());
  for (Index K = 2; K <= 64; ++K)
    if ((at.back() + 1) % K == 0) chunks.insert(K);
}

// --- what explains the verdict ---

/// Wrong outputs that one and the same bug explains. The less, the better.
struct Fit {
  int rank = 3;  // 0: by a bug; 1: by a factor; 2: by a bug with which a right one would be wrong
  std::vector<std::string> outputs = {};
  double rms = 0;     // what is left to be explained
  bool whole = true;  // nothing: all of them would be right
  bool operator<(const Fit& e) const {
    return std::tuple(rank, e.outputs.size(), rms) < std::tuple(e.rank, outputs.size(), e.rms);
  }
};

/// Whether a bug explains an output: all of it, or, where roundings fall either way, nearly all.
inline bool explains(const Verdict& with, const Verdict& without, bool rounds) {
  if (!with.is_shaped || !(with.rms() <= without.rms() / 2)) return false;
  return with.worst <= 1 || (with.worst <= 4 && without.worst > 40) ||
         (rounds && without.rms() > 10 && with.rms() < without.rms() / 10);
}

/// The case is judged once more, changed by a bug.
inline Fit attempt(int rank, const Case& changed, const Verdicts& verdicts) {
  Fit fit{rank};
  for (const auto& [name, with] : Judge(changed).run()) {
    const Verdict& without = verdicts.at(name);
    if (without.ok() && with.part.role == Role::output && !with.ok()) fit.rank = 2;
    if (without.ok() || !explains(with, without, changed.flaws.state_dtype.has_value())) continue;
    fit.outputs.push_back(name), fit.rms += with.rms(), fit.whole &= with.ok();
  }
  return fit;
}

/// Gives each wrong output the bug that explains it best, or else the pattern of its wrong entries.
/// `last`: the bug that explained another case; it is tried first. What explains all is enough.
inline void explain(const Case& c, Verdicts& verdicts, std::string& last) {
  constexpr Index kLargest = 1 << 22;  // steps of a state that are worth trying again and again
  std::size_t wrong = 0;
  std::set<Index> chunks;
  Case scaled = c;  // outputs that are a number times what is right
  for (auto& [name, v] : verdicts) {
    if (v.ok() || !v.is_shaped) continue;
    const bool unwritten = std::max(v.zeros, v.nans) == v.entries;  // what stood there before
    v.hint = !unwritten ? pattern(v) : v.nans ? "all NaN" : "all zeros";
    wrong += !unwritten;
    if (v.part.has('t')) add_suspects(v.wrong_at.at('t'), chunks);
    if (v.entries >= 16 && std::isfinite(1 / v.scale())) numbers(scaled, name) /= v.scale();
  }
  Index steps = 1;
  for (const char letter : {'b', 't', 'd', 'h', 'p', 'n'}) steps *= c.size(letter);
  if (wrong == 0 || steps > kLargest) return;
  std::map<std::string, Fit> best;  // of each output
  const auto give = [&](const Fit& fit, const auto& hint) {
    for (const std::string& name : fit.outputs)
      if (fit < best[name]) best[name] = fit, verdicts.at(name).hint = hint(verdicts.at(name));
  };
  give(attempt(1, scaled, verdicts), [](const Verdict& v) {
    return one_line("all of it is ", v.scale(), " times what is right");
  });
  std::vector<Bug> all = bugs(c, chunks);
  std::stable_partition(all.begin(), all.end(), [&](const Bug& bug) { return bug.hint == last; });
  Fit most;
  for (const Bug& bug : all) {
    Case changed = c;
    changed.is_guess = true;
    if (!bug.change(changed)) continue;
    const Fit fit = attempt(0, changed, verdicts);
    give(fit, [&](const Verdict&) { return bug.hint; });
    if (!fit.outputs.empty() && fit < most) most = fit, last = bug.hint;
    if (fit.outputs.size() == wrong && fit.rank == 0 && fit.whole) break;
  }
}

// ================================ 7. Doors =======================================================

// --- raw: FOLDER/shapes.txt with a line "name dtype extents..." for each tensor, then a line
// --- "option value" for each option; FOLDER/NAME.bin little-endian, in C order

inline void write_raw(const std::string& folder, const Checkpoint& file) {
  std::ostringstream shapes;
  for (const auto& [name, tensor] : file.tensors) {
    shapes << name << ' ' << dtype_name(tensor.dtype);
    for (const auto extent : tensor.shape) shapes << ' ' << extent;
    shapes << '\n';
    write_text(make_folder(folder) + name + ".bin", tensor.bytes());
  }
  for (const auto& [key, value] : file.metadata) shapes << key << ' ' << value << '\n';
  write_text(folder + "/shapes.txt", shapes.str());
}

/// Outputs need no line: their shapes are known, and the size of the file says how many bits.
inline Checkpoint read_raw(const std::string& folder) {
  Checkpoint file;
  file.where = folder;
  const auto add = [&](const std::string& name, DType dtype, const Shape& shape, bool any_float) {
    const std::string path = folder + "/" + name + ".bin";
    const MappedFile bin(path);
    Tensor tensor{name, dtype, shape, bin.bytes().data(), bin.memory()};
    for (const DType other : {DType::F64, DType::F32})
      if (any_float && bin.bytes().size() == tensor.size() * dtype_size(other))
        tensor.dtype = other;
    const std::uint64_t size = checked_bytes(shape, tensor.dtype, path);
    if (bin.bytes().size() != size)
      fail("wrong size: ", path, ": expected ", size, " bytes for ", dtype_name(tensor.dtype), " ",
           shape_text(shape), ", found ", bin.bytes().size());
    file.tensors[name] = tensor;
  };
  std::istringstream shapes(read_file(folder + "/shapes.txt"));
  for (std::string line; std::getline(shapes, line);) {
    std::istringstream words(line);
    std::string name, second;
    if (!(words >> name)) continue;
    words >> second;
    const auto dtype = find_dtype(second, &DTypeInfo::name);
    Shape shape;
    for (std::int64_t extent; words >> extent;) shape.push_back(extent);
    if (dtype)
      add(name, *dtype, shape, false);
    else
      file.metadata[name] = second;
  }
  const Case c(folder, file);
  for (const Part& part : c.outputs())
    if (!file.find(part.name) && std::filesystem::exists(folder + "/" + part.name + ".bin"))
      add(part.name, part.dtype(c.dtype), c.shape(part), true);
  return file;
}

// --- a kernel in a shared object, see verify.h ---

/// A copy of a tensor's bytes for kernels to work on; the GPU program brings its device's memory.
struct HostMemory {
  static constexpr bool kDevice = false;
  std::vector<char> bytes;
  explicit HostMemory(std::string_view from) : bytes(from.begin(), from.end()) {}
  void* data() { return bytes.data(); }
  void copy_to(char* host) const { std::copy(bytes.begin(), bytes.end(), host); }
};

template <class Memory>
class SharedObject {
 public:
  explicit SharedObject(const std::string& path) {
    handle_ = ::dlopen(std::filesystem::absolute(path).c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!handle_) fail("cannot load: ", ::dlerror());
    run_ = reinterpret_cast<decltype(run_)>(::dlsym(handle_, "verify_kernel"));
    if (!run_) fail("cannot load: ", path, ": expected a function verify_kernel, found none");
  }

  /// Runs forward and backward, and adds what comes out to the case.
  void run(Case& c) const {
    for (const bool backward : {false, true}) {
      std::vector<Tensor> tensors;
      for (const Part& part : c.op->parts)
        if (part.role == Role::input || (backward && part.role == Role::cotangent))
          if (const Tensor* tensor = c.file.find(part.name))
            tensors.push_back(*tensor), tensors.back().name = part.name;
      const std::size_t inputs = tensors.size();
      for (const Part& part : c.outputs())
        if (backward == (part.role == Role::gradient))
          tensors.push_back(empty_tensor(part.name, part.dtype(c.dtype), c.shape(part)));
      if (!call(c, backward, tensors, inputs)) continue;
      for (std::size_t i = inputs; i < tensors.size(); ++i)
        c.file.tensors[tensors[i].name] = tensors[i];
    }
  }

 private:
  /// Fills the tensors after the inputs. False: the kernel says that it does not do such cases.
  bool call(const Case& c, bool backward, const std::vector<Tensor>& tensors,
            std::size_t inputs) const {
    std::vector<::tensor> described;
    std::deque<Memory> copies;
    for (const Tensor& t : tensors) {
      copies.emplace_back(t.bytes());
      ::tensor d{t.name.c_str(),
                 copies.back().data(),
                 static_cast<std::int32_t>(t.dtype),
                 static_cast<std::int32_t>(t.shape.size()),
                 {},
                 {}};
      std::int64_t step = 1;
      for (std::size_t i = t.shape.size(); i-- > 0; step *= t.shape[i])
        d.shape[i] = t.shape[i], d.stride[i] = step;
      described.push_back(d);
    }
    const double group = static_cast<double>(c.size('d') / c.norm_groups);
    std::pair<const char*, double> options[] = {
        {"eps", c.eps}, {"silu", c.silu}, {"group_size", group}};
    for (auto& [name, value] : options)
      if (c.file.metadata.count(name)) described.push_back({name, &value, VERIFY_F64, 0, {}, {}});
    ::call call{c.op->name, c.softplus, backward, Memory::kDevice, 0, nullptr, described.data()};
    call.count = static_cast<std::int32_t>(described.size());
    const int status = run_(&call);
    if (status != VERIFY_DONE && status != VERIFY_UNSUPPORTED)
      fail("verify_kernel: ", c.name, ": expected 0 or ", VERIFY_UNSUPPORTED, ", found ", status);
    for (std::size_t i = inputs; i < tensors.size(); ++i)
      copies[i].copy_to(static_cast<char*>(const_cast<void*>(tensors[i].data)));
    return status == VERIFY_DONE;
  }

  void* handle_ = nullptr;  // stays open: the kernel may have threads
  int (*run_)(const ::call*) = nullptr;
};

// ================================ 8. Command line ================================================

inline const std::map<std::string, DType> kCaseTypes = {
    {"f32", DType::F32}, {"bf16", DType::BF16}, {"f16", DType::F16}, {"f64", DType::F64}};

/// Which cases: of both subcommands.
struct SuiteFlags {
  std::vector<std::string> ops;
  std::string dtype, size = "small";
  std::uint64_t seed = 1;

  void add(CLI::App* sub) {
    std::vector<std::string> names, types;
    for (const Operation& op : kOperations) names.push_back(op.name);
    for (const auto& type : kCaseTypes) types.push_back(type.first);
    sub->add_option("--op", ops, "operations, comma-separated (default: all)")
        ->delimiter(',')
        ->check(CLI::IsMember(names));
    sub->add_option("--dtype", dtype,
                    "of inputs and outputs; parameters and states stay float32 (default: f32)")
        ->check(CLI::IsMember(types));
    sub->add_option("--size", size, "large adds sizes of real models and a length of 262,144")
        ->check(CLI::IsMember({"small", "large"}));
    sub->add_option("--seed", seed, "of the numbers");
  }
  bool has(const Operation& op) const {
    return ops.empty() || std::count(ops.begin(), ops.end(), op.name);
  }
  std::vector<Recipe> chosen() const {
    std::vector<Recipe> all;
    for (const Operation& op : kOperations)
      for (Recipe& r : recipes(op, size == "large")) {
        if (!has(op)) continue;
        const std::string number = std::to_string(1000 + all.size()).substr(1);
        r.label = std::string(op.name) + "_" + number + "_" + r.label;
        all.push_back(std::move(r));
      }
    return all;
  }
  /// Calls use(case) for every case.
  template <class Use>
  void for_each(const Use& use) const {
    const std::vector<Recipe> all = chosen();
    const DType type = kCaseTypes.at(dtype.empty() ? "f32" : dtype);
    for (std::size_t i = 0; i < all.size(); ++i) {
      use(Case(all[i].label, make_case(all[i], type, seed * 1'000'003 + i)));
      show_progress(static_cast<Index>(i + 1), static_cast<Index>(all.size()));
    }
  }
};

/// Writes the cases: inputs and output gradients, to be run through somebody's kernel.
struct Vectors : SuiteFlags {
  std::string folder;
  bool raw = false, expected = false;

  void declare(CLI::App* sub) {
    sub->add_option("folder", folder, "the folder to write into")->required();
    add(sub);
    sub->add_flag("--raw", raw, "a folder a case, with NAME.bin and shapes.txt, not safetensors");
    sub->add_flag("--expected", expected, "the right outputs and gradients too, in double");
  }
  void run() {
    const std::string to = make_folder(folder);
    for (const Recipe& r : chosen()) keep_outputs(*r.op, to + r.label);
    for_each([&](Case c) {
      if (expected) add_expected(c);
      if (raw) return write_raw(to + c.name, c.file);
      std::vector<Tensor> tensors;
      for (const auto& [key, tensor] : c.file.tensors)
        tensors.push_back(tensor), tensors.back().name = key;
      write_safetensors(to + c.name + ".safetensors", tensors, c.file.metadata);
    });
  }

 private:
  /// Somebody's outputs in a file of that name are not written over.
  static void keep_outputs(const Operation& op, const std::string& path) {
    const std::string file = path + ".safetensors";
    const bool exists = std::filesystem::exists(file);
    const Checkpoint found = exists ? read_safetensors(file) : Checkpoint{};
    for (const Part& part : op.parts)
      if (part.role == Role::output || part.role == Role::gradient)
        if (found.find(part.name) || std::filesystem::exists(path + "/" + part.name + ".bin"))
          fail("outputs in the way: ", exists ? file : path, ": ", quote(part.name),
               ": expected a folder without outputs");
  }
};

/// Judges outputs: of files, or of a kernel that runs now.
template <class Memory>
struct Verify : SuiteFlags {
  std::vector<std::string> paths;
  std::string so;
  bool json = false;
  std::string last;  // the bug that explained something last
  std::size_t judged = 0, wrong = 0, broken = 0, others = 0;

  void declare(CLI::App* sub) {
    sub->add_option("paths", paths,
                    "cases with outputs: safetensors files, folders of --raw, or folders of "
                    "either; of these, with --op or --dtype, such cases only");
    sub->add_option("--so", so,
                    "run the kernel of this shared object (verify.h); without paths on "
                    "the cases that mamba vectors would write");
    sub->add_flag("--json", json, "an object a line for each tensor");
    add(sub);
  }
  void run() {
    if (paths.empty() && so.empty()) fail_usage("verify: expected files, a folder or --so");
    std::optional<SharedObject<Memory>> kernel;
    if (!so.empty()) kernel.emplace(so);
    const auto judge = [&](Case c) {
      if (kernel) kernel->run(c);
      report(c);
    };
    if (paths.empty()) for_each(judge);
    const std::vector<std::string> files = all_files();
    for (std::size_t i = 0; i < files.size(); ++i) {
      try {
        const Case c(std::filesystem::path(files[i]).stem().string(),
                     std::filesystem::is_directory(files[i]) ? read_raw(files[i])
                                                             : read_safetensors(files[i]));
        const bool chosen = has(*c.op) && (dtype.empty() || kCaseTypes.at(dtype) == c.dtype);
        chosen ? judge(c) : void(++others);
      } catch (const std::runtime_error& error) {  // of many, the next one is read
        if (files.size() == 1) throw;
        warn(error.what()), ++broken;
      }
      show_progress(static_cast<Index>(i + 1), static_cast<Index>(files.size()));
    }
    conclude(files.size());
  }

 private:
  void conclude(std::size_t files) const {
    const std::string found = one_line(wrong, " of ", judged, " tensors are beyond the bound");
    if (files > 0 && others == files)
      fail("no cases: expected some of --op and --dtype, found ", files, " others");
    if (broken > 0) fail(broken, " of ", files, " files are broken; ", found);
    if (judged == 0)
      fail("nothing to judge: expected outputs (out, hT, gradients) beside the inputs, found none");
    if (wrong > 0) fail(found);
    if (!json) std::cout << "all " << judged << " tensors are within the bound\n";
  }
  std::vector<std::string> all_files() const {
    std::vector<std::string> files;
    const auto is_raw = [](const std::filesystem::path& path) {
      return exists(path / "shapes.txt");
    };
    for (const std::string& path : paths) {
      std::set<std::string> found;
      if (!std::filesystem::is_directory(path) || is_raw(path))
        found.insert(path);
      else
        for (const auto& entry : std::filesystem::directory_iterator(path))
          if (entry.path().extension() == ".safetensors" || is_raw(entry.path()))
            found.insert(entry.path().string());
      if (found.empty()) fail("no cases: ", path, ": expected .safetensors files or raw cases");
      files.insert(files.end(), found.begin(), found.end());
    }
    return files;
  }
  void report(const Case& c) {
    for (const auto& named : c.file.tensors)
      if (!c.op->find(named.first))
        warn(one_line(c.file.where, ": ", quote(named.first), ": not a tensor of ", c.op->name));
    Verdicts verdicts = Judge(c).run();
    explain(c, verdicts, last);
    for (const auto& [name, v] : verdicts) {
      ++judged, wrong += !v.ok();
      const std::vector<Index> index =
          v.is_shaped ? unravel(v.at, c.shape(v.part)) : std::vector<Index>();
      json ? print_json(c.name, v, index) : print_row(c.name, v, index);
    }
  }
  static void print_json(const std::string& file, const Verdict& v,
                         const std::vector<Index>& index) {
    const double largest = std::numeric_limits<double>::max();  // JSON has no infinity
    const nlohmann::ordered_json line = {
        {"file", file},           {"tensor", v.part.name},
        {"ok", v.ok()},           {"worst", std::min(v.worst, largest)},
        {"index", index},         {"got", v.got},
        {"expected", v.expected}, {"hint", v.hint}};
    std::cout << line << std::endl;
  }
  /// case, tensor, the worst error in units of the bound; of a wrong one where, what, and a hint
  static void print_row(const std::string& file, const Verdict& v,
                        const std::vector<Index>& index) {
    std::cout << std::left << std::setw(44) << file << ' ' << std::setw(12) << v.part.name
              << std::right << std::setw(10) << std::setprecision(3) << v.worst
              << (v.ok() ? "  ok" : "  WRONG");
    for (std::size_t i = 0; i < index.size() && !v.ok(); ++i)
      std::cout << (i ? ", " : " at ") << v.part.file[i] << ' ' << index[i];
    if (!v.ok() && v.is_shaped)
      std::cout << std::setprecision(9) << ": got " << v.got << ", expected " << v.expected;
    if (!v.hint.empty()) std::cout << (v.is_shaped ? "; " : ": ") << v.hint;
    std::cout << std::endl;
  }
};

/// For run(argc, argv, ...) of a program: its two subcommands.
template <class Memory = HostMemory>
std::vector<Command> commands() {
  return {command<Vectors>("vectors", "write cases that break kernels, to be run through yours"),
          command<Verify<Memory>>("verify",
                                  "judge a kernel's outputs against the reference in double")};
}

}  // namespace mamba::verify
