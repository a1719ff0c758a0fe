// Claims: whole models agree with outsiders' logits in both published layouts, in every mode, and
// the modes agree with each other. The outsiders are the official package and transformers, in
// float64.
#include "support.hpp"

#define MAMBA_NO_MAIN
#include "../mamba.cpp"

using namespace test;
using mamba::Mode;

namespace {

/// Those, and the stories models of MAMBA_TEST_DATA.
std::vector<Case> models() {
  std::vector<Case> cases = golden_models();
  const char* more = std::getenv("MAMBA_TEST_DATA");
  for (const char* name : {"stories-mamba1-hf", "stories-mamba1-original", "stories-mamba2-hf"}) {
    if (!more || !*more) break;
    const std::string path = std::string(more) + "/weights/" + name;
    const mamba::Checkpoint file = mamba::read_safetensors(path + "/expected.safetensors");
    Case c{path, {}, {}};
    for (int i = 0; i < 5; ++i) {
      c.logits.push_back(matrix<double>(file.at("logits_" + std::to_string(i))));
      c.ids.push_back(tokens(file.at("greedy_" + std::to_string(i)), 0, c.logits.back().rows()));
    }
    cases.push_back(c);
  }
  return cases;
}

mamba::CpuEngine open(const std::string& folder, std::optional<mamba::DType> dtype = {}) {
  return open_model<mamba::CpuEngine>(folder, dtype);
}

}  // namespace

TEST_CASE("models: float32 logits agree with golden data below 1e-4, both layouts, every mode") {
  const auto cases = models();
  REQUIRE(cases.size() >= 4);
  double worst = 0;
  for (const Case& c : cases) {
    auto engine = open(c.folder, mamba::DType::F32);
    for (std::size_t i = 0; i < c.ids.size(); ++i)
      for (const std::string& mode : kModes) {
        CAPTURE(c.folder, i, mode);
        const double d = max_difference(logits_of(engine, c.ids[i], mode), c.logits[i]);
        CHECK(d < 1e-4);
        worst = std::max(worst, d);
      }
  }
  std::cout << "models: worst float32 logit is off by " << worst << "\n";
}

TEST_CASE("models: the double reference agrees with golden data below 1e-5, every form") {
  double worst = 0;
  for (const Case& c : models()) {
    const mamba::Config config = mamba::read_config(c.folder);
    const auto model =
        mamba::load_model<ssm::Model<double>>(mamba::read_checkpoint(c.folder), config);
    const bool small = config.d_model < 128;
    for (std::size_t i = 0; i < (small ? c.ids.size() : 1); ++i)
      for (const ssm::Form form : ssm::kForms) {
        if (!small && form == ssm::Form::parallel && config.version == 1)
          continue;  // L d N numbers
        ssm::Options<double> options;
        options.form = form;
        ssm::State<double> state(config);
        const Matrix<double> got = ssm::forward(
            model, c.ids[i].data(), static_cast<Index>(c.ids[i].size()), state, options);
        CAPTURE(c.folder, i, int(form));
        const double d = max_difference(got, c.logits[i]);
        CHECK(d < 1e-5);
        worst = std::max(worst, d);
      }
  }
  std::cout << "models: worst double logit is off by " << worst << " (the files hold float32)\n";
}

TEST_CASE("models: step by step equals the whole sequence in double, states included") {
  for (const Case& c : models()) {
    const mamba::Config config = mamba::read_config(c.folder);
    if (config.d_model >= 128) continue;  // the small models say it all
    const auto model =
        mamba::load_model<ssm::Model<double>>(mamba::read_checkpoint(c.folder), config);
    const auto& ids = c.ids[0];
    ssm::State<double> whole(config), stepped(config);
    const Matrix<double> want =
        ssm::forward(model, ids.data(), static_cast<Index>(ids.size()), whole);
    Matrix<double> got(want.rows(), want.cols());
    for (std::size_t t = 0; t < ids.size(); ++t)
      got.row(static_cast<Index>(t)) = ssm::forward(model, &ids[t], 1, stepped);
    CAPTURE(c.folder);
    CHECK(max_difference(got, want) < 1e-12);
    for (std::size_t l = 0; l < whole.layers.size(); ++l) {
      CHECK(max_difference(whole.layers[l].h, stepped.layers[l].h) < 1e-12);
      CHECK(max_difference(whole.layers[l].conv, stepped.layers[l].conv) < 1e-12);
      CHECK(max_difference(whole.layers[l].past.keys, stepped.layers[l].past.keys) < 1e-12);
      CHECK(max_difference(whole.layers[l].past.values, stepped.layers[l].past.values) < 1e-12);
    }
  }
}

