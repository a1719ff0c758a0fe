// Claims about reading and writing models: config.json in both published layouts,
// safetensors, what torch.save writes for people who train, and the numbers in them.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <limits>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "support.hpp"

namespace {

namespace fs = std::filesystem;
using namespace mamba;

constexpr double kInf = std::numeric_limits<double>::infinity();

void write_file(const std::string& path, const std::string& text) {
  std::ofstream(path, std::ios::binary) << text;
}

std::string golden(const std::string& name) { return test::root("tests/golden/" + name); }

/// Bytes, so that NaN equals NaN and -0 differs from 0.
void require_same(const Tensor& got, const Tensor& want) {
  INFO("tensor " << want.name);
  REQUIRE(got.dtype == want.dtype);
  REQUIRE(got.shape == want.shape);
  REQUIRE(got.bytes() == want.bytes());
}

void require_same(const Checkpoint& got, const Checkpoint& want) {
  REQUIRE(got.tensors.size() == want.tensors.size());
  for (const auto& [name, tensor] : want.tensors) require_same(got.at(name), tensor);
}

template <class Function>
std::string error_of(Function function) {
  try {
    function();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "no error";
}

template <class Function>
void check_error(Function function, const std::string& fragment) {
  const std::string line = error_of(function);
  INFO("expected: " << fragment << "\ngot:      " << line);
  CHECK(line.find(fragment) != std::string::npos);
}

/// The value of a float16 from its definition: (-1)^s 2^(e-15) 1.f, or 2^-14 0.f.
double f16_by_definition(std::uint16_t h) {
  const int exponent = h >> 10 & 31, fraction = h & 1023;
  const double size = exponent == 31  ? (fraction == 0 ? kInf : std::nan(""))
                      : exponent == 0 ? std::ldexp(fraction, -24)
                                      : std::ldexp(1024 + fraction, exponent - 25);
  return h & 0x8000 ? -size : size;
}

/// Of all values that a 16-bit format has, the nearest to x; of two, the one with an even
/// last bit. `next` is the format's first number that would be too large, as in IEEE 754.
template <class Widen>
std::uint16_t nearest(double x, Widen widen, std::uint16_t infinity, double next) {
  const std::uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const double size = std::abs(x);
  std::uint16_t low = 0, high = infinity;  // widen(low) <= size < widen(high)
  while (high - low > 1) {
    const auto middle = static_cast<std::uint16_t>((low + high) / 2);
    (widen(middle) <= size ? low : high) = middle;
  }
  if (std::isinf(size)) return sign | infinity;
  const double below = size - widen(low), above = (high == infinity ? next : widen(high)) - size;
  return sign | (below < above || (below == above && low % 2 == 0) ? low : high);
}

/// The conversions that tensors go through, one value at a time.
template <class To, class From>
To converted(From value) {
  Tensor tensor{"x", dtype_of<From>(), {1}, &value, nullptr};
  return values<To>(tensor)[0];
}
template <class Half>
std::uint16_t bits_of(Half half) {
  return Eigen::numext::bit_cast<std::uint16_t>(half);
}
float f16_to_float(std::uint16_t h) {
  return converted<float>(Eigen::numext::bit_cast<Eigen::half>(h));
}
float bf16_to_float(std::uint16_t b) {
  return converted<float>(Eigen::numext::bit_cast<Eigen::bfloat16>(b));
}

/// std::cerr while this lives, which warnings go to.
class Warnings {
 public:
  Warnings() : before_(std::cerr.rdbuf(text_.rdbuf())) {}
  ~Warnings() { std::cerr.rdbuf(before_); }
  std::string text() const { return text_.str(); }
  std::size_t lines() const {
    const std::string all = text();
    return static_cast<std::size_t>(std::count(all.begin(), all.end(), '\n'));
  }

 private:
  std::ostringstream text_;
  std::streambuf* before_;
};

std::uint16_t float_to_f16(float x) { return bits_of(converted<Eigen::half>(x)); }
std::uint16_t float_to_bf16(float x) { return bits_of(converted<Eigen::bfloat16>(x)); }

}  // namespace

TEST_CASE("numbers: every float16 and bfloat16 widens to the value that it stands for") {
  for (unsigned i = 0; i < 65536; ++i) {
    const auto bits = static_cast<std::uint16_t>(i);
    const double want = f16_by_definition(bits), got = f16_to_float(bits);
    if (std::isnan(want) ? !std::isnan(got)
                         : got != want || std::signbit(got) != std::signbit(want))
      FAIL("float16 " << bits << ": expected " << want << ", got " << got);
    std::uint32_t wide = 0;
    const float brain = bf16_to_float(bits);
    std::memcpy(&wide, &brain, sizeof wide);
    if (wide != i << 16) FAIL("bfloat16 " << bits);
  }
}

TEST_CASE("numbers: narrowing what was widened gives the same bits, NaN stays NaN") {
  for (unsigned i = 0; i < 65536; ++i) {
    const auto bits = static_cast<std::uint16_t>(i);
    const float half = f16_to_float(bits), brain = bf16_to_float(bits);
    const bool half_same = float_to_f16(half) == bits;
    const bool brain_same = float_to_bf16(brain) == bits;
    if (std::isnan(half) ? !std::isnan(f16_to_float(float_to_f16(half))) : !half_same)
      FAIL("float16 " << bits);
    if (std::isnan(brain) ? !std::isnan(bf16_to_float(float_to_bf16(brain))) : !brain_same)
      FAIL("bfloat16 " << bits);
  }
  // A NaN whose payload lies only in the bits that narrowing drops.
  const std::uint32_t low_nan = 0x7f800001;
  float nan = 0;
  std::memcpy(&nan, &low_nan, sizeof nan);
  CHECK(std::isnan(f16_to_float(float_to_f16(nan))));
  CHECK(std::isnan(bf16_to_float(float_to_bf16(nan))));
}

TEST_CASE("numbers: narrowing rounds to the nearest, ties to even, too large to infinity") {
  const Warnings warnings;  // of what becomes infinite, thousands
  const auto check = [](float x) {
    const std::uint16_t half = nearest(x, f16_by_definition, 0x7c00, 65536.0);
    if (float_to_f16(x) != half) FAIL("float16 of " << x);
    const auto widen = [](std::uint16_t b) { return static_cast<double>(bf16_to_float(b)); };
    const std::uint16_t brain = nearest(x, widen, 0x7f80, std::ldexp(1.0, 128));
    if (float_to_bf16(x) != brain) FAIL("bfloat16 of " << x);
  };
  for (unsigned i = 0; i < 0x7c00; ++i) {  // all ties of float16, and their neighbours
    const auto bits = static_cast<std::uint16_t>(i);
    const double next = i + 1 == 0x7c00 ? 65536.0 : f16_by_definition(bits + 1);
    const auto tie = static_cast<float>((f16_by_definition(bits) + next) / 2);
    for (const float x : {tie, std::nextafter(tie, 0.0f), std::nextafter(tie, 1e9f)})
      check(x), check(-x);
  }
  std::mt19937 random(1);
  for (int i = 0; i < 300000; ++i) {  // any bits, and ties of bfloat16
    std::uint32_t bits = static_cast<std::uint32_t>(random());
    if (i % 3 == 0) bits = (bits & 0xffff0000) | 0x8000;
    float x = 0;
    std::memcpy(&x, &bits, sizeof x);
    if (!std::isnan(x)) check(x);
  }
}

TEST_CASE("numbers: a value that becomes infinite is a warning with the tensor's name") {
  const std::vector<double> large = {1, 1e5, -1e39, 1e300, kInf, std::nan(""), 65504};
  const Tensor doubles = tensor_view("layers.0.D", {7}, large.data());
  const Tensor floats = to_dtype(tensor_view("layers.0.D", {2}, large.data()), DType::F32);
  const Tensor brain = to_dtype(floats, DType::BF16);
  const float almost = std::numeric_limits<float>::max();  // nearest in bfloat16: 2^128
  const auto warning = [](auto convert_it) {
    const Warnings warnings;
    convert_it();
    return warnings.text();
  };
  const std::string start = "warning: 'layers.0.D': ";
  CHECK(warning([&] { to_dtype(floats, DType::F16); }) ==
        start + "1 of 2 values are too large for F16: they become infinite\n");
  CHECK(warning([&] { to_dtype(brain, DType::F16); }) ==
        start + "1 of 2 values are too large for F16: they become infinite\n");
  CHECK(warning([&] { to_dtype(doubles, DType::F16); }).find("3 of 7") != std::string::npos);
  CHECK(warning([&] { values<float>(doubles); }) ==
        start + "2 of 7 values are too large for F32: they become infinite\n");
  CHECK(warning([&] { to_dtype(tensor_view("x", {1}, &almost), DType::BF16); }) ==
        "warning: 'x': 1 of 1 values are too large for BF16: they become infinite\n");
  CHECK(warning([&] { to_dtype(floats, DType::BF16), to_dtype(floats, DType::F64); }).empty());
}

TEST_CASE("safetensors: what is written is read back, in every dtype and shape") {
  const test::TempFolder folder;
  std::vector<float> numbers(60);
  for (std::size_t i = 0; i < numbers.size(); ++i) numbers[i] = 0.37f * static_cast<float>(i) - 7;
  const std::vector<double> doubles(numbers.begin(), numbers.end());
  const std::vector<std::int64_t> longs = {-1, 1LL << 40};
  const std::vector<std::int32_t> ints = {3, -4, 5};
  std::vector<Tensor> tensors = {
      tensor_view("f32", {3, 4, 5}, numbers.data()), tensor_view("scalar", {}, numbers.data()),
      tensor_view("empty", {0, 7}, numbers.data()),  tensor_view("f64", {60}, doubles.data()),
      tensor_view("i64", {2}, longs.data()),         tensor_view("i32", {3, 1}, ints.data())};
  for (const DType dtype : {DType::F16, DType::BF16, DType::F64, DType::F32}) {
    tensors.push_back(to_dtype(tensor_view("", {59}, numbers.data()), dtype));
    tensors.back().name = std::string("as ") + dtype_name(dtype);
  }
  tensors.push_back(to_dtype(tensor_view("odd", {3}, numbers.data()), DType::F16));
  const std::map<std::string, std::string> metadata = {{"format", "pt"}, {"text", "\"\\ \u00fc\n"}};
  write_safetensors(folder / "a.safetensors", tensors, metadata);
  const Checkpoint read = read_safetensors(folder / "a.safetensors");
  CHECK(read.metadata == metadata);
  REQUIRE(read.tensors.size() == tensors.size());
  for (const Tensor& tensor : tensors) {
    require_same(read.at(tensor.name), tensor);
    if (tensor.size() == 0) continue;
    const auto address = reinterpret_cast<std::uintptr_t>(read.at(tensor.name).data);
    CHECK(address % dtype_size(tensor.dtype) == 0);  // aligned, as we write it
  }
  CHECK(values<std::int64_t>(read.at("i64")) == longs);
  CHECK(values<std::int64_t>(read.at("i32")) == std::vector<std::int64_t>{3, -4, 5});
  CHECK(values<double>(read.at("f32")) == doubles);
  CHECK(values<float>(read.at("f64")) == numbers);
  for (std::size_t i = 0; i < 59; ++i) {
    CHECK(values<float>(read.at("as F16"))[i] == f16_to_float(float_to_f16(numbers[i])));
    CHECK(values<double>(read.at("as BF16"))[i] == bf16_to_float(float_to_bf16(numbers[i])));
  }
  check_error([&] { values<float>(read.at("i32")); }, "expected F64, F32, F16 or BF16, found I32");
  check_error([&] { values<std::int64_t>(read.at("f32")); }, "expected I64 or I32, found F32");
  check_error([&] { read.at("g32"); }, "a.safetensors: expected g32, found none");
}

TEST_CASE("safetensors: tensors that a file does not align are read all the same") {
  const test::TempFolder folder;
  for (int pad = 0; pad < 8; ++pad) {
    std::string header = R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                         R"("b":{"dtype":"F32","shape":[2],"data_offsets":[1,9]},)"
                         R"("c":{"dtype":"F64","shape":[1],"data_offsets":[9,17]},)"
                         R"("d":{"dtype":"BF16","shape":[2],"data_offsets":[17,21]}})";
    header += std::string(static_cast<std::size_t>(pad), ' ');
    const std::uint64_t size = header.size();
    const float b[2] = {1.5f, -2.25f};
    const double c = 1e300;
    const std::uint16_t d[2] = {0x3f80, 0xc000};
    std::string file(reinterpret_cast<const char*>(&size), 8);
    file += header + "x";
    file.append(reinterpret_cast<const char*>(b), sizeof b);
    file.append(reinterpret_cast<const char*>(&c), sizeof c);
    file.append(reinterpret_cast<const char*>(d), sizeof d);
    write_file(folder / "m.safetensors", file);
    const Checkpoint read = read_safetensors(folder / "m.safetensors");
    CHECK(values<float>(read.at("b")) == std::vector<float>{1.5f, -2.25f});
    CHECK(values<double>(read.at("c")) == std::vector<double>{1e300});
    CHECK(values<float>(read.at("d")) == std::vector<float>{1, -2});
    CHECK(non_finite(read).empty());
  }
}

TEST_CASE("files: a write that fails leaves the old file and nothing beside it") {
  const test::TempFolder folder;
  const float one = 1, two = 2;
  const std::string path = folder / "m.safetensors";
  write_safetensors(path, {tensor_view("x", {1}, &one)});
  check_error(
      [&] {
        write_safetensors(path, {tensor_view("y", {1}, &two), tensor_view("y", {1}, &two)});
      },
      "two tensors named 'y'");
  check_error([&] { write_safetensors(path, {tensor_view("\xff", {1}, &two)}); }, "UTF-8");
  CHECK(values<float>(read_safetensors(path).at("x"))[0] == 1);
  CHECK(folder.files() == 1);
  check_writable(path);
  check_writable(folder / "other");
  {
    AtomicFile abandoned(folder / "other");
    abandoned.write("half of it");
    CHECK(folder.files() == 1);  // it has no name yet: not even SIGKILL could leave it here
  }
  CHECK(folder.files() == 1);
  write_safetensors(path, {tensor_view("x", {1}, &two)});
  CHECK(values<float>(read_safetensors(path).at("x"))[0] == 2);
  CHECK(folder.files() == 1);
  check_error([&] { write_safetensors(folder / "no/such/folder", {}); }, "No such file");
  check_error([&] { check_writable(folder.path); }, "Is a directory");
  fs::create_symlink("/dev/full", folder / "full");
  check_error([&] { AtomicFile(folder / "full").write("x"); }, "No space left");
}

namespace {

mode_t mode_of(const std::string& path) {
  struct stat status = {};
  REQUIRE(::stat(path.c_str(), &status) == 0);
  return status.st_mode & 07777;
}

void write_whole(const std::string& path, const std::string& text) {
  AtomicFile file(path);
  file.write(text);
  file.commit();
}

}  // namespace

TEST_CASE("files: a new file has the user's mode, one that is replaced keeps its own") {
  const test::TempFolder folder;
  const mode_t before = ::umask(027);
  write_whole(folder / "new", "new");
  ::umask(before);
  CHECK(mode_of(folder / "new") == 0640);
  for (const mode_t mode : {0600, 0644, 0660, 0755}) {
    REQUIRE(::chmod((folder / "new").c_str(), mode) == 0);
    write_whole(folder / "new", "again");
    CHECK(mode_of(folder / "new") == mode);
  }
  CHECK(read_file(folder / "new") == "again");
  CHECK(folder.files() == 1);
}

TEST_CASE("files: links are followed, also to where nothing is yet, and stay") {
  const test::TempFolder folder;
  fs::create_directory(folder / "sub");
  fs::create_symlink("sub/second", folder / "first");  // relative to where each link lies
  fs::create_symlink("target", folder / "sub/second");
  for (const char* text : {"made", "replaced"}) {
    write_whole(folder / "first", text);
    CHECK(fs::is_symlink(folder / "first"));
    CHECK(fs::is_symlink(folder / "sub/second"));
    CHECK(!fs::is_symlink(folder / "sub/target"));
    CHECK(read_file(folder / "sub/target") == text);
  }
  CHECK(folder.files() == 2);
  fs::create_symlink("loop", folder / "loop");
  check_error([&] { write_whole(folder / "loop", "x"); }, "cannot write");
}

TEST_CASE("files: a pipe is opened once, by the first write, and stays a pipe") {
  const test::TempFolder folder;
  const std::string pipe = folder / "pipe";
  REQUIRE(::mkfifo(pipe.c_str(), 0600) == 0);
  check_writable(pipe);  // would wait for a reader if it opened the pipe
  AtomicFile through(pipe);
  const int reader = ::open(pipe.c_str(), O_RDONLY | O_NONBLOCK);
  through.write("hel");
  through.write("lo");
  through.commit();
  char text[8] = {};
  CHECK(::read(reader, text, sizeof text) == 5);
  CHECK(std::string(text) == "hello");
  CHECK(fs::is_fifo(pipe));
  CHECK(folder.files() == 1);
  ::close(reader);
}

TEST_CASE("files: what stands for an open file is written where that one stands") {
  const test::TempFolder folder;
  write_file(folder / "log", "before\n");
  const int log = ::open((folder / "log").c_str(), O_WRONLY | O_APPEND);
  fs::create_symlink("/dev/fd/" + std::to_string(log), folder / "link");
  write_whole("/dev/fd/" + std::to_string(log), "one\n");
  write_whole("/proc/self/fd/" + std::to_string(log), "two\n");
  write_whole(folder / "link", "three\n");
  ::close(log);
  CHECK(read_file(folder / "log") == "before\none\ntwo\nthree\n");
  check_error([&] { write_whole("/dev/fd/" + std::to_string(log), "x"); }, "Bad file descriptor");
}

TEST_CASE("files: a text is read whole from a file or a pipe; a pipe is not mapped") {
  const test::TempFolder folder;
  std::string text(200000, 'x');
  text[70000] = '\0';
  write_file(folder / "text", text);
  write_file(folder / "empty", "");
  CHECK(read_file(folder / "text") == text);
  CHECK(read_file(folder / "empty").empty());
  check_error([&] { read_file(folder.path); }, "cannot read: " + folder.path + ": Is a directory");
  check_error([&] { read_file(folder / "none"); }, "none: No such file");
  const std::string pipe = folder / "pipe";
  REQUIRE(::mkfifo(pipe.c_str(), 0600) == 0);
  std::thread writer([&] { write_whole(pipe, text); });
  CHECK(read_file(pipe) == text);
  writer.join();
  const std::string line = pipe + ": expected a file, found a pipe";  // and no waiting for a writer
  check_error([&] { MappedFile{pipe}; }, line);
  check_error([&] { read_safetensors(pipe); }, line);
  check_error([&] { MappedFile{"/dev/null"}; }, "found something else");
}

TEST_CASE("files: a mapping moves, and lives as long as a tensor that looks into it") {
  const test::TempFolder folder;
  write_file(folder / "text", "hello");
  write_file(folder / "empty", "");
  MappedFile first(folder / "text");
  MappedFile second(std::move(first));
  CHECK(second.bytes() == "hello");
  first = MappedFile(folder / "empty");
  CHECK(first.bytes().empty());
  const std::vector<float> numbers(5000, 0.5f);
  write_safetensors(folder / "m", {tensor_view("x", {5000}, numbers.data())});
  const Tensor kept = read_safetensors(folder / "m").at("x");
  fs::remove(folder / "m");
  CHECK(values<float>(kept) == numbers);
}

TEST_CASE("torch.save: every kind of tensor, view and sharing is read as PyTorch reads it") {
  for (const char* name :
       {"zip", "zip_protocol4", "module", "untyped", "wrapped", "wrapped_model", "attributes",
        "nanogpt", "lightning", "tutorial", "deepspeed", "nested"}) {
    INFO("file " << name);
    const std::string path = golden(std::string("torch_save/") + name);
    require_same(read_pytorch_bin(path + ".bin"), read_safetensors(path + ".safetensors"));
  }
  const Checkpoint read = read_pytorch_bin(golden("torch_save/zip.bin"));
  const auto* whole = static_cast<const float*>(read.at("whole").data);
  CHECK(read.at("tied").data == whole);      // shared in the file, shared here
  CHECK(read.at("one").data == whole + 47);  // a window too: strides of size-1 axes say nothing
}

TEST_CASE("torch.save: a pickle that asks for more than tensors is refused by name") {
  const std::string path = golden("torch_save/hostile.bin");
  check_error([&] { read_pytorch_bin(path); }, "asks for 'posix.system'");
  check_error([&] { read_pytorch_bin(path); }, path);
}

TEST_CASE("torch.save: the format from before PyTorch 1.6 is refused by name") {
  const std::string path = golden("torch_save/before_1.6.bin");
  check_error([&] { read_pytorch_bin(path); },
              path + ": found a file that torch.save wrote before PyTorch 1.6");
}

TEST_CASE("checkpoints: shards and their index read as one") {
  const test::TempFolder folder;
  const std::vector<float> a = {1, 2}, b = {3};
  write_safetensors(folder / "one.safetensors", {tensor_view("a", {2}, a.data())});
  write_safetensors(folder / "two.safetensors",
                    {tensor_view("b", {1}, b.data()), tensor_view("c", {1}, b.data())});
  write_file(folder / "model.safetensors.index.json",
             R"({"metadata": {"total_size": 12}, "weight_map":
                 {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}})");
  const Checkpoint read = read_checkpoint(folder.path);
  CHECK(read.tensors.size() == 3);
  CHECK(values<float>(read.at("a")) == a);
  CHECK(values<float>(read.at("c")) == b);

