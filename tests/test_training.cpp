// Training: the same steps as in float64 elsewhere, the official start, and batches that depend on
// their number alone.
#define MAMBA_NO_MAIN
#include "../mamba.cpp"
#include "finetuned.hpp"

using namespace mamba;

namespace {

/// Eight recorded steps from the tiny golden model, see training_mamba{1,2} of MAMBA_TEST_DATA.
template <class Scalar>
struct Recorded {
  Config config;
  Source source;
  Checkpoint truth;
  std::unique_ptr<CpuLearner<Scalar>> learner;

  Recorded(const std::string& data, int version) {
    const std::string folder = data + "/golden/mamba" + std::to_string(version) + "-hf";
    const std::string path =
        data + "/golden/training_mamba" + std::to_string(version) + ".safetensors";
    config = read_config(folder);
    truth = read_safetensors(path);
    source = recorded_batches(path, config);
    Learned<Scalar> learned{parameters_of<Scalar>(read_checkpoint(folder), config),
                            zeros<Scalar>(config), zeros<Scalar>(config)};
    learner = std::make_unique<CpuLearner<Scalar>>(config, std::move(learned), EngineOptions{});
  }

  /// The worst relative difference of a loss, of a gradient's norm and of a weight after all steps.
  std::array<double, 3> run() {
    TrainOptions o;
    o.steps = 8, o.lr = 3e-3, o.schedule = "constant";
    const auto loss = values<double>(truth.at("loss")),
               norm = values<double>(truth.at("grad_norm"));
    std::array<double, 3> worst{};
    for (Index i = 0; i < o.steps; ++i) {
      const Step step = train_step(*learner, source, o, i);
      worst[0] = std::max(worst[0], std::abs(step.loss / loss[i] - 1));
      worst[1] = std::max(worst[1], std::abs(step.gradient_norm / norm[i] - 1));
    }
    ssm::Model<Scalar> weights = learner->learned().weights;
    for_each_weight(config, weights, [&](const std::string& name, const auto&, auto& w) {
      const auto final = values<double>(truth.at("final." + name));
      const Matrix<double> want =
          Eigen::Map<const Matrix<double>>(final.data(), w.rows(), w.cols());
      const Matrix<double> got = w.template cast<double>();
      worst[2] = std::max(worst[2], (got - want).norm() / want.norm());
    });
    return worst;
  }
};

/// A text as long as its number, with its number in front.
std::vector<Piece> numbered_texts(Index n) {
  std::vector<Piece> texts(n);
  for (Index i = 0; i < n; ++i) {
    texts[i].ids.resize(i + 2);
    std::iota(texts[i].ids.begin(), texts[i].ids.end(), Token(100 * i));
  }
  return texts;
}

}  // namespace

TEST_CASE("training: eight steps in double are those of the golden run, to 1e-9") {
  const auto data = test::extra_data();
  if (!data) return;
  for (const int version : {1, 2}) {
    const auto [loss, norm, weights] = Recorded<double>(*data, version).run();
    CAPTURE(version, loss, norm, weights);
    CHECK((loss < 1e-9 && norm < 1e-9 && weights < 1e-9));
  }
}

TEST_CASE("training: eight steps in float, weights within 2e-5 of their norm") {
  const auto data = test::extra_data();
  if (!data) return;
  for (const int version : {1, 2}) {
    const auto [loss, norm, weights] = Recorded<float>(*data, version).run();
    CAPTURE(version, loss, norm, weights);
    CHECK((loss < 1e-6 && norm < 1e-5 && weights < 2e-5));
  }
}

TEST_CASE("training: the start has the distributions of the official package") {
  Config config = published_config("130m");
  config.n_layer = 2, config.vocab_size = 1000;
  for (const bool two : {false, true}) {
    if (two) config = published_config("mamba2-130m"), config.n_layer = 2, config.vocab_size = 1000;
    auto model = zeros<float>(config);
    initialize(config, model, 1);
    const auto& w = model.layers[1];
    const auto spread = [](const auto& m) { return std::sqrt(m.array().square().mean()); };
    CHECK(spread(model.embedding) == Approx(0.02).epsilon(0.01));
    CHECK(w.in_proj.cwiseAbs().maxCoeff() == Approx(1 / std::sqrt(768.)).epsilon(0.001));
    CHECK(spread(w.in_proj) == Approx(1 / std::sqrt(3 * 768.)).epsilon(0.01));
    CHECK(w.out_proj.cwiseAbs().maxCoeff() == Approx(1 / std::sqrt(1536. * 2)).epsilon(0.001));
    CHECK(w.conv_weight.cwiseAbs().maxCoeff() == Approx(0.5).epsilon(0.01));
    CHECK(w.conv_bias.cwiseAbs().maxCoeff() == Approx(0.5).epsilon(0.01));
    CHECK((w.norm.array() == 1).all());
    CHECK((w.D.array() == 1).all());
    const auto delta = ssm::softplus(w.dt_bias.array()).eval();
    CHECK((delta >= 0.00099f && delta <= 0.1001f).all());
    CHECK(delta.log().mean() == Approx(std::log(0.01)).epsilon(two ? 0.15 : 0.02));
    if (two) {
      CHECK((w.A.array() >= 0 && w.A.array() <= std::log(16.f)).all());
    } else {
      CHECK(w.dt_proj.cwiseAbs().maxCoeff() == Approx(1 / std::sqrt(48.)).epsilon(0.001));
      for (Index n = 0; n < 16; ++n) CHECK((w.A.col(n).array() == std::log(n + 1.f)).all());
    }
  }
}

