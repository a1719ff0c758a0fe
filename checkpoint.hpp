// checkpoint.hpp - bytes to tensors and back: errors and files; tensors; safetensors; torch.save;
// a model's folder. What a model computes is not known here.
//
// What is read comes from strangers. Whatever bytes a file holds, reading it ends in tensors or
// in one line, "what: where: expected ..., found ..."; no byte of it is ever run; and the work
// and memory that it can ask for are bounded by its size.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <Eigen/Core>
#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <filesystem>
#include <initializer_list>
#include <iostream>
#include <limits>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <random>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

namespace mamba {

using Json = nlohmann::json;
using Shape = std::vector<std::int64_t>;  // row-major; empty: one value

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "checkpoints are little-endian");

// ================================ 1. Errors and files ==================================

/// A part of a line, and how a stream takes it.
struct LinePart {
  const void* value;
  void (*write)(std::ostream&, const void*);

  LinePart(const char* text) : value(text) {
    write = [](std::ostream& out, const void* v) { out << static_cast<const char*>(v); };
  }
  template <class Value>
  LinePart(const Value& of) : value(&of) {
    write = [](std::ostream& out, const void* v) { out << *static_cast<const Value*>(v); };
  }
};

/// The parts as one line. Control characters, which only a broken file brings, become '?'.
inline std::string line_of(std::initializer_list<LinePart> parts) {
  std::ostringstream out;
  for (const LinePart& part : parts) part.write(out, part.value);
  std::string line = out.str();
  for (char& c : line) c = (c & 0xe0) == 0 ? '?' : c;
  return line;
}

template <class... Parts>
std::string one_line(const Parts&... parts) {
  return line_of({parts...});
}

/// What is wrong is how the program was called: exit status 2.
struct UsageError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class Error>
[[noreturn]] void fail_with(std::initializer_list<LinePart> parts) {
  throw Error(line_of(parts));
}

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  fail_with<std::runtime_error>({parts...});
}

template <class... Parts>
[[noreturn]] void fail_usage(const Parts&... parts) {
  fail_with<UsageError>({parts...});
}

/// Fails with the system's reason if a call of it did.
inline void check_call(bool good, const char* what, const std::string& path) {
  if (!good) fail(what, ": ", path, ": ", std::strerror(errno));
}

inline void warn(const std::string& line) { std::cerr << "warning: " << line << "\n"; }

/// Warnings of one kind: the first few, and how many more there are.
inline void warn(const std::vector<std::string>& lines) {
  constexpr std::size_t kShown = 8;
  for (std::size_t i = 0; i < std::min(lines.size(), kShown); ++i) warn(lines[i]);
  if (lines.size() > kShown)
    warn("and " + std::to_string(lines.size() - kShown) + " more warnings of this kind");
}

/// A name out of a file, fit for an error line: printable, quoted, and not a page long.
inline std::string quote(std::string_view name, std::size_t longest = 80) {
  std::string text(name.substr(0, longest));
  for (char& c : text) c = c < 32 || c > 126 ? '?' : c;
  return "'" + text + (name.size() > longest ? "...'" : "'");
}

/// What bytes are that come instead of a model's file, and what to do; "" if nothing is known.
/// Each start is too long to be that of a safetensors file, eight bytes of a moderate number.
inline std::string what_it_is(std::string_view bytes) {
  static constexpr const char* kPage =
      "a web page instead of the file: download it again (some models need an access token)";
  static constexpr std::pair<std::string_view, const char*> kStarts[] = {
      {"version https://git-lfs",
       "a Git LFS pointer instead of the file: run 'git lfs pull' in its folder, or download it"},
      {"<!doctype", kPage},
      {"<html", kPage},
      {"<?xml", kPage},
      {"gguf", "a GGUF file, as llama.cpp has them: expected the files that it was made from"},
      {"\x80\x02\x8a\x0a\x6c\xfc\x9c",
       "a file that torch.save wrote before PyTorch 1.6: load and save it with a newer one"}};
  if (bytes.empty()) return "an empty file: download it again";
  if (bytes.substr(0, 3) == "\xef\xbb\xbf") bytes.remove_prefix(3);  // a byte order mark
  bytes.remove_prefix(std::min(bytes.find_first_not_of(" \t\r\n"), bytes.size()));
  std::string begin(bytes.substr(0, 24));
  for (char& c : begin) c = c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c;
  for (const auto& [start, what] : kStarts)
    if (begin.rfind(start, 0) == 0) return what;
  return "";
}

/// The number of an open file, closed at the end.
struct Descriptor {
  int number = -1;
  ~Descriptor() { close(); }
  int close() { return number < 0 ? 0 : ::close(std::exchange(number, -1)); }
};

/// The end of a mapping.
struct Unmap {
  std::size_t size;
  void operator()(void* start) const { ::munmap(start, size); }
};

/// A file mapped into memory, read-only. Pages are read when they are first touched.
class MappedFile {
 public:
  explicit MappedFile(const std::string& path) {
    // Without O_NONBLOCK, opening a pipe would wait for someone to write into it.
    const Descriptor file{::open(path.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC)};
    struct stat status = {};
    check_call(file.number >= 0 && ::fstat(file.number, &status) == 0, "cannot open", path);
    const char* other = S_ISFIFO(status.st_mode) ? "a pipe" : "something else";
    if (S_ISDIR(status.st_mode)) other = "a directory";
    if (!S_ISREG(status.st_mode)) fail("cannot read: ", path, ": expected a file, found ", other);
    const auto size = static_cast<std::size_t>(status.st_size);
    if (size == 0) return;  // nothing can be mapped
    void* data = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file.number, 0);
    check_call(data != MAP_FAILED, "cannot map", path);
    memory_ = {data, Unmap{size}};
    bytes_ = {static_cast<const char*>(data), size};
  }
  std::string_view bytes() const { return bytes_; }
  /// Who holds this may go on using the bytes when the object is gone.
  const std::shared_ptr<const void>& memory() const { return memory_; }

 private:
  std::shared_ptr<const void> memory_;
  std::string_view bytes_;
};

