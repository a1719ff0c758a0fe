// Measurements of the CPU program: one JSON object a line, against this machine's own limits, which
// are measured in the same run.
//
//   build/bench decode|prefill|bandwidth|matmul [--shape 130m] [--dtype f32] [--length 512] ...
//
// decode is held against reading every weight once, prefill against the multiply-adds of its matrix
// products. Weights are random: speed does not depend on them.
#define MAMBA_NO_MAIN
#include "../mamba.cpp"

#include <tbb/global_control.h>
#include <tbb/info.h>
#include <tbb/parallel_for.h>
#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace {

using namespace mamba;

/// A checkpoint of random weights, spread as at the start of training so that nothing overflows.
Checkpoint random_checkpoint(const Config& config, DType dtype, std::uint64_t seed = 1) {
  Checkpoint checkpoint;
  checkpoint.where = "random weights";
  const auto ends_with = [](const std::string& s, std::string_view end) {
    return s.size() >= end.size() && s.compare(s.size() - end.size(), end.size(), end) == 0;
  };
  for_each_shape(config, [&](const std::string& name, const std::vector<std::int64_t>& shape) {
    Tensor plan{name, DType::F32, shape, nullptr, nullptr};
    const auto values = std::make_shared<std::vector<float>>(plan.size());
    const bool matrix = shape.size() > 1;
    const double fan_in = static_cast<double>(shape.size() == 3 ? shape[2] : shape.back());
    for (std::size_t i = 0; i < values->size(); ++i) {
      seed = seed * 6364136223846793005u + 1442695040888963407u;   // Knuth's linear congruence
      const double u = static_cast<double>(seed >> 40) * 0x1p-24;  // in [0, 1)
      double value = 1;
      if (ends_with(name, "A_log"))
        value = std::log(1 + static_cast<double>(i % 16));
      else if (ends_with(name, "dt_proj.bias") || ends_with(name, "dt_bias"))
        value = std::log(std::expm1(std::exp(std::log(1e-3) + u * std::log(100.0))));
      else if (matrix)
        value = (2 * u - 1) * std::sqrt(3 / fan_in);
      else if (ends_with(name, "bias"))
        value = 0;
      (*values)[i] = static_cast<float>(value);
    }
    plan.data = values->data();
    plan.keep_alive = values;
    checkpoint.tensors[name] = dtype == DType::F32 ? plan : to_dtype(plan, dtype);
  });
  return checkpoint;
}

/// The times of some runs of f in ms, in ascending order; two more runs before them warm up.
template <class Function>
std::vector<double> sorted_ms(Index repeat, const Function& f) {
  std::vector<double> ms;
  for (Index i = -2; i < repeat; ++i) {
    const double start = now();
    f();
    if (i >= 0) ms.push_back((now() - start) * 1e3);
  }
  std::sort(ms.begin(), ms.end());
  return ms;
}

/// Bytes per second that all threads together read from memory: sums over 256 MiB.
double read_bandwidth() {
  constexpr Index kPieces = 256, kFloats = 1 << 18;
  const Eigen::ArrayXf data = Eigen::ArrayXf::Ones(kPieces * kFloats);
  std::vector<float> totals(kPieces);
  const auto read = [&](Index i) { totals[i] = data.segment(i * kFloats, kFloats).sum(); };
  return 4e3 * kPieces * kFloats /
         sorted_ms(10, [&] { tbb::parallel_for(Index{0}, kPieces, read); })[0];
}

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
using Lanes = float __attribute__((vector_size(4 * kLanes)));

/// Multiply-adds per second, times two, of all threads on values that stay in registers: what no
/// matrix product can exceed.
double matmul_peak() {
  constexpr int kChains = 12, kSteps = 1 << 20;
  std::vector<float> totals(
      tbb::global_control::active_value(tbb::global_control::max_allowed_parallelism));
  const auto work = [&](std::size_t thread) {
    Lanes sums[kChains] = {}, factor = Lanes{} + 0.5f, term = Lanes{} + totals[thread];
    for (int step = 0; step < kSteps; ++step)
#pragma GCC unroll 12
      for (int i = 0; i < kChains; ++i) sums[i] = sums[i] * factor + term;
    for (const Lanes& sum : sums) totals[thread] += sum[0];
  };
  return 2e3 * kChains * kLanes * kSteps * static_cast<double>(totals.size()) /
         sorted_ms(10, [&] { tbb::parallel_for(std::size_t{0}, totals.size(), work); })[0];
}

