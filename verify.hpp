// verify.hpp - is this kernel right? Cases that break real ones, truth, bound, verdict.
//
//   1. A number that knows its bound    ssm_reference.hpp run on it gives truth and bound at once
//   2. Operations and cases             names, layouts and options; what a file holds
//   3. The reference by name            forward and backward of every operation
//   4. The suite                        mamba vectors
//   5. The verdict                      every entry of every output, piece by piece
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

inline const Operation* find_operation(const std::string& name) {
  for (const Operation& op : kOperations)
    if (op.name == name) return &op;
  return nullptr;
}

inline std::string gradient(const Part& part) { return std::string("d") + part.name; }

struct Options {
  const Operation* op = nullptr;
  bool softplus = false, silu = false;  // of delta; after the convolution
  double eps = 1e-5;                    // of the norms
  Index norm_groups = 1;
};

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

struct Case : Options {
  std::string name;
  Checkpoint file;
  DType dtype = DType::F32;
  std::map<char, Index> extent;

  Case(std::string name, Checkpoint from);
  Index all(const char* letters) const {
    Index n = 1;
    for (; *letters; ++letters) n *= extent.at(*letters);
    return n;
  }
  Index splits() const { return op->split ? extent.at(op->split) : 1; }
  Index groups() const { return extent.count('g') ? extent.at('g') : 1; }
  Slice whole(Index b) const { return {b, 0, extent.at('t'), 0, splits()}; }
  Shape shape(const Part& part) const {
    Shape shape;
    for (const char* c = part.file; *c; ++c) shape.push_back(extent.at(*c));
    return shape;
  }
  Block block(const Part& part, const Slice& slice) const;
  std::map<std::string, Part> outputs() const;

