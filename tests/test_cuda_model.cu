// Claims: whole models on the GPU agree with outsiders' logits in every mode and with the double
// reference; sequences generated together are each as if alone; the same text is the same bits on
// every run.
#include "support_cuda.hpp"

#include "random_model.hpp"

using namespace test;
using mamba::CudaEngine;
using mamba::DType;
using mamba::GenerateOptions;
using mamba::Mode;
using Sequence = mamba::Sequence<CudaEngine::State>;

namespace {

/// The stories models of MAMBA_TEST_DATA, or none.
std::vector<std::string> stories() {
  const auto data = extra_data();
  std::vector<std::string> found;
  for (const char* name : {"stories-mamba1-hf", "stories-mamba2-hf"})
    if (data && std::filesystem::exists(*data + "/weights/" + name))
      found.push_back(*data + "/weights/" + name);
  return found;
}

CudaEngine open(const std::string& folder, std::optional<DType> dtype = {}, float delta_ratio = 1) {
  return open_model<CudaEngine>(folder, dtype, delta_ratio);
}

const std::vector<const char*> kModels = {"mamba1-hf", "mamba2-hf", "transformerpp-original",
                                          "mamba2attn-original", "mamba1attn-mlp-original"};

/// The largest difference between the same numbers of two states.
template <class Scalar>
double state_difference(const ssm::State<float>& a, const ssm::State<Scalar>& b) {
  double worst = 0;
  for (std::size_t l = 0; l < b.layers.size(); ++l) {
    const auto& x = a.layers[l];
    const auto& y = b.layers[l];
    worst = std::max({worst, max_difference(x.h, y.h), max_difference(x.conv, y.conv),
                      max_difference(x.past.keys, y.past.keys),
                      max_difference(x.past.values, y.past.values)});
  }
  return worst;
}

std::vector<Token> continued(CudaEngine& engine, const std::vector<Token>& prompt,
                             const GenerateOptions& options, std::uint64_t index = 0) {
  std::vector<Sequence> one;
  one.push_back({prompt, engine.new_state(), index, 0});
  engine.generate(one, options, [](std::size_t, Token) {});
  return one[0].ids;
}

}  // namespace

TEST_CASE(
    "cuda models: float32 logits agree with golden data below 1e-4, both layouts, every "
    "mode") {
  double worst = 0;
  std::size_t count = 0;
  for (const Case& c : golden_models()) {
    auto engine = open(c.folder, DType::F32);
    for (std::size_t i = 0; i < c.ids.size(); ++i)
      for (const std::string& mode : kModes) {
        CAPTURE(c.folder, i, mode);
        const double d = max_difference(logits_of(engine, c.ids[i], mode), c.logits[i]);
        CHECK(d < 1e-4);
        worst = std::max(worst, d);
        ++count;
      }
  }
  REQUIRE(count > 0);
  std::cout << "cuda models: worst float32 logit is off by " << worst << "\n";
}

TEST_CASE("cuda models: bf16 and f16 logits are off by rounding alone") {
  for (const Case& c : golden_models())
    for (const DType dtype : {DType::BF16, DType::F16}) {
      auto engine = open(c.folder, dtype);
      const double size = c.logits[0].cwiseAbs().maxCoeff(),
                   eps = dtype == DType::BF16 ? 0x1p-8 : 0x1p-11;
      for (const std::string mode : {"parallel", "recurrent", "chunked=7"}) {
        CAPTURE(c.folder, int(dtype), mode);
        CHECK(max_difference(logits_of(engine, c.ids[0], mode), c.logits[0]) <= 32 * eps * size);
      }
    }
}

TEST_CASE("cuda models: stretched steps agree with the double reference") {
  for (const Case& c : golden_models()) {
    const mamba::Config config = mamba::read_config(c.folder);
    const auto model =
        mamba::load_model<ssm::Model<double>>(mamba::read_checkpoint(c.folder), config);
    ssm::Options<double> options;
    options.delta_ratio = 0.5;
    ssm::State<double> state(config);
    const Matrix<double> want =
        ssm::forward(model, c.ids[0].data(), static_cast<Index>(c.ids[0].size()), state, options);
    auto engine = open(c.folder, DType::F32, 0.5f);
    CHECK(max_difference(logits_of(engine, c.ids[0], "parallel"), want) < 1e-4);
    CHECK(max_difference(logits_of(engine, c.ids[0], "recurrent"), want) < 1e-4);
  }
}

TEST_CASE(
    "cuda models: the final state is the reference's, and a state may travel to the host "
    "and back") {
  for (const Case& c : golden_models()) {
    const mamba::Config config = mamba::read_config(c.folder);
    const auto model =
        mamba::load_model<ssm::Model<double>>(mamba::read_checkpoint(c.folder), config);
    const Index L = static_cast<Index>(c.ids[0].size()), cut = L / 2;
    ssm::State<double> want(config);
    ssm::forward(model, c.ids[0].data(), L, want);
    auto engine = open(c.folder, DType::F32);
    auto state = engine.new_state();
    engine.prefill(state, c.ids[0].data(), cut);
    state = engine.from_host(engine.to_host(state));
    const Matrix<float> last = engine.prefill(state, c.ids[0].data() + cut, L - cut);
    CHECK(max_difference(last, Matrix<double>(c.logits[0].bottomRows(1))) < 1e-4);
    CAPTURE(c.folder);
    CHECK(state_difference(engine.to_host(state), want) < 1e-4);
  }
}

