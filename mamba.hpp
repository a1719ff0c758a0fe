// mamba.hpp - the small loader and generator that mamba.cpp and mamba.cu share.
//
//   1. Errors and files     one line per error; files mapped in, written beside and renamed
//   2. Config               config.json of both published layouts
//   3. Checkpoints          safetensors, pytorch_model.bin; F32, F16, BF16
//   4. Weights              the one table {name, shape, destination} that loads a model
//   5. Sampler              greedy, temperature, top-k, top-p, min-p, repetition penalty
//   6. Sequences            walking a text in pieces; saving and loading the state; generation
//   7. Evaluation           logits to a file, perplexity, the pass-key task, LAMBADA
//   8. Pictures             line charts and heat maps as PNG
//   9. Inspection           what one layer's scan does with a text
//  10. Command line
//
// What a program brings is an Engine, a class with
//   Engine(const Checkpoint&, const Config&, const EngineOptions&)
//   config()                      the Config
//   State, new_state()            what is remembered of one text; before the first token (zeros)
//   to_host(state), from_host(s)  the same as ssm::State<float>, for files
//   prefill(state, ids, L)        takes L tokens at once, returns the logits after the last
//   forward(state, ids, L, sink)  the same; calls sink(first, logits) for all positions, in order
//   step(state, id)               takes one token by the step functions, returns its logits
//   generate(...)                 section 6; generate_on_host does for a program without its own
//   bench(BenchOptions)           its own measurements
//   kPiece, kBatch                tokens that prefill and forward, sequences that generate is given at most
//   kName, kDescription, kBenchOps, kHasDevice    for the command line
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <functional>
#include <iomanip>
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

#include "checkpoint.hpp"
#include "ssm_reference.hpp"
#include "tokenizer.hpp"

#pragma GCC diagnostic push  // stb's headers do not mind the warnings that we do
#pragma GCC diagnostic ignored "-Wunused-function"
#pragma GCC diagnostic ignored "-Wmissing-field-initializers"
#define STB_IMAGE_WRITE_STATIC
#define STB_IMAGE_WRITE_IMPLEMENTATION
#include <stb/stb_easy_font.h>
#include <stb/stb_image_write.h>
#pragma GCC diagnostic pop

namespace mamba {

using ssm::Index;
using ssm::Matrix;

// =======================================================================================
// 2. Config
// =======================================================================================
//
// The sizes of a model, from config.json as published: in the Hugging Face layout
// ("model_type": "mamba" or "mamba2", names and defaults of transformers' MambaConfig and
// Mamba2Config) or in that of the original package ("d_model", "ssm_cfg", defaults of
// mamba_ssm). What this project does not compute is refused by name.

struct Config : ssm::Sizes {
  Index chunk = 0;             // Mamba-2: tokens that one chunk of SSD covers, as trained
  bool tie_embeddings = true;  // the head is the embedding, transposed
  bool use_bias = false;       // in in_proj and out_proj
  bool use_conv_bias = true;
  bool residual_in_fp32 = true;  // what the file says; the stream is float32 here
  Token bos_token_id = 0;        // -1: none
  Token eos_token_id = 0;        // -1: none
};

// No size may exceed its limit, so that products of sizes stay far below 2^63.
constexpr std::int64_t kMaxWidth = 1 << 20, kMaxLayers = 1 << 16, kMaxVocab = 1 << 28;

/// Python writes Infinity, -Infinity and NaN where JSON has no word for them: outside of
/// strings, put them in quotes.
inline std::string quote_bare_floats(std::string_view text) {
  std::string json;
  for (std::size_t i = 0; i < text.size();) {
    std::size_t n = 1;  // length of the token at i
    bool bare = false;
    if (text[i] == '"') {
      while (i + n < text.size() && text[i + n] != '"') n += text[i + n] == '\\' ? 2 : 1;
      ++n;
    } else {
      for (const std::string_view word : {"-Infinity", "Infinity", "NaN"})
        if (!bare && text.substr(i, word.size()) == word) n = word.size(), bare = true;
    }
    json += bare ? '"' + std::string(text.substr(i, n)) + '"' : text.substr(i, n);
    i += n;
  }
  return json;
}

/// The fields of one JSON object, checked; a field that is absent or null has its default.
struct Fields {
  const Json& object;
  std::string where;