 private:
  double number(const std::string& key, double otherwise) const;
  void bind(const Part& part, const Tensor& tensor);
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

/// The extents that a tensor gives; those already known must be the same.
inline void Case::bind(const Part& part, const Tensor& tensor) {
  const std::string where = file.where + ": " + quote(part.name);
  const std::size_t n = std::strlen(part.file);
  if (tensor.dtype > DType::BF16)
    fail("wrong dtype: ", where, ": expected F64, F32, F16 or BF16, found ",
         dtype_name(tensor.dtype));
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
}

inline Case::Case(std::string name, Checkpoint from)
    : name(std::move(name)), file(std::move(from)) {
  const std::string kind = file.metadata.count("kind") ? file.metadata.at("kind") : "";
  op = find_operation(kind);
  if (!op)
    fail("bad option: ", file.where,
         ": kind: expected selective_scan, ssd, causal_conv1d, rms_norm ",
         "or gated_rms_norm in the metadata, found ", quote(kind));
  softplus = number("softplus", kind == "ssd") != 0;
  silu = number("silu", 0) != 0;
  eps = number("eps", 1e-5);
  for (const Part& part : op->inputs) {
    const Tensor* tensor = part.optional ? file.find(part.name) : &file.at(part.name);
    if (tensor) bind(part, *tensor);
    if (extent.count('w')) extent['v'] = extent['w'] - 1;
  }
  dtype = file.at(op->inputs[0].name).dtype;
  for (const Part* part : {&op->out, op->end ? &*op->end : nullptr})  // cotangents
    if (const Tensor* tensor = part ? file.find(gradient(*part)) : nullptr) bind(*part, *tensor);
  if (splits() % groups())
    fail("bad shape: ", file.where, ": 'B': expected a divisor of ", splits(), " groups, found ",
         groups());
  if (kind != "gated_rms_norm") return;
  const double size = number("group_size", static_cast<double>(extent['d']));
  norm_groups = size >= 1 ? static_cast<Index>(static_cast<double>(extent['d']) / size) : 0;
  if (norm_groups < 1 ||
      static_cast<double>(norm_groups) * size != static_cast<double>(extent['d']))
    fail("bad option: ", file.where, ": group_size: expected a divisor of ", extent['d'],
         ", found ", size);
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

/// All that a kernel may give back, by name: forward, and the gradient of every input there is.
inline std::map<std::string, Part> Case::outputs() const {
  std::map<std::string, Part> all = {{op->out.name, op->out}};
  if (op->end) all.emplace(op->end->name, *op->end);
  for (const Part& part : op->inputs)
    if (file.find(part.name)) all.emplace(gradient(part), part);
  return all;
}

template <class S>
Matrix<S> read(const Tensor& tensor, const Block& block) {
  Matrix<S> m(block.rows, block.cols);
  with_type(tensor.dtype, [&](auto value) {
    const char* data = static_cast<const char*>(tensor.data);
    for (Index r = 0; r < m.rows(); ++r)
      for (Index c = 0; c < m.cols(); ++c) {
        std::memcpy(&value, data + block.index(r, c) * static_cast<Index>(sizeof value),
                    sizeof value);
        m(r, c) = S(static_cast<double>(value));
      }
  });
  return m;
}

// ================================ 3. The reference by name =======================================

template <class S>
using Named = std::map<std::string, Matrix<S>>;

template <class S>
ssm::View<S> view(const Named<S>& in, const char* name) {
  const auto found = in.find(name);
  return found == in.end() ? ssm::View<S>() : ssm::View<S>(found->second);
}

template <class S>
ssm::ScanInputs<S> scan_inputs(const Options& o, const Named<S>& in, const ssm::StateMatrix<S>& A) {
  ssm::ScanInputs<S> s;
  s.x = view(in, "u"), s.delta = view(in, "delta"), s.A = A, s.B = view(in, "B"),
  s.C = view(in, "C"), s.D = view(in, "D"), s.z = view(in, "z"),
  s.delta_bias = view(in, "delta_bias"), s.delta_softplus = o.softplus;
  return s;
}

template <class S>
ssm::SsdInputs<S> ssd_inputs(const Options& o, const Named<S>& in, const ssm::StateMatrix<S>& A) {
  ssm::SsdInputs<S> s;
  s.x = view(in, "x"), s.dt = view(in, "dt"), s.A = A, s.B = view(in, "B"), s.C = view(in, "C"),
  s.D = view(in, "D"), s.dt_bias = view(in, "dt_bias"), s.dt_softplus = o.softplus;
  return s;
}

/// The operation on the inputs, by name. `state` advances.
template <class S>
Matrix<S> forward(const Options& o, const Named<S>& in, Matrix<S>& state) {
  const std::string op = o.op->name;
  if (op == "causal_conv1d") {
    const Matrix<S> y =
        ssm::causal_conv1d<S>(view(in, "x"), view(in, "weight"), view(in, "bias"), state);
    return o.silu ? Matrix<S>(ssm::silu(y.array())) : y;
  }
  if (op == "rms_norm" || op == "gated_rms_norm") {
    const ssm::Row<S> weight = in.at("weight").row(0);
    if (op == "rms_norm") return ssm::rms_norm<S>(in.at("x"), weight, S(o.eps));
    return ssm::gated_rms_norm<S>(in.at("x"), view(in, "z"), weight, S(o.eps), o.norm_groups);
  }
  const ssm::StateMatrix<S> A = in.at("A");
  ssm::StateMatrix<S> h = state;
  // The sequential form: rounding is bounded along the recurrence itself.
  const Matrix<S> y = op == "ssd" ? ssm::ssd_sequential<S>(ssd_inputs(o, in, A), h)
                                  : ssm::selective_scan_sequential<S>(scan_inputs(o, in, A), h);
  state = h;
  return y;
}

/// The gradient of every input, by the input's name. `dstate` goes from the end to the start.
template <class S>
Named<S> backward(const Options& o, const Named<S>& in, const Matrix<S>& state,
                  const Matrix<S>& dout, Matrix<S>& dstate) {
  const std::string op = o.op->name;
  if (op == "causal_conv1d") {
    Matrix<S> dy = dout;
    if (o.silu) {
      Matrix<S> end = state;
      const Matrix<S> y =
          ssm::causal_conv1d<S>(view(in, "x"), view(in, "weight"), view(in, "bias"), end);
      dy.array() *= ssm::silu_derivative(y.array());
    }
    auto g = ssm::causal_conv1d_backward<S>(view(in, "x"), view(in, "weight"), view(in, "bias"),
                                            state, dy, dstate);
    return {{"x", g.x}, {"weight", g.weight}, {"bias", g.bias}};
  }
  if (op == "rms_norm" || op == "gated_rms_norm") {
    const ssm::Row<S> weight = in.at("weight").row(0);
    if (op == "rms_norm") {
      auto g = ssm::rms_norm_backward<S>(in.at("x"), weight, S(o.eps), dout);
      return {{"x", g.x}, {"weight", g.weight}};
    }
    auto g = ssm::gated_rms_norm_backward<S>(in.at("x"), view(in, "z"), weight, S(o.eps),
                                             o.norm_groups, dout);
    return {{"x", g.y}, {"z", g.z}, {"weight", g.weight}};
  }
  const ssm::StateMatrix<S> A = in.at("A"), h0 = state;
  ssm::StateMatrix<S> dh = dstate;
  Named<S> all;
  if (op == "ssd") {
    auto g = ssm::ssd_sequential_backward<S>(ssd_inputs(o, in, A), h0, dout, dh);
    all = {{"x", g.x}, {"dt", g.dt},          {"A", g.A}, {"B", g.B}, {"C", g.C},
           {"D", g.D}, {"dt_bias", g.dt_bias}};
  } else {
    auto g = ssm::selective_scan_backward<S>(scan_inputs(o, in, A), h0, dout, dh);
    all = {{"u", g.x}, {"delta", g.delta}, {"A", g.A}, {"B", g.B},
           {"C", g.C}, {"D", g.D},         {"z", g.z}, {"delta_bias", g.delta_bias}};
  }
  dstate = dh;
  return all;
}

/// How a sequence is walked: K tokens at a time, each unit (some channels, a head) for itself.
struct Walk {
  std::vector<Slice> units;
  Index length = 0, piece = 1;
  bool gradients = false;
  // Flaws, for hints: the state, or its gradient, lost between pieces; the state stored in 16 bits
  bool loses_state = false, loses_gradient = false;
  std::optional<DType> state_dtype = {};
};

inline void round_to(DType dtype, Matrix<double>& m) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (!std::numeric_limits<T>::is_integer)
      m = m.unaryExpr([](double v) { return static_cast<double>(static_cast<T>(v)); });
  });
}
inline void round_to(DType, Matrix<Bounded>&) {}