/// A text whole: from a file, from a pipe, or from standard input, whose path is "-".
inline std::string read_file(const std::string& path) {
  const bool standard = path == "-";
  const Descriptor file{standard ? ::dup(0) : ::open(path.c_str(), O_RDONLY | O_CLOEXEC)};
  std::string text;
  std::vector<char> block(1 << 16);
  for (;;) {
    const ssize_t n = file.number < 0 ? -1 : ::read(file.number, block.data(), block.size());
    if (n < 0 && errno == EINTR) continue;
    check_call(n >= 0, "cannot read", standard ? "standard input" : path);
    if (n == 0) return text;
    text.append(block.data(), static_cast<std::size_t>(n));
  }
}

/// For the start of main. Of the numbers 0 to 2, those that were closed are taken, by what
/// fails when it is read or written: no file opened later passes for standard input or output.
inline void take_standard_numbers() {
  for (const int number : {0, 1, 2})
    if (::fcntl(number, F_GETFD) < 0)
      check_call(::open("/dev/null", number ? O_RDONLY : O_WRONLY) >= 0, "cannot open",
                 "/dev/null");
}

/// Whether a path is a number of an open file, such as what /dev/stdout is a link to.
inline bool is_open_file(const std::filesystem::path& path) {
  return path.parent_path() == "/dev/fd" || path.parent_path() == "/proc/self/fd";
}

/// Where a path's links lead, be it to nothing yet; an open file stays.
inline std::string follow_links(std::filesystem::path path) {
  std::error_code error;
  for (int links = 0; links < 40 && !is_open_file(path) && is_symlink(path, error); ++links)
    path = path.parent_path() / read_symlink(path, error);
  return path.string();
}

/// A file that appears under its name only when it is whole, with the mode of the one that it
/// replaces. Until commit() its bytes have no name (O_TMPFILE) and vanish with the program,
/// however that ends; where the system has no such files, they lie in a part file beside the
/// target. What is not a regular file (a pipe, /dev/stdout) is opened by the first write().
class AtomicFile {
 public:
  explicit AtomicFile(const std::string& path) : path_(follow_links(path)) {
    struct stat old = {};
    const bool exists = ::stat(path_.c_str(), &old) == 0;
    if (exists && S_ISDIR(old.st_mode)) errno = EISDIR, check(false);
    check(exists ? ::access(path_.c_str(), W_OK) == 0 : errno == ENOENT);
    if (is_open_file(path_) || (exists && !S_ISREG(old.st_mode))) return;
    std::random_device random;
    const std::string folder = std::filesystem::path(path_).parent_path() / ".";
    part_ = folder + std::to_string(random()) + std::to_string(random()) + ".part";
    const mode_t mode = exists ? 0600 : 0666;  // less the user's umask
    if (::access("/proc/self/fd", F_OK) == 0)
      file_.number = ::open(folder.c_str(), O_TMPFILE | O_WRONLY | O_CLOEXEC, mode);
    nameless_ = file_.number >= 0;
    if (!nameless_)
      file_.number = ::open(part_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, mode);
    check(file_.number >= 0 && (!exists || ::fchmod(file_.number, old.st_mode & 07777) == 0));
  }
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;
  ~AtomicFile() {
    if (!part_.empty()) ::unlink(part_.c_str());
  }

  void write(std::string_view bytes) {
    open_straight();
    while (!bytes.empty()) {
      const ssize_t n = ::write(file_.number, bytes.data(), bytes.size());
      check(n >= 0 || errno == EINTR);
      bytes.remove_prefix(n < 0 ? 0 : static_cast<std::size_t>(n));
    }
  }
  void commit() {
    open_straight();
    check(part_.empty() || ::fsync(file_.number) == 0);
    if (!part_.empty() && !(nameless_ && gets_name(path_))) {  // there is a file to replace
      check(!nameless_ || gets_name(part_));
      check(std::rename(part_.c_str(), path_.c_str()) == 0);
    }
    check(file_.close() == 0);
  }

 private:
  void check(bool good) const { check_call(good, "cannot write", path_); }
  /// Opened anew, what `>>log` opened for us would be written from its start. What the program
  /// has printed goes first.
  void open_straight() {
    if (file_.number >= 0) return;
    std::cout.flush();
    file_.number = is_open_file(path_) ? ::dup(std::atoi(path_.c_str() + path_.rfind('/') + 1))
                                       : ::open(path_.c_str(), O_WRONLY | O_CLOEXEC);
    check(file_.number >= 0);
  }
  /// Names the file without a name, unless there is a file of this name.
  bool gets_name(const std::string& name) const {
    const std::string self = "/proc/self/fd/" + std::to_string(file_.number);
    return ::linkat(AT_FDCWD, self.c_str(), AT_FDCWD, name.c_str(), AT_SYMLINK_FOLLOW) == 0;
  }

  std::string path_, part_;  // part_: a name for the file until it has its own; "": not needed
  Descriptor file_;
  bool nameless_ = false;
};

/// Fails now, not after long work, if nothing can be written there. An empty path is no file.
inline void check_writable(const std::string& path) {
  if (!path.empty()) AtomicFile file(path);
}

/// Walks a window of bytes, which need not be aligned, and never steps past its end.
struct ByteReader {
  std::string_view bytes;
  std::string where;
  std::uint64_t at = 0;

  std::string_view take_at(std::uint64_t offset, std::uint64_t n) {
    const std::uint64_t left = bytes.size() - std::min<std::uint64_t>(offset, bytes.size());
    if (offset > bytes.size() || n > left)
      fail("truncated: ", where, ": expected ", n, " bytes at offset ", offset, ", found ", left);
    at = offset + n;
    return bytes.substr(offset, n);
  }
  std::string_view take(std::uint64_t n) { return take_at(at, n); }
  /// The unsigned number of n bytes at an offset.
  std::int64_t number(std::uint64_t offset, std::size_t n) {
    std::int64_t value = 0;
    std::memcpy(&value, take_at(offset, n).data(), n);
    return value;
  }
  std::string_view line() {
    const std::string_view text = take(std::min(bytes.find('\n', at), bytes.size()) - at);
    take(1);
    return text;
  }
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
    if (const std::string what = what_it_is(text); !what.empty())
      fail("bad JSON: ", where, ": expected JSON, found ", what);
    const std::string_view line = error.what();  // "[the library's name and number] what"
    fail("bad JSON: ", where, ": ", quote(line.substr(line.find("] ") + 2), 200));
  }
}