  const test::TempFolder bins;  // PyTorch files are cut the same way
  fs::copy(golden("torch_save/module.bin"), bins / "x.bin");
  write_file(bins / "pytorch_model.bin.index.json", R"({"weight_map": {"0.weight": "x.bin"}})");
  const Checkpoint torch = read_checkpoint(bins.path);
  require_same(torch.at("0.weight"),
               read_safetensors(golden("torch_save/module.safetensors")).at("0.weight"));
}

TEST_CASE("checkpoints: what wrappers leave in names is taken off, in any order") {
  const test::TempFolder folder;
  const std::vector<float> a = {1, 2};
  const auto write = [&](const std::vector<std::string>& names, const std::vector<float>& last) {
    std::vector<Tensor> tensors;
    for (const std::string& name : names) tensors.push_back(tensor_view(name, {2}, a.data()));
    tensors.back().data = last.data();
    write_safetensors(folder / "model.safetensors", tensors);
  };
  for (const char* name : {"module.layers.0.D", "_orig_mod.layers.0.D", "model.layers.0.D",
                           "module._orig_mod.layers.0.D", "_orig_mod.module.model.layers.0.D",
                           "module.module.layers.0.D", "layers.0._orig_mod.D",
                           "_fsdp_wrapped_module.layers.0._checkpoint_wrapped_module.D"}) {
    write({name}, a);
    const Checkpoint read = read_checkpoint(folder.path);
    CHECK(values<float>(read.at("layers.0.D")) == a);
    CHECK(read.at("layers.0.D").name == name);  // error lines say what the file has
  }
  write({"modules.D", "D.models"}, a);  // only whole parts of a name
  CHECK(read_checkpoint(folder.path).find("modules.D"));
  write({"D", "module.D"}, a);  // twice the same is no riddle
  CHECK(read_checkpoint(folder.path).tensors.size() == 1);
  write({"D", "module.D"}, {3, 4});
  check_error([&] { read_checkpoint(folder.path); },
              "model.safetensors: 'module.D' and 'D' differ, and both stand for 'D'");
}