/// Forward through all pieces and, for gradients, back. io.source(slice): inputs and cotangents
/// by name, states included; io.take(name, slice, m) gets what comes out, sums in parts;
/// io.finish(slice) says that a piece is complete.
template <class S, class IO>
void walk(const Options& o, const Walk& w, IO& io) {
  const Operation& op = *o.op;
  const Index n = static_cast<Index>(w.units.size()), pieces = (w.length + w.piece - 1) / w.piece;
  std::vector<std::vector<Matrix<S>>> starts(n);  // of unit, of piece: the state where it begins
  std::vector<Matrix<S>> dh(n);
  const auto at = [&](Index unit, Index i) {
    Slice slice = w.units[unit];
    slice.t = i * w.piece, slice.t_count = std::min(w.piece, w.length - slice.t);
    return slice;
  };
  const auto state = [&](Index unit, const std::string& name) {
    return op.end ? io.source(at(unit, 0)).at(name) : Matrix<S>();
  };
  tbb::parallel_for(Index{0}, n, [&](Index u) {
    Matrix<S> h = state(u, op.end ? op.start->name : "");
    for (Index i = 0; i < pieces; ++i) {
      if (w.loses_state && i > 0) h.setZero();
      if (w.gradients) starts[u].push_back(h);
      io.take(op.out.name, at(u, i), forward<S>(o, io.source(at(u, i)), h));
      if (w.state_dtype) round_to(*w.state_dtype, h);
    }
    if (!op.end) return;
    io.take(op.end->name, at(u, 0), h);
    dh[u] = state(u, gradient(*op.end));
  });
  for (Index i = w.gradients ? pieces : 0; i-- > 0;) {
    tbb::parallel_for(Index{0}, n, [&](Index u) {
      if ((w.loses_state || w.loses_gradient) && i + 1 < pieces) dh[u].setZero();
      const Named<S> in = io.source(at(u, i));
      for (const auto& [name, d] : backward<S>(o, in, starts[u][i], in.at(gradient(op.out)), dh[u]))
        if (d.size() > 0) io.take("d" + name, at(u, i), d);
      starts[u].pop_back();
      if (i == 0 && op.start) io.take(gradient(*op.start), at(u, 0), dh[u]);
    });
    io.finish(at(0, i));
  }
}

// ================================ 4. The suite ===================================================

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
    if (r.style == Style::huge_delta) return raw ? 5 * v + 20 : 30 * std::abs(v);
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
inline constexpr const char *kScans = "selective_scan ssd", *kNorms = "rms_norm gated_rms_norm",
                            *kAll = "selective_scan ssd causal_conv1d rms_norm gated_rms_norm";
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

/// Whether a list of operations has this one.
inline bool is_of(const std::string& list, const Operation& op) {
  return (" " + list + " ").find(std::string(" ") + op.name + " ") != std::string::npos;
}

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

// ================================ 5. The verdict =================================================

/// One output: its worst entry, in units of the bound, and where entries are beyond it.
struct Verdict {
  Part part;
  std::string tensor;
  Rule rule;
  double worst = 0, got = 0, expected = 0;
  Index at = 0;  // of the worst
  std::size_t zeros = 0, nans = 0;
  std::map<char, std::vector<Index>> wrong_at = {};  // how many are wrong at each value of a letter
  std::string hint = {};
  bool ok() const { return worst <= 1; }
};

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

/// Compares what a file holds with the reference, run on Bounded numbers piece by piece: memory
/// does not grow with the length but for the states in which pieces begin.
class Judge {
 public:
  explicit Judge(const Case& c) : case_(c) {
    for (const auto& [name, part] : c.outputs())
      if (const Tensor* tensor = c.file.find(name)) open(part, name, *tensor);
    if (walk_.gradients) c.file.at(gradient(c.op->out));
  }

  std::map<std::string, Verdict> run() {
    walk_.length = case_.extent.at('t'), walk_.piece = piece();
    for (Index b = 0; b < case_.extent.at('b') && !misses_all(); ++b) {
      walk_.units = units(b);
      walk<Bounded>(case_, walk_, *this);
    }
    for (const auto& [name, sum] : sums_) compare(verdicts_.at(name), case_.whole(0), sum);
    return std::move(verdicts_);
  }

  // --- what walk() asks for ---

  Named<Bounded> source(const Slice& slice) const {
    Named<Bounded> in;
    const auto add = [&](const Part& part, const std::string& name) {
      const Block block = case_.block(part, slice);
      if (const Tensor* tensor = case_.file.find(name)) in[name] = read<Bounded>(*tensor, block);
      const bool state = case_.op->end && !part.has('t') && part.has('b');
      if (state && !in.count(name)) in[name] = Matrix<Bounded>::Zero(block.rows, block.cols);
    };
    for (const Part& part : case_.op->inputs) add(part, part.name);
    add(case_.op->out, gradient(case_.op->out));
    if (case_.op->end) add(*case_.op->end, gradient(*case_.op->end));
    return in;
  }
  void take(const std::string& name, const Slice& slice, const Matrix<Bounded>& m) {
    const auto found = verdicts_.find(name);
    if (found == verdicts_.end() || found->second.hint.size()) return;
    const Part& part = found->second.part;
    if (part.has('b') && !part.has('g')) return compare(found->second, slice, m);
    const Block block = case_.block(part, slice);
    const std::lock_guard<std::mutex> lock(mutex_);
    Matrix<Bounded>& sum = (part.has('b') ? group_sums_ : sums_)[name];
    if (sum.size() == 0)
      sum = Matrix<Bounded>::Zero(part.has('b') ? m.rows() : case_.all(part.rows),
                                  case_.all(part.cols));
    sum.block(part.has('b') ? 0 : block.row, block.col, m.rows(), m.cols()) += m;
  }
  void finish(Slice slice) {  // dB and dC are sums over the units of a group
    slice.s = 0, slice.s_count = case_.splits();
    for (const auto& [name, sum] : group_sums_) compare(verdicts_.at(name), slice, sum);
    group_sums_.clear();
  }