// =================================== 2. Tensors ========================================

// clang-format off
// In the order of kDTypes; the first four are what weights may be.
enum class DType { F64, F32, F16, BF16, I64, I32, I16, I8, U64, U32, U16, U8, BOOL };

struct DTypeInfo {
  const char *name, *torch, *torch_storage;  // in safetensors; in PyTorch; its storages' class
  std::size_t size;                          // bytes of one value
};
inline constexpr DTypeInfo kDTypes[] = {
    {"F64", "float64", "DoubleStorage", 8}, {"F32", "float32", "FloatStorage", 4},
    {"F16", "float16", "HalfStorage", 2},   {"BF16", "bfloat16", "BFloat16Storage", 2},
    {"I64", "int64", "LongStorage", 8},     {"I32", "int32", "IntStorage", 4},
    {"I16", "int16", "ShortStorage", 2},    {"I8", "int8", "CharStorage", 1},
    {"U64", "uint64", "", 8},               {"U32", "uint32", "", 4},
    {"U16", "uint16", "", 2},               {"U8", "uint8", "ByteStorage", 1},
    {"BOOL", "bool", "BoolStorage", 1}};
// clang-format on
inline const char* dtype_name(DType dtype) { return kDTypes[static_cast<int>(dtype)].name; }
inline std::size_t dtype_size(DType dtype) { return kDTypes[static_cast<int>(dtype)].size; }

/// The dtype with this name in one column of the table.
inline std::optional<DType> find_dtype(std::string_view name, const char* DTypeInfo::*column) {
  for (const DTypeInfo& row : kDTypes)
    if (row.*column == name) return static_cast<DType>(&row - kDTypes);
  return {};
}

/// A named window into a file or a buffer. Its data may be unaligned.
struct Tensor {
  std::string name;
  DType dtype = DType::F32;
  Shape shape;
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

inline bool same_values(const Tensor& a, const Tensor& b) {
  const bool alike = a.dtype == b.dtype && a.shape == b.shape;
  return alike && (a.data == b.data || a.bytes() == b.bytes());
}

inline std::string shape_text(const Shape& shape) {
  std::string text = "(";
  for (std::size_t i = 0; i < shape.size() && i < 16; ++i)
    text += (i > 0 ? ", " : "") + std::to_string(shape[i]);
  return text + (shape.size() > 16 ? ", ...)" : ")");
}

/// Bytes of a tensor with this shape, every step checked.
inline std::uint64_t checked_bytes(const Shape& shape, DType dtype, const std::string& where) {
  auto n = static_cast<std::int64_t>(dtype_size(dtype));
  for (const std::int64_t extent : shape)
    if (extent < 0 || __builtin_mul_overflow(n, extent, &n))
      fail("bad shape: ", where, ": expected sizes >= 0 with a product below 2^63, found ",
           shape_text(shape));
  return static_cast<std::uint64_t>(n);
}

struct Checkpoint {
  std::map<std::string, Tensor> tensors;
  std::map<std::string, std::string> metadata;
  std::string where;            // the file that it was read from, for error lines
  std::uint64_t file_size = 0;  // bytes of all its files; 0: it was not read from any

