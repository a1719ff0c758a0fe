// What adapters must come to, for the learners of both programs: tests/golden/finetune.
#pragma once

#include "../train.hpp"
#include "support.hpp"

namespace test {

using namespace mamba;

/// Of a tiny golden model an adapter that PEFT wrote, and what transformers and torch make of it:
/// tests/golden/finetune.
template <class Learner>
struct Finetuned {
  using Scalar = typename Learner::Scalar;
  std::string base, adapter;
  Config config;
  Checkpoint truth;
  LoraOptions lora;
  std::unique_ptr<LoraLearner<Learner>> learner;

  explicit Finetuned(int version) {
    const std::string name = "mamba" + std::to_string(version);
    base = root("tests/golden/" + name + "-hf");
    adapter = root("tests/golden/finetune/" + name);
    config = read_config(base);
    truth = read_safetensors(adapter + "/expected.safetensors");
    lora.rank = 4, lora.alpha = 6;
    if (version == 1) lora.targets.push_back("embeddings");
    Learned<Scalar> start{parameters_of<Scalar>(read_checkpoint(base), config), {}, {}};
    if (version == 1) untie(config, start.weights);
    learner = std::make_unique<LoraLearner<Learner>>(config, start, EngineOptions{}, lora, 1);
  }
  /// Takes up the adapter; until then the learner is the base model.
  void begin() {
    const Checkpoint file = read_safetensors(adapter + "/adapter_model.safetensors");
    auto pairs = learner->pairs();
    for (auto& pair : pairs) {
      CHECK(pair.B.w.isZero());
      for (auto* f : {&pair.A, &pair.B})
        f->w = lora_factor(file.at(f->name)).template cast<Scalar>();
    }
    CHECK(pairs.size() * 2 == file.tensors.size());
    learner->set(pairs, 0);
  }
  /// The sequences that step `number` learns.
  Batch batch(std::uint64_t number) const {
    const auto& shape = truth.at("ids").shape;
    Batch pieces;
    for (Index row = 0; row < shape[1]; ++row)
      pieces.push_back(
          {tokens(truth.at("ids"), (number * shape[1] + row) * shape[2], shape[2]), 9});
    return pieces;
  }

  /// The worst difference of a loss, a margin, or of a gradient's norm relative to it.
  double ten_steps(bool pairs) {
    std::vector<Batch> batches;
    for (std::uint64_t number = 0; number < 10; ++number) {
      batches.push_back(batch(number));
      set_references(*learner, batches.back(), 4);
    }
    begin();
    const Source source{[&](std::uint64_t number) { return batches[number]; }};
    TrainOptions o;
    o.steps = 10, o.lr = 3e-3, o.schedule = "constant", o.dpo = pairs ? 0.3 : 0;
    const Matrix<double> want = matrix<double>(truth.at(pairs ? "dpo" : "sft"));
    double worst = 0;
    for (Index i = 0; i < o.steps; ++i) {
      const Step step = train_step(*learner, source, o, i);
      worst = std::max({worst, std::abs(step.loss - want(i, 0)),
                        std::abs(step.gradient_norm / want(i, want.cols() - 1) - 1)});
      if (!pairs) continue;
      worst = std::max(worst, std::abs(step.margin - want(i, 1)));
      CHECK(step.accuracy == want(i, 2));
    }
    return worst;
  }
};

}  // namespace test
