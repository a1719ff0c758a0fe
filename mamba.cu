// mamba.cu - the GPU program. Build and run (Hopper; -arch=native does for other GPUs):
//
//   nvcc -std=c++17 -O1 -split-compile=0 -gencode=arch=compute_90a,code=sm_90a -DEIGEN_NO_CUDA \
//     -isystem /usr/include/eigen3 mamba.cu -o mamba_cuda -lcublas -lutf8proc
//   ./mamba_cuda "Once upon a time"
//
// -O1 is for the host's code, half of the compile time: kernels are always fully optimized.
//
// Read ssm_reference.hpp first: it says what is computed. Here the same operations, by the same
// names, are CUDA kernels; for each a simple rung first, then the fast one. Loader, generator and
// command line are mamba.hpp.
//
// kernel                             reference              idea                   in parallel
// causal_conv1d_naive_kernel         causal_conv1d          one output a thread    batch, t, d
// causal_conv1d_fused_kernel         causal_conv1d, silu    window in registers    pieces of t, d
// causal_conv1d_step_kernel          causal_conv1d_step     one token              batch, d
// selective_scan_naive_kernel        selective_scan         one thread walks time  batch, d
// selective_scan_fused_kernel        selective_scan         some warps walk time,  batch, d,
//                                                           others feed, finish    pieces of N
// selective_scan_chunk_start_kernel  selective_scan_chunked short walk between two batch, d, N
//                                                           passes of the fused
// selective_scan_step_kernel         selective_scan_step    one token, h in place  batch, d, N
// ssd_naive_kernel                   ssd_sequential         one warp walks time    batch, H, P
// ssd_fused_kernel                   ssd_chunked            chunks on tensor cores batch, pieces
//                                                                                  of h and of t
// ssd_warpgroup_kernel               ssd_chunked            on wgmma (Hopper), fed the same
//                                                           by one warpgroup
// ssd_step_kernel                    ssd_step               one token, h in place  batch, H, P
// rms_norm_kernel                    rms_norm               a row stays on chip    rows
// gated_rms_norm_kernel              gated_rms_norm         the same               rows, groups
// linear_step_kernel                 linear, rms_norm,      W read once, with what rows of W,
//                                    causal_conv1d_step     surrounds the product  pieces of rows
// scan_decode_kernel                 selective_scan_step    with dt_proj before    batch, d,
//                                                                                  quarters of N
// ssd_decode_kernel                  ssd_step               with the gate after    batch, H, P
// embedding_kernel                   backbone               a row of the table     tokens
// best_kernel, sample_kernel         sample (mamba.hpp)     bisection, no sort     vocabulary
#include "mamba.hpp"

#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

namespace mamba {

// ============================================================================================
// Errors and memory
// ============================================================================================

inline void check_cuda(cudaError_t error, const char* call, int line) {
  if (error != cudaSuccess)
    fail("CUDA: ", cudaGetErrorString(error), ": mamba.cu:", line, ": ", call);
}
inline void check_cublas(cublasStatus_t status, const char* call, int line) {
  if (status != CUBLAS_STATUS_SUCCESS)
    fail("cuBLAS: ", cublasGetStatusString(status), ": mamba.cu:", line, ": ", call);
}
#define CUDA_CHECK(call) ::mamba::check_cuda((call), #call, __LINE__)
#define CUBLAS_CHECK(call) ::mamba::check_cublas((call), #call, __LINE__)

inline std::string mebibytes(size_t bytes) { return std::to_string((bytes >> 20) + 1) + " MiB"; }

/// Fails, with what is needed and what there is, unless so many bytes can be had on the GPU.
inline void need_memory(size_t bytes, const char* what) {
  size_t available = 0, total = 0;
  CUDA_CHECK(cudaMemGetInfo(&available, &total));
  if (bytes > available)
    fail("out of GPU memory: ", what, ": needed ", mebibytes(bytes), ", available ",
         mebibytes(available));
}

// An array of T on the GPU. It owns its memory and can be moved, not copied. What is copied or
// zeroed is there when the call returns: other streams do not wait for the one that does it.
template <class T>
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  explicit DeviceBuffer(size_t size) : size_(size) {
    if (size == 0) return;
    const cudaError_t error = cudaMalloc(&data_, bytes());
    if (error == cudaErrorMemoryAllocation) cudaGetLastError(), need_memory(bytes(), "a buffer");
    CUDA_CHECK(error);
  }
  DeviceBuffer(const T* from, size_t size) : DeviceBuffer(size) { copy_from(from); }
  DeviceBuffer(DeviceBuffer&& other) noexcept { *this = std::move(other); }
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~DeviceBuffer() { cudaFree(data_); }

  T* data() const { return data_; }
  size_t size() const { return size_; }
  size_t bytes() const { return size_ * sizeof(T); }
  void copy_from(const T* host) {
    CUDA_CHECK(cudaMemcpy(data_, host, bytes(), cudaMemcpyHostToDevice));
    CUDA_CHECK(cudaStreamSynchronize(nullptr));
  }
  void copy_to(T* host) const {
    CUDA_CHECK(cudaMemcpy(host, data_, bytes(), cudaMemcpyDeviceToHost));
  }
  void zero() {
    CUDA_CHECK(cudaMemset(data_, 0, bytes()));
    CUDA_CHECK(cudaStreamSynchronize(nullptr));
  }
  void grow(size_t size) {  // to at least so many; what it held is lost
    if (size <= size_) return;
    *this = DeviceBuffer();
    *this = DeviceBuffer(size);
  }

 private:
  T* data_ = nullptr;
  size_t size_ = 0;
};

// A mark in a stream: to wait for, or to measure between.
class Event {
 public:
  explicit Event(bool timed = false) {
    CUDA_CHECK(
        cudaEventCreateWithFlags(&event_, timed ? cudaEventDefault : cudaEventDisableTiming));
  }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  ~Event() { cudaEventDestroy(event_); }
  void record(cudaStream_t stream) { CUDA_CHECK(cudaEventRecord(event_, stream)); }
  void wait() { CUDA_CHECK(cudaEventSynchronize(event_)); }
  double milliseconds_to(const Event& later) const {
    float ms = 0;
    CUDA_CHECK(cudaEventElapsedTime(&ms, event_, later.event_));
    return ms;
  }

 private:
  cudaEvent_t event_ = nullptr;
};

// What `enqueue` puts into the stream, as one launch.
class Graph {
 public:
  template <class Function>
  Graph(cudaStream_t stream, const Function& enqueue) {
    cudaGraph_t graph = nullptr;
    CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    enqueue();
    CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
    CUDA_CHECK(cudaGraphInstantiate(&graph_, graph, 0));
    CUDA_CHECK(cudaGraphDestroy(graph));
  }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  ~Graph() { cudaGraphExecDestroy(graph_); }
  void launch(cudaStream_t stream) const { CUDA_CHECK(cudaGraphLaunch(graph_, stream)); }

 private:
  cudaGraphExec_t graph_ = nullptr;
};

// ==========================================================================================
// Storage types and pointwise functions
// ==========================================================================================

// n neighbouring numbers, kept as the words that carry them until they are needed as floats.
template <class T, int n>
struct alignas(n * sizeof(T)) Vector {
  // Words, not T: to take a number of 16 bits out of its word is to wait for the load.
  using Word = std::conditional_t<n * sizeof(T) % 4 == 0, uint32_t, uint16_t>;
  Word word[n * sizeof(T) / sizeof(Word)] = {};
};

template <class T>
__device__ inline float to_float(T v) {
  return float(v);
}
template <class T>
__device__ inline T from_float(float v) {  // to the nearest
  return T(v);
}

template <int n, class T>
__device__ inline Vector<T, n> load(const T* p, bool exists) {  // zeros where nothing is
  if (exists) return *reinterpret_cast<const Vector<T, n>*>(p);
  return {};
}
template <int n, class T>
__device__ inline void store(T* p, const Vector<T, n>& v) {
  *reinterpret_cast<Vector<T, n>*>(p) = v;
}
template <class T, int n>
__device__ inline void unpack(const Vector<T, n>& v, float (&to)[n]) {
  T numbers[n];
  std::memcpy(numbers, &v, sizeof v);
#pragma unroll
  for (int i = 0; i < n; ++i) to[i] = to_float(numbers[i]);
}
// bfloat16 is the upper half of a float: a shift or a mask makes one from either half of a word.
template <int n>
__device__ inline void unpack(const Vector<__nv_bfloat16, n>& v, float (&to)[n]) {
  static_assert(n == 1 || n % 2 == 0, "halves of whole words");
#pragma unroll
  for (int i = 0; i < n; ++i)
    to[i] = __uint_as_float(i % 2 ? v.word[i / 2] & 0xffff0000u : v.word[i / 2] * 0x10000u);
}
template <class T, int n>
__device__ inline Vector<T, n> pack(const float (&from)[n]) {
  T numbers[n];
#pragma unroll
  for (int i = 0; i < n; ++i) numbers[i] = from_float<T>(from[i]);
  Vector<T, n> v;
  std::memcpy(&v, numbers, sizeof v);
  return v;
}

// kBytes (4, 8 or 16) from global to shared memory, without waiting for them; zeros, and nothing is
// read, where !valid. (Of the Toolkit's __pipeline_memcpy_async the number of zeros is a constant:
// such a choice becomes two instructions.)
template <int kBytes = 16>
__device__ inline void copy_async(uint32_t to, const void* from, bool valid) {
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                 "r"(valid ? 16 : 0)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(kBytes),
                 "r"(valid ? kBytes : 0)
                 : "memory");
  }
}
// The same for n numbers.
template <class T, int n>
__device__ inline void copy_async(Vector<T, n>* to, const T* from, bool valid) {
  copy_async<int(sizeof *to)>(uint32_t(__cvta_generic_to_shared(to)), from, valid);
}
__device__ inline void copy_async_commit() { __pipeline_commit(); }
__device__ inline void copy_async_wait() { __pipeline_wait_prior(0); }
template <int kPending>  // all but the last kPending commits have arrived
__device__ void copy_async_wait_but() {
  __pipeline_wait_prior(kPending);
}

constexpr float kLog2e = 1.44269504f;

// 2^x in one instruction: relative error below 2^-22, exact at 0, results below 2^-126 become 0.
// (exp2f is more instructions.)
__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// 1/x, relative error below 2^-23; 0 where the result is below 2^-126.
__device__ inline float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// softplus(x) = max(x, 0) + log(1 + e), e = exp(-|x|) in (0, 1], so nothing overflows.
// log(1 + e) = e P(e), P the polynomial through the Chebyshev nodes of [0, 1]: relative
// error below 2^-23 in P, 2.0e-7 when rounded, small e included; a log instruction would be
// 2^-22 absolute there.
__device__ inline float softplus(float x) {
  const float e = exp2_approx(-kLog2e * fabsf(x));
  float p = 0.00512610236f;
  p = fmaf(p, e, -0.0290740654f);
  p = fmaf(p, e, 0.0775160864f);
  p = fmaf(p, e, -0.136022478f);
  p = fmaf(p, e, 0.190768808f);
  p = fmaf(p, e, -0.248353988f);
  p = fmaf(p, e, 0.333181202f);
  p = fmaf(p, e, -0.499994457f);
  p = fmaf(p, e, 0.99999994f);
  return fmaf(p, e, fmaxf(x, 0.f));
}

// silu(x) = x / (1 + e^-x). e^-x may be infinite: its reciprocal is 0.
__device__ inline float silu(float x) {
  return x * reciprocal_approx(1.f + exp2_approx(-kLog2e * x));
}

// Sequences lie one behind another as rows of the same matrices: sequence b owns the rows
// b L .. (b + 1) L, or, if their lengths differ, cu_seqlens[b] .. cu_seqlens[b + 1].
struct Rows {
  int64_t first, count;
};
__device__ inline Rows rows_of(int64_t b, int64_t L, const int64_t* cu_seqlens) {
  if (!cu_seqlens) return {b * L, L};
  return {cu_seqlens[b], cu_seqlens[b + 1] - cu_seqlens[b]};
}

template <class A, class B>
__host__ __device__ constexpr auto ceil_div(A a, B b) {
  return (a + b - 1) / b;
}

// May rows that start at p and lie `stride` apart be read four numbers at a time?
template <class T>
bool aligned4(const T* p, int64_t stride) {
  return reinterpret_cast<uintptr_t>(p) % (4 * sizeof(T)) == 0 && stride % 4 == 0;
}

// --- kernels that start early (programmatic dependent launch) ---------------------------------
//
// They start while the kernel before them still runs, once all of its blocks have called
// launch_next(), which says nothing about its results.

__device__ inline void launch_next() {  // the next kernel may start where there is room
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}
__device__ inline void wait_for_previous() {  // until all that it wrote can be read
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

template <class... Parameters, class... Arguments>
void launch_early(void (*kernel)(Parameters...), dim3 blocks, int threads, int shared_bytes,
                  cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = 1;
  CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

// ==========================================================================================
// Causal convolution
// ==========================================================================================
//
//   out[t, d] = act(bias[d] + sum_k weight[d, k] x[t - (width - 1) + k, d]),   act = silu or none
//
// x before the sequence is `state` (batch, width - 1, d), oldest first, zero if absent.
// Afterwards state_out holds the last width - 1 of state and x together; it may be the same
// memory.

template <class T>
struct ConvArgs {
  int64_t batch = 1, L = 0, d = 0;
  int width = 4;                                   // 2 to 8
  const T* x = nullptr;                            // (batch L, d), rows x_stride apart
  const float *weight = nullptr, *bias = nullptr;  // (d, width); (d) or null
  const T* state = nullptr;                        // (batch, width - 1, d) or null
  T *out = nullptr, *state_out = nullptr;          // (batch L, d); (batch, width - 1, d) or null
  int64_t x_stride = 0, out_stride = 0;
  bool activate = true;
  const int* done = nullptr;            // step: (batch), where not 0 the state stays
  const int64_t* cu_seqlens = nullptr;  // (batch + 1); L is then the longest length
};

// The n inputs at position t of a sequence, t >= -(width - 1).
template <int n, class T>
__device__ inline Vector<T, n> conv_input(const ConvArgs<T>& a, int64_t b, const Rows& rows,
                                          int64_t t, int64_t d) {
  if (t >= 0) return load<n>(a.x + (rows.first + t) * a.x_stride + d, t < rows.count);
  return load<n>(a.state + (b * (a.width - 1) + a.width - 1 + t) * a.d + d, a.state != nullptr);
}

// One thread computes one output. Grid: all of batch L d in blocks of 256.
template <class T>
__global__ void causal_conv1d_naive_kernel(ConvArgs<T> a) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= a.batch * a.L * a.d) return;
  const int64_t d = i % a.d, t = i / a.d % a.L, b = i / a.d / a.L;
  const Rows rows = rows_of(b, a.L, a.cu_seqlens);
  if (t >= rows.count) return;
  float sum = a.bias ? a.bias[d] : 0.f;
  for (int k = 0; k < a.width; ++k) {
    const int64_t s = t - (a.width - 1) + k;
    float x_s = 0.f;
    if (s >= 0) {
      x_s = to_float(a.x[(rows.first + s) * a.x_stride + d]);
    } else if (a.state) {
      x_s = to_float(a.state[(b * (a.width - 1) + a.width - 1 + s) * a.d + d]);
    }
    sum += a.weight[d * a.width + k] * x_s;
  }
  a.out[(rows.first + t) * a.out_stride + d] = from_float<T>(a.activate ? silu(sum) : sum);
}

// Since the rung before: each input is read from memory once, not `width` times. A thread owns
// kVector neighbouring channels (4, or 1 where rows are not aligned) over kConvRows rows. It asks
// for all of them, and for the width - 1 rows before, at once, and then slides the window through
// registers.
//
// The lanes of a warp lie side by side, the warps of a block one after the other in time. Grid:
// sequences times pieces of kConvWarps kConvRows rows times blocks of 32 kVector channels, the
// channels innermost, so that blocks that run together read whole rows.
//
// kWidth is the width, or 8 for any width up to it: the missing oldest taps are zero.
constexpr int kConvWarps = 4, kConvRows = 8;

// Blocks on a multiprocessor at once, to hide each other's waits: so many registers a thread has.
template <class T, int kWidth>
constexpr int kConvBlocks = kWidth > 4 ? 1 : (sizeof(T) == 2 ? 8 : 6);

// weight[d .. d + kVector, :] and their biases.
template <int kVector, int kWidth, class T>
__device__ inline void load_taps(const ConvArgs<T>& a, int64_t d, float (&weight)[kVector][kWidth],
                                 float (&bias)[kVector]) {
  unpack(load<kVector>(a.bias + d, a.bias != nullptr), bias);
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    if constexpr (kWidth == 4 && kVector == 4) {
      unpack(load<kWidth>(a.weight + (d + i) * kWidth, true), weight[i]);
    } else {
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        const int tap = k - (kWidth - a.width);
        weight[i][k] = tap >= 0 ? a.weight[(d + i) * a.width + tap] : 0.f;
      }
    }
  }
}

// The last width - 1 of state and x together become the state.
template <int kVector, class T>
__device__ inline void replace_conv_state(const ConvArgs<T>& a, int64_t b, const Rows& rows,
                                          int64_t d) {
#pragma unroll 1  // few threads come here: it is not to cost the others registers
  for (int k = 0; k < a.width - 1; ++k)
    store(a.state_out + (b * (a.width - 1) + k) * a.d + d,
          conv_input<kVector>(a, b, rows, rows.count - (a.width - 1) + k, d));
}

// The first `count` rows of out from the inputs x, the window holding the width - 1 before them.
template <class T, int kVector, int kWidth, class Activation>
__device__ inline void convolve(const float (&weight)[kVector][kWidth],
                                const float (&bias)[kVector], float (&window)[kWidth][kVector],
                                const Vector<T, kVector> (&x)[kConvRows], int count, T* out,
                                int64_t out_stride, const Activation& act) {
#pragma unroll
  for (int r = 0; r < kConvRows; ++r) {
    unpack(x[r], window[kWidth - 1]);
    float sum[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      sum[i] = bias[i];
#pragma unroll
      for (int k = 0; k < kWidth; ++k) sum[i] = fmaf(weight[i][k], window[k][i], sum[i]);
      sum[i] = act(sum[i]);
#pragma unroll
      for (int k = 0; k + 1 < kWidth; ++k) window[k][i] = window[k + 1][i];
    }
    if (r < count) store(out + r * out_stride, pack<T>(sum));
  }
}

template <class T, int kWidth, int kVector>
__global__ void __launch_bounds__(32 * kConvWarps, kConvBlocks<T, kWidth>)
    causal_conv1d_fused_kernel(ConvArgs<T> a, unsigned blocks, unsigned pieces) {
  static_assert(kConvRows >= kWidth - 1, "what comes before a later piece lies in x alone");
  launch_next();
  wait_for_previous();
  const int64_t b = blockIdx.x / blocks / pieces, piece = blockIdx.x / blocks % pieces;
  const int64_t d = kVector * (blockIdx.x % blocks * 32 + threadIdx.x % 32);
  const int64_t begin = (piece * kConvWarps + threadIdx.x / 32) * kConvRows;
  const Rows rows = rows_of(b, a.L, a.cu_seqlens);
  if (d >= a.d || (begin >= rows.count && begin > 0)) return;

  const bool first = begin == 0, has_past = !first || a.state;
  const T* x = a.x + (rows.first + begin) * a.x_stride + d;
  const int64_t past_stride = first ? a.d : a.x_stride;
  const T* past =
      (first ? a.state + (b + 1) * (a.width - 1) * a.d + d : x) - (kWidth - 1) * past_stride;
  const int count = min(int64_t(kConvRows), rows.count - begin);
  Vector<T, kVector> before[kWidth - 1], arrived[kConvRows];
#pragma unroll
  for (int k = 0; k + 1 < kWidth; ++k)
    before[k] =
        load<kVector>(past + k * past_stride, has_past && (kWidth == 4 || k >= kWidth - a.width));
#pragma unroll
  for (int r = 0; r < kConvRows; ++r) arrived[r] = load<kVector>(x + r * a.x_stride, r < count);

  float weight[kVector][kWidth], bias[kVector], window[kWidth][kVector];
  load_taps(a, d, weight, bias);
  // By the thread that has just read it: no other touches these entries of the state.
  if (first && a.state_out) replace_conv_state<kVector>(a, b, rows, d);
#pragma unroll
  for (int k = 0; k + 1 < kWidth; ++k) unpack(before[k], window[k]);
  const auto finish = [&](const auto& act) {
    convolve(weight, bias, window, arrived, count, a.out + (rows.first + begin) * a.out_stride + d,
             a.out_stride, act);
  };
  a.activate ? finish([](float v) { return silu(v); }) : finish([](float v) { return v; });
}

// One token: x, out (batch, d); state_out (batch, width - 1, d) slides by one row, in
// place. One thread per channel, so that it alone reads and writes its column of the state.
template <class T>
__global__ void causal_conv1d_step_kernel(ConvArgs<T> a) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= a.batch * a.d) return;
  const int64_t d = i % a.d, b = i / a.d;
  if (a.done && a.done[b]) return;
  const T x_t = a.x[b * a.x_stride + d];
  const float* weight = a.weight + d * a.width;
  T* state = a.state_out + b * (a.width - 1) * a.d + d;
  float sum = a.bias ? a.bias[d] : 0.f;
  for (int k = 0; k + 1 < a.width; ++k) {
    sum += weight[k] * to_float(state[k * a.d]);
    state[k * a.d] = k + 2 < a.width ? state[(k + 1) * a.d] : x_t;
  }
  sum += weight[a.width - 1] * to_float(x_t);
  a.out[b * a.out_stride + d] = from_float<T>(a.activate ? silu(sum) : sum);
}

template <class T>
void causal_conv1d_naive(const ConvArgs<T>& a, cudaStream_t stream) {
  const int64_t outputs = a.batch * a.L * a.d;
  if (outputs == 0) return;
  causal_conv1d_naive_kernel<<<ceil_div(outputs, 256), 256, 0, stream>>>(a);
  CUDA_CHECK(cudaGetLastError());
}

template <class T>
void causal_conv1d(const ConvArgs<T>& a, cudaStream_t stream) {
  if (a.width < 2 || a.width > 8) fail("causal_conv1d: width: expected 2 to 8, found ", a.width);
  if (a.batch * a.d == 0) return;
  const bool aligned = aligned4(a.x, a.x_stride) && aligned4(a.out, a.out_stride) &&
                       aligned4(a.state, a.d) && aligned4(a.state_out, a.d) &&
                       aligned4(a.weight, 4) && aligned4(a.bias, 4);
  const int64_t blocks = ceil_div(a.d, (aligned ? 4 : 1) * 32);
  const int64_t pieces = std::max<int64_t>(1, ceil_div(a.L, kConvWarps * kConvRows));
  const auto kernel =
      a.width == 4
          ? (aligned ? causal_conv1d_fused_kernel<T, 4, 4> : causal_conv1d_fused_kernel<T, 4, 1>)
          : (aligned ? causal_conv1d_fused_kernel<T, 8, 4> : causal_conv1d_fused_kernel<T, 8, 1>);
  launch_early(kernel, unsigned(a.batch * pieces * blocks), 32 * kConvWarps, 0, stream, a,
               unsigned(blocks), unsigned(pieces));
}

template <class T>
void causal_conv1d_step(const ConvArgs<T>& a, cudaStream_t stream) {
  if (a.batch * a.d == 0) return;
  causal_conv1d_step_kernel<<<ceil_div(a.batch * a.d, 128), 128, 0, stream>>>(a);
  CUDA_CHECK(cudaGetLastError());
}

// ==========================================================================================
// Selective scan
// ==========================================================================================
//
//   delta_t = delta_ratio softplus(delta_raw_t + delta_bias)          bias and softplus optional
//   h_t     = exp(delta_t A) * h_{t-1} + (delta_t x_t) B_t            h_{-1} = h0, given or zero
//   y_t     = C_t . h_t + D x_t                                       D optional
//   out_t   = y_t * silu(z_t)                                         z optional

template <class T>
struct ScanArgs {
  int64_t batch = 1, L = 0, d_inner = 0, d_state = 0, n_groups = 1;
  const T *x = nullptr, *delta = nullptr;  // (batch L, d_inner)
  const float* A = nullptr;                // (d_inner, d_state)
  const T *B = nullptr, *C = nullptr;      // (batch L, n_groups d_state)
  const float* D = nullptr;                // (d_inner) or null
  const T* z = nullptr;                    // (batch L, d_inner) or null
  const float* delta_bias = nullptr;       // (d_inner) or null
  const float* h0 = nullptr;               // (batch, d_inner, d_state) or null
  T* out = nullptr;                        // (batch L, d_inner)
  float* hT = nullptr;                     // (batch, d_inner, d_state) or null; may be h0
  // (batch, ceil(L / kSaveEvery), d_inner, d_state) or null: h before rows 0, kSaveEvery, ..
  float* saved = nullptr;
  // Numbers from one row to the next.
  int64_t x_stride = 0, delta_stride = 0, B_stride = 0, C_stride = 0;
  int64_t z_stride = 0, out_stride = 0;
  bool delta_softplus = true;
  float delta_ratio = 1.f;
  const int* done = nullptr;            // step: (batch), where not 0 the state stays
  const int64_t* cu_seqlens = nullptr;  // (batch + 1); L is then the longest length
};

// delta_t of channel d.
template <class T>
__device__ inline float step_size(const ScanArgs<T>& a, int64_t t, int64_t d) {
  const float bias = a.delta_bias ? a.delta_bias[d] : 0.f;
  const float delta_t = to_float(a.delta[t * a.delta_stride + d]) + bias;
  return a.delta_ratio * (a.delta_softplus ? softplus(delta_t) : delta_t);
}

constexpr int64_t kMaxStates = 256;
constexpr int64_t kSaveEvery = 64;  // rows from one saved state to the next

// One thread owns one channel and walks time. Grid: all of batch d_inner in blocks of 128.
// The state lies in local memory because d_state is only known at run time.
template <class T>
__global__ void selective_scan_naive_kernel(ScanArgs<T> a) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, N = a.d_state;
  if (i >= a.batch * a.d_inner) return;
  const int64_t d = i % a.d_inner, b = i / a.d_inner;
  const int64_t group = d / (a.d_inner / a.n_groups);
  const Rows rows = rows_of(b, a.L, a.cu_seqlens);
  const float* A = a.A + d * N;

  float h[kMaxStates];
  for (int n = 0; n < N; ++n) h[n] = a.h0 ? a.h0[i * N + n] : 0.f;

  for (int64_t t = rows.first; t < rows.first + rows.count; ++t) {
    if (const int64_t past = t - rows.first; a.saved && past % kSaveEvery == 0) {
      const int64_t index = b * ceil_div(a.L, kSaveEvery) + past / kSaveEvery;
      for (int n = 0; n < N; ++n) a.saved[(index * a.d_inner + d) * N + n] = h[n];
    }
    const T* B_t = a.B + t * a.B_stride + group * N;
    const T* C_t = a.C + t * a.C_stride + group * N;
    const float x_t = to_float(a.x[t * a.x_stride + d]), delta_t = step_size(a, t, d);
    float y_t = a.D ? a.D[d] * x_t : 0.f;
    for (int n = 0; n < N; ++n) {
      h[n] = expf(delta_t * A[n]) * h[n] + delta_t * x_t * to_float(B_t[n]);
      y_t += to_float(C_t[n]) * h[n];
    }
    if (a.z) y_t *= silu(to_float(a.z[t * a.z_stride + d]));
    a.out[t * a.out_stride + d] = from_float<T>(y_t);
  }
  for (int n = 0; n < N && a.hT; ++n) a.hT[i * N + n] = h[n];
}

// Since the rung before: a channel's states are split over kLanes threads, kStates each, in
// registers; B and C are read once per block, not once per channel; and everything that is done
// once per (t, d) rather than once per (t, d, n) leaves the loop that walks time. A block takes
// `width` channels of one group of one sequence, and works on tiles of kSteps rows:
//
//   feeders    prepare tile i + 1: softplus, delta x, and B and C as floats
//   walkers    walk tile i, each with kStates states of one channel, and sum C_t . h_t over
//              the lanes of the channel
//   finishers  complete the outputs of tile i - 1: D x and the gate
//
// What passes between them lies in shared memory twice, for even and for odd tiles, so one barrier
// per tile orders all of it. Rows past the end get delta = 0 and B = 0: the state stands still.
// Missing states get A = B = C = 0.
//
// What it costs per (t, d, n): a walker issues 5 instructions (delta A, exp2, delta x B, two
// multiply-adds); it reads 8 bytes of B and C and 8 / kStates of delta and delta x from shared
// memory. More states per thread therefore mean less shared traffic, and fewer threads per channel.
// Grid: sequences (or their chunks) times groups times blocks of `width` channels.
//
// A multiprocessor deals a block's warps out to its four schedulers in turn. The walkers set the
// pace. Where their warps are no multiple of four, feeders and finishers keep to the schedulers
// that have one walker less, and the warps in between exit at once. They take registers
// nevertheless: this is done where the block then still has no more than kThreads threads, for
// which the kernel is compiled.
constexpr int kCopied = 4;  // neighbouring columns that a feeder or finisher handles

