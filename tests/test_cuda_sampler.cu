// Claim: the GPU draws the same tokens as the CPU, by every rule of the sampler.
#include "support_cuda.hpp"

using namespace test;
using namespace mamba;

TEST_CASE("cuda sampler: the same tokens as on the CPU, all rules") {
  Random random(11);
  Queue queue;
  int drawn = 0;
  for (const Index V : {1, 2, 37, 4096, 50280})
    for (int trial = 0; trial < (V > 5000 ? 12 : 40); ++trial) {
      SamplerOptions o;
      o.temperature = trial % 7 == 0 ? 0.f : float(0.3 + 1.2 * random.uniform());
      o.top_k = trial % 3 == 0 ? int(random.uniform() * 50) : 0;
      o.top_p = trial % 2 == 0 ? float(0.05 + 0.95 * random.uniform()) : 1.f;
      o.min_p = trial % 5 == 0 ? float(0.2 * random.uniform()) : 0.f;
      o.repetition_penalty = trial % 4 == 0 ? float(0.5 + random.uniform()) : 1.f;
      o.seed = 1000u + static_cast<unsigned>(trial);
      constexpr Index batch = 3;
      Matrix<double> logits = stored<float>(random.matrix<double>(batch, V, 3));
      if (trial % 5 < 2) logits = logits.unaryExpr([](double v) { return std::round(v); });  // ties
      if (trial % 6 == 2 && V > 1) logits(0, 0) = -INFINITY, logits(batch - 1, V - 1) = 9;
      GenerateOptions options;
      options.n = 1, options.sampler = o;
      if (trial % 8 == 3 && V > 2) options.never = {0, static_cast<Token>(V / 2)};
      std::vector<std::vector<Token>> history(batch);
      std::vector<Sampler::Text> texts;
      for (Index b = 0; b < batch; ++b) {
        for (int i = 0; i < 20; ++i)
          history[b].push_back(static_cast<Token>(random.uniform() * double(V)));
        texts.push_back({static_cast<std::uint64_t>(b), history[b]});
      }
      const DeviceBuffer<float> logits_d = up<float>(logits),
                                embedding = up<float>(Matrix<double>::Zero(V, 1)), residual(batch);
      Sampler sampler(options, texts, V, logits_d.data());
      for (const Token id : options.never) logits.col(id).setConstant(-INFINITY);  // for the CPU
      CUDA_CHECK(cudaDeviceSynchronize());
      sampler.draw({embedding.data(), DType::F32}, 1, residual.data(), queue.stream());
      queue.wait();
      for (Index b = 0; b < batch; ++b) {
        const Matrix<float> row = logits.row(b).cast<float>();
        CAPTURE(V, trial, b, o.temperature, o.top_k, o.top_p, o.min_p, o.repetition_penalty);
        CHECK(sampler.drawn(0, b) == sample(row.data(), static_cast<std::size_t>(V), history[b], o,
                                            static_cast<std::uint64_t>(b), 20));
        ++drawn;
      }
    }
  std::cout << "sampler: " << drawn << " draws\n";
}
