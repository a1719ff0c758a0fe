// mamba.cpp - the CPU program. Build and run:
//
//   g++ -std=c++17 -O3 -march=native -fopenmp -isystem /usr/include/eigen3 mamba.cpp -o mamba -lutf8proc
//   ./mamba "Once upon a time"
//
// The maths is ssm_reference.hpp in float, the loader, generator and command line are mamba.hpp. What
// is here is how the CPU does the work: matrices as stored in the file (f32, bf16 or f16, mapped into
// memory), the matrix product on all cores, and the loops over channels and heads spread over them.

#include "mamba.hpp"

#include <omp.h>
#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace mamba {

// ------------------------------------------------------------------------------------------
// The matrix product y = x W^T over weights as stored, on all cores
// ------------------------------------------------------------------------------------------

// The threads that share the caller's work. An OpenMP team meets at a barrier, so on a busy machine,
// where a thread may be away for milliseconds, each of the hundred products of a token waits for
// it. Here nobody waits for a thread that has not come: the caller takes pieces as well, and at the
// end waits only for those that somebody has begun.
class Workers {
 public:
  ~Workers() {
    stop_ = true;
    { const std::lock_guard<std::mutex> lock(mutex_); }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  // Calls piece(i) for every i below `pieces`, on at most omp_get_max_threads() threads.
  void run(std::uint32_t pieces, const std::function<void(Index)>& piece) {
    const int helpers = omp_get_max_threads() - 1;
    std::unique_lock<std::mutex> turn(turn_, std::defer_lock);
    if (pieces <= 1 || helpers == 0 || inside_ || !turn.try_lock()) {  // alone, or in a piece
      for (Index i = 0; i < pieces; ++i) piece(i);
      return;
    }
    while (static_cast<int>(threads_.size()) < helpers)
      threads_.emplace_back([this, i = static_cast<int>(threads_.size())] { serve(i); });
    helpers_ = helpers;
    piece_ = &piece;
    unfinished_ = pieces;
    error_ = nullptr;
    left_ = ((left_ >> 32) + 1) << 32 | pieces;  // from here on pieces are taken
    if (sleeping_ > 0) {
      { const std::lock_guard<std::mutex> lock(mutex_); }
      wake_.notify_all();
    }
    work();
    while (unfinished_ > 0) std::this_thread::yield();
    if (error_) std::rethrow_exception(error_);
  }

 private:
  bool called(int helper) const {
    return stop_ || (static_cast<std::uint32_t>(left_) > 0 && helper < helpers_);
  }

  void serve(int helper) {
    constexpr int kTries = 300;  // some 0.1 ms: the next product is seldom further away
    while (!stop_) {
      for (int i = 0; i < kTries && !called(helper); ++i) std::this_thread::yield();
      if (!called(helper)) {
        std::unique_lock<std::mutex> lock(mutex_);
        ++sleeping_;
        wake_.wait(lock, [&] { return called(helper); });
        --sleeping_;
      }
      work();
    }
  }

  void work() {
    inside_ = true;
    for (std::uint64_t left = left_; static_cast<std::uint32_t>(left) > 0; left = left_) {
      const std::function<void(Index)>* piece = piece_;
      if (!left_.compare_exchange_weak(left, left - 1)) continue;  // so piece is of this call
      try {
        (*piece)(static_cast<std::uint32_t>(left) - 1);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex_);
        error_ = std::current_exception();
      }
      --unfinished_;
    }
    inside_ = false;
  }

  static inline thread_local bool inside_ = false;
  std::mutex turn_, mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> threads_;
  std::atomic<std::uint64_t> left_{0};  // number of the call << 32 | pieces that nobody has taken
  std::atomic<const std::function<void(Index)>*> piece_{nullptr};
  std::atomic<std::uint32_t> unfinished_{0};
  std::atomic<int> helpers_{0}, sleeping_{0};
  std::atomic<bool> stop_{false};
  std::exception_ptr error_;
};

inline Workers& workers() {
  static Workers all;
  return all;
}

// Calls f(begin, end) for consecutive pieces of [0, n), each of `grain` (the last one shorter), on
// all threads. The pieces are the same for every number of threads. A call from inside a piece runs
// in its caller; an exception in f arrives in the caller.
template <class Function>
void parallel_for(Index n, Index grain, const Function& f) {
  const Index pieces = (n + grain - 1) / grain;
  workers().run(static_cast<std::uint32_t>(pieces),
                [&](Index i) { f(i * grain, std::min(n, (i + 1) * grain)); });
}