  const Json* find(const char* key) const {
    const auto field = object.find(key);
    return field == object.end() || field->is_null() ? nullptr : &*field;
  }
  [[noreturn]] void wrong(const char* key, const std::string& expected) const {
    const Json found = object.contains(key) ? object[key] : Json();
    fail("bad config: ", where, ": ", key, ": expected ", expected, ", found ",
         quote(found.dump(-1, ' ', true, Json::error_handler_t::replace)));
  }
  std::int64_t integer(const char* key, std::int64_t absent, std::int64_t low,
                       std::int64_t high) const {
    const Json* value = find(key);
    if (value == nullptr) return absent;
    const bool huge = value->is_number_unsigned() && value->get<std::uint64_t>() >> 63 != 0;
    if (!value->is_number_integer() || huge || *value < low || *value > high)
      wrong(key, "an integer from " + std::to_string(low) + " to " + std::to_string(high));
    return value->get<std::int64_t>();
  }
  bool flag(const char* key, bool absent) const {
    const Json* value = find(key);
    if (value != nullptr && !value->is_boolean()) wrong(key, "true or false");
    return value == nullptr ? absent : value->get<bool>();
  }
  /// Fails where the flag is there and not what this project computes.
  void only(const char* key, bool computed) const {
    if (flag(key, computed) != computed) wrong(key, computed ? "true" : "false");
  }
  std::string text(const char* key, const char* absent) const {
    const Json* value = find(key);
    if (value != nullptr && !value->is_string()) wrong(key, "a string");
    return value == nullptr ? absent : value->get<std::string>();
  }
  /// A number, where Infinity may be a word or {"__float__": "Infinity"}.
  double number(const char* key, const Json& value) const {
    const Json& plain = value.contains("__float__") ? value["__float__"] : value;
    if (plain == "Infinity") return std::numeric_limits<double>::infinity();
    if (!plain.is_number()) wrong(key, "a number");
    return plain.get<double>();
  }
  double number(const char* key, double absent) const {
    const Json* value = find(key);
    return value == nullptr ? absent : number(key, *value);
  }
  /// A token id, of a list of ids the first; -1 is none.
  Token token(const char* key, Token absent) const {
    const Json* value = find(key);
    if (value == nullptr) return object.contains(key) ? -1 : absent;
    const Json one = {{key, value->is_array() && !value->empty() ? value->front() : *value}};
    return static_cast<Token>(Fields{one, where}.integer(key, -1, -1, kMaxVocab));
  }
};

/// The config in either layout: names are (Hugging Face, original). In the original, what
/// belongs to one block is in ssm_cfg.
inline Config config_from_json(const Json& json, bool original, const std::string& path) {
  const Fields fields{json, path};
  const Json none = Json::object();
  const Json* ssm_cfg = fields.find("ssm_cfg");
  if (ssm_cfg != nullptr && !ssm_cfg->is_object()) fields.wrong("ssm_cfg", "an object");
  const Fields block = original ? Fields{ssm_cfg == nullptr ? none : *ssm_cfg, path} : fields;
  const auto name = [&](const char* hugging_face, const char* ours) {
    return original ? ours : hugging_face;
  };
  const std::string type = original ? block.text("layer", "Mamba1") : fields.text("model_type", "");
  const bool two = type == name("mamba2", "Mamba2");
  if (!two && type != name("mamba", "Mamba1"))
    block.wrong(name("model_type", "layer"), name("mamba or mamba2", "Mamba1 or Mamba2"));
  const auto by_layout = [&](std::int64_t mamba, std::int64_t mamba2, std::int64_t both) {
    return original ? both : two ? mamba2 : mamba;
  };
  const auto size = [&](const char* key, std::int64_t absent) {
    return block.integer(key, absent, 1, kMaxWidth);
  };

  Config c;
  c.version = two ? 2 : 1;
  c.d_model =
      fields.integer(name("hidden_size", "d_model"), by_layout(768, 4096, 2560), 1, kMaxWidth);
  c.n_layer =
      fields.integer(name("num_hidden_layers", "n_layer"), by_layout(32, 64, 64), 1, kMaxLayers);
  c.vocab_size = fields.integer("vocab_size", by_layout(50280, 32768, 50277), 1, kMaxVocab);
  c.tie_embeddings = fields.flag(name("tie_word_embeddings", "tie_embeddings"), original || !two);
  c.residual_in_fp32 = fields.flag("residual_in_fp32", true);
  c.bos_token_id = fields.token("bos_token_id", 0);
  c.eos_token_id = fields.token("eos_token_id", static_cast<Token>(by_layout(0, 2, 0)));
  c.norm_eps = original ? c.norm_eps : fields.number("layer_norm_epsilon", c.norm_eps);
  c.d_state = size(name("state_size", "d_state"), two ? 128 : 16);
  c.d_conv = size(name("conv_kernel", "d_conv"), 4);
  c.use_bias = block.flag(name("use_bias", "bias"), false);
  c.use_conv_bias = block.flag(name("use_conv_bias", "conv_bias"), true);
  const double d_inner = std::floor(block.number("expand", 2) * static_cast<double>(c.d_model));
  if (!(d_inner >= 1 && d_inner <= kMaxWidth))
    block.wrong("expand", "a factor that makes 1 to " + std::to_string(kMaxWidth) + " channels");
  c.d_inner = static_cast<std::int64_t>(d_inner);
  if (two) {
    c.head_dim = size(name("head_dim", "headdim"), 64);
    c.n_heads = original ? c.d_inner / c.head_dim : size("num_heads", 128);
    c.n_groups = size(name("n_groups", "ngroups"), by_layout(0, 8, 1));
    c.chunk = size("chunk_size", 256);
    const char* limit = name("time_step_limit", "dt_limit");
    if (const Json* pair = block.find(limit)) {
      if (!pair->is_array() || pair->size() != 2) block.wrong(limit, "two numbers");
      c.dt_min = block.number(limit, (*pair)[0]);
      c.dt_max = block.number(limit, (*pair)[1]);
      if (!(0 <= c.dt_min && c.dt_min <= c.dt_max)) block.wrong(limit, "0 <= low <= high");
    }
  } else {
    const char* rank = name("time_step_rank", "dt_rank");
    const bool automatic = block.find(rank) == nullptr || *block.find(rank) == "auto";
    c.dt_rank = automatic ? (c.d_model + 15) / 16 : size(rank, 0);  // ceil(D / 16)
    if (!original) c.d_inner = size("intermediate_size", c.d_inner);
  }

  // What else a model of these layouts may be, and is not here.
  fields.only("rms_norm", true);
  if (original) {                 // in the Hugging Face layout norm_before_gate means nothing:
                                  // transformers
    block.only("rmsnorm", true);  // ignores it, and Mamba-Codestral-7B has it wrong
    block.only("norm_before_gate", false);
    block.only("D_has_hdim", false);
    block.integer("d_ssm", c.d_inner, c.d_inner, c.d_inner);
    fields.integer("d_intermediate", 0, 0, 0);
    const Json* attention = fields.find("attn_layer_idx");
    if (attention != nullptr && !attention->empty()) fields.wrong("attn_layer_idx", "[]");
  } else if (const std::string act = fields.text("hidden_act", "silu");
             act != "silu" && act != "swish") {
    fields.wrong("hidden_act", "silu");
  }
  return c;
}

/// Reads DIR/config.json in either layout.
inline Config read_config(const std::string& directory) {
  const std::string path = directory + "/config.json";
  const bool there = ::access(path.c_str(), F_OK) == 0;
  if (const std::string what = there ? "" : what_folder_is(directory); !what.empty())
    fail("no model: ", directory, ": found ", what);
  const MappedFile file(path);
  const Json json = parse_json(quote_bare_floats(file.bytes()), path);
  if (!json.is_object()) fail("bad config: ", path, ": expected an object");
  const bool original = json.contains("d_model") && !json.contains("hidden_size");
  if (!original && !json.contains("model_type"))
    fail("bad config: ", path, ": expected model_type (Hugging Face) or d_model (original), ",
         "found neither");
  const Config c = config_from_json(json, original, path);
  if (!(c.norm_eps > 0 && c.norm_eps < 1))
    fail("bad config: ", path, ": layer_norm_epsilon: expected a number between 0 and 1, ",
         "found ", c.norm_eps);
  if (c.version == 2 && c.d_inner != c.n_heads * c.head_dim)
    fail("bad config: ", path, ": expected heads * head_dim = d_inner = ", c.d_inner, ", found ",
         c.n_heads, " * ", c.head_dim);
  if (c.version == 2 && c.n_heads % c.n_groups != 0)
    fail("bad config: ", path, ": groups: expected a divisor of the ", c.n_heads, " heads, found ",
         c.n_groups);
  return c;
}

/// Writes DIR/config.json in the Hugging Face layout.
inline void write_config(const std::string& directory, const Config& c) {
  const bool two = c.version == 2;
  nlohmann::ordered_json json = {
      {"architectures", {two ? "Mamba2ForCausalLM" : "MambaForCausalLM"}},
      {"model_type", two ? "mamba2" : "mamba"},
      {"vocab_size", c.vocab_size},
      {"hidden_size", c.d_model},
      {"num_hidden_layers", c.n_layer},
      {"state_size", c.d_state},
      {"conv_kernel", c.d_conv},
      {"layer_norm_epsilon", c.norm_eps},
      {"hidden_act", "silu"},
      {"use_bias", c.use_bias},
      {"use_conv_bias", c.use_conv_bias},
      {"residual_in_fp32", c.residual_in_fp32},
      {"tie_word_embeddings", c.tie_embeddings}};
  if (c.d_inner % c.d_model != 0)
    fail("cannot write: ", directory,
         "/config.json: expand: this layout knows whole numbers only, found ", c.d_inner, " / ",
         c.d_model);
  json["expand"] = c.d_inner / c.d_model;
  if (two) {
    json["num_heads"] = c.n_heads;
    json["head_dim"] = c.head_dim;
    json["n_groups"] = c.n_groups;
    json["chunk_size"] = c.chunk;
    if (c.dt_min > 0 || std::isfinite(c.dt_max)) {
      json["time_step_limit"] = {c.dt_min, c.dt_max};
      if (std::isinf(c.dt_max)) json["time_step_limit"][1] = {{"__float__", "Infinity"}};
    }
  } else {
    json["intermediate_size"] = c.d_inner;
    json["time_step_rank"] = c.dt_rank;
  }
  for (const auto& [key, id] :
       {std::pair("bos_token_id", c.bos_token_id), std::pair("eos_token_id", c.eos_token_id),
        std::pair("pad_token_id", c.eos_token_id)})
    json[key] = id < 0 ? nlohmann::ordered_json() : nlohmann::ordered_json(id);
  AtomicFile file(directory + "/config.json");
  file.write(json.dump(2) + "\n");
  file.commit();
}

// =======================================================================================
// 4. Weights
// =======================================================================================

/// Calls visit(name, shape, destination) for every weight of the model, by its Hugging Face name.
/// The original layout differs in one name only (original_name). Model: ssm::Model or anything
/// with the same members.
template <class Model, class Visit>
void for_each_weight(const Config& c, Model& model, const Visit& visit) {
  using Shape = std::vector<std::int64_t>;
  visit("backbone.embeddings.weight", Shape{c.vocab_size, c.d_model}, model.embedding);
  for (Index l = 0; l < c.n_layer; ++l) {
    auto& w = model.layers[static_cast<std::size_t>(l)];
    const std::string layer = "backbone.layers." + std::to_string(l) + ".",
                      mixer = layer + "mixer.";
    visit(layer + "norm.weight", Shape{c.d_model}, w.norm);
    visit(mixer + "in_proj.weight", Shape{c.in_proj_width(), c.d_model}, w.in_proj);
    if (c.use_bias) visit(mixer + "in_proj.bias", Shape{c.in_proj_width()}, w.in_proj_bias);
    visit(mixer + "conv1d.weight", Shape{c.conv_width(), 1, c.d_conv}, w.conv_weight);
    if (c.use_conv_bias) visit(mixer + "conv1d.bias", Shape{c.conv_width()}, w.conv_bias);
    if (c.version == 1) {
      visit(mixer + "x_proj.weight", Shape{c.dt_rank + 2 * c.d_state, c.d_inner}, w.x_proj);
      visit(mixer + "dt_proj.weight", Shape{c.d_inner, c.dt_rank}, w.dt_proj);
      visit(mixer + "dt_proj.bias", Shape{c.d_inner}, w.dt_bias);
      visit(mixer + "A_log", Shape{c.d_inner, c.d_state}, w.A);
      visit(mixer + "D", Shape{c.d_inner}, w.D);
    } else {
      visit(mixer + "dt_bias", Shape{c.n_heads}, w.dt_bias);
      visit(mixer + "A_log", Shape{c.n_heads}, w.A);
      visit(mixer + "D", Shape{c.n_heads}, w.D);
      visit(mixer + "norm.weight", Shape{c.d_inner}, w.gated_norm);
    }
    visit(mixer + "out_proj.weight", Shape{c.d_model, c.d_inner}, w.out_proj);
    if (c.use_bias) visit(mixer + "out_proj.bias", Shape{c.d_model}, w.out_proj_bias);
  }
  visit("backbone.norm_f.weight", Shape{c.d_model}, model.norm_f);
  if (!model.tied) visit("lm_head.weight", Shape{c.vocab_size, c.d_model}, model.lm_head);
}

/// The same list without a model: visit(name, shape).
template <class Visit>
void for_each_shape(const Config& config, const Visit& visit) {
  struct None {};
  struct Layer {
    None norm, in_proj, in_proj_bias, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D,
        gated_norm, out_proj, out_proj_bias;
  };
  struct {
    None embedding, norm_f, lm_head;
    std::vector<Layer> layers;
    bool tied = true;
  } no_model;
  no_model.layers.resize(static_cast<std::size_t>(config.n_layer));
  no_model.tied = config.tie_embeddings;
  for_each_weight(config, no_model, [&](const std::string& name, const auto& shape, const None&) {
    visit(name, shape);
  });
}

inline std::string original_name(const std::string& name) {
  return name == "backbone.embeddings.weight" ? "backbone.embedding.weight" : name;
}

/// The tensor of this name in either layout, saved with the head or by the backbone alone. Where
/// the two are tied, the head stands for an embedding that is not there.
inline const Tensor& find_weight(const Checkpoint& checkpoint, const std::string& name, bool tied) {
  const std::string_view backbone = "backbone.";
  for (const std::string& known : {original_name(name), name}) {
    if (const Tensor* tensor = checkpoint.find(known)) return *tensor;
    if (known.rfind(backbone, 0) != 0) continue;
    if (const Tensor* tensor = checkpoint.find(known.substr(backbone.size()))) return *tensor;
  }
  const bool embedding = name == "backbone.embeddings.weight";
  const Tensor* head = tied && embedding ? checkpoint.find("lm_head.weight") : nullptr;
  return head != nullptr ? *head : checkpoint.at(name);
}

/// The same, its shape checked. A vocabulary may be padded: more rows than vocab_size.
inline const Tensor& weight(const Checkpoint& checkpoint, const std::string& name,
                            const std::vector<std::int64_t>& shape, bool tied = false) {
  const Tensor& tensor = find_weight(checkpoint, name, tied);
  const bool by_token = name == "backbone.embeddings.weight" || name == "lm_head.weight";
  std::vector<std::int64_t> needed = tensor.shape;
  if (by_token && !needed.empty() && needed[0] > shape[0]) needed[0] = shape[0];
  if (needed != shape)
    fail("wrong shape: ", checkpoint.where, ": ", quote(tensor.name), ": expected ",
         shape_text(shape), by_token ? " or more rows" : "", ", found ", shape_text(tensor.shape));
  return tensor;
}

// How a tensor becomes a member of ssm::Model. A program with its own matrix type adds its own.
// storage is what --dtype asks for; it concerns matrices that are kept as stored only.
template <class Scalar>
void assign(const Tensor& tensor, std::optional<DType>, ssm::Row<Scalar>& row) {
  row.resize(static_cast<Index>(tensor.size()));
  convert(tensor, row.data());
}

template <class Scalar>
void assign(const Tensor& tensor, std::optional<DType>, Matrix<Scalar>& matrix) {
  const Index rows = tensor.shape[0];
  matrix.resize(rows, static_cast<Index>(tensor.size()) / rows);
  convert(tensor, matrix.data());
}

/// The one place where A = -exp(A_log) is made: A_log may be any number, A is always negative.
template <class Scalar>
void assign(const Tensor& A_log, std::optional<DType>, ssm::StateMatrix<Scalar>& A) {
  Matrix<Scalar> log;
  assign(A_log, {}, log);
  A = -log.array().exp();
}

/// Fails if weights and state would be out of all proportion to the file: in a pickle, many tensors
/// may be one storage, and the state grows with products of sizes that weights have the sums of.
inline void check_size(const Checkpoint& checkpoint, const Config& c) {
  const auto product = [](std::initializer_list<Index> sizes) {
    return std::accumulate(sizes.begin(), sizes.end(), 4.0,  // bytes of a float
                           [](double n, Index size) { return n * static_cast<double>(size); });
  };
  double bytes = product({c.n_layer, c.d_inner, c.d_state}) +
                 product({c.n_layer, c.conv_width(), c.d_conv - 1});
  for_each_shape(c, [&](const std::string&, const std::vector<std::int64_t>& shape) {
    bytes += std::accumulate(shape.begin(), shape.end(), 4.0, std::multiplies<double>());
  });
  const double most = std::max(64 * static_cast<double>(checkpoint.file_size), 0x1p26);
  if (checkpoint.file_size > 0 && bytes > most)
    fail("too large: ", checkpoint.where, ": config.json asks for ", bytes / 0x1p20,
         " MiB of weights and state, expected at most ", most / 0x1p20, " for a file of this size");
}

/// Model: ssm::Model<Scalar, Weight>. storage: dtype in which matrices are kept; as in the file
/// if not given. Warnings go to stderr.
template <class Model>
Model load_model(const Checkpoint& checkpoint, const Config& config,
                 std::optional<DType> storage = {}) {
  check_size(checkpoint, config);
  Model model;
  model.sizes = config;
  model.layers.resize(static_cast<std::size_t>(config.n_layer));
  const std::vector<std::int64_t> by_token = {config.vocab_size, config.d_model};
  model.tied = config.tie_embeddings;
  if (model.tied && checkpoint.find("lm_head.weight")) {
    model.tied = same_values(weight(checkpoint, "lm_head.weight", by_token),
                             weight(checkpoint, "backbone.embeddings.weight", by_token, true));
    if (!model.tied)
      warn(checkpoint.where +
           ": lm_head.weight differs from the embedding that config.json ties"
           " it to: used as it is");
  }
  std::set<const Tensor*> used = {checkpoint.find("lm_head.weight")};
  for_each_weight(config, model, [&](const std::string& name, const auto& shape, auto& to) {
    const Tensor& tensor = weight(checkpoint, name, shape, config.tie_embeddings);
    assign(tensor, storage, to);
    used.insert(&tensor);
  });
  std::vector<std::string> ignored;
  for (const auto& [name, tensor] : checkpoint.tensors)
    if (!used.count(&tensor))
      ignored.push_back(checkpoint.where + ": " + quote(tensor.name) +
                        " is not a weight of this model: ignored");
  warn(ignored);
  warn(non_finite(checkpoint));
  return model;
}

/// Sizes of the published models, by the names they are known by.
inline Config published_config(const std::string& name) {
  struct Known {
    const char* name;
    int version;
    Index d_model, n_layer;
  };
  static constexpr Known kKnown[] = {{"130m", 1, 768, 24},         {"370m", 1, 1024, 48},
                                     {"790m", 1, 1536, 48},        {"1.4b", 1, 2048, 48},
                                     {"2.8b", 1, 2560, 64},        {"mamba2-130m", 2, 768, 24},
                                     {"mamba2-370m", 2, 1024, 48}, {"mamba2-780m", 2, 1536, 48},
                                     {"mamba2-1.3b", 2, 2048, 48}, {"mamba2-2.7b", 2, 2560, 64}};
  std::string names;
  for (const Known& known : kKnown) {
    names += std::string(names.empty() ? "" : ", ") + known.name;
    if (name != known.name) continue;
    Config c;
    c.version = known.version;
    c.d_model = known.d_model;
    c.n_layer = known.n_layer;
    c.d_inner = 2 * c.d_model;
    c.d_state = c.version == 1 ? 16 : 128;
    c.d_conv = 4;
    c.vocab_size = 50280;
    c.dt_rank = c.version == 1 ? (c.d_model + 15) / 16 : 0;
    c.head_dim = 64;
    c.n_heads = c.version == 1 ? 0 : c.d_inner / c.head_dim;
    return c;
  }
  fail_usage("--shape: expected one of ", names, ", found ", quote(name));
}

/// A checkpoint of random weights, spread as at the start of training so that nothing overflows.
inline Checkpoint random_checkpoint(const Config& config, DType dtype, std::uint64_t seed = 1) {
  Checkpoint checkpoint;
  checkpoint.where = "random weights";
  const auto ends_with = [](const std::string& s, std::string_view end) {
    return s.size() >= end.size() && s.compare(s.size() - end.size(), end.size(), end) == 0;
  };
  for_each_shape(config, [&](const std::string& name, const std::vector<std::int64_t>& shape) {
    Tensor plan{name, DType::F32, shape, nullptr, nullptr};
    const auto values = std::make_shared<std::vector<float>>(plan.size());
    const bool matrix = shape.size() > 1;
    const double fan_in = static_cast<double>(shape.size() == 3 ? shape[2] : shape.back());
    for (std::size_t i = 0; i < values->size(); ++i) {
      seed = seed * 6364136223846793005u + 1442695040888963407u;   // Knuth's linear congruence
      const double u = static_cast<double>(seed >> 40) * 0x1p-24;  // in [0, 1)
      double value = 1;
      if (ends_with(name, "A_log"))
        value = std::log(1 + static_cast<double>(i % 16));
      else if (ends_with(name, "dt_proj.bias") || ends_with(name, "dt_bias"))
        value = std::log(std::expm1(std::exp(std::log(1e-3) + u * std::log(100.0))));
      else if (matrix)
        value = (2 * u - 1) * std::sqrt(3 / fan_in);
      else if (ends_with(name, "bias"))
        value = 0;
      (*values)[i] = static_cast<float>(value);
    }
    plan.data = values->data();
    plan.keep_alive = values;
    checkpoint.tensors[name] = dtype == DType::F32 ? plan : to_dtype(plan, dtype);
  });
  return checkpoint;
}

// =======================================================================================
// 5. Sampler
// =======================================================================================
// needs: <algorithm> <array> <cmath> <cstdint> <functional> <limits> <numeric> <utility>
//        <vector> <Eigen/Core>, fail, Token

// From logits to the next token, by the rules and in the order of transformers'
// generation/logits_process.py, in double:
//
//   repetition penalty  s / r where s > 0 and s * r where s < 0, for the ids in the history
//                       (prompt and continuation), once each
//   temperature         s / temperature; 0 is greedy: the largest, of equals the lowest id
//   top-k               drops s < the k-th largest; all that equal the k-th stay
//   top-p               ascending, drops while the cumulative probability is <= 1 - top_p;
//                       of equals the lower id goes first; the last one always stays
//   min-p               drops p < min_p * the largest p
//
// Each filter sees the distribution that the one before it left, renormalized.
struct SamplerOptions {
  float temperature = 0.8f;
  int top_k = 0;  // 0: off
  float top_p = 0.95f;
  float min_p = 0;
  float repetition_penalty = 1;
  std::uint64_t seed = 1;
};

// Fails on an option outside its range; NaN is outside every range.
inline void check(const SamplerOptions& options) {
  const auto need = [](bool ok, const char* name, const char* range, auto found) {
    if (!ok) fail_usage("--", name, ": expected ", range, ", found ", found);
  };
  const auto& [temperature, top_k, top_p, min_p, penalty, seed] = options;
  need(temperature >= 0 && std::isfinite(temperature), "temperature", "a finite number >= 0",
       temperature);
  need(top_k >= 0, "top-k", "0 (off) or more", top_k);
  need(top_p > 0 && top_p <= 1, "top-p", "a number in (0, 1]", top_p);
  need(min_p >= 0 && min_p <= 1, "min-p", "a number in [0, 1]", min_p);
  need(penalty > 0 && std::isfinite(penalty), "repetition-penalty", "a finite number > 0", penalty);
}

// Philox4x32-10 (Salmon et al., SC 2011): ten rounds of multiply and xor scramble a 128-bit
// counter under a 64-bit key. No state: any draw can be made anywhere, in any order.
inline std::array<std::uint32_t, 4> philox4x32(std::array<std::uint32_t, 4> c,
                                               std::array<std::uint32_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = 0xD2511F53ull * c[0], p1 = 0xCD9E8D57ull * c[2];
    c = {static_cast<std::uint32_t>(p1 >> 32) ^ c[1] ^ key[0], static_cast<std::uint32_t>(p1),
         static_cast<std::uint32_t>(p0 >> 32) ^ c[3] ^ key[1], static_cast<std::uint32_t>(p0)};
    key = {key[0] + 0x9E3779B9u, key[1] + 0xBB67AE85u};  // golden ratio, sqrt(3) - 1
  }
  return c;
}