template <int kStates_, int kLanes_, int kChannels_, int kSteps_, int kServers_, int kDepth_,
          int kThreads_>
struct ScanTile {
  static constexpr int kStates = kStates_, kLanes = kLanes_, kSteps = kSteps_;
  static constexpr int kChannels = kChannels_;        // of a block, at most
  static constexpr int kServers = kServers_;          // feeders; and as many finishers
  static constexpr int kDepth = kDepth_;              // tiles that they ask for ahead
  static constexpr int kThreads = kThreads_;          // of a block, at most
  static constexpr int kN = kStates * kLanes;         // d_state, rounded up
  static constexpr int kPerWarp = 32 / kLanes;        // channels of a warp
  static constexpr int kGroup = kStates < 4 ? 4 : 2;  // steps read and discretized together
  static constexpr int kSum = 8;                      // steps summed over lanes together
  // The bits of a lane's number that choose its states; the others choose its channel. Lanes side
  // by side have the same states, every other two the same channel: shared memory serves them
  // together.
  static constexpr int kBitsOfStates = kLanes == 32 ? 31 : (32 - 2 * kPerWarp) | 2;
  static_assert(kServers % 32 == 0, "whole warps");
  static_assert(kThreads >= kChannels * kLanes + 2 * kServers, "room for all roles");
  static_assert(kStates % 2 == 0, "a walker reads B and C of two states at a time");
  static_assert(kSteps % kSum == 0 && kSum % (2 * kGroup) == 0, "groups of both parities");
  static_assert(kChannels % kCopied == 0 && kChannels % kPerWarp == 0, "whole warps");
  static_assert(kSaveEvery % kSteps == 0, "states are saved between tiles");
};

// A barrier for the threads of a block that have a role. It has a number, because they reach it in
// several branches, and __syncthreads() must be one and the same for all.
__device__ inline void sync_roles(int threads) { __barrier_sync_count(1, threads); }

// What one block works on: some rows of one sequence, some channels of one group.
struct ScanBlock {
  Rows rows;
  int sequence;  // index of the states: sequence, or chunk of one
  int group;
  int channel;     // the first
  int width;       // channels of a block
  int n_channels;  // how many of them exist
  int threads;     // that have a role
};

// Sequences cut into chunks of `length` rows; chunk k of sequence b has its states at b count + k.
struct Chunks {
  int64_t count = 1, length = 0;
  float* total = nullptr;  // (batch, count, d_inner): sum of delta_t over the chunk
};

template <class T>
__device__ inline ScanBlock scan_block(const ScanArgs<T>& a, const Chunks& chunks, int width,
                                       int threads) {
  const int channels = a.d_inner / a.n_groups, blocks = ceil_div(channels, width);
  const int first = blockIdx.x % blocks * width, groups = a.n_groups;
  const int group = blockIdx.x / blocks % groups, sequence = blockIdx.x / blocks / groups;
  Rows rows = rows_of(sequence / chunks.count, a.L, a.cu_seqlens);
  if (chunks.count > 1) {
    const int64_t skip = min(rows.count, sequence % chunks.count * chunks.length);
    rows = {rows.first + skip, min(chunks.length, rows.count - skip)};
  }
  return {rows,   sequence, group, group * channels + first, width, min(channels - first, width),
          threads};
}

// Feeders and finishers ask for their numbers kDepth tiles ahead, by asynchronous copies into a
// ring of tiles in shared memory (registers that wait for memory cannot be passed on in a ring).
// A thread copies kCopied columns of every stride-th row of two matrices, and reads only what it
// has copied itself, so that no barrier is needed.
template <class T, class Tile, int kColumns>
struct Ring {
  // Rows of one thread in a tile, at most, for any width up to kColumns.
  static constexpr int most_rows() {
    int most = 0;
    for (int threads = 1; threads <= kColumns / kCopied; ++threads) {
      const int rows = ceil_div(Tile::kSteps, Tile::kServers / threads);
      most = rows > most ? rows : most;
    }
    return most;
  }
  static constexpr int kRows = most_rows();
  using Copies = Vector<T, kCopied>[2][Tile::kDepth][kRows][Tile::kServers];
  struct Matrix {
    const T* at;  // the block's first column in the sequence's first row
    int64_t stride;
    bool wanted = true;  // zeros if not
  };

  Copies& copies;
  Matrix matrix[2];  // from this thread's first number in the tile that is asked for next
  int me, length, column, first, stride;
  bool exists;

  // For thread `me`, where so many threads share a row, of which n_columns exist.
  __device__ Ring(Copies& copies, int me, int threads, int n_columns, int length, Matrix one,
                  Matrix two)
      : copies(copies), matrix{one, two}, me(me), length(length) {
    column = me % threads * kCopied, first = me / threads, stride = Tile::kServers / threads;
    exists = column < n_columns;
#pragma unroll
    for (Matrix& m : matrix) m.at += first * m.stride + column;
  }
  // f(r, t, inside): this thread's r-th row of tile i is row t of the tile; is it in the sequence?
  template <class Function>
  __device__ void each_row(int i, const Function& f) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int t = first + r * stride;
      if (first >= stride || t >= Tile::kSteps) break;
      f(r, t, exists && i * Tile::kSteps + t < length);
    }
  }
  // Asks for tile i, the one after that of the last call; past the end for zeros.
  __device__ void fetch(int i) {
    each_row(i, [&](int r, int, bool inside) {
#pragma unroll
      for (int k = 0; k < 2; ++k)
        copy_async(&copies[k][i % Tile::kDepth][r][me],
                   matrix[k].at + int64_t(r * stride) * matrix[k].stride,
                   inside && matrix[k].wanted);
    });
#pragma unroll
    for (Matrix& m : matrix) m.at += Tile::kSteps * m.stride;
  }
  // What has arrived of row r of tile i.
  __device__ void read(int i, int r, float (&one)[kCopied], float (&two)[kCopied]) const {
    unpack(copies[0][i % Tile::kDepth][r][me], one);
    unpack(copies[1][i % Tile::kDepth][r][me], two);
  }
};

// Shared memory of a block. Two of everything that passes between roles: of even and odd tiles.
template <class T, class Tile>
struct ScanMemory {
  // From row to row of y: spaced so that neither walkers nor finishers have bank conflicts.
  static constexpr int kUnit = Tile::kPerWarp < 4 ? 4 : Tile::kPerWarp;
  static constexpr int kRow =
      Tile::kChannels / kUnit % 2 ? Tile::kChannels : Tile::kChannels + kUnit;
  using RingD = Ring<T, Tile, Tile::kChannels>;
  using RingN = Ring<T, Tile, Tile::kN>;

  alignas(32) float2 input[2][Tile::kSteps][Tile::kChannels];  // {delta_t, delta_t x_t}
  alignas(32) float2 BC[2][Tile::kSteps][Tile::kN];            // {B_t, C_t}
  alignas(32) float y[2][Tile::kSteps][kRow];                  // C_t . h_t
  typename RingD::Copies x_delta;                              // the feeders'
  typename RingN::Copies B_C;
  typename RingD::Copies x_z;  // the finishers'
};

// --- walkers ----------------------------------------------------------------------------------

template <int kBits>  // the chosen bits of a lane's number, as a number
__device__ inline int lane_bits(int lane) {
  int number = 0, count = 0;
#pragma unroll
  for (int b = 0; b < 5; ++b)
    if (kBits >> b & 1) number |= (lane >> b & 1) << count++;
  return number;
}

// Sums each y[k] over the lanes of a channel. While several sums are left, half of the lanes go on
// with one half of them and half with the other. So a lane ends with the sums of only some steps,
// from the one that is returned on: one exchange a step instead of log2(kLanes).
template <class Tile, int kBit = 16, int kCount = Tile::kSum>
__device__ inline int sum_over_lanes(float (&y)[Tile::kSum], int lane) {
  if constexpr (kBit == 0) {
    return 0;
  } else if constexpr ((Tile::kBitsOfStates & kBit) == 0) {
    return sum_over_lanes<Tile, kBit / 2, kCount>(y, lane);
  } else if constexpr (kCount == 1) {
    y[0] += __shfl_xor_sync(~0u, y[0], kBit);
    return sum_over_lanes<Tile, kBit / 2, 1>(y, lane);
  } else {
    constexpr int kHalf = kCount / 2;
    const bool upper = lane & kBit;
#pragma unroll
    for (int k = 0; k < kHalf; ++k) {
      // Numbers, not places: a choice between places would keep y out of registers.
      const float low = y[k], high = y[k + kHalf];
      y[k] = (upper ? high : low) + __shfl_xor_sync(~0u, upper ? low : high, kBit);
    }
    return (upper ? kHalf : 0) + sum_over_lanes<Tile, kBit / 2, kHalf>(y, lane);
  }
}

// kStates states of channel c of the block, from state s on.
template <class T, class Tile>
struct Walker {
  static constexpr int kStates = Tile::kStates, kGroup = Tile::kGroup, kSum = Tile::kSum;
  struct Operands {  // of one step, as they lie in shared memory
    float delta, delta_x, B[kStates], C[kStates];
  };
  struct Discrete {  // of one step, as the recurrence takes them
    float A_bar[kStates], B_bar_x[kStates], C[kStates];
  };

  ScanMemory<T, Tile>& memory;
  const int lane = threadIdx.x % 32;
  const int s = lane_bits<Tile::kBitsOfStates>(lane) * kStates;
  const int c = threadIdx.x / 32 * Tile::kPerWarp + lane_bits<31 - Tile::kBitsOfStates>(lane);
  float A[kStates], h[kStates];  // A log2(e), so that exp(delta A) is one multiply and one exp2

  __device__ Walker(ScanMemory<T, Tile>& memory, const ScanArgs<T>& a, const ScanBlock& block)
      : memory(memory) {
    const int64_t d = block.channel + c, state = (block.sequence * a.d_inner + d) * a.d_state;
#pragma unroll
    for (int p = 0; p < kStates; ++p) {
      const bool exists = c < block.n_channels && s + p < a.d_state;
      A[p] = exists ? kLog2e * a.A[d * a.d_state + s + p] : 0.f;
      h[p] = exists && a.h0 ? a.h0[state + s + p] : 0.f;
    }
  }
  // Into states (.., d_inner, d_state), at `index`.
  __device__ void store_state(const ScanArgs<T>& a, const ScanBlock& block, float* states,
                              int64_t index) const {
    states += (index * a.d_inner + block.channel + c) * a.d_state + s;
#pragma unroll
    for (int p = 0; p < kStates; ++p)
      if (c < block.n_channels && s + p < a.d_state) states[p] = h[p];
  }

  __device__ void read(int parity, int t, Operands (&o)[kGroup]) const {
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      const float2 input = memory.input[parity][t + k][c];
      o[k].delta = input.x, o[k].delta_x = input.y;
#pragma unroll
      for (int p = 0; p < kStates; p += 2) {
        const float4 two = *reinterpret_cast<const float4*>(&memory.BC[parity][t + k][s + p]);
        o[k].B[p] = two.x, o[k].C[p] = two.y, o[k].B[p + 1] = two.z, o[k].C[p + 1] = two.w;
      }
    }
  }
  __device__ void discretize(const Operands (&o)[kGroup], Discrete (&to)[kGroup]) const {
#pragma unroll
    for (int k = 0; k < kGroup; ++k)
#pragma unroll
      for (int p = 0; p < kStates; ++p) {
        to[k].A_bar[p] = exp2_approx(o[k].delta * A[p]);
        to[k].B_bar_x[p] = o[k].delta_x * o[k].B[p];
        to[k].C[p] = o[k].C[p];
      }
  }
  // h_t = A_bar h_{t-1} + B_bar x_t; returns these states' part of C_t . h_t.
  __device__ float step(const Discrete& now) {
    float y = 0.f;
#pragma unroll
    for (int p = 0; p < kStates; ++p) {
      h[p] = fmaf(now.A_bar[p], h[p], now.B_bar_x[p]);
      y = fmaf(now.C[p], h[p], y);
    }
    return y;
  }

  // A pipeline over groups of kGroup steps: while group g is walked, the powers of group g + 1 are
  // computed, and what group g + 2 needs is on its way from shared memory. Otherwise every step
  // would wait for both.
  __device__ void walk_tile(int parity) {
    constexpr int kSums = kSum / (Tile::kLanes < kSum ? Tile::kLanes : kSum);  // a lane ends with
    Operands operands[2][kGroup];  // of even and of odd groups
    Discrete discrete[2][kGroup];
    read(parity, 0, operands[0]);
    read(parity, kGroup, operands[1]);
    discretize(operands[0], discrete[0]);
#pragma unroll
    for (int t = 0; t < Tile::kSteps; t += kSum) {
      float y[kSum];
#pragma unroll
      for (int k = 0; k < kSum; k += kGroup) {
        const int even = k / kGroup % 2;
        // The last two groups of a tile have none to read ahead, and read the first again.
        read(parity, (t + k + 2 * kGroup) % Tile::kSteps, operands[even]);
        discretize(operands[1 - even], discrete[1 - even]);
#pragma unroll
        for (int j = 0; j < kGroup; ++j) y[k + j] = step(discrete[even][j]);
      }
      const int first = t + sum_over_lanes<Tile>(y, lane);
#pragma unroll
      for (int k = 0; k < kSums; ++k) memory.y[parity][first + k][c] = y[k];
    }
  }
};

template <class T, class Tile>
__device__ inline void walk_tiles(const ScanArgs<T>& a, const Chunks& chunks,
                                  const ScanBlock& block, ScanMemory<T, Tile>& memory) {
  Walker<T, Tile> walker(memory, a, block);
  const int tiles = ceil_div(block.rows.count, Tile::kSteps);
  constexpr int kTiles = kSaveEvery / Tile::kSteps;  // from one saved state to the next
  for (int first = 0; first < tiles; first += kTiles) {
    if (a.saved)
      walker.store_state(a, block, a.saved,
                         block.sequence * ceil_div(a.L, kSaveEvery) + first / kTiles);
    for (int i = first; i < min(first + kTiles, tiles); ++i) {
      // Feeders wrote input and BC of tile i, finishers have read y of tile i - 2.
      sync_roles(block.threads);
      walker.walk_tile(i & 1);
    }
  }
  sync_roles(block.threads);                    // y of the last tile is written
  if (chunks.total) sync_roles(block.threads);  // (the feeders' sums, see add_up_delta)
  if (a.hT) walker.store_state(a, block, a.hT, block.sequence);
}

// --- feeders ----------------------------------------------------------------------------------

// {delta_t, delta_t x_t} of tile i; adds delta_t to `total`.
template <class T, class Tile, class Ring>
__device__ inline void prepare_input(const ScanArgs<T>& a, ScanMemory<T, Tile>& memory,
                                     const Ring& ring, int i, const float (&bias)[kCopied],
                                     float (&total)[kCopied]) {
  ring.each_row(i, [&](int r, int t, bool inside) {
    float x_t[kCopied], delta_t[kCopied], input[2 * kCopied];
    ring.read(i, r, x_t, delta_t);
#pragma unroll
    for (int k = 0; k < kCopied; ++k) delta_t[k] += bias[k];
    if (a.delta_softplus) {
#pragma unroll
      for (int k = 0; k < kCopied; ++k) delta_t[k] = softplus(delta_t[k]);
    }
    const float ratio = inside ? a.delta_ratio : 0.f;
#pragma unroll
    for (int k = 0; k < kCopied; ++k) {
      input[2 * k] = delta_t[k] * ratio;
      input[2 * k + 1] = input[2 * k] * x_t[k];
      total[k] += input[2 * k];
    }
    store(&memory.input[i & 1][t][ring.column].x, pack<float>(input));
  });
}

// {B_t, C_t} of tile i.
template <class T, class Tile, class Ring>
__device__ inline void prepare_BC(ScanMemory<T, Tile>& memory, const Ring& ring, int i) {
  ring.each_row(i, [&](int r, int t, bool) {
    float B_t[kCopied], C_t[kCopied], pairs[2 * kCopied];
    ring.read(i, r, B_t, C_t);
#pragma unroll
    for (int k = 0; k < kCopied; ++k) pairs[2 * k] = B_t[k], pairs[2 * k + 1] = C_t[k];
    store(&memory.BC[i & 1][t][ring.column].x, pack<float>(pairs));
  });
}

// The sum of delta_t over all rows, from each feeder's `total` over its own rows, to sums[column].
template <class T, class Tile, class Ring>
__device__ inline void add_up_delta(const ScanBlock& block, ScanMemory<T, Tile>& memory,
                                    const Ring& ring, float (&total)[kCopied], float* sums) {
  const int parts = min(ring.stride, Tile::kSteps);
  if (ring.first < parts) {
#pragma unroll
    for (int k = 0; k < kCopied; ++k) memory.input[0][ring.first][ring.column + k].x = total[k];
  }
  sync_roles(block.threads);  // parts are written before they are added
  if (ring.first != 0 || !ring.exists) return;
  for (int r = 1; r < parts; ++r) {
#pragma unroll
    for (int k = 0; k < kCopied; ++k) total[k] += memory.input[0][r][ring.column + k].x;
  }
#pragma unroll
  for (int k = 0; k < kCopied; ++k) sums[ring.column + k] = total[k];
}

template <class T, class Tile>
__device__ inline void feed_tiles(const ScanArgs<T>& a, const Chunks& chunks,
                                  const ScanBlock& block, ScanMemory<T, Tile>& memory, int me) {
  using Memory = ScanMemory<T, Tile>;
  const int length = block.rows.count, tiles = ceil_div(length, Tile::kSteps);
  const int64_t row = block.rows.first, d = block.channel, n = block.group * a.d_state;
  typename Memory::RingD x_delta(memory.x_delta, me, block.width / kCopied, block.n_channels,
                                 length, {a.x + row * a.x_stride + d, a.x_stride},
                                 {a.delta + row * a.delta_stride + d, a.delta_stride});
  typename Memory::RingN B_C(memory.B_C, Tile::kServers - 1 - me,  // from the other end
                             Tile::kN / kCopied, a.d_state, length,
                             {a.B + row * a.B_stride + n, a.B_stride},
                             {a.C + row * a.C_stride + n, a.C_stride});
  float bias[kCopied], total[kCopied] = {};
#pragma unroll
  for (int k = 0; k < kCopied; ++k)
    bias[k] = a.delta_bias && x_delta.exists ? a.delta_bias[d + x_delta.column + k] : 0.f;

  const auto fetch = [&](int i) { x_delta.fetch(i), B_C.fetch(i), copy_async_commit(); };
  for (int i = 0; i < Tile::kDepth; ++i) fetch(i);
  for (int i = 0; i < tiles; ++i) {
    copy_async_wait_but<Tile::kDepth - 1>();
    prepare_input(a, memory, x_delta, i, bias, total);
    prepare_BC(memory, B_C, i);
    fetch(i + Tile::kDepth);    // in the place of tile i
    sync_roles(block.threads);  // walkers have read input and BC of tile i - 1
  }
  sync_roles(block.threads);
  if (chunks.total)
    add_up_delta(block, memory, x_delta, total, chunks.total + block.sequence * a.d_inner + d);
}

// --- finishers --------------------------------------------------------------------------------

template <class T, class Tile>
__device__ inline void finish_tiles(const ScanArgs<T>& a, const Chunks& chunks,
                                    const ScanBlock& block, ScanMemory<T, Tile>& memory, int me) {
  const int length = block.rows.count, tiles = ceil_div(length, Tile::kSteps);
  const int64_t row = block.rows.first, d = block.channel;
  typename ScanMemory<T, Tile>::RingD x_z(memory.x_z, me, block.width / kCopied, block.n_channels,
                                          length,
                                          {a.x + row * a.x_stride + d, a.x_stride, a.out && a.D},
                                          {a.z + row * a.z_stride + d, a.z_stride, a.out && a.z});
  T* out = a.out + (row + x_z.first) * a.out_stride + d + x_z.column;
  float D[kCopied];
#pragma unroll
  for (int k = 0; k < kCopied; ++k) D[k] = a.D && x_z.exists ? a.D[d + x_z.column + k] : 0.f;

  const auto finish = [&](int i) {
    x_z.each_row(i, [&](int r, int t, bool inside) {
      float x_t[kCopied], z_t[kCopied], y_t[kCopied];
      x_z.read(i, r, x_t, z_t);
      unpack(load<kCopied>(&memory.y[i & 1][t][x_z.column], true), y_t);
#pragma unroll
      for (int k = 0; k < kCopied; ++k) y_t[k] = fmaf(D[k], x_t[k], y_t[k]);
      if (a.z) {
#pragma unroll
        for (int k = 0; k < kCopied; ++k) y_t[k] *= silu(z_t[k]);
      }
      if (inside) store(out + r * x_z.stride * a.out_stride, pack<T>(y_t));
    });
    out += Tile::kSteps * a.out_stride;
  };
  const auto fetch = [&](int i) { x_z.fetch(i), copy_async_commit(); };
  for (int i = 0; i < Tile::kDepth; ++i) fetch(i);
  sync_roles(block.threads);
  for (int i = 0; i < tiles; ++i) {
    sync_roles(block.threads);  // walkers wrote y of tile i
    copy_async_wait_but<Tile::kDepth - 1>();
    if (a.out) finish(i);
    fetch(i + Tile::kDepth);
  }
  if (chunks.total) sync_roles(block.threads);
}

template <class T, class Tile, int kBlocksPerSM>
__global__ void __launch_bounds__(Tile::kThreads, kBlocksPerSM)
    selective_scan_fused_kernel(ScanArgs<T> a, Chunks chunks, int width, int first_server) {
  extern __shared__ __align__(32) unsigned char shared_memory[];
  auto& memory = *reinterpret_cast<ScanMemory<T, Tile>*>(shared_memory);
  const int walkers = width * Tile::kLanes, warp = threadIdx.x / 32;
  const ScanBlock block = scan_block(a, chunks, width, walkers + 2 * Tile::kServers);
  int me = threadIdx.x - walkers;
  if (me >= 0) {  // not a walker: the number among feeders and finishers
    if (warp % 4 < first_server) return;
    for (int w = walkers / 32; w < warp; ++w) me -= w % 4 < first_server ? 32 : 0;
  }
  // All roles pass the same number of barriers: one per tile, and one more (two, where delta is
  // summed).
  if (me < 0) {
    walk_tiles(a, chunks, block, memory);
  } else if (me < Tile::kServers) {
    feed_tiles(a, chunks, block, memory, me);
  } else {
    finish_tiles(a, chunks, block, memory, me - Tile::kServers);
  }
}

// For long sequences with few channels: the sequence itself is split. (1) The fused kernel
// runs over every chunk from a zero state and leaves its last state in `states` and the sum
// of its delta in `total`: over a whole chunk the decay is exp(A sum delta_t). (2) This
// kernel walks over the chunks, one thread per (b, d, n), and replaces each chunk's last
// state by the state in which it starts. (3) The fused kernel runs again from there. Twice
// the exps, for `count` times the parallelism.
template <class T>
__global__ void selective_scan_chunk_start_kernel(ScanArgs<T> a, Chunks chunks, float* states) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t per_sequence = a.d_inner * a.d_state;
  if (i >= a.batch * per_sequence) return;
  const int64_t dn = i % per_sequence, d = dn / a.d_state, b = i / per_sequence;
  const float A = kLog2e * a.A[dn];
  float h = a.h0 ? a.h0[i] : 0.f;
  for (int64_t k = b * chunks.count; k < (b + 1) * chunks.count; ++k) {
    const float last = states[k * per_sequence + dn];
    states[k * per_sequence + dn] = h;
    h = fmaf(exp2_approx(A * chunks.total[k * a.d_inner + d]), h, last);
  }
  if (a.hT) a.hT[i] = h;
}

// One token: x, delta, z, out (batch, d_inner), hT (batch, d_inner, d_state) advanced in
// place. Four lanes share a channel and take kVector (4, or 1 if not aligned) neighbouring
// states each, so a warp reads and writes whole lines of h, which is nearly all the
// traffic. Grid: batch d_inner channels in blocks of 32.
constexpr int kStepLanes = 4, kStepThreads = 128;

template <class T, int kVector>
__global__ void __launch_bounds__(kStepThreads) selective_scan_step_kernel(ScanArgs<T> a) {
  const int64_t i = (int64_t(blockIdx.x) * kStepThreads + threadIdx.x) / kStepLanes;
  const int lane = threadIdx.x % kStepLanes, N = a.d_state;
  if (i >= a.batch * a.d_inner) return;  // all lanes of a channel together
  const int64_t d = i % a.d_inner, b = i / a.d_inner;
  if (a.done && a.done[b]) return;
  const int64_t group = d / (a.d_inner / a.n_groups);
  const T* B = a.B + b * a.B_stride + group * N;
  const T* C = a.C + b * a.C_stride + group * N;
  const float* A = a.A + d * N;
  float* h = a.hT + i * N;
  const float x = to_float(a.x[b * a.x_stride + d]), delta = step_size(a, b, d);
  float y = 0.f;
  for (int n = kVector * lane; n < N; n += kVector * kStepLanes) {
    float A_n[kVector], B_n[kVector], C_n[kVector], h_n[kVector];
    unpack(load<kVector>(A + n, true), A_n);
    unpack(load<kVector>(B + n, true), B_n);
    unpack(load<kVector>(C + n, true), C_n);
    unpack(load<kVector>(h + n, true), h_n);
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      h_n[k] = fmaf(exp2_approx(delta * (kLog2e * A_n[k])), h_n[k], delta * x * B_n[k]);
      y = fmaf(C_n[k], h_n[k], y);
    }
    store(h + n, pack<float>(h_n));
  }
  const unsigned lanes = 0xfu << (threadIdx.x % 32 / kStepLanes * kStepLanes);
  y += __shfl_xor_sync(lanes, y, 1);
  y += __shfl_xor_sync(lanes, y, 2);
  if (lane != 0) return;
  if (a.D) y = fmaf(a.D[d], x, y);
  if (a.z) y *= silu(to_float(a.z[b * a.z_stride + d]));
  a.out[b * a.out_stride + d] = from_float<T>(y);
}

// --- launchers ------------------------------------------------------------------------------

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  CUDA_CHECK(cudaGetDevice(&device));
  CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}
inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }
inline int shared_bytes() {  // that a block can have
  return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

template <class T>
void selective_scan_naive(const ScanArgs<T>& a, cudaStream_t stream) {
  if (a.batch * a.d_inner == 0) return;
  selective_scan_naive_kernel<<<ceil_div(a.batch * a.d_inner, 128), 128, 0, stream>>>(a);
  CUDA_CHECK(cudaGetLastError());
}

// May four neighbouring channels, and four neighbouring states of B and C, be read at once?
template <class T>
bool reads_four(const ScanArgs<T>& a) {
  return aligned4(a.x, a.x_stride) && aligned4(a.delta, a.delta_stride) &&
         aligned4(a.z, a.z_stride) && aligned4(a.out, a.out_stride) && aligned4(a.B, a.B_stride) &&
         aligned4(a.C, a.C_stride) && a.d_inner / a.n_groups % 4 == 0 && a.d_state % 4 == 0;
}

// Warps of a block whose feeders and finishers keep to the schedulers first_server .. 3.
template <class Tile>
int scan_warps(int walkers, int first_server) {
  int all = walkers;
  for (int left = 2 * Tile::kServers / 32; left > 0; ++all) left -= all % 4 >= first_server;
  return all;
}

template <class Tile, int kBlocksPerSM, class T>
void launch_fused(const ScanArgs<T>& a, const Chunks& chunks, int width, cudaStream_t stream) {
  const int64_t blocks =
      a.batch * chunks.count * a.n_groups * ceil_div(a.d_inner / a.n_groups, width);
  const int walkers = width * Tile::kLanes / 32;  // warps
  int first_server = walkers % 4;  // schedulers from this one on have one walker less
  if (32 * scan_warps<Tile>(walkers, first_server) > Tile::kThreads) first_server = 0;
  const auto kernel = selective_scan_fused_kernel<T, Tile, kBlocksPerSM>;
  constexpr int bytes = sizeof(ScanMemory<T, Tile>);
  CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  const int threads = 32 * scan_warps<Tile>(walkers, first_server);
  kernel<<<blocks, threads, bytes, stream>>>(a, chunks, width, first_server);
  CUDA_CHECK(cudaGetLastError());
}

// Into how many chunks `selective_scan` cuts each sequence: 1 unless the channels leave part of the
// GPU idle, and the sequence is so long that two passes by all of it win. Measured on an H100, a
// row costs 18 ns in one pass, 200 ns in both passes over a chunk, and splitting costs 22 us.
template <class T>
int64_t scan_chunks(const ScanArgs<T>& a) {
  if (a.saved || a.batch * ceil_div(a.d_inner, 16) >= multiprocessors()) return 1;
  const int64_t room = 2 * multiprocessors() / (a.batch * ceil_div(a.d_inner, 64));
  const int64_t count = std::max<int64_t>(1, std::min(room, a.L / 128));
  return 18 * a.L > 200 * a.L / count + 22000 ? count : 1;
}

template <class Tile, class T>
void launch_scan(const ScanArgs<T>& a, float* workspace, cudaStream_t stream) {
  const auto launch = [&](const ScanArgs<T>& pass, const Chunks& chunks) {
    launch_fused<Tile, 2>(pass, chunks, Tile::kChannels, stream);
  };
  const int64_t count = scan_chunks(a), states = a.batch * a.d_inner * a.d_state;
  if (count == 1) return launch(a, Chunks{});
  const Chunks chunks{count, ceil_div(a.L, count), workspace + count * states};
  ScanArgs<T> pass = a;
  pass.h0 = nullptr, pass.hT = workspace, pass.out = nullptr;
  launch(pass, chunks);
  selective_scan_chunk_start_kernel<<<ceil_div(states, 128), 128, 0, stream>>>(a, chunks,
                                                                               workspace);
  CUDA_CHECK(cudaGetLastError());
  pass.h0 = workspace, pass.hT = nullptr, pass.out = a.out;
  launch(pass, Chunks{count, chunks.length, nullptr});
}

// Bytes of workspace that `selective_scan` needs: 0 unless it cuts the sequence.
template <class T>
size_t selective_scan_workspace(const ScanArgs<T>& a) {
  if (a.batch * a.d_inner == 0) return 0;
  const int64_t count = scan_chunks(a);
  return count == 1 ? 0 : sizeof(float) * count * a.batch * a.d_inner * (a.d_state + 1);
}

// For d_state <= 16. Few channels: one block an SM, as wide as its share of them; the fewer they
// are, the fewer states per thread and the longer tiles. Many: many states per thread, two blocks
// an SM.
using NarrowScan = ScanTile<2, 8, 32, 64, 96, 3, 768>;
using WideScan = ScanTile<4, 4, 96, 32, 192, 2, 768>;
using ManyScan = ScanTile<8, 2, 64, 16, 64, 2, 256>;

// Launches blocks as narrow as can be while each multiprocessor gets the same few of them, at most
// `most`. False, and nothing is done, if Tile has not so many channels, or the GPU not its memory.
template <class Tile, class T>
bool launch_spread(const ScanArgs<T>& a, int64_t most, cudaStream_t stream) {
  if (int(sizeof(ScanMemory<T, Tile>)) > shared_bytes()) return false;
  const int64_t channels = a.d_inner / a.n_groups, SMs = multiprocessors();
  for (int64_t each = 1; each <= most; ++each)
    for (int width = Tile::kPerWarp; width <= Tile::kChannels; width += Tile::kPerWarp)
      if (a.batch * a.n_groups * ceil_div(channels, width) <= each * SMs)
        return launch_fused<Tile, 1>(a, Chunks{}, width, stream), true;
  return false;
}

template <class T>
void selective_scan(const ScanArgs<T>& a, float* workspace, cudaStream_t stream) {
  const int64_t N = a.d_state;
  if (N < 1 || N > kMaxStates)
    fail("selective_scan: d_state: expected 1 to ", kMaxStates, ", found ", N);
  if (a.d_inner % a.n_groups != 0)
    fail("selective_scan: d_inner: expected a multiple of n_groups ", a.n_groups, ", found ",
         a.d_inner);
  if (a.batch * a.d_inner == 0) return;
  if (!reads_four(a)) return selective_scan_naive(a, stream);
  if (N > 64) return launch_scan<ScanTile<8, 32, 4, 8, 64, 4, 256>>(a, workspace, stream);
  if (N > 16) return launch_scan<ScanTile<4, 16, 8, 32, 64, 2, 256>>(a, workspace, stream);
  if (scan_chunks(a) == 1 && a.batch * a.d_inner < 4 * 64 * multiprocessors()) {
    if (launch_spread<NarrowScan>(a, 1, stream)) return;
    if (launch_spread<WideScan>(a, INT64_MAX, stream)) return;
  }
  launch_scan<ManyScan>(a, workspace, stream);
}

template <class T>
void selective_scan_step(const ScanArgs<T>& a, cudaStream_t stream) {
  if (a.batch * a.d_inner == 0) return;
  const bool aligned = aligned4(a.A, a.d_state) && aligned4(a.hT, a.d_state) &&
                       aligned4(a.B, a.B_stride) && aligned4(a.C, a.C_stride);
  const int64_t blocks = ceil_div(a.batch * a.d_inner * kStepLanes, kStepThreads);
  const auto kernel = aligned ? selective_scan_step_kernel<T, 4> : selective_scan_step_kernel<T, 1>;
  kernel<<<blocks, kStepThreads, 0, stream>>>(a);
  CUDA_CHECK(cudaGetLastError());
}

// ---------------------------------------------------------------------------------------
// ssd: Mamba-2's operator ("Transformers are SSMs", section 5), one decay per head and step
//
//   delta_t = clamp(softplus(dt_t + dt_bias), dt_min, dt_max)
//   h_t     = exp(delta_t A) h_{t-1} + delta_t x_t B_t^T          h is (P, N), h_{-1} = h0 or 0
//   y_t     = h_t C_t + D x_t
//
// The same in matrix form for a chunk of Q steps that starts from the state h, with
// a(s, t) = exp(sum of delta A over s+1..t) and 0 <= a <= 1, so that nothing is ever divided:
//
//   Y  = a(-1, t) (C h^T)  +  M X          M[t,s] = a(s, t) delta_s (C_t . B_s) for s <= t
//   h' = a(-1, Q-1) h      +  X^T diag(a(s, Q-1) delta_s) B
//
// kernel                idea                                         parallel over
// ssd_naive_kernel      the recurrence as written                    batch, head, p
// ssd_fused_kernel      the matrix form on tensor cores              batch, 64-128 rows (head, p)
// ssd_warpgroup_kernel  the same on Hopper's asynchronous ones       batch, 192 rows (head, p)
// ssd_step_kernel       one step: read h, write h                    batch, head
//
// Either fused kernel can cut a sequence into segments: first the states at their ends, then,
// each segment from the state before it, the outputs (ssd_split). float32 takes the naive one.
// ---------------------------------------------------------------------------------------

// A batch of sequences, time-major. A row (one token) of x holds heads * head_dim values, of B
// and C n_groups * d_state, of dt heads; rows are *_stride elements apart, so each may be a window
// of a wider row (the convolution's output is [x | B | C]). Head i uses group i / (heads / groups).
template <class T>
struct SsdArgs {
  int64_t batch = 0, L = 0;
  int n_heads = 0, head_dim = 0, d_state = 0, n_groups = 1;
  const T* x = nullptr;   // (batch, L, heads, head_dim)
  const T* dt = nullptr;  // (batch, L, heads), raw
  const T* B = nullptr;   // (batch, L, groups, d_state)
  const T* C = nullptr;   // (batch, L, groups, d_state)
  int64_t x_stride = 0, dt_stride = 0, B_stride = 0, C_stride = 0, out_stride = 0;
  const float* A = nullptr;        // (heads)
  const float* D = nullptr;        // (heads) or null
  const float* dt_bias = nullptr;  // (heads) or null
  float dt_min = 0, dt_max = INFINITY, delta_ratio = 1;
  const float* h0 = nullptr;  // (batch, heads, head_dim, d_state) or null: zero
  float* hT = nullptr;        // the same shape or null; may be h0
  T* out = nullptr;           // (batch, L, heads, head_dim)
  // Sequences of different lengths, end to end without padding: sequence b is the tokens
  // cu_seqlens[b] .. cu_seqlens[b + 1] of one long batch, none longer than L. Null: all have L.
  const int64_t* cu_seqlens = nullptr;  // (batch + 1)
  const int* done = nullptr;            // step: (batch), where not 0 the state stays
  void* workspace = nullptr;            // ssd_workspace_bytes(a) bytes, if that is not 0
};

// delta of a head: softplus(dt + dt_bias), clamped.
template <class T>
__device__ inline float ssd_delta(const SsdArgs<T>& a, float v) {
  return a.delta_ratio * fminf(fmaxf(softplus(v), a.dt_min), a.dt_max);
}

// --- naive: the recurrence as written. One warp per (batch, head, p) walks time; lane i keeps
// states i, i + 32, ... of h[p,:] in registers and the lanes add up h_t . C_t.

constexpr int kSsdNaiveStates = 8;  // registers per lane: d_state <= 256

template <class T>
__global__ void __launch_bounds__(128) ssd_naive_kernel(SsdArgs<T> a) {
  const int lane = threadIdx.x % 32;
  const int64_t row = blockIdx.x * int64_t{4} + threadIdx.x / 32;  // (b, head, p)
  if (row >= a.batch * a.n_heads * a.head_dim) return;
  const int64_t channel = row % (a.n_heads * a.head_dim);
  const int head = channel / a.head_dim, N = a.d_state;
  const int64_t group = head / (a.n_heads / a.n_groups);
  const Rows rows = rows_of(row / (a.n_heads * a.head_dim), a.L, a.cu_seqlens);
  const float A = a.A[head], D = a.D ? a.D[head] : 0.f;
  const float dt_bias = a.dt_bias ? a.dt_bias[head] : 0.f;

  float h[kSsdNaiveStates];
  for (int i = 0; i < kSsdNaiveStates; ++i) {
    const int n = lane + 32 * i;
    h[i] = a.h0 && n < N ? a.h0[row * N + n] : 0.f;
  }
  for (int64_t t = rows.first; t < rows.first + rows.count; ++t) {
    const float dt = to_float(a.dt[t * a.dt_stride + head]);
    const float delta = ssd_delta(a, dt + dt_bias);
    const float decay = expf(delta * A);
    const float x = to_float(a.x[t * a.x_stride + channel]);
    float y = 0;
    for (int i = 0; i < kSsdNaiveStates; ++i) {
      const int n = lane + 32 * i;
      if (n >= N) break;
      const float B = to_float(a.B[t * a.B_stride + group * N + n]);
      const float C = to_float(a.C[t * a.C_stride + group * N + n]);
      h[i] = decay * h[i] + delta * x * B;
      y += h[i] * C;
    }
    for (int d = 16; d > 0; d /= 2) y += __shfl_xor_sync(~0u, y, d);
    if (lane == 0) a.out[t * a.out_stride + channel] = from_float<T>(y + D * x);
  }
  for (int i = 0; i < kSsdNaiveStates; ++i) {
    const int n = lane + 32 * i;
    if (a.hT && n < N) a.hT[row * N + n] = h[i];
  }
}

// --- tensor-core vocabulary (PTX ISA, "mma.m16n8k16" and "ldmatrix"). In a warp, lane l is
// g = l / 4, q = l % 4. Operand A (16 x 16): register pairs at rows g, g + 8 and columns 2q, 2q + 1
// (+ 8). Operand B (16 x 8): rows 2q, 2q + 1 (+ 8), column g. Result (16 x 8): rows g, g + 8,
// columns 2q, 2q + 1. So a result packed to 16 bits is operand A as it stands, and the
// transpose of a result is operand B as it stands.

template <class T>
struct Pair;  // two 16-bit values in one register, the first in the low half

template <>
struct Pair<__nv_bfloat16> {
  __device__ static uint32_t pack(float lo, float hi) {
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
  }
  __device__ static float2 unpack(uint32_t r) {
    return {__uint_as_float(r << 16), __uint_as_float(r & 0xffff0000u)};
  }
  __device__ static void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

template <>
struct Pair<__half> {
  __device__ static uint32_t pack(float lo, float hi) {
    uint32_t r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
  }
  __device__ static float2 unpack(uint32_t r) {
    return __half22float2(reinterpret_cast<const __half2&>(r));
  }
  __device__ static void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

// Four 8 x 8 matrices; lane l names row l % 8 of matrix l / 8 (16 bytes of shared memory).
__device__ inline void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ inline void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ inline uint32_t transpose_matrix(uint32_t r) {
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;" : "+r"(r));
  return r;
}

// Tiles in shared memory: rows of kCols 16-bit values in pieces of 16 bytes. Piece c of row r
// lies at c ^ (r % 8), so that the eight rows of a matrix, and one row, touch all banks once.
template <int kCols>
__device__ uint32_t tile_offset(uint32_t row, uint32_t piece) {
  return row * (kCols * 2) + piece / 8 * 128 + ((piece ^ row) & 7) * 16;
}

// The address `pieces` to the right in the same row, where that carries nothing: the piece that
// `address` names has no bit in common with `pieces`.
__device__ inline uint32_t move_right(uint32_t address, uint32_t pieces) {
  return (address ^ (pieces % 8 * 16)) + pieces / 8 * 128;
}

// --- fused: the matrix form, one pass over global memory.
//
// Block: 4 warps, one segment of one sequence, 4 * 16 * kRowTiles rows (head, p) of one group
//        (P = 64, kRowTiles = 2: two heads). A warp owns 16 * kRowTiles rows of one head.
// Registers: the warp's rows of h in float32, for the whole segment.
// Shared: C, B and x of two chunks (this one, and the next on its way); the decays of both;
//        M of this chunk, one for each head of the block from one product C B^T.
// Everything is computed transposed, rows p down and time across: Y^T = h C^T + X^T M^T and
// h' = X^T B. Then h, a result, is operand A of the next product without leaving its
// registers, and so is the only large thing that is carried from chunk to chunk.
// Rounding to 16 bits, beside inputs and outputs: M, h (as a factor; the carried h stays
// float32) and the weighted X, so |error| <= 3 eps m for y (X and h, or M; y) and eps m for hT,
// to first order. In float16, as in every such format, M and h must also stay below 65504.
//
// kOutputs = false makes the state at the end of the segment from a zero start, and nothing
// else: the first of the two launches when the sequence is split (see ssd).

constexpr int kSsdChunk = 64;
constexpr int kSsdSteps = 64;  // columns t of Y^T in registers at a time

struct SsdSegments {
  int64_t length = 0;      // tokens in a segment, a multiple of kSsdChunk
  int64_t count = 1;       // segments in a sequence of L tokens
  float* state = nullptr;  // (count - 1, batch, heads, head_dim, d_state): from a zero start
  float* decay = nullptr;  // (count - 1, batch, heads): of a state that passes the segment
};

// The decays of one head in one chunk, in shared memory.
struct SsdDecays {
  float cum[kSsdChunk];     // log2 a(-1, t), so that a(s, t) delta_s = 2^(cum[t] - source[s])
  float source[kSsdChunk];  // cum[s] - log2 delta_s: infinite beyond the end, where delta is 0
  float carry[kSsdChunk];   // a(-1, t)
  float fade[kSsdChunk];    // a(s, 63) delta_s
};

template <int kStates, int kRowTiles, bool kOutputs>
struct SsdTiles {  // bytes of shared memory
  static constexpr int kRows = 4 * 16 * kRowTiles;
  static constexpr int kHeads = kRowTiles == 2 ? 2 : 4;  // at most, in these rows
  static constexpr int kBC = kSsdChunk * kStates * 2, kX = kSsdChunk * kRows * 2;
  static constexpr int kStage = (kOutputs ? 2 : 1) * kBC + kX;
  static constexpr int kMask = kOutputs ? 10 * 512 : 0;  // M of a head: 10 tiles of 16 x 16
  static constexpr int kTurn = kOutputs ? 8 * kRows * 2 : 0;
  static constexpr int kMasks = 2 * kStage, kTurns = kMasks + kHeads * kMask;  // offsets
  static constexpr int kDecays = kTurns + kTurn;
  static constexpr int kBytes = kDecays + 2 * kHeads * int(sizeof(SsdDecays));
};

// 64 rows of a (time, channel) matrix, valid_rows of them and valid_cols columns real.
template <int kCols, class T>
__device__ void ssd_copy_tile(uint32_t tile, const T* from, int64_t stride, int valid_rows,
                              int valid_cols) {
  constexpr int kPieces = kCols / 8, kRowStep = 128 / kPieces;
  const int piece = threadIdx.x % kPieces;
  int row = threadIdx.x / kPieces;
  from += row * stride + piece * 8;
  if (piece * 8 >= valid_cols) valid_rows = 0;
#pragma unroll
  for (int i = 0; i < kSsdChunk / kRowStep; ++i, row += kRowStep, from += kRowStep * stride)
    copy_async(tile + tile_offset<kCols>(row, piece), from, row < valid_rows);
}

// By one warp; lane i has raw dt, bias added, of steps 2i and 2i + 1.
template <class T>
__device__ void ssd_decays(SsdDecays& to, const SsdArgs<T>& a, float2 dt, float A_log2,
                           int valid_rows) {
  const int lane = threadIdx.x % 32;
  const float delta0 = 2 * lane < valid_rows ? ssd_delta(a, dt.x) : 0.f;
  const float delta1 = 2 * lane + 1 < valid_rows ? ssd_delta(a, dt.y) : 0.f;
  // A step that decays by 2^-152 or more leaves 0 in float32; stopping there bounds the sums
  // to 64 * 152, and so the rounding of their differences.
  const float first = fmaxf(delta0 * A_log2, -152.f);
  const float both = first + fmaxf(delta1 * A_log2, -152.f);
  float sum = both;  // inclusive scan over the lanes
  for (int d = 1; d < 32; d *= 2) {
    const float left = __shfl_up_sync(~0u, sum, d);
    if (lane >= d) sum += left;
  }
  const float total = __shfl_sync(~0u, sum, 31);
  const float2 cum = {sum - both + first, sum};
  const float2 source = {cum.x - __log2f(delta0), cum.y - __log2f(delta1)};
  reinterpret_cast<float2*>(to.cum)[lane] = cum;
  reinterpret_cast<float2*>(to.source)[lane] = source;
  reinterpret_cast<float2*>(to.carry)[lane] = {exp2_approx(cum.x), exp2_approx(cum.y)};
  reinterpret_cast<float2*>(to.fade)[lane] = {exp2_approx(total - source.x),
                                              exp2_approx(total - source.y)};
}

template <class T, int kStates, int kRowTiles, bool kOutputs>
__global__ void __launch_bounds__(128, kStates <= 128 ? 2 : 1)
    ssd_fused_kernel(SsdArgs<T> a, SsdSegments segments) {
  using Tiles = SsdTiles<kStates, kRowTiles, kOutputs>;
  using P2 = Pair<T>;
  constexpr int kWarpRows = 16 * kRowTiles, kRows = Tiles::kRows, kHeads = Tiles::kHeads;
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // uniform, and known to be
  const int P = a.head_dim, N = a.d_state;

  // Block -> (b, segment, group, rows). Neighbouring blocks share B and C through L2.
  const int heads_per_group = a.n_heads / a.n_groups, group_rows = heads_per_group * P;
  const int tiles = ceil_div(group_rows, kRows);
  int64_t block = blockIdx.x;
  const int row0 = block % tiles * kRows;  // first row of the block in its group
  const int group = (block /= tiles) % a.n_groups;
  const int64_t launched = kOutputs ? segments.count : segments.count - 1;
  const int64_t segment = (block /= a.n_groups) % launched, b = block / launched;
  const Rows rows = rows_of(b, a.L, a.cu_seqlens);
  const int64_t begin = segment * segments.length;
  const bool last = begin + segments.length >= rows.count;
  const int64_t end = last ? rows.count : begin + segments.length;
  if (begin > 0 && begin >= rows.count) return;  // a shorter sequence has fewer segments
  if (!kOutputs && last) return;                 // no segment follows that would want it

  // Warp -> rows of one head; a warp beyond the group computes on zeros and stores nothing.
  const int warp_row = row0 + warp * kWarpRows;
  const bool active = warp_row < group_rows;
  const int head0 = group * heads_per_group + row0 / P;  // the block's first
  const int heads = min(row0 + kRows - 1, group_rows - 1) / P - row0 / P + 1;
  const int slot = active ? warp_row / P - row0 / P : 0, head = head0 + slot;
  const int p0 = active ? warp_row % P : 0;

  extern __shared__ __align__(128) char shared[];
  const uint32_t stage0 = __cvta_generic_to_shared(shared);
  uint4* masks = reinterpret_cast<uint4*>(shared + Tiles::kMasks) + lane;
  char* turn = shared + Tiles::kTurns + warp * (Tiles::kTurn / 4);
  SsdDecays* decays = reinterpret_cast<SsdDecays*>(shared + Tiles::kDecays);  // [2][kHeads]

  // Where a lane points ldmatrix: at matrices side by side (two pieces of 8 rows, then the
  // next 8 rows), or one above the other (two times 8 rows, then the next piece).
  const int beside_row = lane / 16 * 8 + lane % 8, beside_piece = lane / 8 % 2;
  const int above_row = lane / 8 % 2 * 8 + lane % 8, above_piece = lane / 16;
  const uint32_t beside_BC = tile_offset<kStates>(beside_row, beside_piece);
  const uint32_t above_BC = tile_offset<kStates>(above_row, above_piece);
  const uint32_t beside_x =
      Tiles::kBC + tile_offset<kRows>(beside_row, warp * kWarpRows / 8 + beside_piece);
  constexpr int kRowBC = kStates * 2, kRowX = kRows * 2;  // in bytes

  const auto copy_chunk = [&](int64_t t, uint32_t stage) {
    const int64_t token = rows.first + t;
    const int64_t bc = int64_t{group} * N;
    const int rows = min(end - t, int64_t{kSsdChunk});
    ssd_copy_tile<kStates>(stage, a.B + token * a.B_stride + bc, a.B_stride, rows, N);
    ssd_copy_tile<kRows>(stage + Tiles::kBC,
                         a.x + token * a.x_stride + int64_t{group} * group_rows + row0, a.x_stride,
                         rows, group_rows - row0);
    if (kOutputs)
      ssd_copy_tile<kStates>(stage + Tiles::kBC + Tiles::kX, a.C + token * a.C_stride + bc,
                             a.C_stride, rows, N);
    copy_async_commit();
  };

  // The last warps, which have the fewest tiles of M, each make the decays of one head.
  const int decay_slot = 3 - warp, decay_head = head0 + min(decay_slot, heads - 1);
  const float A_log2 = a.A[decay_head] * kLog2e;
  const float dt_bias = a.dt_bias ? a.dt_bias[decay_head] : 0.f;
  const auto load_dt = [&](int64_t t) {
    const T* dt = a.dt + (rows.first + t + 2 * lane) * a.dt_stride + decay_head;
    const int left = min(end - t, int64_t{kSsdChunk}) - 2 * lane;
    return float2{left > 0 ? to_float(dt[0]) + dt_bias : 0.f,
                  left > 1 ? to_float(dt[a.dt_stride]) + dt_bias : 0.f};
  };

  // h[i][j]: rows p0 + 16i + g (+ 8 for elements 2, 3), columns 8j + 2q, + 1. visit calls
  // f(offset in (heads, P, N), two elements) for each pair that exists.
  float h[kRowTiles][kStates / 8][4];
  const auto visit = [&](auto f) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int j = 0; j < kStates / 8; ++j)
#pragma unroll
        for (int k = 0; k < 4; k += 2)
          if (active && 8 * j + 2 * q < N)
            f((int64_t{head} * P + p0 + 16 * i + g + 4 * k) * N + 8 * j + 2 * q, h[i][j][k],
              h[i][j][k + 1]);
  };
  const int64_t state_size = int64_t{a.n_heads} * P * N;

  if (begin < end) copy_chunk(begin, stage0);
  float2 dt = load_dt(begin);
  if (decay_slot < heads)
    ssd_decays(decays[decay_slot], a, dt, A_log2, min(end - begin, int64_t{kSsdChunk}));
  dt = load_dt(begin + kSsdChunk);
  for (auto& rows : h)
    for (auto& tile : rows) tile[0] = tile[1] = tile[2] = tile[3] = 0;
  if (kOutputs && a.h0)
    visit([&](int64_t offset, float& h0, float& h1) {
      const float2 v = *reinterpret_cast<const float2*>(a.h0 + b * state_size + offset);
      h0 = v.x, h1 = v.y;
    });
  for (int64_t s = 0; kOutputs && s < segment; ++s) {  // pass the segments before this one
    const float decay = segments.decay[(s * a.batch + b) * a.n_heads + head];
    const float* state = segments.state + (s * a.batch + b) * state_size;
    visit([&](int64_t offset, float& h0, float& h1) {
      const float2 v = *reinterpret_cast<const float2*>(state + offset);
      h0 = decay * h0 + v.x, h1 = decay * h1 + v.y;
    });
  }
  float segment_decay = 1;

  int parity = 0;  // of the chunk: which stage, which decays
#pragma unroll 1
  for (int64_t t0 = begin; t0 < end; t0 += kSsdChunk, parity ^= 1) {
    const uint32_t stage = stage0 + parity * Tiles::kStage;
    const uint32_t tile_B = stage, tile_C = stage + Tiles::kBC + Tiles::kX;
    const SsdDecays* now = decays + parity * kHeads;
    const int64_t next = t0 + kSsdChunk;
    copy_async_wait();
    // This chunk's copies and decays before their reads; and all reads of the previous chunk
    // (its stage, decays and M) before the writes that follow.
    __syncthreads();
    if (next < end) {
      copy_chunk(next, stage0 + (parity ^ 1) * Tiles::kStage);
      if (decay_slot < heads)
        ssd_decays(decays[(parity ^ 1) * kHeads + decay_slot], a, dt, A_log2,
                   min(end - next, int64_t{kSsdChunk}));
      dt = load_dt(next + kSsdChunk);
    }

    if (kOutputs) {
      // S[t,s] = C_t . B_s where s <= t: tiles of 16 x 16 below and on the diagonal, numbered
      // row by row; warp w makes tiles w, w + 4 and w + 8.
      float S[3][2][4] = {};
      int t[3], u[3];  // tile's first step t, first step s
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        const int e = warp + 4 * i, row = (e > 0) + (e > 2) + (e > 5);
        t[i] = 16 * row, u[i] = 16 * (e - row * (row + 1) / 2);
      }
      const auto multiply = [&](int i, int k) {
        uint32_t a[4], c[4];
        load_matrices(a, move_right(tile_C + t[i] * kRowBC + above_BC, 2 * k));
        load_matrices(c, move_right(tile_B + u[i] * kRowBC + beside_BC, 2 * k));
        P2::mma(S[i][0], a, c[0], c[1]);
        P2::mma(S[i][1], a, c[2], c[3]);
      };
#pragma unroll
      for (int k = 0; k < kStates / 16; ++k) multiply(0, k), multiply(1, k);
      if (warp < 2)
#pragma unroll
        for (int k = 0; k < kStates / 16; ++k) multiply(2, k);
          // M[t,s] of each head, D added on the diagonal (y_t has D x_t), stored as the operand B
          // that the transpose of this result is: 16 bytes a lane.
#pragma unroll 1
      for (int j = 0; j < heads; ++j) {
        const float D = a.D ? a.D[head0 + j] : 0.f;
#pragma unroll
        for (int i = 0; i < 3; ++i)
          if (i < 2 || warp < 2) {
            float2 M[4];  // steps t: 8 (r / 2) + g, steps s: 8 (r % 2) + 2q
#pragma unroll
            for (int r = 0; r < 4; ++r) {
              const float cum = now[j].cum[t[i] + r / 2 * 8 + g];
              const float2 source =
                  *reinterpret_cast<const float2*>(&now[j].source[u[i] + r % 2 * 8 + 2 * q]);
              M[r] = {S[i][r % 2][r / 2 * 2] * exp2_approx(cum - source.x),
                      S[i][r % 2][r / 2 * 2 + 1] * exp2_approx(cum - source.y)};
            }
            if (t[i] == u[i])  // on the diagonal, s <= t only
#pragma unroll
              for (int r = 0; r < 4; ++r) {
                const int ahead = 8 * (r % 2) + 2 * q - 8 * (r / 2) - g;  // s - t
                M[r].x = ahead < 0 ? M[r].x : ahead == 0 ? M[r].x + D : 0.f;
                M[r].y = ahead < -1 ? M[r].y : ahead == -1 ? M[r].y + D : 0.f;
              }
            masks[(10 * j + warp + 4 * i) * 32] = {
                P2::pack(M[0].x, M[0].y), P2::pack(M[1].x, M[1].y), P2::pack(M[2].x, M[2].y),
                P2::pack(M[3].x, M[3].y)};
          }
      }
    }

    const auto load_X = [&](uint32_t(&X)[4], int i,
                            int k) {  // rows 16i.. of X^T, steps 16k..
      load_matrices_transposed(X, move_right(stage + beside_x, 2 * i) + 16 * k * kRowX);
    };

    if (kOutputs) {
#pragma unroll
      for (int first = 0; first < kSsdChunk; first += kSsdSteps) {
        float Y[kRowTiles][kSsdSteps / 8][4] = {};  // Y^T: rows p, columns t in tiles of 8
#pragma unroll
        for (int k = 0; k < kStates / 16; ++k) {  // h C^T
          uint32_t a[kRowTiles][4], c[4];
#pragma unroll
          for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
            for (int r = 0; r < 4; ++r)
              a[i][r] =
                  P2::pack(h[i][2 * k + r / 2][r % 2 * 2], h[i][2 * k + r / 2][r % 2 * 2 + 1]);
#pragma unroll
          for (int j = 0; j < kSsdSteps / 16; ++j) {
            load_matrices(c, move_right(tile_C + beside_BC, 2 * k) + (first + 16 * j) * kRowBC);
#pragma unroll
            for (int i = 0; i < kRowTiles; ++i) {
              P2::mma(Y[i][2 * j], a[i], c[0], c[1]);
              P2::mma(Y[i][2 * j + 1], a[i], c[2], c[3]);
            }
          }
        }
#pragma unroll
        for (int j = 0; j < kSsdSteps / 8; ++j) {
          const float2 carry =
              *reinterpret_cast<const float2*>(&now[slot].carry[first + 8 * j + 2 * q]);
#pragma unroll
          for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
            for (int r = 0; r < 4; ++r) Y[i][j][r] *= r % 2 ? carry.y : carry.x;
        }
        if (first == 0) __syncthreads();  // M, by all warps, before its reads
#pragma unroll
        for (int k = 0; k < (first + kSsdSteps) / 16; ++k) {  // X^T M^T, steps s 16k..
          uint32_t X[kRowTiles][4];
#pragma unroll
          for (int i = 0; i < kRowTiles; ++i) load_X(X[i], i, k);
#pragma unroll
          for (int j = max(0, k - first / 16); j < kSsdSteps / 16; ++j) {
            const int row = first / 16 + j;  // of tiles
            const uint4 m = masks[(10 * slot + row * (row + 1) / 2 + k) * 32];
#pragma unroll
            for (int i = 0; i < kRowTiles; ++i) {
              P2::mma(Y[i][2 * j], X[i], m.x, m.y);
              P2::mma(Y[i][2 * j + 1], X[i], m.z, m.w);
            }
          }
        }
        // Y^T -> out, 8 steps at a time: turned over in the warp's own corner of shared memory,
        // 8 rows of kPieces pieces; piece c of row r lies at c ^ (r / kRowsPerLine), see above.
        constexpr int kPieces = kWarpRows / 8, kRowsPerLine = 8 / kPieces;
        const auto turned = [&](int row, int piece) {
          return turn + (row * kPieces + (piece ^ (row / kRowsPerLine % kPieces))) * 16;
        };
        const int row = lane / kPieces, piece = lane % kPieces;
        T* out = a.out + (rows.first + t0 + first + row) * a.out_stride + int64_t{head} * P + p0 +
                 piece * 8;
        const int rows = active && row < 8 ? min(end - t0, int64_t{kSsdChunk}) - first - row : 0;
#pragma unroll
        for (int j = 0; j < kSsdSteps / 8; ++j, out += 8 * a.out_stride) {
          __syncwarp();  // the reads of the 8 steps before, before these writes
#pragma unroll
          for (int i = 0; i < kPieces; ++i)
            *reinterpret_cast<uint32_t*>(turned(g, i) + 4 * q) =
                transpose_matrix(P2::pack(Y[i / 2][j][i % 2 * 2], Y[i / 2][j][i % 2 * 2 + 1]));
          __syncwarp();  // these writes before the reads
          if (8 * j < rows)
            *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(turned(row, piece));
        }
      }
    }

    // h' = a(-1, 63) h + (a(s, 63) delta_s X)^T B
    uint32_t X[4][kRowTiles][4];
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        load_X(X[k][i], i, k);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const float2 fade =
              *reinterpret_cast<const float2*>(&now[slot].fade[16 * k + r / 2 * 8 + 2 * q]);
          const float2 v = P2::unpack(X[k][i][r]);
          X[k][i][r] = P2::pack(v.x * fade.x, v.y * fade.y);
        }
      }
    const float chunk_decay = now[slot].carry[kSsdChunk - 1];
