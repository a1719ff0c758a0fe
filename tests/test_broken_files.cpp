// Claims about files that are not what they should be: each ends in one line that names the
// file and what is wrong. First a table of one broken file a row, then random damage.
#include <sys/resource.h>
#include <sys/stat.h>

#include <array>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "support.hpp"

namespace {

namespace fs = std::filesystem;
using namespace mamba;
using namespace std::string_literals;

/// A folder for one broken model, gone when the test is over.
struct BrokenModel : test::TempFolder {
  void write(const std::string& name, const std::string& bytes) const {
    fs::remove(*this / name);  // ext4 syncs a file that is cut to nothing and written anew
    std::ofstream(*this / name, std::ios::binary) << bytes;
  }
};

std::string golden(const std::string& name) { return test::root("tests/golden/" + name); }

template <class Number>
std::string bytes_of(Number number) {
  return {reinterpret_cast<const char*>(&number), sizeof number};
}
std::string u16(std::uint64_t n) { return bytes_of(static_cast<std::uint16_t>(n)); }
std::string u32(std::uint64_t n) { return bytes_of(static_cast<std::uint32_t>(n)); }
std::string u64(std::uint64_t n) { return bytes_of(n); }

/// The error's line, or "no error". Any other kind of exception escapes and fails the test.
template <class Function>
std::string error_of(Function function) {
  try {
    function();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "no error";
}

void require_line(const std::string& line, const std::string& fragment, const std::string& file) {
  INFO("got:      " << line);
  INFO("expected: " << fragment);
  CHECK(line.find(fragment) != std::string::npos);
  CHECK(line.find(file) != std::string::npos);
  CHECK(line.find('\n') == std::string::npos);
  CHECK(line.size() < 700);
}

// What stands in a file's place after a clone without git-lfs, and after a download that failed.
const std::string kPointer = "version https://git-lfs.github.com/spec/v1\noid sha256:"s +
                             std::string(64, 'a') + "\nsize 4552\n";
const std::string kPage = "\xef\xbb\xbf\n <!DOCTYPE html>\n<html><body>Sign in</body></html>\n";

struct Row {
  std::string what, content,
      fragment;  // how it is broken; the file; what the line must say
};

}  // namespace

// --- config.json ------------------------------------------------------------------------

TEST_CASE("broken config: each of these ends in one line that names file, key and value") {
  const std::string deep(100000, '[');
  const std::vector<Row> rows = {
      {"empty file", "", "config.json: expected JSON, found an empty file"},
      {"a pointer of Git LFS", kPointer, "config.json: expected JSON, found a Git LFS pointer"},
      {"a web page", kPage, "config.json: expected JSON, found a web page"},
      {"not JSON", "model: mamba", "bad JSON"},
      {"cut off", R"({"model_type": "mamba", )", "bad JSON"},
      {"invalid UTF-8", "{\"model_type\": \"\xff\"}", "UTF-8"},
      {"open string", "{\"model_type\": \"mam", "bad JSON"},
      {"ends in an escape", "{\"model_type\": \"mam\\", "bad JSON"},
      {"depth bomb", deep, "nested deeper than 64"},
      {"repeated key", R"({"model_type": "mamba", "model_type": "mamba2"})",
       "'model_type' appears twice"},
      {"not an object", "[1, 2]", "expected an object"},
      {"some other JSON", R"({"hello": 1})",
       "expected model_type (Hugging Face) or d_model (original)"},
      {"other model", R"({"model_type": "falcon_mamba"})",
       "model_type: expected mamba or mamba2, found '\"falcon_mamba\"'"},
      {"model type is a number", R"({"model_type": 2})",
       "model_type: expected mamba or mamba2, found '2'"},
      {"other layer", R"({"d_model": 64, "ssm_cfg": {"layer": "Mamba3"}})",
       "layer: expected Mamba1 or Mamba2, found '\"Mamba3\"'"},
      {"ssm_cfg is a list", R"({"d_model": 64, "ssm_cfg": [1]})", "ssm_cfg: expected an object"},
      {"size zero", R"({"model_type": "mamba", "hidden_size": 0})",
       "hidden_size: expected an integer from 1 to 1048576, found '0'"},
      {"size negative", R"({"model_type": "mamba", "state_size": -16})",
       "state_size: expected an integer"},
      {"size is 2^64 - 1", R"({"model_type": "mamba", "num_hidden_layers": 18446744073709551615})",
       "num_hidden_layers: expected an integer"},
      {"size beyond 2^64", R"({"model_type": "mamba", "vocab_size": 99999999999999999999})",
       "vocab_size: expected an integer"},
      {"size is a fraction", R"({"model_type": "mamba", "conv_kernel": 4.5})",
       "conv_kernel: expected an integer"},
      {"size is text", R"({"d_model": "768"})", "d_model: expected an integer"},
      {"size is a list", R"({"d_model": [768]})", "d_model: expected an integer"},
      {"expand is zero", R"({"model_type": "mamba", "expand": 0})", "expand: expected a factor"},
      {"expand is infinite", R"({"model_type": "mamba", "expand": Infinity})",
       "expand: expected a factor"},
      {"expand is not a number", R"({"model_type": "mamba", "expand": NaN})",
       "expand: expected a number"},
      {"channels beyond the limit", R"({"d_model": 1000000, "ssm_cfg": {"expand": 2}})",
       "expand: expected a factor that makes 1 to 1048576 channels"},
      {"dt_rank is another word", R"({"d_model": 64, "ssm_cfg": {"dt_rank": "large"}})",
       "dt_rank: expected an integer"},
      {"flag is a number", R"({"model_type": "mamba", "use_bias": 1})",
       "use_bias: expected true or false, found '1'"},
      {"heads do not fill d_inner",
       R"({"model_type": "mamba2", "hidden_size": 64, "num_heads": 7, "head_dim": 16})",
       "expected heads * head_dim = d_inner = 128, found 7 * 16"},
      {"head_dim does not divide",
       R"({"d_model": 64, "ssm_cfg": {"layer": "Mamba2", "headdim": 48}})",
       "expected heads * head_dim = d_inner = 128, found 2 * 48"},
      {"groups do not divide heads",
       R"({"d_model": 64, "ssm_cfg": {"layer": "Mamba2", "headdim": 16, "ngroups": 3}})",
       "groups: expected a divisor of the 8 heads, found 3"},
      {"dt limit reversed", R"({"model_type": "mamba2", "time_step_limit": [0.5, 0.1]})",
       "time_step_limit: expected 0 <= low <= high"},
      {"dt limit negative", R"({"model_type": "mamba2", "time_step_limit": [-Infinity, 1.0]})",
       "time_step_limit: expected"},
      {"dt limit NaN", R"({"model_type": "mamba2", "time_step_limit": [0, NaN]})",
       "time_step_limit: expected a number"},
      {"dt limit too short", R"({"model_type": "mamba2", "time_step_limit": [0.0]})",
       "time_step_limit: expected two numbers"},
      {"epsilon zero", R"({"model_type": "mamba", "layer_norm_epsilon": 0})",
       "layer_norm_epsilon: expected a number between 0 and 1"},
      {"epsilon infinite", R"({"model_type": "mamba", "layer_norm_epsilon": Infinity})",
       "layer_norm_epsilon: expected a number between 0 and 1"},
      {"other activation", R"({"model_type": "mamba", "hidden_act": "gelu"})",
       "hidden_act: expected silu, found '\"gelu\"'"},
      {"layer norm", R"({"model_type": "mamba2", "rms_norm": false})",
       "rms_norm: expected true, found 'false'"},
      {"no gated norm", R"({"d_model": 64, "ssm_cfg": {"layer": "Mamba2", "rmsnorm": false}})",
       "rmsnorm: expected true"},
      {"norm before gate",
       R"({"d_model": 64, "ssm_cfg": {"layer": "Mamba2", "norm_before_gate": true}})",
       "norm_before_gate: expected false"},
      {"D for each channel",
       R"({"d_model": 64, "ssm_cfg": {"layer": "Mamba2", "D_has_hdim": true}})",
       "D_has_hdim: expected false"},
      {"scan on some channels", R"({"d_model": 64, "ssm_cfg": {"layer": "Mamba2", "d_ssm": 64}})",
       "d_ssm: expected 128, found '64'"},
      {"attention layers without sizes", R"({"d_model": 64, "attn_layer_idx": [3]})",
       "attn_cfg: causal: expected true"},
      {"attention beyond the last layer", R"({"d_model": 64, "attn_layer_idx": [64]})",
       "attn_layer_idx: expected layers below 64, found '[64]'"},
      {"MLPs of negative width", R"({"d_model": 64, "d_intermediate": -1})",
       "d_intermediate: expected an integer from 0"},
      {"token id is text", R"({"model_type": "mamba", "eos_token_id": ["</s>"]})",
       "eos_token_id: expected an integer"},
      {"token id beyond int32", R"({"model_type": "mamba", "bos_token_id": 5000000000})",
       "bos_token_id: expected an integer"},
  };
  for (const Row& row : rows) {
    INFO("broken by: " << row.what);
    const BrokenModel model;
    model.write("config.json", row.content);
    require_line(error_of([&] { read_config(model.path); }), row.fragment, "config.json");
  }
  const BrokenModel model;
  require_line(error_of([&] { read_config(model.path); }), "No such file", "config.json");
  require_line(error_of([&] { read_config("no\nsuch"); }), "No such file", "no?such/config.json");
  fs::create_directory(model / "config.json");
  require_line(error_of([&] { read_config(model.path); }), "expected a file, found a directory",
               "config.json");
  const BrokenModel piped;
  REQUIRE(::mkfifo((piped / "config.json").c_str(), 0600) == 0);
  require_line(error_of([&] { read_config(piped.path); }), "expected a file, found a pipe",
               "config.json");
}

// --- safetensors ------------------------------------------------------------------------

namespace {

/// A safetensors file with this header and `bytes` of data.
std::string safetensors(const std::string& header, std::size_t bytes) {
  return u64(header.size()) + header + std::string(bytes, '\0');
}

/// A header of these tensors, each a name, dtype, shape and offsets.
std::string entries(const std::vector<std::array<std::string, 4>>& tensors) {
  std::string header;
  for (const auto& [name, dtype, shape, offsets] : tensors)
    header += (header.empty() ? "{\"" : ",\"") + name + R"(":{"dtype":")" + dtype +
              R"(","shape":)" + shape + R"(,"data_offsets":)" + offsets + "}";
  return header + "}";
}
std::string entry(const std::string& dtype, const std::string& shape, const std::string& offsets) {
  return entries({{"x", dtype, shape, offsets}});
}

}  // namespace

