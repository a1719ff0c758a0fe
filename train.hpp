// train.hpp - training, shared by mamba.cpp and mamba.cu: what is learned from and in which order,
// how a model begins, and what is kept so that a run can go on.
//
//   1. Parameters     every weight flat; the official initialization
//   2. Data           texts, ids, prompts and answers, chats, cut into batches of pieces
//   3. LoRA           a learner of adapters, made of one of weights
//   4. Keeping        model.safetensors for everyone, trainer.safetensors to go on from
//   5. The loop       schedule, clipping, preferences (DPO), validation, log
//   6. Command line   mamba train
//
// The maths (gradients, cross-entropy, AdamW) is in ssm_reference.hpp. A program brings a Learner:
//   Learner(const Config&, Learned, const EngineOptions&)
//   accumulate(batch, scale)   adds the gradient of scale * (sum of weight * nll); returns that sum,
//                              unscaled
//   losses(batch)              the nll of each piece, from a zero state, without a gradient
//   gradient_norm()            over all parameters
//   update(adamw, scale)       one step with the gradients times scale, which are then zero again
//   learned()                  parameters and moments, on the host
//   carried(), carry(states)   --carry-state: the state at the end of each slot's last piece
// and, for LoRA, with `which` of parameters() a matrix W (rows, cols):
//   merge(which, A, B)         computes with W + B A from now on; W itself stays
//   pull_back(which, A, B)     dA = B^T dW and dB = dW A^T of the gradient that was accumulated
//   forget_gradients()         makes it zero
#pragma once

#include <tbb/blocked_range.h>
#include <tbb/parallel_for.h>

#include "mamba.hpp"

namespace mamba {

// =======================================================================================
// 1. Parameters
// =======================================================================================

/// What is learned, in full precision, and AdamW's two moments of each number. Here Layer::A is
/// A_log, the parameter, as files have it; who computes makes A = -exp(A_log) of it.
template <class Scalar>
struct Learned {
  ssm::Model<Scalar> weights, m, v;
  Index steps = 0;  // that were taken
};

/// A parameter as the numbers in memory. Row-major in files; A_log lies column by column here.
template <class Scalar>
struct Parameter {
  std::string name;
  Shape shape;
  Scalar* data;
  Index size;

  /// Weight decay is for matrices and the convolution, not for A_log, D, norms and biases.
  bool decays() const {
    return shape.size() >= 2 && name.compare(name.size() - 7, 7, ".weight") == 0;
  }
  Eigen::Map<Eigen::Array<Scalar, Eigen::Dynamic, 1>> values() const { return {data, size}; }
  Eigen::Map<Matrix<Scalar>> matrix() const { return {data, shape[0], size / shape[0]}; }
};

template <class Scalar>
std::vector<Parameter<Scalar>> parameters(const Config& config, ssm::Model<Scalar>& model) {
  std::vector<Parameter<Scalar>> all;
  for_each_weight(config, model, [&](const std::string& name, const Shape& shape, auto& weight) {
    all.push_back({name, shape, weight.data(), weight.size()});
  });
  return all;
}

/// A model of zeros.
template <class Scalar>
ssm::Model<Scalar> zeros(const Config& config) {
  ssm::Model<Scalar> model;
  model.sizes = config;
  model.tied = config.tie_embeddings;
  model.layers.resize(config.n_layer);
  for_each_weight(config, model, [](const std::string&, const Shape& shape, auto& weight) {
    const auto size = std::accumulate(shape.begin(), shape.end(), Index{1}, std::multiplies<>());
    const Index rows = weight.RowsAtCompileTime == 1 ? 1 : shape[0];
    weight.setZero(rows, size / rows);
  });
  return model;
}

/// The model to compute with: A = -exp(A_log).
template <class Scalar>
ssm::Model<Scalar> computed(const ssm::Model<Scalar>& learned) {
  ssm::Model<Scalar> model = learned;
  for (auto& layer : model.layers) layer.A = -layer.A.array().exp();
  return model;
}

/// A published or saved model as parameters to train on from; padding rows of the vocabulary go.
template <class Scalar>
ssm::Model<Scalar> parameters_of(const Checkpoint& checkpoint, const Config& config) {
  auto model = load_model<ssm::Model<Scalar>>(checkpoint, config, DType::F32);
  model.embedding.conservativeResize(config.vocab_size, Eigen::NoChange);
  if (!model.tied) model.lm_head.conservativeResize(config.vocab_size, Eigen::NoChange);
  for (Index l = 0; l < config.n_layer; ++l) {
    if (config.attends(l)) continue;
    auto& A = model.layers[l].A;  // A_log as the file has it
    const std::string name = "backbone.layers." + std::to_string(l) + ".mixer.A_log";
    const auto A_log = values<Scalar>(find_weight(checkpoint, name, false));
    A = Eigen::Map<const Matrix<Scalar>>(A_log.data(), A.rows(), A.cols());
  }
  return model;
}

// The official package's start (mamba_simple.py, mamba2.py, mixer_seq_simple.py of mamba_ssm):
//   embedding       normal, standard deviation 0.02
//   linear, conv1d  uniform within 1 / sqrt(fan in); out_proj and fc2, the last of each residual
//                   step, divided by sqrt(steps); biases of linear layers 0, that of the
//                   convolution like its weight
//   dt_proj.weight  uniform within 1 / sqrt(dt_rank)
//   dt bias         delta = softplus(bias) is log-uniform in [0.001, 0.1], at least 0.0001
//   A_log           log(1), .., log(d_state); Mamba-2: log of a uniform number in [1, 16)
//   D, norms        1, biases of norms 0
inline void initialize(const Config& config, ssm::Model<float>& model, std::uint64_t seed) {
  std::uint64_t tensor = 0;
  const auto steps = static_cast<double>(config.n_layer * (config.d_intermediate > 0 ? 2 : 1));
  Index width = 0;  // taps of the convolution last seen
  for (const Parameter<float>& p : parameters(config, model)) {
    const auto is = [&](const char* part) { return p.name.find(part) != std::string::npos; };
    const auto draw = [&](Index i) { return uniform(seed, tensor, i); };
    const auto within = [&](double bound) {
      return [&draw, bound](Index i) { return bound * (2 * draw(i) - 1); };
    };
    const auto fill = [&](const auto& f) {  // each number is drawn by its place
      tbb::parallel_for(tbb::blocked_range<Index>(0, p.size, 1 << 14), [&](const auto& range) {
        for (Index i = range.begin(); i < range.end(); ++i) p.data[i] = static_cast<float>(f(i));
      });
    };
    if (is("conv1d.weight")) width = p.shape.back();
    const auto fan_in = static_cast<double>(is("conv1d") ? width : p.shape.back());
    if (is("embeddings"))
      fill([&](Index i) {  // Box and Muller
        const double radius = std::sqrt(-2 * std::log(1 - draw(2 * i)));
        return 0.02 * radius * std::cos(2 * M_PI * draw(2 * i + 1));
      });
    else if (is("dt_proj.bias") || is("dt_bias"))
      fill([&](Index i) {
        const double delta = std::max(1e-4, 0.001 * std::pow(100, draw(i)));
        return delta + std::log(-std::expm1(-delta));  // the inverse of softplus
      });
    else if (is("A_log"))  // column by column: all channels of a state are neighbours
      fill([&](Index i) {
        return std::log(config.version == 2 ? 1 + 15 * draw(i) : 1.0 + i / config.d_inner);
      });
    else if (is("proj.bias") || is("norm.bias") || is("norm2.bias") || is("norm_f.bias"))
      fill([](Index) { return 0; });
    else if (is("proj.weight") || is("conv1d") || is("mlp.fc") || is("lm_head"))
      fill(within(1 / std::sqrt(fan_in) / (is("out_proj") || is("fc2") ? std::sqrt(steps) : 1)));
    else  // D and norms
      fill([](Index) { return 1; });
    ++tensor;
  }
}

// =======================================================================================
// 2. Data
// =======================================================================================

/// A stretch of a text to learn from: ids[t + 1] is to be told from ids[0 .. t], for t + 1 >=
/// first. With a slot it goes on from the state that the slot's last piece ended in, unless it
/// begins a text.
struct Piece {
  std::vector<Token> ids;
  Index first = 1;
  Index slot = -1;
  bool begins = true;
  double weight = 1;     // of its loss
  double reference = 0;  // --dpo: its nll under the model that training began with

  Index scored() const { return static_cast<Index>(ids.size()) - first; }
};
using Batch = std::vector<Piece>;

inline Index scored(const Batch& batch) {
  return std::accumulate(batch.begin(), batch.end(), Index{0},
                         [](Index sum, const Piece& piece) { return sum + piece.scored(); });
}

/// Batch 0, 1, 2, .. : a function of its number alone, so that a run can go on from any step.
struct Source {
  std::function<Batch(std::uint64_t number)> batch;
  double batches = 0;                              // in one epoch
  std::uint64_t most = UINT64_MAX;                 // batches that there are
  std::uint64_t fingerprint = 0;                   // of the data
  std::shared_ptr<std::vector<Piece>> texts = {};  // whole ones, of which batches are copies
};

struct DataOptions {
  Index length = 512, batch = 8;
  std::uint64_t seed = 1;
  bool packed = false, carry_state = false;
  bool pairs = false;  // an answer that is preferred, and the other one; `batch` counts pairs