#pragma unroll
    for (int n = 0; n < kStates / 16; ++n) {
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
        for (int r = 0; r < 8; ++r) h[i][2 * n + r / 4][r % 4] *= chunk_decay;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        uint32_t c[4];
        load_matrices_transposed(c, move_right(tile_B + above_BC, 2 * n) + 16 * k * kRowBC);
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          P2::mma(h[i][2 * n], X[k][i], c[0], c[1]);
          P2::mma(h[i][2 * n + 1], X[k][i], c[2], c[3]);
        }
      }
    }
    segment_decay *= chunk_decay;
  }

  float* hT = kOutputs ? a.hT ? a.hT + b * state_size : nullptr
                       : segments.state + (segment * a.batch + b) * state_size;
  if (hT && (last || !kOutputs))
    visit([&](int64_t offset, float& h0, float& h1) {
      *reinterpret_cast<float2*>(hT + offset) = {h0, h1};
    });
  if (!kOutputs && active && p0 == 0 && lane == 0)
    segments.decay[(segment * a.batch + b) * a.n_heads + head] = segment_decay;
}

// --- fused on warpgroups (Hopper): the same algorithm, and the same roundings, with the tensor
// cores fed by wgmma. What limits the kernel above is shared memory: each of its warps fetches
// every B and C for its own 32 rows. A warpgroup of 4 warps fetches them once for 64 rows, in the
// background, and multiplies at nearly twice the rate.
//
// Block: 3 warpgroups of 64 rows (head, p) each: three heads of P = 64, or half heads of P = 128;
//        and a fourth that fetches chunks and makes decays for them. A warpgroup makes its own
//        M, so that the three never wait for one another: while one computes exponentials or
//        stores, the others multiply.
// Registers: 64 rows of h to a warpgroup, in the layout of the kernel above (warp: 16 rows).
// Shared: C, B, x and decays of three chunks; an M for each warpgroup. Tiles are columns of 128
//        bytes: see ssd_tile. Stages are handed over by two barriers each: full and empty.

// The 64 x 64 result d, as text for the assembler and as its operands 0 to 31.
#define SSD_D                                        \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,"  \
  "%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25," \
  "%26,%27,%28,%29,%30,%31}"
#define SSD_D_OPERANDS                                                                          \
  "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]),     \
      "+f"(d[1][2]), "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]), \
      "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3]), "+f"(d[4][0]), "+f"(d[4][1]), \
      "+f"(d[4][2]), "+f"(d[4][3]), "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]), \
      "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]), "+f"(d[7][0]), "+f"(d[7][1]), \
      "+f"(d[7][2]), "+f"(d[7][3])

// d (64 x 64) = A (64 x 16) B (16 x 64) + (add ? d : 0). shared: both lie along k in shared
// memory. registers: A in registers; B along k, or (kTransposed) along its other side.
#define SSD_WGMMA(TYPE)                                                                           \
  __device__ static void shared(float(&d)[8][4], uint64_t a, uint64_t b, int add) {               \
    asm volatile(                                                                                 \
        "{.reg .pred p; setp.ne.b32 p, %34, 0; "                                                  \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " " SSD_D                     \
        ", %32, %33, p, 1, 1, 0, 0;}"                                                             \
        : SSD_D_OPERANDS                                                                          \
        : "l"(a), "l"(b), "r"(add));                                                              \
  }                                                                                               \
  template <int kTransposed>                                                                      \
  __device__ static void registers(float(&d)[8][4], const uint32_t(&a)[4], uint64_t b, int add) { \
    asm volatile(                                                                                 \
        "{.reg .pred p; setp.ne.b32 p, %37, 0; "                                                  \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " " SSD_D                     \
        ", {%32,%33,%34,%35}, %36, p, 1, 1, %38;}"                                                \
        : SSD_D_OPERANDS                                                                          \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(kTransposed));        \
  }

template <class T>
struct Warpgroup;
template <>
struct Warpgroup<__nv_bfloat16> {
  SSD_WGMMA("bf16")
};
template <>
struct Warpgroup<__half> {
  SSD_WGMMA("f16")
};
#undef SSD_WGMMA
#undef SSD_D_OPERANDS
#undef SSD_D

// Four 8 x 8 matrices to shared memory; lane l names the place of row l % 8 of matrix l / 8.
__device__ inline void store_matrices(uint32_t address, uint32_t r0, uint32_t r1, uint32_t r2,
                                      uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address),
               "r"(r0), "r"(r1), "r"(r2), "r"(r3)
               : "memory");
}
__device__ inline void store_matrices_transposed(uint32_t address, uint32_t r0, uint32_t r1,
                                                 uint32_t r2, uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address),
               "r"(r0), "r"(r1), "r"(r2), "r"(r3)
               : "memory");
}

// Registers that wgmma will read or add to are written, before it starts.
__device__ inline void warpgroup_arrive() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ inline void warpgroup_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>  // all but the last kPending commits are done
__device__ void warpgroup_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// This thread's writes to shared memory become visible to wgmma after the next barrier.
__device__ inline void publish_to_wgmma() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// A tile of 64 rows: columns of 64 values (128 bytes), each 64 x 128 bytes on its own; in a
// column, piece c of row r lies at c ^ (r % 8) ("128-byte swizzle").
__device__ inline uint32_t ssd_tile(uint32_t row, uint32_t piece) {
  return piece / 8 * 8192 + row * 128 + ((piece ^ row) & 7) * 16;
}
// What wgmma wants to know of one (PTX ISA, "matrix descriptor"): where it starts, 8192 bytes to
// the next column, 1024 to the next 8 rows, 128-byte swizzle.
__device__ inline uint64_t ssd_describe(uint32_t address) {
  return uint64_t{1} << 62 | uint64_t{1024 / 16} << 32 | uint64_t{8192 / 16} << 16 |
         (address & 0x3ffff) / 16;
}

constexpr int kSsdWarpgroups = 3;

template <int kStates, bool kOutputs>
struct SsdWarpgroupTiles {  // offsets in shared memory; tiles are aligned to 1024 bytes
  static constexpr int kStages = 3;
  static constexpr int kBC = kSsdChunk * kStates * 2, kX = kSsdWarpgroups * 8192;
  static constexpr int kStage = (kOutputs ? 2 : 1) * kBC + kX;  // B, x, C
  static constexpr int kM = kStages * kStage;
  static constexpr int kTurn = kM + (kOutputs ? kSsdWarpgroups * 8192 : 0);
  static constexpr int kDecays = kTurn + (kOutputs ? kSsdWarpgroups * 4 * 512 : 0);
  static constexpr int kBarriers = kDecays + kStages * kSsdWarpgroups * int(sizeof(SsdDecays));
  static constexpr int kBytes = kBarriers + kStages * 16 + 1024;  // to align
};

// Barriers in shared memory (PTX ISA, "mbarrier"): a phase ends when `count` threads arrived, and
// wait returns once the phase of that parity has ended.
__device__ inline void barrier_init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ inline void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ inline void barrier_wait(uint32_t barrier, int parity) {
  asm volatile(
      "{.reg .pred done; again: mbarrier.try_wait.parity.shared.b64 done, [%0], %1; "
      "@!done bra again;}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

template <class T, int kStates, bool kOutputs>
__global__ void __launch_bounds__(128 * kSsdWarpgroups + 128, 1)
    ssd_warpgroup_kernel(SsdArgs<T> a, SsdSegments segments) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // wgmma exists in sm_90a only; see ssd_has_warpgroups
  using Tiles = SsdWarpgroupTiles<kStates, kOutputs>;
  using P2 = Pair<T>;
  constexpr int kRows = 64 * kSsdWarpgroups, kStages = Tiles::kStages;
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int warps = __shfl_sync(~0u, threadIdx.x / 32, 0);  // uniform, and known to be
  const int wg = warps / 4, warp = warps % 4;
  const int P = a.head_dim, N = a.d_state;

  // Block -> (b, segment, group, rows), as above.
  const int heads_per_group = a.n_heads / a.n_groups, group_rows = heads_per_group * P;
  const int tiles = ceil_div(group_rows, kRows);
  int64_t block = blockIdx.x;
  const int row0 = block % tiles * kRows;
  const int group = (block /= tiles) % a.n_groups;
  const int64_t launched = kOutputs ? segments.count : segments.count - 1;
  const int64_t segment = (block /= a.n_groups) % launched, b = block / launched;
  const Rows rows = rows_of(b, a.L, a.cu_seqlens);
  const int64_t begin = segment * segments.length;
  const bool last = begin + segments.length >= rows.count;
  const int64_t end = last ? rows.count : begin + segments.length;
  if (begin > 0 && begin >= rows.count) return;
  if (!kOutputs && last) return;

  // Warpgroup -> 64 rows of one head; one beyond the group computes on zeros, stores nothing.
  const auto is_active = [&](int w) { return row0 + 64 * w < group_rows; };
  const auto head_of = [&](int w) {
    return group * heads_per_group + (is_active(w) ? (row0 + 64 * w) / P : 0);
  };

  extern __shared__ __align__(1024) char unaligned[];
  char* shared = unaligned + (-__cvta_generic_to_shared(unaligned) & 1023);
  const uint32_t base = __cvta_generic_to_shared(shared);
  SsdDecays* decays = reinterpret_cast<SsdDecays*>(shared + Tiles::kDecays);
  const uint32_t full = base + Tiles::kBarriers,
                 empty = full + 8 * kStages;  // of each stage
  if (threadIdx.x == 0)
    for (int i = 0; i < kStages; ++i) {
      barrier_init(full + 8 * i, 128);
      barrier_init(empty + 8 * i, kSsdWarpgroups);
    }
  __syncthreads();  // the barriers, before their use

  if (wg == kSsdWarpgroups) {
    // The last warpgroup fetches chunks, and makes their decays (a warp for each of the others),
    // as far ahead as there are stages. It hands its registers to the others.
    asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
    const bool decaying = warp < kSsdWarpgroups;
    const int head = head_of(decaying ? warp : 0);
    const float A_log2 = a.A[head] * kLog2e;
    const float dt_bias = a.dt_bias ? a.dt_bias[head] : 0.f;
    T dt[2] = {}, next_dt[2] = {};
    const auto load_dt = [&](int64_t t) {
      const int left = min(end - t, int64_t{kSsdChunk}) - 2 * lane;
      const T* from = a.dt + (rows.first + t + 2 * lane) * a.dt_stride + head;
      if (left > 0) next_dt[0] = from[0];
      if (left > 1) next_dt[1] = from[a.dt_stride];
    };
    load_dt(begin);
    int stage = 0, parity = 1, previous = -1;
#pragma unroll 1
    for (int64_t t0 = begin; t0 < end; t0 += kSsdChunk) {
      const int valid = min(end - t0, int64_t{kSsdChunk});
      dt[0] = next_dt[0], dt[1] = next_dt[1];
      load_dt(t0 + kSsdChunk);
      barrier_wait(empty + 8 * stage, parity);  // passes at once in the first round
      constexpr int kBColumns = kStates / 64, kBxColumns = kBColumns + kSsdWarpgroups;
#pragma unroll 1
      for (int c = (warp + 1) % 4; c < Tiles::kStage / 8192; c += 4) {  // columns: B, x, C
        const bool is_x = c >= kBColumns && c < kBxColumns;
        const int col = 64 * (is_x ? c - kBColumns : c % kBxColumns) + lane % 8 * 8;
        const T* from = is_x ? a.x : c < kBColumns ? a.B : a.C;
        const int64_t stride = is_x ? a.x_stride : c < kBColumns ? a.B_stride : a.C_stride;
        const int limit = is_x ? group_rows - row0 : N;
        from += (rows.first + t0 + lane / 8) * stride +
                (is_x ? int64_t{group} * group_rows + row0 : int64_t{group} * N) + col;
        const int left = col < limit ? valid - lane / 8 : 0;
        const uint32_t to = base + stage * Tiles::kStage + 8192 * c;
#pragma unroll
        for (int i = 0; i < kSsdChunk / 4; ++i, from += 4 * stride)
          copy_async(to + ssd_tile(4 * i + lane / 8, lane % 8), from, 4 * i < left);
      }
      copy_async_commit();
      if (decaying)
        ssd_decays(decays[stage * kSsdWarpgroups + warp], a,
                   {to_float(dt[0]) + dt_bias, to_float(dt[1]) + dt_bias}, A_log2, valid);
      if (previous >= 0) {  // the copies of the chunk before have arrived
        copy_async_wait_but<1>();
        publish_to_wgmma();
        barrier_arrive(full + 8 * previous);
      }
      previous = stage;
      if (++stage == kStages) stage = 0, parity ^= 1;
    }
    if (previous >= 0) {
      copy_async_wait_but<0>();
      publish_to_wgmma();
      barrier_arrive(full + 8 * previous);
    }
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 160;");

  const bool active = is_active(wg);
  const int head = head_of(wg), p0 = active ? (row0 + 64 * wg) % P + 16 * warp : 0;
  const float D = a.D ? a.D[head] : 0.f;
  const uint32_t M = base + Tiles::kM + 8192 * wg;
  const uint32_t lane_M = M + ssd_tile(16 * warp + lane / 8 % 2 * 8 + lane % 8, lane / 16);
  char* turn = shared + Tiles::kTurn + 512 * warps;
  const uint32_t lane_x =
      Tiles::kBC + ssd_tile(lane / 16 * 8 + lane % 8, 8 * wg + 2 * warp + lane / 8 % 2);
  const auto meet = [&] { asm volatile("bar.sync %0, 128;" ::"r"(1 + wg) : "memory"); };

  // h[c][j]: rows p0 + g (+ 8), columns 64c + 8j + 2q, + 1.
  float h[kStates / 64][8][4] = {};
  const auto visit = [&](auto f) {
#pragma unroll
    for (int c = 0; c < kStates / 64; ++c)
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int k = 0; k < 4; k += 2)
          if (active && 64 * c + 8 * j + 2 * q < N)
            f((int64_t{head} * P + p0 + g + 4 * k) * N + 64 * c + 8 * j + 2 * q, h[c][j][k],
              h[c][j][k + 1]);
  };
  const int64_t state_size = int64_t{a.n_heads} * P * N;

  if (kOutputs && a.h0)
    visit([&](int64_t offset, float& h0, float& h1) {
      const float2 v = *reinterpret_cast<const float2*>(a.h0 + b * state_size + offset);
      h0 = v.x, h1 = v.y;
    });
  for (int64_t s = 0; kOutputs && s < segment; ++s) {  // pass the segments before this one
    const float decay = segments.decay[(s * a.batch + b) * a.n_heads + head];
    const float* state = segments.state + (s * a.batch + b) * state_size;
    visit([&](int64_t offset, float& h0, float& h1) {
      const float2 v = *reinterpret_cast<const float2*>(state + offset);
      h0 = decay * h0 + v.x, h1 = decay * h1 + v.y;
    });
  }
  float segment_decay = 1;

  int number = 0, parity = 0;  // of the stage; of its phase
#pragma unroll 1
  for (int64_t t0 = begin; t0 < end; t0 += kSsdChunk) {
    const uint32_t stage = base + number * Tiles::kStage;
    const uint32_t tile_C = stage + Tiles::kBC + Tiles::kX;
    const SsdDecays& now = decays[number * kSsdWarpgroups + wg];
    barrier_wait(full + 8 * number, parity);

    float Y[8][4];  // Y^T: rows p, columns t in tiles of 8
    if (kOutputs) {
      float S[8][4];  // S[t,s] = C_t . B_s
      warpgroup_arrive();
#pragma unroll
      for (int k = 0; k < kStates / 16; ++k) {
        const uint32_t along = k / 4 * 8192 + k % 4 * 32;
        Warpgroup<T>::shared(S, ssd_describe(tile_C + along), ssd_describe(stage + along), k > 0);
      }
      warpgroup_commit();
      warpgroup_wait<0>();
      // M[t,s], D added on the diagonal (y_t has D x_t).
      const float cum[2] = {now.cum[16 * warp + g], now.cum[16 * warp + 8 + g]};
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        uint32_t m[2][2] = {};  // steps s: 8 (j + i) + 2q, + 1; steps t: 16 warp + 8r + g
        if (8 * j <= 16 * warp)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float2 source =
                *reinterpret_cast<const float2*>(&now.source[8 * (j + i) + 2 * q]);
#pragma unroll
            for (int r = 0; r < 2; ++r) {
              float2 v = {S[j + i][2 * r] * exp2_approx(cum[r] - source.x),
                          S[j + i][2 * r + 1] * exp2_approx(cum[r] - source.y)};
              if (8 * j == 16 * warp) {                       // on the diagonal, s <= t only
                const int ahead = 8 * i + 2 * q - 8 * r - g;  // s - t
                v.x = ahead < 0 ? v.x : ahead == 0 ? v.x + D : 0.f;
                v.y = ahead < -1 ? v.y : ahead == -1 ? v.y + D : 0.f;
              }
              m[i][r] = P2::pack(v.x, v.y);
            }
          }
        store_matrices(move_right(lane_M, j), m[0][0], m[0][1], m[1][0], m[1][1]);
      }
      publish_to_wgmma();

      uint32_t a[kStates / 16][4];  // h, rounded
#pragma unroll
      for (int k = 0; k < kStates / 16; ++k)
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const float* v = &h[k / 4][k % 4 * 2 + r / 2][r % 2 * 2];
          a[k][r] = P2::pack(v[0], v[1]);
        }
      warpgroup_arrive();
#pragma unroll
      for (int k = 0; k < kStates / 16; ++k)  // h C^T
        Warpgroup<T>::template registers<0>(
            Y, a[k], ssd_describe(tile_C + k / 4 * 8192 + k % 4 * 32), k > 0);
      warpgroup_commit();
      warpgroup_wait<0>();
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float2 carry = *reinterpret_cast<const float2*>(&now.carry[8 * j + 2 * q]);
        Y[j][0] *= carry.x, Y[j][1] *= carry.y, Y[j][2] *= carry.x, Y[j][3] *= carry.y;
      }
    }
    uint32_t X[4][4];  // X^T: rows p, steps s in tiles of 16
#pragma unroll
    for (int k = 0; k < 4; ++k) load_matrices_transposed(X[k], stage + lane_x + 2048 * k);
    if (kOutputs) {
      meet();  // M, by the warps of the warpgroup, before its reads
      warpgroup_arrive();
#pragma unroll
      for (int k = 0; k < 4; ++k)  // X^T M^T
        Warpgroup<T>::template registers<0>(Y, X[k], ssd_describe(M + 32 * k), 1);
      warpgroup_commit();
    }

    // h' = a(-1, 63) h + (a(s, 63) delta_s X)^T B
    uint32_t fading_X[4][4];
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const float2 fade = *reinterpret_cast<const float2*>(&now.fade[16 * k + r / 2 * 8 + 2 * q]);
        const float2 v = P2::unpack(X[k][r]);
        fading_X[k][r] = P2::pack(v.x * fade.x, v.y * fade.y);
      }
    const float chunk_decay = now.carry[kSsdChunk - 1];
    segment_decay *= chunk_decay;
#pragma unroll
    for (auto& column : h)
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int r = 0; r < 4; ++r) column[j][r] *= chunk_decay;
    warpgroup_arrive();
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
      for (int c = 0; c < kStates / 64; ++c)
        Warpgroup<T>::template registers<1>(h[c], fading_X[k],
                                            ssd_describe(stage + 8192 * c + 2048 * k), 1);
    warpgroup_commit();

    if (kOutputs) {
      warpgroup_wait<1>();  // Y is done; h' goes on
      // Y^T -> out, 16 steps at a time: turned over in the warp's own corner of shared memory,
      // 16 rows of 2 pieces; piece c of row r lies at c ^ (r / 4 % 2).
      const auto turned = [&](int row, int piece) {
        return turn + row * 32 + (piece ^ (row / 4 % 2)) * 16;
      };
      T* out = a.out + (rows.first + t0 + lane / 2) * a.out_stride + int64_t{head} * P + p0 +
               lane % 2 * 8;
      const int rows = active ? min(end - t0, int64_t{kSsdChunk}) - lane / 2 : 0;
#pragma unroll
      for (int j = 0; j < 8; j += 2, out += 16 * a.out_stride) {
        __syncwarp();  // the reads of the 16 steps before, before these writes
        store_matrices_transposed(base + (turned(lane / 16 * 8 + lane % 8, lane / 8 % 2) - shared),
                                  P2::pack(Y[j][0], Y[j][1]), P2::pack(Y[j][2], Y[j][3]),
                                  P2::pack(Y[j + 1][0], Y[j + 1][1]),
                                  P2::pack(Y[j + 1][2], Y[j + 1][3]));
        __syncwarp();  // these writes before the reads
        if (8 * j < rows)
          *reinterpret_cast<uint4*>(out) =
              *reinterpret_cast<const uint4*>(turned(lane / 2, lane % 2));
      }
    }
    warpgroup_wait<0>();
    meet();  // reads of the stage and of M, by the warpgroup, before they are written again
    if (threadIdx.x % 128 == 0) barrier_arrive(empty + 8 * number);
    if (++number == kStages) number = 0, parity ^= 1;
  }

  float* hT = kOutputs ? a.hT ? a.hT + b * state_size : nullptr
                       : segments.state + (segment * a.batch + b) * state_size;
  if (hT && (last || !kOutputs))
    visit([&](int64_t offset, float& h0, float& h1) {
      *reinterpret_cast<float2*>(hT + offset) = {h0, h1};
    });
  if (!kOutputs && active && p0 == 0 && lane == 0)
    segments.decay[(segment * a.batch + b) * a.n_heads + head] = segment_decay;
#endif
}

// --- step: one token for every sequence of a batch (a.L = 1). The state of a large batch is
// most of what a step moves, so it is read and written exactly once, 16 bytes a lane: a row of h
// is spread over `lanes` lanes (a power of two), B and C stay in registers for all its rows.
// a.h0 is the state before, a.hT after; they are normally the same buffer.

constexpr int kSsdStepRows = 4;  // loads in flight per lane