TEST_CASE("models: a text may be cut anywhere, empty pieces included") {
  for (const Case& c : models()) {
    const mamba::Config config = mamba::read_config(c.folder);
    if (config.d_model >= 128) continue;
    const auto model =
        mamba::load_model<ssm::Model<double>>(mamba::read_checkpoint(c.folder), config);
    const Token* ids = c.ids[0].data();
    const Index L = static_cast<Index>(c.ids[0].size());
    ssm::State<double> whole(config);
    const Matrix<double> want = ssm::forward(model, ids, L, whole);
    for (Index cut = 0; cut <= L; ++cut) {
      ssm::State<double> state(config);
      Matrix<double> got(L, want.cols());
      got.topRows(cut) = ssm::forward(model, ids, cut, state);
      CHECK(ssm::forward(model, ids, 0, state).rows() == 0);
      got.bottomRows(L - cut) = ssm::forward(model, ids + cut, L - cut, state);
      CAPTURE(c.folder, cut);
      CHECK(max_difference(got, want) < 1e-12);
      CHECK(max_difference(state.layers.back().h, whole.layers.back().h) < 1e-12);
      CHECK(max_difference(state.layers.back().past.keys, whole.layers.back().past.keys) < 1e-12);
    }
  }
}

TEST_CASE("models: both layouts of the same model give the same bits") {
  const std::string folder = root("tests/golden");
  for (const char* name : {"mamba1", "mamba2"}) {
    auto a = open(folder + "/" + name + "-hf"), b = open(folder + "/" + name + "-original");
    const std::vector<Token> ids = {5, 17, 3, 99, 0, 42};
    CAPTURE(name);
    CHECK(max_difference(logits_of(a, ids, "parallel"), logits_of(b, ids, "parallel")) == 0);
  }
}

TEST_CASE("models: bf16 and f16 storage change the weights, not the arithmetic") {
  const std::string folder = root("tests/golden/mamba1-hf");
  const std::vector<Token> ids = {5, 17, 3, 99, 0, 42};
  for (const mamba::DType dtype : {mamba::DType::BF16, mamba::DType::F16}) {
    // weights rounded once, then stored as f32, must give the same as weights stored in 16 bits
    mamba::Checkpoint rounded = mamba::read_checkpoint(folder);
    mamba::Config config = mamba::read_config(folder);
    for (auto& [name, tensor] : rounded.tensors)
      if (tensor.shape.size() == 2 && name.find("A_log") == std::string::npos)
        tensor = mamba::to_dtype(mamba::to_dtype(tensor, dtype), mamba::DType::F32);
    mamba::CpuEngine want(rounded, config, {});
    auto got = open(folder, dtype);
    for (const char* mode : {"parallel", "recurrent"})
      CHECK(max_difference(logits_of(got, ids, mode), logits_of(want, ids, mode)) < 1e-6);
  }
}

TEST_CASE(
    "generate: greedy continuations of the shipped model equal the expected ones token for "
    "token") {
  const mamba::Checkpoint file =
      mamba::read_safetensors(root("tests/golden/expected_stories.safetensors"));
  auto engine = open(root("weights/stories"));
  const auto tokenizer = mamba::Tokenizer::from_file(root("weights/stories/tokenizer.json"));
  const auto texts = mamba::Json::parse(file.metadata.at("prompts"));
  for (std::size_t i = 0; i < 5; ++i) {
    const std::string n = std::to_string(i);
    const auto prompt = tokens(file.at("prompt_" + n), 0, file.at("prompt_" + n).shape[0]);
    const auto greedy = tokens(file.at("greedy_" + n), 0, file.at("greedy_" + n).shape[0]);
    CHECK(tokenizer.encode(texts[i].get<std::string>()) == prompt);
    mamba::GenerateOptions options;
    options.n = static_cast<Index>(greedy.size() - prompt.size());
    options.sampler.temperature = 0;
    std::vector<mamba::Sequence<mamba::CpuEngine::State>> sequences;
    sequences.push_back({prompt, engine.new_state(), 0, 0});
    engine.generate(sequences, options, [](std::size_t, Token) {});
    CAPTURE(i);
    CHECK(sequences[0].ids == greedy);
  }
}