  Index pieces() const { return pairs ? 2 * batch : batch; }
};

/// 0 .. n - 1 in the order of this epoch.
inline std::vector<std::size_t> shuffled(std::size_t n, std::uint64_t seed, std::uint64_t epoch) {
  std::vector<std::pair<double, std::size_t>> keys(n);
  for (std::size_t i = 0; i < n; ++i) keys[i] = {uniform(seed, ~epoch, i), i};
  std::sort(keys.begin(), keys.end());
  std::vector<std::size_t> order(n);
  for (std::size_t i = 0; i < n; ++i) order[i] = keys[i].second;
  return order;
}

/// FNV-1a: tells other data from the same.
inline std::uint64_t fingerprint(const std::vector<Piece>& texts) {
  std::uint64_t hash = 0xCBF29CE484222325u;
  const auto add = [&](std::uint64_t v) { hash = (hash ^ v) * 0x100000001B3u; };
  for (const Piece& text : texts) {
    add(~static_cast<std::uint64_t>(text.first));
    for (const Token id : text.ids) add(static_cast<std::uint64_t>(id));
  }
  return hash;
}

/// Windows of `length` targets at random places of all texts in a row.
inline Source random_windows(const std::vector<Piece>& texts, const DataOptions& o) {
  const auto stream = std::make_shared<std::vector<Token>>();
  for (const Piece& text : texts) stream->insert(stream->end(), text.ids.begin(), text.ids.end());
  const auto places = static_cast<Index>(stream->size()) - o.length;
  if (places < 1)
    fail("--data: expected more than --length ", o.length, " tokens, found ", stream->size());
  const auto batch = [=](std::uint64_t number) {
    Batch pieces(o.batch);
    for (Index i = 0; i < o.batch; ++i) {
      const auto at = stream->begin() + static_cast<Index>(uniform(o.seed, number, i) * places);
      pieces[i].ids.assign(at, at + o.length + 1);
    }
    return pieces;
  };
  return {batch, static_cast<double>(stream->size()) / (o.length * o.batch)};
}

/// Whole texts, or pairs of them, each from a zero state, in a new order every epoch; longer ones
/// lose their end.
inline Source whole_texts(const std::vector<Piece>& given, const DataOptions& o) {
  const std::size_t each = o.pairs ? 2 : 1;
  const auto texts = std::make_shared<std::vector<Piece>>();
  for (std::size_t i = 0; i < given.size(); i += each) {
    for (std::size_t k = i; k < i + each; ++k) {
      texts->push_back(given[k]);
      std::vector<Token>& ids = texts->back().ids;
      ids.resize(std::min(ids.size(), static_cast<std::size_t>(o.length) + 1));
    }
    if (std::any_of(texts->end() - each, texts->end(),
                    [](auto& text) { return text.scored() < 1; }))
      texts->resize(texts->size() - each);
  }
  if (texts->empty())
    fail("--data: expected something to learn within --length ", o.length, " tokens, found none");
  struct Order {
    std::uint64_t epoch = UINT64_MAX;
    std::vector<std::size_t> order;
  };
  const auto now = std::make_shared<Order>();
  const std::size_t n = texts->size() / each;
  const auto batch = [=](std::uint64_t number) {
    Batch pieces;
    for (std::uint64_t i = number * o.batch; pieces.size() < std::size_t(o.pieces()); ++i) {
      if (now->epoch != i / n) *now = {i / n, shuffled(n, o.seed, i / n)};
      const auto first = texts->begin() + now->order[i % n] * each;
      pieces.insert(pieces.end(), first, first + each);
    }
    return pieces;
  };
  return {batch, static_cast<double>(n) / o.batch, UINT64_MAX, 0, texts};
}

/// Texts piece by piece, `batch` of them at a time, one in each slot: a piece goes on from the
/// state in which the piece before it of its text ended (--carry-state).
inline Source carried_texts(const std::vector<Piece>& texts, const DataOptions& o) {
  const auto order = shuffled(texts.size(), o.seed, 0);
  const auto slots = std::make_shared<std::vector<std::vector<Piece>>>(o.batch);
  double pieces = 0;
  for (std::size_t i = 0; i < order.size(); ++i) {
    const Piece& text = texts[order[i]];
    const auto n = static_cast<Index>(text.ids.size());
    for (Index t = 0; t + 1 < n; t += o.length, ++pieces) {
      const auto begin = text.ids.begin() + t;
      Piece piece{{begin, begin + std::min(o.length + 1, n - t)}, 1, Index(i % o.batch), t == 0};
      (*slots)[i % o.batch].push_back(std::move(piece));
    }
  }
  for (const auto& slot : *slots)
    if (slot.empty())
      fail("--data: expected a text for each of ", o.batch, " slots (--batch), found ",
           order.size());
  const auto batch = [=](std::uint64_t number) {
    Batch now;
    for (const auto& slot : *slots) now.push_back(slot[number % slot.size()]);
    return now;
  };
  return {batch, pieces / o.batch};
}

/// A safetensors file with ids (steps, batch, L + 1), in its order.
inline Source recorded_batches(const std::string& path, const Config& config) {
  const Checkpoint file = read_safetensors(path);
  const Tensor& ids = file.at("ids");
  if (ids.shape.size() != 3 || ids.shape[2] < 2)
    fail("--data: ", path, ": ids: expected (steps, batch, length + 1), found ",
         shape_text(ids.shape));
  const auto all = std::make_shared<std::vector<std::int64_t>>(values<std::int64_t>(ids));
  for (const std::int64_t id : *all)
    if (id < 0 || id >= config.vocab_size)
      fail("--data: ", path, ": expected ids below ", config.vocab_size, ", found ", id);
  const Index rows = ids.shape[1], width = ids.shape[2];
  const auto batch = [=](std::uint64_t number) {
    Batch pieces(rows);
    for (Index i = 0; i < rows; ++i) {
      const auto row = all->begin() + static_cast<Index>(number * rows + i) * width;
      pieces[i].ids.assign(row, row + width);
    }
    return pieces;
  };
  return {batch, static_cast<double>(ids.shape[0]), static_cast<std::uint64_t>(ids.shape[0])};
}

/// The texts of a file, apart by <|endoftext|>, without the white space around them; the end token
/// stands before each.
inline void read_texts(const std::string& path, ModelFolder& model, std::vector<Piece>& texts) {
  const std::string all = read_file(path), mark = "<|endoftext|>";
  const auto end = model.tokenizer().id_of(mark);
  if (!end && model.config.eos_token_ids.empty())
    fail("--data: ", path, ": expected an end token to put between texts: this model has none");
  for (std::size_t from = 0; from <= all.size();) {
    const std::size_t to = std::min(all.find(mark, from), all.size());
    std::string_view text(&all[from], to - from);
    text = text.substr(0, stripped_size(text));
    text.remove_prefix(std::min(text.find_first_not_of(" \t\r\n\v\f"), text.size()));
    from = to + mark.size();
    if (text.empty()) continue;
    Piece piece{{end ? *end : model.config.eos_token_ids[0]}};
    const std::vector<Token> ids = model.tokenizer().encode(std::string(text));
    piece.ids.insert(piece.ids.end(), ids.begin(), ids.end());
    check_ids(piece.ids, model.config.vocab_size, "--data: " + path);
    texts.push_back(std::move(piece));
  }
}

// --- chats: lists of {"role", "content"}, made one text of by the model's template ---

/// A plain chat template: of Jinja's language for, if, set, and sums of strings and fields. What
/// else there is is refused by name when it is met.
class ChatTemplate {
 public:
  ChatTemplate(const std::string& source, std::string where, Json variables)
      : where_(std::move(where)), variables_(std::move(variables)) {
    parse(source);
  }
  std::string render(const Json& messages, bool answer_follows) const {
    Json variables = variables_;
    variables.update({{"messages", messages}, {"add_generation_prompt", answer_follows}});
    std::string text;
    std::size_t i = 0;
    run(i, variables, &text);
    if (i < parts_.size()) refuse(parts_[i].words[0]);
    return text;
  }

 private:
  using Words = std::vector<std::string>;  // a string begins with its quote
  struct Part {
    char kind;  // 0: text; otherwise the character after the tag's brace
    std::string text;
    Words words;
  };

  [[noreturn]] void refuse(const std::string& found) const {
    fail("wrong chat template: ", where_,
         ": expected a plain one (for, if, set, sums of strings), ", "found ", quote(found));
  }