template <class T>
__global__ void __launch_bounds__(128) ssd_step_kernel(SsdArgs<T> a, int lanes) {
  const int64_t b = blockIdx.x / a.n_heads;
  if (a.done && a.done[b]) return;
  const int head = blockIdx.x % a.n_heads, group = head / (a.n_heads / a.n_groups);
  const int P = a.head_dim, N = a.d_state;
  const int lane = threadIdx.x % lanes, rows = blockDim.x / lanes, n0 = 4 * lane;
  const float dt = to_float(a.dt[b * a.dt_stride + head]);
  const float dt_bias = a.dt_bias ? a.dt_bias[head] : 0.f;
  const float delta = ssd_delta(a, dt + dt_bias);
  const float decay = expf(delta * a.A[head]), D = a.D ? a.D[head] : 0.f;
  const T* B = a.B + b * a.B_stride + group * N;
  const T* C = a.C + b * a.C_stride + group * N;
  const int64_t base = (b * a.n_heads + head) * P * N;

  for (int first = threadIdx.x / lanes; first - int(threadIdx.x) / lanes < P;
       first += kSsdStepRows * rows) {
    float y[kSsdStepRows] = {}, x[kSsdStepRows];
    for (int i = 0; i < kSsdStepRows; ++i) {
      const int p = first + i * rows;
      x[i] = p < P ? to_float(a.x[b * a.x_stride + int64_t{head} * P + p]) : 0.f;
    }
    for (int n = n0; n < N; n += 4 * lanes) {
      float4 h[kSsdStepRows];
#pragma unroll
      for (int i = 0; i < kSsdStepRows; ++i) {
        const int p = first + i * rows;
        h[i] = a.h0 && p < P ? *reinterpret_cast<const float4*>(a.h0 + base + int64_t{p} * N + n)
                             : float4{0, 0, 0, 0};
      }
      float dB[4], c[4];
      for (int k = 0; k < 4; ++k) dB[k] = delta * to_float(B[n + k]), c[k] = to_float(C[n + k]);
#pragma unroll
      for (int i = 0; i < kSsdStepRows; ++i) {
        const int p = first + i * rows;
        h[i] = {decay * h[i].x + dB[0] * x[i], decay * h[i].y + dB[1] * x[i],
                decay * h[i].z + dB[2] * x[i], decay * h[i].w + dB[3] * x[i]};
        y[i] += h[i].x * c[0] + h[i].y * c[1] + h[i].z * c[2] + h[i].w * c[3];
        if (a.hT && p < P) *reinterpret_cast<float4*>(a.hT + base + int64_t{p} * N + n) = h[i];
      }
    }
    for (int i = 0; i < kSsdStepRows; ++i) {
      const int p = first + i * rows;
      for (int d = lanes / 2; d > 0; d /= 2) y[i] += __shfl_xor_sync(~0u, y[i], d);
      if (lane == 0 && p < P)
        a.out[b * a.out_stride + int64_t{head} * P + p] = from_float<T>(y[i] + D * x[i]);
    }
  }
}

// --- launchers

enum class SsdRung { kNaive, kFused, kWarpgroup };

// Was ssd_warpgroup_kernel compiled for this GPU? Its body is empty (a few registers) unless the
// target is sm_90a.
inline bool ssd_has_warpgroups() {
  static const bool has = [] {
    cudaFuncAttributes attributes;
    CUDA_CHECK(cudaFuncGetAttributes(&attributes, ssd_warpgroup_kernel<__nv_bfloat16, 128, true>));
    return attributes.numRegs > 64;
  }();
  return has;
}

// The fastest rung that can do it: tensor-core tiles are 16 (64) rows of a head; copies 16 bytes.
template <class T>
SsdRung ssd_rung(const SsdArgs<T>& a) {
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  if (sizeof(T) != 2 || a.head_dim % 16 || a.d_state % 8 || a.d_state > 256 ||
      (a.x_stride | a.B_stride | a.C_stride | a.out_stride) % 8 || !aligned(a.x) || !aligned(a.B) ||
      !aligned(a.C) || !aligned(a.out))
    return SsdRung::kNaive;
  return a.head_dim % 64 == 0 && a.d_state <= 128 && ssd_has_warpgroups() ? SsdRung::kWarpgroup
                                                                          : SsdRung::kFused;
}

template <class T>
bool ssd_wide(const SsdArgs<T>& a) {  // ssd_fused_kernel with 32 rows to a warp instead of 16
  return a.head_dim % 64 == 0 && a.d_state <= 128;
}

template <class T>
int64_t ssd_blocks(const SsdArgs<T>& a, SsdRung rung) {  // for one segment of each sequence
  const int64_t group_rows = int64_t{a.n_heads} / a.n_groups * a.head_dim;
  const int64_t rows = rung == SsdRung::kWarpgroup ? 64 * kSsdWarpgroups : ssd_wide(a) ? 128 : 64;
  return a.batch * a.n_groups * ceil_div(group_rows, rows);
}

// How many segments? More fill the GPU, but all except the last are walked twice (the first
// time, for the state alone, at kStatePass of the cost), and a launch costs about kLaunch chunks.
template <class T>
SsdSegments ssd_segments(const SsdArgs<T>& a, SsdRung rung) {
  constexpr double kStatePass = 0.35, kLaunch = 2;
  const int64_t at_once = (rung == SsdRung::kWarpgroup ? 1 : 2) * multiprocessors();
  const int64_t chunks = ceil_div(a.L, kSsdChunk), blocks = ssd_blocks(a, rung);
  const auto rounds = [&](int64_t n) { return ceil_div(n, at_once); };
  SsdSegments best{chunks * kSsdChunk, 1, nullptr, nullptr};
  double least = rounds(blocks) * chunks;
  for (int64_t count = 2; count <= chunks && count <= 32; ++count) {
    const int64_t length = ceil_div(chunks, count);
    if ((count - 1) * length >= chunks) continue;
    const double cost = rounds(blocks * count) * (length + 0.1 * count) +
                        rounds(blocks * (count - 1)) * length * kStatePass + kLaunch;
    if (cost < 0.95 * least) least = cost, best.length = length * kSsdChunk, best.count = count;
  }
  return best;
}

template <class T>
size_t ssd_state_bytes(const SsdArgs<T>& a) {
  return sizeof(float) * a.batch * a.n_heads * a.head_dim * a.d_state;
}

// States and decays of all segments but the last, and h0 where hT would overwrite it.
template <class T>
size_t ssd_workspace_bytes(const SsdArgs<T>& a, SsdRung rung) {
  const int64_t count = rung == SsdRung::kNaive ? 1 : ssd_segments(a, rung).count;
  return count == 1
             ? 0
             : count * ssd_state_bytes(a) + (count - 1) * sizeof(float) * a.batch * a.n_heads;
}
template <class T>
size_t ssd_workspace_bytes(const SsdArgs<T>& a) {
  return ssd_workspace_bytes(a, ssd_rung(a));
}

template <class T>
void ssd_launch(void (*kernel)(SsdArgs<T>, SsdSegments), int64_t blocks, int threads, int bytes,
                const SsdArgs<T>& a, const SsdSegments& segments, cudaStream_t stream) {
  CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  kernel<<<blocks, threads, bytes, stream>>>(a, segments);
  CUDA_CHECK(cudaGetLastError());
}

template <bool kOutputs, class T>
void ssd_pass(const SsdArgs<T>& a, SsdRung rung, const SsdSegments& segments, cudaStream_t stream) {
  const int64_t blocks = ssd_blocks(a, rung) * (kOutputs ? segments.count : segments.count - 1);
  const auto fused = [&](auto states, auto row_tiles) {
    constexpr int kStates = decltype(states)::value, kRowTiles = decltype(row_tiles)::value;
    ssd_launch(ssd_fused_kernel<T, kStates, kRowTiles, kOutputs>, blocks, 128,
               SsdTiles<kStates, kRowTiles, kOutputs>::kBytes, a, segments, stream);
  };
  const auto warpgroup = [&](auto states) {
    constexpr int kStates = decltype(states)::value;
    ssd_launch(ssd_warpgroup_kernel<T, kStates, kOutputs>, blocks, 128 * kSsdWarpgroups + 128,
               SsdWarpgroupTiles<kStates, kOutputs>::kBytes, a, segments, stream);
  };
  using std::integral_constant;
  constexpr integral_constant<int, 1> one;
  constexpr integral_constant<int, 2> two;
  constexpr integral_constant<int, 64> n64;
  constexpr integral_constant<int, 128> n128;
  constexpr integral_constant<int, 256> n256;
  if (rung == SsdRung::kWarpgroup) return a.d_state > 64 ? warpgroup(n128) : warpgroup(n64);
  if (a.d_state > 128) return fused(n256, one);
  if (a.d_state > 64) return ssd_wide(a) ? fused(n128, two) : fused(n128, one);
  return ssd_wide(a) ? fused(n64, two) : fused(n64, one);
}

template <class T>
void ssd_naive(const SsdArgs<T>& a, cudaStream_t stream) {
  if (a.d_state > 32 * kSsdNaiveStates)
    fail("ssd: d_state: expected at most ", 32 * kSsdNaiveStates, ", found ", a.d_state);
  const int64_t rows = a.batch * a.n_heads * a.head_dim;
  ssd_naive_kernel<<<(rows + 3) / 4, 128, 0, stream>>>(a);
  CUDA_CHECK(cudaGetLastError());
}

// A tensor-core rung with a split of the caller's: one pass, or states and then outputs.
template <class T>
void ssd_split(SsdArgs<T> a, SsdRung rung, SsdSegments segments, cudaStream_t stream) {
  if (segments.count > 1) {
    const size_t state_bytes = ssd_state_bytes(a);
    segments.state = static_cast<float*>(a.workspace);
    float* h0 = segments.state + (segments.count - 1) * state_bytes / sizeof(float);
    segments.decay = h0 + state_bytes / sizeof(float);
    if (a.h0 && a.h0 == a.hT) {  // early segments still read h0 when hT is written
      CUDA_CHECK(cudaMemcpyAsync(h0, a.h0, state_bytes, cudaMemcpyDeviceToDevice, stream));
      a.h0 = h0;
    }
    ssd_pass<false>(a, rung, segments, stream);
  }
  ssd_pass<true>(a, rung, segments, stream);
}

template <class T>
void ssd(const SsdArgs<T>& a, cudaStream_t stream) {
  if (a.batch == 0 || a.n_heads == 0) return;
  const SsdRung rung = ssd_rung(a);
  if constexpr (sizeof(T) == 2)
    if (rung != SsdRung::kNaive) return ssd_split(a, rung, ssd_segments(a, rung), stream);
  ssd_naive(a, stream);
}

template <class T>
void ssd_step(const SsdArgs<T>& a, cudaStream_t stream) {
  if (a.batch == 0 || a.n_heads == 0) return;
  if (a.d_state % 4 != 0) return ssd_naive(a, stream);
  int lanes = 1;
  while (lanes < 32 && 4 * lanes < a.d_state) lanes *= 2;
  ssd_step_kernel<<<a.batch * a.n_heads, 128, 0, stream>>>(a, lanes);
  CUDA_CHECK(cudaGetLastError());
}

// ---------------------------------------------------------------------------------------
// rms_norm:        residual += x (x optional);  out = residual / rms(residual) * weight
// gated_rms_norm:  v = y * silu(z);             out = v / rms(v over its group) * weight
//                  rms(v) = sqrt(mean(v^2) + eps)
//
// One block per row (per row and group); every thread keeps its own values in shared memory
// between the two passes, so global memory is read and written once, 4 values at a time.
// ---------------------------------------------------------------------------------------

constexpr int kNormThreads = 256;

// Sum over the block, the same bits in every thread on every run.
__device__ inline float block_sum(float v) {
  __shared__ float partial[kNormThreads / 32];
  for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(~0u, v, d);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = v;
  __syncthreads();  // the partial sums before their reads
  v = partial[0];
  for (int i = 1; i < kNormThreads / 32; ++i) v += partial[i];
  return v;
}

template <class T>
struct alignas(4 * sizeof(T)) Four {
  T v[4];
};

template <class T>
__device__ float4 load_four(const T* p) {
  const Four<T> f = *reinterpret_cast<const Four<T>*>(p);
  return {to_float(f.v[0]), to_float(f.v[1]), to_float(f.v[2]), to_float(f.v[3])};
}
template <class T>
__device__ void store_four(T* p, float4 v) {
  *reinterpret_cast<Four<T>*>(p) = {from_float<T>(v.x), from_float<T>(v.y), from_float<T>(v.z),
                                    from_float<T>(v.w)};
}
__device__ inline float sum_of_squares(float4 v) {
  return v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
}

// out (rows, d), from = values in shared memory, 4 a thread as they were written.
template <class T>
__device__ void scale_row(T* out, const float4* from, const float* weight, int d, float scale) {
  for (int i = threadIdx.x; i < d / 4; i += kNormThreads) {
    const float4 v = from[i], w = reinterpret_cast<const float4*>(weight)[i];
    store_four(out + 4 * i,
               {v.x * scale * w.x, v.y * scale * w.y, v.z * scale * w.z, v.w * scale * w.w});
  }
}

template <class In, class T>
__global__ void __launch_bounds__(kNormThreads)
    rms_norm_kernel(float* residual, const In* x, int64_t x_stride, const float* weight, float eps,
                    int d, T* out, int64_t out_stride) {
  extern __shared__ float4 values[];
  const int64_t row = blockIdx.x;
  float sum = 0;
  for (int i = threadIdx.x; i < d / 4; i += kNormThreads) {
    float4* r = reinterpret_cast<float4*>(residual + row * d) + i;
    float4 v = *r;
    if (x) {
      const float4 add = load_four(x + row * x_stride + 4 * i);
      *r = v = {v.x + add.x, v.y + add.y, v.z + add.z, v.w + add.w};
    }
    values[i] = v;
    sum += sum_of_squares(v);
  }
  const float scale = rsqrtf(block_sum(sum) / d + eps);
  scale_row(out + row * out_stride, values, weight, d, scale);
}

template <class In, class T>
__global__ void __launch_bounds__(kNormThreads)
    gated_rms_norm_kernel(const In* y, int64_t y_stride, const T* z, int64_t z_stride,
                          const float* weight, float eps, int group_size, T* out,
                          int64_t out_stride) {
  extern __shared__ float4 values[];
  const int64_t row = blockIdx.x, first = int64_t{blockIdx.y} * group_size;
  const auto silu = [](float v) { return v / (1.f + expf(-v)); };
  float sum = 0;
  for (int i = threadIdx.x; i < group_size / 4; i += kNormThreads) {
    const float4 u = load_four(y + row * y_stride + first + 4 * i);
    const float4 w = load_four(z + row * z_stride + first + 4 * i);
    const float4 v = {u.x * silu(w.x), u.y * silu(w.y), u.z * silu(w.z), u.w * silu(w.w)};
    values[i] = v;
    sum += sum_of_squares(v);
  }
  const float scale = rsqrtf(block_sum(sum) / group_size + eps);
  scale_row(out + row * out_stride + first, values, weight + first, group_size, scale);
}

// residual (rows, d) float32, x (rows, d) or null, out (rows, d).
template <class In, class T>
void rms_norm(float* residual, const In* x, int64_t x_stride, const float* weight, float eps,
              int64_t rows, int d, T* out, int64_t out_stride, cudaStream_t stream) {
  if (d % 4) fail("rms_norm: width: expected a multiple of 4, found ", d);
  if (rows == 0) return;
  rms_norm_kernel<<<rows, kNormThreads, d * sizeof(float), stream>>>(residual, x, x_stride, weight,
                                                                     eps, d, out, out_stride);
  CUDA_CHECK(cudaGetLastError());
}

// y, z, out (rows, d); the mean square is that of each of `groups` equal runs of channels.
template <class In, class T>
void gated_rms_norm(const In* y, int64_t y_stride, const T* z, int64_t z_stride,
                    const float* weight, float eps, int64_t rows, int d, int groups, T* out,
                    int64_t out_stride, cudaStream_t stream) {
  const int group_size = d / groups;
  if (group_size % 4) fail("gated_rms_norm: group: expected a multiple of 4, found ", group_size);
  if (rows == 0) return;
  const dim3 grid(rows, groups);
  gated_rms_norm_kernel<<<grid, kNormThreads, group_size * sizeof(float), stream>>>(
      y, y_stride, z, z_stride, weight, eps, group_size, out, out_stride);
  CUDA_CHECK(cudaGetLastError());
}

// ============================================================================================
// One token: matrix-vector products fused with what stands around them
// ============================================================================================
//
// For a few sequences at a time a layer costs the reading of its weights, if nothing else is in the
// way: four kernels a layer for Mamba, three for Mamba-2, each a product with what precedes and
// follows it, one CUDA graph for the whole token, and every kernel requests its first weights while
// the one before it is still at work (programmatic dependent launch). What a kernel may touch before
// wait_for_previous() are weights, which never change, and what changes once a token: its own states and
// `done`. A token's first kernel starts when all of the token before is done.
//
//   Mamba     linear_step_kernel   residual -> rms_norm, in_proj, causal_conv1d_step, silu -> x, z
//             linear_step_kernel   x -> x_proj -> dt, B, C
//             scan_decode_kernel   dt_proj, selective_scan_step, gate -> y
//             linear_step_kernel   y -> out_proj, added to the residual
//   Mamba-2   linear_step_kernel   residual -> rms_norm, in_proj, causal_conv1d_step, silu -> z x B C dt
//             ssd_decode_kernel    ssd_step, gate -> y (with several groups, its sums of squares)
//             linear_step_kernel   y -> gated_rms_norm, out_proj, added to the residual

// Asks for the cache lines (128 bytes) of p[0, size).
__device__ inline void prefetch_row(const float* p, int64_t size) {
  for (int64_t i = 32 * threadIdx.x; i < size; i += 32 * blockDim.x)
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p + i));
}

constexpr int kMostGroups = 8,
              kMostFewRows = 4;  // of Mamba-2's norm; sequences that count as few

// --- what a product reads: x (batch, cols), n neighbouring columns at a time ---

template <class T>
struct PlainInput {
  const T* x;  // rows `stride` apart
  int64_t stride;
  static constexpr bool kNormed = false;
  template <int n>
  struct Weights {};
  __device__ void ahead() const {}
  __device__ void begin(int, float*) const {}
  template <int n>
  __device__ void weights(int64_t, Weights<n>&) const {}
  template <int n>
  __device__ void load(int b, int64_t column, const Weights<n>&, const float*, float (&to)[n],
                       float&) const {
    unpack(mamba::load<n>(x + b * stride + column, true), to);
  }
  __device__ float scale(float) const { return 1.f; }
};

// rms_norm: W (r * weight / rms) = W (r * weight) / rms, so nobody waits for the sum of squares: each
// warp gathers it on its way along the row, and divides once, at the end.
struct NormedInput {
  const float *residual, *weight;
  int64_t cols;
  float eps;
  static constexpr bool kNormed = true;
  template <int n>
  struct Weights {
    float of[n];
  };
  __device__ void ahead() const { prefetch_row(weight, cols); }
  __device__ void begin(int, float*) const {}
  template <int n>
  __device__ void weights(int64_t column, Weights<n>& w) const {
    unpack(mamba::load<n>(weight + column, true), w.of);
  }
  template <int n>
  __device__ void load(int b, int64_t column, const Weights<n>& w, const float*, float (&to)[n],
                       float& squares) const {
    unpack(mamba::load<n>(residual + b * cols + column, true), to);
#pragma unroll
    for (int k = 0; k < n; ++k) {
      squares = fmaf(to[k], to[k], squares);
      to[k] *= w.of[k];
    }
  }
  __device__ float scale(float squares) const { return rsqrtf(squares / cols + eps); }
};

// gated_rms_norm of g = y silu(z). With one group it is the rms_norm above. With more, a scale belongs to each
// group of columns, and is made before the product from the sums of squares that ssd_decode_kernel left.
struct GatedNormInput {
  const float *g, *squares, *weight;  // (batch, cols), (batch, n_groups slots), (cols)
  int64_t cols;
  int n_groups, slots;  // slots: sums of squares per group
  float eps;
  static constexpr bool kNormed = true;
  template <int n>
  struct Weights {
    float of[n];
  };
  __device__ void ahead() const { prefetch_row(weight, cols); }
  __device__ void begin(int batch, float* scales) const {  // scales[b n_groups + group]
    if (n_groups == 1) return;
    const int lane = threadIdx.x % 32;
    for (int i = threadIdx.x / 32; i < batch * n_groups; i += blockDim.x / 32) {
      float sum = 0.f;
      for (int s = lane; s < slots; s += 32) sum += squares[i * slots + s];
      for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
      if (lane == 0) scales[i] = rsqrtf(sum * n_groups / cols + eps);
    }
    __syncthreads();  // scales are written before anybody reads them
  }
  template <int n>
  __device__ void weights(int64_t column, Weights<n>& w) const {
    unpack(mamba::load<n>(weight + column, true), w.of);
  }
  template <int n>
  __device__ void load(int b, int64_t column, const Weights<n>& w, const float* scales,
                       float (&to)[n], float& squares) const {
    unpack(mamba::load<n>(g + b * cols + column, true), to);
    const int group = int(column) / int(cols / n_groups);  // a piece lies in one
    const float scale = n_groups == 1 ? 1.f : scales[b * n_groups + group];
#pragma unroll
    for (int k = 0; k < n; ++k) {
      squares = fmaf(to[k], to[k], squares);
      to[k] *= w.of[k] * scale;
    }
  }
  __device__ float scale(float squares) const {
    return n_groups == 1 ? rsqrtf(squares / cols + eps) : 1.f;
  }
};

// --- where a product goes: one number, row `row` for sequence b. What it will be combined with is
// requested before the product is made: ahead() before the wait, past() after it. ---

struct PlainOutput {
  float* out;  // (batch, stride)
  int64_t stride;
  struct Operands {};
  __device__ void ahead(int64_t, int, Operands&) const {}
  __device__ void past(int64_t, int, Operands&) const {}
  __device__ void operator()(int64_t row, int b, float v, const Operands&) const {
    out[b * stride + row] = v;
  }
};

struct ResidualOutput {
  float* residual;    // (batch, d_model)
  const float* bias;  // (d_model) or null
  int64_t d_model;
  struct Operands {
    float bias, residual;
  };
  __device__ void ahead(int64_t row, int, Operands& o) const { o.bias = bias ? bias[row] : 0.f; }
  __device__ void past(int64_t row, int b, Operands& o) const {
    o.residual = residual[b * d_model + row];
  }
  __device__ void operator()(int64_t row, int b, float v, const Operands& o) const {
    residual[b * d_model + row] = o.residual + (v + o.bias);
  }
};

// causal_conv1d_step and silu for the rows [first, first + count), as they are for the others.
constexpr int kStepTaps = 4;  // at most; missing ones are zero

template <class T>
struct ConvOutput {
  T* out;    // (batch, stride)
  T* state;  // (batch, width - 1, count)
  const float *bias, *weight,
      *conv_bias;   // (stride) or null; (count, width); (count) or null
  const int* done;  // (batch) or null: where not 0 the state stays
  int64_t stride, first, count;
  int width;
  struct Operands {
    float bias, conv_bias, weight[kStepTaps];  // of the newest input first
    T past[kStepTaps];                         // past[k]: k tokens ago
    int keep;
  };
  __device__ bool passes(int64_t row) const { return row >= first && row < first + count; }
  __device__ void ahead(int64_t row, int b, Operands& o) const {
    o.keep = done ? done[b] : 0;
    o.bias = bias ? bias[row] : 0.f;
    const int64_t d = passes(row) ? row - first : 0;
    o.conv_bias = conv_bias ? conv_bias[d] : 0.f;
    const T* rows = state + b * (width - 1) * count + d;
#pragma unroll
    for (int k = 0; k < kStepTaps; ++k) {
      o.weight[k] = k < width ? weight[d * width + width - 1 - k] : 0.f;
      if (k > 0) o.past[k] = k < width ? rows[(width - 1 - k) * count] : from_float<T>(0.f);
    }
  }
  __device__ void past(int64_t, int, Operands&) const {}
  __device__ void operator()(int64_t row, int b, float v, Operands& o) const {
    v += o.bias;
    if (passes(row)) {
      o.past[0] = from_float<T>(v);
      v = o.conv_bias;
#pragma unroll
      for (int k = kStepTaps - 1; k >= 0; --k) v = fmaf(o.weight[k], to_float(o.past[k]), v);
      v = silu(v);
      T* rows = state + b * (width - 1) * count + row - first;
#pragma unroll
      for (int k = 0; k + 1 < kStepTaps; ++k)
        if (k + 1 < width && !o.keep) rows[(width - 2 - k) * count] = o.past[k];
    }
    out[b * stride + row] = from_float<T>(v);
  }
};

// output(row, b) = W[row] . input(b).  W (rows, cols), cols a multiple of 16 bytes; b < batch <= kBatch.
// `split` warps of a block share a group of kLinearRows rows of W: each lane takes every 32 split-th piece of
// 16 bytes and multiplies in float32. Pieces pass through a ring in shared memory, kLinearDepth of each row in
// flight, across the end of a group too: while its sums are finished the next group's weights arrive. A
// thread reads only what it has copied itself, so none waits for another. x comes through the L1 cache, in
// which all warps of the SM find it.
//
// Where all that a warp has to read fits its ring, nothing is left to stream: such a product is as long as
// its way from the wait to the last store. It takes blocks of 12 warps, over which a row can be split in
// more ways, and no more of the ring than it fills, so that blocks of the next kernel find room beside it.
constexpr int kLinearRows = 4, kLinearDepth = 4;
struct LinearShape {
  int warps, blocks;  // of a block; on an SM at once
};
constexpr LinearShape kBriefShape{12, 2}, kStreamShape{8, 3}, kFewShape{8, 2};

template <int kBatch, int kWarps, int kBlocks, class T, class Input, class Output>
__global__ void __launch_bounds__(32 * kWarps, kBlocks)
    linear_step_kernel(const T* W, int64_t rows, int64_t cols, int batch, int split, Input input,
                       Output output) {
  constexpr int n = 16 / sizeof(T), kSums = kLinearRows * kBatch, kThreads = 32 * kWarps;
  static_assert(kSums <= 32, "a lane finishes one sum");
  __shared__ float scales[kBatch * kMostGroups], partial[kWarps][kSums + kBatch];
  extern __shared__ float4 linear_ring[];  // (kLinearDepth, kLinearRows, kThreads)
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, part = warp % split;
  const int pieces = cols / n, steps = ceil_div(pieces, 32 * split);
  const int groups = ceil_div(rows, kLinearRows), at_once = gridDim.x * (kWarps / split);
  int group = warp / split * gridDim.x + blockIdx.x;  // dealt out to all blocks in turn
  const int rounds = ceil_div(groups, at_once);  // the same for all warps: they meet at barriers
  const auto piece_of = [&](int step) { return (step * split + part) * 32 + lane; };

  const auto place = [&](int slot, int r) {  // of this thread in the ring
    return linear_ring + (slot * kLinearRows + r) * kThreads + threadIdx.x;
  };
  int next_group = group, next_step = 0;
  const auto fetch = [&](int slot) {
    const int piece = piece_of(next_step);
    if (piece < pieces && next_group < groups) {
#pragma unroll
      for (int r = 0; r < kLinearRows; ++r) {
        const int64_t row = min(int64_t(next_group) * kLinearRows + r, rows - 1);
        copy_async(uint32_t(__cvta_generic_to_shared(place(slot, r))),
                   W + row * cols + int64_t(piece) * n, true);
      }
    }
    copy_async_commit();
    if (++next_step == steps) next_step = 0, next_group += at_once;
  };
  // Lane i finishes the sum of row i / kBatch of the group for sequence i % kBatch.
  const int b_mine = lane % kBatch;
  const auto row_mine = [&] { return int64_t(group) * kLinearRows + lane / kBatch; };
  const auto finishes = [&] {
    return part == 0 && lane < kSums && row_mine() < rows && b_mine < batch;
  };

#pragma unroll 1
  for (int slot = 0; slot < kLinearDepth; ++slot) fetch(slot);
  typename Output::Operands operands;
  input.ahead();
  if (finishes()) output.ahead(row_mine(), b_mine, operands);
  launch_next();
  wait_for_previous();
  input.begin(batch, scales);

  int slot = 0;
  for (int round = 0; round < rounds; ++round, group += at_once) {
    if (finishes()) {
      if (round > 0) output.ahead(row_mine(), b_mine, operands);
      output.past(row_mine(), b_mine, operands);
    }
    float sum[kSums] = {}, squares[kBatch] = {};
    for (int step = 0; step < steps; ++step) {
      copy_async_wait_but<kLinearDepth - 1>();
      const int piece = piece_of(step);
      if (piece < pieces && group < groups) {
        typename Input::template Weights<n> weights;
        input.weights(int64_t(piece) * n, weights);
        float w[kLinearRows][n];
#pragma unroll
        for (int r = 0; r < kLinearRows; ++r)
          unpack(*reinterpret_cast<const Vector<T, n>*>(place(slot, r)), w[r]);
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          if (b >= batch) break;
          float x[n];
          input.load(b, int64_t(piece) * n, weights, scales, x, squares[b]);
#pragma unroll
          for (int r = 0; r < kLinearRows; ++r)
#pragma unroll
            for (int k = 0; k < n; ++k)
              sum[r * kBatch + b] = fmaf(w[r][k], x[k], sum[r * kBatch + b]);
        }
      }
      fetch(slot);  // into the place just read
      slot = slot + 1 < kLinearDepth ? slot + 1 : 0;
    }

    float mine = 0.f, my_squares = 0.f;
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      for (int d = 16; d > 0; d /= 2) sum[i] += __shfl_xor_sync(~0u, sum[i], d);
      if (lane == i) mine = sum[i];
    }
    if (Input::kNormed) {
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        for (int d = 16; d > 0; d /= 2) squares[b] += __shfl_xor_sync(~0u, squares[b], d);
        if (b_mine == b) my_squares = squares[b];
      }
    }
    if (split > 1) {
      if (round > 0) __syncthreads();  // the partial sums of the round before have been read
      if (lane < kSums) partial[warp][lane] = mine;
      if (lane < kBatch) partial[warp][kSums + lane] = my_squares;
      __syncthreads();  // partial sums are written before the first warp of each group adds them
#pragma unroll
      for (int p = 1; p < kWarps; ++p) {
        if (part != 0 || p >= split) continue;
        if (lane < kSums) mine += partial[warp + p][lane];
        my_squares += partial[warp + p][kSums + b_mine];
      }
    }
    if (finishes()) output(row_mine(), b_mine, mine * input.scale(my_squares), operands);
  }
}

