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

#include <mutex>

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

inline Rule rule(DType dtype) {
  constexpr double kLargest = 3.4028234663852886e38;
  if (dtype == DType::F64) return {256, 0x1p-53, 0, 0x1p-53, 1.7976931348623157e308};
  if (dtype == DType::F16) return {4, 0x1p-11, 0x1p-14, 0x1p-24, 65504};
  if (dtype == DType::BF16) return {4, 0x1p-8, 0x1p-126, 0x1p-24, kLargest};
  return {256, 0x1p-24, 0x1p-126, 0x1p-24, kLargest};
}

// ================================ 2. Operations and cases ========================================

/// A tensor of an operation. A letter is an extent: b batch, t time, d channel, g group, n state,
/// h head, p channel of a head, w tap, v tap before the last.
struct Part {
  const char *name, *file;   // the letters in the file's order, that of the official interface
  const char *rows, *cols;   // the letters as rows and columns of a matrix of ssm_reference.hpp
  bool optional = false;     // may be left out
  bool stays_float = false;  // parameters and states are float32 in 16-bit cases, too
  bool has(char letter) const { return std::strchr(file, letter); }
};

/// The values of the letter `split` go their own way, but for sums over the values of a group.
struct Operation {
  const char* name;
  char split;  // or 0
  std::vector<Part> inputs;
  Part out;
  std::optional<Part> start, end;  // the state; start is one of the inputs
};

// clang-format off
inline const std::vector<Operation> kOperations = {
    {"selective_scan", 'd',
     {{"u", "bdt", "t", "d"}, {"delta", "bdt", "t", "d"}, {"A", "dn", "d", "n", false, true},
      {"B", "bgnt", "t", "gn"}, {"C", "bgnt", "t", "gn"}, {"D", "d", "", "d", true, true},
      {"z", "bdt", "t", "d", true}, {"delta_bias", "d", "", "d", true, true},
      {"h0", "bdn", "d", "n", true, true}},
     {"out", "bdt", "t", "d"},
     Part{"h0", "bdn", "d", "n", true, true}, Part{"hT", "bdn", "d", "n", false, true}},
    {"ssd", 'h',
     {{"x", "bthp", "t", "hp"}, {"dt", "bth", "t", "h"}, {"A", "h", "h", "", false, true},
      {"B", "btgn", "t", "gn"}, {"C", "btgn", "t", "gn"}, {"D", "h", "", "h", true, true},
      {"dt_bias", "h", "", "h", true, true}, {"h0", "bhpn", "hp", "n", true, true}},
     {"out", "bthp", "t", "hp"},
     Part{"h0", "bhpn", "hp", "n", true, true}, Part{"hT", "bhpn", "hp", "n", false, true}},
    {"causal_conv1d", 'd',
     {{"x", "bdt", "t", "d"}, {"weight", "dw", "d", "w"}, {"bias", "d", "", "d", true},
      {"initial_states", "bdv", "v", "d", true}},
     {"out", "bdt", "t", "d"},
     Part{"initial_states", "bdv", "v", "d", true}, Part{"final_states", "bdv", "v", "d"}},
    {"rms_norm", 0,
     {{"x", "btd", "t", "d"}, {"weight", "d", "", "d"}}, {"out", "btd", "t", "d"}, {}, {}},
    {"gated_rms_norm", 0,
     {{"x", "btd", "t", "d"}, {"z", "btd", "t", "d"}, {"weight", "d", "", "d"}},
     {"out", "btd", "t", "d"}, {}, {}}};
// clang-format on
inline constexpr const char *kScans = "selective_scan ssd", *kNorms = "rms_norm gated_rms_norm",
                            *kStates = "selective_scan ssd causal_conv1d",
                            *kAll = "selective_scan ssd causal_conv1d rms_norm gated_rms_norm";

/// Whether a list of operations has this one.
inline bool is_of(const std::string& list, const Operation& op) {
  return (" " + list + " ").find(std::string(" ") + op.name + " ") != std::string::npos;
}

inline std::string gradient(const Part& part) { return std::string("d") + part.name; }

/// Part of a case: of sequence b, tokens from t on, values of the split letter from s on.
struct Slice {
  Index b = 0, t = 0, t_count = 0, s = 0, s_count = 0;
};

/// A block of a tensor in a file as the matrix of the reference that it stands for.
struct Block {
  Index at = 0, row_stride = 0, col_stride = 0, row = 0, rows = 1, col = 0, cols = 1;
  Index index(Index r, Index c) const {
    return at + (row + r) * row_stride + (col + c) * col_stride;
  }
};

/// Ways in which a kernel may go wrong between its inputs and its outputs, for hints.
struct Flaws {
  bool loses_state = false, loses_gradient = false;  // at every boundary of chunks
  Index chunk = 0;
  std::optional<DType> state_dtype = {};  // 16 bits
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

  Case(std::string name, Checkpoint from);
  Index all(const char* letters) const {
    Index n = 1;
    for (; *letters; ++letters) n *= extent.at(*letters);
    return n;
  }
  Index splits() const { return op->split ? extent.at(op->split) : 1; }
  Index groups() const { return extent.count('g') ? extent.at('g') : 1; }
  Shape shape(const Part& part) const {
    Shape shape;
    for (const char* c = part.file; *c; ++c) shape.push_back(extent.at(*c));
    return shape;
  }
  Block block(const Part& part, const Slice& slice) const;
  std::map<std::string, Part> outputs() const;

 private:
  double number(const std::string& key, double otherwise) const;
  void bind(const Part& part, const std::string& name, const Tensor& tensor);
  void set_norm_groups();
};

/// An option in the metadata.
inline double Case::number(const std::string& key, double otherwise) const {
  const auto found = file.metadata.find(key);
  if (found == file.metadata.end()) return otherwise;
  char* end = nullptr;
  const double value = std::strtod(found->second.c_str(), &end);
  if (found->second.empty() || *end)
    fail("bad option: ", file.where, ": ", key, ": expected a number, found ",
         quote(found->second));
  return value;
}

/// The extents that an input gives; those already known must be the same, and its values numbers.
inline void Case::bind(const Part& part, const std::string& name, const Tensor& tensor) {
  const std::string where = file.where + ": " + quote(name);
  if (tensor.dtype > DType::BF16)
    fail("wrong dtype: ", where, ": expected F64, F32, F16 or BF16, found ",
         dtype_name(tensor.dtype));
  const std::size_t n = std::strlen(part.file);
  std::string expected;
  for (std::size_t i = 0; i < n; ++i) {
    const auto known = extent.find(part.file[i]);
    expected += (i ? ", " : "") + (known == extent.end() ? std::string(1, part.file[i])
                                                         : std::to_string(known->second));
  }
  bool fits = tensor.shape.size() == n;
  for (std::size_t i = 0; fits && i < n; ++i) {
    const Index found = extent.emplace(part.file[i], tensor.shape[i]).first->second;
    fits = found == tensor.shape[i] && (found > 0 || part.file[i] == 'v');
  }
  if (!fits)
    fail("bad shape: ", where, ": expected (", expected, "), found ", shape_text(tensor.shape));
  const std::size_t bad = count_values(
      tensor, [](auto v, std::size_t) { return !std::isfinite(static_cast<double>(v)); });
  if (bad > 0)
    fail("not a number: ", where, ": expected finite inputs, found ", bad, " of ", tensor.size(),
         " values NaN or infinite");
}

