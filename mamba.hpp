// mamba.hpp - the small loader and generator that mamba.cpp and mamba.cu share.
//
//   1. Config         config.json of both published layouts
//   2. Weights        the one table {name, shape, destination} that loads a model
//   3. Sampler        greedy, temperature, top-k, top-p, min-p, repetition penalty
//   4. Sequences      walking a text in pieces; generation; saving and loading the state
//   5. Scoring        logits to a file, perplexity, continuations and choices
//   6. Inspection     what one layer's scan does with a text
//   7. Command line   one struct a subcommand
//
// What a program brings is an Engine, a class with
//   Engine(const Checkpoint&, const Config&, const EngineOptions&)
//   config()                      the Config
//   State, new_state()            what is remembered of one text; before the first token (zeros)
//   to_host(state), from_host(s)  the same as ssm::State<float>, for files
//   prefill(state, ids, L)        takes 0 < L <= kPiece tokens, returns the logits after the last
//   forward(state, ids, L, sink)  the same; calls sink(first, logits) for all positions, in order
//   generate(sequences, options, on_token)   section 4; or generate_on_host does it
//   kPiece, kBatch                the most tokens for forward, the most sequences for generate
//   kName, kDescription, kHasDevice          for the command line
#pragma once

#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <array>
#include <charconv>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdint>
#include <cstring>
#include <deque>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iomanip>
#include <iostream>
#include <limits>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>
#include <random>
#include <set>
#include <sstream>
#include <string>
#include <string_view>
#include <thread>
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
#include <stb/stb_image_write.h>
#pragma GCC diagnostic pop

namespace mamba {

using ssm::Index;
using ssm::Matrix;

// =======================================================================================
// 1. Config
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
  bool attention_in_bias = true, attention_out_bias = true;  // in_proj, out_proj of attention
  bool residual_in_fp32 = true;            // what the file says; the stream is float32 here
  Token bos_token_id = 0;                  // -1: none
  std::vector<Token> eos_token_ids = {0};  // each ends a text
  Json token_ids = Json::object();         // what the file says of bos, eos and pad, for convert

  /// Numbers that layer l remembers of a text, whatever its length; with attention there come
  /// 2 * attention.kv_width() for every token.
  Index state_size(Index l) const {
    if (attends(l)) return attention.in_proj_width() * std::max<Index>(0, attention.d_conv - 1);
    return d_inner * d_state + conv_width() * (d_conv - 1);
  }
  /// What the Hugging Face layout has no words for.
  bool original_only() const {
    return !attention_layers.empty() || d_intermediate > 0 || !rms_norm;
  }
};

// No size may exceed its limit, so that products of sizes stay far below 2^63.
constexpr std::int64_t kMaxWidth = 1 << 20, kMaxLayers = 1 << 16, kMaxVocab = 1 << 28;

/// A size in config.json: its name in the Hugging Face and in the original layout; in each, the
/// default of Mamba and of Mamba-2. 0: no such size.
struct SizeField {
  Index Config::*member;
  const char* names[2];
  Index defaults[2][2];
  std::int64_t most;
};
inline const SizeField kSizeFields[] = {
    {&Config::d_model, {"hidden_size", "d_model"}, {{768, 4096}, {2560, 2560}}, kMaxWidth},
    {&Config::n_layer, {"num_hidden_layers", "n_layer"}, {{32, 64}, {64, 64}}, kMaxLayers},
    {&Config::vocab_size,
     {"vocab_size", "vocab_size"},
     {{50280, 32768}, {50277, 50277}},
     kMaxVocab},
    {&Config::d_state, {"state_size", "d_state"}, {{16, 128}, {16, 128}}, kMaxWidth},
    {&Config::d_conv, {"conv_kernel", "d_conv"}, {{4, 4}, {4, 4}}, kMaxWidth},
    {&Config::n_heads, {"num_heads", ""}, {{0, 128}, {0, 0}}, kMaxWidth},
    {&Config::head_dim, {"head_dim", "headdim"}, {{0, 64}, {0, 64}}, kMaxWidth},
    {&Config::n_groups, {"n_groups", "ngroups"}, {{0, 8}, {0, 1}}, kMaxWidth},
    {&Config::chunk, {"chunk_size", "chunk_size"}, {{0, 256}, {0, 256}}, kMaxWidth}};

/// The same for what is true or false. Defaults are those of Config.
struct FlagField {
  bool Config::*member;
  const char* names[2];
};
inline const FlagField kFlagFields[] = {
    {&Config::tie_embeddings, {"tie_word_embeddings", "tie_embeddings"}},
    {&Config::use_bias, {"use_bias", "bias"}},
    {&Config::use_conv_bias, {"use_conv_bias", "conv_bias"}},
    {&Config::residual_in_fp32, {"residual_in_fp32", "residual_in_fp32"}}};