struct LinearPlan {
  int warps, split, steps, rounds, blocks;
};

// As few steps along a row as the warps that fit the GPU can make of it, and no more warps than that takes;
// as few rounds as fit it, and all of one length. What streams takes as many blocks on every multiprocessor, so
// that all have the same to read.
inline LinearPlan linear_plan(const LinearShape& shape, int64_t groups, int64_t pieces) {
  const int64_t SMs = multiprocessors(), slots = shape.blocks * shape.warps * SMs;
  const auto steps = [&](int split) { return ceil_div(pieces, 32 * split); };
  int split = 1;
  for (int s = 2; s <= shape.warps; ++s)
    if (shape.warps % s == 0 && s * groups <= slots && steps(s) < steps(split)) split = s;
  const int64_t rounds = ceil_div(groups * split, slots), at_once = ceil_div(groups, rounds);
  int64_t blocks = ceil_div(at_once * split, shape.warps);
  if (blocks > SMs && steps(split) * rounds > kLinearDepth) blocks = ceil_div(blocks, SMs) * SMs;
  return {shape.warps, split, int(steps(split)), int(rounds), int(blocks)};
}

template <class T, class Input, class Output>
void linear_step(const T* W, int64_t rows, int64_t cols, int batch, const Input& input,
                 const Output& output, cudaStream_t stream) {
  const int64_t groups = ceil_div(rows, kLinearRows), pieces = cols * sizeof(T) / 16;
  const auto launch = [&](auto* kernel, const LinearPlan& plan) {
    const int slot = kLinearRows * plan.warps * 32 * 16,           // bytes of the ring
        slots = std::min(kLinearDepth, plan.steps * plan.rounds);  // no more are ever filled
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    kLinearDepth * slot));
    launch_early(kernel, dim3(unsigned(plan.blocks)), 32 * plan.warps, slots * slot, stream, W,
                 rows, cols, batch, plan.split, input, output);
  };
  const LinearPlan brief = linear_plan(kBriefShape, groups, pieces);
  if (batch > 1)
    launch(linear_step_kernel<kMostFewRows, kFewShape.warps, kFewShape.blocks, T, Input, Output>,
           linear_plan(kFewShape, groups, pieces));
  else if (brief.steps * brief.rounds > kLinearDepth)
    launch(linear_step_kernel<1, kStreamShape.warps, kStreamShape.blocks, T, Input, Output>,
           linear_plan(kStreamShape, groups, pieces));
  else
    launch(linear_step_kernel<1, kBriefShape.warps, kBriefShape.blocks, T, Input, Output>, brief);
}

// --- Mamba: dt_proj, selective_scan_step and the gate ---

template <class T>
struct ScanDecodeArgs {
  int batch, d_inner, d_state, dt_rank;
  const float* dt_B_C;           // (batch, dt_rank + 2 d_state)
  const T *x, *z, *dt_proj;      // (batch, d_inner) twice, (d_inner, dt_rank)
  int64_t x_stride, z_stride;    // from row to row
  const float *dt_bias, *A, *D;  // (d_inner), (d_inner, d_state), (d_inner)
  float* h;                      // (batch, d_inner, d_state)
  T* out;                        // (batch, d_inner)
  float delta_ratio;
  const int* done;  // (batch) or null: where not 0 the state stays
};

// Four lanes share a channel: each takes every fourth piece of the row of dt_proj and of the states, four
// numbers a piece, both in registers before the wait. dt, B and C pass through shared memory.
// Grid: x = channels in blocks of 32, y = sequences.
constexpr int kScanDecodePieces = 10;           // of dt_proj in registers: dt_rank 160
constexpr int kMostStepInputs = 48 * 1024 / 4;  // numbers of dt, B and C in shared memory

template <class T>
__global__ void __launch_bounds__(128) scan_decode_kernel(ScanDecodeArgs<T> a) {
  const int lane = threadIdx.x % 4, b = blockIdx.y, N = a.d_state;
  const bool exists = blockIdx.x * 32 + threadIdx.x / 4 < a.d_inner;
  const int64_t d = exists ? blockIdx.x * 32 + threadIdx.x / 4 : 0;  // or works in vain
  const int width = a.dt_rank + 2 * N;
  const bool aligned = a.dt_rank % 4 == 0;  // otherwise all of the row is `rest`
  const int pieces = aligned ? min(a.dt_rank / 4, 4 * kScanDecodePieces) : 0, rest = 4 * pieces;
  const T* row = a.dt_proj + d * a.dt_rank;
  const int done = a.done ? a.done[b] : 0;
  float* h = a.h + (int64_t(b) * a.d_inner + d) * N;
  float h_n[4];
  unpack(load<4>(h + 4 * lane, 4 * lane < N), h_n);
  Vector<T, 4> w[kScanDecodePieces];
#pragma unroll
  for (int i = 0; i < kScanDecodePieces; ++i)
    w[i] = load<4>(row + 4 * (4 * i + lane), 4 * i + lane < pieces);
  const float bias = a.dt_bias[d], D = a.D[d];
  float A[4];
  unpack(load<4>(a.A + d * N + 4 * lane, 4 * lane < N), A);
  launch_next();
  wait_for_previous();

  extern __shared__ float dt[];  // (width): dt, B, C
  const float *B = dt + a.dt_rank, *C = B + N;
  const float x = to_float(a.x[int64_t(b) * a.x_stride + d]),
              z = to_float(a.z[int64_t(b) * a.z_stride + d]);
  for (int i = threadIdx.x; i < width; i += blockDim.x) dt[i] = a.dt_B_C[int64_t(b) * width + i];
  __syncthreads();  // dt, B and C are written before anybody reads them

  float delta = 0.f;
#pragma unroll
  for (int i = 0; i < kScanDecodePieces; ++i) {
    const int piece = 4 * i + lane;
    if (piece >= pieces) break;
    float w_i[4];
    unpack(w[i], w_i);
#pragma unroll
    for (int k = 0; k < 4; ++k) delta = fmaf(w_i[k], dt[4 * piece + k], delta);
  }
  for (int k = rest + lane; k < a.dt_rank; k += 4) delta = fmaf(to_float(row[k]), dt[k], delta);
  delta += __shfl_xor_sync(~0u, delta, 1);
  delta += __shfl_xor_sync(~0u, delta, 2);
  delta = a.delta_ratio * softplus(delta + bias);

  float y = 0.f;
  for (int n = 4 * lane; n < N; n += 16) {
    if (n >= 16) unpack(load<4>(h + n, true), h_n);
    if (N > 16) unpack(load<4>(a.A + d * N + n, true), A);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      h_n[k] = fmaf(exp2_approx(delta * (kLog2e * A[k])), h_n[k], delta * x * B[n + k]);
      y = fmaf(C[n + k], h_n[k], y);
    }
    if (exists && !done) store(h + n, pack<float>(h_n));
  }
  y += __shfl_xor_sync(~0u, y, 1);
  y += __shfl_xor_sync(~0u, y, 2);
  if (lane == 0 && exists)
    a.out[b * int64_t(a.d_inner) + d] = from_float<T>(fmaf(D, x, y) * silu(z));
}

template <class T>
void scan_decode(const ScanDecodeArgs<T>& a, cudaStream_t stream) {
  launch_early(scan_decode_kernel<T>, dim3(unsigned(ceil_div(a.d_inner, 32)), unsigned(a.batch)),
               128, int((a.dt_rank + 2 * a.d_state) * sizeof(float)), stream, a);
}

// --- Mamba-2: ssd_step and the gate ---

template <class T>
struct SsdDecodeArgs {
  int batch, n_heads, head_dim, d_state, n_groups;
  const T *z, *x, *dt;  // (batch, d_inner), (batch, conv_width): x B C, (batch, n_heads)
  int64_t z_stride, x_stride, dt_stride;  // from row to row
  const float *A, *D, *dt_bias;           // (n_heads)
  float dt_min, dt_max, delta_ratio;
  float* h;         // (batch, n_heads, head_dim, d_state)
  float* g;         // (batch, d_inner): y silu(z)
  float* squares;   // (batch, blocks of a sequence): sums of g^2, for several groups only
  const int* done;  // (batch) or null: where not 0 the state stays
};

// A block owns kSsdDecodeRows rows (head, p) of one head; a row of h is spread over `lanes` lanes, four
// neighbouring states each, and read, before the wait, and written once. Grid: x = heads times blocks of
// rows, y = batch.
constexpr int kSsdDecodeRows = 16, kSsdDecodeThreads = 256,
              kSsdDecodeFlight = 2;  // rows in flight per lane

template <class T>
__global__ void __launch_bounds__(kSsdDecodeThreads)
    ssd_decode_kernel(SsdDecodeArgs<T> a, int lanes) {
  const int P = a.head_dim, N = a.d_state, d_inner = a.n_heads * P, blocks = gridDim.x / a.n_heads;
  const int head = blockIdx.x / blocks, b = blockIdx.y, group = head / (a.n_heads / a.n_groups);
  const int p0 = blockIdx.x % blocks * kSsdDecodeRows;
  const int lane = threadIdx.x % lanes, step = blockDim.x / lanes,
            rows = min(kSsdDecodeRows, P - p0);
  const float A = a.A[head], D = a.D[head], dt_bias = a.dt_bias[head];
  float* h = a.h + ((int64_t(b) * a.n_heads + head) * P + p0) * N;
  const int done = a.done ? a.done[b] : 0;
  static_assert(kSsdDecodeFlight * kSsdDecodeThreads / 32 >= kSsdDecodeRows,
                "a lane holds all its rows");
  const int first = threadIdx.x / lanes;
  float h_n[kSsdDecodeFlight][4];
  const auto load_h = [&](int n) {
#pragma unroll
    for (int i = 0; i < kSsdDecodeFlight; ++i) {
      const int p = first + i * step;
      unpack(load<4>(h + int64_t(p) * N + n, p < rows && n < N), h_n[i]);
    }
  };
  load_h(4 * lane);
  launch_next();
  wait_for_previous();

  const T *x = a.x + b * a.x_stride, *B = x + d_inner + group * N, *C = B + a.n_groups * N;
  const T *z = a.z + b * a.z_stride, *dt = a.dt + b * a.dt_stride;
  float y[kSsdDecodeFlight] = {}, x_p[kSsdDecodeFlight], z_p[kSsdDecodeFlight];
#pragma unroll
  for (int i = 0; i < kSsdDecodeFlight; ++i) {
    const int p = first + i * step, column = head * P + p0 + p;
    x_p[i] = p < rows ? to_float(x[column]) : 0.f;
    z_p[i] = p < rows ? to_float(z[column]) : 0.f;
  }
  const float delta =
      a.delta_ratio * fminf(fmaxf(softplus(to_float(dt[head]) + dt_bias), a.dt_min), a.dt_max);
  const float decay = exp2_approx(delta * (kLog2e * A));
  for (int n = 4 * lane; n < N; n += 4 * lanes) {
    if (n >= 4 * lanes) load_h(n);
    float B_n[4], C_n[4];
    unpack(load<4>(B + n, true), B_n), unpack(load<4>(C + n, true), C_n);
#pragma unroll
    for (int i = 0; i < kSsdDecodeFlight; ++i) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        h_n[i][k] = fmaf(decay, h_n[i][k], delta * B_n[k] * x_p[i]);
        y[i] = fmaf(C_n[k], h_n[i][k], y[i]);
      }
      const int p = first + i * step;
      if (p < rows && !done) store(h + int64_t(p) * N + n, pack<float>(h_n[i]));
    }
  }
  float squares = 0.f;
#pragma unroll
  for (int i = 0; i < kSsdDecodeFlight; ++i) {
    const int p = first + i * step;
    for (int d = lanes / 2; d > 0; d /= 2) y[i] += __shfl_xor_sync(~0u, y[i], d);
    if (lane != 0 || p >= rows) continue;
    const float g = fmaf(D, x_p[i], y[i]) * silu(z_p[i]);
    a.g[int64_t(b) * d_inner + head * P + p0 + p] = g;
    squares = fmaf(g, g, squares);
  }
  if (a.n_groups == 1) return;  // nobody wants the squares
  __shared__ float partial[kSsdDecodeThreads / 32];
  for (int d = 16; d > 0; d /= 2) squares += __shfl_xor_sync(~0u, squares, d);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = squares;
  __syncthreads();  // the warps' sums are written before they are added
  if (threadIdx.x > 0) return;
  squares = 0.f;
  for (const float of_warp : partial) squares += of_warp;
  a.squares[int64_t(b) * gridDim.x + blockIdx.x] = squares;
}

inline int ssd_decode_blocks(int head_dim) {
  return ceil_div(head_dim, kSsdDecodeRows);
}  // per head

template <class T>
void ssd_decode(const SsdDecodeArgs<T>& a, cudaStream_t stream) {
  int lanes = 1;
  while (lanes < 32 && 4 * lanes < a.d_state) lanes *= 2;
  launch_early(ssd_decode_kernel<T>, dim3(a.n_heads * ssd_decode_blocks(a.head_dim), a.batch),
               kSsdDecodeThreads, 0, stream, a, lanes);
}

// ============================================================================================
// Embedding and sampling
// ============================================================================================

template <class T>  // residual[t] = embedding[ids[t]].  Grid: one block a token
__global__ void embedding_kernel(const T* embedding, const Token* ids, int64_t d_model,
                                 float* residual) {
  const T* row = embedding + ids[blockIdx.x] * d_model;
  for (int64_t i = threadIdx.x; i < d_model; i += blockDim.x)
    residual[blockIdx.x * d_model + i] = to_float(row[i]);
}

// Section 5 of mamba.hpp on the GPU, in double and in its order: best_kernel finds the best id of each
// stretch of them on many multiprocessors, then a block draws the next token of one sequence. Nothing is
// sorted. "The entries that stay, from the best one down, until they make up the limit" is a threshold, and
// the sum above a threshold only grows as it falls: it is found by bisection over the bits of the score.
struct Best {  // of some ids: the largest score and the first id that has it
  double score;
  Token id;
  int wrong;  // a score is no number (NaN or infinite)
};
struct SampleArgs {
  const float* logits;  // (batch, vocab_size)
  int64_t vocab_size, batch;
  double temperature, top_p, min_p, penalty;
  int64_t top_k;
  uint64_t seed;
  const uint64_t* sequence;  // (batch) numbers of the sequences
  uint64_t* position;        // (batch) of the token to be drawn; moves on by one
  int64_t* made;             // (batch) tokens drawn so far
  unsigned char* seen;       // (batch, vocab_size) tokens of the history, or null: no penalty
  double* weights;           // (batch, vocab_size) room for what stays, null if greedy
  Token* candidates;         // (batch, vocab_size) and for its ids
  Best* best;                // (batch, kBestStretches)
  int* done;                 // (batch) set when the stop token was drawn
  Token stop;
  Token* next;  // (batch) the tokens drawn
  Token* log;   // (longest, batch) the same for the host, -1: no number among logits
};

// A logit of sequence b, and what the penalty makes of it.
__device__ inline double score_of(const SampleArgs& a, int64_t b, int64_t id) {
  const double s = a.logits[b * a.vocab_size + id];
  if (!a.seen || !a.seen[b * a.vocab_size + id]) return s;
  return s < 0 ? s * a.penalty : s / a.penalty;
}

constexpr int kSampleThreads = 1024, kSampleWarps = kSampleThreads / 32;

template <class V>
__device__ inline V warp_sum(V v) {
  for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(~0u, v, d);
  return v;
}
template <int n>  // the sums over all threads: the same bits in all of them, on every run
__device__ inline void sample_sums(double (&v)[n]) {
  __shared__ double partial[n][kSampleWarps];
#pragma unroll
  for (int j = 0; j < n; ++j) v[j] = warp_sum(v[j]);
  __syncthreads();  // the sums of the call before have been read
#pragma unroll
  for (int j = 0; j < n; ++j)
    if (threadIdx.x % 32 == 0) partial[j][threadIdx.x / 32] = v[j];
  __syncthreads();  // the warps' sums are written before they are added
#pragma unroll
  for (int j = 0; j < n; ++j) v[j] = warp_sum(partial[j][threadIdx.x % 32]);
}
__device__ inline double sample_sum(double v) {
  double sums[1] = {v};
  sample_sums(sums);
  return sums[0];
}

// Unsigned integers in the order of the doubles.
__device__ inline uint64_t order_key(double v) {
  const uint64_t bits = __double_as_longlong(v);
  return bits >> 63 ? ~bits : bits | 1ull << 63;
}

// The least key from low to high with: the sum of weight(i) over all i < count with key(i) > it is below
// limit. Every pass divides the range by eight.
template <class Key, class Weight>
__device__ inline uint64_t least_key(int64_t count, double limit, uint64_t low, uint64_t high,
                                     const Key& key, const Weight& weight) {
  constexpr int kCuts = 7;
  while (low < high) {
    const uint64_t step = (high - low) / (kCuts + 1);
    double above[kCuts] = {};
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < count; i += kSampleThreads) {
      const uint64_t key_i = key(i);
      const double w = weight(i);
#pragma unroll
      for (int j = 0; j < kCuts; ++j) above[j] += key_i > low + (j + 1) * step ? w : 0.;
    }
    sample_sums(above);
    // The sums fall from cut to cut: the answer is at most the first cut whose sum is below the limit.
    int cut = 0;
#pragma unroll
    for (int j = 0; j < kCuts; ++j) cut += !(above[j] < limit);
    const uint64_t from = low;
    if (cut < kCuts) high = from + (cut + 1) * step;
    if (cut > 0) low = from + cut * step + 1;
  }
  return low;
}

// uniform() of mamba.hpp: 53 bits of the Philox4x32-10 block of (position, sequence) under seed.
__device__ inline double draw_uniform(uint64_t seed, uint64_t sequence, uint64_t position) {
  uint32_t c[4] = {uint32_t(position), uint32_t(position >> 32), uint32_t(sequence),
                   uint32_t(sequence >> 32)};
  uint32_t key[2] = {uint32_t(seed), uint32_t(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = 0xD2511F53ull * c[0], p1 = 0xCD9E8D57ull * c[2];
    c[0] = uint32_t(p1 >> 32) ^ c[1] ^ key[0], c[1] = uint32_t(p1);
    c[2] = uint32_t(p0 >> 32) ^ c[3] ^ key[1], c[3] = uint32_t(p0);
    key[0] += 0x9E3779B9u, key[1] += 0xBB67AE85u;
  }
  return double((uint64_t{c[1]} << 32 | c[0]) >> 11) * 0x1p-53;
}

__device__ inline Best warp_best(Best best) {
  for (int d = 16; d > 0; d /= 2) {
    const double score = __shfl_xor_sync(~0u, best.score, d);
    const Token id = __shfl_xor_sync(~0u, best.id, d);
    best.wrong |= __shfl_xor_sync(~0u, best.wrong, d);
    if (score > best.score || (score == best.score && id < best.id))
      best.score = score, best.id = id;
  }
  return best;
}

// The best of each stretch of ids. Grid: x = stretches, y = sequences. static: as sample_kernel.
constexpr int kBestStretches = 32;  // a lane each
static __global__ void __launch_bounds__(kSampleThreads) best_kernel(SampleArgs a) {
  launch_next();
  wait_for_previous();
  const int64_t b = blockIdx.y, V = a.vocab_size, stretch = ceil_div(V, kBestStretches),
                end = min(V, (blockIdx.x + 1) * stretch);
  Best best{-INFINITY, 0, 0};
#pragma unroll 2
  for (int64_t i = blockIdx.x * stretch + threadIdx.x; i < end; i += kSampleThreads) {
    const double s = score_of(a, b, i);
    if (!(s < INFINITY)) best.wrong = 1;
    if (s > best.score) best.score = s, best.id = Token(i);
  }
  __shared__ Best of_warp[kSampleWarps];
  best = warp_best(best);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = best;
  __syncthreads();  // the warps' best are written before they are read
  if (threadIdx.x >= 32) return;
  best = warp_best(of_warp[threadIdx.x]);
  if (threadIdx.x == 0) a.best[b * kBestStretches + blockIdx.x] = best;
}

// Draws from what temperature, top-k, top-p and min-p leave of the distribution; best: its best token.
template <class Score>
__device__ inline Token draw(const SampleArgs& a, int64_t b, Token best, const Score& score) {
  const int64_t V = a.vocab_size;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  double* weights = a.weights + b * V;
  Token* candidates = a.candidates + b * V;
  const auto score_key = [&](int64_t id) { return order_key(score(id)); };
  const auto one = [](int64_t) { return 1.; };
  const uint64_t least_score =
      a.top_k > 0 && a.top_k < V ? least_key(V, a.top_k, 0, order_key(score(best)), score_key, one)
                                 : 0;

  const double largest = score(best);
  const auto weight = [&](int64_t id) {
    const double s = score(id);
    return order_key(s) < least_score ? 0. : exp(fmax((s - largest) / a.temperature, -700.));
  };
  // Each warp looks through its own stretch of ids, so that candidates keep the order of ids.
  const int64_t stretch = ceil_div(V, kSampleWarps);
  const int64_t begin = min(V, warp * stretch), end = min(V, begin + stretch);
  double total = 0.;
  for (int64_t i = begin + lane; i < end; i += 32) total += weights[i] = weight(i);
  total = sample_sum(total);

  // Weights below this go whatever the order: all of them together are below 1 - top_p.
  const double certain = a.top_p < 1 ? (1 - a.top_p) * total / double(V) : 0.;
  const auto may_stay = [&](int64_t i) { return i < end && weights[i] >= fmax(certain, 1e-300); };
  __shared__ int64_t counts[kSampleWarps];
  int64_t count = 0;
  for (int64_t i = begin; i < end; i += 32) count += __popc(__ballot_sync(~0u, may_stay(i + lane)));
  if (lane == 0) counts[warp] = count;
  __syncthreads();  // counts are written before they are added
  int64_t first = 0;
  count = 0;
  for (int w = 0; w < kSampleWarps; ++w) first += w < warp ? counts[w] : 0, count += counts[w];
  for (int64_t i = begin; i < end; i += 32) {
    const bool stays = may_stay(i + lane);
    const unsigned staying = __ballot_sync(~0u, stays);
    if (stays) candidates[first + __popc(staying & ((1u << lane) - 1))] = Token(i + lane);
    first += __popc(staying);
  }
  __syncthreads();  // candidates are written before others read them

  if (a.top_p < 1) {
    const double limit = a.top_p * total;
    const auto weight_of = [&](int64_t i) { return weights[candidates[i]]; };
    const uint64_t least = least_key(
        count, limit, 0, order_key(largest), [&](int64_t i) { return score_key(candidates[i]); },
        weight_of);
    // Of equal scores the higher ids stay: where there are such, the same search among them, by id.
    double sums[2] = {};  // of weights above, and the number of equals
    for (int64_t i = threadIdx.x; i < count; i += kSampleThreads) {
      const uint64_t key = score_key(candidates[i]);
      sums[0] += key > least ? weight_of(i) : 0.;
      sums[1] += key == least ? 1. : 0.;
    }
    sample_sums(sums);
    const uint64_t least_id =
        sums[1] < 2
            ? 0
            : least_key(
                  count, limit - sums[0], 0, uint64_t(V),
                  [&](int64_t i) { return uint64_t(candidates[i]); },
                  [&](int64_t i) { return score_key(candidates[i]) == least ? weight_of(i) : 0.; });
    __syncthreads();  // all weights have been read before some are erased
    for (int64_t i = threadIdx.x; i < count; i += kSampleThreads) {
      const uint64_t key = score_key(candidates[i]);
      if (key < least || (key == least && uint64_t(candidates[i]) < least_id))
        weights[candidates[i]] = 0.;
    }
    __syncthreads();  // weights are erased before they are added
  }
  const auto kept = [&](int64_t i) {
    const double w = i < count ? weights[candidates[i]] : 0.;
    return w < fmax(a.min_p, 1e-300) ? 0. : w;
  };

  // The first candidate, in order of ids, at which the sum exceeds u; or the last one with a weight.
  __shared__ double sums[kSampleWarps];
  __shared__ Token drawn;
  const int64_t share = ceil_div(count, kSampleThreads) * 32;  // of a warp
  double sum = 0.;
  for (int64_t i = warp * share + lane; i < min(count, (warp + 1) * share); i += 32) sum += kept(i);
  sum = warp_sum(sum);
  if (lane == 0) sums[warp] = sum;
  __syncthreads();  // the warps' sums are written before they are read
  if (warp == 0) {
    double all = 0., before = 0.;
    for (int w = 0; w < kSampleWarps; ++w) all += sums[w];
    const double u = draw_uniform(a.seed, a.sequence[b], a.position[b]) * all;
    int w = 0;
    while (w + 1 < kSampleWarps && before + sums[w] <= u) before += sums[w++];
    Token token = best;
    for (int64_t i = w * share; i < count; i += 32) {
      const double w_i = kept(i + lane);
      double upto = w_i;  // sum over the lanes up to this one
      for (int d = 1; d < 32; d *= 2) {
        const double left = __shfl_up_sync(~0u, upto, d);
        if (lane >= d) upto += left;
      }
      const unsigned any = __ballot_sync(~0u, w_i > 0.),
                     past = __ballot_sync(~0u, w_i > 0. && before + upto > u);
      if (any) token = candidates[i + (past ? __ffs(past) - 1 : 31 - __clz(any))];
      if (past) break;
      before += __shfl_sync(~0u, upto, 31);
    }
    if (lane == 0) drawn = token;
  }
  __syncthreads();  // the token is written before it is read
  return drawn;
}

// A matrix whose type is known only at run time: not a reason to compile the sampler three times.
struct StoredMatrix {
  const void* data;
  DType dtype;
  __device__ float operator[](int64_t i) const {
    if (dtype == DType::BF16) return to_float(static_cast<const __nv_bfloat16*>(data)[i]);
    if (dtype == DType::F16) return to_float(static_cast<const __half*>(data)[i]);
    return static_cast<const float*>(data)[i];
  }
};

// Draws the next token, notes it, and looks up its embedding for the next step. Grid: one block a sequence.
// static: it is no template, and several tests include this file.
static __global__ void __launch_bounds__(kSampleThreads)
    sample_kernel(SampleArgs a, StoredMatrix embedding, int64_t d_model, float* residual) {
  launch_next();
  wait_for_previous();
  const int64_t b = blockIdx.x, V = a.vocab_size;
  unsigned char* seen = a.seen ? a.seen + b * V : nullptr;
  const auto score = [&](int64_t id) { return score_of(a, b, id); };
  const Best best = warp_best(a.best[b * kBestStretches + threadIdx.x % 32]);
  if (a.done[b]) return;
  Token token = best.wrong || best.score == -INFINITY ? -1 : best.id;
  if (token >= 0 && a.temperature > 0) token = draw(a, b, token, score);
  __syncthreads();  // all have read seen, made and position before they change
  if (threadIdx.x == 0) {
    a.next[b] = token;
    a.log[a.made[b] * a.batch + b] = token;
    a.made[b] += 1;
    a.position[b] += 1;
    if (seen && token >= 0) seen[token] = 1;
    if (token == a.stop || token < 0) a.done[b] = 1;
  }
  const int64_t row = int64_t(max(token, 0)) * d_model;
  for (int64_t i = threadIdx.x; i < d_model; i += kSampleThreads)
    residual[b * d_model + i] = embedding[row + i];
}

// embedding (vocab_size, d_model), residual (batch, d_model).
inline void sample_step(const SampleArgs& a, const StoredMatrix& embedding, int64_t d_model,
                        float* residual, cudaStream_t stream) {
  launch_early(best_kernel, dim3(kBestStretches, unsigned(a.batch)), kSampleThreads, 0, stream, a);
  launch_early(sample_kernel, dim3(unsigned(a.batch)), kSampleThreads, 0, stream, a, embedding,
               d_model, residual);
}

// ============================================================================================
// The model on the GPU
// ============================================================================================

// A (rows, cols) matrix of weights as stored.
struct DeviceMatrix {
  int64_t rows = 0, cols = 0;
  DeviceBuffer<std::byte> bytes;
  template <class T>
  const T* as() const {
    return reinterpret_cast<const T*>(bytes.data());
  }
};
struct DeviceRow : DeviceBuffer<float> {  // a weight per channel, or conv1d's (conv_width, d_conv)
  using DeviceBuffer<float>::operator=;
};
struct DeviceStateMatrix : DeviceBuffer<float> {  // A (d_inner, d_state), row by row
  using DeviceBuffer<float>::operator=;
};

// The members of ssm::Layer and ssm::Model, which for_each_weight names and load_model fills.
struct DeviceLayer {
  DeviceRow norm;
  DeviceMatrix in_proj;
  DeviceRow in_proj_bias, conv_weight, conv_bias;
  DeviceMatrix x_proj, dt_proj;
  DeviceRow dt_bias;
  DeviceStateMatrix A;
  DeviceRow D, gated_norm;
  DeviceMatrix out_proj;
  DeviceRow out_proj_bias;
};
struct DeviceModel {
  ssm::Sizes sizes;
  DeviceMatrix embedding;
  std::vector<DeviceLayer> layers;
  DeviceRow norm_f;
  DeviceMatrix lm_head;
  bool tied = true;
};

inline void assign(const Tensor& tensor, std::optional<DType> storage, DeviceMatrix& matrix) {
  const Tensor stored = tensor.dtype == *storage ? tensor : to_dtype(tensor, *storage);
  matrix.rows = tensor.shape[0], matrix.cols = tensor.shape[1];
  matrix.bytes = {static_cast<const std::byte*>(stored.data), stored.bytes().size()};
}
inline void assign(const Tensor& tensor, std::optional<DType> storage, DeviceRow& row) {
  ssm::Row<float> host;
  assign(tensor, storage, host);
  row = DeviceBuffer<float>(host.data(), static_cast<size_t>(host.size()));
}
inline void assign(const Tensor& A_log, std::optional<DType> storage, DeviceStateMatrix& A) {
  ssm::StateMatrix<float> columns;
  assign(A_log, storage, columns);
  const Matrix<float> rows = columns;
  A = DeviceBuffer<float>(rows.data(), static_cast<size_t>(rows.size()));
}

// Calls f with a null pointer to the type of the weights.
template <class Function>
void with_type(DType dtype, const Function& f) {
  switch (dtype) {
    case DType::F32:
      return f(static_cast<float*>(nullptr));
    case DType::BF16:
      return f(static_cast<__nv_bfloat16*>(nullptr));
    case DType::F16:
      return f(static_cast<__half*>(nullptr));
    default:
      fail("weights: expected f32, bf16 or f16");
  }
}

// What is remembered of `batch` texts, in the order in which the kernels read it:
// conv (n_layer, batch, d_conv - 1, conv_width) as stored, h (n_layer, batch, d_inner, d_state).
struct DeviceState {
  int64_t batch = 0;
  DeviceBuffer<std::byte> conv;
  DeviceBuffer<float> h;
  DeviceState() = default;
  DeviceState(const Config& c, DType dtype, int64_t batch)
      : batch(batch),
        conv(dtype_size(dtype) * c.n_layer * batch * (c.d_conv - 1) * c.conv_width()),
        h(c.n_layer * batch * c.d_inner * c.d_state) {
    conv.zero();
    h.zero();
  }
  template <class T>
  T* layer_conv(const Config& c, Index l) const {
    return reinterpret_cast<T*>(conv.data()) + l * batch * (c.d_conv - 1) * c.conv_width();
  }
  float* layer_h(const Config& c, Index l) const {
    return h.data() + l * batch * c.d_inner * c.d_state;
  }
};

template <class T>  // x (L, d) += bias (d).  One thread a number.
__global__ void add_bias_kernel(T* x, const float* bias, int64_t L, int64_t d) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < L * d) x[i] = from_float<T>(to_float(x[i]) + bias[i % d]);
}
template <class T>
void add_bias(T* x, const DeviceRow& bias, int64_t L, int64_t d, cudaStream_t stream) {
  if (bias.size() == 0 || L == 0) return;
  add_bias_kernel<<<ceil_div(L * d, 256), 256, 0, stream>>>(x, bias.data(), L, d);
  CUDA_CHECK(cudaGetLastError());
}