// The uniform number in [0, 1) for one token of one sequence: 53 bits of the Philox block
// whose key is the seed and whose counter is (position, sequence), low words first.
inline double uniform(std::uint64_t seed, std::uint64_t sequence, std::uint64_t position) {
  const auto low = [](std::uint64_t v) { return static_cast<std::uint32_t>(v); };
  const auto high = [](std::uint64_t v) { return static_cast<std::uint32_t>(v >> 32); };
  const auto word = philox4x32({low(position), high(position), low(sequence), high(sequence)},
                               {low(seed), high(seed)});
  return static_cast<double>((std::uint64_t{word[1]} << 32 | word[0]) >> 11) * 0x1p-53;
}

// Scores below the k-th largest become -inf.
inline void keep_top_k(std::vector<double>& scores, std::size_t k) {
  if (k >= scores.size()) return;
  std::vector<double> largest(k);
  std::partial_sort_copy(scores.begin(), scores.end(), largest.begin(), largest.end(),
                         std::greater<>());
  for (double& s : scores)
    if (s < largest.back()) s = -std::numeric_limits<double>::infinity();
}

// Zeroes the weights of the least scores, as many as together make no more than 1 - top_p
// of the total. No full sort: a weight < (1 - top_p) * total / size goes whatever the
// order, and the last that stays is found by bisection over ever smaller partial orders,
// O(size) in all.
inline void keep_top_p(const std::vector<double>& scores, std::vector<double>& weights,
                       double top_p) {
  const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
  const double certain = (1 - top_p) * total / static_cast<double>(weights.size());
  using Entry = std::pair<double, std::size_t>;  // (score, id): by score, of equals by id
  std::vector<Entry> entries;
  for (std::size_t id = 0; id < weights.size(); ++id)
    if (weights[id] >= certain) entries.emplace_back(scores[id], id);

  // Descending, an entry stays when the weights before it make less than top_p of the
  // total. Before `first` lie entries that stay and weigh `above`; from `last` on, those
  // that go.
  auto first = entries.begin(), last = entries.end();
  for (double above = 0; last - first > 1;) {
    const auto middle = first + (last - first) / 2;
    std::nth_element(first, middle, last, std::greater<Entry>());
    double upto = above;
    for (auto entry = first; entry != middle; ++entry) upto += weights[entry->second];
    if (upto < top_p * total) {
      first = middle;
      above = upto;
    } else {
      last = middle;
    }
  }
  const Entry least = *first;
  for (std::size_t id = 0; id < weights.size(); ++id)
    if (Entry(scores[id], id) < least) weights[id] = 0;
}

// The distribution (vocab_size) of the next token: exactly zero where filtered out.
inline std::vector<double> filtered_probabilities(const float* logits, std::size_t vocab_size,
                                                  const std::vector<Token>& history,
                                                  const SamplerOptions& options) {
  check(options);
  std::vector<double> scores(logits, logits + vocab_size);
  if (options.repetition_penalty != 1) {
    for (Token id : history) {
      if (id < 0 || static_cast<std::size_t>(id) >= vocab_size)
        fail("sampler: history: expected ids in [0, ", vocab_size, "), found ", id);
      const double s = logits[id], r = options.repetition_penalty;
      scores[static_cast<std::size_t>(id)] = s < 0 ? s * r : s / r;
    }
  }
  std::size_t best = 0;
  for (std::size_t id = 0; id < vocab_size; ++id) {
    if (!(scores[id] < std::numeric_limits<double>::infinity()))
      fail("sampler: logit of token ", id, ": expected a number, found ", scores[id]);
    if (scores[id] > scores[best]) best = id;
  }
  if (vocab_size == 0 || scores[best] == -std::numeric_limits<double>::infinity())
    fail("sampler: logits: expected one above -inf, found none in ", vocab_size);

  std::vector<double> p(vocab_size);
  if (options.temperature == 0) {
    p[best] = 1;
    return p;
  }
  if (options.top_k > 0) keep_top_k(scores, static_cast<std::size_t>(options.top_k));
  // The largest weight is e^0; e^-700 stands for zero: Eigen's fast exp has no e^-inf.
  const auto size = static_cast<Eigen::Index>(vocab_size);
  Eigen::Map<const Eigen::ArrayXd> s(scores.data(), size);
  Eigen::Map<Eigen::ArrayXd> weights(p.data(), size);
  weights = ((s - scores[best]) / options.temperature).max(-700).exp();
  if (options.top_p < 1) keep_top_p(scores, p, options.top_p);
  const double least = std::max<double>(options.min_p, 1e-300);
  double total = 0;
  for (double& w : p) {
    if (w < least) w = 0;
    if (w > 0) total += w;
  }
  weights /= total;
  return p;
}

// Draws the token at `position` of sequence number `sequence`: the first id at which the
// sum of probabilities, added in order of ids, exceeds the uniform number. Another order or
// another exp moves a sum by some 1e-15: another device draws the same token, but for about
// one draw in 1e12.
inline Token sample(const float* logits, std::size_t vocab_size, const std::vector<Token>& history,
                    const SamplerOptions& options, std::uint64_t sequence, std::uint64_t position) {
  const std::vector<double> p = filtered_probabilities(logits, vocab_size, history, options);
  const double u = uniform(options.seed, sequence, position);
  double sum = 0;
  std::size_t drawn = 0;  // the last id with p > 0, should rounding leave the sum below u
  for (std::size_t id = 0; id < p.size() && sum <= u; ++id) {
    if (p[id] == 0) continue;
    sum += p[id];
    drawn = id;
  }
  return static_cast<Token>(drawn);
}

// =======================================================================================
// 6. Sequences
// =======================================================================================

struct EngineOptions {
  std::optional<DType> dtype;  // storage of matrices; as in the file if not given
  float delta_ratio = 1;
  int device = 0;  // mamba_cuda: which GPU
};

/// How a text is walked. All ways give the same logits up to rounding; that is the point.
struct Mode {
  enum Kind { parallel, recurrent, chunked } kind = parallel;
  Index chunk = 0;  // chunked: tokens a piece
};

inline Mode parse_mode(const std::string& text) {
  if (text == "parallel") return {Mode::parallel, 0};
  if (text == "recurrent") return {Mode::recurrent, 0};
  const std::string_view prefix = "chunked=";
  Index chunk = 0;
  const char* end = text.data() + text.size();
  if (text.compare(0, prefix.size(), prefix) == 0 && text.size() > prefix.size()) {
    const auto [rest, error] = std::from_chars(text.data() + prefix.size(), end, chunk);
    if (error == std::errc() && rest == end && chunk > 0) return {Mode::chunked, chunk};
  }
  fail_usage("--mode: expected parallel, recurrent or chunked=K with K > 0, found ", quote(text));
}

/// logits (count, vocab_size) of positions first, first + 1, ...
using LogitsSink = std::function<void(Index first, const Matrix<float>& logits)>;

/// Takes ids from `state` on and hands the logits of all L positions to sink, in order. The parallel
/// form takes Engine::kPiece tokens at a time, so that memory does not grow with the text.
template <class Engine>
void walk(Engine& engine, typename Engine::State& state, const Token* ids, Index L, Mode mode,
          const LogitsSink& sink) {
  if (mode.kind == Mode::recurrent) {
    for (Index t = 0; t < L; ++t) sink(t, engine.step(state, ids[t]));
    return;
  }
  const Index piece = mode.kind == Mode::chunked ? mode.chunk : Engine::kPiece;
  for (Index t = 0; t < L; t += piece) {
    engine.forward(state, ids + t, std::min(piece, L - t),
                   [&](Index first, const Matrix<float>& logits) { sink(t + first, logits); });
  }
}

/// The logits after the last of L > 0 tokens, in the parallel form.
template <class Engine>
Matrix<float> prefill(Engine& engine, typename Engine::State& state, const Token* ids, Index L) {
  Matrix<float> logits;
  for (Index t = 0; t < L; t += Engine::kPiece)
    logits = engine.prefill(state, ids + t, std::min(Engine::kPiece, L - t));
  return logits;
}

/// One text in the making. Between calls the last id has not been taken into the state yet:
/// whatever comes next, a draw or more text, starts from it.
template <class State>
struct Sequence {
  std::vector<Token> ids;
  State state;
  std::uint64_t index = 0;  // which of several; with the seed it fixes the random numbers
  std::size_t taken = 0;    // ids that are in the state
};

struct GenerateOptions {
  Index n = 256;  // tokens to add at most
  SamplerOptions sampler;
  Token stop = -1;  // ends a sequence; -1: none
};

using OnToken = std::function<void(std::size_t sequence, Token token)>;

/// Prefill, then token by token, one sequence after the other.
template <class Engine>
void generate_on_host(Engine& engine, std::vector<Sequence<typename Engine::State>>& sequences,
                      const GenerateOptions& options, const OnToken& on_token) {
  for (std::size_t i = 0; i < sequences.size(); ++i) {
    auto& s = sequences[i];
    const auto take = [&](std::size_t end) {
      const std::size_t begin = std::exchange(s.taken, end);
      return prefill(engine, s.state, s.ids.data() + begin, static_cast<Index>(end - begin));
    };
    if (options.n == 0) {
      take(s.ids.size() - 1);
      continue;
    }
    Matrix<float> logits = take(s.ids.size());
    for (Index made = 0; made < options.n; ++made) {
      if (made > 0) logits = engine.step(s.state, s.ids[s.taken++]);
      s.ids.push_back(sample(logits.data(), static_cast<std::size_t>(logits.cols()), s.ids,
                             options.sampler, s.index, s.ids.size()));
      on_token(i, s.ids.back());
      if (s.ids.back() == options.stop) break;
    }
  }
}

// A saved state is a safetensors file: per layer `layers.L.conv` (d_conv - 1, conv_width) and
// `layers.L.h` (d_inner, d_state), and `ids`, the text so far; the last id is not in the state yet.

inline void save_state(const std::string& path, const std::vector<Token>& ids,
                       const ssm::State<float>& state) {
  std::vector<Matrix<float>> rows;  // h lies column by column; files are row-major
  std::vector<Tensor> tensors = {
      tensor_view("ids", {static_cast<std::int64_t>(ids.size())}, ids.data())};
  rows.reserve(state.layers.size());
  for (std::size_t l = 0; l < state.layers.size(); ++l) {
    const auto& layer = state.layers[l];
    const std::string name = "layers." + std::to_string(l) + ".";
    rows.emplace_back(layer.h);
    tensors.push_back(
        tensor_view(name + "conv", {layer.conv.rows(), layer.conv.cols()}, layer.conv.data()));
    tensors.push_back(
        tensor_view(name + "h", {layer.h.rows(), layer.h.cols()}, rows.back().data()));
  }
  write_safetensors(path, tensors, {{"format", "mamba state"}});
}

inline ssm::State<float> load_state(const std::string& path, const Config& config,
                                    std::vector<Token>& ids) {
  const Checkpoint file = read_safetensors(path);
  const auto matrix = [&](const std::string& name, Index rows, Index cols) {
    const Tensor& tensor = file.at(name);
    if (tensor.shape != std::vector<std::int64_t>{rows, cols})
      fail("wrong state: ", path, ": ", name, ": expected ", shape_text({rows, cols}),
           " for this model, found ", shape_text(tensor.shape));
    Matrix<float> m(rows, cols);
    convert(tensor, m.data());
    return m;
  };
  ssm::State<float> state(config);
  for (std::size_t l = 0; l < state.layers.size(); ++l) {
    auto& layer = state.layers[l];
    const std::string name = "layers." + std::to_string(l) + ".";
    layer.conv = matrix(name + "conv", layer.conv.rows(), layer.conv.cols());
    layer.h = matrix(name + "h", layer.h.rows(), layer.h.cols());
  }
  if (file.find("layers." + std::to_string(config.n_layer) + ".h"))
    fail("wrong state: ", path, ": expected ", config.n_layer, " layers, found more");
  for (const std::int64_t id : values<std::int64_t>(file.at("ids"))) {
    if (id < 0 || id >= config.vocab_size)
      fail("wrong state: ", path, ": ids: expected ids below ", config.vocab_size, ", found ", id);
    ids.push_back(static_cast<Token>(id));
  }
  if (ids.empty()) fail("wrong state: ", path, ": ids: expected at least one, found none");
  return state;
}

// =======================================================================================
// 7. Evaluation
// =======================================================================================

/// ids (L) and logits (L, vocab_size) of a text as a safetensors file, written as they are made.
template <class Engine>
void write_logits(Engine& engine, const std::vector<Token>& ids, Mode mode,
                  const std::string& path) {
  const Index L = static_cast<Index>(ids.size());
  const std::vector<Tensor> tensors = {
      tensor_view("ids", {L}, ids.data()),
      {"logits", DType::F32, {L, engine.config().vocab_size}, nullptr, nullptr}};
  AtomicFile file(path);
  write_safetensors_header(file, tensors, {});
  file.write(tensors[0].bytes());
  auto state = engine.new_state();
  walk(engine, state, ids.data(), L, mode, [&](Index, const Matrix<float>& logits) {
    file.write({reinterpret_cast<const char*>(logits.data()),
                static_cast<std::size_t>(logits.size()) * sizeof(float)});
  });
  file.commit();
}

/// -log softmax(logits)[target], in nats.
inline double negative_log_likelihood(const Matrix<float>& logits, Index row, Token target) {
  const auto scores = logits.row(row).array().template cast<double>();
  const double largest = scores.maxCoeff();
  return largest + std::log((scores - largest).exp().sum()) - scores(target);
}

using Progress = std::function<void(Index done, Index all)>;

struct Score {
  Index length = 0, tokens = 0;  // context, tokens scored
  double nll = 0;                // sum over them, in nats
  double mean() const { return nll / static_cast<double>(tokens); }
  double perplexity() const { return std::exp(mean()); }
};