inline void Case::set_norm_groups() {
  const auto d = static_cast<double>(extent.at('d'));
  const double size = number("group_size", d);
  norm_groups = size >= 1 ? static_cast<Index>(d / size) : 0;
  if (norm_groups < 1 || static_cast<double>(norm_groups) * size != d)
    fail("bad option: ", file.where, ": group_size: expected a divisor of ", d, ", found ", size);
}

inline Case::Case(std::string name, Checkpoint from)
    : name(std::move(name)), file(std::move(from)) {
  const std::string kind = file.metadata.count("kind") ? file.metadata.at("kind") : "";
  for (const Operation& each : kOperations)
    if (each.name == kind) op = &each;
  if (!op)
    fail("bad option: ", file.where, ": kind: expected one of ", kAll, " in the metadata, found ",
         quote(kind));
  softplus = number("softplus", kind == "ssd") != 0, silu = number("silu", 0) != 0;
  eps = number("eps", 1e-5);
  for (const Part& part : op->inputs) {
    const Tensor* tensor = part.optional ? file.find(part.name) : &file.at(part.name);
    if (tensor) bind(part, part.name, *tensor);
    if (extent.count('w')) extent['v'] = extent['w'] - 1;
  }
  dtype = file.at(op->inputs[0].name).dtype, judged = extent.at('t');
  for (const Part* part : {&op->out, op->end ? &*op->end : nullptr})  // cotangents
    if (const Tensor* tensor = part ? file.find(gradient(*part)) : nullptr)
      bind(*part, gradient(*part), *tensor);
  if (splits() % groups())
    fail("bad shape: ", file.where, ": 'B': expected a divisor of ", splits(), " groups, found ",
         groups());
  if (kind == "gated_rms_norm") set_norm_groups();
}

inline Block Case::block(const Part& part, const Slice& slice) const {
  std::map<char, Index> stride;
  Index step = 1;
  for (std::size_t i = std::strlen(part.file); i-- > 0; step *= extent.at(part.file[i]))
    stride[part.file[i]] = step;
  const auto range = [&](const char* letters, Index& first, Index& count, Index& by) {
    first = 0, count = all(letters);
    if (!*letters) return;
    by = stride[letters[std::strlen(letters) - 1]];
    const Index inner = all(letters + 1);
    if (*letters == 't') first = slice.t, count = slice.t_count;
    if (*letters == op->split) first = slice.s * inner, count = slice.s_count * inner;
    if (*letters != 'g' || slice.s_count == splits()) return;
    first = slice.s * groups() / splits() * inner, count = inner;
  };
  Block b;
  b.at = part.has('b') ? slice.b * stride['b'] : 0;
  range(part.rows, b.row, b.rows, b.row_stride);
  range(part.cols, b.col, b.cols, b.col_stride);
  return b;
}

/// Every tensor that a file of the operation may hold: inputs, outputs, and d of either.
inline std::map<std::string, Part> all_parts(const Operation& op) {
  std::map<std::string, Part> all;
  const auto add = [&](const Part& part) { all[part.name] = all[gradient(part)] = part; };
  for (const Part& part : op.inputs) add(part);
  add(op.out);
  if (op.end) add(*op.end);
  return all;
}

/// All that a kernel may give back, by name: forward, and the gradient of every input there is.
inline std::map<std::string, Part> Case::outputs() const {
  std::map<std::string, Part> all = {{op->out.name, op->out}};
  if (op->end) all.emplace(op->end->name, *op->end);
  for (const Part& part : op->inputs)
    if (file.find(part.name)) all.emplace(gradient(part), part);
  return all;
}

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

/// A value of a tensor's dtype for each element, all NaN, to be filled by somebody.
inline Tensor empty_tensor(const std::string& name, DType dtype, Shape shape) {
  Tensor tensor{name, dtype, std::move(shape), nullptr, nullptr};
  const auto bytes = std::make_shared<std::vector<unsigned char>>(tensor.byte_size(), 0xff);
  tensor.data = bytes->data(), tensor.keep_alive = bytes;
  return tensor;
}

/// The numbers of a tensor of a case, in double and its own, to be changed; none: not there.
using Numbers = Eigen::Map<Eigen::ArrayXd>;
inline Numbers numbers(Case& c, const std::string& name) {
  const auto found = c.file.tensors.find(name);
  if (found == c.file.tensors.end()) return {nullptr, 0};
  found->second = to_dtype(found->second, DType::F64);
  return {static_cast<double*>(const_cast<void*>(found->second.data)),
          static_cast<Index>(found->second.size())};
}

// ================================ 3. The reference by name =======================================

using Named = std::map<std::string, Matrix<Bounded>>;

inline ssm::View<Bounded> view(const Named& in, const char* name) {
  const auto found = in.find(name);
  return found == in.end() ? ssm::View<Bounded>() : ssm::View<Bounded>(found->second);
}

inline ssm::ScanInputs<Bounded> scan_inputs(const Case& c, const Named& in,
                                            const ssm::StateMatrix<Bounded>& A) {
  ssm::ScanInputs<Bounded> s;
  s.x = view(in, "u"), s.delta = view(in, "delta"), s.A = A, s.B = view(in, "B");
  s.C = view(in, "C"), s.D = view(in, "D"), s.z = view(in, "z");
  s.delta_bias = view(in, "delta_bias"), s.delta_softplus = c.softplus;
  return s;
}

inline ssm::SsdInputs<Bounded> ssd_inputs(const Case& c, const Named& in,
                                          const ssm::StateMatrix<Bounded>& A) {
  ssm::SsdInputs<Bounded> s;
  s.x = view(in, "x"), s.dt = view(in, "dt"), s.A = A, s.B = view(in, "B"), s.C = view(in, "C");
  s.D = view(in, "D"), s.dt_bias = view(in, "dt_bias"), s.dt_softplus = c.softplus;
  return s;
}

/// The operation on the inputs, by name. `state` advances. The forms are the sequential ones:
/// rounding is bounded along the recurrence itself.
inline Matrix<Bounded> forward(const Case& c, const Named& in, Matrix<Bounded>& state) {
  const std::string op = c.op->name;
  if (op == "causal_conv1d") {
    const Matrix<Bounded> y =
        ssm::causal_conv1d<Bounded>(view(in, "x"), view(in, "weight"), view(in, "bias"), state);
    return c.silu ? Matrix<Bounded>(ssm::silu(y.array())) : y;
  }
  if (!c.op->split) {
    const ssm::Row<Bounded> weight = in.at("weight").row(0);
    if (op == "rms_norm") return ssm::rms_norm<Bounded>(in.at("x"), weight, c.eps);
    return ssm::gated_rms_norm<Bounded>(in.at("x"), view(in, "z"), weight, c.eps, c.norm_groups);
  }
  const ssm::StateMatrix<Bounded> A = in.at("A");
  ssm::StateMatrix<Bounded> h = state;
  const Matrix<Bounded> y = op == "ssd"
                                ? ssm::ssd_sequential<Bounded>(ssd_inputs(c, in, A), h)
                                : ssm::selective_scan_sequential<Bounded>(scan_inputs(c, in, A), h);
  state = h;
  return y;
}

