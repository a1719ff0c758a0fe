// Claims: score encodes, adds up and counts as lm-evaluation-harness 0.4.13 does
// (lm_eval/api/model.py: _encode_pair and loglikelihood; lm_eval/api/task.py: process_results),
// held against a model whose probabilities are known.
#include "support.hpp"

using namespace test;
using mamba::Request;

namespace {

mamba::Tokenizer tokenizer() {
  return mamba::Tokenizer::from_file(root("weights/stories/tokenizer.json"));
}

// Knows one text by heart: its next token weighs 3, every other 1. Where it `misses`, all weigh 1.
struct Knower {
  static constexpr Index kPiece = 2;  // so that contexts and continuations are taken in pieces
  using State = std::size_t;          // tokens read

  mamba::Config sizes = mamba::read_config(root("weights/stories"));
  std::vector<Token> text;
  std::set<std::size_t> misses = {};

  const mamba::Config& config() const { return sizes; }
  State new_state() const { return 0; }
  void forward(State& state, const Token* ids, Index L, const mamba::LogitsSink& sink) const {
    REQUIRE(L <= kPiece);
    for (Index t = 0; t < L; ++t) {
      CHECK(ids[t] == text.at(state++));
      Matrix<float> logits = Matrix<float>::Zero(1, sizes.vocab_size);
      if (state < text.size() && misses.count(state) == 0) logits(text[state]) = std::log(3.f);
      sink(t, logits);
    }
  }
  Matrix<float> prefill(State& state, const Token* ids, Index L) const {
    Matrix<float> last;
    forward(state, ids, L, [&](Index, const Matrix<float>& logits) { last = logits; });
    return last;
  }
  double log_probability(bool known) const {
    const auto V = static_cast<double>(sizes.vocab_size);
    return known ? std::log(3 / (V + 2)) : -std::log(V);
  }
};

Request choice(const std::string& question, std::size_t label, const std::string& text) {
  Request request;
  request.question = question;
  request.label = label;
  mamba::measure(request, text);
  return request;
}

using Ids = std::vector<Token>;

}  // namespace

TEST_CASE("score: a continuation's log-probability is the sum over its tokens, greedy if all are") {
  Knower knower;
  knower.text = {5, 9, 5, 7, 7, 30, 2, 8};
  for (std::size_t context = 1; context < knower.text.size(); ++context)
    for (const std::set<std::size_t>& misses :
         {std::set<std::size_t>{}, {context - 1}, {context}, {7}, {context, 7}}) {
      knower.misses = misses;
      const auto cut = knower.text.begin() + static_cast<std::ptrdiff_t>(context);
      const Request request{{knower.text.begin(), cut}, {cut, knower.text.end()}, 0, 0, {}, 0};
      const auto found = mamba::likelihood(knower, request);
      double want = 0;
      bool greedy = true;
      for (std::size_t t = context; t < knower.text.size(); ++t) {
        want += knower.log_probability(misses.count(t) == 0);
        greedy = greedy && misses.count(t) == 0;
      }
      CAPTURE(context);
      CHECK(found.logprob == Approx(want).epsilon(1e-6));
      CHECK(found.greedy == greedy);
    }
}

TEST_CASE("score: perplexity is e to the mean loss: a fair die of six sides has six") {
  const mamba::Score die{10, 9, 9 * std::log(6.)};
  CHECK(die.mean() == Approx(std::log(6.)));
  CHECK(die.perplexity() == Approx(6));
}

TEST_CASE("score: logits that are no numbers end in one line") {
  Knower knower;
  knower.text = {5, 9};
  knower.sizes.vocab_size = 16;
  struct Broken : Knower {
    Matrix<float> prefill(State&, const Token*, Index) const {
      return Matrix<float>::Constant(1, sizes.vocab_size, NAN);
    }
  } broken{knower};
  CHECK_THROWS_WITH(mamba::likelihood(broken, {{5}, {9}, 0, 0, {}, 0}),
                    Catch::Contains("expected numbers"));
}