 private:
  void open(const Part& part, const std::string& name, const Tensor& tensor) {
    Verdict v{part, name, rule(case_.dtype)};
    // A state of the scan that is stored as float was never anything else; that of an ssd may have
    // been summed from factors rounded for a matrix unit.
    const bool is_state = case_.op->end && name == case_.op->end->name;
    if (is_state && case_.op->split == 'd' && tensor.dtype <= DType::F32 &&
        case_.dtype > DType::F32)
      v.rule = rule(DType::F32);
    if (tensor.shape != case_.shape(part) || tensor.dtype > DType::BF16) {
      v.worst = std::numeric_limits<double>::infinity();
      v.hint = "expected real numbers of shape " + shape_text(case_.shape(part)) + ", found " +
               dtype_name(tensor.dtype) + " " + shape_text(tensor.shape);
    }
    for (const char* c = part.file; *c; ++c) v.wrong_at[*c].resize(case_.extent.at(*c));
    walk_.gradients |= name[0] == 'd';
    verdicts_.emplace(name, std::move(v));
  }
  bool misses_all() const {
    return std::all_of(verdicts_.begin(), verdicts_.end(),
                       [](const auto& v) { return v.second.hint.size() > 0; });
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
  /// Tokens of a piece: its states stay in the cache.
  Index piece() const {
    Index state = 64;
    if (case_.op->split == 'd' && case_.extent.count('n')) state = 16 * case_.extent.at('n');
    if (case_.op->split == 'h') state = case_.extent.at('p') * case_.extent.at('n');
    return std::clamp<Index>((1 << 18) / state, 32, 2048);
  }

  void compare(Verdict& v, const Slice& slice, const Matrix<Bounded>& want) {
    const Block block = case_.block(v.part, slice);
    const Shape shape = case_.shape(v.part);
    const Matrix<double> got = read<double>(case_.file.at(v.tensor), block);
    const std::lock_guard<std::mutex> lock(mutex_);
    for (Index r = 0; r < want.rows(); ++r)
      for (Index c = 0; c < want.cols(); ++c) {
        const double units = distance(got(r, c), want(r, c), v.rule);
        const Index at = block.index(r, c);
        if (units > v.worst || (units == v.worst && at <= v.at))
          v.worst = units, v.at = at, v.got = got(r, c), v.expected = want(r, c).value;
        v.zeros += got(r, c) == 0, v.nans += std::isnan(got(r, c));
        if (units <= 1) continue;
        const std::vector<Index> index = unravel(at, shape);
        for (std::size_t i = 0; i < index.size(); ++i) ++v.wrong_at[v.part.file[i]][index[i]];
      }
  }

  const Case& case_;
  Walk walk_;
  std::map<std::string, Verdict> verdicts_;
  Named<Bounded> group_sums_, sums_;  // over the units of a group, in a piece; over all sequences
  std::mutex mutex_;
};

// ================================ 6. Hints =======================================================
//
// A hint is a bug that was tried: the case is computed with it, and what the user has is that, not
// the truth. Where none fits, the places of the wrong entries say what they can.

/// A case in memory, computed whole, with whatever has been done to it.
template <class S>
struct Trial : Options {
  Walk plan;
  Index groups;
  std::vector<Named<S>> in, out;  // of each sequence; sums over all sequences are in out[0]

  Trial(const Case& c, bool gradients) : Options(c), groups(c.groups()), out(c.extent.at('b')) {
    plan.length = plan.piece = c.extent.at('t'), plan.gradients = gradients;
    for (Index b = 0; b < c.extent.at('b'); ++b) {
      in.emplace_back();
      const auto add = [&](const Part& part, const std::string& name, bool always) {
        const Block block = c.block(part, c.whole(b));
        if (const Tensor* tensor = c.file.find(name))
          in[b][name] = read<S>(*tensor, block);
        else if (always)
          in[b][name] = Matrix<S>::Zero(block.rows, block.cols);
      };
      for (const Part& part : op->inputs)
        add(part, part.name, op->start && part.name == std::string(op->start->name));
      add(op->out, gradient(op->out), false);
      if (op->end) add(*op->end, gradient(*op->end), true);
    }
  }
  void run() {
    for (std::size_t b = 0; b < in.size(); ++b) {
      plan.units = {{static_cast<Index>(b), 0, 0, 0, 1}};
      walk<S>(*this, plan, *this);
    }
  }
  /// Where a tensor has time as rows, those of the slice.
  bool over_time(const std::string& name) const {
    if (name == op->out.name || name == gradient(op->out)) return true;
    for (const Part& part : op->inputs)
      if (name == part.name || name == gradient(part)) return part.rows == std::string("t");
    return false;
  }
  bool over_batch(const std::string& name) const {
    for (const Part& part : op->inputs)
      if (name == gradient(part)) return part.has('b');
    return true;
  }
  Named<S> source(const Slice& slice) const {
    Named<S> piece;
    for (const auto& [name, m] : in[slice.b])
      piece[name] = over_time(name) ? Matrix<S>(m.middleRows(slice.t, slice.t_count)) : m;
    return piece;
  }
  void take(const std::string& name, const Slice& slice, const Matrix<S>& m) {
    Matrix<S>& sum = out[over_batch(name) ? slice.b : 0][name];
    const bool rows = over_time(name);
    if (sum.size() == 0) sum = Matrix<S>::Zero(rows ? plan.length : m.rows(), m.cols());
    sum.middleRows(rows ? slice.t : 0, m.rows()) += m;
  }
  void finish(const Slice&) {}

