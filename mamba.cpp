// mamba.cpp - the CPU program. Build and run:
//
//   g++ -std=c++17 -O3 -march=native -fopenmp mamba.cpp -o mamba -lutf8proc
//   ./mamba "Once upon a time"
//
// The maths is ssm_reference.hpp in float, the loader, generator and command line are mamba.hpp. What
// is here is how the CPU does the work: matrices as stored in the file (f32, bf16 or f16, mapped into
// memory), the matrix product on all cores, and the loops over channels and heads spread over them.

#include "mamba.hpp"

#include <omp.h>

namespace mamba {

// ---------------------------------------------------------------------------------------
// The matrix product: y = x W^T over weights as stored, on all cores
// ---------------------------------------------------------------------------------------



using Index = Eigen::Index;

// Calls f(begin, end) for consecutive pieces of [0, n), each of `grain` (the last one shorter), on
// the threads of OpenMP. The pieces are the same for every number of threads. An exception in f
// is thrown again here. Inside another parallel_for, or for one piece, it runs in the caller.
template <class Function>
void parallel_for(Index n, Index grain, const Function& f) {
  const Index pieces = (n + grain - 1) / grain;
  const auto piece = [&](Index i) { f(i * grain, std::min(n, (i + 1) * grain)); };
  if (pieces <= 1 || omp_in_parallel() || omp_get_max_threads() == 1) {
    for (Index i = 0; i < pieces; ++i) piece(i);
    return;
  }
  std::exception_ptr error;
#pragma omp parallel for schedule(dynamic)
  for (Index i = 0; i < pieces; ++i) {
    try {
      piece(i);
    } catch (...) {
#pragma omp critical
      error = std::current_exception();
    }
  }
  if (error) std::rethrow_exception(error);
}

// A (rows x cols) row-major matrix of weights as stored: f32, bf16 or f16, at any address.
struct Weight {
  DType dtype = DType::F32;
  Index rows = 0, cols = 0;
  const void* data = nullptr;
  std::shared_ptr<const void> keep_alive;  // the mapping or buffer that data points into
};

// One vector register of floats, by the vector extension that GCC and Clang share.
#if defined(__AVX512F__)
constexpr Index kLanes = 16;
#elif defined(__AVX__)
constexpr Index kLanes = 8;
#else
constexpr Index kLanes = 4;
#endif
using Lanes = float __attribute__((vector_size(kLanes * 4)));
using LanesI32 = std::int32_t __attribute__((vector_size(kLanes * 4)));
using LanesI16 = std::int16_t __attribute__((vector_size(kLanes * 2)));

constexpr Index element_bytes(DType dtype) { return dtype == DType::F32 ? 4 : 2; }

// The kLanes elements at p as floats: exact for every stored value.
template <DType dtype>
inline Lanes load(const char* p) {
  if constexpr (dtype == DType::F32) {
    Lanes v;
    std::memcpy(&v, p, sizeof v);
    return v;
  } else {
    LanesI16 half;
    std::memcpy(&half, p, sizeof half);
    const LanesI32 bits = __builtin_convertvector(half, LanesI32);  // the sign fills the top
    if constexpr (dtype == DType::BF16) return reinterpret_cast<Lanes>(bits << 16);
    // f16: the exponent moves from bias 15 to 127: +112, +224 for inf and NaN; a subnormal is
    // (2^-14 + its value) - 2^-14.
    const LanesI32 moved = (bits << 13) & static_cast<std::int32_t>(0x8fffe000);
    const LanesI32 magnitude = moved & 0x0fffe000, sign = moved - magnitude;
    const LanesI32 normal = moved + (112 << 23);
    const LanesI32 special = normal + ((magnitude >= 0x0f800000) & (112 << 23));
    const Lanes subnormal = reinterpret_cast<Lanes>(moved + (113 << 23)) -
                            reinterpret_cast<Lanes>(sign + (113 << 23));
    return reinterpret_cast<Lanes>(magnitude < 0x00800000
                                       ? reinterpret_cast<LanesI32>(subnormal)
                                       : special);
  }
}

// The first n of them, and zeros.
template <DType dtype>
inline Lanes load(const char* p, Index n) {
  char elements[kLanes * element_bytes(dtype)] = {};
  std::memcpy(elements, p, n * element_bytes(dtype));
  return load<dtype>(elements);
}

// out[0..n) = the n elements at p.
template <DType dtype>
void to_floats(const char* p, Index n, float* out) {
  Index k = 0;
  for (; k + kLanes <= n; k += kLanes) {
    const Lanes v = load<dtype>(p + k * element_bytes(dtype));
    std::memcpy(out + k, &v, sizeof v);
  }
  if (k == n) return;
  const Lanes v = load<dtype>(p + k * element_bytes(dtype), n - k);
  std::memcpy(out + k, &v, (n - k) * sizeof(float));
}

inline float sum(Lanes v) {
  float s[kLanes];
  std::memcpy(s, &v, sizeof v);
  for (Index half = kLanes / 2; half > 0; half /= 2)
    for (Index i = 0; i < half; ++i) s[i] += s[i + half];
  return s[0];
}

// Registers hold a tile of kTileX rows of x by kTileW rows of W; the sum over the columns is
// cut at multiples of kDepth, so that a panel of kTileW rows stays in the L1 cache.
constexpr Index kTileX = 4;
constexpr Index kTileW = 6;
constexpr Index kDepth = 768;

// y[t,i] += sum over k < n of x[t,k] w[i,k], for T rows of x and the first `valid` of kTileW rows
// of W. Every y[t,i] is summed in the same order whatever the tile it falls in.
template <Index T, DType dtype>
inline void dot_tile(const float* x, Index x_stride, const char* w, Index w_stride, Index n,
                     Index valid, float* y, Index y_stride) {
  constexpr Index size = element_bytes(dtype);
  const char* rows[kTileW];
  for (Index i = 0; i < kTileW; ++i) rows[i] = w + std::min(i, valid - 1) * w_stride * size;
  Lanes sums[T][kTileW] = {};
  const auto step = [&](Index k, auto... count) {
    Lanes x_k[T];
    for (Index t = 0; t < T; ++t)
      x_k[t] = load<DType::F32>(reinterpret_cast<const char*>(x + t * x_stride + k), count...);
    for (Index i = 0; i < kTileW; ++i) {
      const Lanes w_k = load<dtype>(rows[i] + k * size, count...);
      for (Index t = 0; t < T; ++t) sums[t][i] += x_k[t] * w_k;
    }
  };
  Index k = 0;
  for (; k + kLanes <= n; k += kLanes) step(k);
  if (k < n) step(k, n - k);
  for (Index t = 0; t < T; ++t)
    for (Index i = 0; i < valid; ++i) y[t * y_stride + i] += sum(sums[t][i]);
}

// y = x W^T for L rows of x and rows [begin, end) of W.
template <DType dtype>
void linear_block(const float* x, Index L, Index x_stride, const Weight& W, Index begin,
                  Index end, float* y, Index y_stride) {
  constexpr Index size = element_bytes(dtype);
  for (Index t = 0; t < L; ++t) std::fill(y + t * y_stride + begin, y + t * y_stride + end, 0.f);
  alignas(64) float panel[kTileW * kDepth];
  for (Index k0 = 0; k0 < W.cols; k0 += kDepth) {
    const Index n = std::min(kDepth, W.cols - k0);
    for (Index i = begin; i < end; i += kTileW) {
      const Index valid = std::min(kTileW, end - i);
      const char* w = static_cast<const char*>(W.data) + (i * W.cols + k0) * size;
      const auto tiles = [&](auto stored, const char* rows, Index stride) {
        constexpr DType kStored = decltype(stored)::value;
        Index t = 0;
        for (; t + kTileX <= L; t += kTileX)
          dot_tile<kTileX, kStored>(x + t * x_stride + k0, x_stride, rows, stride, n, valid,
                                    y + t * y_stride + i, y_stride);
        for (; t < L; ++t)
          dot_tile<1, kStored>(x + t * x_stride + k0, x_stride, rows, stride, n, valid,
                               y + t * y_stride + i, y_stride);
      };
      if (L <= kTileX) {
        tiles(std::integral_constant<DType, dtype>(), w, W.cols);
        continue;
      }
      for (Index r = 0; r < valid; ++r)
        to_floats<dtype>(w + r * W.cols * size, n, panel + r * kDepth);
      tiles(std::integral_constant<DType, DType::F32>(), reinterpret_cast<const char*>(panel),
            kDepth);
    }
  }
}

// Calls f with the storage type of W as a compile-time constant.
template <class Function>
void with_dtype(const Weight& W, const Function& f) {
  switch (W.dtype) {
    case DType::F32: return f(std::integral_constant<DType, DType::F32>());
    case DType::BF16: return f(std::integral_constant<DType, DType::BF16>());
    case DType::F16: return f(std::integral_constant<DType, DType::F16>());
    default: fail("linear: expected weights of F32, BF16 or F16");
  }
}

// y = x W^T.  x (L, cols), y (L, rows), both row-major float with the given row strides.
inline void linear(const float* x, Index L, Index x_stride, const Weight& W, float* y,
                   Index y_stride) {
  if (L == 0 || W.rows == 0) return;
  constexpr Index kBlockX = 128, kBlockW = 8 * kTileW;
  const Index x_block = std::min(L, kBlockX);
  // at least 2^15 multiply-adds a piece: about the cost of handing one to a thread
  const Index wanted = (1 << 15) / std::max<Index>(1, W.cols * x_block);
  const Index w_block = L > kTileX ? kBlockW : std::max(kTileW, wanted / kTileW * kTileW);
  const Index x_blocks = (L + kBlockX - 1) / kBlockX, w_blocks = (W.rows + w_block - 1) / w_block;
  with_dtype(W, [&](auto dtype) {
    parallel_for(x_blocks * w_blocks, 1, [&](Index piece, Index) {
      const Index t = piece / w_blocks * kBlockX, i = piece % w_blocks * w_block;
      linear_block<decltype(dtype)::value>(x + t * x_stride, std::min(kBlockX, L - t), x_stride,
                                           W, i, std::min(W.rows, i + w_block),
                                           y + t * y_stride, y_stride);
    });
  });
}

inline Matrix<float> linear(const Eigen::Ref<const Matrix<float>>& x, const Weight& W) {
  if (x.cols() != W.cols) fail("linear: x: expected ", W.cols, " columns, found ", x.cols());
  Matrix<float> y(x.rows(), W.rows);
  linear(x.data(), x.rows(), x.outerStride(), W, y.data(), y.outerStride());
  return y;
}

// Row i of W as floats (1, cols): the embedding of token i.
inline Matrix<float> row(const Weight& W, Index i) {
  if (i < 0 || i >= W.rows) fail("row: expected an index below ", W.rows, ", found ", i);
  Matrix<float> out(1, W.cols);
  with_dtype(W, [&](auto dtype) {
    constexpr DType kStored = decltype(dtype)::value;
    const char* p = static_cast<const char*>(W.data) + i * W.cols * element_bytes(kStored);
    to_floats<kStored>(p, W.cols, out.data());
  });
  return out;
}

inline double seconds_of(const std::function<void()>& f) {
  const auto start = std::chrono::steady_clock::now();
  f();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Bytes per second that all threads together read from memory: the best of 10 sums over 256 MiB.
inline double read_bandwidth() {
  constexpr Index kPiece = 1 << 14, kFloats = Index{1} << 26;
  std::vector<float> data(kFloats, 1.f), sums(kFloats / kPiece);
  double best = 1e30;
  for (int run = 0; run < 10; ++run)
    best = std::min(best, seconds_of([&] {
      parallel_for(kFloats, kPiece, [&](Index begin, Index end) {
        sums[begin / kPiece] = Eigen::Map<Eigen::VectorXf>(data.data() + begin, end - begin).sum();
      });
    }));
  return kFloats * sizeof(float) / best;
}

// Multiply-adds in registers, two operations each: the most that all threads together can do per
// second.
inline double matmul_peak() {
  constexpr Index kChains = 12, kSteps = 1 << 20;
  std::vector<float> sink(omp_get_max_threads());
  double best = 1e30;
  for (int run = 0; run < 10; ++run)
    best = std::min(best, seconds_of([&] {
      parallel_for(sink.size(), 1, [&](Index thread, Index) {
        Lanes sums[kChains], a = Lanes{} + 0.5f, b = Lanes{} + sink[thread];
        for (Index chain = 0; chain < kChains; ++chain) sums[chain] = Lanes{} + float(chain);
        for (Index i = 0; i < kSteps; ++i)
          for (Lanes& s : sums) s = s * a + b;
        for (Lanes& s : sums) sink[thread] += sum(s);
      });
    }));
  return 2.0 * kChains * kSteps * kLanes * sink.size() / best;
}

}  // namespace mamba

namespace mamba {

// ---------------------------------------------------------------------------------------
// The engine: ssm_reference.hpp on stored weights and all cores
// ---------------------------------------------------------------------------------------

/// A matrix in the storage type that --dtype asks for: a window into the file where it can be.
inline void assign(const Tensor& tensor, std::optional<DType> storage, Weight& weight) {
  const bool stored = tensor.dtype == DType::F32 || tensor.dtype == DType::BF16 || tensor.dtype == DType::F16;
  const DType dtype = storage.value_or(stored ? tensor.dtype : DType::F32);
  const Tensor kept = tensor.dtype == dtype ? tensor : to_dtype(tensor, dtype);
  weight = {dtype, tensor.shape[0], tensor.shape[1], kept.data, kept.keep_alive};
}

}  // namespace mamba

/// How the reference's products and loops are carried out here.
template <>
struct ssm::Compute<mamba::Weight> {
  template <class Scalar>
  static Matrix<float> linear(const View<float>& x, const mamba::Weight& W) {
    Matrix<float> y(x.rows(), W.rows);
    mamba::linear(x.data(), x.rows(), x.outerStride(), W, y.data(), y.outerStride());
    return y;
  }
  template <class Scalar>
  static Row<float> row(const mamba::Weight& W, Index i) {
    return mamba::row(W, i);
  }
  template <class Function>  // channels in pieces that stay in the cache, heads one by one
  static void for_ranges(Index n, const Function& f) {
    const Index grain = n > 256 ? 128 : n / 16 + 1;
    mamba::parallel_for(n, grain, [&](Index begin, Index end) { f(begin, end - begin); });
  }
};

namespace mamba {

class CpuEngine {
 public:
  static constexpr const char* kName = "mamba";
  static constexpr const char* kDescription = "the readable reference, on the CPU";
  static constexpr const char* kBenchOps = "decode, prefill, bandwidth or matmul";
  static constexpr bool kHasDevice = false;
  static constexpr Index kPiece = 512;  // tokens that the parallel form takes at once