TEST_CASE("checkpoints: where a tensor is missing, the line shows what the file has") {
  const test::TempFolder folder;
  const float x = 1;
  write_safetensors(folder / "model.safetensors",
                    {tensor_view("encoder.b", {1}, &x), tensor_view("module.encoder.a", {1}, &x)});
  check_error([&] { read_checkpoint(folder.path).at("layers.0.D"); },
              "model.safetensors: expected layers.0.D, found none; its 2 tensors begin with "
              "'module.encoder.a', 'encoder.b'");
  std::vector<Tensor> many;
  for (int i = 0; i < 1000; ++i)
    many.push_back(tensor_view(std::string(500, 'n') + std::to_string(i), {1}, &x));
  write_safetensors(folder / "model.safetensors", many);
  CHECK(error_of([&] { read_checkpoint(folder.path).at("D"); }).size() < 500);
}

TEST_CASE("weights: a model is found under every name that people's files have for it") {
  const test::TempFolder folder;
  const std::string source = golden("mamba1-hf");
  const Config config = read_config(source);
  const Checkpoint whole = read_checkpoint(source);
  REQUIRE(config.tie_embeddings);
  fs::copy(source + "/config.json", folder / "config.json");
  const auto renamed = [&](auto rename) {
    std::vector<Tensor> tensors;
    for (auto [name, tensor] : whole.tensors) {
      tensor.name = rename(name);
      if (!tensor.name.empty()) tensors.push_back(tensor);
    }
    write_safetensors(folder / "model.safetensors", tensors);
    return read_checkpoint(folder.path);
  };
  const auto after = [](const std::string& name, const std::string& start) {
    return name.rfind(start, 0) == 0 ? name.substr(start.size()) : name;
  };
  const std::string embedding = "backbone.embeddings.weight";
  for (const Checkpoint& found :
       {renamed([](const std::string& name) { return "_orig_mod.module." + name; }),
        renamed([&](const std::string& name) { return "model." + after(name, "backbone."); }),
        renamed([&](const std::string& name) { return after(name, "backbone."); }),
        renamed([&](const std::string& name) {  // the original package's own
          return name == embedding ? "embedding.weight" : after(name, "backbone.");
        }),
        renamed([&](const std::string& name) {  // the head alone stands for the tied pair
          return name == embedding ? "module.lm_head.weight" : name;
        })}) {
    const Warnings warnings;
    const auto model = load_model<ssm::Model<float>>(found, config);
    CHECK(warnings.text().empty());
    CHECK(model.tied);
    CHECK(model.embedding == load_model<ssm::Model<float>>(whole, config).embedding);
    for_each_shape(config, [&](const std::string& name, const std::vector<std::int64_t>& shape) {
      CHECK(weight(found, name, shape, true).bytes() == whole.at(name).bytes());
    });
  }
  Config untied = config;  // then a head is no embedding
  untied.tie_embeddings = false;
  const Checkpoint head =
      renamed([&](const std::string& name) { return name == embedding ? "lm_head.weight" : name; });
  check_error([&] { load_model<ssm::Model<float>>(head, untied); }, "expected " + embedding);
}