  const Tensor* find(const std::string& name) const {
    const auto found = tensors.find(name);
    return found == tensors.end() ? nullptr : &found->second;
  }
  const Tensor& at(const std::string& name) const {
    if (const Tensor* tensor = find(name)) return *tensor;
    std::string first;
    for (auto item = tensors.begin(); item != tensors.end() && first.size() < 150; ++item)
      first += (first.empty() ? "" : ", ") + quote(item->second.name, 60);
    fail("missing tensor: ", where, ": expected ", name, ", found none; its ", tensors.size(),
         " tensors begin with ", first);
  }
};

/// Calls use with a value of the dtype's C++ type, if numbers of it are read.
template <class Use>
void with_type(DType dtype, const Use& use) {
  if (dtype == DType::F64) use(double());
  if (dtype == DType::F32) use(float());
  if (dtype == DType::F16) use(Eigen::half());
  if (dtype == DType::BF16) use(Eigen::bfloat16());
  if (dtype == DType::I64) use(std::int64_t());
  if (dtype == DType::I32) use(std::int32_t());
}

template <class Value>
constexpr DType dtype_of() {
  using Range = std::numeric_limits<Value>;
  static_assert(Range::is_signed && (sizeof(Value) >= 4 || !Range::is_integer));
  if (Range::is_integer) return sizeof(Value) == 8 ? DType::I64 : DType::I32;
  if (sizeof(Value) == 2) return Range::digits == 11 ? DType::F16 : DType::BF16;
  return sizeof(Value) == 8 ? DType::F64 : DType::F32;
}

/// Calls use with each value and its index; how often it returns true.
template <class Use>
std::size_t count_values(const Tensor& tensor, const Use& use) {
  std::size_t count = 0;
  with_type(tensor.dtype, [&, n = tensor.size()](auto type) {
    const char* bytes = static_cast<const char*>(tensor.data);
    std::size_t found = 0;
    for (std::size_t i = 0; i < n; ++i) {
      decltype(type) value;
      std::memcpy(&value, bytes + i * sizeof value, sizeof value);
      found += use(value, i);
    }
    count = found;
  });
  return count;
}

/// The tensor's values as another type: real numbers as real ones, whole as whole ones. Narrowing
/// rounds to the nearest, ties to even; what is too large becomes infinite; NaN stays NaN.
template <class To>
void convert(const Tensor& tensor, To* out) {
  constexpr bool kWhole = std::numeric_limits<To>::is_integer;
  const bool whole = tensor.dtype == DType::I64 || tensor.dtype == DType::I32;
  if (kWhole ? !whole : tensor.dtype > DType::BF16)
    fail("wrong dtype: ", quote(tensor.name), ": expected ",
         kWhole ? "I64 or I32" : "F64, F32, F16 or BF16", ", found ", dtype_name(tensor.dtype));
  const std::size_t lost = count_values(tensor, [out](auto value, std::size_t i) {
    out[i] = static_cast<To>(value);
    return Eigen::numext::isinf(out[i]) && !Eigen::numext::isinf(value);
  });
  if (lost > 0)
    warn(one_line(quote(tensor.name), ": ", lost, " of ", tensor.size(), " values are too large ",
                  "for ", dtype_name(dtype_of<To>()), ": they become infinite"));
}

template <class Value>
std::vector<Value> values(const Tensor& tensor) {
  std::vector<Value> out(tensor.size());
  convert(tensor, out.data());
  return out;
}

/// A tensor that shows the caller's values, which must outlive it.
template <class Value>
Tensor tensor_view(std::string name, Shape shape, const Value* data) {
  return {std::move(name), dtype_of<Value>(), std::move(shape), data, nullptr};
}

/// Lets go of the pages of a mapped file under a tensor; touched again, they are read again.
inline void drop_pages(const Tensor& tensor) {
  if (std::get_deleter<Unmap>(tensor.keep_alive) == nullptr) return;  // a buffer: not read again
  const auto page = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
  const auto start = reinterpret_cast<std::uintptr_t>(tensor.data);
  const std::uintptr_t first = (start + page - 1) / page * page,
                       end = (start + tensor.byte_size()) / page * page;
  if (first < end) ::madvise(reinterpret_cast<void*>(first), end - first, MADV_DONTNEED);
}

/// The tensor in another dtype of weights, in a buffer of its own.
inline Tensor to_dtype(const Tensor& tensor, DType dtype) {
  Tensor out{tensor.name, dtype, tensor.shape, nullptr, nullptr};
  if (dtype > DType::BF16)
    fail("wrong dtype: ", quote(tensor.name), ": cannot convert to ", dtype_name(dtype));
  with_type(dtype, [&](auto type) {
    const auto buffer = std::make_shared<std::vector<decltype(type)>>(tensor.size());
    convert(tensor, buffer->data());
    out.data = buffer->data(), out.keep_alive = buffer;
  });
  drop_pages(tensor);
  return out;
}

/// A line for each tensor with NaN or infinity; of tensors that are one window, for the first.
inline std::vector<std::string> non_finite(const Checkpoint& checkpoint) {
  std::vector<std::string> lines;
  std::set<std::pair<const void*, std::size_t>> seen;
  for (const auto& [name, tensor] : checkpoint.tensors) {
    const bool new_window = seen.emplace(tensor.data, tensor.byte_size()).second;
    if (!new_window || tensor.dtype > DType::BF16) continue;
    const std::size_t bad = count_values(tensor, [](auto value, std::size_t) {
      using Wide = std::conditional_t<sizeof value == 8, std::uint64_t, std::uint32_t>;
      using Bits = std::conditional_t<sizeof value == 2, std::uint16_t, Wide>;
      const auto infinity = std::numeric_limits<decltype(value)>::infinity();
      const auto exponent = Eigen::numext::bit_cast<Bits>(infinity);
      return (Eigen::numext::bit_cast<Bits>(value) & exponent) == exponent;
    });
    if (bad > 0)
      lines.push_back(one_line(checkpoint.where, ": ", quote(tensor.name), ": ", bad, " of ",
                               tensor.size(), " values are NaN or infinite"));
  }
  return lines;
}

// ================================= 3. safetensors ======================================
//
//   8 bytes    n, length of the header, little-endian
//   n bytes    {"__metadata__": {"key": "text"},
//               "name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}}
//   the rest   the tensors; offsets count from here, row-major, without gaps or overlaps
//
// The header may end in spaces (we pad it to 8 bytes, other writers may not).
// Format: github.com/huggingface/safetensors (README.md).

/// One tensor as the header describes it, and where in the data it begins.
inline std::pair<std::uint64_t, Tensor> read_entry(const std::string& name, const Json& entry,
                                                   const std::string& where) {
  const Json e = entry.is_object() ? entry : Json::object();
  const Json type = e.value("dtype", Json()), shape = e.value("shape", Json()),
             place = e.value("data_offsets", Json());
  const auto whole = [](const Json& list) {
    return list.is_array() && std::all_of(list.begin(), list.end(),
                                          [](const Json& n) { return n.is_number_unsigned(); });
  };
  if (!type.is_string() || !whole(shape) || !whole(place) || place.size() != 2)
    fail("bad header: ", where, ": expected dtype, shape and data_offsets of whole numbers");
  const auto dtype = find_dtype(type.get<std::string>(), &DTypeInfo::name);
  if (!dtype) fail("unknown dtype: ", where, ": found ", quote(type.get<std::string>()));
  const Tensor tensor{name, *dtype, shape.get<Shape>(), nullptr, nullptr};
  const std::uint64_t size = checked_bytes(tensor.shape, *dtype, where), begin = place[0];
  if (place[1] != begin + size)
    fail("bad offsets: ", where, ": expected ", size, " bytes for ", dtype_name(*dtype), " ",
         shape_text(tensor.shape), ", found ", begin, " to ", place[1]);
  return {begin, tensor};
}

/// Maps a file of weights, unless it is something else that can be named.
inline MappedFile map_weights(const std::string& path) {
  const MappedFile file(path);
  const std::string what = what_it_is(file.bytes());
  if (!what.empty()) fail("not weights: ", path, ": found ", what);
  return file;
}

inline Checkpoint read_safetensors(const std::string& path) {
  constexpr std::uint64_t kLongestHeader = 100'000'000;  // as in the safetensors library
  const MappedFile file = map_weights(path);
  ByteReader in{file.bytes(), path};
  const std::uint64_t size = in.number(0, 8);
  const std::uint64_t longest = std::min(kLongestHeader, file.bytes().size() - 8);
  if (size > longest)
    fail("bad header: ", path, ": expected at most ", longest, " bytes, found ", size);
  const Json header = parse_json(in.take(size), path);
  if (!header.is_object()) fail("bad header: ", path, ": expected an object");
  const std::string_view data = file.bytes().substr(in.at);

  Checkpoint checkpoint{{}, {}, path, file.bytes().size()};
  std::set<std::pair<std::pair<std::uint64_t, std::uint64_t>, std::string>> places;
  for (const auto& [name, entry] : header.items()) {
    const std::string where = path + ": " + quote(name);
    if (name == "__metadata__") {
      if (!entry.is_object()) fail("bad header: ", where, ": expected an object");
      for (const auto& [key, text] : entry.items())
        if (!text.is_string()) fail("bad header: ", where, ": ", quote(key), ": expected a string");
      checkpoint.metadata = entry.get<std::map<std::string, std::string>>();
      continue;
    }
    const auto [begin, tensor] = read_entry(name, entry, where);
    checkpoint.tensors[name] = tensor;
    places.insert({{begin, begin + tensor.byte_size()}, name});
  }
  std::uint64_t covered = 0;  // they must cover the data from end to end, each byte once
  for (const auto& [place, name] : places) {
    if (place.first != covered || place.second > data.size())
      fail("bad offsets: ", path, ": ", quote(name), ": expected bytes from ", covered,
           " to at most ", data.size(), ", found ", place.first, " to ", place.second);
    covered = place.second;
    checkpoint.tensors[name].data = data.data() + place.first;
    checkpoint.tensors[name].keep_alive = file.memory();
  }
  if (covered != data.size())
    fail("bad offsets: ", path, ": expected tensors up to byte ", data.size(), ", found ", covered);
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

/// Writes a safetensors file: widest dtypes first, so that every tensor is aligned. With a dtype
/// each is converted when it is written, so that one copy at a time is held.
inline void write_safetensors(const std::string& path, std::vector<Tensor> tensors,
                              const std::map<std::string, std::string>& metadata = {},
                              std::optional<DType> dtype = {}) {
  std::stable_sort(tensors.begin(), tensors.end(), [](const Tensor& a, const Tensor& b) {
    return dtype_size(a.dtype) > dtype_size(b.dtype);
  });
  std::vector<Tensor> written = tensors;
  for (Tensor& tensor : written) tensor.dtype = dtype.value_or(tensor.dtype);
  AtomicFile file(path);
  write_safetensors_header(file, written, metadata);
  for (const Tensor& tensor : tensors)
    file.write((dtype ? to_dtype(tensor, *dtype) : tensor).bytes());
  file.commit();
}

// ================================== 4. torch.save ======================================
//
// torch.save writes a zip of stored (never compressed) entries under one folder:
//
//   NAME/data.pkl     a pickle: the state dict, with each storage replaced by its key
//   NAME/byteorder    "little" or "big"; absent in older files
//   NAME/data/KEY     the bytes of one storage, which several tensors may share
//
// Formats: PKWARE's APPNOTE.TXT; Python's Lib/pickletools.py; PyTorch's torch/serialization.py
// and torch/_utils.py.

// --- The zip archive --------------------------------------------------------------------
//
// A zip is read from its end: the end record gives the offset of the central directory,
// which lists the entries; each points to a local header, and the bytes follow that. Where
// a 32-bit field is full, the zip64 records hold the number in 64 bits.

using Entries = std::map<std::string, std::string_view>;  // name, bytes

inline void expect_signature(ByteReader& in, std::uint64_t at, const char* mark, const char* what) {
  if (in.take_at(at, 4) != mark)
    fail("bad zip: ", in.where, ": expected ", what, " at byte ", at, ", found something else");
}

/// Where the central directory begins, and how many entries it has.
inline std::pair<std::uint64_t, std::uint64_t> find_directory(ByteReader& in) {
  const std::size_t tail = in.bytes.size() - std::min<std::size_t>(in.bytes.size(), 22 + 65535);
  const std::size_t end_in_tail = in.bytes.substr(tail).rfind("PK\5\6"), end = tail + end_in_tail;
  if (end_in_tail == std::string_view::npos)
    fail("truncated: ", in.where, ": expected a zip archive's end record, found none");
  in.take_at(end + 22, in.number(end + 20, 2));  // a comment
  const std::uint64_t count = in.number(end + 10, 2), directory = in.number(end + 16, 4);
  if (count != 0xffff && directory != 0xffffffff) return {directory, count};
  const std::size_t locator = end - std::min<std::size_t>(end, 20);
  expect_signature(in, locator, "PK\6\7", "the zip64 locator");
  const std::uint64_t record = in.number(locator + 8, 8);
  expect_signature(in, record, "PK\6\6", "the zip64 end record");
  return {in.number(record + 48, 8), in.number(record + 32, 8)};
}

/// The entry of the central directory at `at`, which moves on, and the bytes it points to.
inline Entries::value_type read_zip_entry(ByteReader& in, std::uint64_t& at) {
  expect_signature(in, at, "PK\1\2", "a directory entry");
  std::uint64_t stored = in.number(at + 20, 4), size = in.number(at + 24, 4),
                offset = in.number(at + 42, 4);
  const bool plain =
      in.number(at + 10, 2) == 0 && (in.number(at + 8, 2) & 1) == 0;  // method, encryption
  const std::uint64_t name_size = in.number(at + 28, 2), extra_size = in.number(at + 30, 2);
  const std::string name(in.take_at(at + 46, name_size)), where = in.where + ": " + quote(name);
  ByteReader extra{in.take(extra_size), where};
  while (extra.at + 4 <= extra_size) {
    const auto id = extra.number(extra.at, 2);
    ByteReader field{extra.take(extra.number(extra.at, 2)), where};
    for (std::uint64_t* number : {&size, &stored, &offset})
      if (id == 1 && *number == 0xffffffff) *number = field.number(field.at, 8);
  }
  at += 46 + name_size + extra_size + in.number(at + 32, 2);  // a comment
  if (!plain || stored != size)
    fail("bad zip: ", where, ": expected a stored entry, found a compressed or encrypted one");
  expect_signature(in, offset, "PK\3\4", "a local header");
  return {name,
          in.take_at(offset + 30 + in.number(offset + 26, 2) + in.number(offset + 28, 2), size)};
}

// --- The pickle -------------------------------------------------------------------------
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
  std::int64_t integer = 0;              // bool, int; a storage's number of values
  std::string_view text = {};            // text; name: "module.name"; storage: its key
  std::vector<PickleValue*> items = {};  // of a dict: key, value, key, value, ...
  DType dtype = DType::U8;               // of a storage or tensor; untyped storages have bytes
};

/// Runs one pickle, and keeps the values that it makes.
class Unpickler {
 public:
  using Value = PickleValue;
  using Values = std::vector<Value*>;

