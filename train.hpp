// train.hpp - training, shared by mamba.cpp and mamba.cu: what is learned from and in which order,
// how a model begins, and what is kept so that a run can go on.
//
//   1. Parameters     every weight flat; the official initialization
//   2. Data           texts, ids, prompts and answers, cut into batches of pieces
//   3. Keeping        model.safetensors for everyone, trainer.safetensors to go on from
//   4. The loop       schedule, clipping, validation, log
//   5. Command line   mamba train
//
// The maths (gradients, cross-entropy, AdamW) is in ssm_reference.hpp. A program brings a Learner:
//   Learner(const Config&, Learned, const LearnerOptions&)
//   accumulate(batch, scale)   adds the gradient of scale * (sum of nll); returns that sum,
//   unscaled loss(batch)                the same sum without a gradient, every piece from a zero
//   state gradient_norm()            over all parameters
//   update(adamw, scale)       one step with the gradients times scale, which are then zero again
//   learned()                  parameters and moments, on the host
//   carried(), carry(states)   --carry-state: the state at the end of each slot's last piece
#pragma once

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
    const auto fill = [&](const auto& f) {
      for (Index i = 0; i < p.size; ++i) p.data[i] = static_cast<float>(f(i));
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
  double batches = 0;               // in one epoch
  std::uint64_t most = UINT64_MAX;  // batches that there are
  std::uint64_t fingerprint = 0;    // of the data
};