inline Named conv_backward(const Case& c, const Named& in, const Matrix<Bounded>& state,
                           Matrix<Bounded> dy, Matrix<Bounded>& dstate) {
  if (c.silu) {
    Matrix<Bounded> end = state;
    const Matrix<Bounded> y =
        ssm::causal_conv1d<Bounded>(view(in, "x"), view(in, "weight"), view(in, "bias"), end);
    dy.array() *= ssm::silu_derivative(y.array());
  }
  const auto g = ssm::causal_conv1d_backward<Bounded>(view(in, "x"), view(in, "weight"),
                                                      view(in, "bias"), state, dy, dstate);
  return {{"x", g.x}, {"weight", g.weight}, {"bias", g.bias}};
}

inline Named norm_backward(const Case& c, const Named& in, const Matrix<Bounded>& dout) {
  const ssm::Row<Bounded> weight = in.at("weight").row(0);
  if (c.op->name == std::string("rms_norm")) {
    const auto g = ssm::rms_norm_backward<Bounded>(in.at("x"), weight, c.eps, dout);
    return {{"x", g.x}, {"weight", g.weight}};
  }
  const auto g = ssm::gated_rms_norm_backward<Bounded>(in.at("x"), view(in, "z"), weight, c.eps,
                                                       c.norm_groups, dout);
  return {{"x", g.y}, {"z", g.z}, {"weight", g.weight}};
}

