// checkpoint.hpp - bytes to tensors and back.
//
//   1. Errors and files     one line per error; files mapped in, written beside and renamed
//   2. Checkpoints          safetensors, pytorch_model.bin; F32, F16, BF16
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iostream>
#include <iterator>
#include <limits>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

namespace mamba {

using Json = nlohmann::json;

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "checkpoints are little-endian");

// =======================================================================================
// 1. Errors and files
// =======================================================================================
//
// Every error is one line, "what: where: expected ..., found ...", thrown as a
// std::runtime_error. Whatever bytes a file holds, reading it ends in a value or in such a
// line. A window of bytes is a std::string_view; numbers leave it through memcpy, because
// nothing in a file promises to be aligned.

/// Throws the parts as one line. Control characters, which only a broken file brings, go.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  std::string line = out.str();
  std::replace_if(
      line.begin(), line.end(), [](unsigned char c) { return c < 32; }, '?');
  throw std::runtime_error(line);
}

/// What is wrong is how the program was called: exit status 2.
struct UsageError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class... Parts>
[[noreturn]] void fail_usage(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  throw UsageError(out.str());
}

/// A name out of a file, fit for an error line: printable, quoted, and not a page long.
inline std::string quote(std::string_view name, std::size_t longest = 80) {
  std::string text(name.substr(0, longest));
  std::replace_if(
      text.begin(), text.end(), [](char c) { return c < 32 || c > 126; }, '?');
  return "'" + text + (name.size() > longest ? "...'" : "'");
}

/// A file mapped into memory, read-only. Pages are read when they are first touched.
class MappedFile {
 public:
  explicit MappedFile(const std::string& path) {
    const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (file < 0) fail("cannot open: ", path, ": ", std::strerror(errno));
    struct stat status = {};
    const bool regular = ::fstat(file, &status) == 0 && S_ISREG(status.st_mode);
    const auto length = regular ? static_cast<std::size_t>(status.st_size) : 0;
    void* data = length == 0 ? nullptr : ::mmap(nullptr, length, PROT_READ, MAP_PRIVATE, file, 0);
    const int error = errno;
    ::close(file);
    if (!regular) fail("cannot read: ", path, ": expected a file, found something else");
    if (data == MAP_FAILED) fail("cannot map: ", path, ": ", std::strerror(error));
    data_ = {data, Unmap{length}};
  }
  std::size_t size() const { return data_ ? data_.get_deleter().size : 0; }
  std::string_view bytes() const { return {static_cast<const char*>(data_.get()), size()}; }

 private:
  struct Unmap {
    std::size_t size;
    void operator()(void* data) const { ::munmap(data, size); }
  };
  std::unique_ptr<void, Unmap> data_;
};

/// Removes the file that is being written when a signal ends the program, then lets it end.
class PartRemover {
 public:
  explicit PartRemover(const std::string& part) {
    static const bool installed = [] {
      for (const int signal : {SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGPIPE, SIGXFSZ})
        if (std::signal(signal, remove) == SIG_IGN)  // as under nohup
          std::signal(signal, SIG_IGN);
      return true;
    }();
    (void)installed;
    if (part.size() < sizeof path) std::memcpy(path, part.c_str(), part.size() + 1);
  }
  ~PartRemover() { path[0] = 0; }
  PartRemover(const PartRemover&) = delete;
  PartRemover& operator=(const PartRemover&) = delete;

 private:
  static void remove(int signal) {  // only what may be called in a handler
    if (path[0] != 0) ::unlink(path);
    std::signal(signal, SIG_DFL);
    std::raise(signal);
  }
  static inline char path[4096] = "";
};

/// A file that appears under its name only when it is whole: the bytes go to a file beside
/// it, and commit() renames that. Without commit() nothing stays; after a signal, at most
/// the file beside it. What is not a regular file, such as /dev/stdout, is written
/// directly.
class AtomicFile {
 public:
  explicit AtomicFile(const std::string& path) : path_(path) {
    struct stat status = {};
    direct_ = ::stat(path.c_str(), &status) == 0 && !S_ISREG(status.st_mode);
    if (!direct_ && std::filesystem::is_symlink(path))
      path_ = std::filesystem::weakly_canonical(path).string();
    part_ = path_;
    if (!direct_) part_ += "." + std::to_string(::getpid()) + ".part";
    if (!direct_) remover_.emplace(part_);
    file_ = ::open(part_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    check(file_ >= 0);
  }
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;
  ~AtomicFile() {
    if (file_ >= 0) ::close(file_);
    if (!direct_ && !committed_) ::unlink(part_.c_str());
  }

  void write(std::string_view bytes) {
    while (!bytes.empty()) {
      const ssize_t n = ::write(file_, bytes.data(), bytes.size());
      check(n >= 0 || errno == EINTR);
      bytes.remove_prefix(n < 0 ? 0 : static_cast<std::size_t>(n));
    }
  }
  void commit() {
    check(direct_ || ::fsync(file_) == 0);
    check(::close(std::exchange(file_, -1)) == 0);
    check(direct_ || std::rename(part_.c_str(), path_.c_str()) == 0);
    committed_ = true;
  }

 private:
  void check(bool good) const {
    if (!good) fail("cannot write: ", path_, ": ", std::strerror(errno));
  }

  std::string path_, part_;
  std::optional<PartRemover> remover_;
  int file_ = -1;
  bool direct_ = false, committed_ = false;
};

/// Fails now, not after long work, if nothing can be written there. An empty path is no file.
inline void check_writable(const std::string& path) {
  if (!path.empty()) AtomicFile file(path);
}

/// Walks a window of bytes and never steps past its end.
class ByteReader {
 public:
  ByteReader(std::string_view bytes, std::string where) : bytes_(bytes), where_(std::move(where)) {}

  std::string_view take(std::uint64_t n) {
    if (n > bytes_.size() - at_)
      fail("truncated: ", where_, ": expected ", n, " bytes at offset ", at_, ", found ",
           bytes_.size() - at_);
    const std::string_view window = bytes_.substr(at_, n);
    at_ += n;
    return window;
  }
  template <class Number>
  Number read() {
    Number number;
    std::memcpy(&number, take(sizeof number).data(), sizeof number);
    return number;
  }
  std::string_view line() {
    const std::size_t end = bytes_.find('\n', at_);
    if (end == std::string_view::npos) take(bytes_.size() - at_ + 1);
    const std::string_view text = take(end - at_);
    take(1);
    return text;
  }
  void seek(std::uint64_t offset) {
    at_ = 0;
    take(offset);
  }
  std::size_t position() const { return at_; }
  const std::string& where() const { return where_; }