TEST_CASE("cuda generate: greedy tokens of the golden models") {
  for (const Case& c : golden_models()) {
    const mamba::Checkpoint file = mamba::read_safetensors(c.folder + "/expected.safetensors");
    if (!file.find("greedy")) continue;
    std::vector<Token> want = tokens(file.at("greedy"));
    const std::vector<Token> prompt(c.ids[0].begin(), c.ids[0].begin() + 9);
    if (want.size() == 24)
      want.insert(want.begin(), prompt.begin(), prompt.end());  // the new ones alone
    auto engine = open(c.folder, DType::F32);
    GenerateOptions options;
    options.n = static_cast<Index>(want.size() - prompt.size());
    options.sampler.temperature = 0;
    CAPTURE(c.folder);
    CHECK(continued(engine, prompt, options) == want);
  }
}

TEST_CASE(
    "cuda generate: greedy text of the stories models wherever the margin exceeds the "
    "rounding") {
  for (const std::string& folder : stories()) {
    const mamba::Checkpoint file = mamba::read_safetensors(folder + "/expected.safetensors");
    for (const DType dtype : {DType::F32, DType::BF16, DType::F16}) {
      auto engine = open(folder, dtype);
      double rounding = 0;
      for (int i = 0; i < 5; ++i) {
        const Matrix<double> want = matrix<double>(file.at("logits_" + std::to_string(i)));
        std::vector<Token> ids = tokens(file.at("greedy_" + std::to_string(i)));
        ids.resize(static_cast<std::size_t>(want.rows()));
        for (const char* mode : {"parallel", "recurrent"})
          rounding = std::max(rounding, max_difference(logits_of(engine, ids, mode), want));
      }
      CHECK(rounding < (dtype == DType::F32 ? 1e-4 : dtype == DType::F16 ? 0.05 : 0.3));
      int same = 0, all = 0;
      for (int i = 0; i < 5; ++i) {
        const std::string n = std::to_string(i);
        const std::vector<Token> prompt = tokens(file.at("prompt_" + n)),
                                 greedy = tokens(file.at("greedy_" + n));
        const auto margin = mamba::values<double>(file.at("greedy_margin_" + n));
        GenerateOptions options;
        options.n = static_cast<Index>(greedy.size() - prompt.size());
        options.sampler.temperature = 0;
        const std::vector<Token> got = continued(engine, prompt, options);
        for (std::size_t t = prompt.size(); t < greedy.size(); ++t, ++all) {
          if (margin[t - prompt.size()] <= 2 * rounding && got[t] != greedy[t])
            break;  // may part here
          CAPTURE(folder, int(dtype), i, t, rounding);
          CHECK(got[t] == greedy[t]);
          if (got[t] != greedy[t]) break;
          ++same;
        }
      }
      std::cout << folder.substr(folder.rfind('/') + 1) << " " << mamba::dtype_name(dtype)
                << ": logits off by " << rounding << ", " << same
                << " greedy tokens as expected, parted after " << all - same
                << " close calls or none\n";
    }
  }
}

TEST_CASE(
    "cuda generate: sequences of different lengths together are each as if alone, few and "
    "many") {
  for (const char* name : kModels) {
    auto engine = open(root("tests/golden/") + name, DType::F32);
    for (const std::size_t batch : {2, 3, 4, 5, 13}) {
      GenerateOptions options;
      options.n = 24;
      options.end_tokens = {7};  // some end before others
      std::vector<Sequence> together;
      std::vector<std::vector<Token>> prompts;
      for (std::size_t i = 0; i < batch; ++i) {
        prompts.emplace_back();
        for (std::size_t t = 0; t <= 3 * i; ++t)
          prompts.back().push_back(static_cast<Token>((17 * i + 5 * t) % 100));
        together.push_back({prompts[i], engine.new_state(), i, 0});
      }
      std::vector<std::size_t> order;
      engine.generate(together, options, [&](std::size_t i, Token) { order.push_back(i); });
      CHECK(std::is_sorted(order.begin(), order.end()));
      for (std::size_t i = 0; i < batch; ++i) {
        std::vector<Sequence> alone;
        alone.push_back({prompts[i], engine.new_state(), i, 0});
        engine.generate(alone, options, [](std::size_t, Token) {});
        CAPTURE(name, batch, i);
        CHECK(together[i].ids == alone[0].ids);
        CHECK(together[i].taken == together[i].ids.size() - 1);
        CHECK(state_difference(engine.to_host(together[i].state), engine.to_host(alone[0].state)) <
              1e-5);
      }
    }
  }
}