struct PerplexityOptions {
  Index length = 0;          // tokens a window; 0: the whole text
  Index stride = 0;          // from window to window; 0: length, no overlap
  bool carry_state = false;  // windows go on from the state of the one before
  Mode mode;
};

/// Fails unless a text of n tokens can be scored so.
inline void check(const PerplexityOptions& options, Index n) {
  const Index length = options.length ? options.length : n;
  const Index stride = options.stride ? options.stride : length;
  if (n < 2) fail("perplexity: text: expected at least 2 tokens, found ", n);
  if (length < 2 || length > n)
    fail("perplexity: --lengths: expected at least 2 and at most the ", n,
         " tokens of the text, found ", length);
  if (stride < 1 || stride > length)
    fail("perplexity: --stride: expected 1 to the window length ", length, ", found ", stride);
  if (options.carry_state && stride != length)
    fail("perplexity: --stride: windows cannot overlap with --carry-state");
}

/// Mean negative log likelihood of ids 2..n. Without carry_state every window starts from nothing:
/// with a stride below its length, it reads what lies before as context and scores only the tokens
/// that no window has scored yet; the very first token of the text, and of windows that do not
/// overlap, has no context and is not scored.
template <class Engine>
Score perplexity(Engine& engine, const std::vector<Token>& ids, const PerplexityOptions& options,
                 const Progress& progress = {}) {
  const Index n = static_cast<Index>(ids.size());
  check(options, n);
  const Index length = options.length ? options.length : n;
  const Index stride = options.stride ? options.stride : length;
  Score score{length, 0, 0};
  auto state = engine.new_state();
  Index scored = 1;  // targets before this index are done
  for (Index begin = 0; scored < n; begin += stride) {
    // inputs [begin, end), the target of input t is t + 1
    const Index end = std::min(begin + length - (options.carry_state ? 0 : 1), n - 1);
    if (!options.carry_state) {
      state = engine.new_state();
      scored = std::max(scored, begin + 1);
    }
    walk(engine, state, ids.data() + begin, end - begin, options.mode,
         [&](Index first, const Matrix<float>& logits) {
           for (Index i = 0; i < logits.rows(); ++i) {
             const Index target = begin + first + i + 1;
             if (target < scored) continue;
             score.nll += negative_log_likelihood(logits, i, ids[static_cast<std::size_t>(target)]);
             ++score.tokens;
           }
           if (progress) progress(begin + first, n);
         });
    scored = std::max(scored, end + 1);
    if (end == n - 1) break;
  }
  return score;
}

// --- The pass-key task: a number hidden at some depth in filler, asked for at the end ---

struct PasskeyOptions {
  Index length = 1024;  // tokens of the prompt, at most
  double depth = 0.5;   // where in the filler the key stands: 0 at the start, 1 at the end
  Index tests = 5;
  std::uint64_t seed = 1;  // with the number of the test it fixes the key
};

struct PasskeyScore {
  Index tests = 0, right = 0, tokens = 0;  // tokens of all prompts
};

inline std::string passkey_prompt(const std::string& key, Index filler_before, Index filler_after) {
  const auto filler = [](Index times) {
    std::string text;
    for (Index i = 0; i < times; ++i)
      text += std::string(i > 0 ? " " : "") +
              "The wind blows over the hills. The river runs down to the sea. The birds "
              "sing in the trees. One day goes by, and then another.";
    return text + "\n";
  };
  return "Somewhere in this long text a pass key is hidden. Find it and keep it in mind: "
         "at the end you will be asked for it.\n" +
         filler(filler_before) + "The pass key is " + key + ". Keep it in mind: " + key +
         " is the pass key.\n" + filler(filler_after) + "What is the pass key? The pass key is";
}

/// How many pieces of filler fit into a prompt of `length` tokens. Fails if not even one does.
inline Index passkey_filler(const Tokenizer& tokenizer, const std::string& key, Index length) {
  const auto size = [&](Index filler) {
    return static_cast<Index>(tokenizer.encode(passkey_prompt(key, filler, 0)).size());
  };
  const Index least = size(1), piece = size(2) - least;
  if (length < least)
    fail("passkey: --lengths: expected at least ", least,
         ", the tokens of the shortest prompt, found ", length);
  return 1 + (length - least) / piece;
}

/// How often the greedy continuation is the five-digit key. The prompt holds as much filler, in whole
/// pieces, as fits into options.length tokens.
template <class Engine>
PasskeyScore passkey(Engine& engine, const Tokenizer& tokenizer, const PasskeyOptions& options) {
  PasskeyScore score;
  for (Index begin = 0; begin < options.tests; begin += static_cast<Index>(Engine::kBatch)) {
    const Index end = std::min(options.tests, begin + static_cast<Index>(Engine::kBatch));
    GenerateOptions greedy;
    greedy.sampler.temperature = 0;
    greedy.n = 0;
    std::vector<std::string> keys;
    std::vector<Sequence<typename Engine::State>> sequences;
    for (Index test = begin; test < end; ++test) {
      const auto i = static_cast<std::uint64_t>(test);
      keys.push_back(std::to_string(10000 + static_cast<int>(90000 * uniform(options.seed, i, 0))));
      const Index filler = passkey_filler(tokenizer, keys.back(), options.length);
      const auto before =
          static_cast<Index>(std::lround(options.depth * static_cast<double>(filler)));
      sequences.push_back({tokenizer.encode(passkey_prompt(keys.back(), before, filler - before)),
                           engine.new_state(), i, 0});
      check_ids(sequences.back().ids, engine.config(), "tokenizer and model do not match");
      score.tokens += static_cast<Index>(sequences.back().ids.size());
      const std::size_t tokens = tokenizer.encode(" " + keys.back()).size();
      greedy.n = std::max(greedy.n, static_cast<Index>(tokens));
    }
    std::vector<std::vector<Token>> made(keys.size());
    engine.generate(sequences, greedy,
                    [&](std::size_t i, Token token) { made[i].push_back(token); });
    for (std::size_t i = 0; i < keys.size(); ++i) {
      const std::string answer = tokenizer.decode(made[i]);
      const std::size_t first = answer.find_first_not_of(' ');
      score.right += first != std::string::npos && answer.compare(first, 5, keys[i]) == 0;
      ++score.tests;
    }
  }
  return score;
}

// --- LAMBADA (Paperno et al. 2016), scored as the lm-evaluation-harness does lambada_openai ---

struct LambadaScore {
  Index examples = 0, right = 0;
  double log_likelihood = 0;  // of all last words, in nats
  double accuracy() const { return static_cast<double>(right) / static_cast<double>(examples); }
  double perplexity() const { return std::exp(-log_likelihood / static_cast<double>(examples)); }
};

/// Adds one text to the score: its last word, with the space before it, given all that stands before.
/// The word is right if each of its tokens is the likeliest.
template <class Engine>
void lambada(Engine& engine, const Tokenizer& tokenizer, const std::string& text,
             LambadaScore& score) {
  const std::size_t space = text.find_last_of(' ');
  std::size_t end = space == std::string::npos ? 0 : space;
  while (end > 0 && std::isspace(static_cast<unsigned char>(text[end - 1]))) --end;
  const std::vector<Token> ids = tokenizer.encode(text);
  const std::size_t context = tokenizer.encode(text.substr(0, end)).size();
  if (context == 0 || context >= ids.size() || text.back() == ' ')
    fail("expected two words or more, found ", quote(text));
  check_ids(ids, engine.config(), "tokenizer and model do not match");
  auto state = engine.new_state();
  Matrix<float> logits = prefill(engine, state, ids.data(), static_cast<Index>(context));
  bool right = true;
  for (std::size_t t = context; t < ids.size(); ++t) {
    if (t > context) logits = engine.step(state, ids[t - 1]);
    Index likeliest = 0;
    logits.row(0).maxCoeff(&likeliest);
    right = right && likeliest == ids[t];
    score.log_likelihood -= negative_log_likelihood(logits, 0, ids[t]);
  }
  score.right += right;
  ++score.examples;
}

// =======================================================================================
// 8. Pictures
// =======================================================================================

struct Colour {
  std::uint8_t r, g, b;
};
constexpr Colour kWhite{255, 255, 255}, kBlack{0, 0, 0}, kGrid{225, 225, 225},
    kMissing{170, 170, 170};

// Okabe and Ito's colours, which the colour-blind can tell apart, without the yellow.
constexpr std::array<Colour, 7> kLineColours{{{0, 114, 178},
                                              {213, 94, 0},
                                              {0, 158, 115},
                                              {204, 121, 167},
                                              {230, 159, 0},
                                              {86, 180, 233},
                                              {0, 0, 0}}};

// Viridis at `part` of its way from dark to bright, between nine colours; NaN is grey.
inline Colour heat_colour(double part) {
  static constexpr double kStops[9][3] = {{68, 1, 84},    {71, 45, 123},  {59, 82, 139},
                                          {44, 114, 142}, {33, 145, 140}, {40, 174, 128},
                                          {94, 201, 98},  {173, 220, 48}, {253, 231, 37}};
  if (std::isnan(part)) return kMissing;
  const double at = std::clamp(part, 0.0, 1.0) * 8;
  const int stop = std::min(static_cast<int>(at), 7);
  const auto mix = [&](int c) {
    return static_cast<std::uint8_t>(
        std::lround(kStops[stop][c] + (at - stop) * (kStops[stop + 1][c] - kStops[stop][c])));
  };
  return {mix(0), mix(1), mix(2)};
}

// A white canvas; (0, 0) is the upper left corner. What falls outside is not drawn.
class Canvas {
 public:
  static constexpr int kBorder = 16;  // pixels at each edge that stay white
  const int width, height;

  Canvas(int width, int height) : width(width), height(height) {
    if (width < 600 || height < 400 || width > 10000 || height > 10000)
      fail("picture: expected 600 x 400 to 10000 x 10000 pixels, found ", width, " x ", height);
    pixels_.assign(static_cast<std::size_t>(width) * height, kWhite);
  }

  // Mixes the colour into one pixel, by its coverage from 0 to 1.
  void dot(int x, int y, Colour colour, double coverage = 1) {
    if (x < 0 || y < 0 || x >= width || y >= height || coverage <= 0) return;
    Colour& pixel = pixels_[static_cast<std::size_t>(y) * width + x];
    const auto mix = [&](std::uint8_t from, std::uint8_t to) {
      return static_cast<std::uint8_t>(std::lround(from + std::min(coverage, 1.0) * (to - from)));
    };
    pixel = {mix(pixel.r, colour.r), mix(pixel.g, colour.g), mix(pixel.b, colour.b)};
  }

  // The pixels x0 <= x < x1, y0 <= y < y1.
  void fill(int x0, int y0, int x1, int y1, Colour colour) {
    for (int y = std::max(y0, 0); y < std::min(y1, height); ++y)
      for (int x = std::max(x0, 0); x < std::min(x1, width); ++x) dot(x, y, colour);
  }

  // The outline of the rectangle that holds those pixels.
  void frame(int x0, int y0, int x1, int y1, Colour colour) {
    fill(x0 - 2, y0 - 2, x1 + 2, y0, colour);
    fill(x0 - 2, y1, x1 + 2, y1 + 2, colour);
    fill(x0 - 2, y0, x0, y1, colour);
    fill(x1, y0, x1 + 2, y1, colour);
  }

  // A stroke three pixels wide: coverage falls off over the last pixel.
  void line(double x0, double y0, double x1, double y1, Colour colour) {
    const double dx = x1 - x0, dy = y1 - y0, length2 = dx * dx + dy * dy;
    for (int y = static_cast<int>(std::min(y0, y1)) - 2; y <= std::max(y0, y1) + 2; ++y)
      for (int x = static_cast<int>(std::min(x0, x1)) - 2; x <= std::max(x0, x1) + 2; ++x) {
        const double along = length2 > 0 ? ((x - x0) * dx + (y - y0) * dy) / length2 : 0;
        const double at = std::clamp(along, 0.0, 1.0);
        dot(x, y, colour, 2 - std::hypot(x - x0 - at * dx, y - y0 - at * dy));
      }
  }

  // A disc, a square or a diamond: circles of the norms l2, l-infinity and l1.
  void marker(double x, double y, int shape, Colour colour) {
    for (int j = static_cast<int>(y) - 9; j <= static_cast<int>(y) + 10; ++j)
      for (int i = static_cast<int>(x) - 9; i <= static_cast<int>(x) + 10; ++i) {
        const double u = std::abs(i - x), v = std::abs(j - y);
        const double norms[] = {std::hypot(u, v) - 6, std::max(u, v) - 5, u + v - 7.5};
        dot(i, j, colour, 0.5 - norms[shape % 3]);
      }
  }

  // Text with its upper left corner at (x, y); turned, it runs up from its lower left one.
  void text(int x, int y, const std::string& words, int scale = 2, bool turned = false) {
    std::string ascii = printable(words);
    std::vector<float> quads(1 + ascii.size() * 24 * 16);  // at most 24 quads a letter
    const int count = stb_easy_font_print(0, 0, ascii.data(), nullptr, quads.data(),
                                          static_cast<int>(quads.size() * sizeof(float)));
    for (int i = 0; i < count; ++i) {  // a quad: 4 corners of x, y, z, colour; 0 and 2 opposite
      const float* q = &quads[static_cast<std::size_t>(i) * 16];
      const int u0 = scaled(q[0], scale), v0 = scaled(q[1], scale);
      const int u1 = scaled(q[8], scale), v1 = scaled(q[9], scale);
      if (turned)
        fill(x + v0, y - u1, x + v1, y - u0, kBlack);
      else
        fill(x + u0, y + v0, x + u1, y + v1, kBlack);
    }
  }

  static int text_width(const std::string& words, int scale = 2) {
    return scale * stb_easy_font_width(printable(words).data());
  }
  static int text_height(int scale = 2) { return scale * 10; }  // with the descender

  // The text itself, or as much of its beginning as fits with three dots.
  static std::string fitted(const std::string& words, int width, int scale = 2) {
    if (text_width(words, scale) <= width) return words;
    std::string head = words;
    while (!head.empty() && text_width(head + "...", scale) > width) head.pop_back();
    return head.empty() ? head : head + "...";
  }

  void write_png(const std::string& path) const {
    std::string bytes;
    const auto append = [](void* to, void* data, int size) {
      static_cast<std::string*>(to)->append(static_cast<const char*>(data),
                                            static_cast<std::size_t>(size));
    };
    if (!stbi_write_png_to_func(append, &bytes, width, height, 3, pixels_.data(), width * 3))
      fail("picture: ", path, ": out of memory");
    AtomicFile file(path);
    file.write(bytes);
    file.commit();
  }