 private:
  std::string_view bytes_;
  std::string where_;
  std::size_t at_ = 0;
};

/// JSON with what a careless parser lets through refused: depth bombs and repeated keys.
inline Json parse_json(std::string_view text, const std::string& where) {
  constexpr int kDeepest = 64;
  std::vector<std::set<std::string>> keys;  // those of each object that is still open
  const auto check = [&](int depth, Json::parse_event_t event, Json& parsed) {
    using Event = Json::parse_event_t;
    if (depth > kDeepest) fail("bad JSON: ", where, ": nested deeper than ", kDeepest);
    if (event == Event::object_start) keys.emplace_back();
    if (event == Event::object_end) keys.pop_back();
    if (event == Event::key && !keys.back().insert(parsed.get<std::string>()).second)
      fail("bad JSON: ", where, ": the key ", quote(parsed.get<std::string>()), " appears twice");
    return true;
  };
  try {
    return Json::parse(text.begin(), text.end(), check);
  } catch (const Json::exception& error) {
    fail("bad JSON: ", where, ": ", quote(error.what(), 200));
  }
}

// =======================================================================================
// 2. Checkpoints
// =======================================================================================

// --- 2.1 Tensors and their dtypes -------------------------------------------------------

// In the order of kDTypes; the first four are what weights may be.
// clang-format off
enum class DType {
  F64, F32, F16, BF16,  // weights
  I64, I32, I16, I8, U64, U32, U16, U8, BOOL, F8_E4M3, F8_E5M2
};
// clang-format on

struct DTypeInfo {
  const char* name;           // in safetensors
  const char* torch;          // in PyTorch
  const char* torch_storage;  // the class of its storages in PyTorch, if there is one
  std::size_t size;           // bytes of one value
};
inline constexpr std::array<DTypeInfo, 15> kDTypes = {{
    {"F64", "float64", "DoubleStorage", 8},
    {"F32", "float32", "FloatStorage", 4},
    {"F16", "float16", "HalfStorage", 2},
    {"BF16", "bfloat16", "BFloat16Storage", 2},
    {"I64", "int64", "LongStorage", 8},
    {"I32", "int32", "IntStorage", 4},
    {"I16", "int16", "ShortStorage", 2},
    {"I8", "int8", "CharStorage", 1},
    {"U64", "uint64", "", 8},
    {"U32", "uint32", "", 4},
    {"U16", "uint16", "", 2},
    {"U8", "uint8", "ByteStorage", 1},
    {"BOOL", "bool", "BoolStorage", 1},
    {"F8_E4M3", "float8_e4m3fn", "", 1},
    {"F8_E5M2", "float8_e5m2", "", 1},
}};
inline const DTypeInfo& info(DType dtype) { return kDTypes[static_cast<std::size_t>(dtype)]; }
inline const char* dtype_name(DType dtype) { return info(dtype).name; }
inline std::size_t dtype_size(DType dtype) { return info(dtype).size; }

/// A named window into a file or a buffer. Its data may be unaligned.
struct Tensor {
  std::string name;
  DType dtype = DType::F32;
  std::vector<std::int64_t> shape;  // row-major; empty: one value
  const void* data = nullptr;
  std::shared_ptr<const void> keep_alive;  // the mapping or buffer that data points into

  /// The number of values. Readers have checked that it cannot overflow.
  std::size_t size() const {
    std::size_t n = 1;
    for (const std::int64_t extent : shape) n *= static_cast<std::size_t>(extent);
    return n;
  }
  std::size_t byte_size() const { return size() * dtype_size(dtype); }
  std::string_view bytes() const { return {static_cast<const char*>(data), byte_size()}; }
};

inline std::string shape_text(const std::vector<std::int64_t>& shape) {
  std::string text = "(";
  for (std::size_t i = 0; i < shape.size() && i < 16; ++i)
    text += (i > 0 ? ", " : "") + std::to_string(shape[i]);
  return text + (shape.size() > 16 ? ", ...)" : ")");
}

struct Checkpoint {
  std::map<std::string, Tensor> tensors;
  std::map<std::string, std::string> metadata;
  std::string where;  // the file that it was read from, for error lines

  const Tensor* find(const std::string& name) const {
    const auto found = tensors.find(name);
    return found == tensors.end() ? nullptr : &found->second;
  }
  const Tensor& at(const std::string& name) const {
    const Tensor* tensor = find(name);
    if (tensor == nullptr) fail("missing tensor: ", where, ": expected ", name, ", found none");
    return *tensor;
  }
};

/// Bytes of a tensor with this shape, every step checked.
inline std::uint64_t checked_bytes(const std::vector<std::int64_t>& shape, DType dtype,
                                   const std::string& where) {
  auto n = static_cast<std::int64_t>(dtype_size(dtype));
  for (const std::int64_t extent : shape)
    if (extent < 0 || __builtin_mul_overflow(n, extent, &n))
      fail("bad shape: ", where, ": expected sizes >= 0 with a product below 2^63, found ",
           shape_text(shape));
  return static_cast<std::uint64_t>(n);
}

// --- 2.2 Numbers ------------------------------------------------------------------------
//
// bfloat16 is the upper half of a float32: 1 sign, 8 exponent and 7 fraction bits. float16
// has 1, 5 and 10; its exponent bias is 15 instead of 127, hence the 112 below; exponent 31
// is infinity or NaN, exponent 0 a subnormal, 2^-14 times the fraction. Widening is exact.
// Narrowing rounds to the nearest, ties to even; what is too large becomes infinite, and NaN
// stays NaN. Nothing branches, so compilers vectorise the loops over whole tensors.

template <class To, class From>
To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From) && std::is_trivially_copyable_v<To>);
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline float bf16_to_float(std::uint16_t b) {
  return bit_cast<float>(static_cast<std::uint32_t>(b) << 16);
}

inline float f16_to_float(std::uint16_t h) {
  const std::uint32_t sign = (h & 0x8000u) << 16, size = (h & 0x7fffu) << 13;
  const std::uint32_t bias = size >= 31u << 23 ? 224 : size >= 1u << 23 ? 112 : 113;
  // A subnormal is read as 2^-14 (1 + fraction), and 2^-14 is taken off again.
  const float excess = bit_cast<float>(size >= 1u << 23 ? 0 : 113u << 23);
  const float value = bit_cast<float>(size + (bias << 23)) - excess;
  return bit_cast<float>(sign | bit_cast<std::uint32_t>(value));
}