TEST_CASE("cuda generate: a saved state goes on as if it had never stopped") {
  for (const char* name : kModels) {
    CAPTURE(name);
    auto engine = open(root("tests/golden/") + name, DType::F32);
    a_saved_state_goes_on(engine);
  }
}

TEST_CASE("cuda models: the same bits on every run") {
  for (const DType dtype : {DType::F32, DType::BF16}) {
    auto engine = open(root("weights/stories"), dtype);
    std::vector<Token> ids;
    for (int t = 0; t < 700; ++t) ids.push_back(static_cast<Token>(t * 7919 % 4096));
    for (const std::string mode : {"parallel", "recurrent"}) {
      const Matrix<float> first = logits_of(engine, ids, mode);
      for (int run = 0; run < 3; ++run)
        CHECK(max_difference(logits_of(engine, ids, mode), first) == 0);
    }
  }
}

TEST_CASE("cuda perplexity: within 0.5 % of the expected in every dtype and mode") {
  for (const std::string& folder : stories()) {
    const mamba::Checkpoint file = mamba::read_safetensors(folder + "/expected.safetensors");
    const std::vector<Token> ids = tokens(file.at("val_ids"));
    const auto nll = mamba::values<double>(file.at("val_nll"));
    const double want =
        std::accumulate(nll.begin(), nll.end(), 0.0) / static_cast<double>(nll.size());
    for (const DType dtype : {DType::F32, DType::BF16, DType::F16}) {
      auto engine = open(folder, dtype);
      for (const char* mode : {"parallel", "recurrent", "chunked=100"}) {
        mamba::PerplexityOptions options;
        options.mode = mamba::parse_mode(mode);
        const std::vector<Token> scored(ids.begin(),
                                        ids.begin() + static_cast<std::ptrdiff_t>(nll.size()) + 1);
        CAPTURE(folder, int(dtype), mode);
        const double difference =
            mamba::perplexity(engine, scored, options).mean() - want;  // of log perplexity
        CHECK(std::abs(difference) < (dtype == DType::F32 ? 1e-4 : 0.005));
        if (std::string(mode) == "parallel")
          std::cout << folder.substr(folder.rfind('/') + 1) << " " << mamba::dtype_name(dtype)
                    << ": perplexity off by " << 100 * difference << " %\n";
      }
    }
  }
}

namespace {

std::size_t free_memory() {
  std::size_t free = 0, total = 0;
  CUDA_CHECK(cudaMemGetInfo(&free, &total));
  return free;
}

// A million tokens in one prefill, in pieces of 3,000, and the first `steps` of them one by one:
// the same final states up to the rounding of bf16, the same memory as for a short prompt.
void a_million_tokens(CudaEngine& engine, Index steps) {
  constexpr Index kMillion = 1000000;
  std::vector<Token> ids;
  Random random(3);
  for (Index t = 0; t < kMillion; ++t)
    ids.push_back(
        static_cast<Token>(random.uniform() * static_cast<double>(engine.config().vocab_size)));
  const auto same_states = [&](const CudaEngine::State& got, const CudaEngine::State& want) {
    const auto a = engine.to_host(got), b = engine.to_host(want);
    double worst = 0;
    for (std::size_t l = 0; l < a.layers.size(); ++l)
      worst = std::max(worst, max_difference(a.layers[l].h, b.layers[l].h) /
                                  b.layers[l].h.cwiseAbs().maxCoeff());
    CHECK(worst < 0.05);
    std::cout << "final state: off by " << worst << " of the largest\n";
  };
  auto state = engine.new_state(), chunked = engine.new_state(), first = engine.new_state(),
       stepped = engine.new_state();
  mamba::prefill(engine, state, ids.data(), 2 * CudaEngine::kPiece);
  const std::size_t before = free_memory();
  state = engine.new_state();
  mamba::prefill(engine, state, ids.data(), kMillion);
  CHECK(free_memory() == before);
  for (Index t = 0; t < kMillion; t += 3000)
    engine.prefill(chunked, ids.data() + t, std::min<Index>(3000, kMillion - t));
  same_states(chunked, state);
  mamba::prefill(engine, first, ids.data(), steps);
  for (Index t = 0; t < steps; ++t) engine.prefill(stepped, &ids[static_cast<std::size_t>(t)], 1);
  same_states(stepped, first);
}

}  // namespace

TEST_CASE(
    "cuda models: 1,000,000 tokens through the stories model take no more memory than "
    "few") {
  auto engine = open(root("weights/stories"), DType::BF16);
  a_million_tokens(engine, 10000);
}

TEST_CASE("cuda models: 1,000,000 tokens through the 130m shape take no more memory than few") {
  mamba::EngineOptions options;
  options.dtype = DType::BF16;
  const mamba::Config config = mamba::published_config("130m");
  CudaEngine engine(mamba::random_model(config, DType::BF16), config, options);
  a_million_tokens(engine, 10000);
}