TEST_CASE("training: random windows depend on seed and number alone, and cover the data") {
  DataOptions o;
  o.length = 5, o.batch = 3;
  const auto texts = numbered_texts(40);
  const Source source = random_windows(texts, o), again = random_windows(texts, o);
  std::set<Token> seen;
  for (std::uint64_t number = 0; number < 400; ++number) {
    const Batch batch = source.batch(number);
    CHECK(scored(batch) == 15);
    for (std::size_t i = 0; i < 3; ++i) {
      CHECK(batch[i].ids == again.batch(number)[i].ids);
      seen.insert(batch[i].ids.begin(), batch[i].ids.end());
    }
  }
  CHECK(seen.size() > 800);
  o.seed = 2;
  CHECK(random_windows(texts, o).batch(7)[0].ids != source.batch(7)[0].ids);
}

TEST_CASE("training: whole texts come once an epoch, in another order each time, cut to --length") {
  DataOptions o;
  o.length = 6, o.batch = 4;
  const Source source = whole_texts(numbered_texts(10), o);
  std::vector<Token> order;
  for (std::uint64_t number = 0; number < 5; ++number)
    for (const Piece& piece : source.batch(number)) {
      CHECK(piece.ids.size() == std::min<std::size_t>(piece.ids[0] / 100 + 2, 7));
      order.push_back(piece.ids[0]);
    }
  CHECK(std::set<Token>(order.begin(), order.begin() + 10).size() == 10);
  CHECK(std::set<Token>(order.begin() + 10, order.end()).size() == 10);
  CHECK(!std::equal(order.begin(), order.begin() + 10, order.begin() + 10));
}

TEST_CASE(
    "training: with carried states a text comes piece by piece in its slot, nothing left out") {
  DataOptions o;
  o.length = 4, o.batch = 2, o.carry_state = true;
  const Source source = carried_texts(numbered_texts(9), o);
  std::map<Index, std::vector<Token>> walked;
  Index targets = 0;
  for (std::uint64_t number = 0; number < 40; ++number)
    for (const Piece& piece : source.batch(number)) {
      auto& text = walked[piece.slot];
      if (piece.begins)
        text = {piece.ids[0]};
      else
        REQUIRE(text.back() == piece.ids[0]);
      text.insert(text.end(), piece.ids.begin() + 1, piece.ids.end());
      REQUIRE(text.size() <= std::size_t(text[0] / 100 + 2));
      if (number < 9) targets += piece.scored();
    }
  CHECK(targets > 0);
}

TEST_CASE("training: a piece that goes on from a carried state has the whole text's loss") {
  const Config config = read_config(test::root("tests/golden/mamba1-hf"));
  Learned<double> start{
      parameters_of<double>(read_checkpoint(test::root("tests/golden/mamba1-hf")), config),
      zeros<double>(config), zeros<double>(config)};
  Piece whole;
  for (Token t = 0; t < 30; ++t) whole.ids.push_back(t * 37 % config.vocab_size);
  const Piece a{{whole.ids.begin(), whole.ids.begin() + 13}, 1, 0, true},
      b{{whole.ids.begin() + 12, whole.ids.end()}, 1, 0, false};
  CpuLearner<double> learner(config, start, {});
  const double parts = learner.accumulate({a}, 1) + learner.accumulate({b}, 1);
  CHECK(parts ==
        Approx(CpuLearner<double>(config, start, {}).accumulate({whole}, 1)).epsilon(1e-12));
}

TEST_CASE("training: only the answer is learned") {
  const Config config = read_config(test::root("tests/golden/mamba1-hf"));
  Learned<double> start{
      parameters_of<double>(read_checkpoint(test::root("tests/golden/mamba1-hf")), config),
      zeros<double>(config), zeros<double>(config)};
  CpuLearner<double> learner(config, start, {});
  const Piece all{{1, 2, 3, 4, 5}}, head{{1, 2, 3}}, answer{{1, 2, 3, 4, 5}, 3};
  const double rest = learner.losses({all})[0] - learner.losses({head})[0];
  CHECK(learner.losses({answer})[0] == Approx(rest).epsilon(1e-12));
  CHECK(learner.accumulate({answer}, 0.5) == Approx(rest).epsilon(1e-12));
}

