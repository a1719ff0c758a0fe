// Claims: the pass-key task, LAMBADA and perplexity over documents ask and count what they say, held
// against a model whose answers are known.
#include "support.hpp"

using namespace test;

namespace {

mamba::Tokenizer tokenizer() {
  return mamba::Tokenizer::from_file(root("weights/stories/tokenizer.json"));
}

// Has read a text and answers `answer(text, i)` to the i-th; counts what it was given.
struct Oracle {
  static constexpr Index kPiece = 16;
  static constexpr std::size_t kBatch = 3;
  using State = std::vector<Token>;

  mamba::Config sizes = mamba::read_config(root("weights/stories"));
  std::function<std::string(const std::string& text, std::uint64_t i)> answer;
  std::vector<std::vector<Token>> read;

  const mamba::Config& config() const { return sizes; }
  State new_state() const { return {}; }

  void generate(std::vector<mamba::Sequence<State>>& sequences,
                const mamba::GenerateOptions& options, const mamba::OnToken& on_token) {
    REQUIRE(sequences.size() <= kBatch);
    REQUIRE(options.sampler.temperature == 0);
    REQUIRE(options.n < 10);  // the tokens of a key, no more
    for (std::size_t i = 0; i < sequences.size(); ++i) {
      read.push_back(sequences[i].ids);
      auto made =
          tokenizer().encode(answer(tokenizer().decode(sequences[i].ids), sequences[i].index));
      made.resize(std::min<std::size_t>(made.size(), static_cast<std::size_t>(options.n)));
      for (const Token token : made) on_token(i, token);
    }
  }

  // Logits that depend on the last token alone: log(1), log(2), ... from the token on.
  Matrix<float> logits(Token last) const {
    Matrix<float> row(1, sizes.vocab_size);
    for (Index v = 0; v < sizes.vocab_size; ++v)
      row((v + last) % sizes.vocab_size) = std::log(static_cast<float>(v + 1));
    return row;
  }
  Matrix<float> prefill(State& state, const Token* ids, Index L) {
    state.insert(state.end(), ids, ids + L);
    return logits(state.back());
  }
  Matrix<float> step(State& state, Token id) {
    state.push_back(id);
    return logits(id);
  }
  // of the token v after `last`, by hand: weights 1 .. V, sum V (V + 1) / 2
  double log_probability(Token last, Token v) const {
    const Index V = sizes.vocab_size, rank = (v - last + V) % V + 1;
    return std::log(static_cast<double>(rank)) -
           std::log(static_cast<double>(V) * static_cast<double>(V + 1) / 2);
  }
};

std::string key_in(const std::string& prompt) {
  return prompt.substr(prompt.find("The pass key is ") + 16, 5);
}

}  // namespace

TEST_CASE("passkey: an answer counts if and only if it is the key of that prompt") {
  Oracle oracle;
  mamba::PasskeyOptions options;
  options.length = 300;
  options.tests = 7;
  std::set<std::string> keys;
  oracle.answer = [&](const std::string& prompt, std::uint64_t) {
    keys.insert(key_in(prompt));
    return " " + key_in(prompt) + ".";
  };
  CHECK(mamba::passkey(oracle, tokenizer(), options).right == 7);
  CHECK(keys.size() == 7);
  for (const std::string& key : keys) CHECK((key >= "10000" && key <= "99999"));

  oracle.answer = [](const std::string& prompt, std::uint64_t i) {
    return (i % 2 ? " 4" : " ") + key_in(prompt);
  };
  CHECK(mamba::passkey(oracle, tokenizer(), options).right == 4);  // 0, 2, 4 and 6
  oracle.answer = [](const std::string&, std::uint64_t) { return ""; };
  CHECK(mamba::passkey(oracle, tokenizer(), options).right == 0);
}

TEST_CASE("passkey: prompts fill the length, and the key stands at its depth") {
  Oracle oracle;
  std::string prompt;
  oracle.answer = [&](const std::string& text, std::uint64_t) { return prompt = text, ""; };
  mamba::PasskeyOptions options;
  options.tests = 1;
  for (const Index length : {128, 500, 4000}) {
    for (const double depth : {0.0, 0.5, 1.0}) {
      CAPTURE(length, depth);
      options.length = length, options.depth = depth;
      const auto score = mamba::passkey(oracle, tokenizer(), options);
      CHECK(score.tokens == static_cast<Index>(oracle.read.back().size()));
      CHECK(score.tokens > length - 50);
      CHECK(score.tokens <= length);
      const double begin = static_cast<double>(prompt.find("it.\n") + 4),
                   end = static_cast<double>(prompt.rfind("What is"));
      const double at = static_cast<double>(prompt.find("The pass key is ")) - begin;
      CHECK(std::abs(at / (end - begin - 60) - depth) < 150.0 / (end - begin));
    }
  }
  options.length = 20;
  CHECK_THROWS_WITH(mamba::passkey(oracle, tokenizer(), options),
                    Catch::Matchers::Contains("expected at least"));
}

TEST_CASE("lambada: the likelihood of the last word is the sum over its tokens") {
  Oracle oracle;
  const auto words = tokenizer();
  mamba::LambadaScore score;
  double want = 0;
  for (const std::string text :
       {"Lily had a ball", "The cat sat on  unbelievableness", "Tom and Zxqvw"}) {
    mamba::lambada(oracle, words, text, score);
    const auto ids = words.encode(text);
    const std::string before = text.substr(0, text.find_last_not_of(' ', text.rfind(' ')) + 1);
    const std::size_t context = words.encode(before).size();
    REQUIRE(context < ids.size());
    for (std::size_t t = context; t < ids.size(); ++t)
      want += oracle.log_probability(ids[t - 1], ids[t]);
  }
  CHECK(score.examples == 3);
  CHECK(score.right == 0);
  CHECK(score.log_likelihood == Approx(want).epsilon(1e-6));
  CHECK(score.perplexity() == Approx(std::exp(-want / 3)).epsilon(1e-6));
  for (const char* bad : {"", "word", " word", "two "})
    CHECK_THROWS(mamba::lambada(oracle, words, bad, score));
}

TEST_CASE("lambada: a word is right if each of its tokens is the likeliest") {
  struct Knower : Oracle {  // thinks the next token of `text` likeliest, `misses` apart
    std::vector<Token> text;
    std::size_t misses = ~std::size_t{0};
    Matrix<float> next(const State& state) const {
      Matrix<float> row = Matrix<float>::Zero(1, sizes.vocab_size);
      if (state.size() != misses) row(text[state.size()]) = 1;
      return row;
    }
    Matrix<float> prefill(State& state, const Token* ids, Index L) {
      state.insert(state.end(), ids, ids + L);
      return next(state);
    }
    Matrix<float> step(State& state, Token id) {
      state.push_back(id);
      return next(state);
    }
  } knower;
  const auto words = tokenizer();
  const std::string text = "She felt unbelievableness";
  knower.text = words.encode(text);
  REQUIRE(knower.text.size() > 4);
  mamba::LambadaScore score;
  mamba::lambada(knower, words, text, score);
  CHECK(score.right == 1);
  knower.misses = knower.text.size() - 2;  // a token inside the word
  mamba::lambada(knower, words, text, score);
  CHECK(score.right == 1);
  CHECK(score.accuracy() == 0.5);
}