TEST_CASE("weights: warnings of one kind are a few, however many tensors there are") {
  const test::TempFolder folder;
  const Config config = read_config(golden("mamba1-hf"));
  Checkpoint checkpoint = read_checkpoint(golden("mamba1-hf"));
  const float bad = std::nanf("");
  const std::vector<float> one(50, bad);
  for (std::size_t i = 0; i < 50; ++i) {
    const std::string name = "extra." + std::to_string(i);
    checkpoint.tensors[name] = tensor_view(name, {1}, &one[i]);         // 50 windows
    checkpoint.tensors[name + ".tied"] = tensor_view(name, {1}, &bad);  // and one
  }
  CHECK(non_finite(checkpoint).size() == 51);
  const Warnings warnings;
  load_model<ssm::Model<float>>(checkpoint, config);
  CHECK(warnings.lines() == 2 * 9);
  CHECK(warnings.text().find("and 92 more warnings of this kind") != std::string::npos);
}

TEST_CASE("weights: sizes out of all proportion to the file are refused before they are made") {
  const test::TempFolder folder;
  write_file(folder / "config.json",  // a state of 16384 x 16384 from weights of 0.8 MB
             R"({"d_model": 1, "n_layer": 1, "vocab_size": 2, "ssm_cfg": {"layer": "Mamba2",
                 "expand": 16384, "headdim": 16384, "d_state": 16384}})");
  const Config config = read_config(folder.path);
  const std::vector<float> zeros(1 << 20);
  std::vector<Tensor> tensors;
  for_each_shape(config, [&](const std::string& name, const std::vector<std::int64_t>& shape) {
    tensors.push_back(to_dtype(tensor_view(name, shape, zeros.data()), DType::BF16));
  });
  write_safetensors(folder / "model.safetensors", tensors);
  check_error([&] { load_model<ssm::Model<float>>(read_checkpoint(folder.path), config); },
              "model.safetensors: config.json asks for 1025");
}