TEST_CASE("broken safetensors: each of these ends in one line that names file and tensor") {
  const std::vector<Row> rows = {
      {"empty file", "", "found an empty file"},
      {"a pointer of Git LFS", kPointer,
       "found a Git LFS pointer instead of the file: run 'git lfs"},
      {"a web page", kPage, "found a web page instead of the file: download it again"},
      {"a GGUF file", "GGUF\3\0\0\0"s + std::string(40, '\0'), "found a GGUF file"},
      {"shorter than its first number", "1234567", "expected 8 bytes at offset 0, found 7"},
      {"header longer than the file", u64(100) + "{}", "bad header"},
      {"header of 2^64 - 1 bytes", u64(~0ull) + "{}",
       "expected at most 2 bytes, found 18446744073709551615"},
      {"header is not JSON", safetensors("{,}", 0), "bad JSON"},
      {"header is empty", safetensors("", 0), "bad JSON"},
      {"header is a list", safetensors("[]", 0), "expected an object"},
      {"header is not UTF-8", safetensors("{\"\xc3\x28\":1}", 0), "UTF-8"},
      {"header is followed by more", safetensors("{} {}", 0), "bad JSON"},
      {"depth bomb", safetensors(std::string(1000000, '{'), 0), "bad JSON"},
      {"deep lists", safetensors("{\"x\":" + std::string(1000000, '['), 0),
       "nested deeper than 64"},
      {"tensor twice",
       safetensors(entries({{"x", "F32", "[1]", "[0,4]"}, {"x", "F32", "[1]", "[4,8]"}}), 8),
       "'x' appears twice"},
      {"dtype twice",
       safetensors(R"({"x":{"dtype":"F32","dtype":"F16","shape":[1],"data_offsets":[0,4]}})", 4),
       "'dtype' appears twice"},
      {"tensor is a number", safetensors(R"({"x":1})", 0),
       "'x': expected dtype, shape and data_offsets"},
      {"no dtype", safetensors(R"({"x":{"shape":[1],"data_offsets":[0,4]}})", 4),
       "'x': expected dtype"},
      {"no shape", safetensors(R"({"x":{"dtype":"F32","data_offsets":[0,4]}})", 4),
       "'x': expected dtype"},
      {"three offsets", safetensors(entry("F32", "[1]", "[0,4,8]"), 4), "'x': expected dtype"},
      {"unknown dtype", safetensors(entry("F33", "[1]", "[0,4]"), 4), "unknown dtype"},
      {"negative size", safetensors(entry("F32", "[-1]", "[0,4]"), 4),
       "'x': expected dtype, shape and data_offsets of whole numbers"},
      {"fraction in shape", safetensors(entry("F32", "[1.0]", "[0,4]"), 4),
       "'x': expected dtype, shape and data_offsets of whole numbers"},
      {"text in shape", safetensors(entry("F32", "[\"1\"]", "[0,4]"), 4),
       "'x': expected dtype, shape and data_offsets of whole numbers"},
      {"size of 2^63", safetensors(entry("F32", "[9223372036854775808]", "[0,4]"), 4),
       "'x': expected sizes >= 0 with a product below 2^63"},
      {"product is 2^64", safetensors(entry("F32", "[4294967296,4294967296]", "[0,0]"), 0),
       "'x': expected sizes >= 0 with a product below 2^63"},
      {"product overflows in bytes only",
       safetensors(entry("F64", "[2305843009213693952]", "[0,0]"), 0), "with a product below 2^63"},
      {"shape of a million ones too large",
       safetensors(entry(
                       "F32",
                       "[2" +
                           [] {
                             std::string s;
                             for (int i = 0; i < 70; ++i) s += ",2";
                             return s;
                           }() +
                           "]",
                       "[0,4]"),
                   4),
       "2, ...)"},
      {"begin after end", safetensors(entry("F32", "[1]", "[4,0]"), 4),
       "expected 4 bytes for F32 (1), found 4 to 0"},
      {"end outside", safetensors(entry("F32", "[2]", "[0,8]"), 4),
       "'x': expected bytes from 0 to at most 4, found 0 to 8"},
      {"offset of 2^64 - 1", safetensors(entry("F32", "[1]", "[0,18446744073709551615]"), 4),
       "'x': expected 4 bytes for F32 (1), found 0 to 18446744073709551615"},
      {"offset below zero", safetensors(entry("F32", "[1]", "[-4,0]"), 4),
       "'x': expected dtype, shape and data_offsets of whole numbers"},
      {"too few bytes for the shape", safetensors(entry("F32", "[2,3]", "[0,20]"), 20),
       "expected 24 bytes for F32 (2, 3), found 0 to 20"},
      {"too many bytes for the shape", safetensors(entry("F16", "[2]", "[0,8]"), 8),
       "expected 4 bytes for F16 (2), found 0 to 8"},
      {"overlap",
       safetensors(entries({{"a", "F32", "[2]", "[0,8]"}, {"b", "F32", "[2]", "[4,12]"}}), 12),
       "'b': expected bytes from 8 to at most 12, found 4 to 12"},
      {"two tensors in one place",
       safetensors(entries({{"a", "F32", "[1]", "[0,4]"}, {"b", "F32", "[1]", "[0,4]"}}), 4),
       "'b': expected bytes from 4 to at most 4, found 0 to 4"},
      {"hole at the start", safetensors(entry("F32", "[1]", "[4,8]"), 8),
       "'x': expected bytes from 0 to at most 8, found 4 to 8"},
      {"hole in the middle",
       safetensors(entries({{"a", "U8", "[2]", "[0,2]"}, {"b", "U8", "[2]", "[3,5]"}}), 5),
       "'b': expected bytes from 2 to at most 5, found 3 to 5"},
      {"bytes left over", safetensors(entry("F32", "[1]", "[0,4]"), 9),
       "expected tensors up to byte 9, found 4"},
      {"metadata is a list", safetensors(R"({"__metadata__":[]})", 0),
       "'__metadata__': expected an object"},
      {"metadata holds a number", safetensors(R"({"__metadata__":{"n":1}})", 0),
       "'n': expected a string"},
      {"a name of many lines", safetensors(R"({"a\nb\u0007":{"dtype":"?"}})", 0), "'a?b?'"},
      {"a name of a megabyte", safetensors("{\"" + std::string(1 << 20, 'n') + "\":0}", 0),
       "nnn...'"},
  };
  for (const Row& row : rows) {
    INFO("broken by: " << row.what);
    const BrokenModel model;
    model.write("model.safetensors", row.content);
    require_line(error_of([&] { read_checkpoint(model.path); }), row.fragment, "model.safetensors");
  }
}