TEST_CASE("generate: greedy continuations of the golden models are the expected ones") {
  std::size_t models = 0;
  for (const Case& c : golden_models()) {
    const mamba::Checkpoint file = mamba::read_safetensors(c.folder + "/expected.safetensors");
    const auto greedy = tokens(file.at("greedy"));
    auto engine = open(c.folder, mamba::DType::F32);
    mamba::GenerateOptions options;
    options.n = 24;
    options.sampler.temperature = 0;
    std::vector<mamba::Sequence<mamba::CpuEngine::State>> sequences;
    sequences.push_back({{c.ids[0].begin(), c.ids[0].begin() + 9}, engine.new_state(), 0, 0});
    engine.generate(sequences, options, [](std::size_t, Token) {});
    CAPTURE(c.folder);
    const auto& ids = sequences[0].ids;  // the file has them with the prompt or without
    CHECK(std::equal(greedy.rbegin(), greedy.rbegin() + 24, ids.rbegin()));
    ++models;
  }
  CHECK(models >= 8);
}

TEST_CASE("generate: several prompts at once are each as if alone") {
  auto engine = open(root("tests/golden/mamba2-hf"));
  const std::vector<std::vector<Token>> prompts = {{5}, {1, 2, 3, 4, 5, 6, 7}, {9, 8}};
  using Sequence = mamba::Sequence<mamba::CpuEngine::State>;
  mamba::GenerateOptions options;
  options.n = 12;
  std::vector<Sequence> together;
  for (std::size_t i = 0; i < prompts.size(); ++i)
    together.push_back({prompts[i], engine.new_state(), i, 0});
  engine.generate(together, options, [](std::size_t, Token) {});
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    std::vector<Sequence> alone;
    alone.push_back({prompts[i], engine.new_state(), i, 0});
    engine.generate(alone, options, [](std::size_t, Token) {});
    CHECK(alone[0].ids == together[i].ids);
    CHECK(alone[0].ids.size() == prompts[i].size() + 12);
  }
}

TEST_CASE("generate: a saved state goes on as if it had never stopped") {
  for (const char* name : {"mamba1-hf", "mamba2-hf", "transformerpp-original",
                           "mamba2attn-original", "mamba1attn-mlp-original"}) {
    CAPTURE(name);
    auto engine = open(root("tests/golden/") + name);
    a_saved_state_goes_on(engine);
  }
}

TEST_CASE("perplexity: the golden negative log likelihoods, whole, chunked and recurrent") {
  const mamba::Checkpoint file =
      mamba::read_safetensors(root("tests/golden/expected_stories.safetensors"));
  auto engine = open(root("weights/stories"));
  const auto nll = mamba::values<double>(file.at("val_nll"));
  const auto ids = tokens(file.at("val_ids"), 0, static_cast<Index>(nll.size()) + 1);
  const double want =
      std::accumulate(nll.begin(), nll.end(), 0.0) / static_cast<double>(nll.size());
  for (const char* mode : {"parallel", "recurrent", "chunked=7"}) {
    mamba::PerplexityOptions options;
    options.mode = mamba::parse_mode(mode);
    const mamba::Score score = mamba::perplexity(engine, ids, options);
    CAPTURE(mode);
    CHECK(score.tokens == static_cast<Index>(nll.size()));
    CHECK(score.mean() == Approx(want).margin(1e-5));
  }
}

TEST_CASE("perplexity: the 4,096 validation tokens have mean 1.6694") {
  const auto data = extra_data();
  if (!data) return;
  const mamba::Checkpoint file =
      mamba::read_safetensors(*data + "/weights/stories-mamba1-hf/expected.safetensors");
  auto engine = open(root("weights/stories"));
  const auto ids = tokens(file.at("val_ids"), 0, 4097);
  for (const char* mode : {"parallel", "recurrent", "chunked=100"}) {
    mamba::PerplexityOptions options;
    options.mode = mamba::parse_mode(mode);
    CHECK(mamba::perplexity(engine, ids, options).mean() == Approx(1.6694).margin(0.0005));
  }
}

