// libFuzzer over every reader of strangers' bytes, one at a time (make fuzz):
//
//     READER=weights build/fuzz -max_total_time=600 -timeout=20 -rss_limit_mb=2000 build/weights
//
// READER is one of kReaders below. Seeds are written into the folder first. Whatever the bytes,
// a reader ends in what it reads or in one line of an error.
#include <sys/mman.h>

#include <cstdlib>

#include "../mamba.hpp"

namespace {

using namespace mamba;
using namespace std::string_literals;

void require(bool holds) {
  if (!holds) std::abort();
}

std::string u64(std::uint64_t n) { return {reinterpret_cast<const char*>(&n), sizeof n}; }
std::string u32(std::uint64_t n) { return u64(n).substr(0, 4); }
std::string u16(std::uint64_t n) { return u64(n).substr(0, 2); }

/// The folder that all readers read, in memory.
const std::string kFolder = [] {
  std::string name = "/dev/shm/mamba_fuzz_XXXXXX";
  require(::mkdtemp(name.data()) != nullptr);
  return name;
}();

void put(const std::string& name, std::string_view bytes) {
  std::ofstream(kFolder + "/" + name, std::ios::binary) << bytes;
}

/// Cuts off what stands before the next zero byte.
std::string_view take_part(std::string_view& input) {
  const std::size_t zero = std::min(input.find('\0'), input.size());
  const std::string_view part = input.substr(0, zero);
  input.remove_prefix(std::min(zero + 1, input.size()));
  return part;
}

/// Input that begins with { is a header, a zero byte and data, so that the header's length, which
/// a mutation would break, is always right; any other is the whole file.
std::string safetensors(std::string_view input) {
  if (input.substr(0, 1) != "{") return std::string(input);
  const std::string_view header = take_part(input);
  return u64(header.size()) + std::string(header) + std::string(input);
}

/// Input that begins with a zip's mark is the file; any other is a pickle, put into a zip.
std::string torch_file(std::string_view input) {
  if (input.substr(0, 2) == "PK") return std::string(input);
  std::string file, directory;
  const std::pair<std::string, std::string> entries[] = {{"m/data.pkl", std::string(input)},
                                                         {"m/data/0", std::string(64, '\1')}};
  for (const auto& [name, bytes] : entries) {
    const std::string sizes = u32(0) + u32(bytes.size()) + u32(bytes.size()) + u16(name.size());
    directory +=
        "PK\1\2"s + std::string(12, '\0') + sizes + std::string(12, '\0') + u32(file.size()) + name;
    file += "PK\3\4"s + std::string(10, '\0') + sizes + u16(0) + name + bytes;
  }
  return file + directory + "PK\5\6" + u32(0) + u16(2) + u16(2) + u32(directory.size()) +
         u32(file.size()) + u16(0);
}

/// Opens the model in the folder and takes one token.
void use_model() {
  ModelFolder model;
  model.folder = kFolder;
  model.open();
  model.end_tokens();
  non_finite(model.checkpoint);
  const auto weights = load_model<ssm::Model<float>>(model.checkpoint, model.config);
  const Token token = 0;
  ssm::State<float> state(model.config);
  require(ssm::forward(weights, &token, 1, state).cols() == model.config.vocab_size);
}

/// config.json, generation_config.json and weights.
void read_weights(std::string_view input) {
  put("config.json", take_part(input));
  put("generation_config.json", take_part(input));
  put("model.safetensors", safetensors(input));
  use_model();
}

void read_bin(std::string_view input) {
  put("pytorch_model.bin", torch_file(input));
  for (const auto& [name, tensor] : mamba::read_checkpoint(kFolder).tensors)
    if (tensor.dtype <= DType::BF16) require(values<double>(tensor).size() == tensor.size());
}

void read_state(std::string_view input) {
  const Json json = {{"model_type", "mamba"}, {"hidden_size", 2},       {"expand", 1},
                     {"vocab_size", 9},       {"num_hidden_layers", 1}, {"state_size", 2}};
  const Config config = config_from_json(json, false, "config");
  const std::string path = kFolder + "/state", copy = kFolder + "/copy";
  put("state", safetensors(input));
  std::vector<Token> ids, again;
  const ssm::State<float> state = load_state(path, config, ids);
  save_state(copy, ids, state);
  load_state(copy, config, again);
  require(ids == again);
}

void read_requests(std::string_view input) {
  static ScoreRequests<void> score;
  if (score.requests_file.empty()) {
    score.requests_file = kFolder + "/requests";
    score.config.vocab_size = 4096;
    score.tokenizer();
  }
  put("requests", input);
  const std::vector<Request> requests = score.read_requests();
  summary(std::vector<Likelihood>(requests.size()), questions_of(requests), requests);
}

/// tokenizer.json and a text to encode and decode.
void read_tokenizer(std::string_view input) {
  const Tokenizer tokenizer = Tokenizer::from_text(take_part(input), "file");
  const std::string_view text = input.empty() ? "ab <s>abc \xff\xe2\x9c\x93" : input;
  std::vector<Token> ids = tokenizer.encode_prompt(text);
  tokenizer.decode(ids);
  for (const char c : text) ids.push_back(c);  // ids that may be anything
  for (const bool skip : {false, true}) {
    StreamDecoder decoder(tokenizer, skip);
    std::string streamed, valid;
    for (const Token id : ids) streamed += decoder.push(id);
    streamed += decoder.finish();
    require(streamed == tokenizer.decode(ids, skip));
    bpe::append_bytes(streamed, false, valid);
    require(valid == streamed);
  }
}

// ---- Seeds ----------------------------------------------------------------------------

/// A model as small as can be, in either layout: config.json, generation_config.json, header, data.
std::string small_model(const char* config) {
  const Config c = config_from_json(Json::parse(quote_bare_floats(config)),
                                    !std::strstr(config, "model_type"), "");
  std::string header;
  std::size_t size = 0;
  for_each_shape(c, [&](const std::string& name, const Shape& shape) {
    const Tensor tensor{name, DType::F32, shape, nullptr, nullptr};
    const Json entry = {
        {"dtype", "F32"}, {"shape", shape}, {"data_offsets", {size, size + tensor.byte_size()}}};
    header += (header.empty() ? "{\"" : ",\"") + name + "\":" + entry.dump();
    size += tensor.byte_size();
  });
  return config + "\0{\"eos_token_id\":[0,1]}\0"s + header + "}\0"s + std::string(size, '\1');
}

std::vector<std::string> seeds_of_weights() {
  return {small_model(R"({"model_type":"mamba","hidden_size":2,"expand":1,"vocab_size":3,)"
                      R"("num_hidden_layers":1,"state_size":2,"time_step_rank":1})"),
          small_model(R"({"model_type":"mamba2","hidden_size":2,"expand":1,"vocab_size":3,)"
                      R"("num_hidden_layers":1,"state_size":2,"num_heads":2,"head_dim":1,)"
                      R"("n_groups":1,"time_step_limit":[0.0,Infinity]})"),
          small_model(R"({"d_model":2,"n_layer":1,"vocab_size":3,"ssm_cfg":{"layer":"Mamba1",)"
                      R"("d_state":2,"expand":1,"dt_rank":"auto"},"tie_embeddings":false})")};
}

std::vector<std::string> seeds_of_bin() {
  std::vector<std::string> seeds;
  for (const auto& file : std::filesystem::directory_iterator("tests/golden/torch_save"))
    if (file.path().extension() == ".bin") {
      seeds.push_back(mamba::read_file(file.path()));
      if (seeds.back().substr(0, 2) != "PK") continue;
      TorchFile torch = open_torch_file(file.path());
      seeds.emplace_back(torch.entries[torch.folder + "data.pkl"]);
    }
  return seeds;
}

std::vector<std::string> seeds_of_state() {
  return {R"({"ids":{"dtype":"I32","shape":[2],"data_offsets":[0,8]},)"
          R"("layers.0.conv":{"dtype":"F32","shape":[3,2],"data_offsets":[8,32]},)"
          R"("layers.0.h":{"dtype":"F32","shape":[2,2],"data_offsets":[32,48]}})"
          "\0\1\0\0\0\2\0\0\0"s +
          std::string(40, '\0')};
}

std::vector<std::string> seeds_of_requests() {
  return {
      "{\"context\": \"Once upon a time\", \"continuation\": \" there was\"}\n\n"
      "{\"prompt\": [1, 2], \"answer\": [3], \"doc\": 1, \"label\": 0}\n"
      "{\"context\": \"\", \"continuation\": \"<|endoftext|>caf\u00e9\", \"doc\": [1], \"label\": "
      "0}"};
}

std::vector<std::string> seeds_of_tokenizer() {
  const Json bytes = {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", true}};
  const Json added = {{"id", 4},        {"content", "<s>"}, {"single_word", false},
                      {"lstrip", true}, {"rstrip", false},  {"normalized", false},
                      {"special", true}};
  const Json model = {{"type", "BPE"},
                      {"vocab", {{"a", 0}, {"b", 1}, {"ab", 2}, {"\u0120", 3}}},
                      {"merges", {"a b"}}};
  const Json split = {{"type", "Split"},
                      {"pattern", {{"Regex", "\\s+|\\p{N}{1,3}"}}},
                      {"behavior", "Isolated"},
                      {"invert", false}};
  const Json start = {{"SpecialToken", {{"id", "<s>"}, {"type_id", 0}}}},
             text = {{"Sequence", {{"id", "A"}, {"type_id", 0}}}};
  const Json around = {{"type", "TemplateProcessing"},
                       {"single", {start, text}},
                       {"special_tokens", {{"<s>", {{"id", "<s>"}, {"ids", {4}}}}}}};
  const Json one = {{"model", model},
                    {"normalizer", {{"type", "NFC"}}},
                    {"pre_tokenizer", bytes},
                    {"decoder", bytes},
                    {"added_tokens", {added}}};
  const Json space = {{"type", "Replace"}, {"pattern", {{"String", " "}}}, {"content", "\u2581"}};
  const Json strip = {{"type", "Strip"}, {"content", " "}, {"start", 1}, {"stop", 0}};
  Json two = one;
  two["normalizer"] = {{"type", "Sequence"},
                       {"normalizers", {{{"type", "Prepend"}, {"prepend", "\u2581"}}, space}}};
  two["pre_tokenizer"] = {{"type", "Sequence"},
                          {"pretokenizers",
                           {split,
                            {{"type", "Digits"}, {"individual_digits", true}},
                            {{"type", "Metaspace"}, {"replacement", "\u2581"}}}}};
  two["decoder"] = {{"type", "Sequence"},
                    {"decoders", {space, {{"type", "ByteFallback"}}, {{"type", "Fuse"}}, strip}}};
  two["post_processor"] = around;
  return {one.dump() + "\0ab <s>abc e\u0301 12"s, two.dump() + "\0ab <s>abc"s};
}

// ---- libFuzzer ------------------------------------------------------------------------

struct Reader {
  const char* name;
  void (*read)(std::string_view input);
  std::vector<std::string> (*seeds)();
};
constexpr Reader kReaders[] = {{"weights", read_weights, seeds_of_weights},
                               {"bin", read_bin, seeds_of_bin},
                               {"tokenizer", read_tokenizer, seeds_of_tokenizer},
                               {"state", read_state, seeds_of_state},
                               {"requests", read_requests, seeds_of_requests}};

const Reader* reader = nullptr;

}  // namespace

extern "C" int LLVMFuzzerInitialize(int* argc, char*** argv) {
  const char* name = std::getenv("READER");
  for (const Reader& each : kReaders)
    if (name && each.name == std::string(name)) reader = &each;
  require(reader != nullptr);
  std::cerr.setstate(std::ios::failbit);  // warnings
  const std::filesystem::path last = (*argv)[*argc - 1];
  if (!std::filesystem::is_directory(last)) return 0;  // a finding to be run again
  int n = 0;
  for (const std::string& seed : reader->seeds())
    std::ofstream(last / ("seed" + std::to_string(++n)), std::ios::binary) << seed;
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  try {
    reader->read({reinterpret_cast<const char*>(data), size});
  } catch (const std::runtime_error& error) {
    const std::string line = error.what();
    require(std::none_of(line.begin(), line.end(), [](char c) { return c >= 0 && c < 32; }));
  }
  return 0;
}