  Unpickler(std::string_view pickle, const std::string& path) : in_{pickle, path} {}

  /// Runs the pickle and returns what it leaves.
  const Value& load() {
    for (std::size_t steps = 0; steps < kMostSteps; ++steps) {
      const auto opcode = number(1);
      if (opcode == '.') return *pop();
      step(static_cast<int>(opcode));
    }
    refuse("has more than ", kMostSteps, " opcodes");
  }

 private:
  static constexpr std::size_t kMostSteps = 1 << 20;  // a tensor takes about 33
  // clang-format off
  static constexpr const char* kNames[] = {
      "collections.OrderedDict", "torch.Tensor", "torch.UntypedStorage",
      "torch.storage.UntypedStorage", "torch._tensor._rebuild_from_type_v2",
      "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3",
      "torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"};

  void step(int opcode) {
    switch (opcode) {
      case 0x80: if (const auto n = number(1); n < 2 || n > 5) refuse("has protocol ", n); return;
      case 0x95: in_.take(8); return;  // FRAME: how many bytes are worth reading at once
      case '(': return marks_.push_back(stack_.size());
      case '0': pop(); return;
      case 'N': return push({Value::None});
      case 0x88: case 0x89: return push({Value::Bool, opcode == 0x88});
      case 'K': case 'M': return push({Value::Int, number(opcode == 'K' ? 1 : 2)});
      case 'J': return push_signed(in_.take(4));
      case 0x8a: return push_signed(in_.take(number(1)));
      case 'G': in_.take(8); return push({Value::Float});  // no tensor needs its value
      case 0x8c: return push({Value::Text, 0, in_.take(number(1))});
      case 'X': case 0x8d: return push({Value::Text, 0, in_.take(number(opcode == 'X' ? 4 : 8))});
      case ')': return push({Value::Tuple});
      case ']': return push({Value::List});
      case '}': return push({Value::Dict});
      case 't': return push({Value::Tuple, 0, {}, pop_to_mark()});
      case 0x85: case 0x86: case 0x87: return push({Value::Tuple, 0, {}, pop_some(opcode - 0x84)});
      case 'a': return append(pop_some(1), Value::List);
      case 'e': return append(pop_to_mark(), Value::List);
      case 's': return append(pop_some(2), Value::Dict);
      case 'u': return append(pop_to_mark(), Value::Dict);
      case 'q': case 'r': memo_[number(opcode == 'q' ? 1 : 4)] = top(); return;
      case 0x94: memo_[static_cast<std::int64_t>(memo_.size())] = top(); return;
      case 'h': case 'j': return recall(number(opcode == 'h' ? 1 : 4));
      case 'c': { const auto module = in_.line(); return push_name(module, in_.line()); }
      case 0x93: { const auto name = pop_some(2); return push_name(name[0]->text, name[1]->text); }
      case 'Q': return push_storage(expect(pop(), Value::Tuple).items);
      case 'R': return call();
      case 'b': pop(); expect(top(), Value::Dict); return;  // attributes of an OrderedDict
      default: refuse("has the opcode ", opcode);
    }
  }
  // clang-format on