TEST_CASE("perplexity: windows score what they say") {
  auto engine = open(root("tests/golden/mamba1-hf"));
  Random random(1);
  std::vector<Token> ids;
  for (int i = 0; i < 50; ++i) ids.push_back(static_cast<Token>(random.uniform() * 100));
  const auto score = [&](Index length, Index stride, bool carry) {
    mamba::PerplexityOptions options;
    options.length = length;
    options.stride = stride;
    options.carry_state = carry;
    return mamba::perplexity(engine, ids, options);
  };
  CHECK(score(0, 0, false).tokens == 49);
  CHECK(score(50, 0, false).nll == score(0, 0, false).nll);
  CHECK(score(10, 0, false).tokens == 45);  // the first of each of 5 windows has no context
  CHECK(score(10, 5, false).tokens == 49);  // overlapping windows leave out the very first only
  CHECK(score(10, 0, true).tokens == 49);   // carried state: as the whole text
  CHECK(score(10, 0, true).nll == Approx(score(0, 0, false).nll).margin(1e-3));
  CHECK(score(7, 3, false).tokens == 49);
  // by hand: stride 1 scores every token with the 9 before it (fewer at the start)
  double nll = 0;
  for (Index target = 1; target < 50; ++target) {
    const Index begin = std::max<Index>(0, target - 9);
    const std::vector<Token> context(ids.begin() + begin, ids.begin() + target);
    const Matrix<float> logits = logits_of(engine, context, "parallel");
    nll += mamba::negative_log_likelihood(logits, logits.rows() - 1,
                                          ids[static_cast<std::size_t>(target)]);
  }
  CHECK(score(10, 1, false).nll == Approx(nll).margin(1e-3));
  CHECK_THROWS_WITH(score(51, 0, false), Catch::Contains("at most the 50 tokens"));
  CHECK_THROWS_WITH(score(10, 11, false), Catch::Contains("--stride"));
}

TEST_CASE("delta ratio: one is the model itself, another is not") {
  const std::string folder = root("tests/golden/mamba1-hf");
  const std::vector<Token> ids = {5, 17, 3, 99, 0, 42};
  const mamba::Checkpoint checkpoint = mamba::read_checkpoint(folder);
  mamba::EngineOptions half;
  half.delta_ratio = 0.5f;
  mamba::CpuEngine one(checkpoint, mamba::read_config(folder), {}),
      other(checkpoint, mamba::read_config(folder), half);
  const Matrix<float> want = logits_of(other, ids, "parallel");
  CHECK(max_difference(logits_of(one, ids, "parallel"), want) > 1e-2);
  CHECK(max_difference(logits_of(other, ids, "recurrent"), want) < 1e-5);
}

TEST_CASE("inspect: follows the layer it was asked for, to the state in which the model ends") {
  for (const char* name : {"mamba1-hf", "mamba2-hf"}) {
    const std::string folder = root(std::string("tests/golden/") + name);
    const mamba::Config config = mamba::read_config(folder);
    const auto model = mamba::load_model<ssm::Model<float>>(mamba::read_checkpoint(folder), config);
    const std::vector<Token> ids = {5, 17, 3, 99, 42, 7, 0, 17};
    for (const float ratio : {1.f, 0.5f}) {
      ssm::State<float> state(config);
      ssm::Options<float> options;
      options.delta_ratio = ratio;
      ssm::backbone(model, ids.data(), 8, state, options);
      for (Index l = 0; l < config.n_layer; ++l) {
        CAPTURE(name, l, ratio);
        Index matrices = 0;
        const auto seen = mamba::inspect(
            model, ids, l, ratio,
            [&](Index c, const Matrix<float>& M) { matrices += c >= 0 && M.rows() == 8; });
        const auto& layer = state.layers[static_cast<std::size_t>(l)];
        CHECK(matrices == seen.delta.cols());
        CHECK(seen.state_norm(7) == Approx(layer.h.norm()).epsilon(1e-5));
        const auto& A = model.layers[static_cast<std::size_t>(l)].A;
        for (Index c = 0; c < A.rows(); ++c)
          CHECK(seen.memory(c, 0) * -A(c, 0) * seen.delta.col(c).mean() == Approx(1).epsilon(1e-4));
      }
    }
  }
}