struct DataOptions {
  Index length = 512, batch = 8;
  std::uint64_t seed = 1;
  bool packed = false, carry_state = false;
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

/// Whole texts, each from a zero state, in a new order every epoch; longer ones lose their end.
inline Source whole_texts(std::vector<Piece> texts, const DataOptions& o) {
  for (Piece& text : texts)
    if (static_cast<Index>(text.ids.size()) > o.length + 1) text.ids.resize(o.length + 1);
  const auto end = std::remove_if(texts.begin(), texts.end(),
                                  [](const Piece& text) { return text.scored() < 1; });
  texts.erase(end, texts.end());
  if (texts.empty())
    fail("--data: expected something to learn within --length ", o.length, " tokens, found none");
  struct Order {
    std::uint64_t epoch = UINT64_MAX;
    std::vector<std::size_t> order;
  };
  const auto now = std::make_shared<Order>();
  const auto all = std::make_shared<const std::vector<Piece>>(std::move(texts));
  const auto batch = [=](std::uint64_t number) {
    Batch pieces;
    for (std::uint64_t i = number * o.batch; pieces.size() < std::size_t(o.batch); ++i) {
      if (now->epoch != i / all->size())
        *now = {i / all->size(), shuffled(all->size(), o.seed, i / all->size())};
      pieces.push_back((*all)[now->order[i % all->size()]]);
    }
    return pieces;
  };
  return {batch, static_cast<double>(all->size()) / o.batch};
}

/// Texts piece by piece, `batch` of them at a time, one in each slot: a piece goes on from the
/// state in which the piece before it ended (--carry-state).
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

/// Lines {"prompt", "answer"}: only the answer, and the end token after it, is learned.
inline void read_answers(const std::string& path, ModelFolder& model, std::vector<Piece>& texts) {
  std::istringstream file(read_file(path));
  std::size_t number = 0;
  for (std::string line; std::getline(file, line);) {
    const std::string where = path + ": line " + std::to_string(++number);
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    if (parse_json(line, where).contains("messages"))
      fail("--data: ", where, ": expected prompt and answer; chats (messages) are not rendered");
    const Request request = parse_request(line, where, model);
    Piece piece{request.context, static_cast<Index>(request.context.size())};
    piece.ids.insert(piece.ids.end(), request.continuation.begin(), request.continuation.end());
    if (request.is_text && !model.config.eos_token_ids.empty())
      piece.ids.push_back(model.config.eos_token_ids[0]);
    texts.push_back(std::move(piece));
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
    if (has_suffix(path, ".safetensors")) {
      if (paths.size() > 1) fail_usage("--data: expected one file of ids, found ", paths.size());
      return recorded_batches(path, model.config);
    }
    const bool lines = has_suffix(path, ".jsonl");
    answers = answers || lines;
    lines ? read_answers(path, model, texts) : read_texts(path, model, texts);
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
  if (has_suffix(path, ".jsonl")) {
    read_answers(path, model, windows);
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
    if (i % o.batch == 0) batches.emplace_back();
    batches.back().push_back(windows[i]);
  }
  return batches;
}

// =======================================================================================
// 3. Keeping
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

inline void save_trainer(const std::string& path, const Config& config,
                         const Learned<float>& learned,
                         const std::vector<ssm::State<float>>& carried, const Json& options) {
  std::vector<Tensor> tensors = tensors_of(config, learned.weights, "");
  for (const auto& [prefix, moments] : {std::pair{"m.", &learned.m}, {"v.", &learned.v}})
    for (const Tensor& tensor : tensors_of(config, *moments, prefix)) tensors.push_back(tensor);
  for (std::size_t slot = 0; slot < carried.size(); ++slot)
    for (const Tensor& tensor : state_tensors(carried[slot], slot_prefix(slot)))
      tensors.push_back(tensor);
  write_safetensors(path, tensors,
                    {{"format", "mamba trainer"},
                     {"steps", std::to_string(learned.steps)},
                     {"options", options.dump()}});
}

/// The saved run, if it is one with these options.
inline Learned<float> load_trainer(const std::string& path, const Config& config,
                                   std::vector<ssm::State<float>>& carried, const Json& options) {
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
    if (saved.value(name, Json()) != value)
      fail("--resume: ", path, ": ", name, ": expected ", saved.value(name, Json()).dump(),
           " as at the start, found ", value.dump());
  Learned<float> learned{zeros<float>(config), zeros<float>(config), zeros<float>(config),
                         steps.get<Index>()};
  read_parameters(file, "", config, learned.weights);
  read_parameters(file, "m.", config, learned.m);
  read_parameters(file, "v.", config, learned.v);
  for (std::size_t slot = 0; file.find(slot_prefix(slot) + "layers.0.conv"); ++slot)
    carried.push_back(read_state(file, slot_prefix(slot), config));
  return learned;
}

// =======================================================================================
// 4. The loop
// =======================================================================================

struct TrainOptions {
  Index steps = 0, accumulate = 1, warmup = 0, validate_every = 0, save_every = 0;
  double lr = 1e-3, beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0.1, clip = 1;
  std::string schedule = "cosine";
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

/// One step: gradients of the mean over all targets of `accumulate` batches, clipped, and AdamW.
template <class Learner>
Step train_step(Learner& learner, const Source& source, const TrainOptions& o, Index number) {
  std::vector<Batch> batches;
  Step step{number + 1, 0, 0, 0, learning_rate(o, number)};
  for (Index i = 0; i < o.accumulate; ++i) {
    batches.push_back(source.batch(static_cast<std::uint64_t>(number * o.accumulate + i)));
    step.tokens += scored(batches.back());
  }
  for (const Batch& batch : batches)
    step.loss += learner.accumulate(batch, 1.0 / step.tokens) / step.tokens;
  step.gradient_norm = learner.gradient_norm();
  if (!std::isfinite(step.loss) || !std::isfinite(step.gradient_norm))
    fail("train: step ", step.number, ": expected a finite loss and gradient, found ", step.loss,
         " and ", step.gradient_norm, where_not_finite(learner.learned().weights, batches));
  const double scale = o.clip > 0 ? std::min(1.0, o.clip / (step.gradient_norm + 1e-6)) : 1;
  learner.update(ssm::AdamW{step.lr, o.beta1, o.beta2, o.eps, o.weight_decay}, scale);
  return step;
}

/// Mean nll over all targets.
template <class Learner>
double validate(Learner& learner, const std::vector<Batch>& batches) {
  double sum = 0;
  Index tokens = 0;
  for (const Batch& batch : batches) {
    sum += learner.loss(batch);
    tokens += scored(batch);
  }
  return sum / tokens;
}

/// A row for each step. A run that goes on keeps the rows of the steps that it goes on from.
class Log {
 public:
  Log(const std::string& path, Index steps) {
    if (path.empty()) return;
    std::string kept = "step,tokens,loss,gradient_norm,lr,tokens_per_s,validation\n";
    if (steps > 0 && std::filesystem::exists(path)) {
      std::istringstream old(read_file(path));
      for (std::string line; std::getline(old, line);)
        if (const Index step = std::atoll(line.c_str()); step > 0 && step <= steps)
          kept += line + "\n";
    }
    write_text(path, kept);
    file_.open(path, std::ios::app);
  }
  void row(const Step& s, double tokens_per_s, const std::optional<double>& validation) {
    if (!file_.is_open()) return;
    file_ << std::setprecision(9) << s.number << ',' << s.tokens << ',' << s.loss << ','
          << s.gradient_norm << ',' << s.lr << ',' << std::llround(tokens_per_s) << ',';
    if (validation) file_ << *validation;
    file_ << std::endl;
    if (!file_) fail("cannot write: the log of --log");
  }

 private:
  std::ofstream file_;
};

// =======================================================================================
// 5. Command line
// =======================================================================================

template <class Engine>
struct Train : ModelFolder {
  using Learner = typename Engine::Learner;
  std::vector<std::string> data;
  std::string shape, config_file, out, validation_file, log_file;
  DataOptions data_options;
  TrainOptions options;
  double epochs = 1;
  bool resume = false;

  void declare(CLI::App* sub) {
    folder.clear();
    add_engine<Engine>(sub, engine_options.delta_ratio);
    sub->add_option("--shape", shape, "begin anew: 130m to 2.8b, mamba2-130m to mamba2-2.7b");
    sub->add_option("--config", config_file, "begin anew: a config.json");
    sub->add_option("--data", data,
                    "texts apart by <|endoftext|>; .jsonl of prompt and answer; .safetensors with "
                    "ids (steps, batch, length + 1)")
        ->required();
    sub->add_option("--out", out, "the folder for model, trainer's file and log")->required();
    sub->add_flag("--resume", resume, "go on from OUT/trainer.safetensors");
    declare_data(sub);
    declare_steps(sub);
  }
  void declare_data(CLI::App* sub) {
    DataOptions& d = data_options;
    sub->add_option("--length", d.length, "tokens a piece")->check(CLI::PositiveNumber);
    sub->add_option("--batch", d.batch, "pieces at a time")->check(CLI::PositiveNumber);
    sub->add_option("--seed", d.seed, "of the start and of the order")
        ->check(CLI::NonNegativeNumber);
    auto* packed = sub->add_flag("--packed", d.packed, "whole texts instead of random windows");
    sub->add_flag("--carry-state", d.carry_state, "texts piece by piece, from state to state")
        ->excludes(packed);
    sub->add_option("--validation", validation_file, "texts or .jsonl to score now and then");
    sub->add_option("--log", log_file, "a CSV file with a row for each step");
  }
  void declare_steps(CLI::App* sub) {
    TrainOptions& o = options;
    const auto add = [&](const char* name, auto& value, const char* what) {
      return sub->add_option(name, value, what)->check(CLI::NonNegativeNumber)->check(not_nan);
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
    add("--warmup", o.warmup, "steps in which the learning rate rises");
    sub->add_option("--schedule", o.schedule, "of the learning rate after that")
        ->check(CLI::IsMember({"cosine", "constant"}));
    add("--validate-every", o.validate_every, "steps, 0: at the end");
    add("--save-every", o.save_every, "steps, 0: at the end");
  }

  void run() {
    const std::string to = make_folder(out);
    const std::string trainer = to + "trainer.safetensors";
    const bool there = std::filesystem::exists(trainer);
    if (there && !resume)
      fail("--out: ", trainer, " is there: --resume goes on from it, or name another folder");
    if (!there && std::filesystem::exists(to + "model.safetensors"))
      fail("--out: ", to, "model.safetensors is there: name another folder");
    Learned<float> learned = begin();
    const Source source = read_data(data, *this, data_options);
    const double all = epochs * source.batches / options.accumulate;
    if (options.steps == 0 && !(all >= 0.5 && all < 1e12))
      fail_usage("--epochs: expected one step or more, found ", all, " steps");
    if (options.steps == 0) options.steps = std::llround(all);
    if (source.most / options.accumulate < static_cast<std::uint64_t>(options.steps))
      fail("--data: expected ", options.steps, " steps of ", options.accumulate,
           " batches in it, found ", source.most, " batches");
    std::vector<ssm::State<float>> carried;
    if (there) learned = load_trainer(trainer, config, carried, decisive(source));
    copy_small_files(to);
    Learner learner(config, std::move(learned), engine_options);
    learner.carry(carried);
    loop(learner, source, [&] {
      Learned<float> now = learner.learned();
      for (const Parameter<float>& p : parameters(config, now.weights))
        if (!p.values().isFinite().all())
          fail("train: step ", now.steps, ": expected finite weights, found others in ", p.name);
      save_trainer(trainer, config, now, learner.carried(), decisive(source));
      save_model(to, config, now.weights, engine_options.dtype.value_or(DType::F32));
    });
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

  /// What a run that goes on must have in common with its beginning.
  Json decisive(const Source& source) const {
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

  template <class Save>
  void loop(Learner& learner, const Source& source, const Save& save) {
    std::vector<Batch> validation;
    if (!validation_file.empty())
      validation = read_validation(validation_file, *this, data_options);
    const Index begun = learner.steps();
    Log log(log_file, begun);
    const auto due = [&](Index every, Index step) {
      return step == options.steps || (every > 0 && step % every == 0);
    };
    const double start = now();
    double tokens = 0;
    for (Index number = begun; number < options.steps; ++number) {
      const Step step = train_step(learner, source, options, number);
      tokens += step.tokens;
      const double seconds = now() - start;
      std::optional<double> score;
      if (!validation.empty() && due(options.validate_every, step.number))
        score = validate(learner, validation);
      log.row(step, tokens / seconds, score);
      report(step, tokens / seconds, seconds / (step.number - begun), score);
      if (due(options.save_every, step.number)) save();
    }
    if (begun < options.steps) return;
    save();  // the model may not have been written
    warn(out + ": all " + std::to_string(begun) + " steps were taken");
  }

  void report(const Step& step, double tokens_per_s, double seconds_a_step,
              const std::optional<double>& validation) const {
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
    if (validation) line << "  validation " << *validation;
    line << "  gradient " << std::setprecision(3) << step.gradient_norm << "  "
         << std::llround(tokens_per_s) << " tokens/s  " << left / 60 << ":" << std::setw(2)
         << std::setfill('0') << left % 60 << " left";
    std::cerr << line.str() << (terminal && !validation ? "\033[K\r" : "\n") << std::flush;
  }
};

}  // namespace mamba