  template <class... Parts>
  [[noreturn]] void refuse(const Parts&... parts) const {
    fail("bad pickle: ", in_.where, ": ", parts..., " at byte ", in_.at,
         "; only state dicts of tensors are read");
  }

  std::int64_t number(std::size_t bytes) { return in_.number(in_.at, bytes); }
  void push(Value value) { stack_.push_back(&values_.emplace_back(std::move(value))); }
  /// The topmost n values, all of them above the last mark.
  Values pop_some(std::size_t n) {
    if (n > stack_.size() - (marks_.empty() ? 0 : marks_.back()))
      refuse("takes from an empty stack");
    const Values items(stack_.end() - static_cast<std::ptrdiff_t>(n), stack_.end());
    stack_.resize(stack_.size() - n);
    return items;
  }
  Values pop_to_mark() {
    if (marks_.empty()) refuse("looks for a mark that is not there");
    const Values items = pop_some(stack_.size() - marks_.back());
    marks_.pop_back();
    return items;
  }
  Value* pop() { return pop_some(1)[0]; }
  Value* top() { return stack_.emplace_back(pop()); }
  Value& expect(Value* value, Value::Kind kind) const {
    if (value->kind != kind) refuse("holds a value of the wrong kind");
    return *value;
  }

  void push_signed(std::string_view bytes) {  // two's complement
    if (bytes.size() > 8) refuse("has an integer of ", bytes.size(), " bytes");
    std::int64_t number = !bytes.empty() && (bytes.back() & 0x80) != 0 ? -1 : 0;
    std::memcpy(&number, bytes.data(), bytes.size());
    push({Value::Int, number});
  }
  void append(const Values& items, Value::Kind kind) {
    Value& container = expect(top(), kind);
    if (kind == Value::Dict && items.size() % 2 != 0) refuse("has a key without a value");
    container.items.insert(container.items.end(), items.begin(), items.end());
  }
  void recall(std::int64_t index) {
    const auto found = memo_.find(index);
    if (found == memo_.end()) refuse("recalls what it never noted");
    stack_.push_back(found->second);
  }

  void push_name(std::string_view module, std::string_view name) {
    for (const auto column : {&DTypeInfo::torch, &DTypeInfo::torch_storage})
      if (const auto dtype = find_dtype(name, column); dtype && module == "torch")
        return push({Value::Name, 0, name, {}, *dtype});
    const std::string both = std::string(module.substr(0, 80)).append(".").append(name, 0, 80);
    for (const char* known : kNames)
      if (both == known) return push({Value::Name, 0, known});
    refuse("asks for ", quote(both));
  }

  /// The persistent id ("storage", type, key, device, number of values).
  void push_storage(const Values& id) {
    const bool view = id.size() == 6 && id[5]->kind != Value::None;
    if (id.size() < 5 || id.size() > 6 || view || id[0]->text != "storage")
      refuse("has an unknown persistent id");
    const Value &type = expect(id[1], Value::Name), &key = expect(id[2], Value::Text);
    push({Value::Storage, expect(id[4], Value::Int).integer, key.text, {}, type.dtype});
  }