TEST_CASE("safetensors: a header's length may begin like a text, and the file is read") {
  const std::string plain = entry("F32", "[1]", "[0,4]");
  for (const std::size_t length : {0x13cu, 0x3c20u, 0x3c3cu, 0x213cu, 0x5547u}) {  // "<", " <", ...
    const BrokenModel model;
    model.write("model.safetensors",
                safetensors(plain + std::string(length - plain.size(), ' '), 4));
    CHECK(read_checkpoint(model.path).tensors.size() == 1);
  }
}

TEST_CASE("broken shards: the index and what it points to are checked") {
  const std::string good = safetensors(entry("F32", "[1]", "[0,4]"), 4);
  const std::vector<Row> rows = {
      {"no weight map", R"({"metadata": {}})", "index.json: expected an object weight_map"},
      {"weight map is a list", R"({"weight_map": []})", "expected an object weight_map"},
      {"not an object", "3", "expected an object weight_map"},
      {"not JSON", "{", "bad JSON"},
      {"leaves the folder", R"({"weight_map": {"x": "../../etc/passwd"}})",
       "'x': expected the name of a file beside the index"},
      {"a number", R"({"weight_map": {"x": 3}})", "'x': expected the name of a file"},
      {"no name", R"({"weight_map": {"x": ""}})", "'x': expected the name of a file"},
      {"NUL in the name", "{\"weight_map\": {\"x\": \"one\\u0000\"}}",
       "'x': expected the name of a file"},
      {"missing shard", R"({"weight_map": {"x": "two.safetensors"}})",
       "two.safetensors: No such file"},
      {"tensor not in its shard", R"({"weight_map": {"y": "one.safetensors"}})",
       "one.safetensors: expected y, found none"},
  };
  for (const Row& row : rows) {
    INFO("broken by: " << row.what);
    const BrokenModel model;
    model.write("one.safetensors", good);
    model.write("model.safetensors.index.json", row.content);
    require_line(error_of([&] { read_checkpoint(model.path); }), row.fragment, model.path);
  }
  const BrokenModel model;
  require_line(error_of([&] { read_checkpoint(model.path); }), "expected model.safetensors or",
               model.path);
}