/// Python writes Infinity, -Infinity and NaN where JSON has no word for them: outside of
/// strings, put them in quotes.
inline std::string quote_bare_floats(std::string_view text) {
  std::string json;
  for (std::size_t i = 0, n = 1; i < text.size(); i += n, n = 1) {  // n: length of the token at i
    bool bare = false;
    if (text[i] == '"') {
      while (i + n < text.size() && text[i + n] != '"') n += text[i + n] == '\\' ? 2 : 1;
      ++n;
    } else {
      for (const std::string_view word : {"-Infinity", "Infinity", "NaN"})
        if (!bare && text.substr(i, word.size()) == word) n = word.size(), bare = true;
    }
    json += bare ? '"' + std::string(text.substr(i, n)) + '"' : text.substr(i, n);
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
  Json value(const char* key, const Json& absent) const { return find(key) ? *find(key) : absent; }
  [[noreturn]] void wrong(const char* key, const std::string& expected) const {
    const Json found = object.contains(key) ? object[key] : Json();
    fail("bad config: ", where, ": ", key, ": expected ", expected, ", found ",
         quote(found.dump(-1, ' ', true, Json::error_handler_t::replace)));
  }
  std::int64_t integer(const char* key, std::int64_t absent, std::int64_t low = 1,
                       std::int64_t high = kMaxWidth) const {
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
  /// A number, where Infinity may be a word or {"__float__": "Infinity"}.
  double number(const char* key, const Json& value) const {
    const Json& plain = value.contains("__float__") ? value["__float__"] : value;
    if (plain == "Infinity") return std::numeric_limits<double>::infinity();
    if (!plain.is_number()) wrong(key, "a number");
    return plain.get<double>();
  }
  /// A token id or a list of them; null and -1 are none.
  std::vector<Token> tokens(const char* key) const {
    const Json ids = value(key, Json::array());
    std::vector<Token> found;
    for (const Json& each : ids.is_array() ? ids : Json::array({ids})) {
      const Json one = {{key, each}};
      const std::int64_t id = Fields{one, where}.integer(key, -1, -1, kMaxVocab);
      if (id >= 0) found.push_back(static_cast<Token>(id));
    }
    return found;
  }
};

/// Fails where a model of these layouts is one that is not computed here. (norm_before_gate means
/// nothing in the Hugging Face layout: transformers ignores it; Mamba-Codestral-7B has it wrong.)
inline void refuse_others(const Fields& fields, bool original, const Config& c) {
  const Json act = fields.value("hidden_act", "silu");
  if (act != "silu" && act != "swish") fields.wrong("hidden_act", "silu");
  for (const auto& [key, computed] : std::map<const char*, Json>{{"rms_norm", true},
                                                                 {"rmsnorm", true},
                                                                 {"norm_before_gate", false},
                                                                 {"D_has_hdim", false},
                                                                 {"d_ssm", c.d_inner}})
    if (original != (key == std::string("rms_norm")) && fields.value(key, computed) != computed)
      fields.wrong(key, computed.dump());
  if (!(c.norm_eps > 0 && c.norm_eps < 1))
    fields.wrong("layer_norm_epsilon", "a number between 0 and 1");
  if (c.version == 2 && c.d_inner != c.n_heads * c.head_dim)
    fail("bad config: ", fields.where, ": expected heads * head_dim = d_inner = ", c.d_inner,
         ", found ", c.n_heads, " * ", c.head_dim);
  if (c.version == 2 && c.n_heads % c.n_groups != 0)
    fail("bad config: ", fields.where, ": groups: expected a divisor of the ", c.n_heads,
         " heads, found ", c.n_groups);
}

/// What is derived from other sizes where the file does not say, and the limits of delta.
inline void read_widths(const Fields& fields, bool original, Config& c) {
  const double d_inner = std::floor(fields.number("expand", fields.value("expand", 2)) *
                                    static_cast<double>(c.d_model));
  if (!(d_inner >= 1 && d_inner <= kMaxWidth))
    fields.wrong("expand", "a factor that makes 1 to " + std::to_string(kMaxWidth) + " channels");
  c.d_inner = static_cast<Index>(d_inner);
  if (c.version == 1) {
    const char* rank = original ? "dt_rank" : "time_step_rank";
    const bool automatic = fields.value(rank, "auto") == "auto";
    c.dt_rank = automatic ? (c.d_model + 15) / 16 : fields.integer(rank, 0);  // ceil(D / 16)
    if (!original) c.d_inner = fields.integer("intermediate_size", c.d_inner);
    return;
  }
  if (original) c.n_heads = c.d_inner / c.head_dim;
  const char* limit = original ? "dt_limit" : "time_step_limit";
  const Json pair = fields.value(limit, {0, "Infinity"});
  if (!pair.is_array() || pair.size() != 2) fields.wrong(limit, "two numbers");
  c.dt_min = fields.number(limit, pair[0]);
  c.dt_max = fields.number(limit, pair[1]);
  if (!(0 <= c.dt_min && c.dt_min <= c.dt_max)) fields.wrong(limit, "0 <= low <= high");
}

/// The layers with attention, and attn_cfg: names and defaults of the original's MHA.
inline void read_attention(const Fields& fields, Config& c) {
  const Json layers = fields.value("attn_layer_idx", Json::array());
  if (!layers.is_array()) fields.wrong("attn_layer_idx", "an array of layers");
  for (const Json& layer : layers) {
    if (!layer.is_number_integer() || layer < 0 || layer >= c.n_layer)
      fields.wrong("attn_layer_idx", "layers below " + std::to_string(c.n_layer));
    c.attention_layers.push_back(layer.get<Index>());
  }
  std::sort(c.attention_layers.begin(), c.attention_layers.end());
  if (c.attention_layers.empty()) return;
  const Json object = fields.value("attn_cfg", Json::object());
  if (!object.is_object()) fields.wrong("attn_cfg", "an object");
  const Fields attn{object, fields.where + ": attn_cfg"};
  for (const auto& [key, computed] : std::map<const char*, Json>{{"causal", true},
                                                                 {"mlp_dim", 0},
                                                                 {"softmax_scale", nullptr},
                                                                 {"rotary_emb_interleaved", false}})
    if (attn.value(key, key == std::string("causal") ? Json(false) : computed) != computed)
      attn.wrong(key, computed.is_null() ? "none" : computed.dump());
  ssm::AttentionSizes& a = c.attention;
  a.n_heads = attn.integer("num_heads", 0);
  if (a.n_heads == 0) attn.wrong("num_heads", "the number of heads");
  a.n_kv_heads = attn.integer("num_heads_kv", a.n_heads);
  a.head_dim = attn.integer("head_dim", c.d_model / a.n_heads);
  a.d_conv = attn.integer("d_conv", 0, 0);
  a.rotary_dim = attn.integer("rotary_emb_dim", 0, 0);
  a.rotary_base = attn.number("rotary_emb_base", attn.value("rotary_emb_base", a.rotary_base));
  c.attention_in_bias = attn.flag("qkv_proj_bias", true);
  c.attention_out_bias = attn.flag("out_proj_bias", true);
  if (a.n_heads % a.n_kv_heads != 0)
    attn.wrong("num_heads_kv", "a divisor of the " + std::to_string(a.n_heads) + " heads");
  if (a.head_dim == 0 || (!attn.find("head_dim") && c.d_model % a.n_heads != 0))
    attn.wrong("num_heads", "a divisor of d_model = " + std::to_string(c.d_model));
  if (a.in_proj_width() > 3 * kMaxWidth)
    attn.wrong("head_dim", "at most " + std::to_string(kMaxWidth) + " numbers in all heads");
  if (a.rotary_dim % 2 != 0 || a.rotary_dim > a.head_dim)
    attn.wrong("rotary_emb_dim", "an even number up to " + std::to_string(a.head_dim));
  if (!(a.rotary_base > 0 && std::isfinite(a.rotary_base)))
    attn.wrong("rotary_emb_base", "a number above 0");
}

/// The config in either layout. What belongs to one block is in the original's ssm_cfg.
inline Config config_from_json(Json json, bool original, const std::string& path) {
  const Fields fields{json, path};
  const Json block = fields.value("ssm_cfg", Json::object());
  if (original && !block.is_object()) fields.wrong("ssm_cfg", "an object");
  if (original) json.update(block);
  const char* key = original ? "layer" : "model_type";
  const std::string names[] = {original ? "Mamba1" : "mamba", original ? "Mamba2" : "mamba2"};
  const Json type = fields.value(key, original ? "Mamba1" : "");
  if (type != names[0] && type != names[1]) fields.wrong(key, names[0] + " or " + names[1]);

  Config c;
  c.version = type == names[0] ? 1 : 2;
  for (const SizeField& size : kSizeFields)
    if (const Index absent = size.defaults[original][c.version - 1])
      c.*size.member = fields.integer(size.names[original], absent, 1, size.most);
  c.tie_embeddings = original || c.version == 1;
  for (const FlagField& flag : kFlagFields)
    c.*flag.member = fields.flag(flag.names[original], c.*flag.member);
  if (!original)
    c.norm_eps =
        fields.number("layer_norm_epsilon", fields.value("layer_norm_epsilon", c.norm_eps));
  read_widths(fields, original, c);
  if (original) {
    c.rms_norm = fields.flag("rms_norm", true);
    c.d_intermediate = (fields.integer("d_intermediate", 0, 0) + 127) / 128 * 128;  // as GatedMLP
    read_attention(fields, c);
  }
  const int end = original || c.version == 1 ? 0 : 2;
  c.token_ids = {{"bos_token_id", 0}, {"eos_token_id", end}, {"pad_token_id", end}};
  for (auto& [name, ids] : c.token_ids.items()) ids = json.value(name, ids);
  const std::vector<Token> bos = Fields{c.token_ids, path}.tokens("bos_token_id");
  c.bos_token_id = bos.empty() ? -1 : bos[0];
  c.eos_token_ids = Fields{c.token_ids, path}.tokens("eos_token_id");
  refuse_others(fields, original, c);
  return c;
}

/// A file of settings, as Python writes them: one object.
inline Json read_settings(const std::string& path) {
  const Json json = parse_json(quote_bare_floats(MappedFile(path).bytes()), path);
  if (!json.is_object()) fail("bad config: ", path, ": expected an object");
  return json;
}

/// A config.json in either layout.
inline Config parse_config(const std::string& path) {
  const Json json = read_settings(path);
  const bool original = json.contains("d_model") && !json.contains("hidden_size");
  if (!original && !json.contains("model_type"))
    fail("bad config: ", path, ": expected model_type (Hugging Face) or d_model (original), ",
         "found neither");
  return config_from_json(json, original, path);
}

/// The same of a model's folder.
inline Config read_config(const std::string& directory) {
  const std::string path = directory + "/config.json";
  const bool there = ::access(path.c_str(), F_OK) == 0;
  if (const std::string what = there ? "" : what_folder_is(directory); !what.empty())
    fail("no model: ", directory, ": found ", what);
  return parse_config(path);
}

inline void write_text(const std::string& path, std::string_view text) {
  AtomicFile file(path);
  file.write(text);
  file.commit();
}

/// The original layout's words for it.
inline Json original_config(const Config& c) {
  const ssm::AttentionSizes& a = c.attention;
  Json json = {{"d_model", c.d_model},
               {"n_layer", c.n_layer},
               {"vocab_size", c.vocab_size},
               {"pad_vocab_size_multiple", 1},
               {"d_intermediate", c.d_intermediate},
               {"attn_layer_idx", c.attention_layers},
               {"rms_norm", c.rms_norm},
               {"residual_in_fp32", c.residual_in_fp32},
               {"tie_embeddings", c.tie_embeddings}};
  Json block = {{"layer", c.version == 1 ? "Mamba1" : "Mamba2"},
                {"expand", static_cast<double>(c.d_inner) / static_cast<double>(c.d_model)},
                {"bias", c.use_bias},
                {"conv_bias", c.use_conv_bias}};
  for (const SizeField& size : kSizeFields)
    if (size.defaults[1][c.version - 1] && !json.contains(size.names[1]))
      block[size.names[1]] = c.*size.member;
  if (c.version == 1) block["dt_rank"] = c.dt_rank;
  if (std::isfinite(c.dt_max)) block["dt_limit"] = {c.dt_min, c.dt_max};
  json["ssm_cfg"] = block;
  if (!c.attention_layers.empty())
    json["attn_cfg"] = {{"causal", true},
                        {"num_heads", a.n_heads},
                        {"num_heads_kv", a.n_kv_heads},
                        {"head_dim", a.head_dim},
                        {"d_conv", a.d_conv},
                        {"rotary_emb_dim", a.rotary_dim},
                        {"rotary_emb_base", a.rotary_base},
                        {"qkv_proj_bias", c.attention_in_bias},
                        {"out_proj_bias", c.attention_out_bias}};
  for (const auto& [name, ids] : c.token_ids.items()) json[name] = ids;
  return json;
}

/// DIR/config.json in the Hugging Face layout, or where that has no words for the model, in the
/// original one. Fails where neither has.
inline std::string config_text(const Config& c) {
  if (c.original_only()) return original_config(c).dump(2) + "\n";
  if (c.d_inner % c.d_model != 0)
    fail("cannot write: config.json: expand: this layout knows whole numbers only, found ",
         c.d_inner, " / ", c.d_model);
  const bool two = c.version == 2;
  nlohmann::ordered_json json = {
      {"architectures", {two ? "Mamba2ForCausalLM" : "MambaForCausalLM"}},
      {"model_type", two ? "mamba2" : "mamba"},
      {"expand", c.d_inner / c.d_model},
      {"layer_norm_epsilon", c.norm_eps},
      {"hidden_act", "silu"}};
  for (const SizeField& size : kSizeFields)
    if (size.defaults[0][two]) json[size.names[0]] = c.*size.member;
  for (const FlagField& flag : kFlagFields) json[flag.names[0]] = c.*flag.member;
  if (!two) json.update({{"intermediate_size", c.d_inner}, {"time_step_rank", c.dt_rank}});
  if (c.dt_min > 0 || std::isfinite(c.dt_max)) {
    json["time_step_limit"] = {c.dt_min, c.dt_max};
    if (std::isinf(c.dt_max)) json["time_step_limit"][1] = {{"__float__", "Infinity"}};
  }
  for (const auto& [name, ids] : c.token_ids.items()) json[name] = ids;
  return json.dump(2) + "\n";
}
inline void write_config(const std::string& directory, const Config& c) {
  write_text(directory + "/config.json", config_text(c));
}

// =======================================================================================
// 2. Weights
// =======================================================================================

/// Those of a scan's block, and below of an attention block.
template <class Layer, class Visit>
void for_each_scan_weight(const Config& c, const std::string& mixer, Layer& w, const Visit& visit) {
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
template <class Layer, class Visit>
void for_each_attention_weight(const Config& c, const std::string& mixer, Layer& w,
                               const Visit& visit) {
  const ssm::AttentionSizes& a = c.attention;
  const Index width = a.in_proj_width();
  visit(mixer + "in_proj.weight", Shape{width, c.d_model}, w.in_proj);
  if (c.attention_in_bias) visit(mixer + "in_proj.bias", Shape{width}, w.in_proj_bias);
  if (a.d_conv > 0) {
    visit(mixer + "conv1d.weight", Shape{width, 1, a.d_conv}, w.conv_weight);
    visit(mixer + "conv1d.bias", Shape{width}, w.conv_bias);
  }
  visit(mixer + "out_proj.weight", Shape{c.d_model, a.q_width()}, w.out_proj);
  if (c.attention_out_bias) visit(mixer + "out_proj.bias", Shape{c.d_model}, w.out_proj_bias);
}

/// Calls visit(name, shape, destination) for every weight of the model, by its Hugging Face name.
/// The original layout differs in one name only, backbone.embedding.weight. Model: ssm::Model or
/// anything with the same members.
template <class Model, class Visit>
void for_each_weight(const Config& c, Model& model, const Visit& visit) {
  visit("backbone.embeddings.weight", Shape{c.vocab_size, c.d_model}, model.embedding);
  for (Index l = 0; l < c.n_layer; ++l) {
    auto& w = model.layers[l];
    const std::string layer = "backbone.layers." + std::to_string(l) + ".",
                      mixer = layer + "mixer.";
    visit(layer + "norm.weight", Shape{c.d_model}, w.norm);
    if (!c.rms_norm) visit(layer + "norm.bias", Shape{c.d_model}, w.norm_bias);
    c.attends(l) ? for_each_attention_weight(c, mixer, w, visit)
                 : for_each_scan_weight(c, mixer, w, visit);
    if (c.d_intermediate == 0) continue;
    visit(layer + "norm2.weight", Shape{c.d_model}, w.norm2);
    if (!c.rms_norm) visit(layer + "norm2.bias", Shape{c.d_model}, w.norm2_bias);
    visit(layer + "mlp.fc1.weight", Shape{2 * c.d_intermediate, c.d_model}, w.fc1);
    visit(layer + "mlp.fc2.weight", Shape{c.d_model, c.d_intermediate}, w.fc2);
  }
  visit("backbone.norm_f.weight", Shape{c.d_model}, model.norm_f);
  if (!c.rms_norm) visit("backbone.norm_f.bias", Shape{c.d_model}, model.norm_f_bias);
  if (!model.tied) visit("lm_head.weight", Shape{c.vocab_size, c.d_model}, model.lm_head);
}

/// The same list without a model: visit(name, shape).
template <class Visit>
void for_each_shape(const Config& config, const Visit& visit) {
  ssm::Model<float> no_model;
  no_model.layers.resize(config.n_layer);
  no_model.tied = config.tie_embeddings;
  for_each_weight(config, no_model, [&](const std::string& name, const auto& shape, const auto&) {
    visit(name, shape);
  });
}

/// The tensor of this name in either layout, saved with the head or by the backbone alone. Where
/// the two are tied, the head stands for an embedding that is not there.
inline const Tensor& find_weight(const Checkpoint& checkpoint, const std::string& name, bool tied) {
  const bool embedding = name == "backbone.embeddings.weight";
  for (const std::string& known : {embedding ? "backbone.embedding.weight" : name, name}) {
    if (const Tensor* tensor = checkpoint.find(known)) return *tensor;
    if (known.rfind("backbone.", 0) != 0) continue;
    if (const Tensor* tensor = checkpoint.find(known.substr(9))) return *tensor;
  }
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
  drop_pages(tensor);
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
  double numbers = 0;
  for (Index l = 0; l < c.n_layer; ++l) numbers += static_cast<double>(c.state_size(l));
  for_each_shape(c, [&](const std::string&, const std::vector<std::int64_t>& shape) {
    numbers += std::accumulate(shape.begin(), shape.end(), 1.0, std::multiplies<double>());
  });
  const double bytes = 4 * numbers;  // as floats
  const double most = std::max(64 * static_cast<double>(checkpoint.file_size), 0x1p26);
  if (checkpoint.file_size > 0 && bytes > most)
    fail("too large: ", checkpoint.where, ": config.json asks for ", bytes / 0x1p20,
         " MiB of weights and state, expected at most ", most / 0x1p20, " for a file of this size");
}

/// Whether the head is the embedding: config.json says so, and there is no other head in the file.
inline bool is_tied(const Checkpoint& checkpoint, const Config& c) {
  const std::vector<std::int64_t> shape = {c.vocab_size, c.d_model};
  if (!c.tie_embeddings || !checkpoint.find("lm_head.weight")) return c.tie_embeddings;
  return same_values(weight(checkpoint, "lm_head.weight", shape),
                     weight(checkpoint, "backbone.embeddings.weight", shape, true));
}

/// Model: ssm::Model<Scalar, Weight>. storage: dtype in which matrices are kept; as in the file
/// if not given. Warnings go to stderr.
template <class Model>
Model load_model(const Checkpoint& checkpoint, const Config& config,
                 std::optional<DType> storage = {}) {
  check_size(checkpoint, config);
  Model model;
  model.sizes = config;
  model.layers.resize(config.n_layer);
  model.tied = is_tied(checkpoint, config);
  if (model.tied != config.tie_embeddings)
    warn(checkpoint.where + ": lm_head.weight is not the embedding, as config.json has it: used");
  warn(non_finite(checkpoint));  // looks at every value, and is done before pages are dropped
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
  return model;
}

// --- adapters: LoRA (Hu et al. 2021), W + s B A with A (r, cols) and B (rows, r), as PEFT has it ---

/// Where an adapter's file has A or B of a weight. Those of an embedding lie there transposed, and
/// each by the other's name.
inline std::string lora_name(const std::string& weight, char factor) {
  const std::string module = "base_model.model." + weight.substr(0, weight.rfind(".weight"));
  if (weight == "backbone.embeddings.weight")
    return module + ".lora_embedding_" + (factor == 'A' ? "B" : "A");
  return module + ".lora_" + factor + ".weight";
}

/// That tensor as A or B.
inline Matrix<float> lora_factor(const Tensor& tensor) {
  if (tensor.shape.size() != 2)
    fail("wrong adapter: ", tensor.name, ": expected a matrix, found ", shape_text(tensor.shape));
  const auto numbers = values<float>(tensor);
  const Eigen::Map<const Matrix<float>> m(numbers.data(), tensor.shape[0], tensor.shape[1]);
  const bool transposed = tensor.name.find(".lora_embedding_") != std::string::npos;
  return transposed ? Matrix<float>(m.transpose()) : Matrix<float>(m);
}

/// lora_alpha of an adapter and whether s = alpha / sqrt(r) instead of alpha / r. What is not LoRA
/// itself is refused by name.
inline std::pair<double, bool> read_adapter_config(const std::string& folder) {
  const std::string path = folder + "/adapter_config.json";
  const Json json = read_settings(path);
  const Fields fields{json, path};
  if (fields.value("peft_type", "") != "LORA") fields.wrong("peft_type", "LORA");
  for (const auto& [key, plain] : std::map<const char*, Json>{{"bias", "none"},
                                                              {"fan_in_fan_out", false},
                                                              {"use_dora", false},
                                                              {"use_qalora", false},
                                                              {"use_bdlora", false},
                                                              {"lora_bias", false},
                                                              {"alpha_pattern", Json::object()}})
    if (fields.value(key, plain) != plain) fields.wrong(key, plain.dump());
  const Json start = fields.value("init_lora_weights", true);  // others change the base model
  if (!start.is_boolean() && start != "gaussian" && start != "orthogonal")
    fields.wrong("init_lora_weights", "true, gaussian or orthogonal");
  return {fields.number("lora_alpha", fields.value("lora_alpha", 8)),
          fields.flag("use_rslora", false)};
}

/// W + s B A in float32; a vocabulary may be padded.
inline Tensor adapted(const Tensor& W, const Matrix<float>& A, const Matrix<float>& B, double s,
                      bool by_token) {
  const bool fits = W.shape.size() == 2 && A.cols() == W.shape[1] && A.rows() == B.cols() &&
                    (B.rows() == W.shape[0] || (by_token && B.rows() < W.shape[0]));
  if (!fits)
    fail("wrong adapter: ", W.name, ": expected factors of ", shape_text(W.shape), ", found ",
         shape_text({B.rows(), B.cols()}), " and ", shape_text({A.rows(), A.cols()}));
  const auto sum = std::make_shared<std::vector<float>>(values<float>(W));
  Eigen::Map<Matrix<float>>(sum->data(), B.rows(), A.cols()) += float(s) * (B * A);
  return {W.name, DType::F32, W.shape, sum->data(), sum};
}

/// Adds the adapter in a folder to the weights of its base model. A tied head keeps the base's
/// values: from then on head and embedding are two.
inline void add_adapter(const std::string& folder, Config& config, Checkpoint& checkpoint) {
  const auto [alpha, by_root] = read_adapter_config(folder);
  const std::string path = folder + "/adapter_model.safetensors",
                    bin = folder + "/adapter_model.bin";
  const Checkpoint file = ::access(bin.c_str(), F_OK) == 0 && ::access(path.c_str(), F_OK) != 0
                              ? read_pytorch_bin(bin)
                              : read_safetensors(path);
  std::set<std::string> left;
  for (const auto& each : file.tensors) left.insert(each.first);
  std::vector<std::string> names = {"lm_head.weight"};
  for_each_shape(config, [&](const std::string& name, const auto&) { names.push_back(name); });
  for (const std::string& name : names) {
    const std::string a = lora_name(name, 'A'), b = lora_name(name, 'B');
    if (left.erase(a) + left.erase(b) == 0) continue;
    const Matrix<float> A = lora_factor(file.at(a)), B = lora_factor(file.at(b));
    const bool head = name == "lm_head.weight", by_token = head || name.find("embed") != name.npos;
    const double s = alpha / (by_root ? std::sqrt(A.rows()) : A.rows());
    const bool tied = by_token && is_tied(checkpoint, config);
    const Tensor& base = find_weight(checkpoint, tied ? "backbone.embeddings.weight" : name, tied);
    const Tensor W = base;
    if (tied) {  // no longer
      if (&base == checkpoint.find("lm_head.weight"))
        checkpoint.tensors["backbone.embeddings.weight"] = W;
      checkpoint.tensors["lm_head.weight"] = W;
      config.tie_embeddings = false;
    }
    const Tensor* place = &find_weight(checkpoint, name, false);
    for (auto& each : checkpoint.tensors)
      if (&each.second == place) each.second = adapted(W, A, B, s, by_token);
  }
  if (!left.empty())
    fail("wrong adapter: ", file.where, ": expected lora_A and lora_B of this model's weights, ",
         "found ", quote(*left.begin()));
}

/// Sizes of the published models, by the names they are known by; the rest is the package's
/// default. The two hybrids of Mamba-2's paper: nothing but attention and MLPs, as wide as a
/// Transformer's, and Mamba-2 with attention in six layers.
inline Config published_config(const std::string& name) {
  static const std::map<std::string, std::array<Index, 2>> kSizes = {
      // d_model, n_layer
      {"130m", {768, 24}},  {"370m", {1024, 48}}, {"790m", {1536, 48}}, {"780m", {1536, 48}},
      {"1.4b", {2048, 48}}, {"1.3b", {2048, 48}}, {"2.8b", {2560, 64}}, {"2.7b", {2560, 64}}};
  const bool transformer = name == "transformerpp-2.7b", hybrid = name == "mamba2attn-2.7b";
  const bool two = hybrid || name.rfind("mamba2-", 0) == 0;
  const auto size = kSizes.find(transformer || hybrid ? "2.7b" : name.substr(two ? 7 : 0));
  if (size == kSizes.end())
    fail_usage("--shape: expected 130m to 2.8b, mamba2-130m to mamba2-2.7b, transformerpp-2.7b or ",
               "mamba2attn-2.7b, found ", quote(name));
  Json json = {{"d_model", size->second[0]},
               {"n_layer", size->second[1]},
               {"vocab_size", 50280},
               {"ssm_cfg", {{"layer", two ? "Mamba2" : "Mamba1"}}}};
  if (transformer) {
    std::vector<Index> all(32);
    std::iota(all.begin(), all.end(), 0);
    json.update({{"n_layer", 32}, {"d_intermediate", 6912}, {"attn_layer_idx", all}});
  }
  if (hybrid) json["attn_layer_idx"] = {9, 18, 27, 36, 45, 56};
  json["attn_cfg"] = {{"causal", true},
                      {"head_dim", 128},
                      {"num_heads", hybrid ? 30 : 20},
                      {"d_conv", hybrid ? 4 : 0},
                      {"rotary_emb_dim", hybrid ? 64 : 128},
                      {"qkv_proj_bias", false},
                      {"out_proj_bias", false}};
  return config_from_json(json, true, name);
}

// =======================================================================================
// 3. Sampler
// =======================================================================================
//
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
  float top_p = 0.95f, min_p = 0, repetition_penalty = 1;
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

/// Normal random numbers, the same on every platform's std::mt19937_64 (Box-Muller by hand).
class Random {
 public:
  explicit Random(std::uint64_t seed) : bits_(seed) {}
  double uniform() { return static_cast<double>(bits_() >> 11) * 0x1p-53; }
  double normal() {
    return std::sqrt(-2 * std::log(1 - uniform())) * std::cos(6.283185307179586 * uniform());
  }
  template <class Scalar>
  Matrix<Scalar> matrix(Index rows, Index cols, double scale = 1) {
    Matrix<Scalar> m(rows, cols);
    for (Index i = 0; i < m.size(); ++i) m.data()[i] = static_cast<Scalar>(scale * normal());
    return m;
  }

 private:
  std::mt19937_64 bits_;
};

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
// of the total. A weight < (1 - top_p) * total / size goes whatever the order: few are sorted.
inline void keep_top_p(const std::vector<double>& scores, std::vector<double>& weights,
                       double top_p) {
  const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
  const double certain = (1 - top_p) * total / static_cast<double>(weights.size());
  using Entry = std::pair<double, std::size_t>;  // (score, id): by score, of equals by id
  std::vector<Entry> entries;
  for (std::size_t id = 0; id < weights.size(); ++id)
    if (weights[id] >= certain) entries.emplace_back(scores[id], id);
  std::sort(entries.begin(), entries.end(), std::greater<>());
  Entry least(HUGE_VAL, 0);  // the last that stays: those before it make less than top_p
  double above = 0;
  for (auto entry = entries.begin(); entry != entries.end() && above < top_p * total; ++entry) {
    least = *entry;
    above += weights[entry->second];
  }
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
      scores[id] = s < 0 ? s * r : s / r;
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
// 4. Sequences
// =======================================================================================

struct EngineOptions {
  std::optional<DType> dtype;  // storage of matrices; as in the file if not given
  float delta_ratio = 1;
  int device = 0;                 // mamba_cuda: which GPU
  int threads = 0;                // of the CPU; all cores if 0
  struct Ranks* ranks = nullptr;  // mamba_cuda train: several GPUs, see train.hpp
};

/// How a text is walked. All ways give the same logits up to rounding; that is the point.
struct Mode {
  enum Kind { parallel, recurrent, chunked } kind = parallel;
  Index chunk = 0;  // chunked: tokens a piece
};

inline Mode parse_mode(const std::string& text) {
  if (text == "parallel") return {Mode::parallel, 0};
  if (text == "recurrent") return {Mode::recurrent, 0};
  Mode mode{Mode::chunked, 0};
  std::istringstream chunk(text.rfind("chunked=", 0) == 0 ? text.substr(8) : "");
  if (chunk >> mode.chunk && chunk.peek() == EOF && mode.chunk > 0) return mode;
  fail_usage("--mode: expected parallel, recurrent or chunked=K with K > 0, found ", quote(text));
}

inline double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

/// How far something long has come, on stderr if that is a terminal.
inline void show_progress(Index done, Index all) {
  static const bool terminal = ::isatty(2) == 1;
  if (terminal) std::cerr << done << "/" << all << "\033[K\r" << std::flush;
}

/// logits (count, vocab_size) of positions first, first + 1, ...
using LogitsSink = std::function<void(Index first, const Matrix<float>& logits)>;

/// Takes ids from `state` on and hands the logits of all L positions to sink, in order. The
/// parallel form takes Engine::kPiece tokens at a time, so that memory does not grow with the text.
template <class Engine>
void walk(Engine& engine, typename Engine::State& state, const Token* ids, Index L, Mode mode,
          const LogitsSink& sink) {
  if (mode.kind == Mode::recurrent) {
    for (Index t = 0; t < L; ++t) sink(t, engine.prefill(state, ids + t, 1));
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
  std::vector<Token> end_tokens;  // each ends a sequence
  std::vector<Token> never;       // ids that are not drawn: rows of the embedding without a token
};

/// Called with the tokens of the first sequence, then with those of the second, and so on.
using OnToken = std::function<void(std::size_t sequence, Token token)>;

inline bool contains(const std::vector<Token>& ids, Token id) {
  return std::find(ids.begin(), ids.end(), id) != ids.end();
}

/// Prefill, then token by token, one sequence after the other.
template <class Engine>
void generate_on_host(Engine& engine, std::vector<Sequence<typename Engine::State>>& sequences,
                      const GenerateOptions& options, const OnToken& on_token) {
  for (std::size_t i = 0; i < sequences.size(); ++i) {
    auto& s = sequences[i];
    const auto take = [&](std::size_t end) {
      const std::size_t begin = std::exchange(s.taken, end);
      return prefill(engine, s.state, s.ids.data() + begin, end - begin);
    };
    if (options.n == 0) {
      take(s.ids.size() - 1);
      continue;
    }
    Matrix<float> logits = take(s.ids.size());
    for (Index made = 0; made < options.n; ++made) {
      if (made > 0) logits = engine.prefill(s.state, &s.ids[s.taken++], 1);
      for (const Token id : options.never) logits(id) = -std::numeric_limits<float>::infinity();
      s.ids.push_back(
          sample(logits.data(), logits.cols(), s.ids, options.sampler, s.index, s.ids.size()));
      on_token(i, s.ids.back());
      if (contains(options.end_tokens, s.ids.back())) break;
    }
  }
}

inline Tensor view(const std::string& name, const Matrix<float>& m) {
  return tensor_view(name, {m.rows(), m.cols()}, m.data());
}

// A saved state is a safetensors file: per layer `layers.L.conv` (d_conv - 1, conv_width) and
// `layers.L.h` (d_inner, d_state), with attention `layers.L.conv`, `layers.L.keys` and
// `layers.L.values` (tokens, kv_width), and `ids`, the text so far; the last id is not in the state
// yet.

/// The tensors of a state, row-major as in files, their names after `prefix`.
inline std::vector<Tensor> state_tensors(const ssm::State<float>& state,
                                         const std::string& prefix = "") {
  std::vector<Tensor> tensors;
  for (std::size_t l = 0; l < state.layers.size(); ++l) {
    const auto& layer = state.layers[l];
    const auto add = [&](const char* name, const auto& m) {
      const auto rows = std::make_shared<Matrix<float>>(m);
      tensors.push_back(view(prefix + "layers." + std::to_string(l) + name, *rows));
      tensors.back().keep_alive = rows;
    };
    const bool attends = layer.past.keys.cols() > 0;
    add(".conv", layer.conv);
    attends ? add(".keys", layer.past.keys) : add(".h", layer.h);
    if (attends) add(".values", layer.past.values);
  }
  return tensors;
}

inline void save_state(const std::string& path, const std::vector<Token>& ids,
                       const ssm::State<float>& state) {
  std::vector<Tensor> tensors = state_tensors(state);
  tensors.push_back(tensor_view("ids", {static_cast<std::int64_t>(ids.size())}, ids.data()));
  write_safetensors(path, tensors, {{"format", "mamba state"}});
}

/// The state whose tensors' names begin with `prefix`.
inline ssm::State<float> read_state(const Checkpoint& file, const std::string& prefix,
                                    const Config& config) {
  const auto fill = [&](const std::string& name, auto& m) {
    const Tensor& tensor = file.at(name);
    if (tensor.shape != std::vector<std::int64_t>{m.rows(), m.cols()})
      fail("wrong state: ", file.where, ": ", name, ": expected ", shape_text({m.rows(), m.cols()}),
           " for this model, found ", shape_text(tensor.shape));
    m = Eigen::Map<const Matrix<float>>(values<float>(tensor).data(), m.rows(), m.cols());
  };
  ssm::State<float> state(config);
  Index past = -1;  // tokens of every layer with attention
  for (Index l = 0; l < config.n_layer; ++l) {
    const std::string name = prefix + "layers." + std::to_string(l) + ".";
    auto& layer = state.layers[l];
    fill(name + "conv", layer.conv);
    if (!config.attends(l)) {
      fill(name + "h", layer.h);
      continue;
    }
    const auto& shape = file.at(name + "keys").shape;
    if (past < 0) past = shape.size() == 2 && shape[1] == layer.past.keys.cols() ? shape[0] : 0;
    for (auto* m : {&layer.past.keys, &layer.past.values}) {
      m->resize(past, m->cols());
      fill(name + (m == &layer.past.keys ? "keys" : "values"), *m);
    }
  }
  const std::string next = prefix + "layers." + std::to_string(config.n_layer);
  if (file.find(next + ".h") || file.find(next + ".keys"))
    fail("wrong state: ", file.where, ": expected ", config.n_layer, " layers, found more");
  return state;
}

inline ssm::State<float> load_state(const std::string& path, const Config& config,
                                    std::vector<Token>& ids) {
  const Checkpoint file = read_safetensors(path);
  const ssm::State<float> state = read_state(file, "", config);
  for (const std::int64_t id : values<std::int64_t>(file.at("ids"))) {
    if (id < 0 || id >= config.vocab_size)
      fail("wrong state: ", path, ": ids: expected ids below ", config.vocab_size, ", found ", id);
    ids.push_back(static_cast<Token>(id));
  }
  if (ids.empty()) fail("wrong state: ", path, ": ids: expected at least one, found none");
  for (const auto& layer : state.layers)
    if (const Index past = layer.past.keys.rows();
        layer.past.keys.cols() > 0 && past + 1 != Index(ids.size()))
      fail("wrong state: ", path, ": ids: expected ", past + 1, ", one more than keys, found ",
           ids.size());
  return state;
}

// =======================================================================================
// 5. Scoring
// =======================================================================================

/// -log softmax(logits)[target], in nats. Weights that are not numbers end here.
template <class Scalar>
double negative_log_likelihood(const Matrix<Scalar>& logits, Index row, Token target) {
  if (!logits.row(row).allFinite()) fail("logits: expected numbers, found NaN or infinity");
  const auto scores = logits.row(row).array().template cast<double>();
  const double largest = scores.maxCoeff();
  return largest + std::log((scores - largest).exp().sum()) - scores(target);
}

/// Walked in order, a scan costs the CPU least; an SSD is cheapest as matrix products.
inline ssm::Form cpu_form(const Config& config) {
  return config.version == 1 ? ssm::Form::sequential : ssm::Form::chunked;
}

/// The mean of that over ids 2 to n of a text, and its gradients added to those given.
template <class Scalar, class Weight>
double loss_of_text(const ssm::Model<Scalar, Weight>& model, const std::vector<Token>& ids,
                    const ssm::Options<Scalar>& options, ssm::Model<Scalar>& gradients) {
  const Index L = static_cast<Index>(ids.size()) - 1;
  ssm::State<Scalar> state(model.sizes);
  return ssm::loss_and_gradients(model, ids.data(), ids.data() + 1, L, state,
                                 1 / static_cast<double>(L), gradients, options);
}

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

/// The options for a text of n tokens, with what was left out. Fails where it cannot be scored so.
inline PerplexityOptions checked(PerplexityOptions o, Index n) {
  if (o.length == 0) o.length = n;
  if (o.stride == 0) o.stride = o.length;
  if (n < 2) fail("perplexity: text: expected at least 2 tokens, found ", n);
  if (o.length < 2 || o.length > n)
    fail("perplexity: --lengths: expected at least 2 and at most the ", n,
         " tokens of the text, found ", o.length);
  if (o.stride < 1 || o.stride > o.length)
    fail("perplexity: --stride: expected 1 to the window length ", o.length, ", found ", o.stride);
  if (o.carry_state && o.stride != o.length)
    fail("perplexity: --stride: windows cannot overlap with --carry-state");
  return o;
}

/// Mean negative log likelihood of ids 2..n. Without carry_state every window starts from nothing:
/// with a stride below its length, it reads what lies before as context and scores only the tokens
/// that no window has scored yet; the very first token of the text, and of windows that do not
/// overlap, has no context and is not scored.
template <class Engine>
Score perplexity(Engine& engine, const std::vector<Token>& ids, const PerplexityOptions& given) {
  const Index n = ids.size();
  const PerplexityOptions options = checked(given, n);
  Score score{options.length, 0, 0};
  auto state = engine.new_state();
  Index scored = 1;  // targets before this index are done
  for (Index begin = 0; scored < n; begin += options.stride) {
    // inputs [begin, end), the target of input t is t + 1
    const Index end = std::min(begin + options.length - (options.carry_state ? 0 : 1), n - 1);
    if (!options.carry_state) {
      state = engine.new_state();
      scored = std::max(scored, begin + 1);
    }
    walk(engine, state, ids.data() + begin, end - begin, options.mode,
         [&](Index first, const Matrix<float>& logits) {
           for (Index i = 0; i < logits.rows(); ++i) {
             const Index target = begin + first + i + 1;
             if (target < scored) continue;
             score.nll += negative_log_likelihood(logits, i, ids[target]);
             ++score.tokens;
           }
           show_progress(begin + first, n);
         });
    scored = std::max(scored, end + 1);
    if (end == n - 1) break;
  }
  return score;
}

// --- score: how likely a text is to go on so, asked and counted as lm-evaluation-harness does ---

/// A continuation to be scored. It may be one choice of a question.
struct Request {
  std::vector<Token> context, continuation;
  double characters = 0, bytes = 0;  // of the continuation, without one leading space
  std::string question;              // its "doc" as JSON; empty: none
  std::size_t label = 0;             // which of the question's choices is right
  bool is_text = false;              // strings, not ids
};

struct Likelihood {
  double logprob = 0;  // log p(continuation | context), in nats
  bool greedy = true;  // each token of the continuation is the likeliest
};

template <class Engine>
Likelihood likelihood(Engine& engine, const Request& request) {
  const auto& context = request.context;
  const auto& continuation = request.continuation;
  Likelihood found;
  const auto judge = [&](Index first, const Matrix<float>& logits) {
    for (Index i = 0; i < logits.rows(); ++i) {
      const Token target = continuation[first + i];
      Index likeliest = 0;
      logits.row(i).maxCoeff(&likeliest);
      found.greedy = found.greedy && likeliest == target;
      found.logprob -= negative_log_likelihood(logits, i, target);
    }
  };
  auto state = engine.new_state();
  judge(0, prefill(engine, state, context.data(), context.size()));
  walk(engine, state, continuation.data(), Index(continuation.size()) - 1, {},
       [&](Index first, const Matrix<float>& logits) { judge(first + 1, logits); });
  return found;
}

/// How many bytes of the text are left without the white space at its end, as Python sees it.
inline std::size_t stripped_size(std::string_view text) {
  const auto* bytes = reinterpret_cast<const utf8proc_uint8_t*>(text.data());
  std::size_t end = 0;
  for (std::size_t i = 0; i < text.size();) {
    utf8proc_int32_t c = -1;
    const auto n = utf8proc_iterate(bytes + i, text.size() - i, &c);
    i += n > 0 ? static_cast<std::size_t>(n) : 1;
    const auto* is = utf8proc_get_property(c);
    if (is->bidi_class != UTF8PROC_BIDI_CLASS_WS && is->bidi_class != UTF8PROC_BIDI_CLASS_B &&
        is->bidi_class != UTF8PROC_BIDI_CLASS_S && is->category != UTF8PROC_CATEGORY_ZS)
      end = i;
  }
  return end;
}

/// Context and continuation are encoded together and cut where the context ends; spaces at the
/// context's end go to the continuation.
inline Request encode_request(const Tokenizer& tokenizer, std::string context,
                              std::string continuation) {
  Request request;
  const std::size_t size = stripped_size(context);
  continuation.insert(0, context, size);
  context.resize(size);
  const std::string text = context + continuation;
  request.continuation = context.empty() ? tokenizer.encode(text) : tokenizer.encode_prompt(text);
  const auto cut = static_cast<std::ptrdiff_t>(std::min(
      context.empty() ? 0 : tokenizer.encode_prompt(context).size(), request.continuation.size()));
  const auto begin = request.continuation.begin();
  request.context.assign(begin, begin + cut);
  request.continuation.erase(begin, begin + cut);
  return request;
}

/// What comes first in a text follows the end token, which may be written out.
inline void begin_text(Request& request, const Config& config, const std::string& where) {
  if (!request.context.empty()) return;
  if (config.eos_token_ids.empty())
    fail(where, ": expected one, for this model has no end token to begin with, found none");
  request.context = {config.eos_token_ids[0]};
  if (!request.continuation.empty() && request.continuation[0] == request.context[0])
    request.continuation.erase(request.continuation.begin());
}

/// The continuation's length, without one leading space.
inline void measure(Request& request, std::string_view text) {
  if (!text.empty() && text[0] == ' ') text.remove_prefix(1);
  request.bytes = text.size();
  request.characters =
      std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xC0) != 0x80; });
}

/// The requests that are the choices of each question, in their order.
using Questions = std::map<std::string, std::vector<std::size_t>>;

inline Questions questions_of(const std::vector<Request>& requests) {
  Questions questions;
  for (std::size_t i = 0; i < requests.size(); ++i)
    if (!requests[i].question.empty()) questions[requests[i].question].push_back(i);
  for (const auto& [question, choices] : questions)
    for (const std::size_t i : choices)
      if (requests[i].label != requests[choices[0]].label || requests[i].label >= choices.size())
        fail("--requests: doc ", quote(question), ": label: expected one number below its ",
             choices.size(), " choices, found ", requests[i].label);
  return questions;
}

/// What a file of requests comes to. A question is answered right if its right choice has the
/// highest log-probability: acc; per character: acc_norm; per byte: acc_bytes. Of equals the first
/// counts.
inline nlohmann::ordered_json summary(const std::vector<Likelihood>& found,
                                      const Questions& questions,
                                      const std::vector<Request>& requests) {
  double greedy = 0, logprob = 0;
  for (const Likelihood& each : found) greedy += each.greedy, logprob += each.logprob;
  const auto n = static_cast<double>(found.size());
  nlohmann::ordered_json sum = {
      {"requests", found.size()}, {"greedy", greedy / n}, {"perplexity", std::exp(-logprob / n)}};
  if (questions.empty()) return sum;
  const auto accuracy = [&](double Request::*length) {
    double right = 0;
    for (const auto& question : questions) {
      const auto& choices = question.second;
      std::vector<double> scores;
      for (const std::size_t i : choices)
        scores.push_back(length ? found[i].logprob / requests[i].*length : found[i].logprob);
      const auto best = std::max_element(scores.begin(), scores.end()) - scores.begin();
      right += static_cast<std::size_t>(best) == requests[choices[0]].label;
    }
    return right / static_cast<double>(questions.size());
  };
  sum.update({{"questions", questions.size()},
              {"acc", accuracy(nullptr)},
              {"acc_norm", accuracy(&Request::characters)},
              {"acc_bytes", accuracy(&Request::bytes)}});
  return sum;
}

// =======================================================================================
// 6. Inspection
// =======================================================================================
//
// What the scan of one layer does with a text, from a zero state, by the reference in float.

struct Inspection {
  Matrix<float> x, y;        // (L, d_inner)  into the scan, and out of it before the gate
  Matrix<float> delta;       // (L, d_inner), Mamba-2: (L, n_heads)
  Matrix<float> memory;      // (d_inner, d_state), Mamba-2: (n_heads, 1)  in tokens, see below
  Matrix<float> state_norm;  // (L, 1)  sqrt of the sum of squares of h_t
};

/// Follows a scan token by token. A token's trace in state n of channel c falls to 1/e when the sum
/// of delta[., c] |A[c, n]| since then reaches 1: after memory[c, n] tokens of average delta.
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

/// delta[t, c] over the mean of delta[., c]: above 1 where a token makes channel c forget and write
/// more than others do. Channels differ in their means by far more than tokens within a channel.
inline Matrix<float> relative_delta(const Matrix<float>& delta) {
  return delta * delta.colwise().mean().cwiseInverse().asDiagonal();
}

/// `attention` is called with the matrix M (L, L), y = M x, of each channel (Mamba-2: head).
template <class Attention>
Inspection inspect(const ssm::Model<float>& model, const std::vector<Token>& ids, Index layer,
                   float delta_ratio, const Attention& attention) {
  const ssm::Sizes& sizes = model.sizes;
  const auto& w = model.layers[layer];
  ssm::Trace<float> trace;
  trace.layer = layer;
  ssm::Options<float> options;
  options.delta_ratio = delta_ratio;
  options.trace = &trace;
  ssm::State<float> state(sizes);
  ssm::backbone(model, ids.data(), ids.size(), state, options);
  const auto look = [&](auto in, Index channels, const auto& step, auto... d_state) {
    in.delta_ratio = delta_ratio;
    const Inspection seen = follow(in, sizes.d_state, step);
    for (Index i = 0; i < channels; ++i)
      attention(i, ssm::implied_attention(in, seen.delta, i, d_state...));
    return seen;
  };
  if (sizes.version == 2)
    return look(ssm::ssd_inputs(w, sizes, trace.projected, trace.convolved), sizes.n_heads,
                ssm::ssd_step<float>, sizes.d_state);
  auto in = ssm::scan_inputs(w, sizes, trace.projected, trace.convolved, trace.dt_B_C, trace.delta);
  in.z = {};
  return look(in, sizes.d_inner, ssm::selective_scan_step<float>);
}

// --- a plain heat map: no axes, no words; the numbers lie beside it in the safetensors file ---

/// Viridis, `part` of its way from dark to bright, between five of its colours; NaN is grey.
inline std::array<std::uint8_t, 3> heat_colour(double part) {
  static constexpr double kStops[5][3] = {
      {68, 1, 84}, {59, 82, 139}, {33, 145, 140}, {94, 201, 98}, {253, 231, 37}};
  if (std::isnan(part)) return {170, 170, 170};
  const double at = 4 * std::clamp(part, 0.0, 1.0);
  const int stop = std::min(static_cast<int>(at), 3);
  std::array<std::uint8_t, 3> colour{};
  for (std::size_t c = 0; c < 3; ++c)
    colour[c] = static_cast<std::uint8_t>(
        std::lround(kStops[stop][c] + (at - stop) * (kStops[stop + 1][c] - kStops[stop][c])));
  return colour;
}

/// From the least finite value to the largest.
inline std::array<float, 2> finite_range(const Matrix<float>& values) {
  std::array<float, 2> range = {HUGE_VALF, -HUGE_VALF};
  for (const float v : values.reshaped())
    if (std::isfinite(v)) range = {std::min(range[0], v), std::max(range[1], v)};
  return range;
}

/// Every value is a square cell; colours go from range[0] to range[1].
inline void write_heat_map(const std::string& path, const Matrix<float>& values,
                           const std::array<float, 2>& range) {
  const auto [low, high] = range;
  const Index cell = std::clamp<Index>(768 / std::max(values.rows(), values.cols()), 1, 32);
  const Index width = cell * values.cols(), height = cell * values.rows();
  std::string pixels, png;
  for (Index y = 0; y < height; ++y)
    for (Index x = 0; x < width; ++x) {
      const float v = values(y / cell, x / cell);
      const auto colour = heat_colour(high > low ? (v - low) / (high - low) : v - v + 0.5);
      pixels.append(colour.begin(), colour.end());
    }
  const auto append = [](void* to, void* data, int n) {
    static_cast<std::string*>(to)->append(static_cast<char*>(data), n);
  };
  if (!stbi_write_png_to_func(append, &png, width, height, 3, pixels.data(), 3 * width))
    fail("cannot write: ", path, ": out of memory");
  write_text(path, png);
}

// =======================================================================================
// 7. Command line
// =======================================================================================
//
// Each subcommand is a struct of its flags that declares them and runs.
// Results go to stdout, progress and statistics to stderr.
// Exit status 0: done, 1: failed, 2: wrong usage.

/// A folder to write into.
inline std::string make_folder(const std::string& path) {
  if (path.empty()) fail_usage("--out: expected a folder, found an empty name");
  std::error_code error;
  std::filesystem::create_directories(path, error);
  if (error) fail("cannot write: ", path, ": ", error.message());
  return path + "/";
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

/// There must be ids, and the model must have them all.
inline void check_ids(const std::vector<Token>& ids, Index vocab_size, const std::string& where) {
  if (ids.empty()) fail(where, ": expected at least one token, found none");
  for (const Token id : ids)
    if (id >= vocab_size) fail(where, ": expected token ids below ", vocab_size, ", found ", id);
}

inline void print_ids(const std::vector<Token>& ids) {
  for (std::size_t t = 0; t < ids.size(); ++t) std::cout << (t > 0 ? " " : "") << ids[t];
  std::cout << "\n";
}

/// For CLI11, whose ranges NaN passes.
inline std::string not_nan(const std::string& word) {
  const bool is_nan = std::isnan(std::strtod(word.c_str(), nullptr));
  return is_nan ? "expected a number, found " + word : "";
}

/// For CLI11, whose own messages write ranges out to 300 digits. NaN does not pass.
inline CLI::Validator checked_number(const char* type, const char* wanted, bool zero_too) {
  return {[=](const std::string& word) {
            const double v = std::strtod(word.c_str(), nullptr);
            if (v > 0 || (zero_too && v == 0) || std::isnan(v)) return not_nan(word);
            return std::string("expected ") + wanted + ", found " + word;
          },
          type};
}
inline const CLI::Validator kNonNegative = checked_number("NONNEGATIVE", "0 or more", true);
inline const CLI::Validator kPositive = checked_number("POSITIVE", "more than 0", false);

/// What lies in the folder --model. The tokenizer is read when it is needed.
struct ModelFolder {
  std::string folder = "weights/stories", tokenizer_flag;
  std::vector<std::string> adapters;
  EngineOptions engine_options;
  Config config;
  Checkpoint checkpoint;

  void add_model(CLI::App* sub) {
    sub->add_option("--model", folder, "directory with config.json, weights and tokenizer.json");
    sub->add_option("--tokenizer", tokenizer_flag, "another tokenizer.json, or its directory");
    sub->add_option("--adapter", adapters,
                    "folders of LoRA adapters as PEFT has them, added to the weights in turn");
  }
  void add_dtype(CLI::App* sub, const std::vector<std::string>& names = {"f32", "bf16", "f16"},
                 const char* what = "storage of weights (default: the file's)") {
    static const std::map<std::string, DType> kTypes = {
        {"f32", DType::F32}, {"bf16", DType::BF16}, {"f16", DType::F16}};
    const auto set = [this](const std::string& name) { engine_options.dtype = kTypes.at(name); };
    sub->add_option_function<std::string>("--dtype", set, what)->check(CLI::IsMember(names));
  }
  template <class Ratio>  // a number, or several with commas between them
  static void add_delta_ratio(CLI::App* sub, Ratio& ratio) {
    sub->add_option("--delta-ratio", ratio, "stretches every step of the state")
        ->delimiter(',')
        ->check(CLI::Range(1e-6f, 1e6f))
        ->check(not_nan);
  }
  template <class Engine, class Ratio>
  void add_engine(CLI::App* sub, Ratio& delta_ratio) {
    add_model(sub);
    add_delta_ratio(sub, delta_ratio);
    add_dtype(sub);
    const int cores = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
    sub->add_option("--threads", engine_options.threads, "CPU threads (default: all cores)")
        ->transform(CLI::Bound(1, cores))
        ->transform(kPositive)  // comes before Bound
        ->default_str("");
    if (Engine::kHasDevice) sub->add_option("--device", engine_options.device, "which GPU");
  }

  void open() {
    if (!std::filesystem::is_directory(folder))
      fail("no model: ", folder, ": expected a directory with config.json and weights (--model)");
    config = read_config(folder);
    checkpoint = read_checkpoint(folder);
    // A token that has a row in embedding and head exists, whatever vocab_size says.
    Index rows = kMaxVocab;
    for (const Tensor* each : {&find_weight(checkpoint, "backbone.embeddings.weight", true),
                               checkpoint.find("lm_head.weight")})
      if (each && !each->shape.empty()) rows = std::min<Index>(rows, each->shape[0]);
    if (rows > config.vocab_size && has_tokenizer())
      config.vocab_size =
          std::clamp<Index>(static_cast<Index>(tokenizer().vocab_size()), config.vocab_size, rows);
    for (const std::string& adapter : adapters) add_adapter(adapter, config, checkpoint);
  }
  /// An output can be written, and is not the model's own file.
  void check_output(const std::string& path) const {
    check_writable(path);
    std::error_code none;
    if (!path.empty() && std::filesystem::equivalent(path, checkpoint.where, none))
      fail(path, ": expected another file than the model's own");
  }
  std::string tokenizer_path() const {
    const std::string path = tokenizer_flag.empty() ? folder : tokenizer_flag;
    return std::filesystem::is_directory(path) ? path + "/tokenizer.json" : path;
  }
  bool has_tokenizer() const { return std::filesystem::exists(tokenizer_path()); }
  const Tokenizer& tokenizer() {
    if (tokenizer_) return *tokenizer_;
    const std::string path = tokenizer_path();
    if (path.empty()) fail("no tokenizer: expected one to read texts with (--tokenizer)");
    if (!has_tokenizer())
      fail("no tokenizer: ", path, ": expected one beside the weights; the original models use ",
           "that of EleutherAI/gpt-neox-20b, which weights/fetch.sh brings: name its folder with ",
           "--tokenizer, or give and print token ids (--prompt-ids with --ids, --ids-file)");
    const MappedFile file(path);
    if (const std::string what = what_it_is(file.bytes()); !what.empty())
      fail("no tokenizer: ", path, ": found ", what);
    return tokenizer_.emplace(Tokenizer::from_text(file.bytes(), path));
  }

  /// What lies beside the weights and a user needs to go on there.
  void copy_small_files(const std::string& to) const {
    const auto copy = [&](const std::string& path, const std::string& name) {
      if (std::filesystem::exists(path)) write_text(to + name, MappedFile(path).bytes());
    };
    for (const std::string name :
         {"generation_config.json", "tokenizer_config.json", "chat_template.jinja",
          "chat_template.json", "special_tokens_map.json"})
      copy(folder + "/" + name, name);
    if (has_tokenizer()) copy(tokenizer_path(), "tokenizer.json");
  }

  /// The tokens that end a text, each with the files that say so: config.json and
  /// generation_config.json have ids, tokenizer_config.json a name.
  std::map<Token, std::string> end_tokens() {
    std::map<Token, std::string> ends;
    const auto add = [&](const std::vector<Token>& ids, const char* file) {
      for (const Token id : ids) ends[id] += (ends[id].empty() ? "" : ", ") + std::string(file);
    };
    add(config.eos_token_ids, "config.json");
    const std::string path = folder + "/generation_config.json";
    if (std::filesystem::exists(path))
      add(Fields{read_settings(path), path}.tokens("eos_token_id"), "generation_config.json");
    const auto beside = std::filesystem::path(tokenizer_path()).parent_path();
    const std::string names = beside / "tokenizer_config.json";
    if (has_tokenizer() && std::filesystem::exists(names)) {
      const Json token = read_settings(names).value("eos_token", Json());  // or {"content": ...}
      const Json name = token.is_object() ? token.value("content", Json()) : token;
      if (const auto id = tokenizer().id_of(name.is_string() ? name.get<std::string>() : ""))
        add({*id}, "tokenizer_config.json");
    }
    return ends;
  }

 private:
  std::optional<Tokenizer> tokenizer_;
};

// --- generate ---

/// A prompt, or what standard input has, without the newline at its end.
inline std::string read_prompt(const std::string& prompt) {
  if (prompt != "-") return prompt;
  std::string text = read_file("-");
  for (const char c : {'\n', '\r'})
    if (!text.empty() && text.back() == c) text.pop_back();
  return text;
}

/// The lines of --prompt-file.
inline std::vector<std::string> read_prompts(const std::string& path) {
  std::vector<std::string> prompts;
  const std::string text = read_file(path), mark = "\xef\xbb\xbf";  // byte order mark
  std::istringstream lines(text.compare(0, 3, mark) == 0 ? text.substr(3) : text);
  for (std::string line; std::getline(lines, line);) {
    if (!line.empty() && line.back() == '\r') line.pop_back();
    prompts.push_back(line);
  }
  if (prompts.empty()) fail("--prompt-file: ", path, ": expected a prompt a line, found none");
  return prompts;
}

template <class Engine>
struct Generate : ModelFolder {
  using Sequences = std::vector<Sequence<typename Engine::State>>;
  std::string prompt, prompt_file, prompt_ids, state_to, state_from;
  std::size_t batch = 1;
  bool ids = false, json = false, ignore_eos = false;
  GenerateOptions options;
  std::vector<std::string> prompts;
  std::map<Token, std::string> ends;

  void declare(CLI::App* sub) {
    add_engine<Engine>(sub, engine_options.delta_ratio);
    SamplerOptions& sampler = options.sampler;
    sub->add_option("prompt,--prompt", prompt,
                    "the text to continue, - for standard input less a final newline");
    auto* lines = sub->add_option("--prompt-file", prompt_file,
                                  "prompts, one a line, less Windows' line ends and byte order "
                                  "mark; - for standard input")
                      ->excludes("--prompt");
    sub->add_flag("--json", json,
                  "the lines of --prompt-file are JSON strings; so is what is printed, a line for "
                  "each continuation")
        ->needs(lines);
    sub->add_option("--prompt-ids", prompt_ids, "token ids to continue")
        ->excludes("--prompt")
        ->excludes("--prompt-file");
    sub->add_option("-n", options.n, "tokens to add at most")->check(kNonNegative);
    sub->add_option("--temperature", sampler.temperature, "0 is greedy");
    sub->add_option("--top-k", sampler.top_k, "keep the k likeliest tokens, 0: all");
    sub->add_option("--top-p", sampler.top_p, "keep the likeliest tokens that make up p");
    sub->add_option("--min-p", sampler.min_p, "keep tokens p times as likely as the likeliest");
    sub->add_option("--repetition-penalty", sampler.repetition_penalty, "above 1: less repetition");
    sub->add_option("--seed", sampler.seed, "same seed, same text")->check(kNonNegative);
    sub->add_option("--batch", batch, "so many continuations of each prompt")
        ->check(CLI::Range(1, 1 << 16));
    sub->add_option("--save-state", state_to, "where to leave the state, to go on later");
    sub->add_option("--load-state", state_from, "go on from a saved state");
    sub->add_flag("--ids", ids, "print token ids, one line a sequence, instead of text")
        ->excludes("--json");
    sub->add_flag("--ignore-eos", ignore_eos, "go on after an end token");
  }

  void run() {
    check(options.sampler);
    prompts = prompt_file.empty() ? std::vector{read_prompt(prompt)} : read_prompts(prompt_file);
    for (std::size_t i = 0; json && i < prompts.size(); ++i) {
      const std::string where = "--prompt-file: " + prompt_file + ": line " + std::to_string(i + 1);
      const Json text = parse_json(prompts[i], where);
      if (!text.is_string()) fail(where, ": expected a JSON string, found ", quote(prompts[i]));
      prompts[i] = text.get<std::string>();
    }
    const std::size_t texts = prompts.size() * batch;
    if (texts != 1 && !(state_to + state_from).empty())
      fail_usage("--save-state, --load-state: expected one prompt, found ", texts);
    open();
    check_output(state_to);
    Engine engine(checkpoint, config, engine_options);
    ends = end_tokens();
    for (const auto& end : ends)
      if (!ignore_eos) options.end_tokens.push_back(end.first);
    for (Token id = 0; has_tokenizer() && id < config.vocab_size; ++id)
      if (!tokenizer().text_of(id)) options.never.push_back(id);
    std::size_t taken = 0, made = 0;
    double seconds = 0;
    for (std::size_t i = 0; i < texts;) {
      Sequences sequences;
      for (; i < texts && sequences.size() < Engine::kBatch; ++i) {
        sequences.push_back(begin_sequence(engine, i));
        taken += sequences.back().ids.size() - sequences.back().taken;
      }
      const double start = now();
      made += generate(engine, sequences);
      seconds += now() - start;
      if (!state_to.empty())
        save_state(state_to, sequences[0].ids, engine.to_host(sequences[0].state));
    }
    std::cerr << taken << " tokens in, " << made << " tokens out in " << std::setprecision(3)
              << seconds << " s\n";
  }

  /// A text before its first token is made: the saved one if there is one, and the prompt.
  auto begin_sequence(const Engine& engine, std::size_t index) {
    Sequence<typename Engine::State> s{{}, engine.new_state(), index, 0};
    if (!state_from.empty()) {
      s.state = engine.from_host(load_state(state_from, config, s.ids));
      s.taken = s.ids.size() - 1;
    }
    const std::string& text = prompts[index / batch];
    std::vector<Token> more = parse_ids(prompt_ids, "--prompt-ids");
    if (!text.empty() || (prompt_ids.empty() && has_tokenizer()))
      more = state_from.empty() ? tokenizer().encode_prompt(text) : tokenizer().encode(text);
    s.ids.insert(s.ids.end(), more.begin(), more.end());
    if (s.ids.empty() && config.bos_token_id >= 0) s.ids.push_back(config.bos_token_id);
    check_ids(s.ids, config.vocab_size, prompt_ids.empty() ? "--prompt" : "--prompt-ids");
    return s;
  }

  /// Continues some texts together and prints them as they are made. Returns the number of tokens.
  std::size_t generate(Engine& engine, Sequences& sequences) {
    std::size_t made = 0, begun = 0;  // tokens; texts whose prompt is printed
    if (ids) {
      engine.generate(sequences, options, [&](std::size_t, Token) { ++made; });
      for (const auto& s : sequences) print_ids(s.ids);
      return made;
    }
    std::vector<StreamDecoder> decoders(sequences.size(), StreamDecoder(tokenizer()));
    std::vector<std::string> begins(sequences.size());
    for (std::size_t i = 0; i < sequences.size(); ++i) {
      for (const Token id : sequences[i].ids) begins[i] += decoders[i].push(id);
      if (prompt_ids.empty()) begins[i] = prompts[sequences[i].index / batch];
      if (!state_from.empty()) begins[i].clear();
    }
    if (json) {
      std::vector<std::string> more(sequences.size());
      engine.generate(sequences, options, [&](std::size_t i, Token token) {
        ++made;
        if (ends.count(token) == 0) more[i] += decoders[i].push(token);
      });
      for (std::size_t i = 0; i < more.size(); ++i)
        std::cout << Json(more[i] + decoders[i].finish())
                         .dump(-1, ' ', true, Json::error_handler_t::replace)
                  << std::endl;
      return made;
    }
    const auto begin = [&](std::size_t end) {
      for (; begun < end; ++begun)
        std::cout << (begun > 0 ? decoders[begun - 1].finish() + "\n" : "") << begins[begun];
      std::cout << std::flush;
    };
    begin(1);
    engine.generate(sequences, options, [&](std::size_t i, Token token) {
      ++made;
      begin(i + 1);
      if (ends.count(token) == 0) std::cout << decoders[i].push(token) << std::flush;
    });
    begin(sequences.size());
    // bytes of a character that the saved state will complete are not printed yet
    std::cout << (state_to.empty() ? decoders.back().finish() : "") << std::endl;
    return made;
  }
};

// --- logits and perplexity ---

/// A text as token ids, and where it came from.
struct Document {
  std::string where;
  std::vector<Token> ids;
};

/// One of --text, --ids-file and, where there is one text only, --ids; and how it is walked.
struct TextFlags {
  std::vector<std::string> texts;
  std::string ids, ids_file;

  void add_text(CLI::App* sub, bool one) {
    auto* group = sub->add_option_group("input", "the text, one of")->require_option(1);
    auto* text = group->add_option("--text", texts, "text files, each a document; - for stdin");
    group->add_option("--ids-file", ids_file, "a file of token ids, - for standard input");
    if (one) text->expected(1), group->add_option("--ids", ids, "token ids");
  }
  static void add_mode(CLI::App* sub, Mode& mode) {
    const auto set_mode = [&mode](const std::string& name) { mode = parse_mode(name); };
    sub->add_option_function<std::string>("--mode", set_mode, "parallel, recurrent or chunked=K")
        ->default_str("parallel");
  }
  std::vector<Document> read(ModelFolder& model) const {
    std::vector<Document> all;
    for (const std::string& text : texts)
      all.push_back({"--text: " + text, model.tokenizer().encode(read_file(text))});
    if (!ids_file.empty())
      all.push_back({"--ids-file: " + ids_file, parse_ids(read_file(ids_file), "--ids-file")});
    if (all.empty()) all.push_back({"--ids", parse_ids(ids, "--ids")});
    for (const Document& text : all) check_ids(text.ids, model.config.vocab_size, text.where);
    return all;
  }
};

/// ids (L) and logits (L, vocab_size) of a text as a safetensors file, written as they are made.
template <class Engine>
struct Logits : ModelFolder, TextFlags {
  Mode mode;
  std::string out;

  void declare(CLI::App* sub) {
    add_engine<Engine>(sub, engine_options.delta_ratio);
    add_text(sub, true);
    add_mode(sub, mode);
    sub->add_option("--out", out, "the safetensors file to write")->required();
  }
  void run() {
    open();
    check_output(out);
    const std::vector<Document> text = read(*this);
    Engine engine(checkpoint, config, engine_options);
    const std::vector<Token>& ids = text[0].ids;
    const Index L = ids.size();
    const std::vector<Tensor> tensors = {
        tensor_view("ids", {L}, ids.data()),
        {"logits", DType::F32, {L, config.vocab_size}, nullptr, nullptr}};
    AtomicFile file(out);
    write_safetensors_header(file, tensors, {});
    file.write(tensors[0].bytes());
    auto state = engine.new_state();
    walk(engine, state, ids.data(), L, mode,
         [&](Index, const Matrix<float>& logits) { file.write(view("logits", logits).bytes()); });
    file.commit();
  }
};

/// The mean negative log likelihood of ids 2 to n, and its gradient for every tensor of the file,
/// by its name and in its shape there; rows that pad a vocabulary have zeros.
template <class Engine>
struct Gradients : ModelFolder, TextFlags {
  std::string out;
  bool in_double = false;

  void declare(CLI::App* sub) {
    add_engine<Engine>(sub, engine_options.delta_ratio);
    add_text(sub, true);
    sub->add_option("--out", out, "the safetensors file to write")->required();
    if (!Engine::kHasDevice)
      sub->add_flag("--double", in_double, "the reference itself, in double")->excludes("--dtype");
  }
  void run() {
    open();
    check_output(out);
    const Document text = read(*this)[0];
    if (text.ids.size() < 2) fail(text.where, ": expected at least two tokens, found one");
    if constexpr (!Engine::kHasDevice)  // else compiled for nothing
      if (in_double) {
        ssm::Options<double> options{cpu_form(config)};
        options.delta_ratio = engine_options.delta_ratio;
        const auto model = load_model<ssm::Model<double>>(checkpoint, config);
        auto gradients = zeros_like(model);
        return write(loss_of_text(model, text.ids, options, gradients), gradients);
      }
    Engine engine(checkpoint, config, engine_options);
    ssm::Model<float> gradients;
    const double loss = engine.gradients(text.ids, gradients);
    write(static_cast<float>(loss), gradients);
  }
  template <class Scalar>
  void write(Scalar loss, const ssm::Model<Scalar>& gradients) const {
    if (!std::isfinite(loss)) fail("gradients: expected a finite loss, found ", loss);
    std::deque<std::vector<Scalar>> numbers;  // row-major, as in the file
    std::vector<Tensor> tensors = {tensor_view("loss", {}, &loss)};
    for_each_weight(config, gradients, [&](const std::string& name, const auto& shape, auto& g) {
      const Tensor& tensor = weight(checkpoint, name, shape, config.tie_embeddings);
      auto& to = numbers.emplace_back(static_cast<std::size_t>(tensor.size()));
      Eigen::Map<Matrix<Scalar>>(to.data(), g.rows(), g.cols()) = g;
      tensors.push_back(tensor_view(tensor.name, tensor.shape, to.data()));
    });
    write_safetensors(out, tensors, {});
  }
};

/// Perplexity against context length: the same documents for every length, a row for each length
/// and delta ratio.
template <class Engine>
struct Perplexity : ModelFolder, TextFlags {
  PerplexityOptions options;
  std::vector<Index> lengths;
  std::vector<float> delta_ratios = {1};
  bool truncate = false;
  std::string csv;

  void declare(CLI::App* sub) {
    add_engine<Engine>(sub, delta_ratios);
    add_text(sub, false);
    add_mode(sub, options.mode);
    sub->add_option("--lengths", lengths,
                    "context lengths, comma-separated (default: the whole text)")
        ->delimiter(',')
        ->check(kPositive);
    sub->add_option("--stride", options.stride,
                    "tokens from window to window (default: no overlap; each token is then read "
                    "length / stride times)")
        ->check(kPositive);
    sub->add_flag("--carry-state", options.carry_state, "windows go on from the one before");
    sub->add_flag("--truncate", truncate, "of each document only one window of each length")
        ->needs("--lengths")
        ->excludes("--stride")
        ->excludes("--carry-state");
    sub->add_option("--csv", csv, "also write the table here");
  }
  void run() {
    check_writable(csv);
    if (lengths.empty()) lengths.push_back(0);
    std::sort(lengths.begin(), lengths.end());
    open();
    const std::vector<Document> documents = long_enough(read(*this));
    std::ostringstream table;
    table << "length,tokens,nll,perplexity,delta_ratio\n" << std::setprecision(9);
    std::cout << "   length    tokens  NLL (nats)  perplexity  delta ratio\n";
    for (const float ratio : delta_ratios) {
      engine_options.delta_ratio = ratio;
      Engine engine(checkpoint, config, engine_options);
      for (const Index length : lengths) {
        options.length = length;
        Score s;
        for (Document text : documents) {
          if (truncate) text.ids.resize(length);
          const Score part = perplexity(engine, text.ids, options);
          s = {std::max(s.length, part.length), s.tokens + part.tokens, s.nll + part.nll};
        }
        std::cout << std::setw(9) << s.length << std::setw(10) << s.tokens << std::fixed
                  << std::setprecision(4) << std::setw(12) << s.mean() << ' ' << std::setw(11)
                  << s.perplexity() << std::setw(13) << std::defaultfloat << ratio << std::endl;
        table << s.length << ',' << s.tokens << ',' << s.mean() << ',' << s.perplexity() << ','
              << ratio << '\n';
      }
    }
    if (!csv.empty()) write_text(csv, table.str());
  }

  /// The documents of at least the longest length; all, if there is none. Each can be scored.
  std::vector<Document> long_enough(std::vector<Document> all) {
    const auto end = std::stable_partition(all.begin(), all.end(), [&](const Document& text) {
      return static_cast<Index>(text.ids.size()) >= lengths.back();
    });
    for (auto text = end; end != all.begin() && text != all.end(); ++text)
      warn(text->where + ": " + std::to_string(text->ids.size()) +
           " tokens, shorter than the longest length: left out");
    if (end != all.begin()) all.erase(end, all.end());
    for (const Document& text : all)
      for (const Index length : lengths) options.length = length, checked(options, text.ids.size());
    return all;
  }
};

// --- score ---

/// What the two parts of a request are called.
using RequestNames = std::array<std::string, 2>;
inline const RequestNames kScored = {"context", "continuation"}, kAnswered = {"prompt", "answer"};

/// One line of the file: {"context", "continuation"}, of a choice "doc" and "label" too. Where
/// there is no part of the first name, the other one will do.
inline Request parse_request(const Json& json, const std::string& where, ModelFolder& model,
                             const RequestNames& names = kScored,
                             const RequestNames& others = kAnswered) {
  if (!json.is_object()) fail(where, ": expected an object");
  const auto field = [&](std::size_t i) -> const Json& {
    const auto found = json.find(json.contains(names[i]) ? names[i] : others[i]);
    if (found == json.end() || !(found->is_string() || found->is_array()))
      fail(where, ": ", names[i], ": expected a string or an array of token ids");
    return *found;
  };
  const Json &context = field(0), &continuation = field(1);
  if (context.type() != continuation.type())
    fail(where, ": expected two strings or two arrays, found one of each");
  const auto ids_of = [&](const Json& array) {
    std::string text;
    for (const Json& id : array) text += id.dump() + " ";
    return parse_ids(text, where);
  };
  Request request = context.is_string()
                        ? encode_request(model.tokenizer(), context, continuation)
                        : Request{ids_of(context), ids_of(continuation), 0, 0, {}, 0, false};
  request.is_text = context.is_string();
  begin_text(request, model.config, where + ": " + names[0]);
  check_ids(request.context, model.config.vocab_size, where + ": " + names[0]);
  if (request.continuation.empty() && request.is_text && continuation != "")
    fail(where, ": ", names[1],
         ": expected a text of its own, found one that only lengthens the last token of ",
         names[0]);
  check_ids(request.continuation, model.config.vocab_size, where + ": " + names[1]);
  if (json.contains("doc") != json.contains("label"))
    fail(where, ": expected doc and label, found only one of them");
  if (!json.contains("doc")) return request;
  if (!json["label"].is_number_unsigned())
    fail(where, ": label: expected the number of the right choice, from 0");
  request.question = json["doc"].dump();
  request.label = json["label"].get<std::size_t>();
  measure(request, continuation.is_string() ? continuation.get<std::string>()
                   : model.has_tokenizer()  ? model.tokenizer().decode(request.continuation)
                                            : std::string(request.continuation.size(), 'x'));
  return request;
}

/// A line of JSON for each request: into --out, or to stdout; the summary then goes to stderr.
template <class Engine>
struct ScoreRequests : ModelFolder {
  std::string requests_file, out_file;

  void declare(CLI::App* sub) {
    add_engine<Engine>(sub, engine_options.delta_ratio);
    sub->add_option("--requests", requests_file,
                    "a file with an object {\"context\", \"continuation\"} a line, texts or arrays "
                    "of token ids; choices of one question have \"doc\" and \"label\" too, the "
                    "number of the right one from 0; - for standard input")
        ->required();
    sub->add_option("--out", out_file, "write the answers here, not to standard output");
    sub->footer(R"(LAMBADA (a line: {"text": ...}); its accuracy is "greedy" of the summary:
  jq -c '(.text / " ") as $w | {context: $w[:-1] | join(" "), continuation: (" " + $w[-1])}' \
    lambada_test.jsonl | mamba score --requests - --out /dev/null)");
  }
  void run() {
    open();
    const std::vector<Request> requests = read_requests();
    const Questions questions = questions_of(requests);
    std::optional<AtomicFile> out;
    if (!out_file.empty()) out.emplace(out_file);
    Engine engine(checkpoint, config, engine_options);
    std::vector<Likelihood> found;
    while (found.size() < requests.size()) {
      const Request* next = requests.data() + found.size();
      for (const Likelihood& one : engine.likelihoods(next, requests.size() - found.size())) {
        const nlohmann::ordered_json answer = {{"logprob", one.logprob},
                                               {"tokens", next++->continuation.size()},
                                               {"greedy", one.greedy}};
        out ? out->write(answer.dump() + "\n") : void(std::cout << answer << std::endl);
        found.push_back(one);
      }
      show_progress(found.size(), requests.size());
    }
    if (out) out->commit();
    (out ? std::cout : std::cerr) << summary(found, questions, requests) << std::endl;
  }
  std::vector<Request> read_requests() {
    std::vector<Request> requests;
    std::istringstream file(read_file(requests_file));
    const std::string where = "--requests: " + requests_file;
    std::size_t number = 0;
    for (std::string line; std::getline(file, line);) {
      const std::string here = where + ": line " + std::to_string(++number);
      if (line.find_first_not_of(" \t\r") != std::string::npos)
        requests.push_back(parse_request(parse_json(line, here), here, *this));
    }
    if (requests.empty()) fail(where, ": expected a JSON object a line, found none");
    return requests;
  }
};

// --- inspect ---

struct Inspect : ModelFolder {
  std::string prompt, out;
  Index layer = 0;

  void declare(CLI::App* sub) {
    add_model(sub);
    add_delta_ratio(sub, engine_options.delta_ratio);
    sub->add_option("prompt,--prompt", prompt, "the text, - for standard input")->required();
    sub->add_option("--layer", layer, "which layer, from 0")->check(kNonNegative);
    sub->add_option(
           "--out", out,
           "the folder to write into: safetensors files of delta, memory, the state's "
           "norm and the implied attention, and heat maps: delta beside each channel's mean, "
           "memory, and the attention to earlier tokens (the diagonal is grey)")
        ->required();
  }
  void run() {
    open();
    if (layer >= config.n_layer)
      fail("--layer: expected 0 to ", config.n_layer - 1, ", found ", layer);
    if (config.attends(layer))
      fail("--layer: expected a layer with a scan, found one with attention: ", layer);
    const std::vector<Token> ids = tokenizer().encode_prompt(read_prompt(prompt));
    check_ids(ids, config.vocab_size, "--prompt");
    const Index channels = config.version == 1 ? config.d_inner : config.n_heads;
    const Index L = ids.size();
    const auto most = static_cast<Index>(std::sqrt((1 << 28) / channels));
    if (L > most)
      fail("--prompt: expected at most ", most, " tokens, so that the ", channels,
           " matrices of the layer stay below 1 GiB, found ", L);
    const std::string to = make_folder(out);
    for (const std::string name : {"attention", "delta", "memory"})
      check_writable(to + name + ".png");
    forget_layers_above();
    write(load_model<ssm::Model<float>>(checkpoint, config), ids, channels, to);
  }
  /// They do not matter to this layer.
  void forget_layers_above() {
    std::map<std::string, Tensor> kept;
    for (const auto& [name, tensor] : checkpoint.tensors) {
      const std::size_t at = name.find("layers.");
      if (at == std::string::npos || std::atoll(&name[at + 7]) <= layer) kept[name] = tensor;
    }
    checkpoint.tensors = kept;
    config.n_layer = layer + 1;
  }
  void write(const ssm::Model<float>& model, const std::vector<Token>& ids, Index channels,
             const std::string& to) const {
    const Index L = ids.size();
    AtomicFile file(to + "attention.safetensors");
    Matrix<float> mean = Matrix<float>::Zero(L, L), like_x(L, config.d_inner);
    const Tensor all{"M", DType::F32, {channels, L, L}, nullptr, nullptr};
    write_safetensors_header(
        file, {all, view("attention", mean), view("x", like_x), view("y", like_x)}, {});
    const auto take = [&](Index c, const Matrix<float>& M) {
      file.write(view("M", M).bytes());
      mean += M.cwiseAbs() / channels;
      show_progress(c + 1, channels);
    };
    const Inspection seen = inspect(model, ids, layer, engine_options.delta_ratio, take);
    for (const Tensor& m : {view("attention", mean), view("x", seen.x), view("y", seen.y)})
      file.write(m.bytes());
    file.commit();
    write_safetensors(to + "delta.safetensors",
                      {view("delta", seen.delta), tensor_view("ids", {L}, ids.data())});
    write_safetensors(to + "memory.safetensors", {view("memory", seen.memory)});
    write_safetensors(to + "state_norm.safetensors",
                      {tensor_view("state_norm", {L}, seen.state_norm.data())});
    write_heat_maps(seen, mean, to);
  }
  /// All of them span decades, so colours go by log10.
  static void write_heat_maps(const Inspection& seen, const Matrix<float>& attention,
                              const std::string& to) {
    // Four decades below the largest weight of an earlier token; above the diagonal it is log10(0).
    // The diagonal, with D and what a token says of itself, would outshine the rest, and is grey.
    Matrix<float> earlier = attention.array().log10();
    earlier.diagonal().setConstant(NAN);
    const float most = finite_range(earlier)[1];
    write_heat_map(to + "attention.png", earlier, {most - 4, most});
    // A row is a channel, beside its own mean: from a tenth of it to ten times.
    const Matrix<float> relative = relative_delta(seen.delta).transpose().array().log10();
    write_heat_map(to + "delta.png", relative, {-1, 1});
    const Matrix<float> memory = seen.memory.array().log10();
    write_heat_map(to + "memory.png", memory, finite_range(memory));
  }
};

// --- tokenize, info, convert ---

struct Tokenize : ModelFolder {
  bool decode = false;

  void declare(CLI::App* sub) {
    add_model(sub);
    sub->add_flag("--decode", decode, "token ids to text");
  }
  void run() {
    tokenizer();
    for (std::string line; std::getline(std::cin, line);) {
      if (!line.empty() && line.back() == '\r') line.pop_back();
      const std::vector<Token> ids =
          decode ? parse_ids(line, "standard input") : tokenizer().encode(line);
      if (decode && !ids.empty()) check_ids(ids, tokenizer().vocab_size(), "standard input");
      decode ? void(std::cout << tokenizer().decode(ids) << "\n") : print_ids(ids);
    }
    if (std::cin.bad()) fail("cannot read: standard input");
  }
};

struct Info : ModelFolder {
  void declare(CLI::App* sub) { add_model(sub); }
  void run() {
    open();
    const Config& c = config;
    const auto row = [](const char* name, const auto&... values) {
      std::cout << std::left << std::setw(13) << name;
      (std::cout << ... << values) << "\n";
    };
    const auto attending = static_cast<Index>(c.attention_layers.size());
    const bool transformer = attending == c.n_layer;
    row("model",
        transformer      ? "Transformer"
        : c.version == 1 ? "Mamba"
                         : "Mamba-2",
        ", ", checkpoint.where);
    row("d_model", c.d_model), row("n_layer", c.n_layer), row("vocab_size", c.vocab_size);
    if (!transformer) row("d_inner", c.d_inner), row("d_state", c.d_state), row("d_conv", c.d_conv);
    if (!transformer && c.version == 1) row("dt_rank", c.dt_rank);
    if (!transformer && c.version == 2)
      row("n_heads", c.n_heads), row("head_dim", c.head_dim), row("n_groups", c.n_groups);
    const ssm::AttentionSizes& a = c.attention;
    if (attending > 0)
      row("attention", attending, " layers: ", a.n_heads, " heads of ", a.head_dim, ", ",
          a.n_kv_heads, " of keys and values");
    if (c.d_intermediate > 0) row("MLPs", c.d_intermediate, " wide");
    std::string ends, stored;
    for (const auto& [id, source] : end_tokens())
      ends += (ends.empty() ? "" : "; ") + std::to_string(id) + " (" + source + ")";
    row("end tokens", ends.empty() ? "none" : ends);
    row("head", c.tie_embeddings ? "tied to the embedding" : "its own");
    std::map<std::string, std::size_t> dtypes;
    std::size_t parameters = 0, bytes = 0;
    for (const auto& [name, tensor] : checkpoint.tensors) {
      parameters += tensor.size();
      bytes += tensor.byte_size();
      dtypes[dtype_name(tensor.dtype)] += tensor.size();
    }
    for (const auto& [name, count] : dtypes)
      stored += (stored.empty() ? "" : " ") + name + " (" + std::to_string(count) + ")";
    row("parameters", parameters), row("bytes", bytes), row("dtypes", stored);
    Index state = 0;
    for (Index l = 0; l < c.n_layer; ++l) state += 4 * c.state_size(l);
    const Index a_token = 4 * attending * 2 * a.kv_width();
    if (attending == 0)
      row("state", state, " bytes a sequence, at any length");
    else
      row("state", state, " bytes a sequence and ", a_token, " for every token of it");
  }
};

/// Writes the model in the Hugging Face layout, with the small files that belong to it.
struct Convert : ModelFolder {
  std::string out;

  void declare(CLI::App* sub) {
    add_model(sub);
    add_dtype(sub);
    sub->add_option("--out", out, "the directory to write")->required();
  }
  void run() {
    open();
    if (config.original_only())
      fail("cannot convert: ", checkpoint.where, ": the Hugging Face layout of Mamba has no ",
           !config.attention_layers.empty() ? "attention layers"
           : config.d_intermediate > 0      ? "MLPs"
                                            : "LayerNorm");
    check_size(checkpoint, config);
    config.tie_embeddings = is_tied(checkpoint, config);
    std::vector<Tensor> tensors;
    for_each_shape(config, [&](const std::string& name, const std::vector<std::int64_t>& shape) {
      Tensor tensor = weight(checkpoint, name, shape, config.tie_embeddings);
      tensor.name = name;
      tensor.shape = shape;  // without the padding
      tensors.push_back(tensor);
    });
    const std::string to = make_folder(out);
    check_output(to + "model.safetensors");
    write_safetensors(to + "model.safetensors", tensors, {{"format", "pt"}}, engine_options.dtype);
    write_config(out, config);
    copy_small_files(to);
  }
};

/// Adds a subcommand to the app, which runs it once it was parsed.
using Command = std::function<void(CLI::App& app)>;

template <class Struct>
Command command(const char* name, const char* what) {
  return [=](CLI::App& app) {
    CLI::App* sub = app.add_subcommand(name, what);
    const auto flags = std::make_shared<Struct>();
    flags->declare(sub);
    sub->callback([flags] { flags->run(); });
  };
}

/// The whole of main: `mamba "Once upon a time"` is short for `mamba generate "Once upon a time"`.
template <class Engine>
int run(int argc, char** argv, const std::vector<Command>& more = {}) {
  take_standard_numbers();
  std::signal(SIGXFSZ, SIG_IGN);  // a file too large is an error of its writer, with a line
  std::ios::sync_with_stdio(false);
  CLI::App app("Mamba and Mamba-2: " + std::string(Engine::kDescription), Engine::kName);
  app.require_subcommand(1);
  app.option_defaults()->always_capture_default();  // --help shows them
  std::vector<Command> commands = {
      command<Generate<Engine>>("generate", "continue a text"),
      command<Logits<Engine>>("logits", "write the logits of every position"),
      command<Gradients<Engine>>("gradients", "write the loss and its gradient for every weight"),
      command<Perplexity<Engine>>("perplexity", "perplexity of a text, against context length"),
      command<ScoreRequests<Engine>>("score", "how likely continuations and choices are"),
      command<Inspect>("inspect", "what a layer's scan does with a text"),
      command<Tokenize>("tokenize", "standard input to token ids, line by line"),
      command<Info>("info", "sizes of a model"),
      command<Convert>("convert", "write a model in the Hugging Face layout")};
  commands.insert(commands.end(), more.begin(), more.end());
  for (const Command& add : commands) add(app);
  std::vector<std::string> words(argv + 1, argv + argc);
  bool named = words.empty() || words[0] == "-h" || words[0] == "--help";
  for (const CLI::App* sub : app.get_subcommands({})) named = named || words[0] == sub->get_name();
  if (!named) words.insert(words.begin(), "generate");
  std::reverse(words.begin(), words.end());  // as CLI11 wants them
  const auto say = [](const std::string& line, int status) {
    std::cerr << Engine::kName << ": " << line << "\n";
    return status;
  };
  try {
    app.parse(words);
    if (!std::cout.flush()) fail("cannot write to standard output");
    return 0;
  } catch (const CLI::CallForHelp& help) {
    app.exit(help);
    return std::cout.flush() ? 0 : say("cannot write to standard output", 1);
  } catch (const CLI::ParseError& error) {
    return say(std::string(error.what()) + "; --help shows the usage", 2);
  } catch (const UsageError& error) {
    return say(error.what(), 2);
  } catch (const std::bad_alloc&) {
    return say("out of memory", 1);
  } catch (const std::length_error&) {
    return say("out of memory", 1);
  } catch (const std::exception& error) {
    return say(error.what(), 1);
  }
}

}  // namespace mamba