 private:
  // The font knows ASCII alone.
  static std::string printable(std::string words) {
    for (char& c : words)
      if (c < ' ' || c > '~') c = '?';
    return words;
  }
  static int scaled(float v, int scale) { return static_cast<int>(std::lround(v * scale)); }

  std::vector<Colour> pixels_;  // (height, width)
};

inline std::string tick_label(double value) {
  char label[32];
  std::snprintf(label, sizeof label, "%.10g", value);
  return label;
}

// The values from low to high along one side of a plot, linear or logarithmic.
struct Axis {
  double low = 0, high = 1;
  bool log = false, powers_of_two = true;

  // Whether a value can be drawn; the limit keeps differences of values finite.
  bool takes(double v) const { return std::abs(v) < 1e300 && (!log || v > 1e-300); }

  void include(double v) {
    if (!takes(v)) return;
    low = seen_ ? std::min(low, v) : v;
    high = seen_ ? std::max(high, v) : v;
    powers_of_two = powers_of_two && std::exp2(std::round(std::log2(std::abs(v)))) == v;
    seen_ = true;
  }

  // Called once, after the last include: room around constants and, by `padding`, all.
  void close(double padding) {
    if (!seen_) low = log ? 1 : 0, high = log ? 10 : 1;
    powers_of_two = powers_of_two && log && seen_;
    if (high - low <= 1e-9 * std::max(std::abs(low), std::abs(high)) || high - low < 1e-290) {
      const double room = low == 0 ? 1 : std::abs(low) / 2;
      low -= room, high += room;
    }
    const double pad = padding * (to_line(high) - to_line(low));
    if (pad == 0) return;
    const double from = to_line(low) - pad, to = to_line(high) + pad;
    low = log ? std::pow(10, from) : from;
    high = log ? std::pow(10, to) : to;
  }

  double part(double v) const {  // 0 at low, 1 at high
    return (to_line(v) - to_line(low)) / (to_line(high) - to_line(low));
  }

  // At most `count` round numbers: 1, 2, 5 times powers of ten, or powers of two or ten.
  std::vector<double> ticks(int count) const {
    std::vector<double> found;
    if (log) {
      const double base = powers_of_two ? 2 : 10;
      const int first = static_cast<int>(std::floor(std::log(low) / std::log(base)));
      const int last = static_cast<int>(std::ceil(std::log(high) / std::log(base)));
      const bool fine = !powers_of_two && 3 * (last - first) <= count;
      for (int e = first; e <= last; e += std::max(1, (last - first + count - 1) / count))
        for (double factor : {1.0, 2.0, 5.0})
          if (const double v = factor * std::pow(base, e);
              (factor == 1 || fine) && v >= low && v <= high)
            found.push_back(v);
      if (found.size() >= 2) return found;
      found.clear();
    }
    const double least = (high - low) / count;
    double step = std::pow(10, std::floor(std::log10(least)));
    for (double factor : {2.0, 2.5, 2.0})
      if (step < least) step *= factor;
    for (double i = std::ceil(low / step) + 0.0; i * step <= high; ++i)
      found.push_back(i * step + 0.0);
    return found;
  }

 private:
  double to_line(double v) const { return log ? std::log10(v) : v; }
  bool seen_ = false;
};

struct Series {
  std::string name;
  std::vector<double> x, y;
};

struct ChartOptions {
  bool log_x = false, log_y = false;
  std::vector<std::string> x_names;  // if given: what stands below x = 0, 1, 2, ...
  int width = 1200, height = 800;
};

// Where the plot lies within the picture, and the words around it.
struct Plot {
  Canvas& canvas;
  int left, top, right, bottom;

  void label(const std::string& title, const std::string& x_label, const std::string& y_label) {
    const auto centred = [&](const std::string& words, int middle, int y, int scale, int room) {
      const std::string shown = Canvas::fitted(words, room, scale);
      canvas.text(middle - Canvas::text_width(shown, scale) / 2, y, shown, scale);
    };
    const int edge = Canvas::kBorder, across = (left + right) / 2;
    centred(title, canvas.width / 2, edge, 3, canvas.width - 2 * edge);
    centred(x_label, across, canvas.height - edge - Canvas::text_height(), 2,
            2 * std::min(across - edge, canvas.width - edge - across));
    const std::string shown = Canvas::fitted(y_label, bottom - top);
    canvas.text(edge, (top + bottom + Canvas::text_width(shown)) / 2, shown, 2, true);
  }

  // A label left of the plot, its middle at y, or below it, its middle at x.
  void label_y(int y, const std::string& words) {
    canvas.text(left - 10 - Canvas::text_width(words), y - 8, words);
  }
  void label_x(int x, const std::string& words) {
    const int width = Canvas::text_width(words);
    const int last = canvas.width - Canvas::kBorder - width;
    canvas.text(std::min(x - width / 2, last), bottom + 10, words);
  }

  // Names that do not fit side by side are turned. To be asked before the height of the plot is used: it
  // makes room for them.
  bool turn_names(const std::vector<std::string>& names, int longest) {
    const int each = (right - left) / std::max(1, static_cast<int>(names.size()));
    const bool turned = longest > Canvas::text_height() && longest + 12 > each;
    if (turned) bottom -= longest - 16;
    return turned;
  }

  // Names below the plot at to_x(0), to_x(1), ...; where they would touch, only every k-th.
  template <class ToX>
  void name_x(const std::vector<std::string>& names, int longest, bool turned, const ToX& to_x) {
    const std::int64_t needed = turned ? Canvas::text_height() : longest + 12;
    const std::int64_t all = needed * static_cast<std::int64_t>(names.size());
    const auto every = static_cast<std::size_t>((all + right - left - 1) / (right - left));
    for (std::size_t i = 0; i < names.size(); i += std::max<std::size_t>(1, every)) {
      const int x = to_x(static_cast<int>(i));
      if (turned)
        canvas.text(x - 8, bottom + 8 + Canvas::text_width(names[i]), names[i], 2, true);
      else
        label_x(x, names[i]);
    }
  }
};

inline int widest(const std::vector<std::string>& labels) {
  int width = 0;
  for (const std::string& label : labels) width = std::max(width, Canvas::text_width(label));
  return width;
}

inline std::vector<std::string> tick_labels(const std::vector<double>& ticks) {
  std::vector<std::string> labels;
  labels.reserve(ticks.size());
  for (double tick : ticks) labels.push_back(tick_label(tick));
  return labels;
}

constexpr int kPlotTop = 76, kPlotBelow = 78;  // pixels for the title, and for the x labels

// Draws each series as a line through its points, broken where a value cannot be drawn.
inline void line_chart(const std::string& path, const std::string& title,
                       const std::string& x_label, const std::string& y_label,
                       const std::vector<Series>& series, const ChartOptions& options = {}) {
  Axis x_axis, y_axis;
  x_axis.log = options.log_x;
  y_axis.log = options.log_y;
  std::vector<std::string> names;
  for (const Series& each : series) {
    if (each.x.size() != each.y.size())
      fail("line chart: series ", each.name, ": expected ", each.x.size(), " y, found ",
           each.y.size());
    for (std::size_t i = 0; i < each.x.size(); ++i)
      if (x_axis.takes(each.x[i]) && y_axis.takes(each.y[i]))
        x_axis.include(each.x[i]), y_axis.include(each.y[i]);
    if (!each.name.empty()) names.push_back(Canvas::fitted(each.name, options.width / 3));
  }
  x_axis.close(0.03);
  y_axis.close(0.05);

  Canvas canvas(options.width, options.height);
  const std::vector<double> y_ticks = y_axis.ticks((options.height - 150) / 60);
  const int legend = names.empty() ? 0 : widest(names) + 60;
  Plot plot{canvas, Canvas::kBorder + 42 + widest(tick_labels(y_ticks)), kPlotTop,
            options.width - 2 * Canvas::kBorder - legend, options.height - kPlotBelow};
  const int longest = widest(options.x_names);
  const bool turned = plot.turn_names(options.x_names, longest);
  int count = 12;  // as many ticks as leave half a label free between their labels
  std::vector<double> x_ticks = x_axis.ticks(count);
  while (count > 2 && static_cast<int>(x_ticks.size()) * widest(tick_labels(x_ticks)) >
                          (plot.right - plot.left) * 2 / 3)
    x_ticks = x_axis.ticks(--count);

  const auto to_x = [&](double v) { return plot.left + x_axis.part(v) * (plot.right - plot.left); };
  const auto to_y = [&](double v) {
    return plot.bottom - y_axis.part(v) * (plot.bottom - plot.top);
  };
  for (double tick : y_ticks) {
    const int y = static_cast<int>(to_y(tick));
    canvas.fill(plot.left, y, plot.right, y + 1, kGrid);
    plot.label_y(y, tick_label(tick));
  }
  if (!options.x_names.empty()) x_ticks.clear();
  for (double tick : x_ticks) {
    const int x = static_cast<int>(to_x(tick));
    canvas.fill(x, plot.top, x + 1, plot.bottom, kGrid);
    plot.label_x(x, tick_label(tick));
  }
  plot.name_x(options.x_names, longest, turned, [&](int i) { return static_cast<int>(to_x(i)); });
  canvas.frame(plot.left, plot.top, plot.right, plot.bottom, kBlack);
  plot.label(title, x_label, y_label);

  int legend_y = plot.top + 10;
  for (std::size_t s = 0; s < series.size(); ++s) {
    const Colour colour = kLineColours[s % kLineColours.size()];
    const int shape = static_cast<int>(s % 3);
    const auto& [name, x, y] = series[s];
    for (std::size_t i = 0; i < x.size(); ++i) {
      if (!x_axis.takes(x[i]) || !y_axis.takes(y[i])) continue;
      if (i > 0 && x_axis.takes(x[i - 1]) && y_axis.takes(y[i - 1]))
        canvas.line(to_x(x[i - 1]), to_y(y[i - 1]), to_x(x[i]), to_y(y[i]), colour);
      if (x.size() <= 40) canvas.marker(to_x(x[i]), to_y(y[i]), shape, colour);
    }
    if (name.empty() || legend_y + 20 > plot.bottom) continue;
    canvas.line(plot.right + 20, legend_y + 8, plot.right + 50, legend_y + 8, colour);
    canvas.marker(plot.right + 35, legend_y + 8, shape, colour);
    canvas.text(plot.right + 62, legend_y, Canvas::fitted(name, options.width / 3));
    legend_y += 30;
  }
  canvas.write_png(path);
}

struct HeatOptions {  // the values at the ends of the colour bar; NaN: those of the data
  double low = std::numeric_limits<double>::quiet_NaN();
  double high = std::numeric_limits<double>::quiet_NaN();
  int width = 1200, height = 800;
};

// Draws values[row][column] as coloured cells, row 0 on top; what is not finite is grey.
// Labels are one for each row or column, or none; where they would touch, only every k-th
// is drawn.
inline void heat_map(const std::string& path, const std::string& title, const std::string& x_label,
                     const std::string& y_label, const std::vector<std::vector<double>>& values,
                     const std::vector<std::string>& row_labels,
                     const std::vector<std::string>& column_labels, const std::string& bar_label,
                     const HeatOptions& options = {}) {
  const int rows = static_cast<int>(values.size());
  const int columns = rows ? static_cast<int>(values[0].size()) : 0;
  Axis heat;
  for (const auto& row : values) {
    if (static_cast<int>(row.size()) != columns)
      fail("heat map: expected ", columns, " values in every row, found ", row.size());
    for (double v : row) heat.include(v);
  }
  heat.close(0);
  if (std::isfinite(options.low)) heat.low = options.low;
  if (std::isfinite(options.high)) heat.high = options.high;
  const auto fitted = [&](std::vector<std::string> labels, int count) {
    labels.resize(static_cast<std::size_t>(count));
    for (std::string& label : labels) label = Canvas::fitted(label, options.width / 6);
    return labels;
  };
  const auto row_names = fitted(row_labels, rows), column_names = fitted(column_labels, columns);

  Canvas canvas(options.width, options.height);
  const std::vector<double> ticks = heat.ticks(8);
  const int bar = 28 + 42 + widest(tick_labels(ticks));  // the bar, its labels, and its name
  Plot plot{canvas, Canvas::kBorder + 42 + widest(row_names), kPlotTop,
            options.width - Canvas::kBorder - 40 - bar, options.height - kPlotBelow};
  const int longest = widest(column_names);
  const bool turned = plot.turn_names(column_names, longest);
  const int across = plot.right - plot.left, down = plot.bottom - plot.top;

  const auto part = [&](double v) {
    return heat.takes(v) ? heat.part(v) : std::numeric_limits<double>::quiet_NaN();
  };
  for (int y = 0; y < down && columns > 0; ++y)
    for (int x = 0; x < across; ++x) {
      const auto row = static_cast<std::size_t>(std::int64_t{y} * rows / down);
      const auto column = static_cast<std::size_t>(std::int64_t{x} * columns / across);
      canvas.dot(plot.left + x, plot.top + y, heat_colour(part(values[row][column])));
    }
  canvas.frame(plot.left, plot.top, plot.right, plot.bottom, kBlack);
  plot.label(title, x_label, y_label);
  const auto middle = [](int i, int count, int size) {
    return static_cast<int>((2 * std::int64_t{i} + 1) * size / count / 2);
  };
  const int every = (rows * Canvas::text_height() + down - 1) / down;
  for (int i = 0; i < rows; i += std::max(1, every))
    plot.label_y(plot.top + middle(i, rows, down), row_names[static_cast<std::size_t>(i)]);
  plot.name_x(column_names, longest, turned,
              [&](int i) { return plot.left + middle(i, columns, across); });

  const int x = plot.right + 40;
  for (int y = plot.top; y < plot.bottom; ++y)
    canvas.fill(x, y, x + 28, y + 1, heat_colour(1 - (y - plot.top + 0.5) / down));
  canvas.frame(x, plot.top, x + 28, plot.bottom, kBlack);
  for (double tick : ticks) {
    const int y = plot.bottom - static_cast<int>(std::lround(heat.part(tick) * down));
    canvas.text(x + 38, y - 8, tick_label(tick));
  }
  const std::string shown = Canvas::fitted(bar_label, down);
  canvas.text(options.width - Canvas::kBorder - 20,
              (plot.top + plot.bottom + Canvas::text_width(shown)) / 2, shown, 2, true);
  canvas.write_png(path);
}