inline std::uint16_t float_to_bf16(float value) {
  const auto bits = bit_cast<std::uint32_t>(value);
  const std::uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  return static_cast<std::uint16_t>(nan ? bits >> 16 | 0x40 : rounded);
}

inline std::uint16_t float_to_f16(float value) {
  const std::uint32_t bits = bit_cast<std::uint32_t>(value), size = bits & 0x7fffffff;
  const std::uint32_t normal = (size - (112u << 23) + 0xfff + (size >> 13 & 1)) >> 13;
  // Below 2^-14, adding 0.5 makes the float's last bit worth 2^-24, as in float16.
  const std::uint32_t tiny =
      bit_cast<std::uint32_t>(bit_cast<float>(size < 0x38800000 ? size : 0) + 0.5f) - 0x3f000000;
  const std::uint32_t nan = 0x7e00 | (size >> 13 & 1023);
  const std::uint32_t half = size > 0x7f800000    ? nan
                             : size >= 0x47800000 ? 0x7c00  // 65536 and above
                             : size >= 0x38800000 ? normal
                                                  : tiny;
  return static_cast<std::uint16_t>((bits >> 16 & 0x8000) | half);
}

template <class Stored, class Out, class Value>
void convert_each(const Tensor& tensor, Out* out, Value value) {
  const char* bytes = static_cast<const char*>(tensor.data);
  const std::size_t n = tensor.size();
  for (std::size_t i = 0; i < n; ++i) {
    Stored stored;
    std::memcpy(&stored, bytes + i * sizeof stored, sizeof stored);
    out[i] = static_cast<Out>(value(stored));
  }
}

/// The tensor's values as float or double (from F64, F32, F16, BF16) or as int64_t (from
/// I64, I32).
template <class Out>
void convert(const Tensor& tensor, Out* out) {
  constexpr bool kReal = std::is_floating_point_v<Out>;
  static_assert(kReal || std::is_same_v<Out, std::int64_t>);
  const auto same = [](auto value) { return value; };
  if (kReal && tensor.dtype == DType::F64) return convert_each<double>(tensor, out, same);
  if (kReal && tensor.dtype == DType::F32) return convert_each<float>(tensor, out, same);
  if (kReal && tensor.dtype == DType::F16)
    return convert_each<std::uint16_t>(tensor, out, [](auto h) { return f16_to_float(h); });
  if (kReal && tensor.dtype == DType::BF16)
    return convert_each<std::uint16_t>(tensor, out, [](auto b) { return bf16_to_float(b); });
  if (!kReal && tensor.dtype == DType::I64) return convert_each<std::int64_t>(tensor, out, same);
  if (!kReal && tensor.dtype == DType::I32) return convert_each<std::int32_t>(tensor, out, same);
  fail("wrong dtype: ", quote(tensor.name), ": expected ",
       kReal ? "F64, F32, F16 or BF16" : "I64 or I32", ", found ", dtype_name(tensor.dtype));
}

template <class Out>
std::vector<Out> values(const Tensor& tensor) {
  std::vector<Out> out(tensor.size());
  convert(tensor, out.data());
  return out;
}

/// A tensor that shows the caller's values, which must outlive it.
template <class Value>
Tensor tensor_view(std::string name, std::vector<std::int64_t> shape, const Value* data) {
  constexpr bool kReal = std::is_floating_point_v<Value>;
  static_assert(std::is_arithmetic_v<Value> && std::is_signed_v<Value> && sizeof(Value) >= 4);
  const DType dtype = sizeof(Value) == 8 ? kReal ? DType::F64 : DType::I64
                      : kReal            ? DType::F32
                                         : DType::I32;
  return {std::move(name), dtype, std::move(shape), data, nullptr};
}

/// The tensor in another dtype (F64, F32, F16, BF16), in a buffer of its own.
inline Tensor to_dtype(const Tensor& tensor, DType dtype) {
  const std::size_t n = tensor.size();
  const auto store = [&](auto buffer) -> Tensor {
    return {tensor.name, dtype, tensor.shape, buffer->data(), buffer};
  };
  if (dtype == DType::F64)
    return store(std::make_shared<std::vector<double>>(values<double>(tensor)));
  const auto floats = std::make_shared<std::vector<float>>(values<float>(tensor));
  if (dtype == DType::F32) return store(floats);
  if (dtype != DType::F16 && dtype != DType::BF16)
    fail("wrong dtype: ", quote(tensor.name), ": cannot convert to ", dtype_name(dtype));
  const auto halves = std::make_shared<std::vector<std::uint16_t>>(n);
  const auto narrow = [&](auto round) {
    std::transform(floats->begin(), floats->end(), halves->begin(), round);
  };
  if (dtype == DType::F16) narrow([](float x) { return float_to_f16(x); });
  if (dtype == DType::BF16) narrow([](float x) { return float_to_bf16(x); });
  return store(halves);
}

template <class Bits>
std::size_t count_masked(const Tensor& tensor, Bits mask) {
  const char* bytes = static_cast<const char*>(tensor.data);
  const std::size_t n = tensor.size();
  std::size_t count = 0;
  for (std::size_t i = 0; i < n; ++i) {
    Bits bits;
    std::memcpy(&bits, bytes + i * sizeof bits, sizeof bits);
    count += (bits & mask) == mask;
  }
  return count;
}

/// One line for each tensor with a NaN or an infinity: a value whose exponent is all ones.
inline std::vector<std::string> non_finite(const Checkpoint& checkpoint) {
  std::vector<std::string> lines;
  for (const auto& [name, tensor] : checkpoint.tensors) {
    std::size_t bad = 0;
    if (tensor.dtype == DType::F64) bad = count_masked<std::uint64_t>(tensor, 0x7ffull << 52);
    if (tensor.dtype == DType::F32) bad = count_masked<std::uint32_t>(tensor, 0x7f800000);
    if (tensor.dtype == DType::F16) bad = count_masked<std::uint16_t>(tensor, 0x7c00);
    if (tensor.dtype == DType::BF16) bad = count_masked<std::uint16_t>(tensor, 0x7f80);
    if (bad > 0)
      lines.push_back(checkpoint.where + ": " + quote(name) + ": " + std::to_string(bad) + " of " +
                      std::to_string(tensor.size()) + " values are NaN or infinite");
  }
  return lines;
}