// --- PyTorch ----------------------------------------------------------------------------

namespace {

struct Entry {
  std::string name, bytes;
  int method = 0;
};

/// A zip of stored entries. `size_off` is added to the sizes that the directory gives.
std::string zip(const std::vector<Entry>& entries, std::uint64_t size_off = 0) {
  std::string file, directory;
  for (const Entry& e : entries) {
    const std::uint64_t size = e.bytes.size() + size_off;
    directory += "PK\1\2"s + u16(0) + u16(0) + u16(0) + u16(e.method) + u32(0) + u32(0) +
                 u32(size) + u32(size) + u16(e.name.size()) + u16(0) + u16(0) + u16(0) + u16(0) +
                 u32(0) + u32(file.size()) + e.name;
    file += "PK\3\4"s + u16(0) + u16(0) + u16(e.method) + u32(0) + u32(0) + u32(size) + u32(size) +
            u16(e.name.size()) + u16(0) + e.name + e.bytes;
  }
  return file + directory + "PK\5\6" + u32(0) + u16(entries.size()) + u16(entries.size()) +
         u32(directory.size()) + u32(file.size()) + u16(0);
}

// The opcodes of a pickle, by their names in Python's pickletools.
std::string text(const std::string& s) { return "X" + u32(s.size()) + s; }
std::string integer(std::int64_t n) { return "\x8a\x08" + bytes_of(n); }
std::string name(const std::string& module, const std::string& n) {
  return "c" + module + "\n" + n + "\n";
}
std::string tuple(const std::vector<std::int64_t>& numbers) {
  std::string code = "(";
  for (const std::int64_t n : numbers) code += integer(n);
  return code + "t";
}
std::string storage(const std::string& type, const std::string& key, std::int64_t n) {
  return "(" + text("storage") + name("torch", type) + text(key) + text("cpu") + integer(n) + "tQ";
}
std::string tensor(const std::string& in, std::int64_t offset,
                   const std::vector<std::int64_t>& shape,
                   const std::vector<std::int64_t>& strides) {
  return name("torch._utils", "_rebuild_tensor_v2") + "(" + in + integer(offset) + tuple(shape) +
         tuple(strides) + "\x89" + name("collections", "OrderedDict") + ")RtR";
}
std::string dict(const std::string& items) { return "\x80\x02}(" + items + "u."; }

/// The file of a state dict whose pickle is this, with 24 bytes in storage "0".
std::string torch_file(const std::string& pickle, const std::string& order = "little") {
  return zip({{"m/data.pkl", pickle}, {"m/byteorder", order}, {"m/data/0", std::string(24, '\0')}});
}

}  // namespace