  /// Cuts at the tags. As transformers asks of Jinja, a statement takes the blanks before it on its
  /// line with it, and the newline after it; a dash at an edge takes all white space there.
  void parse(const std::string& source) {
    const char* const kSpace = " \t\r\n";
    if (source.size() > 1 << 16) refuse("more than 64 KiB");
    const auto is_tag = [&](std::size_t i) {
      return source[i] == '{' && i + 1 < source.size() &&
             std::string_view("{%#").find(source[i + 1]) != std::string_view::npos;
    };
    for (std::size_t at = 0; at <= source.size();) {
      std::size_t open = at;
      while (open < source.size() && !is_tag(open)) ++open;
      std::string text = source.substr(at, open - at);
      const char kind = open < source.size() ? source[open + 1] : '\0';
      const std::size_t line =
          open == 0 ? std::string::npos : source.find_last_not_of(" \t", open - 1);
      const bool dash = kind != 0 && source[open + 2] == '-';
      if (dash) text.resize(text.find_last_not_of(kSpace) + 1);
      if (!dash && (kind == '%' || kind == '#') &&
          (line == std::string::npos || source[line] == '\n'))
        text.resize(text.find_last_not_of(" \t") + 1);
      parts_.push_back({0, text, {}});
      if (kind == 0) return;
      at = read_tag(source, open + (dash ? 3 : 2), kind);
      if (source[at - 3] == '-')
        at = std::min(source.find_first_not_of(kSpace, at), source.size());
      else if (kind != '{' && source[at] == '\n')
        ++at;
    }
  }
  /// The words of the tag whose inside begins at `at`. Returns where it ends.
  std::size_t read_tag(const std::string& s, std::size_t at, char kind) {
    const char close[] = {kind == '{' ? '}' : kind, '}', 0};
    Part part{kind, "", {}};
    const auto is_word = [](char c) {
      return std::isalnum(static_cast<unsigned char>(c)) || c == '_';
    };
    while (at + 1 < s.size() && s.compare(at, 2, close) != 0) {
      const std::size_t begin = at++;
      if (s[begin] == '\'' || s[begin] == '"') {
        std::string word = "'";
        for (; at < s.size() && s[at] != s[begin]; ++at) {
          const bool escaped = s[at] == '\\' && at + 1 < s.size();
          const char c = escaped ? s[++at] : s[at];
          word += escaped && c == 'n' ? '\n' : escaped && c == 't' ? '\t' : c;
        }
        part.words.push_back(word);
        ++at;
      } else if (is_word(s[begin])) {
        while (at < s.size() && is_word(s[at])) ++at;
        part.words.push_back(s.substr(begin, at - begin));
      } else if (s[begin] != ' ' && s[begin] != '\n' && s[begin] != '\t') {
        if (at < s.size() && s[at] == '=') ++at;  // == and !=
        if (s.compare(at, 2, close) != 0 || s[begin] != '-')
          part.words.push_back(s.substr(begin, at - begin));
      }
    }
    if (at + 1 >= s.size()) refuse("a tag without an end");
    if (kind != '#' && part.words.empty()) refuse("an empty tag");
    if (part.words.size() > 1000) refuse("a tag of more than 1,000 words");
    if (kind != '#') parts_.push_back(part);
    return at + 2;
  }

  /// Carries out the parts from i on, up to the end of the body that they are in. text: null if
  /// they are to be passed over.
  void run(std::size_t& i, Json& variables, std::string* text) const {
    for (; i < parts_.size(); ++i) {
      const auto& [kind, plain, words] = parts_[i];
      if (kind == 0 && text) *text += plain;
      if (kind == '{' && text) {
        const Json value = evaluate(words, 0, variables);
        if (!value.is_string()) refuse(words[0]);
        *text += value.get<std::string>();
      }
      if (kind != '%') continue;
      const std::string& word = words[0];
      if (word == "endfor" || word == "elif" || word == "else" || word == "endif") return;
      if (word == "for" && words.size() > 3 && words[2] == "in")
        loop(i, variables, text);
      else if (word == "if")
        branch(i, variables, text);
      else if (word != "set" || words.size() < 4 || words[2] != "=")
        refuse(word);
      else if (text)
        variables[words[1]] = evaluate(words, 3, variables);
    }
  }
  void loop(std::size_t& i, Json& variables, std::string* text) const {
    const Words& words = parts_[i].words;
    const Json list = text ? evaluate(words, 3, variables) : Json::array();
    if (!list.is_array()) refuse(words[3]);
    const std::size_t body = ++i, n = list.size();
    if (n == 0) run(i, variables, nullptr);
    for (std::size_t k = 0; k < n; ++k) {
      i = body;
      variables[words[1]] = list[k];
      variables["loop"] = {
          {"first", k == 0}, {"last", k + 1 == n}, {"index0", k}, {"index", k + 1}};
      run(i, variables, text);
    }
    if (i == parts_.size() || parts_[i].words[0] != "endfor") refuse("a loop without an end");
  }
  void branch(std::size_t& i, Json& variables, std::string* text) const {
    for (bool done = false; i < parts_.size() && parts_[i].words[0] != "endif";) {
      const Words& words = parts_[i].words;
      if (words[0] == "endfor") refuse(words[0]);
      const bool take =
          text && !done && (words[0] == "else" || truth(evaluate(words, 1, variables)));
      run(++i, variables, take ? text : nullptr);
      done = done || take;
    }
    if (i == parts_.size()) refuse("an if without an end");
  }

  static bool truth(const Json& value) {
    if (value.is_string()) return !value.get<std::string>().empty();
    return !value.is_null() && value != false && value != 0 && value != Json::array();
  }
  Json evaluate(const Words& words, std::size_t i, const Json& variables) const {
    const Json value = either(words, i, variables);
    if (i < words.size()) refuse(words[i - 1] + words[i]);
    return value;
  }
  // Each takes the words from i on: a or b; a and b; not a; a == b; a + b; what stands alone.
  static bool next(const Words& words, std::size_t& i, const char* word) {
    const bool is = i < words.size() && words[i] == word;
    i += is;
    return is;
  }
  Json either(const Words& words, std::size_t& i, const Json& variables) const {
    Json value = both(words, i, variables);
    while (next(words, i, "or")) {
      const Json other = both(words, i, variables);
      if (!truth(value)) value = other;
    }
    return value;
  }
  Json both(const Words& words, std::size_t& i, const Json& variables) const {
    Json value = negation(words, i, variables);
    while (next(words, i, "and")) {
      const Json other = negation(words, i, variables);
      if (truth(value)) value = other;
    }
    return value;
  }
  Json negation(const Words& words, std::size_t& i, const Json& variables) const {
    if (next(words, i, "not")) return !truth(negation(words, i, variables));
    const Json value = sum(words, i, variables);
    if (next(words, i, "==")) return value == sum(words, i, variables);
    if (next(words, i, "!=")) return value != sum(words, i, variables);
    if (!next(words, i, "is")) return value;
    const bool no = next(words, i, "not");
    if (next(words, i, "defined")) return value.is_null() == no;
    if (!next(words, i, "none")) refuse(i < words.size() ? words[i] : "is");
    return value.is_null() != no;
  }
  Json sum(const Words& words, std::size_t& i, const Json& variables) const {
    Json value = single(words, i, variables);
    while (next(words, i, "+")) {
      const Json other = single(words, i, variables);
      if (!value.is_string() || !other.is_string()) refuse("+ of what is no text");
      value = value.get<std::string>() + other.get<std::string>();
    }
    return value;
  }
  Json single(const Words& words, std::size_t& i, const Json& variables) const {
    if (i >= words.size()) refuse(words.back());
    const std::string& word = words[i++];
    Json value;
    if (word == "(") {
      value = either(words, i, variables);
      if (!next(words, i, ")")) refuse("(");
    } else if (word[0] == '\'') {
      value = word.substr(1);
    } else if (word.find_first_not_of("0123456789") == std::string::npos) {
      value = std::atoi(word.c_str());
    } else if (std::set<std::string>{"true", "True", "false", "False"}.count(word)) {
      value = word == "true" || word == "True";
    } else if (std::isalpha(static_cast<unsigned char>(word[0]))) {
      value = variables.value(word, Json());
    } else {
      refuse(word);
    }
    for (;;) {
      if (next(words, i, "[")) {
        value = field(value, either(words, i, variables));
        if (!next(words, i, "]")) refuse("[");
      } else if (i + 1 < words.size() && next(words, i, ".")) {
        value = field(value, words[i++]);
      } else if (i + 1 < words.size() && words[i] == "|" && words[i + 1] == "trim" &&
                 value.is_string()) {
        i += 2;
        const std::string text = value.get<std::string>();
        const std::size_t begin = std::min(text.find_first_not_of(" \t\r\n"), text.size());
        value = text.substr(begin, text.find_last_not_of(" \t\r\n") + 1 - begin);
      } else {
        return value;
      }
    }
  }
  static Json field(const Json& of, const Json& key) {
    if (of.is_object() && key.is_string()) return of.value(key.get<std::string>(), Json());
    const bool there = of.is_array() && key.is_number_integer() && key >= 0 && key < of.size();
    return there ? of[key.get<std::size_t>()] : Json();
  }