// --- 2.3 safetensors --------------------------------------------------------------------
//
//   8 bytes    n, length of the header, little-endian
//   n bytes    {"__metadata__": {"key": "text"},
//               "name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}}
//   the rest   the tensors; offsets count from here, row-major, without gaps or overlaps
//
// The header may end in spaces (we pad it to 8 bytes, other writers may not).

/// One tensor as the header describes it, in `data`, the bytes after the header.
inline Tensor read_entry(const std::string& name, const Json& entry, std::string_view data,
                         const std::string& where) {
  const auto is = [&](const char* key, Json::value_t type) {
    return entry.is_object() && entry.contains(key) && entry[key].type() == type;
  };
  if (!is("dtype", Json::value_t::string) || !is("shape", Json::value_t::array) ||
      !is("data_offsets", Json::value_t::array) || entry["data_offsets"].size() != 2)
    fail("bad header: ", where, ": expected dtype, shape and data_offsets");
  const auto whole = [&](const Json& value) {
    if (!value.is_number_unsigned() || value.get<std::uint64_t>() >> 63 != 0)
      fail("bad header: ", where, ": expected whole numbers below 2^63 in shape and offsets");
    return value.get<std::int64_t>();
  };
  const auto dtype = std::find_if(kDTypes.begin(), kDTypes.end(), [&](const DTypeInfo& known) {
    return entry["dtype"] == known.name;
  });
  if (dtype == kDTypes.end())
    fail("unknown dtype: ", where, ": found ", quote(entry["dtype"].get<std::string>()));
  Tensor tensor{name, static_cast<DType>(dtype - kDTypes.begin()), {}, nullptr, nullptr};
  for (const Json& extent : entry["shape"]) tensor.shape.push_back(whole(extent));
  const std::uint64_t size = checked_bytes(tensor.shape, tensor.dtype, where);
  const auto begin = static_cast<std::uint64_t>(whole(entry["data_offsets"][0]));
  const auto end = static_cast<std::uint64_t>(whole(entry["data_offsets"][1]));
  if (begin > end || end > data.size())
    fail("bad offsets: ", where, ": expected begin <= end <= ", data.size(), ", found ", begin,
         ", ", end);
  if (end - begin != size)
    fail("bad offsets: ", where, ": expected ", size, " bytes for ", dtype->name, " ",
         shape_text(tensor.shape), ", found ", end - begin);
  tensor.data = data.data() + begin;
  return tensor;
}

/// Fails unless the tensors cover the data from end to end, each byte once.
inline void check_cover(const Checkpoint& checkpoint, std::string_view data) {
  std::vector<const Tensor*> order;
  for (const auto& item : checkpoint.tensors)
    if (item.second.size() > 0) order.push_back(&item.second);
  std::sort(order.begin(), order.end(),
            [](const Tensor* a, const Tensor* b) { return a->bytes().data() < b->bytes().data(); });
  std::size_t covered = 0;
  for (const Tensor* tensor : order) {
    const auto begin = static_cast<std::size_t>(tensor->bytes().data() - data.data());
    if (begin != covered)
      fail("bad offsets: ", checkpoint.where, ": ", quote(tensor->name), ": expected it at byte ",
           covered, ", where the one before it ends, found ", begin);
    covered += tensor->byte_size();
  }
  if (covered != data.size())
    fail("bad offsets: ", checkpoint.where, ": expected tensors up to byte ", data.size(),
         ", found ", covered);
}

inline Checkpoint read_safetensors(const std::string& path) {
  constexpr std::size_t kLongestHeader = 100'000'000;  // as in the safetensors library
  const auto file = std::make_shared<const MappedFile>(path);
  ByteReader in(file->bytes(), path);
  const auto header_size = in.read<std::uint64_t>();
  const std::uint64_t longest = std::min(kLongestHeader, file->size() - 8);
  if (header_size > longest)
    fail("bad header: ", path, ": expected at most ", longest, " bytes, found ", header_size);
  const Json header = parse_json(in.take(header_size), path);
  const std::string_view data = file->bytes().substr(in.position());
  if (!header.is_object()) fail("bad header: ", path, ": expected an object");

  Checkpoint checkpoint{{}, {}, path};
  for (const auto& [name, entry] : header.items()) {
    const std::string where = path + ": " + quote(name);
    if (name != "__metadata__") {
      Tensor& tensor = checkpoint.tensors[name] = read_entry(name, entry, data, where);
      tensor.keep_alive = file;
      continue;
    }
    if (!entry.is_object()) fail("bad header: ", where, ": expected an object");
    for (const auto& [key, text] : entry.items()) {
      if (!text.is_string()) fail("bad header: ", where, ": ", quote(key), ": expected a string");
      checkpoint.metadata[key] = text.get<std::string>();
    }
  }
  check_cover(checkpoint, data);
  return checkpoint;
}

/// Begins a safetensors file: all but the tensors' data, which must follow in this order.
inline void write_safetensors_header(AtomicFile& file, const std::vector<Tensor>& tensors,
                                     const std::map<std::string, std::string>& metadata) {
  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  std::uint64_t offset = 0;
  for (const Tensor& tensor : tensors) {
    if (header.contains(tensor.name)) fail("cannot write: two tensors named ", quote(tensor.name));
    const std::uint64_t end = offset + tensor.byte_size();
    header[tensor.name] = {{"dtype", dtype_name(tensor.dtype)},
                           {"shape", tensor.shape},
                           {"data_offsets", {offset, end}}};
    offset = end;
  }
  std::string text;
  try {
    text = header.dump();
  } catch (const Json::exception&) {
    fail("cannot write: expected names and metadata in UTF-8");
  }
  text.resize((text.size() + 7) / 8 * 8, ' ');
  const std::uint64_t size = text.size();
  file.write({reinterpret_cast<const char*>(&size), sizeof size});
  file.write(text);
}

/// Writes a safetensors file: widest dtypes first, so that every tensor is aligned.
inline void write_safetensors(const std::string& path, std::vector<Tensor> tensors,
                              const std::map<std::string, std::string>& metadata = {}) {
  std::stable_sort(tensors.begin(), tensors.end(), [](const Tensor& a, const Tensor& b) {
    return dtype_size(a.dtype) > dtype_size(b.dtype);
  });
  AtomicFile file(path);
  write_safetensors_header(file, tensors, metadata);
  for (const Tensor& tensor : tensors) file.write(tensor.bytes());
  file.commit();
}