// =======================================================================================
// 9. Inspection
// =======================================================================================
//
// What the scan of one layer does with a text, from a zero state, by the reference in float.

struct Inspection {
  Matrix<float> x, y;        // (L, d_inner)  into the scan, and out of it before the gate
  Matrix<float> delta;       // (L, d_inner), Mamba-2: (L, n_heads)
  Matrix<float> memory;      // (d_inner, d_state), Mamba-2: (n_heads, 1)  in tokens, see below
  Matrix<float> state_norm;  // (L, 1)  sqrt of the sum of squares of h_t
};

/// Follows a scan token by token. A token's trace in state n of channel c falls to 1/e when the sum of
/// delta[., c] |A[c, n]| since then reaches 1: after memory[c, n] tokens of average delta.
template <class Inputs, class Step>
Inspection follow(const Inputs& in, Index d_state, const Step& step) {
  const Index L = in.length();
  Inspection seen;
  seen.x = in.x;
  seen.y.resize(L, in.x.cols());
  seen.delta = ssm::step_size(in);
  const ssm::Row<float> mean = seen.delta.colwise().mean();
  seen.memory = (mean.transpose().asDiagonal() * in.A.cwiseAbs()).cwiseInverse();
  seen.state_norm.resize(L, 1);
  ssm::StateMatrix<float> h = ssm::StateMatrix<float>::Zero(in.x.cols(), d_state);
  for (Index t = 0; t < L; ++t) {
    seen.y.row(t) = step(in.tokens(t, 1), h);
    seen.state_norm(t) = h.norm();
  }
  return seen;
}

/// `attention` is called with the matrix M (L, L), y = M x, of every channel (Mamba-2: head) in turn.
template <class Attention>
Inspection inspect(const ssm::Model<float>& model, const std::vector<Token>& ids, Index layer,
                   float delta_ratio, const Attention& attention) {
  const ssm::Sizes& sizes = model.sizes;
  const auto& w = model.layers[static_cast<std::size_t>(layer)];
  ssm::Trace<float> trace;
  trace.layer = layer;
  ssm::Options<float> options;
  options.delta_ratio = delta_ratio;
  options.trace = &trace;
  ssm::State<float> state(sizes);
  ssm::backbone(model, ids.data(), static_cast<Index>(ids.size()), state, options);
  if (sizes.version == 1) {
    auto in = ssm::scan_inputs(w, sizes, trace.projected, trace.convolved, trace.dt_B_C,
                               trace.delta, 0, sizes.d_inner);
    in.delta_ratio = delta_ratio;
    in.z = {};
    const Inspection seen = follow(in, sizes.d_state, ssm::selective_scan_step<float>);
    for (Index c = 0; c < sizes.d_inner; ++c)
      attention(c, ssm::implied_attention(in, seen.delta, c));
    return seen;
  }
  auto in = ssm::ssd_inputs(w, sizes, trace.projected, trace.convolved, 0, sizes.n_heads);
  in.delta_ratio = delta_ratio;
  const Inspection seen = follow(in, sizes.d_state, ssm::ssd_step<float>);
  for (Index i = 0; i < sizes.n_heads; ++i)
    attention(i, ssm::implied_attention(in, seen.delta, i, sizes.d_state));
  return seen;
}

/// Tokens as they can stand along an axis, in ASCII: white space made visible, other characters by their
/// code point, ~ for a part of one; of a long text with their positions.
inline std::vector<std::string> token_labels(const Tokenizer& tokenizer,
                                             const std::vector<Token>& ids) {
  std::vector<std::string> labels;
  for (std::size_t t = 0; t < ids.size(); ++t) {
    std::ostringstream label;
    if (ids.size() > 40) label << t << ' ';
    const std::string text = tokenizer.decode({ids[t]});
    const auto* at = reinterpret_cast<const utf8proc_uint8_t*>(text.data());
    for (auto left = static_cast<utf8proc_ssize_t>(text.size()); left > 0;) {
      utf8proc_int32_t point = 0;
      const utf8proc_ssize_t taken =
          std::max<utf8proc_ssize_t>(1, utf8proc_iterate(at, left, &point));
      at += taken, left -= taken;
      if (point == ' ')
        label << '_';
      else if (point == '\n')
        label << "\\n";
      else if (point == '\t')
        label << "\\t";
      else if (point == 0xFFFD || point < ' ')
        label << '~';
      else if (point < 127)
        label << static_cast<char>(point);
      else
        label << "U+" << std::hex << std::uppercase << point << std::dec;
    }
    labels.push_back(label.str());
  }
  return labels;
}

/// delta over time, channels in the order of their means; log10, for it spans decades.
inline void draw_delta(const std::string& path, const Inspection& seen, const std::string& layer,
                       const std::vector<std::string>& tokens) {
  const char* channel = seen.delta.cols() == seen.x.cols() ? "channel" : "head";
  std::vector<Index> order(static_cast<std::size_t>(seen.delta.cols()));
  std::iota(order.begin(), order.end(), Index{0});
  const ssm::Row<float> mean = seen.delta.colwise().mean();
  std::stable_sort(order.begin(), order.end(), [&](Index a, Index b) { return mean(a) > mean(b); });
  std::vector<std::vector<double>> rows;
  std::vector<std::string> names;
  for (const Index c : order) {
    names.push_back(std::to_string(c));
    rows.emplace_back();
    for (Index t = 0; t < seen.delta.rows(); ++t)
      rows.back().push_back(std::log10(static_cast<double>(seen.delta(t, c))));
  }
  heat_map(path, "Step size delta, " + layer, "token", std::string(channel) + ", by mean delta",
           rows, names, tokens, "log10 delta");
}

/// The memory of channels, longest first, for their slowest, median and fastest state.
inline void draw_memory(const std::string& path, const Inspection& seen, const std::string& layer) {
  const bool one = seen.memory.cols() == 1;
  std::vector<Series> series = {
      {"slowest state", {}, {}}, {"median state", {}, {}}, {"fastest state", {}, {}}};
  if (one) series = {{"", {}, {}}};
  for (std::size_t k = 0; k < series.size(); ++k) {
    for (Index c = 0; c < seen.memory.rows(); ++c) {
      std::vector<double> of(static_cast<std::size_t>(seen.memory.cols()));
      for (std::size_t n = 0; n < of.size(); ++n)
        of[n] = static_cast<double>(seen.memory(c, static_cast<Index>(n)));
      std::sort(of.rbegin(), of.rend());
      series[k].y.push_back(of[(of.size() - 1) * k / 2]);
      series[k].x.push_back(static_cast<double>(c) + 1);
    }
    std::sort(series[k].y.rbegin(), series[k].y.rend());
  }
  ChartOptions options;
  options.log_y = true;
  line_chart(path, "Effective memory, " + layer,
             one ? "heads, longest memory first" : "channels, for each line longest memory first",
             "tokens until a trace falls to 1/e", series, options);
}

inline void draw_state_norm(const std::string& path, const Inspection& seen,
                            const std::string& layer, const std::vector<std::string>& tokens) {
  Series series;
  for (Index t = 0; t < seen.state_norm.rows(); ++t) {
    series.x.push_back(static_cast<double>(t));
    series.y.push_back(static_cast<double>(seen.state_norm(t)));
  }
  ChartOptions options;
  options.x_names = tokens;
  line_chart(path, "Size of the state, " + layer, "after token", "norm of h", {series}, options);
}

/// mean (L, L): mean of |M| over channels; log10, for it spans decades.
inline void draw_attention(const std::string& path, const Matrix<float>& mean,
                           const std::string& layer, const std::vector<std::string>& tokens) {
  std::vector<std::vector<double>> rows;
  double largest = -HUGE_VAL;
  for (Index t = 0; t < mean.rows(); ++t) {
    rows.emplace_back(static_cast<std::size_t>(mean.cols()),
                      std::numeric_limits<double>::quiet_NaN());
    for (Index s = 0; s <= t; ++s) {
      const double value = std::log10(std::max(1e-30, static_cast<double>(mean(t, s))));
      rows.back()[static_cast<std::size_t>(s)] = value;
      largest = std::max(largest, value);
    }
  }
  HeatOptions options;
  if (std::isfinite(largest)) options.high = largest, options.low = largest - 4;  // and below
  heat_map(path, "Implied attention, " + layer, "from token", "to the output at token", rows,
           tokens, tokens, "log10 of mean |M|; darkest: this or less", options);
}

// =======================================================================================
// 10. Command line
// =======================================================================================
//
// Results go to stdout, progress and statistics to stderr.
// Exit status 0: done, 1: failed, 2: wrong usage.

struct BenchOptions {
  std::string op, shape = "130m", mode = "parallel";
  Index batch = 1, length = 512, repeat = 20;
  DType dtype = DType::F32;
  int device = 0;
};

/// All flags of all subcommands; each subcommand reads those that it declares.
struct Arguments {
  std::string model = "weights/stories", prompt, prompt_file, ids, ids_file, out, mode = "parallel",
              dtype, save_state, load_state, csv, png, data;
  std::vector<std::string> texts;
  std::vector<Index> lengths;
  std::vector<double> depths = {0, 0.25, 0.5, 0.75, 1};
  std::vector<double> delta_ratios = {1};
  Index n = 256, batch = 1, stride = 0, tests = 5, limit = 0, layer = 0;
  bool print_ids = false, ignore_eos = false, carry_state = false, truncate = false, decode = false;
  float delta_ratio = 1;
  int device = 0;
  SamplerOptions sampler;
  BenchOptions bench;
};

inline DType parse_dtype(const std::string& text) {
  if (text == "f32") return DType::F32;
  if (text == "bf16") return DType::BF16;
  if (text == "f16") return DType::F16;
  fail_usage("--dtype: expected f32, bf16 or f16, found ", quote(text));
}

inline std::vector<Token> parse_ids(const std::string& text, const std::string& where) {
  std::vector<Token> ids;
  std::istringstream words(text);
  for (std::string word; words >> word;) {
    Token id = 0;
    const auto [rest, error] = std::from_chars(word.data(), word.data() + word.size(), id);
    if (error != std::errc() || rest != word.data() + word.size() || id < 0)
      fail(where, ": expected token ids, found ", quote(word));
    ids.push_back(id);
  }
  return ids;
}

inline void check_ids(const std::vector<Token>& ids, const Config& config,
                      const std::string& where) {
  for (const Token id : ids)
    if (id < 0 || id >= config.vocab_size)
      fail(where, ": expected token ids below ", config.vocab_size, ", found ", id);
}

inline double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

/// A bar on stderr while something long goes on, if stderr is a terminal.
inline void show_progress(Index done, Index all) {
  static const bool terminal = ::isatty(2) == 1;
  static double last = 0;
  if (!terminal || now() - last < 0.1) return;
  last = now();
  const int width = 40, filled = static_cast<int>(width * done / std::max<Index>(1, all));
  std::cerr << "\r[" << std::string(filled, '#') << std::string(width - filled, ' ') << "] " << done
            << "/" << all << std::flush << "\r\033[K";
}

inline Config open_config(const Arguments& arguments) {
  if (!std::filesystem::is_directory(arguments.model))
    fail("no model: ", arguments.model,
         ": expected a directory with config.json and weights (--model)");
  return read_config(arguments.model);
}

inline void check_delta_ratio(double ratio) {
  const float used = static_cast<float>(ratio);
  if (!(used > 0) || !std::isfinite(used))
    fail_usage("--delta-ratio: expected a number above 0, found ", ratio);
}

template <class Engine>
Engine open_engine(const Arguments& arguments) {
  EngineOptions options;
  if (!arguments.dtype.empty()) options.dtype = parse_dtype(arguments.dtype);
  options.delta_ratio = arguments.delta_ratio;
  options.device = arguments.device;
  check_delta_ratio(options.delta_ratio);
  const Config config = open_config(arguments);
  return Engine(read_checkpoint(arguments.model), config, options);
}

inline Tokenizer open_tokenizer(const Arguments& arguments) {
  const std::string path = arguments.model + "/tokenizer.json";
  const MappedFile file(path);
  const std::string what = what_it_is(file.bytes());
  if (!what.empty()) fail("no tokenizer: ", path, ": found ", what);
  return Tokenizer::from_text(file.bytes(), path);
}

/// A text as token ids, and where it came from.
struct Document {
  std::string where;
  std::vector<Token> ids;
};

/// What --ids, --ids-file or --text ask for; only --text can name several.
inline std::vector<Document> documents(const Arguments& arguments, const Config& config) {
  std::vector<Document> all;
  if (!arguments.ids_file.empty()) {
    all.push_back({"--ids-file: " + arguments.ids_file, {}});
    all[0].ids = parse_ids(read_file(arguments.ids_file), all[0].where);
  } else if (!arguments.texts.empty()) {
    const Tokenizer tokenizer = open_tokenizer(arguments);
    for (const std::string& text : arguments.texts)
      all.push_back({"--text: " + text, tokenizer.encode(read_file(text))});
  } else {
    all.push_back({"--ids", parse_ids(arguments.ids, "--ids")});
  }
  for (const auto& [where, ids] : all) {
    if (ids.empty()) fail(where, ": expected at least one token, found none");
    check_ids(ids, config, where);
  }
  return all;
}

/// The prompts, one a sequence: --prompt, or the lines of --prompt-file, each --batch times.
inline std::vector<std::string> prompts(const Arguments& arguments) {
  std::vector<std::string> texts;
  if (arguments.prompt_file.empty()) {
    texts = {arguments.prompt == "-" ? read_file("-") : arguments.prompt};
  } else {
    std::istringstream lines(read_file(arguments.prompt_file));
    for (std::string line; std::getline(lines, line);) texts.push_back(line);
    if (texts.empty())
      fail("--prompt-file: ", arguments.prompt_file, ": expected a prompt a line, found none");
  }
  std::vector<std::string> all;
  for (const std::string& text : texts)
    all.insert(all.end(), static_cast<std::size_t>(arguments.batch), text);
  return all;
}

/// Prints several texts, which grow in any order, one after the other: the first that is not done
/// streams, what comes for later ones waits for its turn.
class Transcript {
 public:
  explicit Transcript(std::size_t texts) : waiting_(texts), done_(texts) {}
  void add(std::size_t i, const std::string& text) {
    waiting_[i] += text;
    if (i == turn_) flush();
  }
  void finish(std::size_t i, const std::string& rest) {
    waiting_[i] += rest + "\n";
    done_[i] = true;
    if (i == turn_) flush();
  }