TEST_CASE(
    "score: context and continuation are encoded together, spaces between them to the right") {
  const auto words = tokenizer();
  const auto pair = [&](const char* context, const char* continuation) {
    const Request r = mamba::encode_request(words, context, continuation);
    return std::pair(r.context, r.continuation);
  };
  const Ids lily = words.encode("Lily had a"), whole = words.encode("Lily had a ball");
  REQUIRE(whole.size() > lily.size());
  const Ids rest(whole.begin() + static_cast<std::ptrdiff_t>(lily.size()), whole.end());
  CHECK(pair("Lily had a", " ball") == std::pair(lily, rest));
  CHECK(pair("Lily had a ", "ball") == std::pair(lily, rest));
  CHECK(pair("Lily had a \n\t", "ball").first == lily);
  CHECK(pair("Lily had a\u3000\u00a0\u2028\x1c", "ball").first == lily);  // as str.rstrip
  CHECK(pair("Lily had a\u200b", "ball").first == words.encode("Lily had a\u200b"));
  CHECK(pair("", "Lily had a ball") == std::pair(Ids{}, whole));
  CHECK(pair(" ", "ball") == std::pair(Ids{}, words.encode(" ball")));
  // inside a word the cut is where the context's own tokens end, whatever they are
  const Ids part = words.encode("unbel"), word = words.encode("unbelievable");
  CHECK(pair("unbel", "ievable").first ==
        Ids(word.begin(), word.begin() + static_cast<std::ptrdiff_t>(part.size())));
}

TEST_CASE("score: what comes first in a text follows the end token") {
  mamba::Config config = mamba::read_config(root("weights/stories"));
  config.eos_token_ids = {3, 5};
  const auto begun = [&](Ids context, Ids continuation) {
    Request request{context, continuation, 0, 0, {}, 0};
    mamba::begin_text(request, config, "here");
    return std::pair(request.context, request.continuation);
  };
  CHECK(begun({}, {7, 8}) == std::pair(Ids{3}, Ids{7, 8}));
  CHECK(begun({}, {3, 8}) == std::pair(Ids{3}, Ids{8}));
  CHECK(begun({5}, {3, 8}) == std::pair(Ids{5}, Ids{3, 8}));
  config.eos_token_ids = {};
  CHECK_THROWS_WITH(begun({}, {7}), Catch::Contains("no end token"));
}

TEST_CASE("score: acc, acc_norm and acc_bytes choose by log-probability, per character, per byte") {
  //                   characters, bytes       logprob   a character   a byte
  const std::vector<Request> requests = {
      choice("1", 1, " no"),                  // 2, 2      -4        -2        -2
      choice("1", 1, " indeed"),              // 6, 6      -6        -1        -1
      choice("2", 0, " \u00e9\u00e9\u00e9"),  // 3, 6      -3        -1       -0.5
      choice("2", 0, " abcde"),               // 5, 5      -2       -0.4      -0.4
      choice("2", 0, "\u00e9\u00e9"),         // 2, 4      -4        -2        -1
      choice("3", 1, "a"),
      choice("3", 1, "b"),  // equal: the first counts
      choice("", 0, "of no question"),
      choice("4", 1, ""),
      choice("4", 1, "right"),  // nothing has no length
  };
  const std::vector<mamba::Likelihood> found = {{-4, false}, {-6, true}, {-3, false}, {-2, false},
                                                {-4, true},  {-1, true}, {-1, true},  {-7, false},
                                                {-9, false}, {-1, false}};
  const auto questions = mamba::questions_of(requests);
  const auto sum = mamba::summary(found, questions, requests);
  CHECK(sum["requests"] == 10);
  CHECK(sum["greedy"] == 0.4);
  CHECK(sum["perplexity"].get<double>() == Approx(std::exp(38 / 10.0)));
  CHECK(sum["questions"] == 4);
  CHECK(sum["acc"] == 0.25);      // the fourth
  CHECK(sum["acc_norm"] == 0.5);  // and the first
  CHECK(sum["acc_bytes"] == 0.5);
  CHECK(mamba::summary({{-1, true}}, {}, {requests[7]}).count("acc") == 0);  // no question
  auto wrong = requests;
  wrong[1].label = 0;
  CHECK_THROWS_WITH(mamba::questions_of(wrong), Catch::Contains("doc '1': label"));
  wrong[0].label = wrong[1].label = 2;
  CHECK_THROWS_WITH(mamba::questions_of(wrong), Catch::Contains("below its 2 choices"));
}