TEST_CASE("weights: NaN and infinity are reported with the tensor's name and their number") {
  const test::TempFolder folder;
  std::vector<float> good(100, std::numeric_limits<float>::max()), bad = good;
  bad[3] = std::nanf(""), bad[50] = -std::numeric_limits<float>::infinity();
  for (const DType dtype : {DType::F64, DType::F32, DType::BF16, DType::F16}) {
    if (dtype == DType::F16) good.assign(100, 65504), bad[7] = 65504;
    for (float& x : bad) x = dtype == DType::F16 && std::isfinite(x) ? 65504 : x;
    write_safetensors(folder / "m", {to_dtype(tensor_view("good", {100}, good.data()),
                                              dtype == DType::BF16 ? DType::F32 : dtype),
                                     to_dtype(tensor_view("bad", {100}, bad.data()),
                                              dtype == DType::BF16 ? DType::F32 : dtype)});
    const std::vector<std::string> lines = non_finite(read_safetensors(folder / "m"));
    REQUIRE(lines.size() == 1);
    CHECK(lines[0] == (folder / "m") + ": 'bad': 2 of 100 values are NaN or infinite");
  }
}

namespace {

Config config_of(const std::string& json) {
  const test::TempFolder folder;
  write_file(folder / "config.json", json);
  return read_config(folder.path);
}

void require_same(const Config& a, const Config& b) {
  CHECK(a.version == b.version);
  CHECK(a.d_model == b.d_model);
  CHECK(a.d_inner == b.d_inner);
  CHECK(a.d_state == b.d_state);
  CHECK(a.d_conv == b.d_conv);
  CHECK(a.n_layer == b.n_layer);
  CHECK(a.vocab_size == b.vocab_size);
  CHECK(a.dt_rank == b.dt_rank);
  CHECK(a.n_heads == b.n_heads);
  CHECK(a.head_dim == b.head_dim);
  CHECK(a.n_groups == b.n_groups);
  CHECK(a.chunk == b.chunk);
  CHECK(a.norm_eps == b.norm_eps);
  CHECK(a.dt_min == b.dt_min);
  CHECK(a.dt_max == b.dt_max);
  CHECK(a.tie_embeddings == b.tie_embeddings);
  CHECK(a.use_bias == b.use_bias);
  CHECK(a.use_conv_bias == b.use_conv_bias);
  CHECK(a.residual_in_fp32 == b.residual_in_fp32);
}

}  // namespace