TEST_CASE("training: of a line the answer and the end token after it are learned") {
  const test::TempFolder folder;
  write_text(folder / "answers.jsonl", R"({"prompt": "Lily had", "answer": " a ball."})"
                                       "\n"
                                       R"({"prompt": [5, 6], "answer": [7]})"
                                       "\n");
  ModelFolder model;
  model.folder = test::root("weights/stories");
  model.open();
  std::vector<Piece> texts;
  read_answers(folder / "answers.jsonl", model, false, texts);
  std::vector<Token> want = model.tokenizer().encode("Lily had");
  const auto first = static_cast<Index>(want.size());
  for (const Token id : model.tokenizer().encode(" a ball.")) want.push_back(id);
  want.push_back(model.config.eos_token_ids.at(0));
  REQUIRE(texts.size() == 2);
  CHECK(texts[0].ids == want);
  CHECK(texts[0].first == first);
  CHECK(texts[1].ids == std::vector<Token>{5, 6, 7});  // ids are taken as they are
  CHECK(texts[1].first == 2);
}

TEST_CASE("training: the batches of a step count by their tokens, so that they are one batch") {
  const auto step = [](Index batches) {
    test::Finetuned<CpuLearner<double>> f(1);
    f.begin();
    Batch rows = f.batch(0);
    for (std::size_t i = 0; i < rows.size(); ++i) rows[i].ids.resize(12 + 4 * i);
    const Source source{
        [&](std::uint64_t number) { return batches == 1 ? rows : Batch{rows[number]}; }};
    TrainOptions o;
    o.steps = 1, o.accumulate = batches;
    return train_step(*f.learner, source, o, 0);
  };
  const Step whole = step(1), parts = step(4);
  CHECK(parts.tokens == whole.tokens);
  CHECK(parts.loss == Approx(whole.loss).epsilon(1e-12));
  CHECK(parts.gradient_norm == Approx(whole.gradient_norm).epsilon(1e-12));
}

TEST_CASE("training: the learning rate rises, then follows a cosine to 5 % of itself") {
  TrainOptions o;
  o.steps = 110, o.warmup = 10, o.lr = 2;
  CHECK(learning_rate(o, 0) == Approx(0.2));
  CHECK(learning_rate(o, 9) == Approx(2));
  CHECK(learning_rate(o, 60) == Approx(2 * (0.05 + 0.95 / 2)));
  CHECK(learning_rate(o, 110) == Approx(0.1));
  o.schedule = "constant";
  CHECK(learning_rate(o, 100) == 2);
}

TEST_CASE("lora: logits of an adapter that PEFT wrote are those of transformers") {
  for (const int version : {1, 2}) {
    const test::Finetuned<CpuLearner<double>> f(version);
    Config config = read_config(f.base);
    Checkpoint checkpoint = read_checkpoint(f.base);
    add_adapter(f.adapter, config, checkpoint);
    CHECK(config.tie_embeddings == read_config(f.base).tie_embeddings - (version == 1));
    CpuEngine engine(checkpoint, config, {});
    const auto logits = test::logits_of(engine, f.batch(0)[0].ids, "parallel");
    CHECK(test::max_difference(logits, test::matrix<float>(f.truth.at("logits"))) < 2e-5);
  }
}

TEST_CASE("lora: the gradient of answers and of preferences is the central difference") {
  for (const int version : {1, 2})
    for (const double beta : {0.0, 0.3}) {
      test::Finetuned<CpuLearner<double>> f(version);
      Batch batch = f.batch(0);
      set_references(*f.learner, batch, 2);
      f.begin();
      const auto objective = [&] { return validate(*f.learner, {batch}, beta).loss; };
      Step sums;
      Batch weighed = batch;
      const double n = beta > 0 ? prefer(*f.learner, beta, weighed, sums) : scored(batch);
      f.learner->accumulate(weighed, 1 / n);
      const double norm = f.learner->gradient_norm();
      auto pairs = f.learner->pairs();
      double squares = 0, worst = 0;
      for (std::size_t i = 0; i < pairs.size(); ++i)
        for (auto* factor : {&pairs[i].A, &pairs[i].B}) {
          const Matrix<double> gradient = factor->g;
          squares += gradient.squaredNorm();
          for (const Index at : {Index(0), factor->w.size() / 2, factor->w.size() - 1}) {
            const double w = factor->w.data()[at], h = 1e-5;
            double difference = 0;
            for (const double sign : {1.0, -1.0}) {
              factor->w.data()[at] = w + sign * h;
              f.learner->set(pairs, 0);
              difference += sign * objective() / (2 * h);
            }
            factor->w.data()[at] = w;
            worst = std::max(worst, std::abs(difference - gradient.data()[at]));
          }
        }
      CAPTURE(version, beta, worst, norm);
      CHECK(worst < 1e-8 * norm);
      CHECK(norm == Approx(std::sqrt(squares)).epsilon(1e-12));
    }
}

TEST_CASE("lora: ten steps of SFT and of DPO are those of PEFT and torch") {
  for (const int version : {1, 2})
    for (const bool pairs : {false, true}) {
      CAPTURE(version, pairs);
      CHECK(test::Finetuned<CpuLearner<double>>(version).ten_steps(pairs) < 1e-4);
    }
}