  std::string where_;
  Json variables_;
  std::vector<Part> parts_;
};

/// The template of a model: chat_template.jinja, or in tokenizer_config.json.
inline ChatTemplate chat_template(const ModelFolder& model) {
  const std::string file = model.folder + "/chat_template.jinja";
  const std::string names = model.folder + "/tokenizer_config.json";
  const Json settings = std::filesystem::exists(names) ? read_settings(names) : Json::object();
  const bool own = std::filesystem::exists(file);
  const Json source = own ? Json(read_file(file)) : settings.value("chat_template", Json());
  if (!source.is_string())
    fail("--data: messages: expected a chat template in ", model.folder,
         " (chat_template.jinja, or in tokenizer_config.json), found none");
  Json variables = Json::object();
  for (const char* name : {"bos_token", "eos_token"}) {
    const Json token = settings.value(name, Json());  // or {"content": ...}
    variables[name] = token.is_object() ? token.value("content", Json()) : token;
  }
  return {source.get<std::string>(), own ? file : names, variables};
}

/// A conversation as texts to learn from, one for each answer of the assistant.
inline std::vector<Piece> read_chat(const Json& messages, ModelFolder& model,
                                    const std::string& where) {
  const ChatTemplate chat = chat_template(model);
  std::vector<Piece> pieces;
  Json before = Json::array();
  for (const Json& message : messages) {
    if (!message.is_object() || !message.value("role", Json()).is_string() ||
        !message.value("content", Json()).is_string())
      fail(where, ": messages: expected objects with role and content, found ",
           quote(message.dump(-1, ' ', true, Json::error_handler_t::replace)));
    const std::string prompt = chat.render(before, true);
    before.push_back(message);
    if (message["role"] != "assistant") continue;
    std::string text = chat.render(before, false);
    if (text.compare(0, prompt.size(), prompt) != 0)
      fail(where, ": messages: expected a template that begins an answer as it has it later");
    text.resize(std::max(prompt.size(), stripped_size(text)));
    Piece piece{model.tokenizer().encode(text)};
    const std::vector<Token> begin = model.tokenizer().encode(prompt);
    const auto cut = std::mismatch(begin.begin(), begin.end(), piece.ids.begin(), piece.ids.end());
    piece.first = std::max<Index>(1, cut.first - begin.begin());  // a blank may join the answer
    pieces.push_back(std::move(piece));
  }
  if (pieces.empty()) fail(where, ": messages: expected an answer of the assistant, found none");
  return pieces;
}

/// Lines {"prompt", "answer"} or {"messages"}; with `pairs` {"prompt", "chosen", "rejected"}, any
/// of which may be messages. Only answers, and the end token after each, are learned.
inline void read_answers(const std::string& path, ModelFolder& model, bool pairs,
                         std::vector<Piece>& texts) {
  std::istringstream file(read_file(path));
  std::size_t number = 0;
  const auto ends = model.end_tokens();
  const auto is_chat = [](const Json& json) {
    return json.is_array() && !json.empty() && json[0].is_object();
  };
  for (std::string line; std::getline(file, line);) {
    const std::string where = "--data: " + path + ": line " + std::to_string(++number);
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    const Json json = parse_json(line, where);
    if (!json.is_object()) fail(where, ": expected an object");
    const auto add = [&](Piece piece, bool is_text) {
      if (is_text && !ends.count(piece.ids.back()) && !model.config.eos_token_ids.empty())
        piece.ids.push_back(model.config.eos_token_ids[0]);
      check_ids(piece.ids, model.config.vocab_size, where);
      texts.push_back(std::move(piece));
    };
    const auto add_request = [&](const RequestNames& names, const RequestNames& others) {
      const Request request = parse_request(json, where, model, names, others);
      Piece piece{request.context, static_cast<Index>(request.context.size())};
      piece.ids.insert(piece.ids.end(), request.continuation.begin(), request.continuation.end());
      add(std::move(piece), request.is_text);
    };
    for (const std::string name : {"chosen", "rejected"}) {
      if (!pairs) break;
      if (is_chat(json.value(name, Json()))) {
        Json messages = is_chat(json.value("prompt", Json())) ? json["prompt"] : Json::array();
        for (const Json& message : json[name]) messages.push_back(message);
        add(read_chat(messages, model, where).back(), true);
      } else {
        add_request({"prompt", name}, {"prompt", name});
      }
    }
    if (!pairs && json.contains("messages"))
      for (Piece& piece : read_chat(json["messages"], model, where)) add(std::move(piece), true);
    else if (!pairs)
      add_request(kAnswered, kScored);
  }
}

inline bool has_suffix(const std::string& path, const std::string& suffix) {
  return path.size() >= suffix.size() &&
         path.compare(path.size() - suffix.size(), suffix.size(), suffix) == 0;
}

/// All of --data, by the files' names: .safetensors, .jsonl, or texts.
inline Source read_data(const std::vector<std::string>& paths, ModelFolder& model,
                        const DataOptions& o) {
  std::vector<Piece> texts;
  bool answers = false;
  for (const std::string& path : paths) {
    const bool lines = has_suffix(path, ".jsonl");
    if (o.pairs && !lines)
      fail("--dpo: --data: ", path, ": expected .jsonl of prompt, chosen and rejected");
    if (has_suffix(path, ".safetensors")) {
      if (paths.size() > 1) fail_usage("--data: expected one file of ids, found ", paths.size());
      return recorded_batches(path, model.config);
    }
    answers = answers || lines;
    lines ? read_answers(path, model, o.pairs, texts) : read_texts(path, model, texts);
  }
  if (texts.empty()) fail("--data: ", paths[0], ": expected at least one text, found none");
  Source source = answers || o.packed ? whole_texts(texts, o)
                  : o.carry_state     ? carried_texts(texts, o)
                                      : random_windows(texts, o);
  source.fingerprint = fingerprint(texts);
  return source;
}

/// What --validation is scored on: each answer whole, texts in a row in windows of `length`.
inline std::vector<Batch> read_validation(const std::string& path, ModelFolder& model,
                                          const DataOptions& o) {
  std::vector<Piece> texts, windows;
  if (has_suffix(path, ".safetensors"))
    fail("--validation: ", path, ": expected texts or .jsonl, found a .safetensors file");
  if (o.pairs || has_suffix(path, ".jsonl")) {
    read_answers(path, model, o.pairs, windows);
  } else {
    read_texts(path, model, texts);
    std::vector<Token> stream;
    for (const Piece& text : texts) stream.insert(stream.end(), text.ids.begin(), text.ids.end());
    const auto n = static_cast<Index>(stream.size());
    for (Index t = 0; t + 1 < n; t += o.length)
      windows.push_back({{stream.begin() + t, stream.begin() + std::min(n, t + o.length + 1)}});
  }
  if (windows.empty()) fail("--validation: ", path, ": expected at least one text, found none");
  std::vector<Batch> batches;
  for (std::size_t i = 0; i < windows.size(); ++i) {
    if (i % o.pieces() == 0) batches.emplace_back();
    batches.back().push_back(windows[i]);
  }
  return batches;
}

// =======================================================================================
// 3. LoRA
// =======================================================================================

struct LoraOptions {
  Index rank = 0;    // 0: all weights are learned
  double alpha = 0;  // 0: rank
  std::vector<std::string> targets = {"in_proj", "x_proj"};

  double scale() const { return alpha > 0 ? alpha / rank : 1; }
  bool has(const std::string& weight) const {
    return std::any_of(targets.begin(), targets.end(), [&](const std::string& target) {
      return weight.find("." + target + ".weight") != std::string::npos;
    });
  }
};

/// What is learned of one weight W (rows, cols): A (r, cols) and B (rows, r).
template <class Scalar>
struct LoraPair {
  struct Factor {
    std::string name;           // in the adapter's file
    Matrix<Scalar> w, g, m, v;  // the numbers, their gradients, and AdamW's moments of these
  };
  std::string weight;
  std::size_t which = 0;  // of parameters()
  Factor A, B;
};

/// Where the head is the embedding and only that is to be adapted, the head becomes one of its own.
template <class Scalar>
void untie(Config& config, ssm::Model<Scalar>& model) {
  if (!model.tied) return;
  model.lm_head = model.embedding;
  model.tied = config.tie_embeddings = false;
}

/// Learns adapters (Hu et al. 2021): a weight W is held and W + s B A computed with, s = alpha / r,
/// so dA = s B^T dW and dB = s dW A^T. At first A is uniform within 1 / sqrt(cols) and B is 0. It
/// leaves all work on W to a Learner, which is made of the weights that are held.
template <class Learner>
class LoraLearner {
 public:
  using Scalar = typename Learner::Scalar;
  using Pairs = std::vector<LoraPair<Scalar>>;