TEST_CASE("config: what a file does not say has the default of its layout") {
  Config c = config_of(R"({"model_type": "mamba"})");  // transformers' MambaConfig
  CHECK(c.version == 1);
  CHECK(c.d_model == 768);
  CHECK(c.d_inner == 1536);
  CHECK(c.d_state == 16);
  CHECK(c.d_conv == 4);
  CHECK(c.n_layer == 32);
  CHECK(c.vocab_size == 50280);
  CHECK(c.dt_rank == 48);
  CHECK((c.tie_embeddings && !c.use_bias && c.use_conv_bias));
  CHECK((c.bos_token_id == 0 && c.eos_token_ids == std::vector<mamba::Token>{0}));
  c = config_of(R"({"model_type": "mamba2"})");  // Mamba2Config
  CHECK(c.version == 2);
  CHECK(c.d_model == 4096);
  CHECK(c.d_inner == 8192);
  CHECK(c.d_state == 128);
  CHECK(c.n_layer == 64);
  CHECK(c.vocab_size == 32768);
  CHECK((c.n_heads == 128 && c.head_dim == 64 && c.n_groups == 8 && c.chunk == 256));
  CHECK((c.dt_min == 0 && c.dt_max == kInf && !c.tie_embeddings &&
         c.eos_token_ids == std::vector<mamba::Token>{2}));
  c = config_of(R"({"d_model": 100, "ssm_cfg": {}})");  // the original package, Mamba
  CHECK((c.version == 1 && c.d_inner == 200 && c.d_state == 16 && c.d_conv == 4));
  CHECK((c.n_layer == 64 && c.vocab_size == 50277 && c.dt_rank == 7 && c.tie_embeddings));
  c = config_of(R"({"d_model": 128, "ssm_cfg": {"layer": "Mamba2"}})");
  CHECK((c.version == 2 && c.d_inner == 256 && c.d_state == 128 && c.head_dim == 64));
  CHECK((c.n_heads == 4 && c.n_groups == 1 && c.chunk == 256 && c.dt_max == kInf));
}