TEST_CASE("broken torch.save: each of these ends in one line that names the file") {
  const std::string floats = storage("FloatStorage", "0", 6);
  const std::string x = text("x") + tensor(floats, 0, {2, 3}, {3, 1}), good = torch_file(dict(x));
  const std::int64_t big = std::int64_t{1} << 62;
  const std::string v2 = name("torch._utils", "_rebuild_tensor_v2");
  const std::string of_class = name("torch._tensor", "_rebuild_from_type_v2");
  const auto inner = [](const std::string& items) { return "}(" + items + "u"; };
  const std::vector<Row> rows = {
      {"empty file", "", "found an empty file"},
      {"some other file", "ZM......", "expected a file written by torch.save"},
      {"a pointer of Git LFS", kPointer, "found a Git LFS pointer"},
      {"a web page", kPage, "found a web page"},
      {"a GGUF file", "GGUF....", "found a GGUF file"},
      {"from before PyTorch 1.6", read_file(golden("torch_save/before_1.6.bin")),
       "found a file that torch.save wrote before PyTorch 1.6: load and save it with a newer one"},
      {"only the first bytes of a zip", good.substr(0, 4), "expected a zip archive's end record"},
      {"cut in the middle", good.substr(0, good.size() / 2), "expected a zip archive's end record"},
      {"cut by one byte", good.substr(0, good.size() - 1), "truncated"},
      {"directory outside",
       [&] {
         std::string z = good;
         z.replace(z.size() - 6, 4, u32(1u << 30));
         return z;
       }(),
       "truncated"},
      {"directory is not one",
       [&] {
         std::string z = good;
         z.replace(z.size() - 6, 4, u32(3));
         return z;
       }(),
       "expected a directory entry"},
      {"more entries than there are",
       [&] {
         std::string z = good;
         z.replace(z.size() - 12, 2, u16(9));
         return z;
       }(),
       "expected a directory entry"},
      {"zip64 without its records",
       [&] {
         std::string z = good;
         z.replace(z.size() - 6, 4, u32(0xffffffff));
         return z;
       }(),
       "expected the zip64 locator"},
      {"compressed entry", zip({{"m/data.pkl", dict(x), 8}}),
       "'m/data.pkl': expected a stored entry, found a compressed"},
      {"entry longer than the file", zip({{"m/data.pkl", dict(x)}}, 1u << 20), "truncated"},
      {"entry twice", zip({{"m/data.pkl", dict(x)}, {"m/data.pkl", dict(x)}}),
       "'m/data.pkl': appears twice"},
      {"no pickle", zip({{"m/data/0", "abcd"}}), "expected an entry NAME/data.pkl"},
      {"big-endian", torch_file(dict(x), "big"), "expected little, found 'big'"},
      {"empty pickle", torch_file(""), "truncated"},
      {"protocol 0", torch_file("(dp0\n."), "has the opcode 100"},
      {"protocol 6", torch_file("\x80\x06}."), "has protocol 6"},
      {"no STOP", torch_file("\x80\x02}"), "truncated"},
      {"stops with an empty stack", torch_file("\x80\x02."), "takes from an empty stack"},
      {"tuple without a mark", torch_file("\x80\x02t."), "looks for a mark that is not there"},
      {"takes a mark for a value", torch_file("\x80\x02(\x85."), "takes from an empty stack"},
      {"recalls what it never noted", torch_file("\x80\x02h\x07."), "recalls what it never noted"},
      {"text longer than the pickle", torch_file("\x80\x02X\xff\xff\xff\x7f."), "truncated"},
      {"text of 2^64 - 1 bytes", torch_file("\x80\x02\x8d" + u64(~0ull) + "."), "truncated"},
      {"name without an end",
       torch_file("\x80\x02"
                  "cos"),
       "truncated"},
      {"os.system", torch_file("\x80\x02" + name("os", "system") + text("true") + "\x85R."),
       "asks for 'os.system' at byte"},
      {"builtins.eval", torch_file("\x80\x02" + name("builtins", "eval") + text("1") + "\x85R."),
       "asks for 'builtins.eval'"},
      {"os.system by STACK_GLOBAL",
       torch_file("\x80\x04" + text("os") + text("system") + "\x93)R."), "asks for 'os.system'"},
      {"a function of torch", torch_file("\x80\x02" + name("torch", "load") + text("f") + "\x85R."),
       "asks for 'torch.load'"},
      {"NEWOBJ", torch_file("\x80\x02" + name("collections", "OrderedDict") + ")\x81."),
       "has the opcode 129"},
      {"calls a storage type", torch_file("\x80\x02" + name("torch", "FloatStorage") + ")R."),
       "calls 'FloatStorage' with 0 arguments"},
      {"calls a number", torch_file("\x80\x02K\x01)R."), "holds a value of the wrong kind"},
      {"too few arguments", torch_file(dict(text("x") + v2 + "(" + floats + "tR")),
       "with 1 arguments"},
      {"tensor in a text", torch_file(dict(text("x") + tensor(text("0"), 0, {1}, {1}))),
       "holds a value of the wrong kind"},
      {"persistent id is a text", torch_file("\x80\x02" + text("0") + "Q."),
       "holds a value of the wrong kind"},
      {"persistent id is short", torch_file("\x80\x02" + text("storage") + "\x85Q."),
       "has an unknown persistent id"},
      {"BUILD on a tensor", torch_file(dict(x + "}b")), "holds a value of the wrong kind"},
      {"integer of nine bytes", torch_file("\x80\x02\x8a\x09" + std::string(9, '\1') + "."),
       "has an integer of 9 bytes"},
      {"key without a value", torch_file("\x80\x02}(" + text("x") + "u."),
       "has a key without a value"},
      {"too many opcodes", torch_file("\x80\x02" + std::string(1 << 23, 'N')),
       "has more than 1048576 opcodes"},
      {"65 dimensions",
       torch_file(dict(text("x") + tensor(floats, 0, std::vector<std::int64_t>(65, 1),
                                          std::vector<std::int64_t>(65, 1)))),
       "has a tensor of 65 dimensions"},
      {"not a dict", torch_file("\x80\x02K\x01."), "expected a dict of tensors"},
      {"a number in the dict", torch_file(dict(x + text("n") + "K\x01")),
       "'n': expected a name and a tensor"},
      {"two state dicts",
       torch_file(dict(text("model") + inner(x) + text("state_dict") + inner(x))),
       "expected one state dict, found another in 'state_dict'"},
      {"no state dict", torch_file(dict(text("weights") + inner(x))),
       "or one in it under model, state_dict, model_state_dict or module"},
      {"a state dict without tensors", torch_file(dict(text("model") + "}")),
       "expected a dict of tensors, or one in it"},
      {"a dict that holds itself",
       torch_file("\x80\x02}q\1"s + text("model") + "h\1s" + text("module") + "h\1s."),
       "expected a dict of tensors, or one in it"},
      {"a parameter of a number",
       torch_file(dict(text("x") + name("torch._utils", "_rebuild_parameter_with_state") +
                       "(K\1\x88}}tR")),
       "holds a value of the wrong kind"},
      {"a tensor of its own class",
       torch_file(dict(text("x") + name("torch._tensor", "_rebuild_from_type_v2") + "(" +
                       name("__main__", "MyTensor") + "N)NtR")),
       "asks for '__main__.MyTensor'"},
      {"a function of a function",
       torch_file(dict(text("x") + of_class + "(" + of_class + name("torch", "Tensor") + ")NtR")),
       "calls 'torch._tensor._rebuild_from_type_v2' with 0 arguments"},
      {"tensor twice", torch_file(dict(x + x)), "the tensor 'x' appears twice"},
      {"no such storage",
       torch_file(dict(text("x") + tensor(storage("FloatStorage", "7", 6), 0, {1}, {1}))),
       "'x': expected 24 bytes in storage '7', found 0"},
      {"storage cut short",
       torch_file(dict(text("x") + tensor(storage("FloatStorage", "0", 7), 0, {1}, {1}))),
       "'x': expected 28 bytes in storage '0', found 24"},
      {"storage of 2^62 values",
       torch_file(dict(text("x") + tensor(storage("FloatStorage", "0", big), 0, {1}, {1}))),
       "'x': expected sizes >= 0 with a product below 2^63"},
      {"storage of -1 values",
       torch_file(dict(text("x") + tensor(storage("FloatStorage", "0", -1), 0, {1}, {1}))),
       "'x': expected sizes >= 0"},
      {"shape larger than the storage", torch_file(dict(text("x") + tensor(floats, 0, {7}, {1}))),
       "'x': expected values inside the 6 of storage '0'"},
      {"offset outside", torch_file(dict(text("x") + tensor(floats, 5, {2}, {1}))),
       "found offset 5, shape (2), strides (1)"},
      {"offset negative", torch_file(dict(text("x") + tensor(floats, -1, {2}, {1}))),
       "found offset -1"},
      {"offset negative in one byte",
       torch_file(dict(text("x") + v2 + "(" + floats + "\x8a\x01\xff" + tuple({2}) + tuple({1}) +
                       "\x89" + name("collections", "OrderedDict") + ")RtR")),
       "found offset -1"},
      {"offset of 2^63 - 1", torch_file(dict(text("x") + tensor(floats, INT64_MAX, {2}, {1}))),
       "'x': expected values inside"},
      {"strides reach outside", torch_file(dict(text("x") + tensor(floats, 0, {2, 3}, {4, 1}))),
       "strides (4, 1)"},
      {"strides overflow", torch_file(dict(text("x") + tensor(floats, 0, {3, 2}, {big, 1}))),
       "'x': expected values inside"},
      {"stride negative", torch_file(dict(text("x") + tensor(floats, 5, {2}, {-1}))),
       "strides (-1)"},
      {"too few strides", torch_file(dict(text("x") + tensor(floats, 0, {2, 3}, {1}))),
       "shape (2, 3), strides (1)"},
      {"shape overflows", torch_file(dict(text("x") + tensor(floats, 0, {big, big}, {0, 0}))),
       "'x': expected sizes >= 0"},
      {"shape negative", torch_file(dict(text("x") + tensor(floats, 0, {-2}, {1}))),
       "'x': expected sizes >= 0"},
      {"one value repeated a billion times",
       torch_file(dict(text("x") + tensor(floats, 0, {1 << 30}, {0}))),
       "'x': with it, tensors show over 4 times what the file holds"},
  };
  for (const Row& row : rows) {
    INFO("broken by: " << row.what);
    const BrokenModel model;
    model.write("pytorch_model.bin", row.content);
    require_line(error_of([&] { read_checkpoint(model.path); }), row.fragment, "pytorch_model.bin");
  }
  const BrokenModel model;  // what the rows break is good before
  model.write("pytorch_model.bin", good);
  CHECK(read_checkpoint(model.path).at("x").shape == std::vector<std::int64_t>{2, 3});
}