template <class T>
constexpr cudaDataType_t kCudaType = CUDA_R_32F;
template <>
constexpr cudaDataType_t kCudaType<__nv_bfloat16> = CUDA_R_16BF;
template <>
constexpr cudaDataType_t kCudaType<__half> = CUDA_R_16F;

// The stream that all work goes to, and cuBLAS on it.
class Queue {
 public:
  Queue() : workspace_(size_t{32} << 20) {
    CUDA_CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    CUBLAS_CHECK(cublasCreate(&cublas_));
    CUBLAS_CHECK(cublasSetStream(cublas_, stream_));
    CUBLAS_CHECK(cublasSetWorkspace(cublas_, workspace_.data(), workspace_.bytes()));
    CUBLAS_CHECK(cublasSetMathMode(  // sums stay float32, and float32 is not cut down to TF32
        cublas_,
        cublasMath_t(CUBLAS_DEFAULT_MATH | CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION)));
  }
  Queue(const Queue&) = delete;
  Queue& operator=(const Queue&) = delete;
  ~Queue() {
    cublasDestroy(cublas_);
    cudaStreamDestroy(stream_);
  }
  cudaStream_t stream() const { return stream_; }
  void wait() const { CUDA_CHECK(cudaStreamSynchronize(stream_)); }

  // y = x W^T + beta y.  x (L, cols), W (rows, cols), y (L, rows), rows of x and y so far apart.
  template <class T, class Out>
  void linear(const T* x, int64_t L, int64_t x_stride, const T* W, int64_t rows, int64_t cols,
              Out* y, int64_t y_stride, float beta = 0.f) const {
    const float one = 1.f;
    if (L == 0) return;
    CUBLAS_CHECK(cublasGemmEx(cublas_, CUBLAS_OP_T, CUBLAS_OP_N, int(rows), int(L), int(cols), &one,
                              W, kCudaType<T>, int(cols), x, kCudaType<T>, int(x_stride), &beta, y,
                              kCudaType<Out>, int(y_stride), CUBLAS_COMPUTE_32F,
                              CUBLAS_GEMM_DEFAULT));
  }

 private:
  cudaStream_t stream_ = nullptr;
  cublasHandle_t cublas_ = nullptr;
  DeviceBuffer<std::byte> workspace_;
};

// Room for what one layer hands from operation to operation, `rows` tokens at once.
template <class T>
struct Activations {
  float* residual;  // (rows, d_model)
  T* u;             // (rows, d_model)     rms_norm of it
  T* projected;     // (rows, in_proj_width)  Mamba: x z;  Mamba-2: z x B C dt
  T* x;             // (rows, conv_width)  Mamba: x;  Mamba-2: x B C
  T *dt_B_C, *delta,
      *y;  // (rows, dt_rank + 2 d_state), (rows, d_inner) twice; normed: in delta
  float *dt_B_C_step = nullptr, *g = nullptr,
        *squares = nullptr;  // where few sequences take one token

  Activations(const Config& c, int64_t rows, DeviceBuffer<std::byte>& room) {
    size_t used = 0;
    for (const bool measure : {true, false}) {
      used = 0;
      const auto take = [&](auto*& p, int64_t per_row) {
        using Number = std::remove_reference_t<decltype(*p)>;
        p = measure ? nullptr : reinterpret_cast<Number*>(room.data() + used);
        used += (sizeof(Number) * rows * per_row + 255) / 256 * 256;
      };
      take(residual, c.d_model);
      take(u, c.d_model);
      take(projected, c.in_proj_width());
      take(x, c.conv_width());
      take(dt_B_C, c.dt_rank + 2 * c.d_state);
      take(delta, c.d_inner);
      take(y, c.d_inner);
      if (rows <= kMostFewRows) {
        take(dt_B_C_step, c.dt_rank + 2 * c.d_state);
        take(g, c.d_inner);
        take(squares, c.n_heads * ssd_decode_blocks(std::max<Index>(1, c.head_dim)));
      }
      if (measure) room.grow(used);
    }
  }
};

// All operations of ssm_reference.hpp's blocks and model, on the GPU. T: what matrices are stored in,
// and what is handed from operation to operation; the residual stream and the states are float32.
template <class T>
struct Compute {
  const Config& config;
  const DeviceModel& model;
  Queue& queue;
  DeviceBuffer<std::byte>&activation_room, &scan_room;
  float delta_ratio;

  const T* head() const { return (model.tied ? model.embedding : model.lm_head).template as<T>(); }

  void linear(const T* x, int64_t L, int64_t x_stride, const DeviceMatrix& W, T* y) const {
    queue.linear(x, L, x_stride, W.as<T>(), W.rows, W.cols, y, W.rows);
  }
  void rms_norm(const Activations<T>& a, const DeviceRow& weight, int64_t L) const {
    mamba::rms_norm<T, T>(a.residual, nullptr, 0, weight.data(), float(config.norm_eps), L,
                          int(config.d_model), a.u, config.d_model, queue.stream());
  }
  void add_out_proj(const Activations<T>& a, const DeviceLayer& w, const T* y, int64_t L) const {
    queue.linear(y, L, config.d_inner, w.out_proj.as<T>(), config.d_model, config.d_inner,
                 a.residual, config.d_model, 1.f);
    add_bias(a.residual, w.out_proj_bias, L, config.d_model, queue.stream());
  }

  ConvArgs<T> conv_args(const Activations<T>& a, const DeviceLayer& w, int64_t first,
                        T* state) const {
    ConvArgs<T> conv;
    conv.d = config.conv_width(), conv.width = int(config.d_conv);
    conv.x = a.projected + first, conv.x_stride = config.in_proj_width();
    conv.weight = w.conv_weight.data(), conv.bias = w.conv_bias.data();
    conv.state = state, conv.state_out = state;
    conv.out = a.x, conv.out_stride = config.conv_width();
    return conv;
  }

  ScanArgs<T> scan_args(const Activations<T>& a, const DeviceLayer& w, float* h) const {
    ScanArgs<T> scan;
    scan.d_inner = config.d_inner, scan.d_state = config.d_state;
    scan.x = a.x, scan.x_stride = config.d_inner;
    scan.delta = a.delta, scan.delta_stride = config.d_inner;
    scan.A = w.A.data(), scan.D = w.D.data(), scan.delta_bias = w.dt_bias.data();
    scan.B = a.dt_B_C + config.dt_rank, scan.C = scan.B + config.d_state;
    scan.B_stride = scan.C_stride = config.dt_rank + 2 * config.d_state;
    scan.z = a.projected + config.d_inner, scan.z_stride = config.in_proj_width();
    scan.h0 = h, scan.hT = h;
    scan.out = a.y, scan.out_stride = config.d_inner;
    scan.delta_ratio = delta_ratio;
    return scan;
  }

  SsdArgs<T> ssd_args(const Activations<T>& a, const DeviceLayer& w, float* h) const {
    const int64_t GN = config.n_groups * config.d_state;
    SsdArgs<T> in;
    in.n_heads = int(config.n_heads), in.head_dim = int(config.head_dim),
    in.d_state = int(config.d_state);
    in.n_groups = int(config.n_groups);
    in.x = a.x, in.B = a.x + config.d_inner, in.C = in.B + GN;
    in.x_stride = in.B_stride = in.C_stride = config.conv_width();
    in.dt = a.projected + config.d_inner + config.conv_width(),
    in.dt_stride = config.in_proj_width();
    in.A = w.A.data(), in.D = w.D.data(), in.dt_bias = w.dt_bias.data();
    in.dt_min = float(config.dt_min), in.dt_max = float(config.dt_max);
    in.h0 = h, in.hT = h;
    in.out = a.y, in.out_stride = config.d_inner;
    in.delta_ratio = delta_ratio;
    return in;
  }

  // x: after the convolution, its rows x_stride apart.
  ScanDecodeArgs<T> scan_decode_args(const Activations<T>& a, const DeviceLayer& w, int batch,
                                     const T* x, int64_t x_stride, float* h,
                                     const int* done) const {
    return {batch,
            int(config.d_inner),
            int(config.d_state),
            int(config.dt_rank),
            a.dt_B_C_step,
            x,
            a.projected + config.d_inner,
            w.dt_proj.as<T>(),
            x_stride,
            config.in_proj_width(),
            w.dt_bias.data(),
            w.A.data(),
            w.D.data(),
            h,
            a.y,
            delta_ratio,
            done};
  }
  SsdDecodeArgs<T> ssd_decode_args(const Activations<T>& a, const DeviceLayer& w, int batch,
                                   const T* x, int64_t x_stride, float* h, const int* done) const {
    const Config& c = config;
    const int64_t width = c.in_proj_width();
    return {batch,
            int(c.n_heads),
            int(c.head_dim),
            int(c.d_state),
            int(c.n_groups),
            a.projected,
            x,
            a.projected + width - c.n_heads,
            width,
            x_stride,
            width,
            w.A.data(),
            w.D.data(),
            w.dt_bias.data(),
            float(c.dt_min),
            float(c.dt_max),
            delta_ratio,
            h,
            a.g,
            a.squares,
            done};
  }

  // residual += the Mamba block of rms_norm(residual), for `batch` sequences of L tokens each. step: L is
  // 1, and the step functions do it; done as in ConvArgs.
  void mamba_block(const DeviceLayer& w, const Activations<T>& a, int64_t batch, int64_t L,
                   T* conv_state, float* h, bool step, const int* done) const {
    const int64_t rows = batch * L;
    rms_norm(a, w.norm, rows);
    linear(a.u, rows, config.d_model, w.in_proj, a.projected);
    add_bias(a.projected, w.in_proj_bias, rows, config.in_proj_width(), queue.stream());
    ConvArgs<T> conv = conv_args(a, w, 0, conv_state);
    conv.batch = batch, conv.L = L, conv.done = done;
    step ? causal_conv1d_step(conv, queue.stream()) : causal_conv1d(conv, queue.stream());
    linear(a.x, rows, config.d_inner, w.x_proj, a.dt_B_C);
    linear(a.dt_B_C, rows, config.dt_rank + 2 * config.d_state, w.dt_proj, a.delta);
    ScanArgs<T> scan = scan_args(a, w, h);
    scan.batch = batch, scan.L = L, scan.done = done;
    scan_room.grow(step ? 0 : selective_scan_workspace(scan));
    step ? selective_scan_step(scan, queue.stream())
         : selective_scan(scan, reinterpret_cast<float*>(scan_room.data()), queue.stream());
    add_out_proj(a, w, a.y, rows);
  }

  // The same for Mamba-2.
  void mamba2_block(const DeviceLayer& w, const Activations<T>& a, int64_t batch, int64_t L,
                    T* conv_state, float* h, bool step, const int* done) const {
    const int64_t rows = batch * L;
    rms_norm(a, w.norm, rows);
    linear(a.u, rows, config.d_model, w.in_proj, a.projected);
    add_bias(a.projected, w.in_proj_bias, rows, config.in_proj_width(), queue.stream());
    ConvArgs<T> conv = conv_args(a, w, config.d_inner, conv_state);
    conv.batch = batch, conv.L = L, conv.done = done;
    step ? causal_conv1d_step(conv, queue.stream()) : causal_conv1d(conv, queue.stream());
    SsdArgs<T> in = ssd_args(a, w, h);
    in.batch = batch, in.L = L, in.done = done;
    scan_room.grow(step ? 0 : ssd_workspace_bytes(in));
    in.workspace = scan_room.data();
    step ? ssd_step(in, queue.stream()) : ssd(in, queue.stream());
    gated_rms_norm(a.y, config.d_inner, a.projected, config.in_proj_width(), w.gated_norm.data(),
                   float(config.norm_eps), rows, int(config.d_inner), int(config.n_groups), a.delta,
                   config.d_inner, queue.stream());
    add_out_proj(a, w, a.delta, rows);
  }

  // ids (L), on the GPU -> a.residual after all layers; `state` advances by L tokens.
  Activations<T> backbone(const Token* ids, int64_t L, DeviceState& state) const {
    const Activations<T> a(config, L, activation_room);
    embedding_kernel<<<unsigned(L), 256, 0, queue.stream()>>>(model.embedding.as<T>(), ids,
                                                              config.d_model, a.residual);
    CUDA_CHECK(cudaGetLastError());
    for (Index l = 0; l < config.n_layer; ++l) {
      const auto block = config.version == 1 ? &Compute::mamba_block : &Compute::mamba2_block;
      (this->*block)(model.layers[l], a, 1, L, state.layer_conv<T>(config, l),
                     state.layer_h(config, l), false, nullptr);
    }
    return a;
  }

  // rows [first, first + count) of a.residual -> logits (count, vocab_size); a.u is overwritten.
  void lm_head(const Activations<T>& a, int64_t first, int64_t count, float* logits) const {
    Activations<T> rows = a;
    rows.residual += first * config.d_model;
    rms_norm(rows, model.norm_f, count);
    queue.linear(a.u, count, config.d_model, head(), config.vocab_size, config.d_model, logits,
                 config.vocab_size);
  }

  // Can the fused kernels take this batch? They read rows of matrices 16 bytes at a time, B and C four numbers.
  bool takes_few(int64_t batch) const {
    const int64_t n = 16 / sizeof(T);
    return batch <= kMostFewRows && config.d_model % n == 0 && config.d_inner % n == 0 &&
           config.d_state % 4 == 0 && config.n_groups <= kMostGroups &&
           (batch == 1 || config.in_proj_width() % 4 == 0) &&
           config.d_inner / config.n_groups % n == 0 && config.d_conv <= kStepTaps &&
           config.dt_rank + 2 * config.d_state <= kMostStepInputs;
  }

  // One token for every sequence of `state`: a.residual holds their embeddings -> logits (batch, vocab_size).
  void step(const Activations<T>& a, DeviceState& state, const int* done, float* logits) const {
    if (takes_few(state.batch)) return step_few(a, state, done, logits);
    for (Index l = 0; l < config.n_layer; ++l) {
      const auto block = config.version == 1 ? &Compute::mamba_block : &Compute::mamba2_block;
      (this->*block)(model.layers[l], a, state.batch, 1, state.layer_conv<T>(config, l),
                     state.layer_h(config, l), true, done);
    }
    lm_head(a, 0, state.batch, logits);
  }

  // The same by the fused kernels.
  void step_few(const Activations<T>& a, DeviceState& state, const int* done, float* logits) const {
    const Config& c = config;
    const int batch = int(state.batch);
    const cudaStream_t stream = queue.stream();
    const float eps = float(c.norm_eps);
    for (Index l = 0; l < c.n_layer; ++l) {
      const DeviceLayer& w = model.layers[l];
      const NormedInput u{a.residual, w.norm.data(), c.d_model, eps};
      const ResidualOutput residual{a.residual, w.out_proj_bias.data(), c.d_model};
      const ConvOutput<T> projected{a.projected,           state.layer_conv<T>(c, l),
                                    w.in_proj_bias.data(), w.conv_weight.data(),
                                    w.conv_bias.data(),    done,
                                    c.in_proj_width(),     c.version == 1 ? 0 : c.d_inner,
                                    c.conv_width(),        int(c.d_conv)};
      linear_step(w.in_proj.as<T>(), c.in_proj_width(), c.d_model, batch, u, projected, stream);
      if (c.version == 1) {
        const int64_t width = c.dt_rank + 2 * c.d_state;
        linear_step(w.x_proj.as<T>(), width, c.d_inner, batch,
                    PlainInput<T>{a.projected, c.in_proj_width()},
                    PlainOutput{a.dt_B_C_step, width}, stream);
        scan_decode(scan_decode_args(a, w, batch, a.projected, c.in_proj_width(),
                                     state.layer_h(c, l), done),
                    stream);
        linear_step(w.out_proj.as<T>(), c.d_model, c.d_inner, batch, PlainInput<T>{a.y, c.d_inner},
                    residual, stream);
      } else {
        ssd_decode(ssd_decode_args(a, w, batch, a.projected + c.d_inner, c.in_proj_width(),
                                   state.layer_h(c, l), done),
                   stream);
        const int slots = int(c.n_heads / c.n_groups) * ssd_decode_blocks(int(c.head_dim));
        linear_step(w.out_proj.as<T>(), c.d_model, c.d_inner, batch,
                    GatedNormInput{a.g, a.squares, w.gated_norm.data(), c.d_inner, int(c.n_groups),
                                   slots, eps},
                    residual, stream);
      }
    }
    linear_step(head(), c.vocab_size, c.d_model, batch,
                NormedInput{a.residual, model.norm_f.data(), c.d_model, eps},
                PlainOutput{logits, c.vocab_size}, stream);
  }
};

// ============================================================================================
// The engine
// ============================================================================================

/// Makes GPU `device` the current one; fails in one line where there is none that can run this program.
inline void use_device(int device) {
  int count = 0, driver = 0, runtime = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  CUDA_CHECK(cudaDriverGetVersion(&driver));
  CUDA_CHECK(cudaRuntimeGetVersion(&runtime));
  const auto version = [](int v) {
    return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10);
  };
  if (error == cudaErrorInsufficientDriver && driver > 0)
    fail("driver too old: expected one for CUDA ", version(runtime), ", found one for CUDA ",
         version(driver));
  if (error != cudaSuccess || count == 0)
    fail("no GPU: ", cudaGetErrorString(error ? error : cudaErrorNoDevice));
  if (device < 0 || device >= count)
    fail("--device: expected 0 to ", count - 1, ", found ", device);
  CUDA_CHECK(cudaSetDevice(device));
  cudaFuncAttributes kernel;
  if (cudaFuncGetAttributes(&kernel, embedding_kernel<float>) != cudaSuccess) {
    cudaDeviceProp gpu;
    CUDA_CHECK(cudaGetDeviceProperties(&gpu, device));
    fail("wrong GPU: ", gpu.name, ": this program was not compiled for its compute capability ",
         gpu.major, ".", gpu.minor);
  }
}

/// Numbers that the GPU writes and the host reads without asking for a copy.
class HostTokens {
 public:
  explicit HostTokens(size_t size) {
    CUDA_CHECK(
        cudaHostAlloc(&data_, std::max<size_t>(1, size) * sizeof(Token), cudaHostAllocMapped));
  }
  HostTokens(const HostTokens&) = delete;
  HostTokens& operator=(const HostTokens&) = delete;
  ~HostTokens() { cudaFreeHost(data_); }
  Token* data() const { return data_; }

 private:
  Token* data_ = nullptr;
};

class CudaEngine {
 public:
  static constexpr const char* kName = "mamba_cuda";
  static constexpr const char* kDescription = "the same as fused kernels, on the GPU";
  static constexpr const char* kBenchOps =
      "decode, prefill, bandwidth, matmul, causal_conv1d, selective_scan, ssd, rms_norm, "
      "gated_rms_norm or sample";
  static constexpr bool kHasDevice = true;
  static constexpr Index kPiece = 16384;         // tokens that the parallel form takes at once
  static constexpr size_t kBatch = 256;          // texts that are generated together
  static constexpr size_t kMostSequences = 256;  // that are continued together

  using State = DeviceState;

  CudaEngine(const Checkpoint& checkpoint, const Config& config, const EngineOptions& options)
      : CudaEngine(config, options, storage(checkpoint, config, options)) {
    model_ = load_model<DeviceModel>(checkpoint, config, dtype_);
  }
  /// Random weights, as wide and as large as config says: for measurements.
  CudaEngine(const Config& config, const EngineOptions& options)
      : CudaEngine(config, options, *options.dtype) {
    fill_random();
  }

  const Config& config() const { return config_; }
  State new_state() const { return State(config_, dtype_, 1); }
  State from_host(const ssm::State<float>& host) const;
  ssm::State<float> to_host(const State& state) const;

  Matrix<float> prefill(State& state, const Token* ids, Index L);
  void forward(State& state, const Token* ids, Index L, const LogitsSink& sink);
  Matrix<float> step(State& state, Token id);
  void generate(std::vector<Sequence<State>>& sequences, const GenerateOptions& options,
                const OnToken& on_token);
  static void bench(const BenchOptions& options);

 private:
  CudaEngine(const Config& config, const EngineOptions& options, DType dtype)
      : config_(config), dtype_(dtype), delta_ratio_(options.delta_ratio) {
    size_t bytes = 0;
    for_each_shape(config, [&](const std::string&, const std::vector<int64_t>& shape) {
      size_t size = shape.size() == 2 ? dtype_size(dtype) : sizeof(float);
      for (const int64_t extent : shape) size *= static_cast<size_t>(extent);
      bytes += size;
    });
    use_device(options.device);
    need_memory(bytes, "weights");
    queue_ = std::make_unique<Queue>();
  }
  static DType storage(const Checkpoint& checkpoint, const Config& config,
                       const EngineOptions& options) {
    const DType file =
        weight(checkpoint, "backbone.embeddings.weight", {config.vocab_size, config.d_model}).dtype;
    const bool stored = file == DType::BF16 || file == DType::F16;
    return options.dtype.value_or(stored ? file : DType::F32);
  }
  void fill_random();

  template <class T>
  Compute<T> compute() {
    return {config_, model_, *queue_, activation_room_, scan_room_, delta_ratio_};
  }
  const Token* upload(const Token* ids, Index L) {
    ids_.grow(static_cast<size_t>(L));
    CUDA_CHECK(cudaMemcpyAsync(ids_.data(), ids, L * sizeof(Token), cudaMemcpyHostToDevice,
                               queue_->stream()));
    return ids_.data();
  }
  Matrix<float> download_logits(Index rows) {
    Matrix<float> host(rows, config_.vocab_size);
    CUDA_CHECK(cudaMemcpyAsync(host.data(), logits_.data(), host.size() * sizeof(float),
                               cudaMemcpyDeviceToHost, queue_->stream()));
    queue_->wait();
    return host;
  }
  /// After this, logits_ holds the logits after the last of L > 0 tokens in row `row`.
  template <class T>
  void prefill_on_device(State& state, const Token* ids, Index L, Index row);
  template <class T>
  void generate_together(Sequence<State>* sequences, size_t first, size_t batch,
                         const GenerateOptions& options, const OnToken& on_token);

  Config config_;
  DType dtype_;
  float delta_ratio_;
  std::unique_ptr<Queue> queue_;
  DeviceModel model_;
  DeviceBuffer<std::byte> activation_room_, scan_room_;
  DeviceBuffer<Token> ids_;
  DeviceBuffer<float> logits_;
};

// --- states: a host's h lies column by column, the GPU's row by row ---

inline DeviceState CudaEngine::from_host(const ssm::State<float>& host) const {
  State state = new_state();
  std::vector<float> conv, h;
  for (const auto& layer : host.layers) {
    const Matrix<float> rows = layer.h;
    conv.insert(conv.end(), layer.conv.data(), layer.conv.data() + layer.conv.size());
    h.insert(h.end(), rows.data(), rows.data() + rows.size());
  }
  const auto n = static_cast<int64_t>(conv.size());
  const Tensor plain = tensor_view("conv", {n}, conv.data());
  const Tensor stored = dtype_ == DType::F32 ? plain : to_dtype(plain, dtype_);
  if (n > 0) state.conv.copy_from(static_cast<const std::byte*>(stored.data));
  state.h.copy_from(h.data());
  return state;
}

inline ssm::State<float> CudaEngine::to_host(const State& state) const {
  queue_->wait();
  std::vector<std::byte> conv(state.conv.size());
  std::vector<float> h(state.h.size());
  state.conv.copy_to(conv.data());
  state.h.copy_to(h.data());
  ssm::State<float> host(config_);
  const std::byte* next_conv = conv.data();
  const float* next_h = h.data();
  for (auto& layer : host.layers) {
    const size_t bytes = layer.conv.size() * dtype_size(dtype_);
    convert(Tensor{"conv", dtype_, {layer.conv.size()}, next_conv, nullptr}, layer.conv.data());
    layer.h = Eigen::Map<const Matrix<float>>(next_h, layer.h.rows(), layer.h.cols());
    next_conv += bytes;
    next_h += layer.h.size();
  }
  return host;
}

// --- whole texts ---

template <class T>
void CudaEngine::prefill_on_device(State& state, const Token* ids, Index L, Index row) {
  for (Index t = 0; t < L; t += kPiece) {
    const Index count = std::min(kPiece, L - t);
    const auto a = compute<T>().backbone(upload(ids + t, count), count, state);
    if (t + count == L)
      compute<T>().lm_head(a, count - 1, 1, logits_.data() + row * config_.vocab_size);
  }
}