TEST_CASE("config: both layouts say the same model") {
  require_same(
      config_of(R"({"model_type": "mamba", "hidden_size": 96, "expand": 3, "state_size": 8,
                   "conv_kernel": 3, "time_step_rank": 5, "num_hidden_layers": 2, "vocab_size": 300,
                   "use_bias": true, "use_conv_bias": false, "tie_word_embeddings": false})"),
      config_of(R"({"d_model": 96, "n_layer": 2, "vocab_size": 300, "tie_embeddings": false,
                   "ssm_cfg": {"layer": "Mamba1", "expand": 3, "d_state": 8, "d_conv": 3,
                               "dt_rank": 5, "bias": true, "conv_bias": false}})"));
  require_same(
      config_of(
          R"({"model_type": "mamba2", "hidden_size": 64, "expand": 1.5, "state_size": 32,
                   "num_heads": 6, "head_dim": 16, "n_groups": 3, "chunk_size": 32,
                   "vocab_size": 300, "num_hidden_layers": 2, "time_step_limit": [0.001, 0.5]})"),
      config_of(R"({"d_model": 64, "n_layer": 2, "vocab_size": 300, "tie_embeddings": false,
                   "ssm_cfg": {"layer": "Mamba2", "expand": 1.5, "d_state": 32, "headdim": 16,
                               "ngroups": 3, "chunk_size": 32, "dt_limit": [0.001, 0.5]}})"));
}