  /// Calls a function with a tuple of arguments. Of a tensor's we keep the first four; what
  /// attributes a parameter or a tensor carries (its state, the last) is not looked at.
  void call() {
    const Value* arguments = &expect(pop(), Value::Tuple);
    const Value* function = &expect(pop(), Value::Name);
    if (function->text == "torch._tensor._rebuild_from_type_v2" && arguments->items.size() == 4) {
      function = &expect(arguments->items[0], Value::Name);
      arguments = &expect(arguments->items[2], Value::Tuple);
    }
    const Values& items = arguments->items;
    const auto calls = [&](const char* name, std::size_t fewest) {
      return function->text == name && items.size() >= fewest;
    };
    if (calls("collections.OrderedDict", 0) && items.empty()) return push({Value::Dict});
    if (calls("torch._utils._rebuild_parameter", 3) ||
        calls("torch._utils._rebuild_parameter_with_state", 4))
      return stack_.push_back(&expect(items[0], Value::Tensor));
    if (calls("torch._utils._rebuild_tensor_v2", 6)) return push_tensor(items, items[0]->dtype);
    if (calls("torch._utils._rebuild_tensor_v3", 7)) return push_tensor(items, items[6]->dtype);
    refuse("calls ", quote(function->text), " with ", items.size(), " arguments");
  }
  void push_tensor(const Values& arguments, DType dtype) {
    expect(arguments[0], Value::Storage);
    expect(arguments[1], Value::Int);
    for (const std::size_t i : {2, 3}) {
      const Values& extents = expect(arguments[i], Value::Tuple).items;
      if (extents.size() > 64) refuse("has a tensor of ", extents.size(), " dimensions");
      for (Value* extent : extents) expect(extent, Value::Int);
    }
    push({Value::Tensor, 0, {}, Values(arguments.begin(), arguments.begin() + 4), dtype});
  }

  ByteReader in_;
  std::deque<Value> values_;
  Values stack_;
  std::vector<std::size_t> marks_;  // how high the stack was at each
  std::map<std::int64_t, Value*> memo_;
};

/// Copies a strided tensor into row-major order, its axes from this one on; returns the copy's end.
inline char* gather(const char* from, const Shape& shape, const Shape& strides, std::size_t item,
                    char* to, std::size_t axis = 0) {
  if (axis == shape.size()) return std::copy_n(from, item, to);
  for (std::size_t i = 0, n = static_cast<std::size_t>(shape[axis]); i < n; ++i)
    to = gather(from + i * item * static_cast<std::size_t>(strides[axis]), shape, strides, item, to,
                axis + 1);
  return to;
}

/// An archive of torch.save and the tensors in it.
struct TorchFile {
  std::string path;
  MappedFile file;
  Entries entries;
  std::string folder;  // NAME/
  // Bytes that tensors may still show, each window once: they may overlap, but not without end.
  std::uint64_t budget;
  std::set<std::pair<const void*, std::uint64_t>> shown = {};

  /// The bytes of a storage, as many as its type and number of values ask for.
  std::string_view bytes_of(const PickleValue& storage, const std::string& where) const {
    const auto found = entries.find(std::string(folder).append("data/").append(storage.text));
    const std::string_view bytes = found == entries.end() ? std::string_view() : found->second;
    const std::uint64_t size = checked_bytes({storage.integer}, storage.dtype, where);
    if (bytes.size() < size)
      fail("truncated: ", where, ": expected ", size, " bytes in storage ", quote(storage.text),
           ", found ", bytes.size());
    return bytes.substr(0, size);
  }