// A (rows x cols) row-major matrix of weights as stored: F32, BF16 or F16, at any address.
struct Weight {
  DType dtype = DType::F32;
  Index rows = 0, cols = 0;
  const void* data = nullptr;
  std::shared_ptr<const void> keep_alive;  // the mapping or buffer that data points into
};

// Calls f with the storage type of W as a compile-time constant.
template <class Function>
void with_dtype(const Weight& W, const Function& f) {
  switch (W.dtype) {
    case DType::F32:
      return f(std::integral_constant<DType, DType::F32>());
    case DType::BF16:
      return f(std::integral_constant<DType, DType::BF16>());
    case DType::F16:
      return f(std::integral_constant<DType, DType::F16>());
    default:
      fail("linear: weights: expected F32, BF16 or F16");
  }
}

constexpr Index element_bytes(DType dtype) { return dtype == DType::F32 ? 4 : 2; }

// One vector register of floats, by the vector extension that GCC and Clang share, and the tile
// of sums, kTileX rows of x by kTileW rows of W, that fits the registers with its operands.
#if defined(__AVX512F__)  // 32 registers of 16 floats
constexpr Index kLanes = 16, kTileX = 4, kTileW = 6;
#elif defined(__AVX__)      // 16 registers of 8
constexpr Index kLanes = 8, kTileX = 3, kTileW = 4;
#elif defined(__aarch64__)  // 32 registers of 4
constexpr Index kLanes = 4, kTileX = 4, kTileW = 6;
#else
constexpr Index kLanes = 4, kTileX = 3, kTileW = 4;
#endif
using Lanes = float __attribute__((vector_size(4 * kLanes)));
using LanesU32 = std::uint32_t __attribute__((vector_size(4 * kLanes)));
using LanesU16 = std::uint16_t __attribute__((vector_size(2 * kLanes)));

// n rounded up to whole registers.
constexpr Index padded(Index n) { return (n + kLanes - 1) / kLanes * kLanes; }

// IEEE half to float. The exponent's bias goes from 15 to 127, that is +112; inf and NaN take +112
// again, to 255; a subnormal, whose exponent field is 0, is (2^-14 + its value) - 2^-14.
inline Lanes half_to_float(LanesU16 half) {
#if defined(__AVX512F__)
  return reinterpret_cast<Lanes>(_mm512_maskz_cvtph_ps(0xffff, reinterpret_cast<__m256i>(half)));
#elif defined(__F16C__)
  return reinterpret_cast<Lanes>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(half)));
#else
  const LanesU32 bits = __builtin_convertvector(half, LanesU32);
  const LanesU32 sign = (bits & 0x8000) << 16, magnitude = (bits & 0x7fff) << 13;
  const auto is_special = reinterpret_cast<LanesU32>(magnitude >= (31 << 23));
  const auto is_subnormal = reinterpret_cast<LanesU32>(magnitude < (1 << 23));
  const LanesU32 normal = magnitude + (112 << 23) + (is_special & (112 << 23));
  const Lanes subnormal = reinterpret_cast<Lanes>(magnitude + (113 << 23)) - 0x1p-14f;
  return reinterpret_cast<Lanes>(sign | (normal & ~is_subnormal) |
                                 (reinterpret_cast<LanesU32>(subnormal) & is_subnormal));
#endif
}

// The kLanes elements at p as floats; p need not be aligned.
template <DType dtype>
Lanes load(const char* p) {
  if constexpr (dtype == DType::F32) {
    Lanes v;
    std::memcpy(&v, p, sizeof v);
    return v;
  } else {
    LanesU16 v;
    std::memcpy(&v, p, sizeof v);
    if constexpr (dtype == DType::F16) return half_to_float(v);
    return reinterpret_cast<Lanes>(__builtin_convertvector(v, LanesU32) << 16);
  }
}

// out[0..n) = the n elements at p, then zeros up to padded(n). Asks for those at p + ahead too.
template <DType dtype>
void to_floats(const char* p, Index n, float* out, Index ahead = 0) {
  constexpr Index size = element_bytes(dtype);
  for (Index k = 0; k < n; k += kLanes) {
    char last[kLanes * size] = {};
    if (n - k < kLanes) std::memcpy(last, p + k * size, (n - k) * size);
    const Lanes v = load<dtype>(n - k < kLanes ? last : p + k * size);
    __builtin_prefetch(p + k * size + ahead, 0, 2);
    std::memcpy(out + k, &v, sizeof v);
  }
}