// --- 2.4 PyTorch: the archive -----------------------------------------------------------
//
// torch.save writes a zip of stored (never compressed) entries under one folder:
//
//   NAME/data.pkl     a pickle: the state dict, with each storage replaced by its key
//   NAME/byteorder    "little" or "big"; absent in older files
//   NAME/data/KEY     the bytes of one storage, which several tensors may share
//
// A zip is read from its end: the end record gives the offset of the central directory,
// which lists the entries; each points to a local header, and the bytes follow that. Where
// a 32-bit field is full, the zip64 records hold the number in 64 bits.

using Entries = std::map<std::string, std::string_view>;  // name, bytes

inline void expect_signature(ByteReader& in, std::string_view signature, const char* what) {
  if (in.take(4) != signature)
    fail("bad zip: ", in.where(), ": expected ", what, " at byte ", in.position() - 4,
         ", found something else");
}

/// Moves to the first entry of the central directory and returns how many it has.
inline std::uint64_t find_directory(ByteReader& in, std::string_view file) {
  const std::size_t tail = file.size() - std::min<std::size_t>(file.size(), 22 + 65535);
  const std::size_t end_in_tail = file.substr(tail).rfind("PK\5\6");
  if (end_in_tail == std::string_view::npos)
    fail("truncated: ", in.where(), ": expected a zip archive's end record, found none");
  const std::size_t end = tail + end_in_tail;
  in.seek(end + 10);
  std::uint64_t count = in.read<std::uint16_t>();
  in.take(4);
  std::uint64_t directory = in.read<std::uint32_t>();
  in.take(in.read<std::uint16_t>());  // a comment
  if (count == 0xffff || directory == 0xffffffff) {
    in.seek(end - std::min<std::size_t>(end, 20));
    expect_signature(in, "PK\6\7", "the zip64 locator");
    in.take(4);
    in.seek(in.read<std::uint64_t>());
    expect_signature(in, "PK\6\6", "the zip64 end record");
    in.take(28);
    count = in.read<std::uint64_t>();
    in.take(8);
    directory = in.read<std::uint64_t>();
  }
  in.seek(directory);
  return count;
}

/// Reads one entry of the central directory, and the bytes that it points to.
inline std::pair<std::string, std::string_view> read_zip_entry(ByteReader& in,
                                                               std::string_view file) {
  expect_signature(in, "PK\1\2", "a directory entry");
  in.take(4);
  const auto flags = in.read<std::uint16_t>(), method = in.read<std::uint16_t>();
  in.take(8);
  std::uint64_t stored = in.read<std::uint32_t>(), size = in.read<std::uint32_t>();
  const auto name_size = in.read<std::uint16_t>(), extra_size = in.read<std::uint16_t>();
  const auto comment_size = in.read<std::uint16_t>();
  in.take(8);
  std::uint64_t offset = in.read<std::uint32_t>();
  const std::string name(in.take(name_size));
  const std::string where = in.where() + ": " + quote(name);
  ByteReader extra(in.take(extra_size), where);
  in.take(comment_size);
  while (extra.position() + 4 <= extra_size) {
    const auto id = extra.read<std::uint16_t>();
    ByteReader field(extra.take(extra.read<std::uint16_t>()), where);
    const auto widen = [&](std::uint64_t& number) {
      if (number == 0xffffffff) number = field.read<std::uint64_t>();
    };
    if (id == 1) widen(size), widen(stored), widen(offset);
  }
  if (method != 0 || (flags & 1) != 0 || stored != size)
    fail("bad zip: ", where, ": expected a stored entry, found a compressed or encrypted one");
  ByteReader local(file, where);
  local.seek(offset);
  expect_signature(local, "PK\3\4", "a local header");
  local.take(22);
  const auto local_name = local.read<std::uint16_t>(), local_extra = local.read<std::uint16_t>();
  local.take(local_name);
  local.take(local_extra);
  return {name, local.take(size)};
}

inline Entries read_zip(std::string_view file, const std::string& path) {
  ByteReader in(file, path);
  Entries entries;
  for (std::uint64_t left = find_directory(in, file); left > 0; --left) {
    auto entry = read_zip_entry(in, file);
    if (!entries.insert(entry).second)
      fail("bad zip: ", path, ": ", quote(entry.first), ": appears twice");
  }
  return entries;
}

// --- 2.5 PyTorch: the pickle ------------------------------------------------------------
//
// A pickle is a program for a stack machine: opcodes push values, collect them into tuples
// and dicts, note them in a memo, and call Python functions by name. The last of these
// makes pickles dangerous, so this machine knows only the names that a state dict needs and
// calls nothing: a call of _rebuild_tensor_v2 leaves its arguments (storage, offset, shape,
// strides) on the stack as a tensor. Any other opcode or name is refused.

/// A value on the unpickler's stack. It owns nothing: all values live as long as the
/// unpickler, so a pickle that ties them into a knot does no harm.
struct PickleValue {
  enum Kind { None, Bool, Int, Float, Text, Tuple, List, Dict, Name, Storage, Tensor };
  Kind kind = None;
  std::int64_t integer = 0;         // bool, int; a storage's number of values
  std::string text;                 // text; name: "module.name"; storage: its key
  std::vector<PickleValue*> items;  // of a dict: key, value, key, value, ...
  DType dtype = DType::U8;          // of a storage or a tensor; an untyped storage has bytes
};

class Unpickler {
 public:
  using Value = PickleValue;

  explicit Unpickler(ByteReader& in) : in_(in) {}

  /// Runs one pickle and returns what it leaves.
  const Value& load() {
    stack_.clear();
    memo_.clear();
    for (std::size_t steps = 0; steps < kMostSteps; ++steps) {
      const auto opcode = in_.read<std::uint8_t>();
      if (opcode == '.') return *pop();
      step(opcode);
    }
    refuse("has more than ", kMostSteps, " opcodes");
  }

  /// The storages that tensors refer to, by key.
  const std::map<std::string, const Value*>& storages() const { return storages_; }

 private:
  static constexpr Value* kMark = nullptr;
  static constexpr std::size_t kMostSteps = 1 << 22;  // a tensor takes about 33