TEST_CASE("hostile torch.save: work and memory are bounded by the file's size") {
  const BrokenModel model;
  const auto peak = [] {  // MiB that this process ever had
    struct rusage usage = {};
    ::getrusage(RUSAGE_SELF, &usage);
    return usage.ru_maxrss / 1024;
  };
  const std::string floats = storage("FloatStorage", "0", 100000), bytes(400000, '\1');
  const auto file = [&](const std::string& items) {
    return zip({{"m/data.pkl", "\x80\x02}"s + items + "."}, {"m/data/0", bytes}});
  };
  const auto before = peak();
  SECTION("a key of 90 KB, used 30,000 times, is not copied") {
    std::string uses;
    for (int i = 0; i < 30000; ++i) uses += "h\1Q0";
    const std::string id = "(" + text("storage") + name("torch", "FloatStorage") +
                           text(std::string(90000, 'k')) + text("cpu") + "K\1tq\1" + "0";
    model.write("pytorch_model.bin",
                file(id + uses + text("x") + tensor(floats, 0, {2}, {1}) + "s"));
    CHECK(read_checkpoint(model.path).tensors.size() == 1);
  }
  SECTION("20,000 names for one window are looked at once") {
    std::string items = text("x") + tensor(floats, 0, {100000}, {1}) + "q\1s";
    for (int i = 0; i < 20000; ++i) items += text("x" + std::to_string(i)) + "h\1s";
    model.write("pytorch_model.bin", file(items));
    const Checkpoint checkpoint = read_checkpoint(model.path);
    CHECK(checkpoint.tensors.size() == 20001);
    CHECK(non_finite(checkpoint).empty());  // 8 GB, if each were
  }
  SECTION("windows that overlap without end are refused, and copies too") {
    for (const std::int64_t stride : {1, 2}) {
      std::string items;
      for (std::int64_t i = 0; i < 1000; ++i)
        items += text("x" + std::to_string(i)) + tensor(floats, i, {49000}, {stride}) + "s";
      model.write("pytorch_model.bin", file(items));
      require_line(error_of([&] { read_checkpoint(model.path); }),
                   "with it, tensors show over 4 times what the file holds", "pytorch_model.bin");
    }
  }
  CHECK(peak() - before < 300);
}