  /// A window into the storage if the tensor lies there row by row, otherwise a copy.
  Tensor tensor(std::string_view name, const PickleValue& pickled) {
    const std::string where = path + ": " + quote(name);
    const std::string_view bytes = bytes_of(*pickled.items[0], where);
    const std::int64_t first = pickled.items[1]->integer;
    Tensor tensor{std::string(name), pickled.dtype, {}, bytes.data(), file.memory()};
    Shape strides;
    for (const PickleValue* n : pickled.items[2]->items) tensor.shape.push_back(n->integer);
    for (const PickleValue* n : pickled.items[3]->items) strides.push_back(n->integer);
    const std::uint64_t size = checked_bytes(tensor.shape, tensor.dtype, where);
    if (size == 0) return tensor;

    const std::size_t item = dtype_size(tensor.dtype), held = bytes.size() / item;
    bool valid = first >= 0 && strides.size() == tensor.shape.size(), row_major = true;
    auto last = static_cast<double>(first);  // index of the last value; cannot overflow
    std::int64_t stride = 1;
    for (std::size_t i = strides.size(); valid && i-- > 0; stride *= tensor.shape[i]) {
      valid = strides[i] >= 0;
      last += static_cast<double>(strides[i]) * static_cast<double>(tensor.shape[i] - 1);
      row_major = row_major && (tensor.shape[i] == 1 || strides[i] == stride);
    }
    if (!valid || last >= static_cast<double>(held))
      fail("out of range: ", where, ": expected values inside the ", held, " of storage ",
           quote(pickled.items[0]->text), ", found offset ", first, ", shape ",
           shape_text(tensor.shape), ", strides ", shape_text(strides));
    const char* start = bytes.data() + static_cast<std::size_t>(first) * item;
    if (!row_major || shown.emplace(start, size).second) {
      if (size > budget)
        fail("too large: ", where, ": with it, tensors show over 4 times what the file holds");
      budget -= size;
    }
    tensor.data = start;
    if (row_major) return tensor;
    const auto copy = std::make_shared<std::vector<char>>(size);
    gather(start, tensor.shape, strides, item, copy->data());
    tensor.data = copy->data(), tensor.keep_alive = copy;
    return tensor;
  }
};

/// The state dict in what a training script saved, {"model": {...}, "optimizer": {...}, ...}:
/// the one dict with tensors under these keys, in each other perhaps, or else the whole.
inline const PickleValue* state_dict(const PickleValue& dict, const std::string& path,
                                     std::set<const PickleValue*>& seen) {
  if (seen.size() == 64 || !seen.insert(&dict).second) return nullptr;
  const PickleValue* inner = nullptr;
  bool tensors = false;
  for (std::size_t i = 0; dict.kind == PickleValue::Dict && i < dict.items.size(); i += 2) {
    const std::string_view key = dict.items[i]->text;
    tensors = tensors || dict.items[i + 1]->kind == PickleValue::Tensor;
    if (key != "model" && key != "state_dict" && key != "model_state_dict" && key != "module")
      continue;
    const PickleValue* found = state_dict(*dict.items[i + 1], path, seen);
    if (inner != nullptr && found != nullptr)
      fail("bad pickle: ", path, ": expected one state dict, found another in ", quote(key));
    inner = found != nullptr ? found : inner;
  }
  return inner == nullptr && tensors ? &dict : inner;
}

/// Opens what torch.save wrote, and finds the folder in it.
inline TorchFile open_torch_file(const std::string& path) {
  const MappedFile file = map_weights(path);
  TorchFile torch{path, file, {}, "", 4 * file.bytes().size()};
  if (file.bytes().substr(0, 4) != "PK\3\4")
    fail("unknown format: ", path, ": expected a file written by torch.save");
  ByteReader in{file.bytes(), path};
  for (auto [at, count] = find_directory(in); count > 0; --count) {
    const auto [entry, added] = torch.entries.insert(read_zip_entry(in, at));
    if (!added) fail("bad zip: ", path, ": ", quote(entry->first), ": appears twice");
  }
  for (const auto& [name, bytes] : torch.entries)
    if (const std::size_t slash = name.find('/') + 1; name.substr(slash) == "data.pkl")
      torch.folder = name.substr(0, slash);
  if (torch.folder.empty())
    fail("bad zip: ", path, ": expected an entry NAME/data.pkl, found none");
  const auto order = torch.entries.find(torch.folder + "byteorder");
  if (order != torch.entries.end() && order->second != "little")
    fail("wrong byte order: ", path, ": expected little, found ", quote(order->second));
  return torch;
}

inline Checkpoint read_pytorch_bin(const std::string& path) {
  TorchFile torch = open_torch_file(path);
  Unpickler unpickler(torch.entries[torch.folder + "data.pkl"], path);
  std::set<const PickleValue*> seen;
  const PickleValue* dict = state_dict(unpickler.load(), path, seen);
  if (dict == nullptr)
    fail("bad pickle: ", path, ": expected a dict of tensors, or one in it under ",
         "model, state_dict, model_state_dict or module");
  Checkpoint checkpoint{{}, {}, path, torch.file.bytes().size()};
  for (std::size_t i = 0; i < dict->items.size(); i += 2) {
    const PickleValue &key = *dict->items[i], &value = *dict->items[i + 1];
    if (key.kind != PickleValue::Text || value.kind != PickleValue::Tensor)
      fail("bad pickle: ", path, ": ", quote(key.text), ": expected a name and a tensor");
    if (!checkpoint.tensors.emplace(key.text, torch.tensor(key.text, value)).second)
      fail("bad pickle: ", path, ": the tensor ", quote(key.text), " appears twice");
  }
  return checkpoint;
}

// =============================== 5. A model's folder ===================================

/// Large checkpoints are cut into shards; the index says which tensor is in which file:
/// {"weight_map": {"tensor name": "file name"}}.
inline Checkpoint read_shards(const std::string& folder, const std::string& index,
                              Checkpoint (*read)(const std::string&)) {
  const Json json = parse_json(MappedFile(index).bytes(), index);
  if (!json.is_object() || !json.contains("weight_map") || !json["weight_map"].is_object())
    fail("bad index: ", index, ": expected an object weight_map");
  Checkpoint all{{}, {}, index};
  std::map<std::string, Checkpoint> shards;
  for (const auto& [name, file] : json["weight_map"].items()) {
    const std::string shard = file.is_string() ? std::string(file) : "";
    if (shard.empty() || shard.find_first_of(std::string_view("/\0", 2)) != std::string::npos)
      fail("bad index: ", index, ": ", quote(name),
           ": expected the name of a file beside the index");
    if (!shards.count(shard)) {
      shards[shard] = read(std::string(folder).append("/").append(shard));
      all.file_size += shards[shard].file_size;
    }
    all.tensors.emplace(name, shards[shard].at(name));
  }
  return all;
}

/// A name without the parts that wrappers of a module leave in it: torch.compile, data
/// parallelism, a model inside of a model.
inline std::string plain_name(const std::string& name) {
  static const std::set<std::string> kWrappers = {
      "module", "model", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"};
  std::istringstream parts(name);
  std::string plain;
  for (std::string part; std::getline(parts, part, '.');)
    if (!kWrappers.count(part)) plain += (plain.empty() ? "" : ".") + part;
  return plain;
}

/// The same tensors by their plain names. Each keeps the name that the file has for it.
inline Checkpoint unwrapped(const Checkpoint& wrapped) {
  Checkpoint checkpoint{{}, wrapped.metadata, wrapped.where, wrapped.file_size};
  for (const auto& [name, tensor] : wrapped.tensors) {
    const auto [other, added] = checkpoint.tensors.emplace(plain_name(name), tensor);
    if (!added && !same_values(tensor, other->second))
      fail("two weights: ", wrapped.where, ": ", quote(name), " and ", quote(other->second.name),
           " differ, and both stand for ", quote(other->first));
  }
  return checkpoint;
}

/// What a folder without our files is, and what to do; "" if nothing is known.
inline std::string what_folder_is(const std::string& folder) {
  std::error_code error;
  for (const auto& file : std::filesystem::directory_iterator(folder, error)) {
    const std::string name = file.path().filename().string();
    if (name.rfind("adapter_", 0) == 0)
      return "an adapter (LoRA): expected its base model, and this folder after --adapter";
    if (name == "params.json" || name.rfind("consolidated.", 0) == 0)
      return "Mistral's own layout: expected the Hugging Face files that are published beside it";
    if (file.path().extension() == ".gguf") return what_it_is("GGUF");
  }
  return "";
}

/// Reads a model's weights, whichever of the four published forms the folder holds.
inline Checkpoint read_checkpoint(const std::string& folder) {
  const auto exists = [](const std::string& path) { return ::access(path.c_str(), F_OK) == 0; };
  for (const auto& [name, read] : {std::pair("/model.safetensors", &read_safetensors),
                                   std::pair("/pytorch_model.bin", &read_pytorch_bin)}) {
    const std::string path = folder + name, index = path + ".index.json";
    if (exists(path)) return unwrapped(read(path));
    if (exists(index)) return unwrapped(read_shards(folder, index, read));
  }
  const std::string what = what_folder_is(folder);
  fail("no weights: ", folder, ": expected model.safetensors or pytorch_model.bin, whole or ",
       "with an index.json, found ", what.empty() ? "neither" : what);
}

}  // namespace mamba