  LoraLearner(const Config& config, Learned<Scalar> base, const EngineOptions& options,
              const LoraOptions& lora, std::uint64_t seed)
      : config_(config), scale_(Scalar(lora.scale())) {
    std::size_t which = 0;
    for (const auto& p : parameters(config, base.weights)) {
      if (lora.has(p.name)) pairs_.push_back(begin(p.name, p.shape, which, lora.rank, seed));
      ++which;
    }
    if (pairs_.empty()) fail_usage("--lora-targets: expected weights of this model, found none");
    learner_ = std::make_unique<Learner>(config, std::move(base), options);
  }

  Index steps() const { return steps_; }
  const Pairs& pairs() const { return pairs_; }
  double accumulate(const Batch& batch, double scale) { return learner_->accumulate(batch, scale); }
  std::vector<double> losses(const Batch& batch) { return learner_->losses(batch); }
  auto carried() const { return learner_->carried(); }
  template <class States>
  void carry(const States& states) {
    learner_->carry(states);
  }

  double gradient_norm() {
    learner_->gradient_norm();  // puts the parts together
    double squares = 0;
    for (auto& pair : pairs_) {
      std::tie(pair.A.g, pair.B.g) = learner_->pull_back(pair.which, pair.A.w, scale_ * pair.B.w);
      pair.B.g *= scale_;
      for (const auto* f : {&pair.A, &pair.B}) squares += double(f->g.squaredNorm());
    }
    learner_->forget_gradients();
    return std::sqrt(squares);
  }

  void update(const ssm::AdamW& adamw, double scale) {
    ++steps_;
    const auto flat = [](Matrix<Scalar>& m) { return ssm::Numbers<Scalar>(m.data(), m.size()); };
    for (auto& pair : pairs_)
      for (auto* f : {&pair.A, &pair.B}) {
        f->g *= Scalar(scale);
        ssm::adamw_step<Scalar>(adamw, steps_, true, flat(f->g), flat(f->m), flat(f->v),
                                flat(f->w));
      }
    merge();
  }

  /// Goes on from these.
  void set(Pairs pairs, Index steps) {
    pairs_ = std::move(pairs);
    steps_ = steps;
    merge();
  }

  /// The weights with what was learned in them.
  Learned<Scalar> learned() const {
    Learned<Scalar> all = learner_->learned();
    const auto weights = parameters(config_, all.weights);
    for (const auto& pair : pairs_) weights[pair.which].matrix() += scale_ * pair.B.w * pair.A.w;
    return all;
  }

 private:
  static LoraPair<Scalar> begin(const std::string& name, const Shape& shape, std::size_t which,
                                Index rank, std::uint64_t seed) {
    LoraPair<Scalar> pair{name, which, {}, {}};
    const double bound = 1 / std::sqrt(double(shape[1]));
    pair.A.w.resize(rank, shape[1]);
    for (Index i = 0; i < pair.A.w.size(); ++i)
      pair.A.w.data()[i] = Scalar(bound * (2 * uniform(seed, which, i) - 1));
    pair.B.w.setZero(shape[0], rank);
    pair.A.name = lora_name(name, 'A'), pair.B.name = lora_name(name, 'B');
    for (auto* f : {&pair.A, &pair.B})
      for (auto* more : {&f->g, &f->m, &f->v}) more->setZero(f->w.rows(), f->w.cols());
    return pair;
  }
  void merge() {
    for (const auto& pair : pairs_) learner_->merge(pair.which, pair.A.w, scale_ * pair.B.w);
  }

  Config config_;
  Scalar scale_;
  Pairs pairs_;
  Index steps_ = 0;
  std::unique_ptr<Learner> learner_;
};

/// The factors as tensors, laid out as PEFT has them; with a prefix, AdamW's moments of them.
inline std::vector<Tensor> lora_tensors(const std::vector<LoraPair<float>>& pairs,
                                        Matrix<float> LoraPair<float>::Factor::*what,
                                        const std::string& prefix = "") {
  std::vector<Tensor> tensors;
  for (const auto& pair : pairs)
    for (const auto* f : {&pair.A, &pair.B}) {
      const bool transposed = f->name.find(".lora_embedding_") != std::string::npos;
      const auto rows =
          std::make_shared<Matrix<float>>(transposed ? (f->*what).transpose() : (f->*what));
      tensors.push_back(view(prefix + f->name, *rows));
      tensors.back().keep_alive = rows;
    }
  return tensors;
}

/// Their numbers from a file of these tensors.
inline void read_lora(const Checkpoint& file, const std::string& prefix,
                      std::vector<LoraPair<float>>& pairs,
                      Matrix<float> LoraPair<float>::Factor::*what) {
  for (auto& pair : pairs)
    for (auto* f : {&pair.A, &pair.B}) {
      const Matrix<float> m = lora_factor(file.at(prefix + f->name));
      if (m.rows() != f->w.rows() || m.cols() != f->w.cols())
        fail("wrong shape: ", file.where, ": ", prefix + f->name, ": expected ",
             shape_text({f->w.rows(), f->w.cols()}), ", found ", shape_text({m.rows(), m.cols()}));
      f->*what = m;
    }
}

/// A folder that PEFT and --adapter load.
inline void save_adapter(const std::string& folder, const std::string& base,
                         const LoraOptions& lora, const std::vector<LoraPair<float>>& pairs) {
  const nlohmann::ordered_json json = {{"peft_type", "LORA"},
                                       {"task_type", "CAUSAL_LM"},
                                       {"base_model_name_or_path", base},
                                       {"r", lora.rank},
                                       {"lora_alpha", lora.scale() * lora.rank},
                                       {"lora_dropout", 0.0},
                                       {"target_modules", lora.targets},
                                       {"bias", "none"},
                                       {"fan_in_fan_out", false},
                                       {"init_lora_weights", true},
                                       {"inference_mode", true}};
  write_safetensors(folder + "adapter_model.safetensors",
                    lora_tensors(pairs, &LoraPair<float>::Factor::w), {{"format", "pt"}});
  write_text(folder + "adapter_config.json", json.dump(2) + "\n");
}

// =======================================================================================
// 4. Keeping
// =======================================================================================
//
// OUT/trainer.safetensors has all that decides what comes: the parameters by their names, AdamW's
// moments as m.NAME and v.NAME, the state of each slot with --carry-state, and in its metadata the
// steps that were taken and the options. The place in the data and the random numbers follow from
// the step. OUT/model.safetensors is made from it, for everyone else. Each is written whole or not
// at all.

/// A model's parameters as tensors, A_log row by row in a buffer of its own.
inline std::vector<Tensor> tensors_of(const Config& config, const ssm::Model<float>& model,
                                      const std::string& prefix) {
  std::vector<Tensor> tensors;
  for_each_weight(config, model, [&](const std::string& name, const Shape& shape, const auto& w) {
    const auto rows = std::make_shared<Matrix<float>>(w);
    tensors.push_back({prefix + name, DType::F32, shape, rows->data(), rows});
  });
  return tensors;
}

inline void read_parameters(const Checkpoint& file, const std::string& prefix, const Config& config,
                            ssm::Model<float>& model) {
  for_each_weight(config, model, [&](const std::string& name, const Shape& shape, auto& w) {
    const Tensor& tensor = file.at(prefix + name);
    if (tensor.shape != shape)
      fail("wrong shape: ", file.where, ": ", quote(tensor.name), ": expected ", shape_text(shape),
           ", found ", shape_text(tensor.shape));
    w = Eigen::Map<const Matrix<float>>(values<float>(tensor).data(), w.rows(), w.cols());
  });
}

/// Everything in float32 but the matrices, which are kept in the type that was computed in.
inline void save_model(const std::string& folder, const Config& config,
                       const ssm::Model<float>& model, DType dtype) {
  std::vector<Tensor> tensors = tensors_of(config, model, "");
  for (Tensor& tensor : tensors)
    if (tensor.shape.size() > 1 && tensor.name.find("A_log") == std::string::npos)
      tensor = to_dtype(tensor, dtype);
  write_safetensors(folder + "model.safetensors", tensors, {{"format", "pt"}});
  write_config(folder, config);
}

inline std::string slot_prefix(std::size_t slot) { return "slots." + std::to_string(slot) + "."; }

inline void write_trainer(const std::string& path, std::vector<Tensor> tensors, Index steps,
                          const std::vector<ssm::State<float>>& carried, const Json& options) {
  for (std::size_t slot = 0; slot < carried.size(); ++slot)
    for (const Tensor& tensor : state_tensors(carried[slot], slot_prefix(slot)))
      tensors.push_back(tensor);
  write_safetensors(
      path, tensors,
      {{"format", "mamba trainer"}, {"steps", std::to_string(steps)}, {"options", options.dump()}});
}

inline void save_trainer(const std::string& path, const Config& config,
                         const Learned<float>& learned,
                         const std::vector<ssm::State<float>>& carried, const Json& options) {
  std::vector<Tensor> tensors = tensors_of(config, learned.weights, "");
  for (const auto& [prefix, moments] : {std::pair{"m.", &learned.m}, {"v.", &learned.v}})
    for (const Tensor& tensor : tensors_of(config, *moments, prefix)) tensors.push_back(tensor);
  write_trainer(path, tensors, learned.steps, carried, options);
}

/// The same of adapters; the weights that they belong to are not in it.
template <class Learner>
void save_lora_trainer(const std::string& path, const LoraLearner<Learner>& learner,
                       const Json& options) {
  using Factor = LoraPair<float>::Factor;
  std::vector<Tensor> tensors;
  for (const auto& [prefix, what] :
       {std::pair{"", &Factor::w}, {"m.", &Factor::m}, {"v.", &Factor::v}})
    for (const Tensor& tensor : lora_tensors(learner.pairs(), what, prefix))
      tensors.push_back(tensor);
  write_trainer(path, tensors, learner.steps(), learner.carried(), options);
}

/// The file of a saved run, if it is one with these options.
inline Checkpoint open_trainer(const std::string& path, const Config& config, const Json& options,
                               Index& taken, std::vector<ssm::State<float>>& carried) {
  const Checkpoint file = read_safetensors(path);
  const auto text = [&](const char* key) {
    const auto found = file.metadata.find(key);
    if (found == file.metadata.end()) fail("wrong trainer: ", path, ": expected ", key, " in it");
    return found->second;
  };
  const Json saved = parse_json(text("options"), path);
  if (!saved.is_object()) fail("wrong trainer: ", path, ": options: expected an object");
  const Json steps = parse_json(text("steps"), path);
  if (!steps.is_number_unsigned() || steps > (std::uint64_t{1} << 53))
    fail("wrong trainer: ", path, ": steps: expected a number, found ", quote(text("steps")));
  for (const auto& [name, value] : options.items())
    if (const Json old = saved.value(name, name == "gpus" ? Json(1) : Json()); old != value)
      fail("--resume: ", path, ": ", name, ": expected ", old.dump(), " as at the start, found ",
           value.dump());
  taken = steps.get<Index>();
  for (std::size_t slot = 0; file.find(slot_prefix(slot) + "layers.0.conv"); ++slot)
    carried.push_back(read_state(file, slot_prefix(slot), config));
  return file;
}

inline Learned<float> load_trainer(const std::string& path, const Config& config,
                                   std::vector<ssm::State<float>>& carried, const Json& options) {
  Learned<float> learned{zeros<float>(config), zeros<float>(config), zeros<float>(config), 0};
  const Checkpoint file = open_trainer(path, config, options, learned.steps, carried);
  read_parameters(file, "", config, learned.weights);
  read_parameters(file, "m.", config, learned.m);
  read_parameters(file, "v.", config, learned.v);
  return learned;
}

template <class Learner>
void load_lora_trainer(const std::string& path, const Config& config, const Json& options,
                       LoraLearner<Learner>& learner) {
  using Factor = LoraPair<float>::Factor;
  Index steps = 0;
  std::vector<ssm::State<float>> carried;
  const Checkpoint file = open_trainer(path, config, options, steps, carried);
  auto pairs = learner.pairs();
  for (const auto& [prefix, what] :
       {std::pair{"", &Factor::w}, {"m.", &Factor::m}, {"v.", &Factor::v}})
    read_lora(file, prefix, pairs, what);
  learner.set(std::move(pairs), steps);
  learner.carry(carried);
}

// =======================================================================================
// 5. The loop
// =======================================================================================

/// Programs that learn together, each with every count-th batch of a step. This one alone, unless a
/// program brings others.
struct Ranks {
  Index rank = 0, count = 1;
  bool last = false;  // the next batch is this rank's last of a step
  virtual ~Ranks() = default;
  /// The sum of each number over all ranks, the same bits on all.
  virtual void sum(std::vector<double>&) {}
};

struct TrainOptions {
  Index steps = 0, accumulate = 1, warmup = 0, validate_every = 0, save_every = 0;
  std::shared_ptr<Ranks> ranks = std::make_shared<Ranks>();  // each accumulates so many batches
  double lr = 1e-3, beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0.1, clip = 1;
  double dpo = 0;  // beta; 0: answers are learned by their likelihood
  std::string schedule = "cosine";