TEST_CASE("broken folder: what is no model of ours is named, with what to do") {
  const auto line_of = [](const std::vector<std::string>& files, auto read) {
    const BrokenModel model;
    for (const std::string& file : files) model.write(file, "{}");
    const std::string line = error_of([&] { read(model.path); });
    require_line(line, "found ", model.path);
    return line.substr(line.find("found "));
  };
  const std::vector<std::pair<std::vector<std::string>, std::string>> rows = {
      {{"adapter_config.json", "adapter_model.safetensors"}, "found an adapter (LoRA): expected"},
      {{"adapter_model.bin"}, "found an adapter (LoRA): expected"},
      {{"params.json", "consolidated.safetensors"}, "found Mistral's own layout: expected the"},
      {{"consolidated.00.pth"}, "found Mistral's own layout: expected the"},
      {{"mamba.Q4_K_M.gguf"}, "found a GGUF file, as llama.cpp has them"}};
  for (const auto& [files, want] : rows) {
    CHECK(line_of(files, [](auto& folder) { read_config(folder); }).rfind(want, 0) == 0);
    CHECK(line_of(files, [](auto& folder) { read_checkpoint(folder); }).rfind(want, 0) == 0);
  }
  CHECK(line_of({"config.json"}, [](auto& folder) { read_checkpoint(folder); }) == "found neither");
  // A model beside them is read: Codestral is published in both layouts, a base with its adapter.
  const BrokenModel model;
  for (const char* file : {"params.json", "consolidated.safetensors", "adapter_config.json"})
    model.write(file, "{}");
  model.write("config.json", R"({"model_type": "mamba2"})");
  model.write("model.safetensors", safetensors(entry("F32", "[1]", "[0,4]"), 4));
  CHECK(read_config(model.path).version == 2);
  CHECK(read_checkpoint(model.path).tensors.size() == 1);
}

// --- Files beside a model ---------------------------------------------------------------

namespace {

/// The smallest model's config, and a header of its state with these ids and h.
Config state_config() {
  const Json json = {{"model_type", "mamba"}, {"hidden_size", 2},       {"expand", 1},
                     {"vocab_size", 9},       {"num_hidden_layers", 1}, {"state_size", 2}};
  return config_from_json(json, false, "config.json");
}
std::string state(const std::array<std::string, 4>& ids, const std::array<std::string, 4>& h,
                  const std::string& data) {
  const std::string header = entries({{"layers.0.conv", "F32", "[3,2]", "[0,24]"}, h, ids});
  return u64(header.size()) + header + std::string(40, '\0') + data;
}

}  // namespace

TEST_CASE("broken state: each of these ends in one line that names file and tensor") {
  const std::array<std::string, 4> h = {"layers.0.h", "F32", "[2,2]", "[24,40]"},
                                   one = {"ids", "I32", "[1]", "[40,44]"};
  const std::string good = state(one, h, u32(8));
  const std::vector<Row> rows = {
      {"empty file", "", "found an empty file"},
      {"a pointer of Git LFS", kPointer, "found a Git LFS pointer"},
      {"cut by one byte", good.substr(0, good.size() - 1), "bad offsets"},
      {"weights", read_file(golden("torch_save/zip.safetensors")),
       "expected layers.0.conv, found none; its 26 tensors begin with 'bfloat16'"},
      {"the state of a wider model", state(one, {"layers.0.h", "F32", "[4]", "[24,40]"}, u32(8)),
       "layers.0.h: expected (2, 2) for this model, found (4)"},
      {"whole numbers", state(one, {"layers.0.h", "I32", "[2,2]", "[24,40]"}, u32(8)),
       "'layers.0.h': expected F64, F32, F16 or BF16, found I32"},
      {"a layer more",
       safetensors(entries({{"layers.0.conv", "F32", "[3,2]", "[0,24]"},
                            h,
                            {"layers.1.h", "F32", "[1]", "[40,44]"}}),
                   44),
       "expected 1 layers, found more"},
      {"no tensor of ids", state({"id", "I32", "[1]", "[40,44]"}, h, u32(8)),
       "expected ids, found none"},
      {"ids that are fractions", state({"ids", "F32", "[1]", "[40,44]"}, h, u32(8)),
       "'ids': expected I64 or I32, found F32"},
      {"an id beyond the vocabulary", state(one, h, u32(9)), "ids: expected ids below 9, found 9"},
      {"an id below zero", state(one, h, u32(~0u)), "ids: expected ids below 9, found -1"},
      {"an id of 2^32", state({"ids", "I64", "[1]", "[40,48]"}, h, u64(1ull << 32)),
       "ids: expected ids below 9, found 4294967296"},
      {"no ids", state({"ids", "I32", "[0]", "[40,40]"}, h, ""),
       "ids: expected at least one, found none"},
  };
  const BrokenModel folder;
  const auto load = [&](const std::string& content) {
    folder.write("state", content);
    std::vector<Token> ids;
    load_state(folder / "state", state_config(), ids);
    return ids;
  };
  for (const Row& row : rows) {
    INFO("broken by: " << row.what);
    const std::string line = error_of([&] { load(row.content); });
    require_line(line, row.fragment, line.rfind("wrong dtype", 0) == 0 ? "" : "state");
  }
  CHECK(load(good) == std::vector<Token>{8});  // what the rows break is good before
}

TEST_CASE("broken settings: the files that name end tokens end in one line too") {
  const BrokenModel model;
  const auto line_of = [&](const std::string& name, const std::string& content) {
    model.write(name, content);
    ModelFolder folder;
    folder.folder = model.path;
    const std::string line = error_of([&] { folder.end_tokens(); });
    fs::remove(model / name);
    return line;
  };
  fs::copy(test::root("weights/stories/tokenizer.json"), model / "tokenizer.json");
  for (const std::string name : {"generation_config.json", "tokenizer_config.json"}) {
    require_line(line_of(name, ""), "expected JSON, found an empty file", name);
    require_line(line_of(name, kPointer), "expected JSON, found a Git LFS pointer", name);
    require_line(line_of(name, "[1]"), "expected an object", name);
  }
  for (const std::string ids : {"\"</s>\"", "[0, 1.5]", "[[0]]", "-2", "5000000000"})
    require_line(line_of("generation_config.json", "{\"eos_token_id\": " + ids + "}"),
                 "eos_token_id: expected an integer from -1", "generation_config.json");
  for (const std::string name : {"3", "[\"a\"]", "{}", "{\"content\": 3}", "\"no such token\""})
    CHECK(line_of("tokenizer_config.json", "{\"eos_token\": " + name + "}") == "no error");
}