  // --- for the table of bugs ---
  bool has(const std::string& name) const { return in[0].count(name) > 0; }
  std::string bias() const { return step() + "_bias"; }
  std::string step() const { return op->inputs[1].name; }
  template <class F>  // false: there is no such input
  bool each(const std::string& name, const F& f) {
    for (Named<S>& one : in)
      if (one.count(name)) f(one[name], one);
    return has(name);
  }
  bool drop(const std::string& name) {
    const bool there = has(name);
    for (Named<S>& one : in) one.erase(name);
    return there;
  }
};

using Change = std::function<bool(Trial<double>&)>;

/// A bug of the operations that `of` names: what it changes before a case is computed (false: it
/// does not apply to it), and after.
struct Bug {
  const char* of;
  std::string hint;
  Change change;
  std::function<void(Trial<double>&)> after = nullptr;
};

// --- changes ---

/// f(matrix, all inputs of the sequence) for an input of this name.
template <class F>
Change each(const char* name, const F& f) {
  return [=](Trial<double>& t) { return t.each(name, f); };
}
inline Change drop(const char* name) {
  return [=](Trial<double>& t) { return t.drop(name); };
}
inline Change times(const char* name, double by) {
  return each(name, [=](Matrix<double>& m, auto&) { m *= by; });
}
inline Change A_is(double (*f)(double)) {
  return each("A", [=](Matrix<double>& m, auto&) { m = m.unaryExpr(f); });
}
template <class T>
Change set(T Options::*option, T value) {  // it was another
  return [=](Trial<double>& t) { return std::exchange(t.*option, value) != value; };
}
inline Change state_in(DType dtype) {
  return [=](Trial<double>& t) { return t.plan.piece = 1, t.plan.state_dtype = dtype, true; };
}
inline Change lost(bool Walk::*what, Index K) {
  return [=](Trial<double>& t) { return t.plan.piece = K, t.plan.*what = true, K < t.plan.length; };
}

/// Row t from row t - by; zeros come in.
inline void shift(Matrix<double>& m, Index by) {
  const Matrix<double> old = m;
  m.setZero();
  const Index n = m.rows() - std::abs(by);
  if (n > 0) m.middleRows(std::max<Index>(by, 0), n) = old.middleRows(std::max<Index>(-by, 0), n);
}

inline Change shifted(const char* name, Index by) {
  return each(name, [=](Matrix<double>& m, auto&) { shift(m, by); });
}
inline bool softplus_twice(Trial<double>& t) {
  return t.softplus && t.each(t.step(), [&](Matrix<double>& m, Named<double>& in) {
    if (in.count(t.bias())) m.rowwise() += in[t.bias()].row(0), in.erase(t.bias());
    m = ssm::softplus(m.array()).eval();
  });
}

/// B or C with a group for each channel or head, whose group is that which `group` says.
template <class Group>
Matrix<double> spread(const Trial<double>& t, const Matrix<double>& m, const Group& group) {
  const Index S = t.in[0].at("A").rows(), N = m.cols() / t.groups;
  Matrix<double> wide(m.rows(), S * N);
  for (Index s = 0; s < S; ++s) wide.middleCols(s * N, N) = m.middleCols(group(s) * N, N);
  return wide;
}

/// The groups one behind another again and again (0 1 0 1) instead of side by side (0 0 1 1).
inline bool repeat_groups(Trial<double>& t) {
  const auto group = [G = t.groups](Index s) { return s % G; };
  for (const char* name : {"B", "C"})
    t.each(name, [&](Matrix<double>& m, auto&) { m = spread(t, m, group); });
  return t.groups > 1 && t.groups < t.in[0].at("A").rows();
}
inline void gather_groups(Trial<double>& t) {
  const Index S = t.in[0].at("A").rows();
  for (Named<double>& out : t.out)
    for (const char* name : {"dB", "dC"})
      if (const auto wide = out.find(name); wide != out.end()) {
        const Index N = wide->second.cols() / S;
        Matrix<double> sum = Matrix<double>::Zero(wide->second.rows(), t.groups * N);
        for (Index s = 0; s < S; ++s)
          sum.middleCols(s % t.groups * N, N) += wide->second.middleCols(s * N, N);
        wide->second = sum;
      }
}

/// B_bar = expm1(delta A) / A B, which depends on the channel: each becomes a group of its own.
inline bool exact_zoh(Trial<double>& t) {
  return t.each("B", [&](Matrix<double>& B, Named<double>& in) {
    const ssm::StateMatrix<double> A = in.at("A");
    const Index S = A.rows(), N = A.cols();
    const Matrix<double> delta = ssm::step_size(scan_inputs(t, in, A));
    const auto group = [&](Index s) { return s * t.groups / S; };
    B = spread(t, B, group), in["C"] = spread(t, in.at("C"), group);
    for (Index r = 0; r < B.rows(); ++r)
      for (Index s = 0; s < S; ++s)
        for (Index n = 0; n < N; ++n)
          if (const double a = delta(r, s) * A(s, n); a != 0) B(r, s * N + n) *= std::expm1(a) / a;
  });
}

/// The last chunk computed to its end, zeros behind the sequence: there delta is softplus(bias).
inline Change padded_to(Index K) {
  return [K](Trial<double>& t) {
    const Index L = t.plan.length, padded = (L + K - 1) / K * K;
    for (Named<double>& in : t.in)
      for (auto& [name, m] : in)
        if (t.over_time(name)) m.conservativeResizeLike(Matrix<double>::Zero(padded, m.cols()));
    t.plan.length = t.plan.piece = padded;
    return padded != L;
  };
}
inline std::function<void(Trial<double>&)> cut_to(Index L) {
  return [L](Trial<double>& t) {
    for (Named<double>& out : t.out)
      for (auto& [name, m] : out)
        if (t.over_time(name)) m.conservativeResize(L, m.cols());
  };
}

/// D x + y silu(z) instead of (y + D x) silu(z).
inline void gate_first(Trial<double>& t) {
  for (std::size_t b = 0; b < t.in.size(); ++b) {
    const Named<double>& in = t.in[b];
    const Matrix<double> skip = in.at("u") * in.at("D").row(0).asDiagonal();
    Matrix<double>& out = t.out[b]["out"];
    out.array() += skip.array() * (1 - ssm::silu(in.at("z").array()));
  }
}

/// The norm of x alone, then the gate.
inline void norm_first(Trial<double>& t) {
  for (std::size_t b = 0; b < t.in.size(); ++b) {
    const Named<double>& in = t.in[b];
    const Matrix<double>& x = in.at("x");
    const Index width = x.cols() / t.norm_groups;
    for (Index c = 0; c < x.cols(); c += width) {
      const ssm::Row<double> weight = in.at("weight").row(0).segment(c, width);
      t.out[b]["out"].middleCols(c, width) =
          ssm::rms_norm<double>(x.middleCols(c, width), weight, t.eps).array() *
          ssm::silu(in.at("z").middleCols(c, width).array());
    }
  }
}

using Inputs = Named<double>;
inline const std::vector<Bug> kBugs = {
    {kScans, "groups of B and C are repeated (0 1 0 1), not neighbours (0 0 1 1)", repeat_groups,
     gather_groups},
    {kScans, "h0 is ignored", times("h0", 0)},
    {kScans, "dhT is ignored", times("dhT", 0)},
    {"causal_conv1d", "initial_states is ignored", times("initial_states", 0)},
    {"causal_conv1d", "dfinal_states is ignored", times("dfinal_states", 0)},
    {"selective_scan", "delta_bias is ignored", drop("delta_bias")},
    {"selective_scan", "delta_bias is added twice", times("delta_bias", 2)},
    {"ssd", "dt_bias is ignored", drop("dt_bias")},
    {"ssd", "dt_bias is added twice", times("dt_bias", 2)},
    {"causal_conv1d", "bias is ignored", drop("bias")},
    {"causal_conv1d", "bias is added twice", times("bias", 2)},
    {kScans, "softplus is not applied", set(&Options::softplus, false)},
    {kScans, "softplus is applied where it is not asked for", set(&Options::softplus, true)},
    {kScans, "softplus is applied twice", softplus_twice},
    {kScans, "B is one token late", shifted("B", 1)},
    {kScans, "B is one token early", shifted("B", -1)},
    {kScans, "C is one token late", shifted("C", 1)},
    {kScans, "C is one token early", shifted("C", -1)},
    {kScans, "A_log is used as A", A_is([](double a) { return std::log(-a); })},
    {kScans, "A is used as A_log", A_is([](double a) { return -std::exp(a); })},
    {kScans, "A has lost its sign", A_is([](double a) { return -a; })},
    {"selective_scan", "the gate comes before D: y silu(z) + D x",
     [](Trial<double>& t) { return t.has("D") && t.has("z"); }, gate_first},
    {kScans, "D is ignored", drop("D")},
    {kScans, "D x is added twice", times("D", 2)},
    {"selective_scan", "z is ignored", drop("z")},
    {"selective_scan", "B is discretized by the exact zero-order hold, not as delta B", exact_zoh},
    {kScans, "the state is stored in bfloat16", state_in(DType::BF16)},
    {kScans, "the state is stored in float16", state_in(DType::F16)},
    {"causal_conv1d", "the taps are in reverse order",
     each("weight", [](Matrix<double>& m, Inputs&) { m = m.rowwise().reverse().eval(); })},
    {"causal_conv1d", "the convolution looks one token ahead", shifted("x", -1)},
    {"causal_conv1d", "silu is not applied", set(&Options::silu, false)},
    {"causal_conv1d", "silu is applied where it is not asked for", set(&Options::silu, true)},
    {kNorms, "eps is ignored", set(&Options::eps, 0.0)},
    {"gated_rms_norm", "all channels are normalized together, not each group",
     set(&Options::norm_groups, Index{1})},
    {"gated_rms_norm", "the gate comes after the norm", [](Trial<double>&) { return true; },
     norm_first},
    {kNorms, "weight is used as 1 + weight",
     each("weight", [](Matrix<double>& m, Inputs&) { m.array() += 1; })},
    {"rms_norm", "the mean is subtracted, as in a layer norm",
     each("x", [](Matrix<double>& m, Inputs&) { m.colwise() -= m.rowwise().mean().eval(); })}};

/// The bugs to try on a case, with chunks of powers of two and of the lengths that are given.
inline std::vector<Bug> bugs(const Case& c, std::set<Index> chunks) {
  std::vector<Bug> all;
  const auto add = [&](const Bug& bug) {
    if (is_of(bug.of, *c.op)) all.push_back(bug);
  };
  for (const Bug& bug : kBugs) add(bug);
  for (Index K = 2; K <= 4096; K *= 2) chunks.insert(K);
  for (const Index K : chunks) {
    if (K < 2) continue;
    const char* with_state = "selective_scan ssd causal_conv1d";
    const std::string n = std::to_string(K), at = " lost at every boundary of chunks of " + n;
    add({with_state, "the state is" + at, lost(&Walk::loses_state, K)});
    add({with_state, "the gradient of the state is" + at, lost(&Walk::loses_gradient, K)});
    add({kScans, "the tail of the last " + n + " tokens is not masked: the state goes on",
         padded_to(K), cut_to(c.extent.at('t'))});
  }
  return all;
}

/// How far an output is from what a trial gives: the largest distance, and their root mean square.
struct Fit {
  double worst = 0, rms = 0;
};
inline std::optional<Fit> fit(const Case& c, const Verdict& v, const Trial<Bounded>& truth,
                              const Trial<double>* trial) {
  Fit f;
  double entries = 0;
  for (Index b = 0; b < (v.part.has('b') ? c.extent.at('b') : 1); ++b) {
    const Matrix<double> got = read<double>(c.file.at(v.tensor), c.block(v.part, c.whole(b)));
    const Matrix<Bounded>& want = truth.out[b].at(v.tensor);
    const Matrix<double>* other = nullptr;
    if (trial) {
      const auto found = trial->out[b].find(v.tensor);
      if (found == trial->out[b].end() || found->second.rows() != got.rows() ||
          found->second.cols() != got.cols())
        return {};
      other = &found->second;
    }
    for (Index i = 0; i < got.size(); ++i) {
      const Bounded& right = want.data()[i];
      const double value = other ? other->data()[i] : right.value;
      // With the bug a number may be larger; its roundings then are, too, and it may overflow.
      const double growth = other && right.size > 0 ? std::abs(value) / right.size : 0;
      const Bounded w = {value, right.size * (1 + growth), right.error * (1 + growth)};
      const bool overflows = !std::isfinite(got.data()[i]) && !(std::abs(value) < v.rule.largest);
      const double units = overflows ? 0 : std::min(distance(got.data()[i], w, v.rule), 1e100);
      f.worst = std::max(f.worst, units), f.rms += units * units, ++entries;
    }
  }
  f.rms = std::sqrt(f.rms / entries);
  return f;
}

/// Whether a bug explains an output: all of it, or, where roundings fall either way, nearly all.
inline bool explains(const Fit& with, const Fit& without, bool rounds) {
  return with.worst <= 1 || (with.worst <= 4 && without.worst > 40) ||
         (rounds && without.rms > 10 && with.rms < without.rms / 10);
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

/// Whether the numbers are only what stood there before.
inline bool never_written(const Case& c, const Verdict& v) {
  return std::max(v.zeros, v.nans) == c.file.at(v.tensor).size();
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

/// How well an output is explained so far.
struct Explanation {
  Fit without, with;  // a bug
  bool contradicted;  // by an output of the forward that is right and would not be with this bug

  bool yields_to(const Fit& found, bool is_contradicted, bool rounds) const {
    if (!explains(found, without, rounds) || found.rms > without.rms / 2) return false;
    return is_contradicted == contradicted ? found.rms < with.rms / 2 : contradicted;
  }
};

inline bool contradicts(const Case& c, const std::map<std::string, Verdict>& verdicts,
                        const Trial<Bounded>& truth, const Trial<double>& trial) {
  return std::any_of(verdicts.begin(), verdicts.end(), [&](const auto& named) {
    const auto& [name, v] = named;
    if (name[0] == 'd' || !v.ok()) return false;
    const auto found = fit(c, v, truth, &trial);
    return found && found->worst > 1;
  });
}

/// Gives each wrong output the bug that explains it best, or else the pattern of its wrong entries.
/// `last`: the bug that explained another case; it is tried first, and is enough where it fits.
inline void explain(const Case& c, std::map<std::string, Verdict>& verdicts, std::string& last) {
  constexpr Index kLargest = 1 << 22;  // steps of a state that are worth trying again and again
  std::vector<Verdict*> wrong;
  std::set<Index> chunks;
  bool gradients = false;
  for (auto& [name, v] : verdicts) {
    if (v.ok() || !v.hint.empty()) continue;
    v.hint = never_written(c, v) ? v.nans ? "all NaN" : "all zeros" : pattern(v);
    if (never_written(c, v)) continue;
    wrong.push_back(&v), gradients |= name[0] == 'd';
    if (v.part.has('t')) add_suspects(v.wrong_at.at('t'), chunks);
  }
  Index steps = c.extent.at('b') * c.extent.at('t');
  for (const char letter : {'d', 'h', 'p', 'n'})
    steps *= c.extent.count(letter) ? c.extent.at(letter) : 1;
  if (wrong.empty() || steps > kLargest) return;
  Trial<Bounded> truth(c, gradients);
  truth.run();
  const Trial<double> right(c, gradients);
  std::map<const Verdict*, Explanation> best;
  for (const Verdict* v : wrong) {
    const Fit f = *fit(c, *v, truth, nullptr);
    best[v] = {f, f, true};
  }
  std::vector<Bug> all = bugs(c, chunks);
  std::stable_partition(all.begin(), all.end(), [&](const Bug& bug) { return bug.hint == last; });
  for (const Bug& bug : all) {
    Trial<double> trial = right;
    if (!bug.change(trial)) continue;
    trial.run();
    if (bug.after) bug.after(trial);
    const bool contradicted = contradicts(c, verdicts, truth, trial);
    bool enough = bug.hint == last && !contradicted;
    for (Verdict* v : wrong) {
      const auto found = fit(c, *v, truth, &trial);
      enough = enough && found && found->worst <= 1;
      if (!found || !best.at(v).yields_to(*found, contradicted, trial.plan.state_dtype.has_value()))
        continue;
      best.at(v).with = *found, best.at(v).contradicted = contradicted;
      v->hint = bug.hint, last = bug.hint;
    }
    if (enough) return;
  }
}

// ================================ 7. Doors =======================================================

/// A value of a tensor's dtype for each element, all NaN, to be filled by somebody.
inline Tensor empty_tensor(const std::string& name, DType dtype, Shape shape) {
  Tensor tensor{name, dtype, std::move(shape), nullptr, nullptr};
  const auto bytes = std::make_shared<std::vector<unsigned char>>(tensor.byte_size(), 0xff);
  tensor.data = bytes->data(), tensor.keep_alive = bytes;
  return tensor;
}

/// The dtype in which a kernel gives an output back.
inline DType output_dtype(const Case& c, const Part& part) {
  return part.stays_float && c.dtype != DType::F64 ? DType::F32 : c.dtype;
}

/// Adds the outputs themselves to a case, in double.
inline void add_expected(Case& c) {
  Trial<double> trial(c, true);
  trial.run();
  for (const auto& [name, part] : c.outputs()) {
    Tensor tensor = empty_tensor(name, DType::F64, c.shape(part));
    auto* values = static_cast<double*>(const_cast<void*>(tensor.data));
    for (Index b = 0; b < (part.has('b') ? c.extent.at('b') : 1); ++b) {
      const Block block = c.block(part, c.whole(b));
      for (Index r = 0; r < block.rows; ++r)
        for (Index s = 0; s < block.cols; ++s)
          values[block.index(r, s)] = trial.out[b].at(name)(r, s);
    }
    c.file.tensors[name] = tensor;
  }
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

/// Which cases: of both subcommands.
struct SuiteFlags {
  std::vector<std::string> ops;
  std::string dtype = "f32", size = "small";
  std::uint64_t seed = 1;

  void add(CLI::App* sub) {
    std::vector<std::string> names;
    for (const Operation& op : kOperations) names.push_back(op.name);
    sub->add_option("--op", ops, "operations, comma-separated (default: all)")
        ->delimiter(',')
        ->check(CLI::IsMember(names));
    sub->add_option("--dtype", dtype, "of inputs and outputs; parameters and states stay float32")
        ->check(CLI::IsMember({"f32", "bf16", "f16", "f64"}));
    sub->add_option("--size", size, "large adds sizes of real models and a length of 262,144")
        ->check(CLI::IsMember({"small", "large"}));
    sub->add_option("--seed", seed, "of the numbers");
  }
  /// Calls use(name, file) for every case.
  template <class Use>
  void for_each(const Use& use) const {
    const std::map<std::string, DType> types = {
        {"f32", DType::F32}, {"bf16", DType::BF16}, {"f16", DType::F16}, {"f64", DType::F64}};
    std::vector<Recipe> all;
    for (const Operation& op : kOperations)
      if (ops.empty() || std::count(ops.begin(), ops.end(), op.name))
        for (const Recipe& r : recipes(op, size == "large")) all.push_back(r);
    for (std::size_t i = 0; i < all.size(); ++i) {
      const std::string number = std::to_string(1000 + i).substr(1);
      use(std::string(all[i].op->name) + "_" + number + "_" + all[i].label,
          make_case(all[i], types.at(dtype), seed * 1'000'003 + i));
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
};

/// Judges outputs: of files, or of a kernel that runs now.
template <class Memory>
struct Verify : SuiteFlags {
  std::vector<std::string> paths;
  std::string so;
  bool json = false;
  std::string last;  // the bug that explained something last
  std::size_t judged = 0, wrong = 0;

  void declare(CLI::App* sub) {
    sub->add_option("paths", paths,
                    "cases with outputs: safetensors files, folders of --raw, or "
                    "folders of either");
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
    for (std::size_t i = 0; i < files.size(); ++i) {
      const bool raw = std::filesystem::is_directory(files[i]);
      judge(Case(std::filesystem::path(files[i]).stem().string(),
                 raw ? read_raw(files[i]) : read_safetensors(files[i])));
      show_progress(static_cast<Index>(i + 1), static_cast<Index>(files.size()));
    }
    if (judged == 0)
      fail("nothing to judge: expected outputs (out, hT, gradients) beside the inputs, found none");
    if (wrong > 0) fail(wrong, " of ", judged, " tensors are beyond the bound");
    if (!json) std::cout << "all " << judged << " tensors are within the bound\n";
  }

 private:
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
    for (const auto& [name, tensor] : c.file.tensors)
      if (!known(c, name))
        warn(one_line(c.file.where, ": ", quote(name), ": not a tensor of ", c.op->name));
    auto verdicts = Judge(c).run();
    explain(c, verdicts, last);
    for (const auto& [name, v] : verdicts) {
      ++judged, wrong += !v.ok();
      json ? print_json(c, v) : print_row(c, v);
    }
  }
  static bool known(const Case& c, const std::string& name) {
    const auto is = [&](const Part& part) { return name == part.name || name == gradient(part); };
    return is(c.op->out) || (c.op->end && is(*c.op->end)) ||
           std::any_of(c.op->inputs.begin(), c.op->inputs.end(), is);
  }
  static void print_json(const Case& c, const Verdict& v) {
    const double largest = std::numeric_limits<double>::max();  // JSON has no infinity
    const nlohmann::ordered_json line = {{"file", c.name},
                                         {"tensor", v.tensor},
                                         {"ok", v.ok()},
                                         {"worst", std::min(v.worst, largest)},
                                         {"index", unravel(v.at, c.shape(v.part))},
                                         {"got", v.got},
                                         {"expected", v.expected},
                                         {"hint", v.hint}};
    std::cout << line << std::endl;
  }
  /// case, tensor, the worst error in units of the bound; of a wrong one where, what, and a hint
  static void print_row(const Case& c, const Verdict& v) {
    std::cout << std::left << std::setw(44) << c.name << ' ' << std::setw(12) << v.tensor
              << std::right << std::setw(10) << std::setprecision(3) << v.worst
              << (v.ok() ? "  ok" : "  WRONG");
    if (!v.ok()) {
      const std::vector<Index> index = unravel(v.at, c.shape(v.part));
      for (std::size_t i = 0; i < index.size(); ++i)
        std::cout << (i ? ", " : " at ") << v.part.file[i] << ' ' << index[i];
      std::cout << std::setprecision(9) << ": got " << v.got << ", expected " << v.expected
                << (v.hint.empty() ? "" : "; " + v.hint);
    }
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