  Index batches() const { return accumulate * ranks->count; }  // in a step
};

/// Rises over --warmup steps; then constant, or a cosine down to 5 % at the last step.
inline double learning_rate(const TrainOptions& o, Index step) {
  if (step < o.warmup) return o.lr * (step + 1) / o.warmup;
  if (o.schedule == "constant") return o.lr;
  const double part = static_cast<double>(step - o.warmup) / std::max<Index>(o.steps - o.warmup, 1);
  return o.lr * (0.05 + 0.95 * (1 + std::cos(M_PI * part)) / 2);
}

struct Step {
  Index number = 0, tokens = 0;  // steps taken with this one; targets in it
  double loss = 0, gradient_norm = 0, lr = 0;
  double margin = 0, accuracy = 0;  // --dpo: means over pairs
};

/// Where a text first meets numbers that are none, for the line that ends a run.
template <class Scalar>
std::string where_not_finite(const ssm::Model<Scalar>& learned, const std::vector<Batch>& batches) {
  auto model = computed(learned);
  const Index n_layer = model.sizes.n_layer;
  for (const Batch& batch : batches)
    for (const Piece& piece : batch) {
      const auto finite_after = [&](Index layers) {
        model.sizes.n_layer = layers;
        ssm::State<Scalar> state(model.sizes);
        return ssm::backbone(model, piece.ids.data(), piece.ids.size(), state).allFinite();
      };
      if (finite_after(n_layer)) continue;
      for (Index l = 0; l <= n_layer; ++l)
        if (!finite_after(l))
          return l == 0 ? "; it began in the embedding"
                        : "; it began in layer " + std::to_string(l - 1);
    }
  return "; it began in the head or on the way back";
}

// DPO (Rafailov et al. 2023, equation 7): a pair's chosen answer c should gain on its rejected one
// r, against the model that training began with, whose nll is nll_0.
//   z = beta ((nll_0(c) - nll(c)) - (nll_0(r) - nll(r)))     the margin of their implied rewards
//   loss = -log sigmoid(z),    dloss/dnll(c) = beta sigmoid(-z) = -dloss/dnll(r)
/// Adds the sums of loss, margin and of z > 0 over the pairs of a batch to `sums`, and gives its
/// pieces the weights by which their nll is to be learned. Returns the number of pairs.
template <class Learner>
Index prefer(Learner& learner, double beta, Batch& batch, Step& sums) {
  const std::vector<double> nll = learner.losses(batch);
  for (std::size_t i = 0; i < batch.size(); i += 2) {
    Piece &c = batch[i], &r = batch[i + 1];
    const double z = beta * ((c.reference - nll[i]) - (r.reference - nll[i + 1]));
    sums.loss += std::max(-z, 0.0) + std::log1p(std::exp(-std::abs(z)));
    sums.margin += z;
    sums.accuracy += z > 0;
    c.weight = beta / (1 + std::exp(z));
    r.weight = -c.weight;
  }
  return static_cast<Index>(batch.size() / 2);
}

/// Scores all pieces by the model as it is, for --dpo.
template <class Learner>
void set_references(Learner& learner, Batch& pieces, Index at_a_time) {
  for (std::size_t i = 0; i < pieces.size(); i += at_a_time) {
    const auto first = pieces.begin() + i;
    const auto last = first + std::min<Index>(at_a_time, pieces.end() - first);
    const std::vector<double> nll = learner.losses(Batch(first, last));
    for (std::size_t k = 0; k < nll.size(); ++k) first[k].reference = nll[k];
    show_progress(i, pieces.size());
  }
}

/// One step: gradients of the mean over all targets, or pairs, of `accumulate` batches of each rank,
/// clipped, and AdamW.
template <class Learner>
Step train_step(Learner& learner, const Source& source, const TrainOptions& o, Index number) {
  Ranks& ranks = *o.ranks;
  std::vector<Batch> batches;  // of all ranks
  Step step{number + 1, 0, 0, 0, learning_rate(o, number)};
  std::size_t pairs = 0;
  for (Index i = 0; i < o.batches(); ++i) {
    batches.push_back(source.batch(static_cast<std::uint64_t>(number * o.batches() + i)));
    step.tokens += scored(batches.back());
    pairs += batches.back().size() / 2;
    if (o.dpo > 0 && i % ranks.count == ranks.rank) prefer(learner, o.dpo, batches.back(), step);
  }
  const double n = o.dpo > 0 ? pairs : step.tokens;
  for (Index i = ranks.rank; i < o.batches(); i += ranks.count) {
    ranks.last = i + ranks.count >= o.batches();
    const double sum = learner.accumulate(batches[i], 1 / n);
    if (o.dpo == 0) step.loss += sum;
  }
  std::vector<double> sums = {step.loss, step.margin, step.accuracy};
  ranks.sum(sums);
  step.loss = sums[0] / n, step.margin = sums[1] / n, step.accuracy = sums[2] / n;
  step.gradient_norm = learner.gradient_norm();
  if (!std::isfinite(step.loss) || !std::isfinite(step.gradient_norm))
    fail("train: step ", step.number, ": expected a finite loss and gradient, found ", step.loss,
         " and ", step.gradient_norm, where_not_finite(learner.learned().weights, batches));
  const double scale = o.clip > 0 ? std::min(1.0, o.clip / (step.gradient_norm + 1e-6)) : 1;
  learner.update(ssm::AdamW{step.lr, o.beta1, o.beta2, o.eps, o.weight_decay}, scale);
  return step;
}

/// Mean nll over all targets; with --dpo its loss, margin and accuracy over all pairs.
template <class Learner>
Step validate(Learner& learner, std::vector<Batch> batches, double dpo) {
  Step all;
  Index n = 0;
  for (Batch& batch : batches) {
    if (dpo > 0) {
      n += prefer(learner, dpo, batch, all);
      continue;
    }
    for (const double nll : learner.losses(batch)) all.loss += nll;
    n += scored(batch);
  }
  all.loss /= n, all.margin /= n, all.accuracy /= n;
  return all;
}

/// A row for each step. A run that goes on keeps the rows of the steps that it goes on from.
class Log {
 public:
  Log(const std::string& path, Index steps, bool pairs) : pairs_(pairs) {
    if (path.empty()) return;
    std::string kept = "step,tokens,loss,gradient_norm,lr,tokens_per_s,validation";
    kept += pairs ? ",margin,accuracy,validation_margin,validation_accuracy\n" : "\n";
    if (steps > 0 && std::filesystem::exists(path)) {
      std::istringstream old(read_file(path));
      for (std::string line; std::getline(old, line);)
        if (const Index step = std::atoll(line.c_str()); step > 0 && step <= steps)
          kept += line + "\n";
    }
    write_text(path, kept);
    file_.open(path, std::ios::app);
  }
  void row(const Step& s, double tokens_per_s, const std::optional<Step>& validation) {
    if (!file_.is_open()) return;
    file_ << std::setprecision(9) << s.number << ',' << s.tokens << ',' << s.loss << ','
          << s.gradient_norm << ',' << s.lr << ',' << std::llround(tokens_per_s) << ',';
    if (validation) file_ << validation->loss;
    if (pairs_) file_ << ',' << s.margin << ',' << s.accuracy << ',';
    if (pairs_ && validation) file_ << validation->margin << ',' << validation->accuracy;
    if (pairs_ && !validation) file_ << ',';
    file_ << std::endl;
    if (!file_) fail("cannot write: the log of --log");
  }