// --- Random damage ----------------------------------------------------------------------

namespace {

std::string damaged(std::string file, std::mt19937& random) {
  const auto below = [&](std::size_t n) {
    return static_cast<std::size_t>(random() % std::max<std::size_t>(n, 1));
  };
  // Half of the damage goes to the first part of the file, where the structure lies.
  const auto place = [&] {
    return below(random() % 2 == 0 ? std::min<std::size_t>(file.size(), 2000) : file.size());
  };
  static const std::string kTelling = "\0\1\x7f\x80\xff\"{}[](),:-.0123456789tRQcbhqusXKJ\x85\x8a"s;
  for (std::size_t n = 1 + below(4); n > 0 && !file.empty(); --n) {
    const std::size_t at = place(), count = 1 + below(16);
    switch (below(8)) {
      case 0:
        file.resize(at);
        break;
      case 1:
        file.erase(at, count);
        break;
      case 2:
        file.insert(at, file.substr(place(), count));
        break;
      case 3:
        file.replace(at, std::min<std::size_t>(8, file.size() - at),
                     u64(below(2) ? ~0ull >> below(64) : random()));
        break;
      case 4:
        file[at] = static_cast<char>(file[at] ^ 1 << below(8));
        break;
      default:
        file[at] = kTelling[below(kTelling.size())];
    }
  }
  return file;
}

/// Reads the damaged file, and if that works all that it holds.
template <class Read>
void survive(const std::vector<std::string>& seeds, const std::string& file, int rounds,
             Read read) {
  const BrokenModel model;
  std::mt19937 random(20240607);
  int refused = 0;
  for (int round = 0; round < rounds; ++round) {
    const std::string& seed = seeds[static_cast<std::size_t>(round) % seeds.size()];
    model.write(file, damaged(seed, random));
    const std::string line = error_of([&] { read(model.path); });
    if (line == "no error") continue;
    ++refused;
    INFO("round " << round << ": " << line);
    REQUIRE(line.find('\n') == std::string::npos);
    REQUIRE(line.find(model.path) != std::string::npos);
    REQUIRE(line.size() < 1000);
  }
  CHECK(refused > rounds / 10);  // the damage is felt,
  CHECK(refused < rounds);       // and sometimes survived
}

void touch(const Checkpoint& checkpoint) {
  std::size_t sum = 0;
  for (const auto& [name, tensor] : checkpoint.tensors) {
    for (const char byte : tensor.bytes()) sum += static_cast<unsigned char>(byte);
    if (tensor.dtype <= DType::BF16) sum += values<double>(tensor).size();
  }
  sum += non_finite(checkpoint).size();
  REQUIRE(sum + 1 > 0);  // the sum is used, so the bytes are read
}

}  // namespace

TEST_CASE("random damage: a safetensors file loads or ends in one line") {
  const auto seeds = {read_file(golden("torch_save/zip.safetensors")),
                      read_file(golden("torch_save/module.safetensors"))};
  survive(seeds, "model.safetensors", 3000,
          [](const std::string& folder) { touch(read_checkpoint(folder)); });
}

TEST_CASE("random damage: a PyTorch file loads or ends in one line") {
  std::vector<std::string> seeds;
  for (const char* seed : {"zip", "zip_protocol4", "attributes", "module", "untyped", "nanogpt"})
    seeds.push_back(read_file(golden("torch_save/"s + seed + ".bin")));
  survive(seeds, "pytorch_model.bin", 6000,
          [](const std::string& folder) { touch(read_checkpoint(folder)); });
}

TEST_CASE("random damage: a state loads or ends in one line") {
  const auto seeds = {
      state({"ids", "I32", "[1]", "[40,44]"}, {"layers.0.h", "F32", "[2,2]", "[24,40]"}, u32(8))};
  const BrokenModel model;
  survive(seeds, "state", 2000, [](const std::string& folder) {
    std::vector<Token> ids;
    load_state(folder + "/state", state_config(), ids);
    REQUIRE(!ids.empty());
  });
}

TEST_CASE("random damage: a config loads or ends in one line") {
  const auto seeds = {
      R"({"model_type": "mamba", "hidden_size": 64, "intermediate_size": 128,
          "state_size": 16, "time_step_rank": 5, "use_bias": false, "eos_token_id": [0, 1],
          "expand": 2})"s,
      R"({"model_type": "mamba2", "hidden_size": 64, "num_heads": 8, "head_dim": 16,
          "n_groups": 2, "time_step_limit": [0.0, {"__float__": "Infinity"}],
          "layer_norm_epsilon": 1e-05})"s,
      R"({"d_model": 64, "n_layer": 3, "vocab_size": 523, "ssm_cfg": {"layer": "Mamba2",
          "d_state": 32, "headdim": 16, "ngroups": 2, "dt_limit": [0.0, Infinity]},
          "attn_layer_idx": [], "attn_cfg": {}})"s,
      R"({"d_model": 64, "n_layer": 3, "vocab_size": 523, "d_intermediate": 100, "rms_norm": true,
          "attn_layer_idx": [0, 2], "attn_cfg": {"causal": true, "num_heads": 4, "head_dim": 16,
          "num_heads_kv": 2, "rotary_emb_dim": 8, "d_conv": 4, "qkv_proj_bias": false}})"s};
  survive(seeds, "config.json", 3000, [](const std::string& folder) {
    const Config c = read_config(folder);
    REQUIRE((c.d_model > 0 && c.d_inner > 0 && c.d_state > 0 && c.d_conv > 0 && c.n_layer > 0 &&
             c.vocab_size > 0));
    REQUIRE((c.version == 1 ? c.dt_rank > 0
                            : c.n_heads * c.head_dim == c.d_inner && c.n_heads % c.n_groups == 0 &&
                                  c.chunk > 0));
    const auto& a = c.attention;
    REQUIRE((c.attention_layers.empty() ||
             (a.n_heads % a.n_kv_heads == 0 && a.head_dim > 0 && a.rotary_dim <= a.head_dim)));
  });
}