  using State = ssm::State<float>;

  CpuEngine(const Checkpoint& checkpoint, const Config& config, const EngineOptions& options)
      : config_(config),
        model_(load_model<ssm::Model<float, Weight>>(checkpoint, config, options.dtype)) {
    // Walked in order, a scan costs the CPU least; an SSD is cheapest as matrix products.
    options_.form = config.version == 1 ? ssm::Form::sequential : ssm::Form::chunked;
    options_.delta_ratio = options.delta_ratio;
  }

  const Config& config() const { return config_; }
  State new_state() const { return State(config_); }
  State from_host(State state) const { return state; }
  const State& to_host(const State& state) const { return state; }

  Matrix<float> prefill(State& state, const Token* ids, Index L) {
    const Matrix<float> hidden = ssm::backbone(model_, ids, L, state, options_);
    return ssm::lm_head<float>(model_, hidden.bottomRows(1));
  }

  void forward(State& state, const Token* ids, Index L, const LogitsSink& sink) {
    constexpr Index kRows = 64;  // logits are wide: a few rows at a time
    const Matrix<float> hidden = ssm::backbone(model_, ids, L, state, options_);
    for (Index t = 0; t < L; t += kRows)
      sink(t, ssm::lm_head<float>(model_, hidden.middleRows(t, std::min(kRows, L - t))));
  }