 private:
  bool pairs_;
  std::ofstream file_;
};

// =======================================================================================
// 6. Command line
// =======================================================================================

template <class Engine>
struct Train : ModelFolder {
  using Learner = typename Engine::Learner;
  std::vector<std::string> data;
  std::string shape, config_file, out, validation_file, log_file;
  DataOptions data_options;
  TrainOptions options;
  LoraOptions lora;
  double epochs = 1;
  bool resume = false;
  Source source;  // made from these
  std::vector<Batch> validation;

  void declare(CLI::App* sub) {
    folder.clear();
    add_engine<Engine>(sub, engine_options.delta_ratio);
    sub->remove_option(sub->get_option("--dtype"));
    const std::vector<std::string> types = {"f32", "bf16"};
    add_dtype(sub, {types.begin(), types.begin() + (Engine::kHasDevice ? 2 : 1)},
              "what matrices are computed in (default: f32)");
    sub->add_option("--shape", shape, "begin anew: 130m to 2.8b, mamba2-130m to mamba2-2.7b");
    sub->add_option("--config", config_file, "begin anew: a config.json");
    sub->add_option(
           "--data", data,
           "texts apart by <|endoftext|>; .jsonl of prompt and answer, of messages, or with "
           "--dpo of prompt, chosen and rejected; .safetensors with ids (steps, batch, "
           "length + 1)")
        ->required();
    sub->add_option("--out", out, "the folder for model, trainer's file and log")->required();
    sub->add_flag("--resume", resume, "go on from OUT/trainer.safetensors");
    declare_data(sub);
    declare_steps(sub);
    declare_tuning(sub);
  }
  void declare_tuning(CLI::App* sub) {
    auto* rank =
        sub->add_option("--lora", lora.rank, "learn an adapter of this rank, not the weights");
    rank->check(CLI::Range(1, 1 << 16))->default_str("");
    sub->add_option("--lora-alpha", lora.alpha, "its weight is alpha / rank (default: 1)")
        ->check(kPositive)
        ->needs(rank)
        ->default_str("");
    sub->add_option("--lora-targets", lora.targets, "the weights that it is for")
        ->delimiter(',')
        ->check(CLI::IsMember({"in_proj", "x_proj", "dt_proj", "out_proj", "embeddings"}))
        ->needs(rank);
    sub->add_option("--dpo", options.dpo, "learn preferences, with this beta (usual: 0.1)")
        ->check(kPositive)
        ->default_str("");
  }
  void declare_data(CLI::App* sub) {
    DataOptions& d = data_options;
    sub->add_option("--length", d.length, "tokens a piece")->check(kPositive);
    sub->add_option("--batch", d.batch, "pieces at a time")->check(kPositive);
    sub->add_option("--seed", d.seed, "of the start and of the order")->check(kNonNegative);
    auto* packed = sub->add_flag("--packed", d.packed, "whole texts instead of random windows");
    sub->add_flag("--carry-state", d.carry_state, "each text piece by piece, from state to state")
        ->excludes(packed);
    sub->add_option("--validation", validation_file, "texts or .jsonl to score now and then");
    sub->add_option("--log", log_file, "a CSV file with a row for each step");
  }
  void declare_steps(CLI::App* sub) {
    TrainOptions& o = options;
    o.warmup = -1;
    const auto add = [&](const char* name, auto& value, const char* what) {
      return sub->add_option(name, value, what)->check(kNonNegative);
    };
    add("--accumulate", o.accumulate, "batches a step")->check(CLI::Range(1, 1 << 16));
    auto* steps = add("--steps", o.steps, "how many (default: by --epochs)");
    add("--epochs", epochs, "times through the data")->excludes(steps);
    add("--lr", o.lr, "the highest learning rate");
    add("--beta1", o.beta1, "of AdamW")->check(CLI::Range(0.0, 0.999999));
    add("--beta2", o.beta2, "of AdamW")->check(CLI::Range(0.0, 0.999999));
    add("--eps", o.eps, "of AdamW");
    add("--weight-decay", o.weight_decay, "of matrices and the convolution");
    add("--clip", o.clip, "the most that the gradient's norm may be, 0: any");
    add("--warmup", o.warmup,
        "steps in which the learning rate rises (default: 0; with --lora or --dpo a tenth)")
        ->default_str("");
    sub->add_option("--schedule", o.schedule, "of the learning rate after that")
        ->check(CLI::IsMember({"cosine", "constant"}));
    add("--validate-every", o.validate_every, "steps, 0: at the end");
    add("--save-every", o.save_every, "steps, 0: at the end");
  }

  std::string trainer() const { return out + "/trainer.safetensors"; }
  bool begun() const { return std::filesystem::exists(trainer()); }

  void run() {
    check_out();
    if (lora.rank > 0 && folder.empty()) fail_usage("--lora: expected --model, to adapt it");
    Learned<float> learned = begin();
    if (lora.rank == 0) config_text(config);  // what cannot be written is not trained
    data_options.pairs = options.dpo > 0;
    source = read_data(data, *this, data_options);
    if (!validation_file.empty())
      validation = read_validation(validation_file, *this, data_options);
    set_steps();
    lora.rank > 0 ? run_lora(std::move(learned)) : run_whole(std::move(learned));
  }

  /// Refuses a folder where something would be lost.
  void check_out() const {
    if (out.empty()) fail_usage("--out: expected a folder, found an empty name");
    if (begun() && !resume)
      fail("--out: ", trainer(), " is there: --resume goes on from it, or name another folder");
    for (const char* file : {"/model.safetensors", "/adapter_model.safetensors"})
      if (!begun() && std::filesystem::exists(out + file))
        fail("--out: ", out, file, " is there: name another folder");
    if (!resume && std::filesystem::is_regular_file(log_file))
      fail("--log: ", log_file, " is there: name another file");
    if (resume && !begun()) warn("--resume: " + trainer() + " is not there: begins anew");
  }

