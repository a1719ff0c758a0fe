// The sampler against an enumeration of its rules, against transformers, and against
// chance.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "../mamba.hpp"
#include "catch.hpp"

namespace {

using mamba::SamplerOptions;
using mamba::Token;
using Row = std::vector<float>;
using History = std::vector<Token>;
const float kInf = std::numeric_limits<float>::infinity();
const float kNaN = std::numeric_limits<float>::quiet_NaN();

SamplerOptions options_of(float temperature, int top_k = 0, float top_p = 1, float min_p = 0,
                          float penalty = 1, std::uint64_t seed = 1) {
  return {temperature, top_k, top_p, min_p, penalty, seed};
}

std::vector<double> filtered(const Row& logits, const SamplerOptions& options,
                             const History& history = {}) {
  return mamba::filtered_probabilities(logits.data(), logits.size(), history, options);
}

// The logits of a distribution that is written down.
Row log_of(const std::vector<double>& p) {
  Row logits;
  for (double each : p) logits.push_back(static_cast<float>(std::log(each)));
  return logits;
}

std::set<std::size_t> support(const std::vector<double>& p) {
  std::set<std::size_t> ids;
  for (std::size_t id = 0; id < p.size(); ++id)
    if (p[id] > 0) ids.insert(id);
  return ids;
}

std::vector<double> softmax(const std::vector<double>& scores) {
  const double top = *std::max_element(scores.begin(), scores.end());
  std::vector<double> p;
  double total = 0;
  for (double s : scores) p.push_back(std::exp(s - top));
  for (double each : p) total += each;
  for (double& each : p) each /= total;
  return p;
}

// The rules once more, as they are worded and not as they are fast: every filter takes a
// softmax of its own and top-p sorts the whole vocabulary.
std::vector<double> enumerated(const Row& logits, const SamplerOptions& options,
                               const History& history = {}) {
  const double dropped = -std::numeric_limits<double>::infinity();
  std::vector<double> scores(logits.begin(), logits.end());
  for (Token id : std::set<Token>(history.begin(), history.end())) {
    double& s = scores[static_cast<std::size_t>(id)];
    s = s > 0 ? s / double{options.repetition_penalty} : s * double{options.repetition_penalty};
  }
  std::vector<std::size_t> ascending(scores.size());
  const auto sort = [&] {
    std::iota(ascending.begin(), ascending.end(), std::size_t{0});
    std::stable_sort(ascending.begin(), ascending.end(),
                     [&](std::size_t a, std::size_t b) { return scores[a] < scores[b]; });
  };
  if (options.temperature == 0) {
    std::vector<double> one_hot(scores.size());
    const auto best = std::max_element(scores.begin(), scores.end());  // the first of equals
    one_hot[static_cast<std::size_t>(best - scores.begin())] = 1;
    return one_hot;
  }
  for (double& s : scores) s /= double{options.temperature};
  if (options.top_k > 0 && static_cast<std::size_t>(options.top_k) < scores.size()) {
    sort();
    const double kth = scores[ascending[scores.size() - static_cast<std::size_t>(options.top_k)]];
    for (double& s : scores)
      if (s < kth) s = dropped;
  }
  if (options.top_p < 1) {
    sort();
    const std::vector<double> p = softmax(scores);
    double cumulative = 0;
    for (std::size_t i = 0; i + 1 < ascending.size(); ++i) {
      cumulative += p[ascending[i]];
      if (cumulative <= 1 - double{options.top_p}) scores[ascending[i]] = dropped;
    }
  }
  const std::vector<double> p = softmax(scores);
  const double largest = *std::max_element(p.begin(), p.end());
  for (std::size_t id = 0; id < p.size(); ++id)
    if (p[id] < double{options.min_p} * largest) scores[id] = dropped;
  return softmax(scores);
}

// Same support, and every probability to a few roundings: an exponent x is off by eps |x|,
// so e^x is off by that much relatively; |x| stays below 100 for all that is compared here.
void require_same(const std::vector<double>& got, const std::vector<double>& want) {
  REQUIRE(got.size() == want.size());
  CHECK(support(got) == support(want));
  double worst = 0;
  for (std::size_t id = 0; id < got.size(); ++id)
    if (want[id] > 0) worst = std::max(worst, std::abs(got[id] / want[id] - 1));
  CHECK(worst <= 400 * std::numeric_limits<double>::epsilon());
}

Row normal_row(std::mt19937& random, std::size_t size, double deviation) {
  // By hand: std::normal_distribution gives other numbers in another library.
  Row row;
  for (std::size_t i = 0; i < size; ++i) {
    double sum = -6;
    for (int j = 0; j < 12; ++j) sum += random() / 4294967296.0;
    row.push_back(static_cast<float>(deviation * sum));
  }
  return row;
}

// Pearson's chi-square of counts against p. The bound is its quantile at 4 standard
// deviations (Wilson and Hilferty 1931): by chance one seed in 30,000 would fail; the seeds
// are fixed.
void require_fits(const std::vector<long>& counts, const std::vector<double>& p) {
  const long draws = std::accumulate(counts.begin(), counts.end(), 0L);
  double statistic = 0, freedom = -1;
  for (std::size_t id = 0; id < p.size(); ++id) {
    if (p[id] == 0) {
      CHECK(counts[id] == 0);
      continue;
    }
    const double expected = p[id] * static_cast<double>(draws);
    REQUIRE(expected >= 5);
    statistic += std::pow(static_cast<double>(counts[id]) - expected, 2) / expected;
    freedom += 1;
  }
  const double spread = 2 / (9 * freedom);
  CHECK(statistic <= freedom * std::pow(1 - spread + 4 * std::sqrt(spread), 3));
}

std::string error_of(const Row& logits, const SamplerOptions& options,
                     const History& history = {}) {
  try {
    filtered(logits, options, history);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

}  // namespace

TEST_CASE("sampler: what each rule keeps is what an enumeration of the rules keeps") {
  std::mt19937 random(1);
  for (int round = 0; round < 60; ++round) {
    const std::size_t vocab_size = 1 + random() % 24;
    Row logits = normal_row(random, vocab_size, round % 3 == 0 ? 0.5 : 3);
    if (round % 2)  // whole numbers: many ties
      for (float& each : logits) each = std::round(each);
    if (round % 5 == 4)
      for (std::size_t id = 1; id < vocab_size; id += 3) logits[id] = -kInf;
    History history;
    for (int i = 0; i < round % 7; ++i) history.push_back(Token(random() % vocab_size));
    for (float temperature : {0.f, 0.3f, 1.f, 2.5f})
      for (int top_k : {0, 1, 3, 100})
        for (float top_p : {1e-40f, 0.3f, 0.77f, 0.999f, 1.f})
          for (float min_p : {0.f, 0.13f, 1.f})
            for (float penalty : {1.f, 1.4f, 0.6f}) {
              const auto options = options_of(temperature, top_k, top_p, min_p, penalty);
              CAPTURE(round, temperature, top_k, top_p, min_p, penalty);
              require_same(filtered(logits, options, history),
                           enumerated(logits, options, history));
            }
  }
}

TEST_CASE("sampler: the filtered distribution is that of transformers") {
  const char* root = std::getenv("MAMBA_ROOT");
  std::ifstream file(std::string(root ? root : ".") + "/tests/golden/sampler.json");
  REQUIRE(file);
  const auto golden = nlohmann::json::parse(file);
  REQUIRE(golden["cases"].size() >= 90);
  for (const auto& each : golden["cases"]) {
    CAPTURE(each["name"].get<std::string>());
    Row logits;
    for (const auto& value : each["logits"])
      logits.push_back(value.is_null() ? -kInf : value.get<float>());
    const auto& o = each["options"];
    const auto options =
        options_of(o["temperature"], o["top_k"], o["top_p"], o["min_p"], o["repetition_penalty"]);
    require_same(filtered(logits, options, each["history"].get<History>()),
                 each["probabilities"].get<std::vector<double>>());
  }
}

TEST_CASE("sampler: a large vocabulary is filtered as by a full sort") {
  std::mt19937 random(2);
  for (double deviation : {0.1, 2.0, 4.0}) {
    const Row logits = normal_row(random, 50280, deviation);
    for (int top_k : {0, 40, 20000})
      for (float top_p : {0.1f, 0.95f, 0.9999f, 1.f})
        for (float min_p : {0.f, 0.02f}) {
          CAPTURE(deviation, top_k, top_p, min_p);
          const auto options = options_of(0.8f, top_k, top_p, min_p);
          require_same(filtered(logits, options), enumerated(logits, options));
        }
  }
}

TEST_CASE("sampler: rules apply in order: penalty, temperature, top-k, top-p, min-p") {
  using Ids = std::set<std::size_t>;
  const Row logits = log_of({0.4, 0.3, 0.2, 0.1});
  // The penalty moves 0 below 1 before top-k looks: log 0.4 * 2 = log 0.16.
  CHECK(support(filtered(logits, options_of(1, 1, 1, 0, 2), {0})) == Ids{1});
  // At temperature 1/2 the first holds 16/30 and fills top-p 1/2; at 1 it takes two.
  CHECK(support(filtered(logits, options_of(0.5f, 0, 0.5f))) == Ids{0});
  CHECK(support(filtered(logits, options_of(1, 0, 0.5f))) == Ids{0, 1});
  // After top-k 2 the first holds 4/7 and fills top-p 1/2; without it holds 4/10.
  CHECK(support(filtered(logits, options_of(1, 2, 0.5f))) == Ids{0});
  // top-p 0.6 sees the first hold 0.5, not the 0.625 that min-p would have left it.
  const Row uneven = log_of({0.5, 0.3, 0.1, 0.1});
  CHECK(support(filtered(uneven, options_of(1, 0, 0.6f, 0.5f))) == Ids{0, 1});
}

TEST_CASE("sampler: ties at the edge: top-k keeps all, top-p drops the lower id first") {
  using Ids = std::set<std::size_t>;
  CHECK(support(filtered({1, 3, 2, 2, 2, 0}, options_of(1, 2))) == Ids{1, 2, 3, 4});
  CHECK(support(filtered({0, 0, 0, 0}, options_of(1, 0, 0.5f))) == Ids{2, 3});
  CHECK(support(filtered({0, 0, 0, 0}, options_of(1, 0, 0.25f))) == Ids{3});
  CHECK(support(filtered({0, 0, 0, 0}, options_of(1, 0, 1e-40f))) == Ids{3});
  CHECK(support(filtered({0, 0, 0, 0}, options_of(1, 0, 1, 1))) == Ids{0, 1, 2, 3});
}

TEST_CASE("sampler: temperature 0 is the argmax, the lowest id of equals, after the penalty") {
  const auto greedy = options_of(0, 0, 0.95f, 0, 1.5f);
  for (std::uint64_t position = 0; position < 20; ++position) {
    const Row logits = {1, 4, 4, -2};
    CHECK(mamba::sample(logits.data(), 4, {}, greedy, 0, position) == 1);
    CHECK(mamba::sample(logits.data(), 4, {1}, greedy, 0, position) == 2);
    CHECK(mamba::sample(logits.data(), 4, {1, 2}, greedy, 0, position) == 1);
  }
  CHECK(filtered({0, 7, 7}, options_of(0)) == std::vector<double>{0, 1, 0});
}

TEST_CASE("sampler: the penalty divides positive and multiplies negative logits, once an id") {
  require_same(filtered({2, -2, 0, 1}, options_of(1, 0, 1, 0, 2), {0, 1, 0, 0, 2, 1}),
               softmax({1, -4, 0, 1}));
  require_same(filtered({2, -2, 0, 1}, options_of(1, 0, 1, 0, 0.5f), {0, 1, 2}),
               softmax({4, -1, 0, 1}));
}

TEST_CASE("sampler: extreme logits and temperatures give a distribution, never a NaN") {
  const float most = std::numeric_limits<float>::max();
  for (float temperature : {1e-45f, 1e-3f, 1.f, most})
    for (const Row& logits : {Row{most, -most, 0, -kInf}, Row{-most, -kInf, -most, -kInf},
                              Row{1e-45f, 0, -1e-45f, -kInf}}) {
      const auto p = filtered(logits, options_of(temperature, 3, 0.9f, 0.01f, 1.1f), {0, 3});
      CAPTURE(temperature);
      CHECK(std::abs(std::accumulate(p.begin(), p.end(), 0.0) - 1) < 1e-15);
      CHECK(p[3] == 0);
    }
  CHECK(filtered({-5}, options_of(0.8f, 0, 0.95f)) == std::vector<double>{1});
}

TEST_CASE("sampler: frequencies of draws fit the filtered distribution") {
  std::mt19937 random(3);
  const Row logits = normal_row(random, 30, 1.2);
  const History history = {3, 9, 9, 20};
  const std::uint64_t draws = 40000;
  for (const auto& options :
       {options_of(1), options_of(0.8f, 0, 0.95f), options_of(1.3f, 12), options_of(1, 0, 1, 0.2f),
        options_of(0.9f, 20, 0.9f, 0.05f, 1.3f, 12345)}) {
    const auto p = filtered(logits, options, history);
    std::vector<long> by_position(30), by_sequence(30), by_seed(30);
    for (std::uint64_t i = 0; i < draws; ++i) {
      auto seeded = options;
      seeded.seed = options.seed + i;
      const auto draw = [&](const SamplerOptions& o, std::uint64_t sequence,
                            std::uint64_t position) {
        return static_cast<std::size_t>(
            mamba::sample(logits.data(), 30, history, o, sequence, position));
      };
      ++by_position[draw(options, 0, i)];
      ++by_sequence[draw(options, i, 7)];
      ++by_seed[draw(seeded, 0, 7)];
    }
    require_fits(by_position, p);
    require_fits(by_sequence, p);
    require_fits(by_seed, p);
  }
}

TEST_CASE("sampler: philox4x32 gives the known answers of Random123") {
  using Block = std::array<std::uint32_t, 4>;
  CHECK(mamba::philox4x32({0, 0, 0, 0}, {0, 0}) ==
        Block{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
  CHECK(mamba::philox4x32({0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
                          {0xffffffff, 0xffffffff}) ==
        Block{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
  CHECK(mamba::philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
                          {0xa4093822, 0x299f31d0}) ==
        Block{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1});
}

TEST_CASE("sampler: a seed, a sequence and a position give the same draw for ever") {
  CHECK(mamba::uniform(0, 0, 0) == 0x1.c2d38b1acc4fdp-1);  // from 0xe169c58d6627e8d5
  Row logits(50);
  for (std::size_t id = 0; id < logits.size(); ++id)
    logits[id] = static_cast<float>((id * 37) % 50) / 10;
  History drawn;
  for (std::uint64_t sequence : {0, 1})
    for (std::uint64_t position = 0; position < 8; ++position)
      drawn.push_back(mamba::sample(logits.data(), 50, {}, SamplerOptions{}, sequence, position));
  CHECK(drawn == History{40, 39, 27, 4, 31, 12, 4, 24, 9, 43, 31, 32, 27, 28, 1, 35});
}

TEST_CASE("sampler: a nonsense option ends in one line that names it") {
  const auto complains = [](SamplerOptions options, const std::string& name) {
    const std::string line = error_of({1, 2, 3}, options);
    CAPTURE(line);
    CHECK(line.find("--" + name + ": expected ") == 0);
    CHECK(line.find('\n') == std::string::npos);
  };
  for (float bad : {-0.1f, kInf, kNaN}) complains(options_of(bad), "temperature");
  complains(options_of(1, -1), "top-k");
  for (float bad : {-0.1f, 0.f, 1.01f, kNaN}) complains(options_of(1, 0, bad), "top-p");
  for (float bad : {-0.1f, 1.01f, kNaN}) complains(options_of(1, 0, 1, bad), "min-p");
  for (float bad : {-1.f, 0.f, kInf, kNaN})
    complains(options_of(1, 0, 1, 0, bad), "repetition-penalty");
  CHECK(error_of({1, 2, 3}, SamplerOptions{}).empty());
}

TEST_CASE("sampler: logits that give no distribution end in one line") {
  CHECK(error_of({1, kNaN, 2}, options_of(0)) ==
        "sampler: logit of token 1: expected a number, found nan");
  CHECK(error_of({kInf, 1}, options_of(1)) ==
        "sampler: logit of token 0: expected a number, found inf");
  CHECK(error_of({-kInf, -kInf}, options_of(1)) ==
        "sampler: logits: expected one above -inf, found none in 2");
  CHECK(error_of({}, options_of(1)) == "sampler: logits: expected one above -inf, found none in 0");
  CHECK(error_of({1, 2}, options_of(1, 0, 1, 0, 2), {5}) ==
        "sampler: history: expected ids in [0, 2), found 5");
}