TEST_CASE("config: Infinity in any spelling, and words that only look like it") {
  const std::string start = R"({"model_type": "mamba2", "time_step_limit": [0.0, )";
  for (const char* infinity : {"Infinity", "\"Infinity\"", R"({"__float__": "Infinity"})"})
    CHECK(config_of(start + infinity + "]}").dt_max == kInf);
  CHECK(config_of(start + "0.25]}").dt_max == 0.25);
  CHECK(config_of(R"({"model_type": "mamba2", "time_step_limit": null})").dt_max == kInf);
  const std::string words = R"({"a": "Infinity NaN", "b\"": "\\", "c": [NaN, -Infinity]})";
  CHECK(quote_bare_floats(words) ==
        R"({"a": "Infinity NaN", "b\"": "\\", "c": ["NaN", "-Infinity"]})");
}

TEST_CASE("config: what published files carry along does not disturb") {
  const Config c = config_of(R"({"model_type": "mamba2", "norm_before_gate": true, "rms_norm": true,
      "eos_token_id": [7, 8], "bos_token_id": null, "torch_dtype": "bfloat16",
      "quantization": {}})");
  CHECK((c.eos_token_ids == std::vector<mamba::Token>{7, 8} && c.bos_token_id == -1));
  // Converted models keep the original's names beside the new ones; the new ones count.
  CHECK(config_of(R"({"model_type": "mamba", "hidden_size": 64, "d_model": 64, "n_layer": 24,
      "num_hidden_layers": 3, "time_step_rank": "auto"})")
            .n_layer == 3);
  CHECK(config_of(R"({"d_model": 64, "n_layer": 3, "ssm_cfg": {"dt_rank": "auto"}})").dt_rank == 4);
}

TEST_CASE("config: what is written is read back") {
  for (
      const char* json :
      {R"({"model_type": "mamba", "hidden_size": 100, "expand": 3, "time_step_rank": 9,
            "layer_norm_epsilon": 1e-6, "use_bias": true, "bos_token_id": 5, "eos_token_id": 6})",
       R"({"model_type": "mamba2", "hidden_size": 64, "num_heads": 8, "head_dim": 16, "n_groups": 2,
            "time_step_limit": [0.01, Infinity], "eos_token_id": null})",
       R"({"model_type": "mamba2", "hidden_size": 64, "num_heads": 8, "head_dim": 16, "n_groups": 2,
            "time_step_limit": [0.0, 0.5], "tie_word_embeddings": true})"}) {
    const Config config = config_of(json);
    const test::TempFolder folder;
    write_config(folder.path, config);
    const Config read = read_config(folder.path);
    require_same(read, config);
    CHECK(read.bos_token_id == config.bos_token_id);
    CHECK(read.eos_token_ids == config.eos_token_ids);
  }
}

TEST_CASE(
    "config: a fraction for expand is read, and refused where transformers would refuse "
    "it") {
  const Config config = config_of(R"({"model_type": "mamba", "hidden_size": 100, "expand": 1.5})");
  CHECK(config.d_inner == 150);
  const test::TempFolder folder;
  std::string line;
  try {
    write_config(folder.path, config);
  } catch (const std::runtime_error& error) {
    line = error.what();
  }
  CHECK(line.find("expand: this layout knows whole numbers only") != std::string::npos);
}

TEST_CASE("checkpoints: a model reads the same from both published layouts") {
  std::vector<std::string> pairs = {golden("mamba1"), golden("mamba2")};
  if (const char* data = std::getenv("MAMBA_TEST_DATA")) {
    for (const char* name : {"/golden/mamba1", "/golden/mamba2", "/weights/stories-mamba1"})
      pairs.push_back(std::string(data) + name);
  } else {
    WARN("skipped: the larger models of MAMBA_TEST_DATA");
  }
  for (const std::string& pair : pairs) {
    INFO("model " << pair);
    require_same(read_config(pair + "-hf"), read_config(pair + "-original"));
    const Checkpoint hf = read_checkpoint(pair + "-hf"),
                     original = read_checkpoint(pair + "-original");
    CHECK(hf.tensors.size() >= 29);
    for (const auto& [name, tensor] : hf.tensors) {
      const bool embedding = name == "backbone.embeddings.weight";
      const Tensor& other = original.at(embedding ? "backbone.embedding.weight" : name);
      INFO("tensor " << name);
      CHECK(other.dtype == tensor.dtype);
      REQUIRE(other.bytes().substr(0, tensor.byte_size()) == tensor.bytes());  // then padding
      if (!embedding && name != "lm_head.weight") CHECK(other.shape == tensor.shape);
    }
  }
}