inline float sum(Lanes v) {
  Eigen::Array<float, kLanes, 1> floats;
  std::memcpy(floats.data(), &v, sizeof v);
  return floats.sum();
}

// Keeps v in a register. (GCC would rather load it again for each use, and be bound by loads.)
inline Lanes kept(Lanes v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#endif
  return v;
}

// f(0), ..., f(N - 1) with constants, so that the arrays that they index are kept in registers.
template <Index N, class Function>
[[gnu::always_inline]] inline void unroll(const Function& f) {
  if constexpr (N > 0) {
    unroll<N - 1>(f);
    f(std::integral_constant<Index, N - 1>());
  }
}

// Rows of x times at most kTileW rows of W, over n columns (a multiple of kLanes).
struct Tile {
  const float* x;
  Index x_stride;
  const char* w;   // as stored
  Index w_stride;  // in bytes
  Index n, w_rows;
  float* y;
  Index y_stride;
  bool add;  // to what y holds, or overwrite it
};

// y[t,i] (+)= sum over k < n of x[t,k] w[i,k] for t < T, i < w_rows. The order of each sum is the
// same for every T. kPrefetch asks for the next kTileW rows of W ahead of their use.
template <Index T, DType dtype, bool kPrefetch>
void dot_tile(const Tile& tile) {
  const char* w[kTileW];  // after w_rows the last row again; those sums are not stored
  for (Index i = 0; i < kTileW; ++i) w[i] = tile.w + std::min(i, tile.w_rows - 1) * tile.w_stride;
  Lanes sums[T][kTileW] = {};
  for (Index k = 0; k < tile.n; k += kLanes) {
    Lanes x_k[T];
    unroll<T>([&](auto t) {
      const float* x = tile.x + t * tile.x_stride + k;
      x_k[t] = kept(load<DType::F32>(reinterpret_cast<const char*>(x)));
    });
    unroll<kTileW>([&](auto i) {
      const char* w_ik = w[i] + k * element_bytes(dtype);
      const Lanes w_k = kept(load<dtype>(w_ik));
      if (kPrefetch) __builtin_prefetch(w_ik + kTileW * tile.w_stride, 0, 2);
      unroll<T>([&](auto t) { sums[t][i] += x_k[t] * w_k; });
    });
  }
  float totals[T][kTileW];
  unroll<T>([&](auto t) { unroll<kTileW>([&](auto i) { totals[t][i] = sum(sums[t][i]); }); });
  for (Index t = 0; t < T; ++t)
    for (Index i = 0; i < tile.w_rows; ++i) {
      float& y = tile.y[t * tile.y_stride + i];
      y = tile.add ? y + totals[t][i] : totals[t][i];
    }
}

// The same for L rows of x: T at a time while there are T, then fewer.
template <Index T, DType dtype, bool kPrefetch>
void dot_tiles(Tile tile, Index L) {
  for (; L >= T; L -= T) {
    dot_tile<T, dtype, kPrefetch>(tile);
    tile.x += T * tile.x_stride;
    tile.y += T * tile.y_stride;
  }
  if constexpr (T > 1) dot_tiles<T - 1, dtype, kPrefetch>(tile, L);
}

// Up to kFewRows rows of x, W is read in order and used as it is stored; above, kTileW rows at a
// time become floats first. Sums are cut after at most kDepth columns: so much of a tile's rows
// fits the L1 cache.
constexpr Index kFewRows = 16, kDepth = 768;

// y = x W^T for L rows of x, with zeros from cols up to padded(cols), and rows [begin, end) of W.
template <DType dtype>
void linear_block(const float* x, Index L, Index x_stride, const Weight& W, Index begin, Index end,
                  float* y, Index y_stride) {
  constexpr Index size = element_bytes(dtype);
  const Index parts = std::max<Index>(1, (W.cols + kDepth - 1) / kDepth);
  const Index depth = padded((W.cols + parts - 1) / parts);  // the same for every L
  alignas(64) float panel[kTileW * kDepth];
  for (Index part = 0; part < parts; ++part) {
    const Index k = part * depth, n = std::min(depth, W.cols - k);
    for (Index i = begin; i < end; i += kTileW) {
      const char* w = static_cast<const char*>(W.data) + (i * W.cols + k) * size;
      const Index w_rows = std::min(kTileW, end - i);
      Tile tile{x + k, x_stride, w, W.cols * size, n, w_rows, y + i, y_stride, part > 0};
      if (L <= kFewRows && n == padded(n)) {
        dot_tiles<kTileX, dtype, true>(tile, L);
        continue;
      }
      for (Index r = 0; r < w_rows; ++r)
        to_floats<dtype>(w + r * tile.w_stride, n, panel + r * depth, kTileW * tile.w_stride);
      tile.w = reinterpret_cast<const char*>(panel);
      tile.w_stride = depth * sizeof(float);
      tile.n = padded(n);
      dot_tiles<kTileX, DType::F32, false>(tile, L);
    }
  }
}