  void set_steps() {
    const double all = epochs * source.batches / options.batches();
    if (options.steps == 0 && !(all >= 0.5 && all < 1e12))
      fail_usage("--epochs: expected one step or more, found ", all, " steps");
    if (options.steps == 0) options.steps = std::llround(all);
    if (source.most / options.batches() < static_cast<std::uint64_t>(options.steps))
      fail("--data: expected ", options.steps, " steps of ", options.batches(),
           " batches in it, found ", source.most, " batches");
    if (options.warmup < 0)
      options.warmup = lora.rank > 0 || options.dpo > 0 ? options.steps / 10 : 0;
  }

  void run_whole(Learned<float> learned) {
    if (options.dpo > 0) {
      Learner reference(config, {learned.weights, {}, {}}, engine_options);
      set_all_references(reference);
    }
    std::vector<ssm::State<float>> carried;
    const Json settings = decisive(learned.weights);
    if (begun()) learned = load_trainer(trainer(), config, carried, settings);
    Learner learner(config, std::move(learned), engine_options);
    learner.carry(carried);
    loop(learner, [&] {
      Learned<float> now = learner.learned();
      for (const Parameter<float>& p : parameters(config, now.weights))
        check_finite(p.values().isFinite().all(), now.steps, p.name);
      save_trainer(trainer(), config, now, learner.carried(), settings);
      save_model(out + "/", config, now.weights, engine_options.dtype.value_or(DType::F32));
    });
  }

  void run_lora(Learned<float> base) {
    if (lora.has(".embeddings.weight")) untie(config, base.weights);
    base.m = base.v = {};
    const Json settings = decisive(base.weights);
    LoraLearner<Learner> learner(config, std::move(base), engine_options, lora, data_options.seed);
    if (options.dpo > 0) set_all_references(learner);
    if (begun()) load_lora_trainer(trainer(), config, settings, learner);
    loop(learner, [&] {
      for (const auto& pair : learner.pairs())
        for (const auto* f : {&pair.A, &pair.B})
          check_finite(f->w.allFinite(), learner.steps(), f->name);
      save_lora_trainer(trainer(), learner, settings);
      save_adapter(out + "/", folder, lora, learner.pairs());
    });
  }

  static void check_finite(bool finite, Index steps, const std::string& name) {
    if (!finite) fail("train: step ", steps, ": expected finite weights, found others in ", name);
  }

  template <class Any>
  void set_all_references(Any& learner) {
    set_references(learner, *source.texts, data_options.pieces());
    for (Batch& batch : validation) set_references(learner, batch, data_options.pieces());
  }

  /// What is trained: a model that is there, or one that begins at random.
  Learned<float> begin() {
    if (!folder.empty() + !shape.empty() + !config_file.empty() != 1)
      fail_usage("train: expected one of --model, --shape and --config");
    if (!folder.empty()) {
      open();
      auto weights = parameters_of<float>(checkpoint, config);
      config.tie_embeddings = weights.tied;
      return {std::move(weights), zeros<float>(config), zeros<float>(config)};
    }
    config = shape.empty() ? parse_config(config_file) : published_config(shape);
    Learned<float> learned{zeros<float>(config), zeros<float>(config), zeros<float>(config)};
    initialize(config, learned.weights, data_options.seed);
    return learned;
  }

  /// What a run that goes on must have in common with its beginning. The weights that an adapter
  /// or preferences begin with are not in the trainer's file.
  Json decisive(ssm::Model<float>& weights) const {
    Json all = plain_settings();
    if (options.dpo > 0) all["dpo"] = options.dpo;
    if (lora.rank > 0)
      all.update({{"lora", lora.rank},
                  {"lora-alpha", lora.scale() * lora.rank},
                  {"lora-targets", lora.targets}});
    if (options.dpo == 0 && lora.rank == 0) return all;
    std::uint64_t hash = 0xCBF29CE484222325u;  // FNV-1a
    for (const Parameter<float>& p : parameters(config, weights))
      for (Index i = 0; i < p.size; ++i) {
        std::uint32_t bits = 0;
        std::memcpy(&bits, p.data + i, sizeof bits);
        hash = (hash ^ bits) * 0x100000001B3u;
      }
    all["model"] = hash;
    return all;
  }
  Json plain_settings() const {
    const TrainOptions& o = options;
    const DataOptions& d = data_options;
    std::vector<Index> sizes = {config.version, config.d_inner, config.dt_rank};
    for (const SizeField& size : kSizeFields) sizes.push_back(config.*size.member);
    if (const ssm::AttentionSizes& a = config.attention; config.original_only())
      for (const Index size : {Index{config.rms_norm}, config.d_intermediate, a.n_heads,
                               a.n_kv_heads, a.head_dim, a.d_conv, a.rotary_dim})
        sizes.push_back(size);
    return {{"sizes", sizes},
            {"norm-eps", config.norm_eps},
            {"end-tokens", config.eos_token_ids},
            {"length", d.length},
            {"batch", d.batch},
            {"gpus", o.ranks->count},
            {"accumulate", o.accumulate},
            {"seed", d.seed},
            {"packed", d.packed},
            {"carry-state", d.carry_state},
            {"steps", o.steps},
            {"warmup", o.warmup},
            {"lr", o.lr},
            {"beta1", o.beta1},
            {"beta2", o.beta2},
            {"eps", o.eps},
            {"weight-decay", o.weight_decay},
            {"clip", o.clip},
            {"schedule", o.schedule},
            {"delta-ratio", engine_options.delta_ratio},
            {"dtype", dtype_name(engine_options.dtype.value_or(DType::F32))},
            {"data", source.fingerprint}};
  }

  template <class Any, class Save>
  void loop(Any& learner, const Save& save) {
    const Index begun = learner.steps();
    const bool writes = options.ranks->rank == 0;
    check_ranks(plain_settings().dump() + std::to_string(begun));
    if (writes) copy_small_files(make_folder(out));
    Log log(writes ? log_file : "", begun, options.dpo > 0);
    const auto due = [&](Index every, Index step) {
      return step == options.steps || (every > 0 && step % every == 0);
    };
    const double start = now();
    double tokens = 0;
    for (Index number = begun; number < options.steps; ++number) {
      const Step step = train_step(learner, source, options, number);
      if (!writes) continue;
      tokens += step.tokens;
      const double seconds = now() - start;
      std::optional<Step> score;
      if (!validation.empty() && due(options.validate_every, step.number))
        score = validate(learner, validation, options.dpo);
      log.row(step, tokens / seconds, score);
      report(step, tokens / seconds, seconds / (step.number - begun), score);
      if (due(options.save_every, step.number)) save();
    }
    if (begun < options.steps || !writes) return;
    save();  // the model may not have been written
    warn(out + ": all " + std::to_string(begun) + " steps were taken");
  }

  /// Of the products with weights: forward, and backward to x and to W.
  double flops_per_token() const {
    double numbers = 0;
    for_each_shape(config, [&](const std::string& name, const Shape& shape) {
      const bool table = name.find(".embeddings.") != std::string::npos && !config.tie_embeddings;
      if (shape.size() == 2 && !table && name.find("A_log") == std::string::npos)
        numbers += double(shape[0]) * double(shape[1]);
    });
    return 6 * numbers;
  }

  /// All ranks do the same: what they were told has the same hash on all.
  void check_ranks(const std::string& told) const {
    const double hash = static_cast<double>(std::hash<std::string>()(told) >> 24);
    std::vector<double> sums = {hash};
    options.ranks->sum(sums);
    if (sums[0] != hash * static_cast<double>(options.ranks->count))
      fail("expected the same options, data and steps on all ranks, found others");
  }

  void report(const Step& step, double tokens_per_s, double seconds_a_step,
              const std::optional<Step>& validation) const {
    static const bool terminal = ::isatty(2) == 1;
    const Index every = terminal ? 1 : std::max<Index>(1, options.steps / 50);
    static double last = 0;  // line on stderr
    if (!validation && step.number % every != 0 && step.number != options.steps &&
        now() < last + 10)
      return;
    last = now();
    const auto left = std::llround((options.steps - step.number) * seconds_a_step);
    std::ostringstream line;
    line << "step " << step.number << "/" << options.steps << std::fixed << std::setprecision(4)
         << "  loss " << step.loss;
    if (options.dpo > 0) line << "  margin " << step.margin << "  accuracy " << step.accuracy;
    if (validation) line << "  validation " << validation->loss;
    if (validation && options.dpo > 0)
      line << " margin " << validation->margin << " accuracy " << validation->accuracy;
    line << "  gradient " << std::setprecision(3) << step.gradient_norm << "  "
         << std::llround(tokens_per_s) << " tokens/s  ";
    if constexpr (Engine::kHasDevice)
      if (const double peak = Engine::peak(engine_options) * double(options.ranks->count); peak > 0)
        line << std::setprecision(1) << 100 * tokens_per_s * flops_per_token() / peak
             << " % of the matrix peak  ";
    line << left / 60 << ":" << std::setw(2) << std::setfill('0') << left % 60 << " left";
    std::cerr << line.str() << (terminal && !validation ? "\033[K\r" : "\n") << std::flush;
  }
};

}  // namespace mamba