  // One line an opcode.
  // clang-format off
  void step(std::uint8_t opcode) {
    switch (opcode) {
      case 0x80: return check_protocol(in_.read<std::uint8_t>());  // PROTO
      case 0x95: in_.take(8); return;  // FRAME: how many bytes are worth reading at once
      case '(': return stack_.push_back(kMark);
      case '0': pop(); return;
      case '1': pop_to_mark(); return;
      // constants
      case 'N': make(Value::None); return;
      case 0x88: make(Value::Bool).integer = 1; return;
      case 0x89: make(Value::Bool).integer = 0; return;
      case 'K': make(Value::Int).integer = in_.read<std::uint8_t>(); return;
      case 'M': make(Value::Int).integer = in_.read<std::uint16_t>(); return;
      case 'J': make(Value::Int).integer = in_.read<std::int32_t>(); return;
      case 0x8a: return push_long(in_.take(in_.read<std::uint8_t>()));
      case 'G': in_.take(8); make(Value::Float); return;  // no tensor needs its value
      case 'X': make(Value::Text).text = in_.take(in_.read<std::uint32_t>()); return;
      case 0x8c: make(Value::Text).text = in_.take(in_.read<std::uint8_t>()); return;
      case 0x8d: make(Value::Text).text = in_.take(in_.read<std::uint64_t>()); return;
      // tuples, lists, dicts
      case ')': make(Value::Tuple); return;
      case ']': make(Value::List); return;
      case '}': make(Value::Dict); return;
      case 't': return push_tuple(pop_to_mark());
      case 0x85: return push_tuple(pop_some(1));
      case 0x86: return push_tuple(pop_some(2));
      case 0x87: return push_tuple(pop_some(3));
      case 'a': return append(pop_some(1), Value::List);
      case 'e': return append(pop_to_mark(), Value::List);
      case 's': return append(pop_some(2), Value::Dict);
      case 'u': return append(pop_to_mark(), Value::Dict);
      // memo
      case 'q': memo_[in_.read<std::uint8_t>()] = top(); return;
      case 'r': memo_[in_.read<std::uint32_t>()] = top(); return;
      case 0x94: memo_[static_cast<std::uint32_t>(memo_.size())] = top(); return;
      case 'h': return recall(in_.read<std::uint8_t>());
      case 'j': return recall(in_.read<std::uint32_t>());
      // names and calls
      case 'c': { const auto module = in_.line(); return push_name(module, in_.line()); }
      case 0x93: { const auto name = pop_some(2); return push_name(name[0]->text, name[1]->text); }
      case 'Q': return push_storage(pop());
      case 'R': return call();
      case 'b': pop(); expect(top(), Value::Dict); return;  // attributes of an OrderedDict
      default: refuse("has the opcode ", int{opcode});
    }
  }
  // clang-format on

  template <class... Parts>
  [[noreturn]] void refuse(const Parts&... parts) const {
    fail("bad pickle: ", in_.where(), ": ", parts..., " at byte ", in_.position(),
         "; only state dicts of tensors are read");
  }

  Value& make(Value::Kind kind) {
    stack_.push_back(&values_.emplace_back());
    top()->kind = kind;
    return *top();
  }
  Value* top() {
    if (stack_.empty() || stack_.back() == kMark) refuse("takes from an empty stack");
    return stack_.back();
  }
  Value* pop() {
    Value* value = top();
    stack_.pop_back();
    return value;
  }
  std::vector<Value*> pop_some(std::size_t n) {
    std::vector<Value*> items(n);
    for (std::size_t i = n; i-- > 0;) items[i] = pop();
    return items;
  }
  std::vector<Value*> pop_to_mark() {
    std::vector<Value*> items;
    while (!stack_.empty() && stack_.back() != kMark) items.push_back(pop());
    if (stack_.empty()) refuse("looks for a mark that is not there");
    stack_.pop_back();
    std::reverse(items.begin(), items.end());
    return items;
  }
  Value& expect(Value* value, Value::Kind kind) const {
    if (value->kind != kind) refuse("holds a value of the wrong kind");
    return *value;
  }
  void check_protocol(int version) {
    if (version < 2 || version > 5) refuse("has protocol ", version);
  }
  void push_long(std::string_view bytes) {  // two's complement, as many bytes as needed
    if (bytes.size() > 8) refuse("has an integer of ", bytes.size(), " bytes");
    const bool negative = !bytes.empty() && (bytes.back() & 0x80) != 0;
    std::int64_t number = negative ? -1 : 0;
    std::memcpy(&number, bytes.data(), bytes.size());
    make(Value::Int).integer = number;
  }
  void push_tuple(std::vector<Value*> items) { make(Value::Tuple).items = std::move(items); }
  void append(const std::vector<Value*>& items, Value::Kind kind) {
    Value& container = expect(top(), kind);
    if (kind == Value::Dict && items.size() % 2 != 0) refuse("has a key without a value");
    container.items.insert(container.items.end(), items.begin(), items.end());
  }
  void recall(std::uint32_t index) {
    const auto found = memo_.find(index);
    if (found == memo_.end()) refuse("recalls what it never noted");
    stack_.push_back(found->second);
  }

  void push_name(std::string_view module, std::string_view name) {
    Value& value = make(Value::Name);
    value.text.append(module).append(".").append(name);
    for (std::size_t i = 0; i < kDTypes.size() && module == "torch"; ++i) {
      if (name != kDTypes[i].torch && name != kDTypes[i].torch_storage) continue;
      value.dtype = static_cast<DType>(i);
      return;
    }
    for (const char* known : {"collections.OrderedDict", "torch._utils._rebuild_tensor_v2",
                              "torch._utils._rebuild_tensor_v3", "torch._utils._rebuild_parameter",
                              "torch.storage.UntypedStorage", "torch.UntypedStorage"})
      if (value.text == known) return;
    refuse("asks for ", quote(value.text));
  }

  /// The persistent id ("storage", type, key, device, number of values).
  void push_storage(Value* id) {
    const std::vector<Value*>& items = expect(id, Value::Tuple).items;
    const bool view = items.size() == 6 && items[5]->kind != Value::None;
    if (items.size() < 5 || items.size() > 6 || view || items[0]->text != "storage")
      refuse("has an unknown persistent id");
    Value& storage = make(Value::Storage);
    storage.dtype = expect(items[1], Value::Name).dtype;
    storage.text = expect(items[2], Value::Text).text;
    storage.integer = expect(items[4], Value::Int).integer;
    storages_.emplace(storage.text, &storage);
  }