  Matrix<float> step(State& state, Token id) { return ssm::step(model_, id, state, options_); }

  void generate(std::vector<Sequence<State>>& sequences, const GenerateOptions& options,
                const OnToken& on_token) {
    generate_on_host(*this, sequences, options, on_token);
  }

  static void bench(const BenchOptions& options);

 private:
  Config config_;
  ssm::Model<float, Weight> model_;
  ssm::Options<float> options_;
};

// ---------------------------------------------------------------------------------------
// Measurements: one JSON object a line, against this machine's own limits measured in the same run
// ---------------------------------------------------------------------------------------

inline double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

inline void CpuEngine::bench(const BenchOptions& options) {
  const int threads = omp_get_max_threads();
  if (options.op == "bandwidth") {
    std::cout << Json{{"op", "bandwidth"}, {"threads", threads}, {"GB/s", read_bandwidth() / 1e9}} << "\n";
    return;
  }
  if (options.op == "matmul") {
    std::cout << Json{{"op", "matmul"}, {"threads", threads}, {"GFLOP/s", matmul_peak() / 1e9}} << "\n";
    return;
  }
  const bool decode = options.op == "decode";
  if (!decode && options.op != "prefill")
    fail("bench: op: expected ", kBenchOps, ", found ", quote(options.op));
  const Config config = published_config(options.shape);
  std::size_t parameters = 0;  // of matrices: each is read once and costs a multiply-add a token
  for_each_shape(config, [&](const std::string&, const std::vector<std::int64_t>& shape) {
    if (shape.size() == 2) parameters += static_cast<std::size_t>(shape[0] * shape[1]);
  });
  CpuEngine engine(random_checkpoint(config, options.dtype), config, {});
  State state = engine.new_state();
  const std::vector<Token> ids(static_cast<std::size_t>(options.length), 1234);
  std::vector<double> seconds;
  for (Index i = -2; i < options.repeat; ++i) {  // two to warm up
    const double start = now();
    if (decode) engine.step(state, ids[0]);
    else mamba::prefill(engine, state, ids.data(), options.length);
    if (i >= 0) seconds.push_back(now() - start);
  }
  const double time = median(seconds), bytes = static_cast<double>(parameters * dtype_size(options.dtype));
  const double head = static_cast<double>(config.vocab_size * config.d_model);
  const double flops = 2 * ((static_cast<double>(parameters) - head) * (decode ? 1.0 : static_cast<double>(options.length)) + head);
  const double floor = decode ? bytes / read_bandwidth() : flops / matmul_peak();
  std::cout << Json{{"op", options.op}, {"shape", options.shape}, {"dtype", dtype_name(options.dtype)},
                    {"length", decode ? 1 : options.length}, {"threads", threads}, {"ms", time * 1e3},
                    {"bytes", bytes}, {"flops", flops}, {"floor ms", floor * 1e3}, {"% of floor", 100 * floor / time}}
            << "\n";
}

}  // namespace mamba

#ifndef MAMBA_NO_MAIN
int main(int argc, char** argv) { return mamba::run<mamba::CpuEngine>(argc, argv); }
#endif