// y = x W^T in pieces: a block of x, which stays in the L2 cache, times some panels of W.
inline void linear_pieces(const float* x, Index L, Index x_stride, const Weight& W, float* y,
                          Index y_stride) {
  constexpr Index kBlock = 160, kPieces = 16, kMostPanels = 32, kLeastProducts = 1 << 14;
  const Index blocks = (L + kBlock - 1) / kBlock, panels = (W.rows + kTileW - 1) / kTileW;
  const bool few = L <= kFewRows;
  // panels in a piece: for kPieces pieces in all, but enough to be worth handing to a thread
  const Index least = kLeastProducts / std::max<Index>(1, L * kTileW * W.cols) + 1;
  const Index wanted = std::min(blocks * panels / kPieces, few ? panels : kMostPanels);
  const Index grain = kTileW * std::max(least, wanted);
  const Index strips = (W.rows + grain - 1) / grain;
  with_dtype(W, [&](auto dtype) {
    parallel_for(blocks * strips, 1, [&](Index piece, Index) {
      const Index t = piece / strips * kBlock, begin = piece % strips * grain;
      const Index end = std::min(W.rows, begin + grain), step = few ? kTileW : grain;
      for (Index i = begin; i < end; i += step)
        linear_block<dtype.value>(x + t * x_stride, std::min(kBlock, L - t), x_stride, W, i,
                                  std::min(end, i + step), y + t * y_stride, y_stride);
    });
  });
}

// y = x W^T.  x (L, cols), y (L, rows), both row-major float with the given row strides. Bound by
// reading W once while L is small, by multiply-adds when it is large. A row of y has the same bits
// for every L and every number of threads.
inline void linear(const float* x, Index L, Index x_stride, const Weight& W, float* y,
                   Index y_stride) {
  if (W.cols == padded(W.cols)) return linear_pieces(x, L, x_stride, W, y, y_stride);
  Matrix<float> with_zeros = Matrix<float>::Zero(L, padded(W.cols));
  for (Index t = 0; t < L; ++t) std::copy_n(x + t * x_stride, W.cols, &with_zeros(t, 0));
  linear_pieces(with_zeros.data(), L, padded(W.cols), W, y, y_stride);
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
  Matrix<float> out(1, padded(W.cols));
  with_dtype(W, [&](auto dtype) {
    const char* p = static_cast<const char*>(W.data) + i * W.cols * element_bytes(dtype);
    to_floats<dtype.value>(p, W.cols, out.data());
  });
  return out.leftCols(W.cols);
}

}  // namespace mamba

namespace mamba {

// ---------------------------------------------------------------------------------------
// The engine: ssm_reference.hpp on stored weights and all cores
// ---------------------------------------------------------------------------------------

/// A matrix in the storage type that --dtype asks for: a window into the file where it can be.
inline void assign(const Tensor& tensor, std::optional<DType> storage, Weight& weight) {
  const bool stored =
      tensor.dtype == DType::F32 || tensor.dtype == DType::BF16 || tensor.dtype == DType::F16;
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
  static constexpr bool kHasDevice = false;
  static constexpr Index kPiece = 256;      // tokens that the parallel form takes at once
  static constexpr std::size_t kBatch = 1;  // one text after the other

  using State = ssm::State<float>;

  CpuEngine(const Checkpoint& checkpoint, const Config& config, const EngineOptions& options)
      : config_(config),
        model_(load_model<ssm::Model<float, Weight>>(checkpoint, config, options.dtype)) {
    if (options.threads > 0) omp_set_num_threads(options.threads);
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

 private:
  Config config_;
  ssm::Model<float, Weight> model_;
  ssm::Options<float> options_;
};

}  // namespace mamba

#ifndef MAMBA_NO_MAIN
int main(int argc, char** argv) {
#if defined(__GLIBC__)
  // Keep freed memory: pages that come back from the kernel must be zeroed anew.
  mallopt(M_MMAP_THRESHOLD, 1 << 30);
  mallopt(M_TRIM_THRESHOLD, 1 << 30);
#endif
  return mamba::run<mamba::CpuEngine>(argc, argv);
}
#endif