 private:
  void flush() {
    std::cout << std::exchange(waiting_[turn_], {});
    while (done_[turn_] && ++turn_ < waiting_.size())
      std::cout << std::exchange(waiting_[turn_], {});
    std::cout << std::flush;
  }
  std::vector<std::string> waiting_;
  std::vector<bool> done_;
  std::size_t turn_ = 0;
};

template <class Engine>
void run_generate(const Arguments& arguments) {
  check(arguments.sampler);
  const std::vector<std::string> texts = prompts(arguments);
  const bool stateful = !arguments.save_state.empty() || !arguments.load_state.empty();
  if (stateful && texts.size() != 1)
    fail_usage("--save-state, --load-state: expected one prompt, found ", texts.size());
  check_writable(arguments.save_state);
  Engine engine = open_engine<Engine>(arguments);
  const Tokenizer tokenizer = open_tokenizer(arguments);
  const Config& config = engine.config();
  GenerateOptions options;
  options.n = arguments.n;
  options.sampler = arguments.sampler;
  options.stop = arguments.ignore_eos ? -1 : config.eos_token_id;

  std::size_t taken = 0, made = 0;
  double to_first = 0, to_rest = 0;  // seconds
  for (std::size_t begin = 0; begin < texts.size(); begin += Engine::kBatch) {
    const std::size_t count = std::min<std::size_t>(Engine::kBatch, texts.size() - begin);
    std::vector<Sequence<typename Engine::State>> sequences;
    std::vector<StreamDecoder> decoders(count, StreamDecoder(tokenizer));
    Transcript transcript(count);
    for (std::size_t i = 0; i < count; ++i) {
      sequences.push_back({{}, engine.new_state(), begin + i, 0});
      auto& s = sequences.back();
      if (!arguments.load_state.empty()) {
        s.state = engine.from_host(load_state(arguments.load_state, config, s.ids));
        s.taken = s.ids.size() - 1;
      }
      const std::vector<Token> prompt = tokenizer.encode(texts[begin + i]);
      s.ids.insert(s.ids.end(), prompt.begin(), prompt.end());
      if (s.ids.empty() && config.bos_token_id >= 0) s.ids.push_back(config.bos_token_id);
      if (s.ids.empty()) fail("--prompt: expected a text: this model has no token to begin with");
      check_ids(s.ids, config, "--prompt: tokenizer and model do not match");
      for (const Token id : s.ids) decoders[i].push(id);
      if (!arguments.print_ids && arguments.load_state.empty()) transcript.add(i, texts[begin + i]);
      taken += s.ids.size() - s.taken;
    }
    const double start = now();
    double first = 0;
    engine.generate(sequences, options, [&](std::size_t i, Token token) {
      if (first == 0) first = now();
      ++made;
      if (!arguments.print_ids && token != config.eos_token_id)
        transcript.add(i, decoders[i].push(token));
    });
    to_first += (first == 0 ? now() : first) - start;
    to_rest += first == 0 ? 0 : now() - first;
    for (std::size_t i = 0; i < count; ++i) {
      if (!arguments.print_ids) {
        // bytes of a character that the saved state will complete are not printed yet
        transcript.finish(i, arguments.save_state.empty() ? decoders[i].finish() : "");
        continue;
      }
      for (std::size_t t = 0; t < sequences[i].ids.size(); ++t)
        std::cout << (t > 0 ? " " : "") << sequences[i].ids[t];
      std::cout << std::endl;
    }
    if (!arguments.save_state.empty())
      save_state(arguments.save_state, sequences[0].ids, engine.to_host(sequences[0].state));
  }
  std::cerr << std::fixed << std::setprecision(3) << taken << " tokens in, first token after "
            << to_first << " s; " << made << " tokens out";
  if (made > texts.size())
    std::cerr << ", " << to_rest / static_cast<double>(made - texts.size()) * 1e3 << " ms each";
  std::cerr << "\n";
}

/// Fails now if the table or its picture cannot be written.
inline void check_outputs(const Arguments& arguments) {
  if (!arguments.csv.empty() && arguments.csv == arguments.png)
    fail_usage("--csv, --png: expected two files, found ", quote(arguments.csv), " twice");
  check_writable(arguments.csv);
  check_writable(arguments.png);
}

inline void write_text(const std::string& path, const std::string& text) {
  AtomicFile file(path);
  file.write(text);
  file.commit();
}

/// The documents of at least so many tokens; all, if there is none.
inline std::vector<Document> long_enough(std::vector<Document> all, Index length) {
  const auto shorter = [&](const Document& text) {
    return static_cast<Index>(text.ids.size()) < length;
  };
  if (std::all_of(all.begin(), all.end(), shorter)) return all;
  for (const Document& text : all)
    if (shorter(text))
      warn(text.where + ": " + std::to_string(text.ids.size()) +
           " tokens, shorter than the longest length: left out");
  all.erase(std::remove_if(all.begin(), all.end(), shorter), all.end());
  return all;
}

/// The study of perplexity against context length: the same documents for every length, a table and a
/// line for each delta ratio. --truncate takes the beginning of each document only, as one window.
template <class Engine>
void run_perplexity(Arguments arguments) {
  for (const double ratio : arguments.delta_ratios) check_delta_ratio(ratio);
  PerplexityOptions options;
  options.stride = arguments.stride;
  options.carry_state = arguments.carry_state;
  options.mode = parse_mode(arguments.mode);
  check_outputs(arguments);
  std::vector<Index> lengths = arguments.lengths;
  if (lengths.empty()) lengths.push_back(0);
  std::sort(lengths.begin(), lengths.end());
  const std::vector<Document> texts =
      long_enough(documents(arguments, open_config(arguments)), lengths.back());
  for (const Document& text : texts)
    for (const Index length : lengths) {
      options.length = length;
      check(options, static_cast<Index>(text.ids.size()));
    }

  std::ostringstream csv;
  csv << "length,tokens,nll,perplexity,delta_ratio\n" << std::setprecision(9);
  std::vector<Series> series;
  for (const double ratio : arguments.delta_ratios) {
    arguments.delta_ratio = static_cast<float>(ratio);
    Engine engine = open_engine<Engine>(arguments);
    series.push_back({"delta ratio " + tick_label(ratio), {}, {}});
    for (const Index length : lengths) {
      Score score{length, 0, 0};
      for (const Document& text : texts) {
        std::vector<Token> ids = text.ids;
        if (arguments.truncate) ids.resize(static_cast<std::size_t>(length));
        options.length = length;
        const Score part = perplexity(engine, ids, options, show_progress);
        score.length = std::max(score.length, part.length);
        score.tokens += part.tokens;
        score.nll += part.nll;
      }
      if (series[0].x.empty())
        std::cout << "   length    tokens  NLL (nats)  perplexity  delta ratio\n";
      std::cout << std::fixed << std::setw(9) << score.length << std::setw(10) << score.tokens
                << std::setprecision(4) << std::setw(12) << score.mean() << ' ' << std::setw(11)
                << score.perplexity() << std::setw(13) << tick_label(ratio) << std::endl;
      csv << score.length << ',' << score.tokens << ',' << score.mean() << ',' << score.perplexity()
          << ',' << ratio << '\n';
      series.back().x.push_back(static_cast<double>(score.length));
      series.back().y.push_back(score.perplexity());
    }
  }
  if (!arguments.csv.empty()) write_text(arguments.csv, csv.str());
  if (!arguments.png.empty()) {
    ChartOptions chart;
    chart.log_x = true;
    line_chart(arguments.png, "Perplexity against context length", "context length (tokens)",
               "perplexity", series, chart);
  }
}

template <class Engine>
void run_passkey(const Arguments& arguments) {
  check_outputs(arguments);
  Engine engine = open_engine<Engine>(arguments);
  const Tokenizer tokenizer = open_tokenizer(arguments);
  for (const Index length : arguments.lengths) passkey_filler(tokenizer, "12345", length);
  std::ostringstream csv;
  csv << "length,depth,tests,tokens,accuracy\n" << std::setprecision(9);
  std::vector<std::vector<double>> accuracy(arguments.depths.size());  // [depth][length]
  std::vector<std::string> rows, columns;
  for (const double depth : arguments.depths) rows.push_back(tick_label(depth));
  Index done = 0;
  const auto all = static_cast<Index>(arguments.lengths.size() * rows.size());
  for (const Index length : arguments.lengths) {
    columns.push_back(std::to_string(length));
    for (std::size_t d = 0; d < rows.size(); ++d) {
      PasskeyOptions options;
      options.length = length;
      options.depth = arguments.depths[d];
      options.tests = arguments.tests;
      options.seed = arguments.sampler.seed;
      const PasskeyScore score = passkey(engine, tokenizer, options);
      const Index tokens = score.tokens / score.tests;  // on average
      accuracy[d].push_back(static_cast<double>(score.right) / static_cast<double>(score.tests));
      if (done == 0) std::cout << "   length     depth     tests    tokens  accuracy\n";
      std::cout << std::setw(9) << length << std::setw(10) << rows[d] << std::setw(10)
                << score.tests << std::setw(10) << tokens << std::fixed << std::setprecision(3)
                << std::setw(10) << accuracy[d].back() << std::endl;
      csv << length << ',' << rows[d] << ',' << score.tests << ',' << tokens << ','
          << accuracy[d].back() << '\n';
      show_progress(++done, all);
    }
  }
  if (!arguments.csv.empty()) write_text(arguments.csv, csv.str());
  if (arguments.png.empty()) return;
  HeatOptions options;
  options.low = 0;
  options.high = 1;
  heat_map(arguments.png, "Pass-key retrieval", "context length (tokens)", "depth of the key",
           accuracy, rows, columns, "accuracy", options);
}

template <class Engine>
void run_lambada(const Arguments& arguments) {
  Engine engine = open_engine<Engine>(arguments);
  const Tokenizer tokenizer = open_tokenizer(arguments);
  std::vector<std::string> lines;
  std::istringstream file(read_file(arguments.data));
  for (std::string line; std::getline(file, line);)
    if (line.find_first_not_of(" \t\r") != std::string::npos) lines.push_back(line);
  if (lines.empty())
    fail("--data: ", arguments.data, ": expected a JSON object a line, found none");
  if (arguments.limit > 0 && static_cast<std::size_t>(arguments.limit) < lines.size())
    lines.resize(static_cast<std::size_t>(arguments.limit));
  LambadaScore score;
  for (std::size_t i = 0; i < lines.size(); ++i) {
    const std::string where = "--data: " + arguments.data + ": example " + std::to_string(i + 1);
    const Json example = parse_json(lines[i], where);
    const auto text = example.is_object() ? example.find("text") : example.end();
    if (text == example.end() || !text->is_string())
      fail(where, ": expected an object with a string \"text\"");
    try {
      lambada(engine, tokenizer, text->get<std::string>(), score);
    } catch (const std::runtime_error& error) {
      fail(where, ": ", error.what());
    }
    show_progress(static_cast<Index>(i) + 1, static_cast<Index>(lines.size()));
  }
  std::cout << " examples  accuracy  perplexity\n"
            << std::setw(9) << score.examples << std::fixed << std::setprecision(4) << std::setw(10)
            << score.accuracy() << std::setprecision(3) << "  " << std::setw(10)
            << score.perplexity() << "\n";
}

/// Pictures and numbers of one layer, into the folder --out.
inline void run_inspect(const Arguments& arguments) {
  check_delta_ratio(arguments.delta_ratio);
  const Config config = open_config(arguments);
  if (arguments.layer >= config.n_layer)
    fail("--layer: expected 0 to ", config.n_layer - 1, ", found ", arguments.layer);
  const Tokenizer tokenizer = open_tokenizer(arguments);
  const std::string prompt = arguments.prompt == "-" ? read_file("-") : arguments.prompt;
  const std::vector<Token> ids = tokenizer.encode(prompt);
  if (ids.empty()) fail("--prompt: expected at least one token, found none");
  check_ids(ids, config, "--prompt: tokenizer and model do not match");
  const auto L = static_cast<std::int64_t>(ids.size());
  const std::int64_t channels = config.version == 1 ? config.d_inner : config.n_heads;
  const auto most = static_cast<std::int64_t>(std::sqrt((1 << 28) / channels));
  if (L > most)
    fail("--prompt: expected at most ", most, " tokens, so that the ", channels,
         " matrices of the layer stay below 1 GiB, found ", L);
  auto model = load_model<ssm::Model<float>>(read_checkpoint(arguments.model), config);
  model.sizes.n_layer = arguments.layer + 1;  // those above do not matter
  std::error_code error;
  std::filesystem::create_directories(arguments.out, error);
  if (error) fail("cannot write: ", arguments.out, ": ", error.message());
  const std::string out = arguments.out + "/";
  for (const std::string name : {"attention", "delta", "memory", "state_norm"})
    check_writable(out + name + ".safetensors"), check_writable(out + name + ".png");

  const auto view = [](const char* name, const Matrix<float>& m) {
    return tensor_view(name, {m.rows(), m.cols()}, m.data());
  };
  AtomicFile file(out + "attention.safetensors");
  Matrix<float> mean = Matrix<float>::Zero(L, L), like_x(L, config.d_inner);
  write_safetensors_header(file,
                           {{"M", DType::F32, {channels, L, L}, nullptr, nullptr},
                            view("attention", mean),
                            view("x", like_x),
                            view("y", like_x)},
                           {});
  const Inspection seen = inspect(
      model, ids, arguments.layer, arguments.delta_ratio, [&](Index c, const Matrix<float>& M) {
        file.write({reinterpret_cast<const char*>(M.data()),
                    static_cast<std::size_t>(M.size()) * sizeof(float)});
        mean += M.cwiseAbs() / static_cast<float>(channels);
        show_progress(c + 1, channels);
      });
  for (const Tensor& tensor : {view("attention", mean), view("x", seen.x), view("y", seen.y)})
    file.write(tensor.bytes());
  file.commit();
  write_safetensors(out + "delta.safetensors",
                    {view("delta", seen.delta), tensor_view("ids", {L}, ids.data())});
  write_safetensors(out + "memory.safetensors", {view("memory", seen.memory)});
  write_safetensors(out + "state_norm.safetensors",
                    {tensor_view("state_norm", {L}, seen.state_norm.data())});

  const std::vector<std::string> tokens = token_labels(tokenizer, ids);
  std::string layer = "layer " + std::to_string(arguments.layer);
  if (arguments.delta_ratio != 1) layer += ", delta ratio " + tick_label(arguments.delta_ratio);
  draw_delta(out + "delta.png", seen, layer, tokens);
  draw_memory(out + "memory.png", seen, layer);
  draw_state_norm(out + "state_norm.png", seen, layer, tokens);
  draw_attention(out + "attention.png", mean, layer, tokens);
}