inline Matrix<float> CudaEngine::prefill(State& state, const Token* ids, Index L) {
  logits_.grow(static_cast<size_t>(config_.vocab_size));
  with_type(dtype_, [&](auto* type) {
    prefill_on_device<std::remove_pointer_t<decltype(type)>>(state, ids, L, 0);
  });
  return download_logits(std::min<Index>(L, 1));
}

inline void CudaEngine::forward(State& state, const Token* ids, Index L, const LogitsSink& sink) {
  const Index kRows = 256;  // logits are wide: some rows at a time
  logits_.grow(static_cast<size_t>(std::min(L, kRows) * config_.vocab_size));
  with_type(dtype_, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (Index t = 0; t < L; t += kPiece) {
      const Index count = std::min(kPiece, L - t);
      const auto a = compute<T>().backbone(upload(ids + t, count), count, state);
      for (Index first = 0; first < count; first += kRows) {
        const Index rows = std::min(kRows, count - first);
        compute<T>().lm_head(a, first, rows, logits_.data());
        sink(t + first, download_logits(rows));
      }
    }
  });
}

inline Matrix<float> CudaEngine::step(State& state, Token id) {
  logits_.grow(static_cast<size_t>(config_.vocab_size));
  with_type(dtype_, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Activations<T> a(config_, 1, activation_room_);
    embedding_kernel<<<1, 256, 0, queue_->stream()>>>(model_.embedding.as<T>(), upload(&id, 1),
                                                      config_.d_model, a.residual);
    CUDA_CHECK(cudaGetLastError());
    compute<T>().step(a, state, nullptr, logits_.data());
  });
  return download_logits(1);
}

// --- generation ---
//
// Each sequence takes its prompt alone, in the parallel form; then all draw and step together. One step,
// from the embedding of the last tokens to the next ones, is a CUDA graph. The host launches it a few
// tokens ahead and only reads along: a sequence that has drawn the stop token stands still on the GPU.

/// What is copied between the layers of one sequence's state and those of a batch.
inline void copy_state(const Config& c, const DeviceState& from, Index from_row,
                       const DeviceState& to, Index to_row, cudaStream_t stream) {
  const auto copy = [&](auto* to_data, const auto* from_data, size_t bytes_of_layer_and_row) {
    const size_t bytes = bytes_of_layer_and_row;
    if (bytes == 0) return;
    CUDA_CHECK(
        cudaMemcpy2DAsync(reinterpret_cast<std::byte*>(to_data) + to_row * bytes, to.batch * bytes,
                          reinterpret_cast<const std::byte*>(from_data) + from_row * bytes,
                          from.batch * bytes, bytes, c.n_layer, cudaMemcpyDeviceToDevice, stream));
  };
  copy(to.conv.data(), from.conv.data(), from.conv.bytes() / (c.n_layer * from.batch));
  copy(to.h.data(), from.h.data(), from.h.bytes() / (c.n_layer * from.batch));
}

template <class T>
void CudaEngine::generate_together(Sequence<State>* sequences, size_t first, size_t batch,
                                   const GenerateOptions& options, const OnToken& on_token) {
  const cudaStream_t stream = queue_->stream();
  const Index V = config_.vocab_size;
  logits_.grow(batch * V);
  const bool penalty = options.sampler.repetition_penalty != 1;
  std::vector<uint64_t> numbers(batch), positions(batch);
  std::vector<unsigned char> seen(penalty ? batch * V : 0);
  for (size_t i = 0; i < batch; ++i) {
    auto& s = sequences[i];
    const size_t end = s.ids.size() - (options.n == 0 ? 1 : 0), begin = std::exchange(s.taken, end);
    prefill_on_device<T>(s.state, s.ids.data() + begin, static_cast<Index>(end - begin),
                         static_cast<Index>(i));
    queue_->wait();  // before the pieces' ids are replaced
    numbers[i] = s.index, positions[i] = s.ids.size();
    for (const Token id : s.ids)
      if (penalty) seen[i * V + id] = 1;
  }
  if (options.n == 0) return;

  State state(config_, dtype_, batch);
  for (size_t i = 0; i < batch; ++i) copy_state(config_, sequences[i].state, 0, state, i, stream);
  const Activations<T> a(config_, batch, activation_room_);
  const bool greedy = options.sampler.temperature == 0;
  const DeviceBuffer<uint64_t> sequence_d(numbers.data(), batch),
      position_d(positions.data(), batch);
  const DeviceBuffer<unsigned char> seen_d(seen.data(), seen.size());
  DeviceBuffer<int64_t> made_d(batch);
  DeviceBuffer<int> done_d(batch);
  const DeviceBuffer<Best> best_d(batch * kBestStretches);
  const DeviceBuffer<Token> next_d(batch), candidates_d(greedy ? 0 : batch * V);
  const DeviceBuffer<double> weights_d(greedy ? 0 : batch * V);
  const HostTokens log(options.n * batch);
  made_d.zero();
  done_d.zero();
  const SamplerOptions& o = options.sampler;
  const SampleArgs args{logits_.data(),
                        V,
                        static_cast<int64_t>(batch),
                        o.temperature,
                        o.top_p,
                        o.min_p,
                        o.repetition_penalty,
                        o.top_k,
                        o.seed,
                        sequence_d.data(),
                        position_d.data(),
                        made_d.data(),
                        seen_d.data(),
                        weights_d.data(),
                        candidates_d.data(),
                        best_d.data(),
                        done_d.data(),
                        options.stop,
                        next_d.data(),
                        log.data()};
  const auto sample = [&] {
    sample_step(args, {model_.embedding.bytes.data(), dtype_}, config_.d_model, a.residual, stream);
  };

  CUDA_CHECK(cudaDeviceSynchronize());  // the buffers above were filled outside of the stream
  Graph graph(stream, [&] {
    compute<T>().step(a, state, done_d.data(), logits_.data());
    sample();
  });
  constexpr Index kAhead = 8;  // tokens that the GPU may be ahead of the host
  std::vector<Event> drawn(kAhead);
  std::vector<char> finished(batch, 0);
  size_t turn = 0;  // the first unfinished sequence; tokens of later ones are told in their turn
  std::vector<size_t> told(batch);
  for (size_t i = 0; i < batch; ++i) told[i] = sequences[i].ids.size();
  const auto tell = [&] {
    for (; turn < batch; ++turn) {
      auto& ids = sequences[turn].ids;
      while (told[turn] < ids.size()) on_token(first + turn, ids[told[turn]++]);
      if (!finished[turn]) return;
    }
  };
  Index launched = 0;
  for (Index made = 0; made < options.n && turn < batch; ++made) {
    for (; launched < std::min(options.n, made + kAhead); ++launched) {
      if (launched == 0)
        sample();
      else
        graph.launch(stream);
      drawn[launched % kAhead].record(stream);
    }
    drawn[made % kAhead].wait();
    for (size_t i = 0; i < batch; ++i) {
      if (finished[i]) continue;
      const Token token = log.data()[made * batch + i];
      if (token < 0) fail("sampler: logits: expected numbers, found NaN or infinity");
      sequences[i].ids.push_back(token);
      finished[i] = token == options.stop || made + 1 == options.n;
    }
    tell();
  }
  queue_->wait();
  for (size_t i = 0; i < batch; ++i) {
    copy_state(config_, state, i, sequences[i].state, 0, stream);
    sequences[i].taken = sequences[i].ids.size() - 1;
  }
  queue_->wait();
}

inline void CudaEngine::generate(std::vector<Sequence<State>>& sequences,
                                 const GenerateOptions& options, const OnToken& on_token) {
  check(options.sampler);
  with_type(dtype_, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (size_t first = 0; first < sequences.size(); first += kMostSequences)
      generate_together<T>(sequences.data() + first, first,
                           std::min(kMostSequences, sequences.size() - first), options, on_token);
  });
}

// ============================================================================================
// Measurements: one JSON object a line, against this GPU's own limits measured in the same run
// ============================================================================================

// Uniform numbers in [-scale, scale) plus `offset`, by hashing the index (splitmix64).
template <class T>
__global__ void random_kernel(T* out, int64_t size, float scale, float offset, uint64_t seed) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < size;
       i += int64_t(gridDim.x) * blockDim.x) {
    uint64_t v = (i + seed * 0x100000001B3ull + 1) * 0x9E3779B97F4A7C15ull;
    v = (v ^ v >> 30) * 0xBF58476D1CE4E5B9ull;
    v = (v ^ v >> 27) * 0x94D049BB133111EBull;
    out[i] = from_float<T>(fmaf(scale, float((v ^ v >> 31) >> 40) * 0x1p-23f - 1.f, offset));
  }
}

// Spread as at the start of training, so that nothing overflows.
inline void CudaEngine::fill_random() {
  model_.sizes = config_;
  model_.layers.resize(static_cast<size_t>(config_.n_layer));
  uint64_t seed = 1;
  const auto fill = [&](auto* data, size_t size, float scale, float offset) {
    random_kernel<<<1024, 256>>>(data, static_cast<int64_t>(size), scale, offset, ++seed);
    CUDA_CHECK(cudaGetLastError());
  };
  for_each_weight(config_, model_, [&](const std::string& name, const auto& shape, auto& to) {
    using To = std::remove_reference_t<decltype(to)>;
    size_t size = 1;
    for (const int64_t extent : shape) size *= static_cast<size_t>(extent);
    if constexpr (std::is_same_v<To, DeviceMatrix>) {
      to.rows = shape[0], to.cols = shape[1];
      to.bytes = DeviceBuffer<std::byte>(size * dtype_size(dtype_));
      with_type(dtype_, [&](auto* type) {
        fill(reinterpret_cast<decltype(type)>(to.bytes.data()), size,
             std::sqrt(3.f / float(shape[1])), 0.f);
      });
    } else {
      to = DeviceBuffer<float>(size);
      const bool dt_bias = name.find("dt_") != std::string::npos;
      const bool conv = name.find("conv1d.weight") != std::string::npos;
      if (std::is_same_v<To, DeviceStateMatrix>)
        fill(to.data(), size, 7.f, -8.f);
      else if (dt_bias)
        fill(to.data(), size, 2.f, -4.6f);
      else
        fill(to.data(), size, conv ? 0.5f : 0.f, conv ? 0.f : 1.f);
    }
  });
  CUDA_CHECK(cudaDeviceSynchronize());
}

/// Milliseconds that f, which only launches, keeps the GPU busy: the median of `repeat` runs. `before`
/// comes ahead of each run and is not timed.
template <class Function, class Before>
double median_ms(cudaStream_t stream, Index repeat, const Function& f, const Before& before) {
  std::vector<double> times;
  for (Index i = -3; i < repeat; ++i) {  // three to warm up
    Event start(true), end(true);
    before();
    start.record(stream);
    f();
    end.record(stream);
    end.wait();
    if (i >= 0) times.push_back(start.milliseconds_to(end));
  }
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  return times[times.size() / 2];
}

template <class Function>
double median_ms(cudaStream_t stream, Index repeat, const Function& f) {
  return median_ms(stream, repeat, f, [] {});
}

/// Bytes a second, read and written, that a large copy reaches.
inline double copy_bandwidth(cudaStream_t stream) {
  const DeviceBuffer<std::byte> from(size_t{1} << 30), to(size_t{1} << 30);
  random_kernel<<<1024, 256, 0, stream>>>(reinterpret_cast<float*>(from.data()), int64_t{1} << 28,
                                          1.f, 0.f, 7);
  const double ms = median_ms(stream, 10, [&] {
    CUDA_CHECK(
        cudaMemcpyAsync(to.data(), from.data(), from.bytes(), cudaMemcpyDeviceToDevice, stream));
  });
  return 2e3 * double(from.bytes()) / ms;
}

/// Multiply-adds a second, times two, that a large product of this type reaches on random numbers.
template <class T>
double matmul_peak(const Queue& queue) {
  constexpr int64_t n = 8192;
  const DeviceBuffer<T> x(n * n), W(n * n), y(n * n);
  for (const T* p : {x.data(), W.data()})
    random_kernel<<<1024, 256, 0, queue.stream()>>>(const_cast<T*>(p), n * n, 1.f, 0.f,
                                                    p == W.data());
  return 2e3 * double(n) * n * n / median_ms(queue.stream(), 10, [&] {
           queue.linear(x.data(), n, n, W.data(), n, n, y.data(), n);
         });
}

/// Every kernel of one operation, a line each: on random data, at the sizes of --shape, with a cold cache. The
/// floor is the time to move each input and output once.
template <class T>
class KernelBench {
 public:
  KernelBench(const BenchOptions& options, const Config& config, cudaStream_t stream)
      : o_(options),
        c_(config),
        rows_(options.batch * options.length),
        stream_(stream),
        bandwidth_(copy_bandwidth(stream)),
        cold_(size_t{256} << 20) {}

  /// False if there is no such operation.
  bool run() {
    const bool ssd = c_.version == 2;
    if (o_.op == "causal_conv1d") return conv(), true;
    if (o_.op == "rms_norm") return norm(), true;
    if (o_.op == "sample") return sample(), true;
    if (o_.op == "selective_scan" || o_.op == "ssd" || o_.op == "gated_rms_norm") {
      if (ssd == (o_.op == "selective_scan"))
        fail_usage("bench ", o_.op, ": --shape: expected a Mamba", ssd ? "" : "-2",
                   " shape, found ", quote(o_.shape));
      return o_.op == "ssd" ? this->ssd() : ssd ? gated_norm() : scan(), true;
    }
    return false;
  }

 private:
  template <class V>
  DeviceBuffer<V> random(int64_t size, float scale = 1, float offset = 0) {
    DeviceBuffer<V> buffer(static_cast<size_t>(size));
    random_kernel<<<1024, 256, 0, stream_>>>(buffer.data(), size, scale, offset, ++seed_);
    CUDA_CHECK(cudaGetLastError());
    return buffer;
  }

  template <class Launch>
  void report(const char* kernel, int64_t length, double bytes, double flops,
              const Launch& launch) {
    const double floor = bytes / bandwidth_ * 1e3;
    const double ms = median_ms(stream_, o_.repeat, launch, [&] {
      CUDA_CHECK(cudaMemsetAsync(cold_.data(), 0, cold_.bytes(), stream_));
    });
    std::cout << Json{{"op", o_.op},       {"kernel", kernel},
                      {"shape", o_.shape}, {"dtype", dtype_name(o_.dtype)},
                      {"batch", o_.batch}, {"length", length},
                      {"ms", ms},          {"bytes", bytes},
                      {"flops", flops},    {"GB/s", bandwidth_ / 1e9},
                      {"floor ms", floor}, {"% of floor", 100 * floor / ms}}
              << std::endl;
  }

  void conv() {
    const int64_t d = c_.conv_width(), width = c_.d_conv;
    const auto x = random<T>(rows_ * d), state = random<T>(o_.batch * (width - 1) * d);
    const DeviceBuffer<T> out(static_cast<size_t>(rows_ * d));
    const auto weight = random<float>(d * width), bias = random<float>(d);
    ConvArgs<T> a;
    a.batch = o_.batch, a.L = o_.length, a.d = d, a.width = int(width);
    a.x = x.data(), a.weight = weight.data(), a.bias = bias.data();
    a.state = a.state_out = state.data(), a.out = out.data();
    a.x_stride = a.out_stride = d;
    const auto bytes = [&](int64_t rows) {
      return double(2 * rows * d + 2 * o_.batch * (width - 1) * d) * sizeof(T);
    };
    const double flops = 2. * double(width * d);
    report("causal_conv1d_naive_kernel", a.L, bytes(rows_), flops * double(rows_),
           [&] { causal_conv1d_naive(a, stream_); });
    report("causal_conv1d_fused_kernel", a.L, bytes(rows_), flops * double(rows_),
           [&] { causal_conv1d(a, stream_); });
    a.L = 1;
    report("causal_conv1d_step_kernel", 1, bytes(o_.batch), flops * double(o_.batch),
           [&] { causal_conv1d_step(a, stream_); });
  }

  void scan() {
    const int64_t d = c_.d_inner, N = c_.d_state;
    const auto x = random<T>(rows_ * d), delta = random<T>(rows_ * d), z = random<T>(rows_ * d),
               B = random<T>(rows_ * N), C = random<T>(rows_ * N);
    const DeviceBuffer<T> out(static_cast<size_t>(rows_ * d));
    const auto A = random<float>(d * N, 7.f, -8.f), D = random<float>(d),
               bias = random<float>(d, 2.f, -4.6f), h = random<float>(o_.batch * d * N);
    ScanArgs<T> a;
    a.batch = o_.batch, a.L = o_.length, a.d_inner = d, a.d_state = N;
    a.x = x.data(), a.delta = delta.data(), a.A = A.data(), a.B = B.data();
    a.C = C.data(), a.D = D.data(), a.z = z.data(), a.delta_bias = bias.data();
    a.hT = h.data(), a.out = out.data();
    a.x_stride = a.delta_stride = a.z_stride = a.out_stride = d;
    a.B_stride = a.C_stride = N;
    const DeviceBuffer<std::byte> workspace(selective_scan_workspace(a));
    const auto bytes = [&](int64_t rows, int states) {
      return double(rows * (4 * d + 2 * N)) * sizeof(T) +
             double(states * o_.batch * d * N) * sizeof(float);
    };
    const double flops = 7. * double(d * N);  // a product and exp for A_bar, two for B_bar x, ...
    report("selective_scan_naive_kernel", a.L, bytes(rows_, 1), flops * double(rows_),
           [&] { selective_scan_naive(a, stream_); });
    report("selective_scan_fused_kernel", a.L, bytes(rows_, 1), flops * double(rows_),
           [&] { selective_scan(a, reinterpret_cast<float*>(workspace.data()), stream_); });
    a.L = 1, a.h0 = h.data();
    report("selective_scan_step_kernel", 1, bytes(o_.batch, 2), flops * double(o_.batch),
           [&] { selective_scan_step(a, stream_); });
  }

  void ssd() {
    const int64_t d = c_.d_inner, H = c_.n_heads, N = c_.d_state, GN = c_.n_groups * N;
    const auto x = random<T>(rows_ * d), dt = random<T>(rows_ * H), B = random<T>(rows_ * GN),
               C = random<T>(rows_ * GN);
    const DeviceBuffer<T> out(static_cast<size_t>(rows_ * d));
    const auto A = random<float>(H, 7.f, -8.f), D = random<float>(H),
               bias = random<float>(H, 2.f, -4.6f), h = random<float>(o_.batch * d * N);
    SsdArgs<T> a;
    a.batch = o_.batch, a.L = o_.length, a.n_heads = int(H), a.head_dim = int(c_.head_dim);
    a.d_state = int(N), a.n_groups = int(c_.n_groups);
    a.x = x.data(), a.dt = dt.data(), a.B = B.data(), a.C = C.data(), a.A = A.data();
    a.D = D.data(), a.dt_bias = bias.data(), a.hT = h.data(), a.out = out.data();
    a.x_stride = a.out_stride = d, a.dt_stride = H, a.B_stride = a.C_stride = GN;
    const auto bytes = [&](int64_t rows, int states) {
      return double(rows * (2 * d + H + 2 * GN)) * sizeof(T) +
             double(states * o_.batch * d * N) * sizeof(float);
    };
    const double flops = 5. * double(d * N);  // of the recurrence
    report("ssd_naive_kernel", a.L, bytes(rows_, 1), flops * double(rows_),
           [&] { ssd_naive(a, stream_); });
    for (const SsdRung rung : {SsdRung::kFused, SsdRung::kWarpgroup}) {
      if constexpr (sizeof(T) == 2) {
        if (rung == SsdRung::kWarpgroup && ssd_rung(a) != rung) continue;
        const SsdSegments segments = ssd_segments(a, rung);
        const DeviceBuffer<std::byte> workspace(ssd_workspace_bytes(a, rung));
        a.workspace = workspace.data();
        report(rung == SsdRung::kFused ? "ssd_fused_kernel" : "ssd_warpgroup_kernel", a.L,
               bytes(rows_, 1), flops * double(rows_),
               [&] { ssd_split(a, rung, segments, stream_); });
        CUDA_CHECK(cudaStreamSynchronize(stream_));
      }
    }
    a.L = 1, a.h0 = h.data();
    report("ssd_step_kernel", 1, bytes(o_.batch, 2), flops * double(o_.batch),
           [&] { ssd_step(a, stream_); });
  }

  void norm() {
    const int64_t d = c_.d_model;
    const auto x = random<T>(rows_ * d);
    const auto residual = random<float>(rows_ * d), weight = random<float>(d);
    const DeviceBuffer<T> out(static_cast<size_t>(rows_ * d));
    report("rms_norm_kernel", o_.length, double(rows_ * d) * (2 * sizeof(T) + 8),
           5. * double(rows_ * d), [&] {
             rms_norm(residual.data(), x.data(), d, weight.data(), 1e-5f, rows_, int(d), out.data(),
                      d, stream_);
           });
  }

  void gated_norm() {
    const int64_t d = c_.d_inner;
    const auto y = random<T>(rows_ * d), z = random<T>(rows_ * d);
    const auto weight = random<float>(d);
    const DeviceBuffer<T> out(static_cast<size_t>(rows_ * d));
    report("gated_rms_norm_kernel", o_.length, double(3 * rows_ * d) * sizeof(T),
           8. * double(rows_ * d), [&] {
             gated_rms_norm(y.data(), d, z.data(), d, weight.data(), 1e-5f, rows_, int(d),
                            int(c_.n_groups), out.data(), d, stream_);
           });
  }

  // Greedy, and with a filter.
  void sample() {
    const int64_t V = c_.vocab_size, batch = o_.batch;
    const auto count = static_cast<size_t>(batch);
    const auto logits = random<float>(batch * V, 10.f), residual = random<float>(batch);
    const auto embedding = random<float>(V);
    DeviceBuffer<uint64_t> numbers(count), positions(count);
    DeviceBuffer<int64_t> made(count);
    DeviceBuffer<int> done(count);
    const DeviceBuffer<Token> next(count), candidates(count * V),
        log(count * static_cast<size_t>(o_.repeat + 8));
    const DeviceBuffer<Best> best(count * kBestStretches);
    const DeviceBuffer<double> weights(count * V);
    for (const double temperature : {0., 0.8}) {
      numbers.zero(), positions.zero(), made.zero(), done.zero();
      SampleArgs a{};
      a.logits = logits.data(), a.vocab_size = V, a.batch = batch;
      a.temperature = temperature, a.top_p = 0.95, a.penalty = 1;
      a.sequence = numbers.data(), a.position = positions.data(), a.made = made.data();
      a.weights = weights.data(), a.candidates = candidates.data(), a.done = done.data();
      a.best = best.data();
      a.stop = -1, a.next = next.data(), a.log = log.data();
      CUDA_CHECK(cudaDeviceSynchronize());
      report(temperature == 0 ? "sample_kernel, greedy" : "sample_kernel, top-p 0.95", 1,
             double(batch * V) * 4, 0, [&] {
               sample_step(a, {embedding.data(), DType::F32}, 1, residual.data(), stream_);
             });
    }
  }

  const BenchOptions& o_;
  const Config c_;
  const int64_t rows_;
  const cudaStream_t stream_;
  const double bandwidth_;
  const DeviceBuffer<std::byte> cold_;  // larger than the L2 cache: written before each run
  uint64_t seed_ = 0;
};

inline void CudaEngine::bench(const BenchOptions& options) {
  const bool decode = options.op == "decode";
  if (options.op == "bandwidth" || options.op == "matmul") {
    use_device(options.device);
    Queue queue;
    with_type(options.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      const Json figure =
          options.op == "matmul"
              ? Json{{"op", "matmul"},
                     {"dtype", dtype_name(options.dtype)},
                     {"TFLOP/s", matmul_peak<T>(queue) / 1e12}}
              : Json{{"op", "bandwidth"}, {"GB/s", copy_bandwidth(queue.stream()) / 1e9}};
      std::cout << figure << "\n";
    });
    return;
  }
  const Config config = published_config(options.shape);
  if (!decode && options.op != "prefill") {
    use_device(options.device);
    Queue queue;
    bool known = false;
    with_type(options.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      known = KernelBench<T>(options, config, queue.stream()).run();
    });
    if (!known) fail_usage("bench: op: expected ", kBenchOps, ", found ", quote(options.op));
    return;
  }
  EngineOptions engine_options;
  engine_options.dtype = options.dtype;
  engine_options.device = options.device;
  CudaEngine engine(config, engine_options);
  const cudaStream_t stream = engine.queue_->stream();
  double parameters = 0,
         small = 0;  // of matrices: each is read once and costs a multiply-add a token
  for_each_shape(config, [&](const std::string&, const std::vector<int64_t>& shape) {
    double size = 1;
    for (const int64_t extent : shape) size *= double(extent);
    (shape.size() == 2 && shape[1] != config.d_state ? parameters : small) += size;
  });
  const double head = double(config.vocab_size * config.d_model), batch = double(options.batch),
               L = double(options.length);
  const double weight_bytes = parameters * double(dtype_size(options.dtype)) + small * 4;
  with_type(options.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const double bandwidth = copy_bandwidth(stream), peak = matmul_peak<T>(*engine.queue_);
    State state(config, options.dtype, decode ? options.batch : 1);
    const double state_bytes = 2 * double(state.h.bytes() + state.conv.bytes());
    double ms = 0, bytes = weight_bytes, flops = 0;
    if (decode) {
      engine.logits_.grow(options.batch * config.vocab_size);
      const Activations<T> a(config, options.batch, engine.activation_room_);
      std::vector<uint64_t> zeros(options.batch);
      const DeviceBuffer<uint64_t> numbers(zeros.data(), options.batch),
          positions(zeros.data(), options.batch);
      DeviceBuffer<int64_t> made(options.batch);
      DeviceBuffer<int> done(options.batch);
      const DeviceBuffer<Token> next(options.batch);
      const DeviceBuffer<Best> best(options.batch * kBestStretches);
      const Index kMost = 1 << 14;
      const HostTokens log(kMost * options.batch);
      made.zero(), done.zero();
      CUDA_CHECK(cudaMemset(a.residual, 0, options.batch * config.d_model * sizeof(float)));
      CUDA_CHECK(cudaDeviceSynchronize());
      SampleArgs args{};
      args.logits = engine.logits_.data(), args.vocab_size = config.vocab_size,
      args.batch = options.batch;
      args.sequence = numbers.data(), args.position = positions.data(), args.made = made.data();
      args.best = best.data(), args.done = done.data(), args.stop = -1, args.next = next.data(),
      args.log = log.data();
      Graph graph(stream, [&] {
        engine.compute<T>().step(a, state, done.data(), engine.logits_.data());
        sample_step(args, {engine.model_.embedding.bytes.data(), options.dtype}, config.d_model,
                    a.residual, stream);
      });
      constexpr Index kSteps = 20;
      const Index repeat = std::min<Index>(options.repeat, kMost / kSteps - 4);
      ms = median_ms(stream, repeat,
                     [&] {
                       for (Index i = 0; i < kSteps; ++i) graph.launch(stream);
                     }) /
           kSteps;
      bytes += state_bytes;
      flops = 2 * parameters * batch;
    } else {
      engine.logits_.grow(config.vocab_size);
      std::vector<Token> ids(options.length);
      for (Index t = 0; t < options.length; ++t)
        ids[t] = static_cast<Token>(t * 7919 % config.vocab_size);
      ms = median_ms(stream, options.repeat,
                     [&] { engine.prefill_on_device<T>(state, ids.data(), options.length, 0); });
      bytes = weight_bytes;
      flops = 2 * ((parameters - head) * L + head);
    }
    const double floor = std::max(bytes / bandwidth, flops / peak) * 1e3;
    std::cout << Json{{"op", options.op},
                      {"shape", options.shape},
                      {"dtype", dtype_name(options.dtype)},
                      {"batch", decode ? options.batch : 1},
                      {"length", decode ? 1 : options.length},
                      {"ms", ms},
                      {"bytes", bytes},
                      {"flops", flops},
                      {"GB/s", bandwidth / 1e9},
                      {"TFLOP/s", peak / 1e12},
                      {"floor ms", floor},
                      {"% of floor", 100 * floor / ms}}
              << "\n";
  });
}

}  // namespace mamba

#ifndef MAMBA_NO_MAIN
int main(int argc, char** argv) { return mamba::run<mamba::CudaEngine>(argc, argv); }
#endif