/// The gradient of every input, by the input's name. `dstate` goes from the end to the start.
inline Named backward(const Case& c, const Named& in, const Matrix<Bounded>& state,
                      Matrix<Bounded>& dstate) {
  const Matrix<Bounded>& dout = in.at(gradient(c.op->out));
  if (!c.op->split) return norm_backward(c, in, dout);
  if (c.op->name == std::string("causal_conv1d")) return conv_backward(c, in, state, dout, dstate);
  const ssm::StateMatrix<Bounded> A = in.at("A"), h0 = state;
  ssm::StateMatrix<Bounded> dh = dstate;
  Named all;
  if (c.op->split == 'h') {
    const auto g = ssm::ssd_sequential_backward<Bounded>(ssd_inputs(c, in, A), h0, dout, dh);
    all = {{"x", g.x}, {"dt", g.dt},          {"A", g.A}, {"B", g.B}, {"C", g.C},
           {"D", g.D}, {"dt_bias", g.dt_bias}};
  } else {
    const auto g = ssm::selective_scan_backward<Bounded>(scan_inputs(c, in, A), h0, dout, dh);
    all = {{"u", g.x}, {"delta", g.delta}, {"A", g.A}, {"B", g.B},
           {"C", g.C}, {"D", g.D},         {"z", g.z}, {"delta_bias", g.delta_bias}};
  }
  dstate = dh;
  return all;
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
/// length but for the states in which pieces begin. Or fills the outputs of the file with it.
class Judge {
 public:
  explicit Judge(const Case& c, bool fills = false)
      : case_(c), fills_(fills), length_(c.extent.at('t')), piece_(piece()) {
    for (const auto& [name, part] : c.outputs())
      if (const Tensor* tensor = c.file.find(name)) open(part, name, *tensor);
    if (gradients_) c.file.at(gradient(c.op->out));
  }

  Verdicts run() {
    const bool any = std::any_of(verdicts_.begin(), verdicts_.end(),
                                 [](const auto& named) { return named.second.is_shaped; });
    for (Index b = 0; any && b < case_.extent.at('b'); ++b) run_sequence(b);
    for (const auto& [name, sum] : sums_) compare(name, {0, 0, length_, 0, case_.splits()}, sum);
    return std::move(verdicts_);
  }

 private:
  void open(const Part& part, const std::string& name, const Tensor& tensor) {
    Verdict v{part, rule(case_.dtype)};
    // A state of the scan that is stored as float was never anything else; that of an ssd may have
    // been summed from factors rounded for a matrix unit.
    const bool is_scans_state = case_.op->name == std::string("selective_scan") && name == "hT";
    if (is_scans_state && tensor.dtype <= DType::F32 && case_.dtype > DType::F32)
      v.rule = rule(DType::F32);
    v.is_shaped = tensor.shape == case_.shape(part) && tensor.dtype <= DType::BF16;
    if (!v.is_shaped) {
      v.worst = std::numeric_limits<double>::infinity(), v.got = v.expected = std::nan("");
      v.hint = "expected real numbers of shape " + shape_text(case_.shape(part)) + ", found " +
               dtype_name(tensor.dtype) + " " + shape_text(tensor.shape);
    }
    for (const char* c = part.file; *c; ++c) v.wrong_at[*c].resize(case_.extent.at(*c));
    gradients_ |= name[0] == 'd';
    verdicts_.emplace(name, std::move(v));
  }

  /// Some channels of a group, or a head, or all.
  std::vector<Slice> units(Index b) const {
    constexpr Index kChannels = 16;
    const Index all = case_.splits(), group = all / case_.groups();
    const Index width = case_.op->split == 'd' ? std::min(kChannels, group) : 1;
    std::vector<Slice> units;
    for (Index g = 0; g < all; g += group)
      for (Index s = 0; s < group; s += width)
        units.push_back({b, 0, 0, g + s, std::min(width, group - s)});
    return units;
  }
  /// Tokens that are walked at once: their states stay in the cache.
  Index piece() const {
    if (case_.flaws.chunk > 0) return case_.flaws.chunk;
    Index state = 64;
    if (case_.op->split == 'd' && case_.extent.count('n')) state = 16 * case_.extent.at('n');
    if (case_.op->split == 'h') state = case_.extent.at('p') * case_.extent.at('n');
    return std::clamp<Index>((1 << 18) / state, 32, 2048);
  }

  /// Inputs and cotangents of a slice, states included: those that are not there are zero.
  Named source(const Slice& slice) const {
    Named in;
    const auto add = [&](const Part& part, const std::string& name) {
      const Block block = case_.block(part, slice);
      if (const Tensor* tensor = case_.file.find(name)) in[name] = read(*tensor, block);
      const bool is_state = case_.op->end && !part.has('t') && part.has('b');
      if (is_state && !in.count(name)) in[name] = Matrix<Bounded>::Zero(block.rows, block.cols);
    };
    for (const Part& part : case_.op->inputs) add(part, part.name);
    add(case_.op->out, gradient(case_.op->out));
    if (case_.op->end) add(*case_.op->end, gradient(*case_.op->end));
    return in;
  }

  /// Forward through all pieces and, for gradients, back; each unit for itself.
  void run_sequence(Index b) {
    const Operation& op = *case_.op;
    const std::vector<Slice> all = units(b);
    const Index n = static_cast<Index>(all.size()), pieces = (length_ + piece_ - 1) / piece_;
    std::vector<std::vector<Matrix<Bounded>>> starts(n);  // of unit, of piece: the state before it
    std::vector<Matrix<Bounded>> dh(n);
    const auto at = [&](Index unit, Index i) {
      Slice slice = all[unit];
      slice.t = i * piece_, slice.t_count = std::min(piece_, length_ - slice.t);
      return slice;
    };
    tbb::parallel_for(Index{0}, n, [&](Index u) {
      Matrix<Bounded> h;
      if (op.end) h = source(at(u, 0)).at(op.start->name);
      if (op.end) dh[u] = source(at(u, 0)).at(gradient(*op.end));
      for (Index i = 0; i < pieces; ++i) {
        if (case_.flaws.loses_state && i > 0) h.setZero();
        if (gradients_) starts[u].push_back(h);
        take(op.out.name, at(u, i), forward(case_, source(at(u, i)), h));
        if (case_.flaws.state_dtype) round_to(*case_.flaws.state_dtype, h);
      }
      if (op.end) take(op.end->name, at(u, 0), h);
    });
    for (Index i = gradients_ ? pieces : 0; i-- > 0;) {
      tbb::parallel_for(Index{0}, n, [&](Index u) {
        const bool loses = case_.flaws.loses_state || case_.flaws.loses_gradient;
        if (loses && i + 1 < pieces) dh[u].setZero();
        for (const auto& [name, d] : backward(case_, source(at(u, i)), starts[u][i], dh[u]))
          if (d.size() > 0) take("d" + name, at(u, i), d);
        starts[u].pop_back();
        if (i == 0 && op.start) take(gradient(*op.start), at(u, 0), dh[u]);
      });
      Slice whole = at(0, i);  // dB and dC are sums over the units of a group
      whole.s = 0, whole.s_count = case_.splits();
      for (const auto& [name, sum] : group_sums_) compare(name, whole, sum);
      group_sums_.clear();
    }
  }

  static void round_to(DType dtype, Matrix<Bounded>& m) {
    for (Bounded& v : m.reshaped())
      v.value =
          dtype == DType::F16 ? double(Eigen::half(v.value)) : double(Eigen::bfloat16(v.value));
  }

  /// An output of a slice. What several units or sequences give to one output is added up first.
  void take(const std::string& name, const Slice& slice, const Matrix<Bounded>& m) {
    const auto found = verdicts_.find(name);
    if (found == verdicts_.end() || !found->second.is_shaped) return;
    const Part& part = found->second.part;
    const std::lock_guard<std::mutex> lock(mutex_);
    if (part.has('b') && !part.has('g')) return compare(name, slice, m);
    const Block block = case_.block(part, slice);
    Matrix<Bounded>& sum = (part.has('b') ? group_sums_ : sums_)[name];
    if (sum.size() == 0)
      sum = Matrix<Bounded>::Zero(part.has('b') ? m.rows() : case_.all(part.rows),
                                  case_.all(part.cols));
    sum.block(part.has('b') ? 0 : block.row, block.col, m.rows(), m.cols()) += m;
  }

  void compare(const std::string& name, const Slice& slice, const Matrix<Bounded>& want) {
    Verdict& v = verdicts_.at(name);
    const Tensor& tensor = case_.file.at(name);
    const Block block = case_.block(v.part, slice);
    const Index padding = std::max<Index>(0, slice.t + slice.t_count - case_.judged);
    const Index rows = want.rows() - (*v.part.rows == 't' ? padding : 0);
    if (fills_) return fill(tensor, block, want);
    const Matrix<Bounded> got = read(tensor, block);
    for (Index r = 0; r < rows; ++r)
      for (Index c = 0; c < want.cols(); ++c)
        compare(v, got(r, c).value, want(r, c), block.index(r, c));
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
  static void fill(const Tensor& tensor, const Block& block, const Matrix<Bounded>& want) {
    auto* values = static_cast<double*>(const_cast<void*>(tensor.data));
    for (Index r = 0; r < want.rows(); ++r)
      for (Index c = 0; c < want.cols(); ++c) values[block.index(r, c)] = want(r, c).value;
  }

  const Case& case_;
  const bool fills_;
  const Index length_, piece_;
  bool gradients_ = false;
  Verdicts verdicts_;
  Named group_sums_, sums_;  // over the units of a group, in a piece; over all sequences
  std::mutex mutex_;
};

/// Adds the outputs themselves to a case, in double.
inline void add_expected(Case& c) {
  for (const auto& [name, part] : c.outputs())
    c.file.tensors[name] = empty_tensor(name, DType::F64, c.shape(part));
  Judge(c, true).run();
}

// ================================ 5. The suite ===================================================

/// Normal random numbers, the same on every platform's std::mt19937_64 (Box-Muller by hand).
class Random {
 public:
  explicit Random(std::uint64_t seed) : bits_(seed) {}
  double uniform() { return static_cast<double>(bits_() >> 11) * 0x1p-53; }
  double normal() {
    return std::sqrt(-2 * std::log(1 - uniform())) * std::cos(6.283185307179586 * uniform());
  }

 private:
  std::mt19937_64 bits_;
};

/// What the numbers of a case are like.
enum class Style {
  usual,
  no_decay,
  weak_decay,
  total_decay,
  tiny_delta,
  huge_delta,
  scales,
  positive
};

struct Recipe {
  const Operation* op;
  std::string label;
  std::map<char, Index> extent;
  unsigned options = ~0u;  // bits: the optional inputs, in order; the next: softplus or silu
  Style style = Style::usual;

  bool option(std::size_t bit) const { return options >> bit & 1; }
};

/// One value of an input; channel: the index in the split letter.
inline double draw(Random& random, const Recipe& r, const std::string& name, bool softplus,
                   Index channel) {
  const double v = random.normal();
  const bool raw = softplus;
  if (name == "A") {
    if (r.style == Style::no_decay || r.style == Style::positive) return -1e-9 * std::abs(v);
    if (r.style == Style::weak_decay) return -1e-3 * std::abs(v);
    return (r.style == Style::total_decay ? -1e4 : -2) * (std::abs(v) + 0.01);
  }
  if (name == "delta" || name == "dt") {
    if (r.style == Style::tiny_delta) return raw ? v - 14 : 1e-6 * std::abs(v);
    if (r.style == Style::huge_delta)  // beyond 89 exp overflows in float
      return raw ? 5 * v + (v > 1.5 ? 85 : 20) : 30 * std::abs(v);
    if (r.style == Style::positive || r.style == Style::no_decay)
      return raw ? v / 4 - 6 : 3e-3 * std::abs(v);
    return raw ? v - 1 : 0.3 * std::abs(v);
  }
  if (name == "delta_bias" || name == "dt_bias")
    return raw ? v / 2 : r.style == Style::tiny_delta ? 1e-6 * std::abs(v) : 0.1 * std::abs(v);
  if (name == "u" || name == "x") {
    if (r.style == Style::scales) return v * std::pow(10, static_cast<double>(channel % 7) / 2 - 2);
  }
  return r.style == Style::positive ? std::abs(v) : v;
}

/// A tensor of a case, drawn and rounded to its dtype.
inline Tensor draw(Random& random, const Recipe& r, const Part& part, const std::string& name,
                   bool softplus, DType dtype) {
  Tensor tensor{name, DType::F64, {}, nullptr, nullptr};
  Index inner = 1;  // values for each value of the split letter
  for (const char* c = part.file; *c; ++c) {
    tensor.shape.push_back(r.extent.at(*c));
    inner = *c == r.op->split || (!r.op->split && *c == 'd') ? 1 : inner * r.extent.at(*c);
  }
  const Index channels = r.extent.at(r.op->split ? r.op->split : 'd');
  std::vector<double> values(tensor.size());
  for (std::size_t i = 0; i < values.size(); ++i)
    values[i] = draw(random, r, name, softplus, static_cast<Index>(i) / inner % channels);
  tensor.data = values.data();
  return to_dtype(tensor, part.stays_float && dtype != DType::F64 ? DType::F32 : dtype);
}

/// The case as a file in memory: inputs, cotangents and options.
inline Checkpoint make_case(Recipe r, DType dtype, std::uint64_t seed) {
  Random random(seed);
  Checkpoint file;
  file.where = r.label;
  if (r.extent.count('w')) r.extent['v'] = r.extent['w'] - 1;
  std::size_t optional = 0;
  for (const Part& part : r.op->inputs) optional += part.optional;
  const std::string op = r.op->name;
  const bool last = r.option(optional), softplus = op == "ssd" || (op == "selective_scan" && last);
  const auto add = [&](const Part& part, const std::string& name) {
    file.tensors[name] = draw(random, r, part, name, softplus, dtype);
  };
  std::size_t bit = 0;
  for (const Part& part : r.op->inputs)
    if (!part.optional || r.option(bit++)) add(part, part.name);
  add(r.op->out, gradient(r.op->out));
  if (r.op->end) add(*r.op->end, gradient(*r.op->end));
  file.metadata = {{"kind", op}};
  if (r.op->split && op != "causal_conv1d") file.metadata["softplus"] = softplus ? "1" : "0";
  if (op == "causal_conv1d") file.metadata["silu"] = last ? "1" : "0";
  if (!r.op->split) file.metadata["eps"] = "1e-5";
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
  for (const Part& part : op.inputs) choices += part.optional, letters += part.file;
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
void reorder(Case& c, const std::string& name, const Part& part, char letter, Index extent,
             const From& from) {
  const Numbers old = numbers(c, name);
  if (!old.data()) return;
  Tensor& tensor = c.file.tensors.at(name);
  const auto axis = static_cast<std::size_t>(std::strchr(part.file, letter) - part.file);
  const Index n = tensor.shape[axis];
  Index inner = 1;
  for (std::size_t i = axis + 1; i < tensor.shape.size(); ++i) inner *= tensor.shape[i];
  const Tensor before = std::exchange(tensor, empty_tensor(name, DType::F64, [&] {
                                        Shape shape = tensor.shape;
                                        return shape[axis] = extent, shape;
                                      }()));
  auto* to = static_cast<double*>(const_cast<void*>(tensor.data));
  for (Index a = 0; a < old.size() / (n * inner); ++a)
    for (Index i = 0; i < extent; ++i)
      for (Index k = 0; k < inner; ++k, ++to) {
        const Index j = from(i);
        *to = j < 0 ? 0 : old[(a * n + j) * inner + k];
      }
}

/// The same for every tensor of the case that has the letter.
template <class From>
void reorder_all(Case& c, char letter, Index extent, const From& from) {
  for (const auto& [name, part] : all_parts(*c.op))
    if (part.has(letter)) reorder(c, name, part, letter, extent, from);
}

inline Change times(const char* name, double by) {
  return [=](Case& c) { return (numbers(c, name) *= by).size() > 0; };
}
inline Change drop(const char* name) {
  return [=](Case& c) { return c.file.tensors.erase(name) > 0; };
}
inline Change values_are(const char* name, double (*f)(double)) {
  return [=](Case& c) {
    for (double& v : numbers(c, name)) v = f(v);
    return c.file.find(name) != nullptr;
  };
}
template <class T>
Change set(T Case::*option, T value) {  // it was another
  return [=](Case& c) { return std::exchange(c.*option, value) != value; };
}
inline Change state_in(DType dtype) {
  return [=](Case& c) { return c.flaws.chunk = 1, c.flaws.state_dtype = dtype, true; };
}
inline Change lost(bool Flaws::*what, Index K) {
  return [=](Case& c) { return c.flaws.chunk = K, c.flaws.*what = true, K < c.judged; };
}

/// What stands at the end where a shifted tensor has no value.
enum class Edge { zero, same, wrapped };
inline Change shifted(const char* name, Index by, Edge edge) {
  return [=](Case& c) {
    const Index L = c.judged;
    const auto from = [=](Index t) {
      const Index s = t - by;
      if (edge == Edge::wrapped) return (s + L) % L;
      return s >= 0 && s < L ? s : edge == Edge::same ? t : -1;
    };
    reorder(c, name, all_parts(*c.op).at(name), 't', L, from);
    return L > 1 && c.file.find(name);
  };
}

/// The groups one behind another again and again (0 1 0 1) instead of side by side (0 0 1 1): the
/// reference is right for channels put in another order, as those of a group are neighbours there.
inline bool repeat_groups(Case& c) {
  const Index G = c.groups(), S = c.splits(), width = S / G;
  if (G == 1 || G == S) return false;
  reorder_all(c, c.op->split, S, [=](Index s) { return s % width * G + s / width; });
  return true;
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
  const Part &step = c.op->inputs[1], bias = all_parts(*c.op).at(step.name + std::string("_bias"));
  Numbers delta = numbers(c, step.name);
  const Numbers add = numbers(c, bias.name);
  const Index S = c.splits(), inner = c.op->split == 'd' ? c.extent.at('t') : 1;
  for (Index i = 0; i < delta.size(); ++i) {
    if (add.data()) delta[i] += add[i / inner % S];
    if (c.softplus) delta[i] = softplus_of(delta[i]);
  }
  if (add.data()) numbers(c, bias.name) *= 0;
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
  Numbers delta = numbers(c, c.op->inputs[1].name);
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

/// A gate by which the output is multiplied at its end: without it, the output is that of z = no_z.
inline Change gated_by(double (*gate)(double), double no_z) {
  return [=](Case& c) {
    Numbers z = numbers(c, "z"), out = numbers(c, "out");
    if (!z.data()) return false;
    for (Index i = 0; i < out.size(); ++i) out[i] = z[i] == 0 ? 0 : out[i] / gate(z[i]);
    z = z.unaryExpr([=](double v) { return v == 0 ? 0 : no_z; });
    return true;
  };
}
inline double silu_of(double v) { return v / (1 + std::exp(-v)); }
constexpr double kOpen = 1.2784645427610738;  // silu of it is 1

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
    {kScans, "h0 is ignored", times("h0", 0)},
    {kScans, "dhT is ignored", times("dhT", 0)},
    {"causal_conv1d", "initial_states is ignored", times("initial_states", 0)},
    {"causal_conv1d", "dfinal_states is ignored", times("dfinal_states", 0)},
    {"selective_scan", "delta_bias is ignored", times("delta_bias", 0)},
    {"selective_scan", "delta_bias is added twice", times("delta_bias", 2)},
    {"ssd", "dt_bias is ignored", times("dt_bias", 0)},
    {"ssd", "dt_bias is added twice", times("dt_bias", 2)},
    {"causal_conv1d", "bias is ignored", times("bias", 0)},
    {"causal_conv1d", "bias is added twice", times("bias", 2)},
    {kScans, "softplus is not applied", set(&Case::softplus, false)},
    {kScans, "softplus is applied where it is not asked for", set(&Case::softplus, true)},
    {kScans, "softplus is applied twice", softplus_twice},
    {kScans, "softplus is log(1 + exp(v)), and exp overflows", softplus_overflows},
    {kScans, "A_log is used as A", values_are("A", [](double a) { return std::log(-a); })},
    {kScans, "A is used as A_log", values_are("A", [](double a) { return -std::exp(a); })},
    {kScans, "A has lost its sign", times("A", -1)},
    {"selective_scan", "the gate comes before D: y silu(z) + D x", gate_first},
    {"selective_scan", "the gate has no sigmoid: y z, not y silu(z)",
     gated_by([](double z) { return z; }, kOpen)},
    {"selective_scan", "the gate is the sigmoid alone, not silu(z)",
     gated_by([](double z) { return silu_of(z) / z; }, kOpen)},
    {kScans, "D is ignored", times("D", 0)},
    {kScans, "D x is added twice", times("D", 2)},
    {"selective_scan", "z is ignored", drop("z")},
    {"selective_scan", "B is discretized by the exact zero-order hold, not as delta B", exact_zoh},
    {kScans, "the state is stored in bfloat16", state_in(DType::BF16)},
    {kScans, "the state is stored in float16", state_in(DType::F16)},
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
    {"gated_rms_norm", "the gate comes after the norm", gated_by(silu_of, kOpen)},
    {kNorms, "weight is used as 1 + weight", values_are("weight", [](double w) { return 1 + w; })},
    {"rms_norm", "the mean is subtracted, as in a layer norm", center}};

/// The bugs to try on a case; with chunks of powers of two and of the lengths that are given, the
/// longest first.
inline std::vector<Bug> bugs(const Case& c, std::set<Index> chunks) {
  std::vector<Bug> all;
  const auto add = [&](const Bug& bug) {
    if (is_of(bug.of, *c.op)) all.push_back(bug);
  };
  for (const Bug& bug : kBugs) add(bug);
  for (const Part& part : c.op->inputs)
    for (const Index by : {1, -1})
      for (const Edge edge : {Edge::zero, Edge::same, Edge::wrapped})
        if (part.has('t'))
          add({kStates,
               part.name + std::string(by > 0 ? " is one token late" : " is one token early"),
               shifted(part.name, by, edge)});
  for (Index K = 2; K <= 4096; K *= 2) chunks.insert(K);
  for (auto K = chunks.rbegin(); K != chunks.rend() && *K > 1; ++K) {
    const std::string n = std::to_string(*K), at = " lost at every boundary of chunks of " + n;
    add({kStates, "the state is" + at, lost(&Flaws::loses_state, *K)});
    add({kStates, "the gradient of the state is" + at, lost(&Flaws::loses_gradient, *K)});
    add({kScans, "the tail of the last " + n + " tokens is not masked: the state goes on",
         padded_to(*K)});
  }
  return all;
}

/// Which values of one letter are wrong, where only some are: "only d 5", "t from 64 on", ...
inline std::string places(char letter, const std::vector<Index>& wrong) {
  std::vector<Index> at;
  for (std::size_t i = 0; i < wrong.size(); ++i)
    if (wrong[i] > 0) at.push_back(static_cast<Index>(i));
  const Index n = static_cast<Index>(wrong.size()), count = static_cast<Index>(at.size());
  if (count == 0 || count == n) return "";
  const std::string name(1, letter);
  if (count == 1) return "only " + name + " " + std::to_string(at[0]);
  const Index first = at.front(), last = at.back(), period = at[1] - first;
  if (last - first + 1 == count) {
    if (last == n - 1) return name + " from " + std::to_string(first) + " on";
    return name + " " + std::to_string(first) + " to " + std::to_string(last);
  }
  bool regular = count > 2;
  for (Index i = 0; i < count; ++i) regular = regular && at[i] == first + i * period;
  if (regular)
    return "every " + std::to_string(period) + "th " + name + " from " + std::to_string(first);
  for (Index lanes = 8; lanes <= 256 && lanes < n; lanes *= 2) {  // groups of lanes of a block
    std::set<Index> in_block;
    for (const Index i : at) in_block.insert(i % lanes);
    const Index low = *in_block.begin(), high = *in_block.rbegin(), size = in_block.size();
    if (size == high - low + 1 && size < lanes && count >= n / lanes * size)
      return name + " " + std::to_string(low) + " to " + std::to_string(high) + " of every " +
             std::to_string(lanes);
  }
  return std::to_string(count) + " of " + std::to_string(n) + " " + name + " from " +
         std::to_string(first);
}

inline std::string pattern(const Verdict& v) {
  std::string text;
  for (const char* c = v.part.file; *c; ++c)
    if (const std::string part = places(*c, v.wrong_at.at(*c)); !part.empty())
      text += (text.empty() ? "wrong: " : ", ") + part;
  return text;
}

/// Lengths of chunks at whose boundaries something may be lost: forward the first wrong token
/// begins the second chunk; backward the last one ends a chunk.
inline void add_suspects(const std::vector<Index>& wrong, std::set<Index>& chunks) {
  std::vector<Index> at;
  for (std::size_t t = 0; t < wrong.size(); ++t)
    if (wrong[t] > 0) at.push_back(static_cast<Index>(t));
  if (at.empty()) return;
  chunks.insert(at.front());
  for (Index K = 2; K <= 64; ++K)
    if ((at.back() + 1) % K == 0) chunks.insert(K);
}

/// Wrong outputs that one and the same bug explains. The lower the rank, the better.
struct Explanation {
  std::string hint;
  std::set<std::string> outputs = {};
  int rank = 0;       // 1: a factor; 2: an output that is right would not be with this bug
  double rms = 0;     // what is left to be explained
  bool whole = true;  // nothing: all of them would be right
  bool operator<(const Explanation& other) const {
    const auto key = [](const Explanation& e) {
      return std::tuple(e.rank, -static_cast<double>(e.outputs.size()), e.rms);
    };
    return key(*this) < key(other);
  }
};

/// Whether a bug explains an output: all of it, or, where roundings fall either way, nearly all.
inline bool explains(const Verdict& with, const Verdict& without, bool rounds) {
  if (!with.is_shaped || !(with.rms() <= without.rms() / 2)) return false;
  return with.worst <= 1 || (with.worst <= 4 && without.worst > 40) ||
         (rounds && without.rms() > 10 && with.rms() < without.rms() / 10);
}

/// The case is judged once more, changed by a bug.
inline Explanation attempt(const Bug& bug, const Case& changed, const Verdicts& verdicts) {
  Explanation found{bug.hint};
  for (const auto& [name, with] : Judge(changed).run()) {
    const Verdict& without = verdicts.at(name);
    if (without.ok() && name[0] != 'd' && !with.ok()) found.rank = 2;
    if (without.ok() || !without.is_shaped) continue;
    if (!explains(with, without, changed.flaws.state_dtype.has_value())) continue;
    found.outputs.insert(name), found.rms += with.rms(), found.whole &= with.ok();
  }
  return found;
}

/// Outputs that are a number times what is right.
inline void add_factors(Case c, const Verdicts& verdicts, std::vector<Explanation>& all) {
  for (const auto& [name, v] : verdicts)
    if (!v.ok() && v.entries >= 16 && std::isfinite(1 / v.scale())) numbers(c, name) /= v.scale();
  for (const std::string& name : attempt({}, c, verdicts).outputs)
    all.push_back(
        {one_line("all of it is ", verdicts.at(name).scale(), " times what is right"), {name}, 1});
}

/// What explains most goes first, and then what explains most of the rest.
inline void assign_hints(std::vector<Explanation> all, Verdicts& verdicts) {
  while (!all.empty()) {
    const Explanation best = *std::min_element(all.begin(), all.end());
    for (const std::string& name : best.outputs) {
      verdicts.at(name).hint = best.hint;
      for (Explanation& other : all) other.outputs.erase(name);
    }
    all.erase(std::remove_if(all.begin(), all.end(),
                             [](const Explanation& e) { return e.outputs.empty(); }),
              all.end());
  }
}

/// Gives each wrong output the bug that explains it best, or else the pattern of its wrong entries.
/// `last`: the bug that explained another case; it is tried first. What explains all is enough.
inline void explain(const Case& c, Verdicts& verdicts, std::string& last) {
  constexpr Index kLargest = 1 << 22;  // steps of a state that are worth trying again and again
  std::size_t wrong = 0;
  std::set<Index> chunks;
  for (auto& [name, v] : verdicts) {
    if (v.ok() || !v.is_shaped) continue;
    const bool unwritten = std::max(v.zeros, v.nans) == v.entries;  // what stood there before
    v.hint = !unwritten ? pattern(v) : v.nans ? "all NaN" : "all zeros";
    wrong += !unwritten;
    if (v.part.has('t')) add_suspects(v.wrong_at.at('t'), chunks);
  }
  Index steps = c.extent.at('b') * c.extent.at('t');
  for (const char letter : {'d', 'h', 'p', 'n'})
    steps *= c.extent.count(letter) ? c.extent.at(letter) : 1;
  if (wrong == 0 || steps > kLargest) return;
  std::vector<Explanation> found;
  add_factors(c, verdicts, found);
  std::vector<Bug> all = bugs(c, chunks);
  std::stable_partition(all.begin(), all.end(), [&](const Bug& bug) { return bug.hint == last; });
  for (const Bug& bug : all) {
    Case changed = c;
    changed.is_guess = true;
    if (!bug.change(changed)) continue;
    const Explanation e = attempt(bug, changed, verdicts);
    if (e.outputs.empty()) continue;
    found.push_back(e);
    if (e.outputs.size() == wrong && e.rank == 0 && e.whole) break;
  }
  if (found.empty()) return;
  last = std::min_element(found.begin(), found.end())->hint;
  assign_hints(std::move(found), verdicts);
}

// ================================ 7. Doors =======================================================

/// The dtype in which a kernel gives an output back.
inline DType output_dtype(const Case& c, const Part& part) {
  return part.stays_float && c.dtype != DType::F64 ? DType::F32 : c.dtype;
}

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

inline Tensor read_bin(const std::string& path, const std::string& name, DType dtype, Shape shape) {
  const MappedFile file(path);
  Tensor tensor{name, dtype, std::move(shape), file.bytes().data(), file.memory()};
  const std::uint64_t size = checked_bytes(tensor.shape, dtype, path);
  if (file.bytes().size() != size)
    fail("wrong size: ", path, ": expected ", size, " bytes for ", dtype_name(dtype), " ",
         shape_text(tensor.shape), ", found ", file.bytes().size());
  return tensor;
}

/// Outputs need no line: their shapes are known, and the size of the file says how many bits.
inline Checkpoint read_raw(const std::string& folder) {
  Checkpoint file;
  file.where = folder;
  std::istringstream shapes(read_file(folder + "/shapes.txt"));
  for (std::string line; std::getline(shapes, line);) {
    std::istringstream words(line);
    std::string name, second;
    if (!(words >> name)) continue;
    words >> second;
    const auto dtype = find_dtype(second, &DTypeInfo::name);
    if (!dtype) {
      file.metadata[name] = second;
      continue;
    }
    Shape shape;
    for (std::int64_t extent; words >> extent;) shape.push_back(extent);
    file.tensors[name] = read_bin(folder + "/" + name + ".bin", name, *dtype, shape);
  }
  const Case c(folder, file);
  for (const auto& [name, part] : c.outputs()) {
    const std::string path = folder + "/" + name + ".bin";
    Tensor tensor{name, output_dtype(c, part), c.shape(part), nullptr, nullptr};
    if (file.find(name) || !std::filesystem::exists(path)) continue;
    const std::uint64_t size = MappedFile(path).bytes().size();
    for (const DType dtype : {DType::F64, DType::F32})
      if (size == tensor.size() * dtype_size(dtype)) tensor.dtype = dtype;
    file.tensors[name] = read_bin(path, name, tensor.dtype, tensor.shape);
  }
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
      std::vector<Tensor> tensors, outputs;
      const auto add = [&](const std::string& name) {
        if (const Tensor* tensor = c.file.find(name))
          tensors.push_back(*tensor), tensors.back().name = name;
      };
      for (const Part& part : c.op->inputs) add(part.name);
      if (backward) add(gradient(c.op->out));
      if (backward && c.op->end) add(gradient(*c.op->end));
      for (const auto& [name, part] : c.outputs())
        if (backward == (name[0] == 'd'))
          outputs.push_back(empty_tensor(name, output_dtype(c, part), c.shape(part)));
      if (!call(c, backward, tensors, outputs)) continue;
      for (const Tensor& output : outputs) c.file.tensors[output.name] = output;
    }
  }

 private:
  /// False: the kernel says that it does not do such cases.
  bool call(const Case& c, bool backward, std::vector<Tensor> tensors,
            const std::vector<Tensor>& outputs) const {
    tensors.insert(tensors.end(), outputs.begin(), outputs.end());
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
    const double numbers[] = {
        c.eps, static_cast<double>(c.silu),
        c.op->split ? 0 : static_cast<double>(c.extent.at('d') / c.norm_groups)};
    const char* names[] = {"eps", "silu", "group_size"};
    for (int i = 0; i < 3; ++i)
      if (c.file.metadata.count(names[i]))
        described.push_back({names[i], const_cast<double*>(&numbers[i]), VERIFY_F64, 0, {}, {}});
    const ::call call{c.op->name,
                      c.softplus,
                      backward,
                      Memory::kDevice,
                      static_cast<std::int32_t>(described.size()),
                      nullptr,
                      described.data()};
    const int status = run_(&call);
    if (status != VERIFY_DONE && status != VERIFY_UNSUPPORTED)
      fail("verify_kernel: ", c.name, ": expected 0 or ", VERIFY_UNSUPPORTED, ", found ", status);
    for (std::size_t i = tensors.size() - outputs.size(); i < tensors.size(); ++i)
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
      if (has(op))
        for (const Recipe& r : recipes(op, size == "large")) {
          const std::string number = std::to_string(1000 + all.size()).substr(1);
          all.push_back(r);
          all.back().label = std::string(op.name) + "_" + number + "_" + r.label;
        }
    return all;
  }
  /// Calls use(name, file) for every case.
  template <class Use>
  void for_each(const Use& use) const {
    const std::vector<Recipe> all = chosen();
    for (std::size_t i = 0; i < all.size(); ++i) {
      const DType type = kCaseTypes.at(dtype.empty() ? "f32" : dtype);
      use(all[i].label, make_case(all[i], type, seed * 1'000'003 + i));
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
    for_each([&](const std::string& name, const Checkpoint& file) {
      Case c(name, file);
      if (expected) add_expected(c);
      if (raw) return write_raw(to + name, c.file);
      std::vector<Tensor> tensors;
      for (const auto& [key, tensor] : c.file.tensors) {
        tensors.push_back(tensor);
        tensors.back().name = key;
      }
      write_safetensors(to + name + ".safetensors", tensors, c.file.metadata);
    });
  }

 private:
  /// Somebody's outputs in a file of that name are not written over.
  static void keep_outputs(const Operation& op, const std::string& path) {
    const std::string file = path + ".safetensors";
    const bool exists = std::filesystem::exists(file);
    const Checkpoint found = exists ? read_safetensors(file) : Checkpoint{};
    for (const auto& part : all_parts(op)) {
      const std::string& name = part.first;
      const bool is_input = std::any_of(op.inputs.begin(), op.inputs.end(),
                                        [&](const Part& input) { return input.name == name; });
      const bool is_cotangent = name == gradient(op.out) || (op.end && name == gradient(*op.end));
      if (is_input || is_cotangent) continue;
      if (found.find(name) || std::filesystem::exists(path + "/" + name + ".bin"))
        fail("outputs in the way: ", exists ? file : path, ": ", quote(name),
             ": expected a folder without outputs");
    }
  }
};

/// Judges outputs: of files, or of a kernel that runs now.
template <class Memory>
struct Verify : SuiteFlags {
  std::vector<std::string> paths;
  std::string so;
  bool json = false;
  std::string last;  // the bug that explained something last
  std::size_t judged = 0, wrong = 0, broken = 0;

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
    if (paths.empty())
      for_each([&](const std::string& name, const Checkpoint& file) { judge(Case(name, file)); });
    const std::vector<std::string> files = all_files();
    std::size_t others = 0;
    for (std::size_t i = 0; i < files.size(); ++i) {
      go_on_after(files.size() > 1, [&] {
        const bool raw = std::filesystem::is_directory(files[i]);
        const Case c(std::filesystem::path(files[i]).stem().string(),
                     raw ? read_raw(files[i]) : read_safetensors(files[i]));
        const bool chosen = has(*c.op) && (dtype.empty() || kCaseTypes.at(dtype) == c.dtype);
        chosen ? judge(c) : void(++others);
      });
      show_progress(static_cast<Index>(i + 1), static_cast<Index>(files.size()));
    }
    conclude(files.size(), others);
  }

 private:
  /// A broken file is one line, and the next one is read; the only one is the end.
  template <class Do>
  void go_on_after(bool many, const Do& one) {
    try {
      one();
    } catch (const std::runtime_error& error) {
      if (!many) throw;
      warn(error.what()), ++broken;
    }
  }
  void conclude(std::size_t files, std::size_t others) const {
    if (files > 0 && others == files)
      fail("no cases: expected some of --op and --dtype, found ", files, " others");
    if (broken > 0)
      fail(broken, " of ", files, " files are broken; ", wrong, " of ", judged,
           " tensors are beyond the bound");
    if (judged == 0)
      fail("nothing to judge: expected outputs (out, hT, gradients) beside the inputs, found none");
    if (wrong > 0) fail(wrong, " of ", judged, " tensors are beyond the bound");
    if (!json) std::cout << "all " << judged << " tensors are within the bound\n";
  }
  std::vector<std::string> all_files() const {
    std::vector<std::string> files;
    const auto is_raw = [](const std::filesystem::path& path) {
      return exists(path / "shapes.txt");
    };
    for (const std::string& path : paths) {
      if (!std::filesystem::is_directory(path) || is_raw(path)) {
        files.push_back(path);
        continue;
      }
      const std::size_t before = files.size();
      for (const auto& entry : std::filesystem::directory_iterator(path))
        if (entry.path().extension() == ".safetensors" || is_raw(entry.path()))
          files.push_back(entry.path().string());
      std::sort(files.begin() + static_cast<std::ptrdiff_t>(before), files.end());
      if (files.size() == before)
        fail("no cases: ", path, ": expected .safetensors files or raw cases");
    }
    return files;
  }
  void report(const Case& c) {
    const auto parts = all_parts(*c.op);
    for (const auto& named : c.file.tensors)
      if (!parts.count(named.first))
        warn(one_line(c.file.where, ": ", quote(named.first), ": not a tensor of ", c.op->name));
    Verdicts verdicts = Judge(c).run();
    explain(c, verdicts, last);
    for (const auto& [name, v] : verdicts) {
      ++judged, wrong += !v.ok();
      const std::vector<Index> index =
          v.is_shaped ? unravel(v.at, c.shape(v.part)) : std::vector<Index>();
      json ? print_json(c.name, name, v, index) : print_row(c.name, name, v, index);
    }
  }
  static void print_json(const std::string& file, const std::string& tensor, const Verdict& v,
                         const std::vector<Index>& index) {
    const double largest = std::numeric_limits<double>::max();  // JSON has no infinity
    const nlohmann::ordered_json line = {
        {"file", file},           {"tensor", tensor},
        {"ok", v.ok()},           {"worst", std::min(v.worst, largest)},
        {"index", index},         {"got", v.got},
        {"expected", v.expected}, {"hint", v.hint}};
    std::cout << line << std::endl;
  }
  /// case, tensor, the worst error in units of the bound; of a wrong one where, what, and a hint
  static void print_row(const std::string& file, const std::string& tensor, const Verdict& v,
                        const std::vector<Index>& index) {
    std::cout << std::left << std::setw(44) << file << ' ' << std::setw(12) << tensor << std::right
              << std::setw(10) << std::setprecision(3) << v.worst << (v.ok() ? "  ok" : "  WRONG");
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