inline void run_tokenize(const Arguments& arguments) {
  const Tokenizer tokenizer = open_tokenizer(arguments);
  for (std::string line; std::getline(std::cin, line);) {
    if (arguments.decode) {
      const std::vector<Token> ids = parse_ids(line, "standard input");
      for (const Token id : ids)
        if (static_cast<std::size_t>(id) >= tokenizer.vocab_size())
          fail("standard input: expected token ids below ", tokenizer.vocab_size(), ", found ", id);
      std::cout << tokenizer.decode(ids) << "\n";
    } else {
      const std::vector<Token> ids = tokenizer.encode(line);
      for (std::size_t i = 0; i < ids.size(); ++i) std::cout << (i ? " " : "") << ids[i];
      std::cout << "\n";
    }
  }
  if (std::cin.bad()) fail("cannot read: standard input");
}

inline void run_info(const Arguments& arguments) {
  const Config c = read_config(arguments.model);
  const Checkpoint checkpoint = read_checkpoint(arguments.model);
  std::map<std::string, std::size_t> dtypes;
  std::size_t parameters = 0, bytes = 0;
  for (const auto& [name, tensor] : checkpoint.tensors) {
    parameters += tensor.size();
    bytes += tensor.byte_size();
    dtypes[dtype_name(tensor.dtype)] += tensor.size();
  }
  std::cout << "model        " << (c.version == 1 ? "Mamba" : "Mamba-2") << ", " << checkpoint.where
            << "\n"
            << "d_model      " << c.d_model << "\nn_layer      " << c.n_layer << "\nvocab_size   "
            << c.vocab_size << "\nd_inner      " << c.d_inner << "\nd_state      " << c.d_state
            << "\nd_conv       " << c.d_conv << "\n";
  if (c.version == 1)
    std::cout << "dt_rank      " << c.dt_rank << "\n";
  else
    std::cout << "n_heads      " << c.n_heads << "\nhead_dim     " << c.head_dim
              << "\nn_groups     " << c.n_groups << "\n";
  std::cout << "head         " << (c.tie_embeddings ? "tied to the embedding" : "its own") << "\n"
            << "parameters   " << parameters << "\nbytes        " << bytes << "\ndtypes      ";
  for (const auto& [name, count] : dtypes) std::cout << " " << name << " (" << count << ")";
  const Index state = c.n_layer * ((c.d_conv - 1) * c.conv_width() + c.d_inner * c.d_state);
  std::cout << "\nstate        " << state * 4 << " bytes a sequence, at any length\n";
}

/// Writes the model in the Hugging Face layout, with its tokenizer if there is one.
inline void run_convert(const Arguments& arguments) {
  namespace fs = std::filesystem;
  Config config = read_config(arguments.model);
  const Checkpoint checkpoint = read_checkpoint(arguments.model);
  check_size(checkpoint, config);
  std::vector<Tensor> tensors;
  const Tensor* head = checkpoint.find("lm_head.weight");
  config.tie_embeddings =
      config.tie_embeddings &&
      (!head || same_values(*head, weight(checkpoint, "backbone.embeddings.weight",
                                          {config.vocab_size, config.d_model}, true)));
  for_each_shape(config, [&](const std::string& name, const std::vector<std::int64_t>& shape) {
    Tensor tensor = weight(checkpoint, name, shape, config.tie_embeddings);
    if (!arguments.dtype.empty()) tensor = to_dtype(tensor, parse_dtype(arguments.dtype));
    tensor.name = name;
    if (shape[0] == config.vocab_size) tensor.shape[0] = config.vocab_size;  // without the padding
    tensors.push_back(tensor);
  });
  std::error_code error;
  fs::create_directories(arguments.out, error);
  if (error) fail("cannot write: ", arguments.out, ": ", error.message());
  write_safetensors(arguments.out + "/model.safetensors", tensors, {{"format", "pt"}});
  write_config(arguments.out, config);
  if (fs::exists(arguments.model + "/tokenizer.json")) {
    AtomicFile file(arguments.out + "/tokenizer.json");
    file.write(MappedFile(arguments.model + "/tokenizer.json").bytes());
    file.commit();
  }
}

/// A check for CLI11: a whole number, not below `least`.
inline CLI::Validator at_least(Index least) {
  return CLI::Validator(
      [least](const std::string& text) -> std::string {
        std::uint64_t value = 0;
        const char* end = text.data() + text.size();
        const auto [rest, error] = std::from_chars(text.data(), end, value);
        const bool good =
            error == std::errc() && rest == end && value >= static_cast<std::uint64_t>(least);
        return good ? ""
                    : "expected a whole number from " + std::to_string(least) + ", found " + text;
      },
      "");
}

/// A check for CLI11: a number from 0 to 1.
inline CLI::Validator a_part() {
  return CLI::Validator(
      [](const std::string& text) -> std::string {
        char* end = nullptr;
        const double value = std::strtod(text.c_str(), &end);
        const bool good = !text.empty() && *end == 0 && value >= 0 && value <= 1;
        return good ? "" : "expected numbers from 0 to 1, found " + quote(text);
      },
      "");
}

template <class Engine>
void declare_commands(CLI::App& app, Arguments& a, std::function<void()>& action) {
  const auto command = [&](const char* name, const char* help, std::function<void()> run) {
    CLI::App* sub = app.add_subcommand(name, help);
    sub->callback([&action, run = std::move(run)] { action = run; });
    return sub;
  };
  const auto model = [&](CLI::App* sub) {
    sub->add_option("--model", a.model, "directory with config.json, weights and tokenizer.json");
  };
  const auto engine = [&](CLI::App* sub) {
    model(sub);
    sub->add_option("--dtype", a.dtype,
                    "storage of weights: f32, bf16, f16 (default: as in the file)");
    if (Engine::kHasDevice) sub->add_option("--device", a.device, "which GPU");
  };
  const auto delta_ratio = [&](CLI::App* sub) {
    sub->add_option("--delta-ratio", a.delta_ratio, "stretches every step of the state");
  };
  const auto table = [&](CLI::App* sub) {
    sub->add_option("--csv", a.csv, "also write the table here");
    sub->add_option("--png", a.png, "also draw it here");
  };
  const auto input = [&](CLI::App* sub, bool ids) {
    auto* group = sub->add_option_group("input", "the text, one of");
    auto* text = group->add_option("--text", a.texts,
                                   ids ? "a text file, - for standard input"
                                       : "text files, each a document; - for standard input");
    if (ids) text->expected(1);
    group->add_option("--ids-file", a.ids_file, "a file of token ids, - for standard input");
    if (ids) group->add_option("--ids", a.ids, "token ids");
    group->require_option(1);
  };
  const auto mode = [&](CLI::App* sub) {
    sub->add_option("--mode", a.mode, "parallel, recurrent or chunked=K");
  };

  auto* generate = command("generate", "continue a text", [&a] { run_generate<Engine>(a); });
  engine(generate);
  delta_ratio(generate);
  auto* prompt = generate->add_option("prompt,--prompt", a.prompt,
                                      "the text to continue, - for standard input");
  generate
      ->add_option("--prompt-file", a.prompt_file,
                   "several prompts, one a line, - for standard input")
      ->excludes(prompt);
  generate->add_option("-n", a.n, "tokens to add at most")->check(at_least(0));
  generate->add_option("--temperature", a.sampler.temperature, "0 is greedy");
  generate->add_option("--top-k", a.sampler.top_k, "keep the k likeliest tokens, 0: all");
  generate->add_option("--top-p", a.sampler.top_p, "keep the likeliest tokens that make up p");
  generate->add_option("--min-p", a.sampler.min_p,
                       "keep tokens at least p times as likely as the likeliest");
  generate->add_option("--repetition-penalty", a.sampler.repetition_penalty,
                       "above 1: less repetition");
  generate->add_option("--seed", a.sampler.seed, "same seed, same text")->check(at_least(0));
  generate->add_option("--batch", a.batch, "so many continuations of each prompt")
      ->check(at_least(1));
  generate->add_option("--save-state", a.save_state, "where to leave the state, to go on later");
  generate->add_option("--load-state", a.load_state, "go on from a saved state");
  generate->add_flag("--ids", a.print_ids, "print token ids, one line a sequence, instead of text");
  generate->add_flag("--ignore-eos", a.ignore_eos, "go on after the end-of-text token");

  auto* logits = command("logits", "write the logits of every position", [&a] {
    const Mode mode = parse_mode(a.mode);
    check_writable(a.out);
    Engine e = open_engine<Engine>(a);
    write_logits(e, documents(a, e.config())[0].ids, mode, a.out);
  });
  engine(logits);
  delta_ratio(logits);
  input(logits, true);
  mode(logits);
  logits->add_option("--out", a.out, "the safetensors file to write")->required();

  auto* ppl = command("perplexity", "perplexity of a text, against context length",
                      [&a] { run_perplexity<Engine>(a); });
  engine(ppl);
  input(ppl, false);
  mode(ppl);
  ppl->add_option("--delta-ratio", a.delta_ratios,
                  "stretches every step of the state; several, separated by commas")
      ->delimiter(',');
  auto* lengths = ppl->add_option("--lengths", a.lengths,
                                  "context lengths, separated by commas (default: the whole text)")
                      ->delimiter(',')
                      ->check(at_least(1));
  auto* stride = ppl->add_option("--stride", a.stride,
                                 "tokens from window to window (default: no overlap; each "
                                 "token is then read length / stride times)")
                     ->check(at_least(1));
  auto* carry =
      ppl->add_flag("--carry-state", a.carry_state, "each window goes on from the one before");
  ppl->add_flag("--truncate", a.truncate,
                "of each document only the first tokens, one window of each length")
      ->needs(lengths)
      ->excludes(stride)
      ->excludes(carry);
  table(ppl);

  auto* passkey =
      command("passkey", "find a number hidden in a long text", [&a] { run_passkey<Engine>(a); });
  engine(passkey);
  delta_ratio(passkey);
  passkey->add_option("--lengths", a.lengths, "tokens of the prompt, separated by commas")
      ->delimiter(',')
      ->check(at_least(1))
      ->required();
  passkey->add_option("--depths", a.depths, "where the number stands, 0 at the start, 1 at the end")
      ->delimiter(',')
      ->check(a_part());
  passkey->add_option("--tests", a.tests, "prompts of each length and depth")->check(at_least(1));
  passkey->add_option("--seed", a.sampler.seed, "same seed, same numbers")->check(at_least(0));
  table(passkey);

  auto* lambada =
      command("lambada", "guess the last word (lambada_openai)", [&a] { run_lambada<Engine>(a); });
  engine(lambada);
  delta_ratio(lambada);
  lambada
      ->add_option("--data", a.data,
                   "a file with a JSON object {\"text\": ...} a line, - for standard input")
      ->required();
  lambada->add_option("--limit", a.limit, "only so many examples, 0: all")->check(at_least(0));

  auto* inspect =
      command("inspect", "draw what a layer's scan does with a text", [&a] { run_inspect(a); });
  model(inspect);
  delta_ratio(inspect);
  inspect->add_option("prompt,--prompt", a.prompt, "the text, - for standard input")->required();
  inspect->add_option("--layer", a.layer, "which layer, from 0")->check(at_least(0));
  inspect->add_option("--out", a.out, "the folder to write into")->required();

  auto* tokenize =
      command("tokenize", "standard input to token ids, line by line", [&a] { run_tokenize(a); });
  model(tokenize);
  tokenize->add_flag("--decode", a.decode, "token ids to text");

  model(command("info", "sizes of a model", [&a] { run_info(a); }));

  auto* convert =
      command("convert", "write a model in the Hugging Face layout", [&a] { run_convert(a); });
  model(convert);
  convert->add_option("--dtype", a.dtype, "f32, bf16 or f16 (default: as in the file)");
  convert->add_option("--out", a.out, "the directory to write")->required();

  auto* bench = command("bench", "measure speed on random weights", [&a] {
    if (!a.dtype.empty()) a.bench.dtype = parse_dtype(a.dtype);
    a.bench.device = a.device;
    Engine::bench(a.bench);
  });
  bench->add_option("op", a.bench.op, Engine::kBenchOps)->required();
  bench->add_option("--shape", a.bench.shape,
                    "a published size: 130m .. 2.8b, mamba2-130m .. mamba2-2.7b");
  bench->add_option("--length", a.bench.length, "tokens of a prefill")->check(at_least(1));
  bench->add_option("--batch", a.bench.batch, "sequences at once")->check(at_least(1));
  bench->add_option("--repeat", a.bench.repeat, "measurements, of which the median is printed")
      ->check(at_least(1));
  bench->add_option("--dtype", a.dtype, "storage of weights: f32, bf16, f16");
  if (Engine::kHasDevice) bench->add_option("--device", a.device, "which GPU");
}

/// The whole of main: `mamba "Once upon a time"` is short for `mamba generate "Once upon a time"`.
template <class Engine>
int run(int argc, char** argv) {
  take_standard_numbers();
  std::ios::sync_with_stdio(false);
  CLI::App app("Mamba and Mamba-2: " + std::string(Engine::kDescription), Engine::kName);
  app.require_subcommand(1);
  app.option_defaults()->always_capture_default();  // --help shows them
  Arguments arguments;
  std::function<void()> action;
  declare_commands<Engine>(app, arguments, action);
  try {
    std::vector<std::string> words(argv + 1, argv + argc);
    bool named = words.empty() || words[0] == "-h" || words[0] == "--help";
    for (const CLI::App* sub : app.get_subcommands({}))
      named = named || words[0] == sub->get_name();
    if (!named) words.insert(words.begin(), "generate");
    std::reverse(words.begin(), words.end());  // as CLI11 wants them
    app.parse(words);
  } catch (const CLI::CallForHelp& help) {
    return app.exit(help);
  } catch (const CLI::ParseError& error) {
    std::cerr << Engine::kName << ": " << error.what() << "; --help shows the usage\n";
    return 2;
  }
  try {
    action();
    if (!std::cout.flush()) fail("cannot write to standard output");
    return 0;
  } catch (const UsageError& error) {
    std::cerr << Engine::kName << ": " << error.what() << "\n";
    return 2;
  } catch (const std::bad_alloc&) {
    std::cerr << Engine::kName << ": out of memory\n";
  } catch (const std::exception& error) {
    std::cerr << Engine::kName << ": " << error.what() << "\n";
  }
  return 1;
}

}  // namespace mamba