struct Flags {
  std::string op, shape = "130m", dtype = "f32";
  Index length = 512, repeat = 20;
  int threads = 0;
};

/// decode: one token after another; prefill: `length` tokens at once.
void bench_model(const Flags& f) {
  const bool decode = f.op == "decode";
  const DType dtype = f.dtype == "f32" ? DType::F32 : f.dtype == "f16" ? DType::F16 : DType::BF16;
  const Config config = published_config(f.shape);
  double parameters = 0;  // of matrices: each is read once and costs a multiply-add a token
  for_each_shape(config, [&](const std::string&, const std::vector<std::int64_t>& shape) {
    if (shape.size() == 2) parameters += static_cast<double>(shape[0] * shape[1]);
  });
  EngineOptions options;
  options.threads = f.threads;
  CpuEngine engine(random_checkpoint(config, dtype), config, options);
  CpuEngine::State state = engine.new_state();
  const std::vector<Token> ids(static_cast<std::size_t>(decode ? 1 : f.length), 1234);
  const auto L = static_cast<Index>(ids.size());
  const auto limit = [&] { return decode ? read_bandwidth() : matmul_peak(); };
  double most = limit();
  const auto ms = sorted_ms(f.repeat, [&] { prefill(engine, state, ids.data(), L); });
  most = std::max(most, limit());
  const double head = static_cast<double>(config.vocab_size * config.d_model);
  const double bytes = parameters * static_cast<double>(dtype_size(dtype));
  const double flops = 2 * ((parameters - head) * static_cast<double>(L) + head);
  const double floor = 1e3 * (decode ? bytes : flops) / most;
  std::cout << nlohmann::ordered_json{{"op", f.op},
                                      {"shape", f.shape},
                                      {"dtype", f.dtype},
                                      {"length", L},
                                      {"median ms", ms[ms.size() / 2]},
                                      {"best ms", ms[0]},
                                      {"bytes", bytes},
                                      {"flops", flops},
                                      {"floor ms", floor},
                                      {"% of floor", 100 * floor / ms[0]}}
            << std::endl;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("speed of the CPU program");
  app.option_defaults()->always_capture_default();
  Flags f;
  app.add_option("op", f.op)
      ->required()
      ->check(CLI::IsMember({"decode", "prefill", "bandwidth", "matmul"}));
  app.add_option("--shape", f.shape, "a published size: 130m .. 2.8b, mamba2-130m .. mamba2-2.7b");
  app.add_option("--dtype", f.dtype)->check(CLI::IsMember({"f32", "bf16", "f16"}));
  app.add_option("--length", f.length, "tokens of a prefill")->check(CLI::PositiveNumber);
  app.add_option("--repeat", f.repeat, "runs")->check(CLI::PositiveNumber);
  app.add_option("--threads", f.threads, "0: all")->check(CLI::NonNegativeNumber);
  CLI11_PARSE(app, argc, argv);
#if defined(__GLIBC__)
  mallopt(M_MMAP_THRESHOLD, 1 << 30);  // keep freed memory, as the program does
  mallopt(M_TRIM_THRESHOLD, 1 << 30);
#endif
  const int threads = f.threads > 0 ? f.threads : tbb::info::default_concurrency();
  const tbb::global_control control(tbb::global_control::max_allowed_parallelism, threads);
  try {
    if (f.op == "bandwidth")
      std::cout << Json{{"op", f.op}, {"GB/s", read_bandwidth() / 1e9}} << std::endl;
    else if (f.op == "matmul")
      std::cout << Json{{"op", f.op}, {"GFLOP/s", matmul_peak() / 1e9}} << std::endl;
    else
      bench_model(f);
    return 0;
  } catch (const std::exception& error) {
    std::cerr << "bench: " << error.what() << "\n";
    return 1;
  }
}