  /// Calls a function with a tuple of arguments; of a tensor's we keep the first four.
  void call() {
    const std::vector<Value*>& arguments = expect(pop(), Value::Tuple).items;
    const std::string& function = expect(pop(), Value::Name).text;
    const std::size_t n = arguments.size();
    if (function == "collections.OrderedDict" && n == 0) {
      make(Value::Dict);
    } else if (function == "torch._utils._rebuild_parameter" && n == 3) {
      stack_.push_back(&expect(arguments[0], Value::Tensor));
    } else if (function == "torch._utils._rebuild_tensor_v2" && n >= 6) {
      push_tensor(arguments, expect(arguments[0], Value::Storage).dtype);
    } else if (function == "torch._utils._rebuild_tensor_v3" && n >= 7) {
      push_tensor(arguments, expect(arguments[6], Value::Name).dtype);
    } else {
      refuse("calls ", quote(function), " with ", n, " arguments");
    }
  }
  void push_tensor(const std::vector<Value*>& arguments, DType dtype) {
    expect(arguments[0], Value::Storage);
    expect(arguments[1], Value::Int);
    for (const std::size_t i : {2, 3}) {
      const std::vector<Value*>& extents = expect(arguments[i], Value::Tuple).items;
      if (extents.size() > 64) refuse("has a tensor of ", extents.size(), " dimensions");
      for (Value* extent : extents) expect(extent, Value::Int);
    }
    Value& tensor = make(Value::Tensor);
    tensor.items.assign(arguments.begin(), arguments.begin() + 4);
    tensor.dtype = dtype;
  }

  ByteReader& in_;
  std::deque<Value> values_;
  std::vector<Value*> stack_;
  std::unordered_map<std::uint32_t, Value*> memo_;
  std::map<std::string, const Value*> storages_;
};

// --- 2.6 PyTorch: the tensors -----------------------------------------------------------

/// Copies a strided tensor into row-major order.
inline std::shared_ptr<const void> gather(const char* from, const std::vector<std::int64_t>& shape,
                                          const std::vector<std::int64_t>& strides,
                                          std::size_t item, std::size_t bytes) {
  const auto buffer = std::make_shared<std::vector<char>>(bytes);
  std::vector<std::int64_t> index(shape.size());
  std::size_t offset = 0;  // of the value at index
  for (std::size_t done = 0; done < bytes; done += item) {
    std::memcpy(buffer->data() + done, from + offset * item, item);
    for (std::size_t i = shape.size(); i-- > 0;) {
      offset += static_cast<std::size_t>(strides[i]);
      if (++index[i] < shape[i]) break;
      offset -= static_cast<std::size_t>(strides[i] * shape[i]);
      index[i] = 0;
    }
  }
  return {buffer, buffer->data()};
}

/// The tensor that a pickled one stands for: a window into its storage if it is row-major
/// there, otherwise a copy. Copies draw on `budget` bytes, so that a small file cannot ask
/// for a large memory.
inline Tensor tensor_of(const std::string& name, const PickleValue& pickled,
                        const Entries& storages, const std::string& path,
                        const std::shared_ptr<const MappedFile>& file, std::uint64_t& budget) {
  const std::string where = path + ": " + quote(name);
  const PickleValue& storage = *pickled.items[0];
  const auto bytes = storages.find(storage.text);
  const std::uint64_t held = checked_bytes({storage.integer}, storage.dtype, where);
  if (bytes == storages.end() || bytes->second.size() < held)
    fail("truncated: ", where, ": expected ", held, " bytes in storage ", quote(storage.text),
         ", found ", bytes == storages.end() ? 0 : bytes->second.size());

  Tensor tensor{name, pickled.dtype, {}, bytes->second.data(), file};
  std::vector<std::int64_t> strides;
  for (const PickleValue* extent : pickled.items[2]->items) tensor.shape.push_back(extent->integer);
  for (const PickleValue* stride : pickled.items[3]->items) strides.push_back(stride->integer);
  const std::uint64_t size = checked_bytes(tensor.shape, tensor.dtype, where);
  if (size == 0) return tensor;

  const std::int64_t first = pickled.items[1]->integer;  // of all these, the index in storage
  std::int64_t last = first, row_major = 1;
  bool contiguous = true, inside = first >= 0 && strides.size() == tensor.shape.size();
  for (std::size_t i = strides.size(); inside && i-- > 0;) {
    const std::int64_t extent = tensor.shape[i];
    std::int64_t reach = 0;
    inside = strides[i] >= 0 && !__builtin_mul_overflow(strides[i], extent - 1, &reach) &&
             !__builtin_add_overflow(last, reach, &last);
    contiguous = contiguous && (extent == 1 || strides[i] == row_major);
    row_major *= extent;
  }
  const std::size_t item = dtype_size(tensor.dtype);
  if (!inside || static_cast<std::uint64_t>(last) >= held / item)
    fail("out of range: ", where, ": expected values inside the ", held / item, " of storage ",
         quote(storage.text), ", found offset ", first, ", shape ", shape_text(tensor.shape),
         ", strides ", shape_text(strides));
  const char* start = bytes->second.data() + static_cast<std::uint64_t>(first) * item;
  tensor.data = start;
  if (contiguous) return tensor;
  if (size > budget)
    fail("too large: ", where, ": its strides repeat more data than the file holds");
  budget -= size;
  tensor.keep_alive = gather(start, tensor.shape, strides, item, size);
  tensor.data = tensor.keep_alive.get();
  return tensor;
}

/// A dict of tensors, or one level deeper: {"state_dict": {...}} or {"model": {...}}.
inline const PickleValue& state_dict(const PickleValue& root, const std::string& path) {
  if (root.kind != PickleValue::Dict) fail("bad pickle: ", path, ": expected a dict of tensors");
  const PickleValue* inner = nullptr;
  for (std::size_t i = 0; i < root.items.size(); i += 2) {
    const std::string& key = root.items[i]->text;
    const PickleValue& value = *root.items[i + 1];
    if (value.kind == PickleValue::Tensor) return root;
    if (value.kind != PickleValue::Dict || (key != "state_dict" && key != "model")) continue;
    if (inner != nullptr) fail("bad pickle: ", path, ": expected one state dict, found two");
    inner = &value;
  }
  return inner != nullptr ? *inner : root;
}

inline Checkpoint make_checkpoint(const PickleValue& root, const Entries& storages,
                                  const std::string& path,
                                  const std::shared_ptr<const MappedFile>& file) {
  Checkpoint checkpoint{{}, {}, path};
  std::uint64_t budget = file->size();
  const PickleValue& dict = state_dict(root, path);
  for (std::size_t i = 0; i < dict.items.size(); i += 2) {
    const PickleValue &key = *dict.items[i], &value = *dict.items[i + 1];
    if (key.kind != PickleValue::Text || value.kind != PickleValue::Tensor)
      fail("bad pickle: ", path, ": ", quote(key.text), ": expected a name and a tensor");
    if (!checkpoint.tensors
             .emplace(key.text, tensor_of(key.text, value, storages, path, file, budget))
             .second)
      fail("bad pickle: ", path, ": the tensor ", quote(key.text), " appears twice");
  }
  return checkpoint;
}

/// Before PyTorch 1.6 there was no zip but five pickles in a row: a magic number, the
/// protocol version, facts about the machine, the state dict, and the list of storage keys;
/// then, in that order, each storage's number of values (8 bytes) and its bytes.
constexpr std::string_view kLegacyMagic("\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.",
                                        15);

inline Checkpoint read_legacy_pytorch(const std::shared_ptr<const MappedFile>& file,
                                      const std::string& path) {
  ByteReader in(file->bytes(), path);
  in.seek(kLegacyMagic.size());
  Unpickler unpickler(in);
  if (unpickler.load().integer != 1001) fail("bad pickle: ", path, ": expected protocol 1001");
  const PickleValue& machine = unpickler.load();
  for (std::size_t i = 0; i + 1 < machine.items.size(); i += 2)
    if (machine.items[i]->text == "little_endian" && machine.items[i + 1]->integer != 1)
      fail("wrong byte order: ", path, ": expected little-endian, found big-endian");
  const PickleValue& root = unpickler.load();
  const PickleValue& keys = unpickler.load();
  Entries storages;
  for (const PickleValue* key : keys.items) {
    const auto storage = unpickler.storages().find(key->text);
    if (storage == unpickler.storages().end())
      fail("bad pickle: ", path, ": the storage ", quote(key->text), " belongs to no tensor");
    const auto n = in.read<std::int64_t>();
    if (n != storage->second->integer)
      fail("bad pickle: ", path, ": storage ", quote(key->text), ": expected ",
           storage->second->integer, " values, found ", n);
    storages[key->text] = in.take(checked_bytes({n}, storage->second->dtype, path));
  }
  return make_checkpoint(root, storages, path, file);
}

inline Checkpoint read_pytorch_bin(const std::string& path) {
  const auto file = std::make_shared<const MappedFile>(path);
  if (file->bytes().substr(0, kLegacyMagic.size()) == kLegacyMagic)
    return read_legacy_pytorch(file, path);
  if (file->bytes().substr(0, 4) != "PK\3\4")
    fail("unknown format: ", path, ": expected a file written by torch.save, found something else");
  const Entries entries = read_zip(file->bytes(), path);
  const auto pickle = std::find_if(entries.begin(), entries.end(), [](const auto& entry) {
    const std::size_t slash = entry.first.find('/');
    return slash != std::string::npos && entry.first.substr(slash) == "/data.pkl";
  });
  if (pickle == entries.end())
    fail("bad zip: ", path, ": expected an entry NAME/data.pkl, found none");
  const std::string folder = pickle->first.substr(0, pickle->first.size() - 8);
  const auto order = entries.find(folder + "byteorder");
  if (order != entries.end() && order->second != "little")
    fail("wrong byte order: ", path, ": expected little, found ", quote(order->second));
  Entries storages;
  for (const auto& [name, bytes] : entries)
    if (name.compare(0, folder.size() + 5, folder + "data/") == 0)
      storages.emplace(name.substr(folder.size() + 5), bytes);
  ByteReader in(pickle->second, path);
  Unpickler unpickler(in);
  return make_checkpoint(unpickler.load(), storages, path, file);
}

// --- 2.7 A model's directory ------------------------------------------------------------

/// Large checkpoints are cut into shards; the index says which tensor is in which file:
/// {"weight_map": {"tensor name": "file name"}}.
template <class Reader>
Checkpoint read_shards(const std::string& directory, const std::string& index, Reader read) {
  const Json json = parse_json(MappedFile(index).bytes(), index);
  if (!json.is_object() || !json.contains("weight_map") || !json["weight_map"].is_object())
    fail("bad index: ", index, ": expected an object weight_map");
  Checkpoint all{{}, {}, index};
  std::map<std::string, Checkpoint> shards;
  for (const auto& [name, file] : json["weight_map"].items()) {
    const std::string shard = file.is_string() ? std::string(file) : "";
    if (shard.empty() || shard.find('/') != std::string::npos ||
        shard.find('\0') != std::string::npos)
      fail("bad index: ", index, ": ", quote(name),
           ": expected the name of a file beside the index");
    auto found = shards.find(shard);
    if (found == shards.end())
      found = shards.emplace(shard, read(std::string(directory).append("/").append(shard))).first;
    all.tensors.emplace(name, found->second.at(name));
  }
  return all;
}

/// Reads a model's weights, whichever of the four published forms the directory holds.
inline Checkpoint read_checkpoint(const std::string& directory) {
  const std::string safetensors = directory + "/model.safetensors";
  const std::string pytorch = directory + "/pytorch_model.bin", index = ".index.json";
  const auto exists = [](const std::string& path) { return ::access(path.c_str(), F_OK) == 0; };
  if (exists(safetensors)) return read_safetensors(safetensors);
  if (exists(safetensors + index))
    return read_shards(directory, safetensors + index, read_safetensors);
  if (exists(pytorch)) return read_pytorch_bin(pytorch);
  if (exists(pytorch + index)) return read_shards(directory, pytorch + index, read_pytorch_bin);
  fail("no weights: ", directory, ": expected model.safetensors or pytorch_model.bin, whole or ",
       "with an index.json, found neither");
}


/// A file whole, or standard input for "-".
inline std::string read_file(const std::string& path) {
  if (path == "-") return {std::istreambuf_iterator<char>(std::cin), {}};
  if (std::filesystem::is_directory(path))
    fail("cannot read: ", path, ": expected a file, found a directory");
  std::ifstream file(path, std::ios::binary);  // may be a pipe
  if (!file) fail("cannot open: ", path, ": ", std::strerror(errno));
  return {std::istreambuf_iterator<char>(file), {}};
}

inline void take_standard_numbers() {}
inline std::string what_folder_is(const std::string&) { return ""; }

}  // namespace mamba
