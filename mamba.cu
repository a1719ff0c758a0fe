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
// selective_scan_registers_kernel    selective_scan         states in registers    batch, d
// selective_scan_lanes_kernel        selective_scan         16 lanes share the     batch, d,
//                                                           states of a channel    pieces of N
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
// ssd_step_kernel                    ssd_step               one token, h in place; batch, H, P
//                                                           with the gate or not
// ssd_backward_naive_kernel          ssd_backward           a block walks back     batch, H
// ssd_backward_states_kernel         ssd_backward (chunked) h and dh between chunks batch, H, P
// ssd_backward_fused_kernel          the same               all else on tensor     batch, chunks,
//                                                           cores                  parts of H
// rms_norm_kernel                    rms_norm               a row stays on chip    rows
// gated_rms_norm_kernel              gated_rms_norm         the same               rows, groups
// layer_norm_kernel                  layer_norm             the same               rows
// causal_attention_naive_kernel      causal_attention       a warp walks the keys  batch, t, H
// causal_attention_fused_kernel      the same (chunked)     blocks of keys on      batch, H, blocks
//                                                           tensor cores           of t
// causal_attention_step_, join_      the same, one token    the cache read once    batch, H, pieces
//   kernel                                                                         of the past
// rotary_kernel                      rotary                 angles once a token    batch, t
// gated_mlp_kernel                   gated_mlp              between its products   rows, d
// linear_step_kernel                 linear, rms_norm,      W read once, with what rows of W,
//                                    causal_conv1d_step     surrounds the product  pieces of rows
// scan_decode_kernel                 selective_scan_step    with dt_proj before    batch, d,
//                                                                                  quarters of N
// embedding_kernel                   backbone               a row of the table     tokens
// best_kernel, weight_kernel,        sample (mamba.hpp)     CUB's radix sort, sums batch,
//   sample_kernel                                           of 32 stretches        vocabulary
// cross_entropy_kernel               cross_entropy          logits to dlogits      rows
// selective_scan_backward_           selective_scan_backward
//   naive_kernel                                            state by state back    batch, d
//   summary_, link_, fused_kernel                           pieces linked, then    pieces of t,
//                                                           each back in time      batch, d, N
//   sum_kernel                                              parts in order         entries
// causal_conv1d_backward_kernel      causal_conv1d_backward two windows slide      pieces of t, d
// rms_norm_backward_kernel           rms_norm_backward      a row twice            pieces of rows
// gated_rms_norm_backward_kernel     gated_rms_norm_backward the same              the same, groups
// layer_norm_backward_kernel         layer_norm_backward    the same               the same
// causal_attention_backward_         causal_attention_
//   queries_, keys_kernel            backward               a warp an owner of sums batch, t, H
// causal_attention_backward_         the same               blocks on tensor cores batch, H, blocks
//   fused_kernel                                                                   of t or of s
// gated_mlp_backward_kernel          gated_mlp_backward     between its products   rows, d
// embedding_backward_kernel          backbone_backward      rows sorted by id      ids, d
// gradient_norm_kernel, adamw_kernel adamw_step             all weights at once    pieces of them
#include "train.hpp"

#include <cublas_v2.h>
#include <cuda_awbarrier_primitives.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <netdb.h>
#include <poll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>

#include <atomic>
#include <cub/device/device_radix_sort.cuh>
#include <future>

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
  ~DeviceBuffer() {  // to free nothing, too, would end the capture of a graph
    if (data_) cudaFree(data_);
  }

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
  void hold(cudaStream_t stream) { CUDA_CHECK(cudaStreamWaitEvent(stream, event_, 0)); }
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

constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;

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

template <class V>
__device__ inline V warp_sum(V v) {
  for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(~0u, v, d);
  return v;
}
// The sum over a block of kThreads threads, the same bits in all of them.
template <int kThreads>
__device__ inline float block_sum(float v) {
  __shared__ float of_warp[kThreads / 32];
  v = warp_sum(v);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = v;
  __syncthreads();  // the warps' sums are written before they are added
  v = of_warp[0];
  for (int i = 1; i < kThreads / 32; ++i) v += of_warp[i];
  return v;
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

// Since the rung before: d_state, rounded up to kN, is known to the compiler. So loops over n
// unroll, every h[n] has a place of its own, and h and A lie in registers: a step no longer waits
// for local memory. A carries log2(e), so that exp is one multiply and one exp2. Grid: the same.
template <class T, int kN>
__global__ void __launch_bounds__(128) selective_scan_registers_kernel(ScanArgs<T> a) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, N = a.d_state;
  if (i >= a.batch * a.d_inner) return;
  const int64_t d = i % a.d_inner, group = d / (a.d_inner / a.n_groups);
  const Rows rows = rows_of(i / a.d_inner, a.L, a.cu_seqlens);

  float A[kN], h[kN];
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    A[n] = n < N ? kLog2e * a.A[d * N + n] : 0.f;
    h[n] = n < N && a.h0 ? a.h0[i * N + n] : 0.f;
  }
  for (int64_t t = rows.first; t < rows.first + rows.count; ++t) {
    const T* B_t = a.B + t * a.B_stride + group * N;
    const T* C_t = a.C + t * a.C_stride + group * N;
    const float x_t = to_float(a.x[t * a.x_stride + d]), delta_t = step_size(a, t, d);
    float y_t = a.D ? a.D[d] * x_t : 0.f;
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      if (n >= N) break;
      h[n] = fmaf(exp2_approx(delta_t * A[n]), h[n], delta_t * x_t * to_float(B_t[n]));
      y_t = fmaf(to_float(C_t[n]), h[n], y_t);
    }
    if (a.z) y_t *= silu(to_float(a.z[t * a.z_stride + d]));
    a.out[t * a.out_stride + d] = from_float<T>(y_t);
  }
#pragma unroll
  for (int n = 0; n < kN; ++n)
    if (n < N && a.hT) a.hT[i * N + n] = h[n];
}

[[maybe_unused]] constexpr int kScanLanes = 16;  // only tests and the benchmark run this rung

// Since the rung before: 16 lanes share a channel, lane j with the states n = j, j + 16, .. So a
// channel's exponentials are 16 threads' work, there are 16 times as many threads to hide the
// waiting of each, and neighbouring lanes read neighbouring B and C. The price: C_t . h_t is spread
// over the lanes, and every step ends in four exchanges between them; and each lane makes the same
// softplus. Grid: batch d_inner channels in blocks of 8.
template <class T, int kStates>  // of a lane
__global__ void __launch_bounds__(128) selective_scan_lanes_kernel(ScanArgs<T> a) {
  const int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / kScanLanes, N = a.d_state;
  if (i >= a.batch * a.d_inner) return;  // all lanes of a channel together
  const int lane = threadIdx.x % kScanLanes;
  const unsigned lanes = 0xffffu << (threadIdx.x % 32 - lane);  // of this channel, in the warp
  const int64_t d = i % a.d_inner, group = d / (a.d_inner / a.n_groups);
  const Rows rows = rows_of(i / a.d_inner, a.L, a.cu_seqlens);

  float A[kStates], h[kStates];
#pragma unroll
  for (int k = 0; k < kStates; ++k) {
    const int n = lane + k * kScanLanes;
    A[k] = n < N ? kLog2e * a.A[d * N + n] : 0.f;
    h[k] = n < N && a.h0 ? a.h0[i * N + n] : 0.f;
  }
  for (int64_t t = rows.first; t < rows.first + rows.count; ++t) {
    const T* B_t = a.B + t * a.B_stride + group * N;
    const T* C_t = a.C + t * a.C_stride + group * N;
    const float x_t = to_float(a.x[t * a.x_stride + d]), delta_t = step_size(a, t, d);
    float y_t = 0.f;  // these states' part
#pragma unroll
    for (int k = 0; k < kStates; ++k) {
      const int n = lane + k * kScanLanes;
      if (n >= N) break;
      h[k] = fmaf(exp2_approx(delta_t * A[k]), h[k], delta_t * x_t * to_float(B_t[n]));
      y_t = fmaf(to_float(C_t[n]), h[k], y_t);
    }
#pragma unroll
    for (int distance = kScanLanes / 2; distance > 0; distance /= 2)
      y_t += __shfl_xor_sync(lanes, y_t, distance);
    if (lane != 0) continue;
    if (a.D) y_t = fmaf(a.D[d], x_t, y_t);
    if (a.z) y_t *= silu(to_float(a.z[t * a.z_stride + d]));
    a.out[t * a.out_stride + d] = from_float<T>(y_t);
  }
#pragma unroll
  for (int k = 0; k < kStates; ++k)
    if (lane + k * kScanLanes < N && a.hT) a.hT[i * N + lane + k * kScanLanes] = h[k];
}

// The fused rung (feeders, walkers, finishers)
//
// Since the rung before: B and C are read once per block, not once per channel; memory is asked for
// tiles ahead; and everything that is done once per (t, d) rather than once per (t, d, n) leaves
// the loop that walks time. A block takes `width` channels of one group of one sequence, and works
// on tiles of kSteps rows:
//
//   feeders    prepare tile i + 1: softplus, delta x, and B and C as floats
//   walkers    walk tile i, each with kStates states of one channel, and sum C_t . h_t over
//              the lanes of the channel
//   finishers  complete the outputs of tile i - 1: D x and the gate
//
// What passes between them lies in shared memory twice, for even and for odd tiles, so one barrier
// per tile orders all of it:
//
//   barrier            0        1        2        3        4
//   feeders     tile 0 | tile 1 | tile 2 | tile 3 |        |          write input, BC [i % 2]
//   walkers            | tile 0 | tile 1 | tile 2 | tile 3 |          read them, write y [i % 2]
//   finishers          |        | tile 0 | tile 1 | tile 2 | tile 3   read y, write out
//
// Rows past the end get delta = 0 and B = 0: the state stands still. Missing states get A = B = C
// = 0. Which lane of a walking warp holds which states, for kStates = 2 and kLanes = 8 (N = 16):
//
//   states      0,1   2,3   4,5   6,7   8,9 10,11 12,13 14,15
//   channel 0     0     2     8    10    16    18    24    26
//   channel 1     1     3     9    11    17    19    25    27
//   channel 2     4     6    12    14    20    22    28    30
//   channel 3     5     7    13    15    21    23    29    31
//
// The sums over a row of this table are made for 8 steps at once. In an exchange with the lane 16
// further, lanes 0 to 15 keep steps 0 to 3, the others 4 to 7; with the lane 8 further, each keeps
// two of its four; with the lane 2 further, one. That is 7 exchanges for 8 steps, before it was 32.
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
  // Rows of one thread in a tile: the most of any width, as kColumns columns leave the fewest
  // threads to a column.
  static constexpr int kRows = ceil_div(Tile::kSteps, Tile::kServers / (kColumns / kCopied));
  using Copies = Vector<T, kCopied>[2][Tile::kDepth][kRows][Tile::kServers];
  struct Matrix {
    const T* at;  // the block's first column in the sequence's first row
    int64_t stride;
    bool wanted = true;  // zeros if not
  };

  Copies& copies;
  Matrix matrix[2];  // from this thread's first number in the tile that is asked for next
  int me, length, column, first, stride;  // length: rows, 0 where there is no such column
  bool exists;

  // For thread `me`, where so many threads share a row, of which n_columns exist.
  __device__ Ring(Copies& copies, int me, int threads, int n_columns, int length, Matrix one,
                  Matrix two)
      : copies(copies), matrix{one, two}, me(me) {
    column = me % threads * kCopied, first = me / threads, stride = Tile::kServers / threads;
    exists = column < n_columns, this->length = exists ? length : 0;
#pragma unroll
    for (Matrix& m : matrix) m.at += first * m.stride + column;
  }
  // f(r, t, inside): this thread's r-th row of tile i is row t of the tile; does it exist?
  template <class Function>
  __device__ void each_row(int i, const Function& f) const {
    const int left = length - i * Tile::kSteps;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int t = first + r * stride;
      if (first >= stride || t >= Tile::kSteps) break;
      f(r, t, t < left);
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
  for (int i = 0; i < tiles; ++i) {
    // Feeders wrote input and BC of tile i, finishers have read y of tile i - 2.
    sync_roles(block.threads);
    walker.walk_tile(i & 1);
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
  sync_roles(block.threads);  // walkers have read all of input
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
  sync_roles(block.threads);  // (feeders wrote tile 0 for the walkers)
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
    selective_scan_fused_kernel(ScanArgs<T> a, Chunks chunks, int chosen_width, int first_server) {
  extern __shared__ __align__(32) unsigned char shared_memory[];
  auto& memory = *reinterpret_cast<ScanMemory<T, Tile>*>(shared_memory);
  // Where blocks share a multiprocessor, all are as wide as can be: a constant here.
  const int width = kBlocksPerSM == 1 ? chosen_width : Tile::kChannels;
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

template <class T>
void selective_scan_registers(const ScanArgs<T>& a, cudaStream_t stream) {
  const int64_t N = a.d_state;
  if (N > 64) fail("selective_scan_registers: d_state: expected at most 64, found ", N);
  if (a.batch * a.d_inner == 0) return;
  const auto kernel =
      N > 16 ? selective_scan_registers_kernel<T, 64> : selective_scan_registers_kernel<T, 16>;
  kernel<<<ceil_div(a.batch * a.d_inner, 128), 128, 0, stream>>>(a);
  CUDA_CHECK(cudaGetLastError());
}

template <class T>
void selective_scan_lanes(const ScanArgs<T>& a, cudaStream_t stream) {
  if (a.batch * a.d_inner == 0) return;
  const auto kernel = a.d_state > 64   ? selective_scan_lanes_kernel<T, 16>
                      : a.d_state > 16 ? selective_scan_lanes_kernel<T, 4>
                                       : selective_scan_lanes_kernel<T, 1>;
  kernel<<<ceil_div(a.batch * a.d_inner * kScanLanes, 128), 128, 0, stream>>>(a);
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
  if (a.batch * ceil_div(a.d_inner, 16) >= multiprocessors()) return 1;
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
using FewScan = ScanTile<2, 8, 12, 64, 96, 3, 768>;
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
    if (launch_spread<FewScan>(a, 1, stream)) return;
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
// The two kernels that do so, ssd_fused_kernel and on Hopper ssd_warpgroup_kernel, share their
// parts. Either can cut a sequence into segments: first the states at their ends, then, each
// segment from the state before it, the outputs (ssd_split). float32, and shapes that are not in
// tiles (head_dim not a multiple of 64, or d_state above 256), take the naive one.
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
    y = warp_sum(y);
    if (lane == 0) a.out[t * a.out_stride + channel] = from_float<T>(y + D * x);
  }
  for (int i = 0; i < kSsdNaiveStates; ++i) {
    const int n = lane + 32 * i;
    if (a.hT && n < N) a.hT[row * N + n] = h[i];
  }
}

// --- what a block of a tensor-core rung works on

constexpr int kSsdChunk = 64;  // steps of a chunk

struct SsdSegments {
  int64_t length = 0;      // tokens in a segment, a multiple of kSsdChunk
  int64_t count = 1;       // segments in a sequence of L tokens
  float* state = nullptr;  // (count - 1, batch, heads, head_dim, d_state): from a zero start
  float* decay = nullptr;  // (count - 1, batch, heads): of a state that passes the segment
};

// One segment of one sequence, and some rows (head, p) of one group.
struct SsdBlock {
  int64_t b, segment;       // the sequence; its segment
  int64_t row, begin, end;  // row of the sequence's first token; the segment's steps
  int group, first;         // the group; the block's first row (head, p) in it
  bool last, idle;          // the sequence's last segment; nothing to do
};

// Neighbouring blocks have the same segment and group, and share B and C through L2.
template <int kRows, bool kOutputs, class T>
__device__ inline SsdBlock ssd_block(const SsdArgs<T>& a, const SsdSegments& segments) {
  const int tiles = ceil_div(a.n_heads / a.n_groups * a.head_dim, kRows);
  const int64_t launched = kOutputs ? segments.count : segments.count - 1;
  SsdBlock block;
  int64_t i = blockIdx.x;
  block.first = i % tiles * kRows;
  block.group = (i /= tiles) % a.n_groups;
  block.segment = (i /= a.n_groups) % launched, block.b = i / launched;
  const Rows rows = rows_of(block.b, a.L, a.cu_seqlens);
  block.row = rows.first, block.begin = block.segment * segments.length;
  block.last = block.begin + segments.length >= rows.count;
  block.end = block.last ? rows.count : block.begin + segments.length;
  // A shorter sequence has fewer segments, and no segment wants the state after the last.
  block.idle = (block.begin > 0 && block.begin >= rows.count) || (!kOutputs && block.last);
  return block;
}

// Steps of the chunk that starts at t, 0 or less beyond the end of the segment.
__device__ inline int steps_from(const SsdBlock& block, int64_t t) {
  return min(block.end - t, int64_t{kSsdChunk});
}

// Rows of one head, from row `offset` of the block. Those beyond the group are computed on zeros,
// with the decays of the block's first head, and stored nowhere.
struct SsdRows {
  bool active;
  int head, p;
};
template <class T>
__device__ inline SsdRows ssd_rows(const SsdArgs<T>& a, const SsdBlock& block, int offset) {
  const int heads = a.n_heads / a.n_groups;
  const bool active = block.first + offset < heads * a.head_dim;
  const int row = block.first + (active ? offset : 0);
  return {active, block.group * heads + row / a.head_dim, row % a.head_dim};
}

// --- decays

// Those of one head in one chunk, in shared memory.
struct SsdDecays {
  float cum[kSsdChunk];     // log2 a(-1, t), so that a(s, t) delta_s = 2^(cum[t] - source[s])
  float source[kSsdChunk];  // cum[s] - log2 delta_s: infinite beyond the end, where delta is 0
  float carry[kSsdChunk];   // a(-1, t)
  float fade[kSsdChunk];    // a(s, 63) delta_s
};

struct SsdHead {
  int index;
  float A_log2, dt_bias;  // A log2(e)
};
template <class T>
__device__ inline SsdHead ssd_head(const SsdArgs<T>& a, int head) {
  return {head, a.A[head] * kLog2e, a.dt_bias ? a.dt_bias[head] : 0.f};
}

// Raw dt of a head for make_decays: lane i has steps t + 2i and t + 2i + 1.
template <class T>
__device__ inline void load_dt(T (&dt)[2], const SsdArgs<T>& a, const SsdBlock& block, int head,
                               int64_t t) {
  const int lane = threadIdx.x % 32, left = steps_from(block, t) - 2 * lane;
  const T* from = a.dt + (block.row + t + 2 * lane) * a.dt_stride + head;
  dt[0] = left > 0 ? from[0] : T();
  dt[1] = left > 1 ? from[a.dt_stride] : T();
}

// By one warp, from dt of load_dt; `steps` of the chunk exist.
template <class T>
__device__ inline void make_decays(SsdDecays& to, const SsdArgs<T>& a, const SsdHead& head,
                                   const T (&dt)[2], int steps) {
  const int lane = threadIdx.x % 32;
  const float delta0 = 2 * lane < steps ? ssd_delta(a, to_float(dt[0]) + head.dt_bias) : 0.f;
  const float delta1 = 2 * lane + 1 < steps ? ssd_delta(a, to_float(dt[1]) + head.dt_bias) : 0.f;
  // A step that decays by 2^-152 or more leaves 0 in float32; stopping there bounds the sums
  // to 64 * 152, and so the rounding of their differences.
  const float first = fmaxf(delta0 * head.A_log2, -152.f);
  const float both = first + fmaxf(delta1 * head.A_log2, -152.f);
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

// --- tiles in shared memory: 64 rows of 16-bit values, one row a step, in columns of 64 values
// (128 bytes), each column 64 x 128 bytes on its own. In a column, piece c (16 bytes) of row r lies
// at c ^ (r % 8), so that the eight rows of a matrix, and one row, touch all banks once ("128-byte
// swizzle").

constexpr int kSsdColumn = 64 * 128;

__device__ constexpr uint32_t tile_offset(uint32_t row, uint32_t piece) {
  return piece / 8 * kSsdColumn + row * 128 + ((piece ^ row) & 7) * 16;
}

// The address `pieces` to the right in the same row. In binary, the piece that `address` names
// must have no 1 where `pieces` has one; so with rows, downwards.
__device__ inline uint32_t move_right(uint32_t address, uint32_t pieces) {
  return (address ^ (pieces % 8 * 16)) + pieces / 8 * kSsdColumn;
}
__device__ inline uint32_t move_down(uint32_t address, uint32_t rows) {
  return (address ^ (rows % 8 * 16)) + rows * 128;
}

// Where a lane points ldmatrix and stmatrix, for the four 8 x 8 matrices from a piece on: side by
// side (two pieces of 8 rows, then of the next 8 rows), or one above the other (a piece of two
// times 8 rows, then the next piece).
__device__ inline uint32_t beside(uint32_t piece = 0) {
  const uint32_t lane = threadIdx.x % 32;
  return tile_offset(lane / 16 * 8 + lane % 8, piece + lane / 8 % 2);
}
__device__ inline uint32_t above() {
  const uint32_t lane = threadIdx.x % 32;
  return tile_offset(lane / 8 % 2 * 8 + lane % 8, lane / 16);
}

// Shared memory of a block, as offsets: kStages chunks of B, x and C; M; for each warp a corner in
// which kCornerSteps rows of out are transposed; the decays; two barriers for each stage.
template <int kStates, int kRows_, int kStages_, int kBytesOfM, int kCornerSteps, bool kOutputs>
struct SsdTiles {
  static constexpr int kRows = kRows_, kHeads = kRows / 64, kStages = kStages_;
  static constexpr int kBColumns = kStates / 64, kXColumns = kRows / 64;
  static constexpr int kX = kBColumns * kSsdColumn, kC = kX + kXColumns * kSsdColumn;
  static constexpr int kStage = kC + (kOutputs ? kBColumns * kSsdColumn : 0);
  static constexpr int kM = kStages * kStage;
  static constexpr int kCorners = kM + (kOutputs ? kHeads * kBytesOfM : 0);
  static constexpr int kDecays = kCorners + (kOutputs ? kCornerSteps * kRows * 2 : 0);
  static constexpr int kBarriers = kDecays + kStages * kHeads * int(sizeof(SsdDecays));
};

// Column c of the chunk at t to its place in a stage, by kThreads threads, 16 bytes each at a
// time: of B, then of x, then of C. Zeros where the segment, the group or the states end.
template <class Tiles, int kThreads, class T>
__device__ inline void copy_column(uint32_t stage, int c, const SsdArgs<T>& a,
                                   const SsdBlock& block, int64_t t) {
  constexpr int kBx = Tiles::kBColumns + Tiles::kXColumns, kRowStep = kThreads / 8;
  const bool is_B = c < Tiles::kBColumns, is_x = !is_B && c < kBx;
  const T* from = is_x ? a.x : is_B ? a.B : a.C;
  const int64_t stride = is_x ? a.x_stride : is_B ? a.B_stride : a.C_stride;
  const int width = is_x ? a.n_heads / a.n_groups * a.head_dim : a.d_state;  // of a group
  const int column = 64 * (is_x ? c - Tiles::kBColumns : c % kBx);
  const int row = threadIdx.x % kThreads / 8, piece = threadIdx.x % 8;
  const int left_columns = width - (is_x ? block.first : 0) - 8 * piece;
  const int left = column < left_columns ? steps_from(block, t) - row : 0;
  from += (block.row + t + row) * stride + int64_t{block.group + 1} * width - left_columns + column;
  const uint32_t to = stage + c * kSsdColumn + tile_offset(row, piece);
#pragma unroll
  for (int i = 0; i < kSsdChunk; i += kRowStep, from += kRowStep * stride)
    copy_async(static_cast<Vector<T, 8>*>(__cvta_shared_to_generic(move_down(to, i))), from,
               i < left);
}

// --- tensor cores (PTX ISA, "mma.m16n8k16" and "ldmatrix"). In a warp, lane l is g = l / 4,
// q = l % 4. Operand A (16 x 16): register pairs at rows g, g + 8 and columns 2q, 2q + 1 (+ 8).
// Operand B (16 x 8): rows 2q, 2q + 1 (+ 8), column g. Result (16 x 8): rows g, g + 8, columns
// 2q, 2q + 1. So a result packed to 16 bits is operand A as it stands, and the transpose of a
// result is operand B as it stands.

template <class T>  // two 16-bit values in one register, the first in the low half
__device__ inline uint32_t pack_pair(float low, float high) {
  return pack<T>({low, high}).word[0];
}
__device__ inline float2 pair_at(const float* p) { return *reinterpret_cast<const float2*>(p); }

// d (16 x 16, two tiles) += a (16 x 16) b (16 x 16).
template <class T>
__device__ inline void mma(float (*d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4]) {
#define MAMBA_MMA(TYPE, D, B0, B1)                                 \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE       \
      ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
      : "+f"(D[0]), "+f"(D[1]), "+f"(D[2]), "+f"(D[3])             \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(B0), "r"(B1));
  for (int i = 0; i < 2; ++i)
    if constexpr (std::is_same_v<T, __half>) {
      MAMBA_MMA("f16", d[i], b[2 * i], b[2 * i + 1])
    } else {
      MAMBA_MMA("bf16", d[i], b[2 * i], b[2 * i + 1])
    }
#undef MAMBA_MMA
}

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
// Four to shared memory, likewise (Hopper).
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
__device__ inline uint32_t transpose_matrix(uint32_t r) {  // one, in the registers of a warp
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;" : "+r"(r));
  return r;
}

// --- what both kernels do with their registers. A warp's rows of h, 16 kRowTiles rows (head, p),
// are h[i][j]: rows p + 16i + g (+ 8 for elements 2 and 3), columns 8j + 2q, + 1. All loops over
// registers are unrolled, or they would be arrays in memory; the long ones say so.

template <class T>
__host__ __device__ int64_t ssd_state_size(const SsdArgs<T>& a) {  // of one sequence
  return int64_t{a.n_heads} * a.head_dim * a.d_state;
}

// f(place in `state` (heads, P, N), element of h, its right neighbour) for all pairs that exist.
template <class T, class Float, int kRowTiles, int kTiles, class Function>
__device__ inline void each_pair(Float* state, float (&h)[kRowTiles][kTiles][4],
                                 const SsdArgs<T>& a, const SsdRows& rows, const Function& f) {
  const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  state += (int64_t{rows.head} * a.head_dim + rows.p + g) * a.d_state + 2 * q;
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
    for (int k = 0; k < 4; k += 2, state += 8 * a.d_state)
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
        if (rows.active && 8 * j + 2 * q < a.d_state) f(state + 8 * j, h[i][j][k], h[i][j][k + 1]);
}

// h = h0, or 0. pass_segments: past the segments before this one, h = decay h + (their state from
// zero).
template <bool kOutputs, class T, int kRowTiles, int kTiles>
__device__ inline void load_state(float (&h)[kRowTiles][kTiles][4], const SsdArgs<T>& a,
                                  const SsdBlock& block, const SsdRows& rows) {
  for (auto& row : h)
    for (auto& tile : row) tile[0] = tile[1] = tile[2] = tile[3] = 0;
  if (kOutputs && a.h0)
    each_pair(a.h0 + block.b * ssd_state_size(a), h, a, rows,
              [](const float* from, float& h0, float& h1) {
                const float2 v = pair_at(from);
                h0 = v.x, h1 = v.y;
              });
}
template <class T, int kRowTiles, int kTiles>
__device__ inline void pass_segments(float (&h)[kRowTiles][kTiles][4], const SsdArgs<T>& a,
                                     const SsdSegments& segments, const SsdBlock& block,
                                     const SsdRows& rows) {
  for (int64_t s = 0; s < block.segment; ++s) {
    const int64_t i = s * a.batch + block.b;
    const float decay = segments.decay[i * a.n_heads + rows.head];
    each_pair(segments.state + i * ssd_state_size(a), h, a, rows,
              [&](const float* from, float& h0, float& h1) {
                const float2 v = pair_at(from);
                h0 = decay * h0 + v.x, h1 = decay * h1 + v.y;
              });
  }
}

// To hT after a sequence's last segment; without outputs, to the segments' states, with its decay.
template <bool kOutputs, class T, int kRowTiles, int kTiles>
__device__ inline void store_state(float (&h)[kRowTiles][kTiles][4], const SsdArgs<T>& a,
                                   const SsdSegments& segments, const SsdBlock& block,
                                   const SsdRows& rows, float segment_decay) {
  const int64_t i = kOutputs ? block.b : block.segment * a.batch + block.b;
  float* to = kOutputs ? a.hT : segments.state;
  if (to && (block.last || !kOutputs))
    each_pair(to + i * ssd_state_size(a), h, a, rows, [](float* to, float& h0, float& h1) {
      *reinterpret_cast<float2*>(to) = {h0, h1};
    });
  if (!kOutputs && rows.active && rows.p == 0 && threadIdx.x % 32 == 0)
    segments.decay[i * a.n_heads + rows.head] = segment_decay;
}

// Two tiles of h, rounded, as operand A of 16 columns.
template <class T>
__device__ inline void round_state(uint32_t (&A)[4], const float (*h)[4]) {
  for (int r = 0; r < 4; ++r) A[r] = pack_pair<T>(h[r / 2][r % 2 * 2], h[r / 2][r % 2 * 2 + 1]);
}

// A tile (16 x 16) of M[t,s] = a(s, t) delta_s S[t,s] from its S[t,s] = C_t . B_s; on the diagonal
// s <= t only, and D is added (y_t has D x_t). m[j][i]: steps t + 8i + g; s + 8j + 2q, + 1.
template <class T>
__device__ inline void make_M_tile(uint32_t (&m)[2][2], const float (*S)[4], const SsdDecays& now,
                                   int t, int s, float D) {
  const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  const float cum[2] = {now.cum[t + g], now.cum[t + 8 + g]};
  float2 v[2][2];
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const float2 source = pair_at(&now.source[s + 8 * j + 2 * q]);
    for (int i = 0; i < 2; ++i)
      v[j][i] = {S[j][2 * i] * exp2_approx(cum[i] - source.x),
                 S[j][2 * i + 1] * exp2_approx(cum[i] - source.y)};
  }
  if (t == s)
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      float2& w = v[k / 2][k % 2];
      const int ahead = 8 * (k / 2) + 2 * q - 8 * (k % 2) - g;  // s - t of this element
      w.x = ahead < 0 ? w.x : ahead == 0 ? w.x + D : 0.f;
      w.y = ahead < -1 ? w.y : ahead == -1 ? w.y + D : 0.f;
    }
  for (int k = 0; k < 4; ++k) m[k / 2][k % 2] = pack_pair<T>(v[k / 2][k % 2].x, v[k / 2][k % 2].y);
}

// Y^T diag(a(-1, t)): 16 rows p, the steps t of a chunk in tiles of 8.
__device__ inline void carry_start(float (&Y)[8][4], const SsdDecays& now) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float2 carry = pair_at(&now.carry[8 * j + threadIdx.x % 4 * 2]);
    Y[j][0] *= carry.x, Y[j][1] *= carry.y, Y[j][2] *= carry.x, Y[j][3] *= carry.y;
  }
}

// X^T diag(a(s, 63) delta_s): 16 rows p, 16 steps s.
template <class T>
__device__ inline void fade_X(uint32_t (&faded)[4], const uint32_t (&X)[4], const SsdDecays& now,
                              int s) {
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const float2 fade = pair_at(&now.fade[s + r / 2 * 8 + threadIdx.x % 4 * 2]);
    float v[2];
    unpack(Vector<T, 2>{{X[r]}}, v);
    faded[r] = pack_pair<T>(v[0] * fade.x, v[1] * fade.y);
  }
}

// Y^T -> out, kSteps steps at a time: transposed in the warp's own corner of shared memory, kSteps
// rows of kPieces pieces; piece c of row r lies at c ^ (r / kRowsPerLine), as in a tile. A lane
// then stores one piece of a row. kSteps = 16 is for Hopper, and for kRowTiles = 1.
template <int kSteps, class T, int kRowTiles>
__device__ inline void write_transposed(const SsdArgs<T>& a, const SsdBlock& block,
                                        const SsdRows& rows, int64_t t,
                                        const float (&Y)[kRowTiles][8][4], char* corner) {
  constexpr int kPieces = 2 * kRowTiles, kRowsPerLine = 8 / kPieces;
  const int lane = threadIdx.x % 32, row = lane / kPieces, piece = lane % kPieces;
  const int left = rows.active && row < kSteps ? steps_from(block, t) - row : 0;
  T* out = a.out + (block.row + t + row) * a.out_stride + int64_t{rows.head} * a.head_dim + rows.p +
           8 * piece;
  const auto place = [&](int row, int piece) {
    return corner + (row * kPieces + (piece ^ (row / kRowsPerLine % kPieces))) * 16;
  };
  const auto pair = [&](int i, int j) {  // rows p 8i + g, steps 8j + 2q, + 1
    return pack_pair<T>(Y[i / 2][j][i % 2 * 2], Y[i / 2][j][i % 2 * 2 + 1]);
  };
#pragma unroll
  for (int j = 0; j < 8; j += kSteps / 8, out += kSteps * a.out_stride) {
    __syncwarp();  // the reads of the steps before, before these writes
    if constexpr (kSteps == 16)
      store_matrices_transposed(
          __cvta_generic_to_shared(place(lane / 16 * 8 + lane % 8, lane / 8 % 2)), pair(0, j),
          pair(1, j), pair(0, j + 1), pair(1, j + 1));
    else
      for (int i = 0; i < kPieces; ++i)
        *reinterpret_cast<uint32_t*>(place(lane / 4, i) + lane % 4 * 4) =
            transpose_matrix(pair(i, j));
    __syncwarp();  // these writes before the reads
    if (8 * j < left)
      *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(place(row, piece));
  }
}

// --- fused: the matrix form, one pass over global memory.
//
// Block: 4 warps, one segment of one sequence, 128 rows (head, p) of one group (64 if d_state is
//        above 128). A warp owns 32 (16) rows of one head.
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

// M of a head: 10 tiles (16 x 16) on and below the diagonal, numbered row by row, each stored as
// the operand B that the transpose of this result is, 16 bytes a lane.
constexpr int kSsdBytesOfM = 10 * 512;
template <int kStates>
constexpr int kSsdFusedRows = kStates <= 128 ? 128 : 64;
template <int kStates, bool kOutputs>
using SsdFusedTiles = SsdTiles<kStates, kSsdFusedRows<kStates>, 2, kSsdBytesOfM, 8, kOutputs>;

// M of each head of the block; warp w makes tiles w, w + 4 and w + 8 of all.
template <class T, int kStates>
__device__ inline void make_M(Vector<T, 8>* M, uint32_t tile_B, uint32_t tile_C,
                              const SsdDecays* now, int warp, int heads, const float* D,
                              int head0) {
  float S[3][2][4] = {};
  int t[3], s[3];  // a tile's first steps
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    const int tile = warp + 4 * i, row = (tile > 0) + (tile > 2) + (tile > 5);
    t[i] = 16 * row, s[i] = 16 * (tile - row * (row + 1) / 2);
  }
  const uint32_t A = tile_C + above(), B = tile_B + beside();
  const auto multiply = [&](int i, int k) {
    uint32_t a[4], b[4];
    load_matrices(a, move_right(A + tile_offset(t[i], 0), 2 * k));
    load_matrices(b, move_right(B + tile_offset(s[i], 0), 2 * k));
    mma<T>(S[i], a, b);
  };
#pragma unroll
  for (int k = 0; k < kStates / 16; ++k) multiply(0, k), multiply(1, k);
  if (warp < 2)
#pragma unroll
    for (int k = 0; k < kStates / 16; ++k) multiply(2, k);
#pragma unroll 1
  for (int j = 0; j < heads; ++j) {
    const float D_j = D ? D[head0 + j] : 0.f;
#pragma unroll
    for (int i = 0; i < 3; ++i)
      if (i < 2 || warp < 2) {
        uint32_t m[2][2];
        make_M_tile<T>(m, S[i], now[j], t[i], s[i], D_j);
        M[(10 * j + warp + 4 * i) * 32 + threadIdx.x % 32] = {{m[0][0], m[1][0], m[0][1], m[1][1]}};
      }
  }
}

// Y^T = (h C^T) diag(a(-1, t)).
template <class T, int kRowTiles, int kTiles>
__device__ inline void from_start(float (&Y)[kRowTiles][8][4],
                                  const float (&h)[kRowTiles][kTiles][4], uint32_t tile_C,
                                  const SsdDecays& now) {
#pragma unroll
  for (int k = 0; k < kTiles / 2; ++k) {
    uint32_t a[kRowTiles][4], b[4];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) round_state<T>(a[i], &h[i][2 * k]);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      load_matrices(b, move_right(tile_C + beside(), 2 * k) + tile_offset(16 * j, 0));
      for (int i = 0; i < kRowTiles; ++i) mma<T>(&Y[i][2 * j], a[i], b);
    }
  }
  for (int i = 0; i < kRowTiles; ++i) carry_start(Y[i], now);
}

// Y^T += X^T M^T. x: where this lane points ldmatrix for the warp's rows of X^T.
template <class T, int kRowTiles>
__device__ inline void within_chunk(float (&Y)[kRowTiles][8][4], uint32_t x,
                                    const Vector<T, 8>* M) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {  // steps s
    uint32_t X[kRowTiles][4];
    for (int i = 0; i < kRowTiles; ++i)
      load_matrices_transposed(X[i], move_right(x, 2 * i) + tile_offset(16 * k, 0));
#pragma unroll
    for (int j = k; j < 4; ++j) {  // steps t
      const Vector<T, 8> m = M[(j * (j + 1) / 2 + k) * 32 + threadIdx.x % 32];
      for (int i = 0; i < kRowTiles; ++i) mma<T>(&Y[i][2 * j], X[i], m.word);
    }
  }
}

// h' = a(-1, 63) h + (a(s, 63) delta_s X)^T B.
template <class T, int kRowTiles, int kTiles>
__device__ inline void advance_state(float (&h)[kRowTiles][kTiles][4], uint32_t x, uint32_t tile_B,
                                     const SsdDecays& now) {
  uint32_t X[4][kRowTiles][4];
#pragma unroll
  for (int k = 0; k < 4; ++k)
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      load_matrices_transposed(X[k][i], move_right(x, 2 * i) + tile_offset(16 * k, 0));
      fade_X<T>(X[k][i], X[k][i], now, 16 * k);
    }
  const float decay = now.carry[kSsdChunk - 1];
#pragma unroll
  for (int n = 0; n < kTiles / 2; ++n) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int r = 0; r < 8; ++r) h[i][2 * n + r / 4][r % 4] *= decay;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      uint32_t b[4];
      load_matrices_transposed(b, move_right(tile_B + above(), 2 * n) + tile_offset(16 * k, 0));
      for (int i = 0; i < kRowTiles; ++i) mma<T>(&h[i][2 * n], X[k][i], b);
    }
  }
}

template <class T, int kStates, bool kOutputs>
__global__ void __launch_bounds__(128, kStates <= 128 ? 2 : 1)
    ssd_fused_kernel(SsdArgs<T> a, SsdSegments segments) {
  using Tiles = SsdFusedTiles<kStates, kOutputs>;
  const SsdBlock block = ssd_block<Tiles::kRows, kOutputs>(a, segments);
  if (block.idle) return;
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // uniform, and known to be
  const SsdRows rows = ssd_rows(a, block, warp * Tiles::kRows / 4);
  const int head0 = ssd_rows(a, block, 0).head, slot = rows.head - head0;
  const int heads = ssd_rows(a, block, Tiles::kRows - 64).head - head0 + 1;

  extern __shared__ __align__(128) char shared[];
  const uint32_t base = __cvta_generic_to_shared(shared);
  Vector<T, 8>* M = reinterpret_cast<Vector<T, 8>*>(shared + Tiles::kM);
  SsdDecays* decays = reinterpret_cast<SsdDecays*>(shared + Tiles::kDecays);  // [2][kHeads]

  // The last warps, which have the fewest tiles of M, each make the decays of one head.
  const int decay_slot = 3 - warp;
  const SsdHead head = ssd_head(a, head0 + min(decay_slot, heads - 1));
  T dt[2] = {};
  const auto fetch = [&](int64_t t, int parity) {  // a chunk, its decays, and dt of the next
#pragma unroll
    for (int c = 0; c < Tiles::kStage / kSsdColumn; ++c)
      copy_column<Tiles, 128>(base + parity * Tiles::kStage, c, a, block, t);
    copy_async_commit();
    if (decay_slot < heads)
      make_decays(decays[parity * Tiles::kHeads + decay_slot], a, head, dt, steps_from(block, t));
    load_dt(dt, a, block, head.index, t + kSsdChunk);
  };
  load_dt(dt, a, block, head.index, block.begin);
  if (block.begin < block.end) fetch(block.begin, 0);

  float h[Tiles::kRows / 64][kStates / 8][4], segment_decay = 1;
  load_state<kOutputs>(h, a, block, rows);
  if (kOutputs) pass_segments(h, a, segments, block, rows);
  int parity = 0;  // of the chunk: which stage, which decays
#pragma unroll 1
  for (int64_t t = block.begin; t < block.end; t += kSsdChunk, parity ^= 1) {
    copy_async_wait();
    // This chunk's copies and decays before their reads; and all reads of the previous chunk
    // (its stage, decays and M) before the writes that follow.
    __syncthreads();
    if (t + kSsdChunk < block.end) fetch(t + kSsdChunk, parity ^ 1);
    const uint32_t stage = base + parity * Tiles::kStage;
    const uint32_t x = stage + Tiles::kX + beside(warp * Tiles::kRows / 32);
    const SsdDecays* now = decays + parity * Tiles::kHeads;
    if constexpr (kOutputs) {
      float Y[Tiles::kRows / 64][8][4] = {};
      make_M<T, kStates>(M, stage, stage + Tiles::kC, now, warp, heads, a.D, head0);
      from_start<T>(Y, h, stage + Tiles::kC, now[slot]);
      __syncthreads();  // M, by all warps, before its reads
      within_chunk(Y, x, M + slot * (kSsdBytesOfM / 16));
      write_transposed<8>(a, block, rows, t, Y, shared + Tiles::kCorners + warp * 4 * Tiles::kRows);
    }
    advance_state<T>(h, x, stage, now[slot]);
    segment_decay *= now[slot].carry[kSsdChunk - 1];
  }
  store_state<kOutputs>(h, a, segments, block, rows, segment_decay);
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
// Shared: C, B, x and decays of three chunks; an M for each warpgroup, a tile. Stages are handed
//        over by two barriers each: full and empty.

constexpr int kSsdWarpgroups = 3;
template <int kStates, bool kOutputs>
using SsdWarpgroupTiles = SsdTiles<kStates, 64 * kSsdWarpgroups, 3, kSsdColumn, 16, kOutputs>;
template <class Tiles>
constexpr int kSsdWarpgroupBytes = Tiles::kBarriers + 16 * Tiles::kStages + 1024;  // to align

// wgmma: d (64 x 64) = A (64 x 16) B (16 x 64) + (add ? d : 0), in the background. A: registers, or
// along k in shared memory; B: along k in shared memory, or (kTransposed) along its other side.
template <class T, int kTransposed = 0, class A>
__device__ inline void multiply_async(float (*d)[4], const A& a, uint64_t b, int add) {
#define MAMBA_D4(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define MAMBA_WGMMA(TYPE, ADD, A_B, ...)                                                          \
  asm volatile("{.reg .pred p; setp.ne.b32 p, " ADD                                               \
               ", 0; "                                                                            \
               "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE                        \
               " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21," \
               "%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, " A_B ";}"                              \
               : MAMBA_D4(0), MAMBA_D4(1), MAMBA_D4(2), MAMBA_D4(3), MAMBA_D4(4), MAMBA_D4(5),    \
                 MAMBA_D4(6), MAMBA_D4(7)                                                         \
               : __VA_ARGS__);
#define MAMBA_WGMMA_SHARED(TYPE) \
  MAMBA_WGMMA(TYPE, "%34", "%32, %33, p, 1, 1, 0, 0", "l"(a), "l"(b), "r"(add))
#define MAMBA_WGMMA_REGISTERS(TYPE)                                                      \
  MAMBA_WGMMA(TYPE, "%37", "{%32,%33,%34,%35}, %36, p, 1, 1, %38", "r"(a[0]), "r"(a[1]), \
              "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(kTransposed))
  constexpr bool kHalf = std::is_same_v<T, __half>, kShared = std::is_same_v<A, uint64_t>;
  if constexpr (kHalf && kShared) {
    MAMBA_WGMMA_SHARED("f16")
  } else if constexpr (kShared) {
    MAMBA_WGMMA_SHARED("bf16")
  } else if constexpr (kHalf) {
    MAMBA_WGMMA_REGISTERS("f16")
  } else {
    MAMBA_WGMMA_REGISTERS("bf16")
  }
#undef MAMBA_WGMMA_REGISTERS
#undef MAMBA_WGMMA_SHARED
#undef MAMBA_WGMMA
#undef MAMBA_D4
}

// Registers that wgmma will read or add to are written, before it starts.
__device__ inline void multiply_start() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void multiply_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>  // all but the last kPending commits are done
__device__ inline void multiply_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// This thread's writes to shared memory become visible to wgmma after the next barrier.
__device__ inline void publish_to_wgmma() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// What wgmma wants to know of a tile (PTX ISA, "matrix descriptor"): where it starts, 8192 bytes to
// the next column, 1024 to the next 8 rows, 128-byte swizzle.
__device__ inline uint64_t describe(uint32_t address) {
  return uint64_t{1} << 62 | uint64_t{1024 / 16} << 32 | uint64_t{kSsdColumn / 16} << 16 |
         (address & 0x3ffff) / 16;
}
__device__ inline uint64_t describe_states(uint32_t tile, int k) {  // columns 16k.. of B or C
  return describe(tile + k / 4 * kSsdColumn + k % 4 * 32);
}

__device__ inline void wait_for(__mbarrier_t* barrier, bool parity) {  // the phase's end
  while (!__mbarrier_try_wait_parity(barrier, parity, 10'000'000)) {
  }
}
__device__ inline void sync_warpgroup(int warpgroup) {
  asm volatile("bar.sync %0, 128;" ::"r"(1 + warpgroup) : "memory");
}

// The last warpgroup fetches chunks, and makes their decays (a warp for each of the others), as far
// ahead as there are stages. It hands its registers to the others.
template <class Tiles, class T>
__device__ inline void feed_chunks(char* shared, __mbarrier_t* full, __mbarrier_t* empty,
                                   const SsdArgs<T>& a, const SsdBlock& block, int warp) {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
  const bool decaying = warp < Tiles::kHeads;
  const SsdHead head = ssd_head(a, ssd_rows(a, block, decaying ? 64 * warp : 0).head);
  SsdDecays* decays = reinterpret_cast<SsdDecays*>(shared + Tiles::kDecays) + warp;
  const auto hand_over = [&](int stage) {  // its copies have arrived
    publish_to_wgmma();
    __mbarrier_arrive(full + stage);
  };
  const uint32_t base = __cvta_generic_to_shared(shared);
  T next_dt[2] = {};
  load_dt(next_dt, a, block, head.index, block.begin);
  int stage = 0, parity = 1, previous = -1;
#pragma unroll 1
  for (int64_t t = block.begin; t < block.end; t += kSsdChunk) {
    const T dt[2] = {next_dt[0], next_dt[1]};
    load_dt(next_dt, a, block, head.index, t + kSsdChunk);
    wait_for(empty + stage, parity);  // passes at once in the first round
#pragma unroll 1
    for (int c = (warp + 1) % 4; c < Tiles::kStage / kSsdColumn; c += 4)
      copy_column<Tiles, 32>(base + stage * Tiles::kStage, c, a, block, t);
    copy_async_commit();
    if (decaying) make_decays(decays[stage * Tiles::kHeads], a, head, dt, steps_from(block, t));
    if (previous >= 0) copy_async_wait_but<1>(), hand_over(previous);
    previous = stage;
    if (++stage == Tiles::kStages) stage = 0, parity ^= 1;
  }
  if (previous >= 0) copy_async_wait_but<0>(), hand_over(previous);
}

// M of the warpgroup's head, as a tile.
template <class T, int kStates>
__device__ inline void warpgroup_make_M(uint32_t M, uint32_t tile_B, uint32_t tile_C,
                                        const SsdDecays& now, int warp, float D) {
  float S[8][4];  // S[t,s] = C_t . B_s
  multiply_start();
#pragma unroll
  for (int k = 0; k < kStates / 16; ++k)
    multiply_async<T>(S, describe_states(tile_C, k), describe_states(tile_B, k), k > 0);
  multiply_commit();
  multiply_wait<0>();
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    uint32_t m[2][2] = {};
    if (j <= warp) make_M_tile<T>(m, &S[2 * j], now, 16 * warp, 16 * j, D);
    store_matrices(move_right(M + tile_offset(16 * warp, 0) + above(), 2 * j), m[0][0], m[0][1],
                   m[1][0], m[1][1]);
  }
  publish_to_wgmma();
}

// Y^T = (h C^T) diag(a(-1, t)).
template <class T, int kTiles>
__device__ inline void warpgroup_from_start(float (&Y)[8][4], const float (&h)[kTiles][4],
                                            uint32_t tile_C, const SsdDecays& now) {
  uint32_t A[kTiles / 2][4];
#pragma unroll
  for (int k = 0; k < kTiles / 2; ++k) round_state<T>(A[k], &h[2 * k]);
  multiply_start();
#pragma unroll
  for (int k = 0; k < kTiles / 2; ++k)
    multiply_async<T>(Y, A[k], describe_states(tile_C, k), k > 0);
  multiply_commit();
  multiply_wait<0>();
  carry_start(Y, now);
}

// Y^T += X^T M^T, begun.
template <class T>
__device__ inline void warpgroup_within_chunk(float (&Y)[8][4], const uint32_t (&X)[4][4],
                                              uint32_t M) {
  multiply_start();
  for (int k = 0; k < 4; ++k) multiply_async<T>(Y, X[k], describe(M + 32 * k), 1);
  multiply_commit();
}

// h' = a(-1, 63) h + (a(s, 63) delta_s X)^T B, begun.
template <class T, int kTiles>
__device__ inline void warpgroup_advance_state(float (&h)[kTiles][4], const uint32_t (&X)[4][4],
                                               uint32_t tile_B, const SsdDecays& now) {
  uint32_t faded[4][4];
  for (int k = 0; k < 4; ++k) fade_X<T>(faded[k], X[k], now, 16 * k);
  const float decay = now.carry[kSsdChunk - 1];
#pragma unroll
  for (int j = 0; j < kTiles; ++j)
    for (int r = 0; r < 4; ++r) h[j][r] *= decay;
  multiply_start();
#pragma unroll
  for (int k = 0; k < 4; ++k)
#pragma unroll
    for (int c = 0; c < kTiles / 8; ++c)
      multiply_async<T, 1>(&h[8 * c], faded[k],
                           describe(tile_B + c * kSsdColumn + tile_offset(16 * k, 0)), 1);
  multiply_commit();
}

// The other warpgroups walk the segment, each with its 64 rows.
template <class Tiles, bool kOutputs, int kStates, class T>
__device__ inline void walk_chunks(char* shared, __mbarrier_t* full, __mbarrier_t* empty,
                                   const SsdArgs<T>& a, const SsdSegments& segments,
                                   const SsdBlock& block, int wg, int warp) {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 160;");
  const SsdRows rows = ssd_rows(a, block, 64 * wg + 16 * warp);
  const float D = a.D ? a.D[rows.head] : 0.f;
  const uint32_t base = __cvta_generic_to_shared(shared), M = base + Tiles::kM + wg * kSsdColumn;
  char* corner = shared + Tiles::kCorners + 512 * (4 * wg + warp);
  const SsdDecays* decays = reinterpret_cast<const SsdDecays*>(shared + Tiles::kDecays) + wg;

  float h[1][kStates / 8][4], segment_decay = 1;
  load_state<kOutputs>(h, a, block, rows);
  if (kOutputs) pass_segments(h, a, segments, block, rows);
  int number = 0, parity = 0;  // of the stage; of its phase
#pragma unroll 1
  for (int64_t t = block.begin; t < block.end; t += kSsdChunk) {
    const uint32_t stage = base + number * Tiles::kStage, tile_C = stage + Tiles::kC;
    const SsdDecays& now = decays[number * Tiles::kHeads];
    wait_for(full + number, parity);
    float Y[1][8][4];  // Y^T: rows p, columns t in tiles of 8
    if (kOutputs) {
      warpgroup_make_M<T, kStates>(M, stage, tile_C, now, warp, D);
      warpgroup_from_start<T>(Y[0], h[0], tile_C, now);
    }
    uint32_t X[4][4];  // X^T: rows p, steps s in tiles of 16
    for (int k = 0; k < 4; ++k)
      load_matrices_transposed(
          X[k], stage + Tiles::kX + beside(8 * wg + 2 * warp) + tile_offset(16 * k, 0));
    if (kOutputs) {
      sync_warpgroup(wg);  // M, by the warps of the warpgroup, before its reads
      warpgroup_within_chunk<T>(Y[0], X, M);
    }
    warpgroup_advance_state<T>(h[0], X, stage, now);
    segment_decay *= now.carry[kSsdChunk - 1];
    if (kOutputs) {
      multiply_wait<1>();  // Y is done; h' goes on
      write_transposed<16>(a, block, rows, t, Y, corner);
    }
    multiply_wait<0>();
    sync_warpgroup(wg);  // reads of the stage and of M, before they are written again
    if (threadIdx.x % 128 == 0) __mbarrier_arrive(empty + number);
    if (++number == Tiles::kStages) number = 0, parity ^= 1;
  }
  store_state<kOutputs>(h, a, segments, block, rows, segment_decay);
}

template <class T, int kStates, bool kOutputs>
__global__ void __launch_bounds__(128 * kSsdWarpgroups + 128, 1)
    ssd_warpgroup_kernel(SsdArgs<T> a, SsdSegments segments) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // wgmma exists in sm_90a only; see ssd_has_warpgroups
  using Tiles = SsdWarpgroupTiles<kStates, kOutputs>;
  const SsdBlock block = ssd_block<Tiles::kRows, kOutputs>(a, segments);
  if (block.idle) return;
  extern __shared__ __align__(1024) char unaligned[];
  char* shared = unaligned + (-__cvta_generic_to_shared(unaligned) & 1023);
  __mbarrier_t* full = reinterpret_cast<__mbarrier_t*>(shared + Tiles::kBarriers);  // [kStages]
  __mbarrier_t* empty = full + Tiles::kStages;
  if (threadIdx.x == 0)
    for (int i = 0; i < Tiles::kStages; ++i) {
      __mbarrier_init(full + i, 128);
      __mbarrier_init(empty + i, kSsdWarpgroups);
    }
  __syncthreads();  // the barriers, before their use

  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // uniform, and known to be
  if (warp / 4 == kSsdWarpgroups)
    feed_chunks<Tiles>(shared, full, empty, a, block, warp % 4);
  else
    walk_chunks<Tiles, kOutputs, kStates>(shared, full, empty, a, segments, block, warp / 4,
                                          warp % 4);
#endif
}

// --- step: one token for every sequence of a batch (a.L = 1). The state is most of what a step
// moves: it is requested before the wait for the kernel before (which cannot change it) and read
// and written exactly once. A row of h is spread over `lanes` lanes (a power of two), four
// neighbouring states each; a lane holds kSsdHeld rows at once. a.h0 is the state before, a.hT
// after; they are normally the same buffer. Grid: x = heads, pieces of their rows; y = batch.
// Pieces are as small as can be where few sequences must fill the GPU, else whole heads.

constexpr int kSsdStepThreads = 256;
constexpr int kSsdHeld = 2;                                    // rows that a lane holds at once
constexpr int kSsdStepRows = kSsdHeld * kSsdStepThreads / 32;  // that a block holds at once

inline int ssd_step_blocks(int64_t head_dim) {  // of a head, for few sequences
  return int(ceil_div(head_dim, kSsdStepRows));
}

// What decode asks for in place of a.out: the gated output in float, and what its norm needs.
template <class T>
struct SsdGate {
  const T* z = nullptr;  // (batch, d_inner)
  int64_t z_stride = 0;
  float* gated = nullptr;    // (batch, d_inner): y silu(z)
  float* squares = nullptr;  // (batch, n_heads * ssd_step_blocks): sums of their squares, or null
};

// Rows p0 .. of one head of sequence b, as many as a block holds: reads their states, and, once
// begin() returns true, advances them. Returns this thread's part of the squares of the gated y.
template <class T, class Begin>
__device__ inline float ssd_step_rows(const SsdArgs<T>& a, const SsdGate<T>& gate, int lanes, int b,
                                      int head, int p0, int end, const Begin& begin) {
  const int P = a.head_dim, N = a.d_state, group = head / (a.n_heads / a.n_groups);
  const int lane = threadIdx.x % lanes, step = int(blockDim.x) / lanes;
  const auto p_of = [&](int i) { return p0 + int(threadIdx.x) / lanes + i * step; };
  const int64_t channel = int64_t{head} * P, row = int64_t{b} * a.n_heads * P + channel;
  float h[kSsdHeld][4];
  const auto load_h = [&](int n) {
#pragma unroll
    for (int i = 0; i < kSsdHeld; ++i)
      unpack(load<4>(a.h0 + (row + p_of(i)) * N + n, a.h0 && p_of(i) < end && n < N), h[i]);
  };
  const float A = a.A[head], D = a.D ? a.D[head] : 0.f, dt_bias = a.dt_bias ? a.dt_bias[head] : 0.f;
  load_h(4 * lane);
  if (!begin()) return 0.f;

  const T* B = a.B + b * a.B_stride + group * N;
  const T* C = a.C + b * a.C_stride + group * N;
  float y[kSsdHeld] = {}, x[kSsdHeld] = {}, z[kSsdHeld] = {};
#pragma unroll
  for (int i = 0; i < kSsdHeld; ++i) {
    if (p_of(i) < end) x[i] = to_float(a.x[b * a.x_stride + channel + p_of(i)]);
    if (gate.z && p_of(i) < end) z[i] = to_float(gate.z[b * gate.z_stride + channel + p_of(i)]);
  }
  const float delta = ssd_delta(a, to_float(a.dt[b * a.dt_stride + head]) + dt_bias);
  const float decay = exp2_approx(delta * (kLog2e * A));
  for (int n = 4 * lane; n < N; n += 4 * lanes) {
    if (n >= 4 * lanes) load_h(n);
    float B_n[4], C_n[4];
    unpack(load<4>(B + n, true), B_n), unpack(load<4>(C + n, true), C_n);
#pragma unroll
    for (int i = 0; i < kSsdHeld; ++i) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        h[i][k] = fmaf(decay, h[i][k], delta * B_n[k] * x[i]);
        y[i] = fmaf(C_n[k], h[i][k], y[i]);
      }
      if (a.hT && p_of(i) < end) store(a.hT + (row + p_of(i)) * N + n, pack<float>(h[i]));
    }
  }
  float squares = 0.f;
#pragma unroll
  for (int i = 0; i < kSsdHeld; ++i) {
    for (int d = lanes / 2; d > 0; d /= 2) y[i] += __shfl_xor_sync(~0u, y[i], d);
    if (lane != 0 || p_of(i) >= end) continue;
    const float out = fmaf(D, x[i], y[i]);
    if (gate.gated) {
      const float gated = out * silu(z[i]);
      squares = fmaf(gated, gated, squares);
      gate.gated[row + p_of(i)] = gated;
    } else {
      a.out[b * a.out_stride + channel + p_of(i)] = from_float<T>(out);
    }
  }
  return squares;
}

template <class T>
__global__ void __launch_bounds__(kSsdStepThreads)
    ssd_step_kernel(SsdArgs<T> a, SsdGate<T> gate, int lanes) {
  const int pieces = gridDim.x / a.n_heads, rows = ceil_div(a.head_dim, pieces);
  const int b = blockIdx.y, head = blockIdx.x / pieces;
  const int first = blockIdx.x % pieces * rows, end = min(a.head_dim, first + rows);
  const bool done = a.done && a.done[b];
  float squares = 0.f;
  for (int p0 = first; p0 < end; p0 += kSsdStepRows) {
    squares += ssd_step_rows(a, gate, lanes, b, head, p0, end, [&] {
      if (p0 == first) launch_next(), wait_for_previous();
      return !done;
    });
    if (done) return;
  }
  if (!gate.squares) return;
  squares = block_sum<kSsdStepThreads>(squares);
  if (threadIdx.x == 0) gate.squares[int64_t{b} * gridDim.x + blockIdx.x] = squares;
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

// The fastest rung that can do it: tensor-core tiles are 64 rows of a head; copies 16 bytes.
template <class T>
SsdRung ssd_rung(const SsdArgs<T>& a) {
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  if (sizeof(T) != 2 || a.head_dim % 64 || a.d_state % 8 || a.d_state > 256 ||
      (a.x_stride | a.B_stride | a.C_stride | a.out_stride) % 8 || !aligned(a.x) || !aligned(a.B) ||
      !aligned(a.C) || !aligned(a.out))
    return SsdRung::kNaive;
  return a.d_state <= 128 && ssd_has_warpgroups() ? SsdRung::kWarpgroup : SsdRung::kFused;
}

template <class T>
int64_t ssd_blocks(const SsdArgs<T>& a, SsdRung rung) {  // for one segment of each sequence
  const int64_t group_rows = int64_t{a.n_heads} / a.n_groups * a.head_dim;
  const int64_t rows = rung == SsdRung::kWarpgroup ? 64 * kSsdWarpgroups
                       : a.d_state <= 128          ? kSsdFusedRows<128>
                                                   : kSsdFusedRows<256>;
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
  return sizeof(float) * a.batch * ssd_state_size(a);
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

template <int kStates, bool kOutputs, class T>
void ssd_launch(const SsdArgs<T>& a, SsdRung rung, const SsdSegments& segments,
                cudaStream_t stream) {
  auto kernel = ssd_fused_kernel<T, kStates, kOutputs>;
  int threads = 128, bytes = SsdFusedTiles<kStates, kOutputs>::kBarriers;
  if constexpr (kStates <= 128)
    if (rung == SsdRung::kWarpgroup) {
      kernel = ssd_warpgroup_kernel<T, kStates, kOutputs>;
      threads = 128 * kSsdWarpgroups + 128;
      bytes = kSsdWarpgroupBytes<SsdWarpgroupTiles<kStates, kOutputs>>;
    }
  const int64_t blocks = ssd_blocks(a, rung) * (kOutputs ? segments.count : segments.count - 1);
  CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  kernel<<<blocks, threads, bytes, stream>>>(a, segments);
  CUDA_CHECK(cudaGetLastError());
}

template <bool kOutputs, class T>
void ssd_pass(const SsdArgs<T>& a, SsdRung rung, const SsdSegments& segments, cudaStream_t stream) {
  if (a.d_state <= 64) return ssd_launch<64, kOutputs>(a, rung, segments, stream);
  if (a.d_state <= 128) return ssd_launch<128, kOutputs>(a, rung, segments, stream);
  ssd_launch<256, kOutputs>(a, rung, segments, stream);
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

inline int ssd_step_lanes(int d_state) {
  int lanes = 1;
  while (lanes < 32 && 4 * lanes < d_state) lanes *= 2;
  return lanes;
}
template <class T>
dim3 ssd_step_grid(const SsdArgs<T>& a, int pieces) {
  return dim3(unsigned(a.n_heads * pieces), unsigned(a.batch));
}

template <class T>
void ssd_step(const SsdArgs<T>& a, cudaStream_t stream) {
  if (a.batch == 0 || a.n_heads == 0) return;
  if (a.d_state % 4 || !aligned4(a.B, a.B_stride) || !aligned4(a.C, a.C_stride))
    return ssd_naive(a, stream);
  // not launched early: the kernel before may be the step before, whose state is read at once
  const bool many = a.batch * a.n_heads >= 4 * multiprocessors();
  const dim3 grid = ssd_step_grid(a, many ? 1 : ssd_step_blocks(a.head_dim));
  ssd_step_kernel<<<grid, kSsdStepThreads, 0, stream>>>(a, SsdGate<T>{}, ssd_step_lanes(a.d_state));
  CUDA_CHECK(cudaGetLastError());
}

// The same with the gate, launched early: the kernel before must not be a step of the same state.
template <class T>
void ssd_gated_step(const SsdArgs<T>& a, const SsdGate<T>& gate, cudaStream_t stream) {
  launch_early(ssd_step_kernel<T>, ssd_step_grid(a, ssd_step_blocks(a.head_dim)), kSsdStepThreads,
               0, stream, a, gate, ssd_step_lanes(a.d_state));
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

__device__ inline float sum_of_squares(const float (&v)[4]) {
  return v[0] * v[0] + v[1] * v[1] + v[2] * v[2] + v[3] * v[3];
}
template <class T>
__device__ inline void load4(float (&v)[4], const T* from) {
  unpack(load<4>(from, true), v);
}

// out (d) = values * scale * weight, the values 4 a thread as it left them in shared memory.
template <class T>
__device__ inline void scale_row(T* out, const float* values, const float* weight, int d,
                                 float scale) {
  for (int i = 4 * threadIdx.x; i < d; i += 4 * kNormThreads) {
    float v[4], w[4];
    load4(v, values + i), load4(w, weight + i);
    for (int k = 0; k < 4; ++k) v[k] = v[k] * scale * w[k];
    store(out + i, pack<T>(v));
  }
}

template <class In, class T>
__global__ void __launch_bounds__(kNormThreads)
    rms_norm_kernel(float* residual, const In* x, int64_t x_stride, const float* weight, float eps,
                    int d, T* out, int64_t out_stride) {
  extern __shared__ __align__(16) float row_values[];
  const int64_t row = blockIdx.x;
  float sum = 0;
  for (int i = 4 * threadIdx.x; i < d; i += 4 * kNormThreads) {
    float v[4], add[4];
    load4(v, residual + row * d + i);
    if (x) {
      load4(add, x + row * x_stride + i);
      for (int k = 0; k < 4; ++k) v[k] += add[k];
      store(residual + row * d + i, pack<float>(v));
    }
    store(row_values + i, pack<float>(v));
    sum += sum_of_squares(v);
  }
  const float scale = rsqrtf(block_sum<kNormThreads>(sum) / d + eps);
  scale_row(out + row * out_stride, row_values, weight, d, scale);
}

template <class In, class T>
__global__ void __launch_bounds__(kNormThreads)
    gated_rms_norm_kernel(const In* y, int64_t y_stride, const T* z, int64_t z_stride,
                          const float* weight, float eps, int group_size, T* out,
                          int64_t out_stride) {
  extern __shared__ __align__(16) float row_values[];
  const int64_t row = blockIdx.x, first = int64_t{blockIdx.y} * group_size;
  float sum = 0;
  for (int i = 4 * threadIdx.x; i < group_size; i += 4 * kNormThreads) {
    float v[4], gate[4];
    load4(v, y + row * y_stride + first + i), load4(gate, z + row * z_stride + first + i);
    for (int k = 0; k < 4; ++k) v[k] *= silu(gate[k]);
    store(row_values + i, pack<float>(v));
    sum += sum_of_squares(v);
  }
  const float scale = rsqrtf(block_sum<kNormThreads>(sum) / group_size + eps);
  scale_row(out + row * out_stride + first, row_values, weight + first, group_size, scale);
}

// layer_norm: the same less the mean, plus a bias; one pass more over the row in shared memory.
template <class T>
__global__ void __launch_bounds__(kNormThreads)
    layer_norm_kernel(const float* x, const float* weight, const float* bias, float eps, int d,
                      T* out) {
  extern __shared__ __align__(16) float row_values[];
  const int64_t row = blockIdx.x;
  float sum = 0, squares = 0;
  for (int i = threadIdx.x; i < d; i += kNormThreads) sum += row_values[i] = x[row * d + i];
  const float mean = block_sum<kNormThreads>(sum) / d;
  for (int i = threadIdx.x; i < d; i += kNormThreads) {
    row_values[i] -= mean;
    squares = fmaf(row_values[i], row_values[i], squares);
  }
  __syncthreads();  // the first sums have been read
  const float scale = rsqrtf(block_sum<kNormThreads>(squares) / d + eps);
  for (int i = threadIdx.x; i < d; i += kNormThreads)
    out[row * d + i] = from_float<T>(fmaf(row_values[i] * scale, weight[i], bias[i]));
}

// x (rows, d) float32, out (rows, d).
template <class T>
void layer_norm(const float* x, const float* weight, const float* bias, float eps, int64_t rows,
                int d, T* out, cudaStream_t stream) {
  if (rows == 0) return;
  layer_norm_kernel<<<rows, kNormThreads, d * sizeof(float), stream>>>(x, weight, bias, eps, d,
                                                                       out);
  CUDA_CHECK(cudaGetLastError());
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
// Causal attention
// ============================================================================================
//
//   S[t, s] = q_t . k_s / sqrt(head_dim)     for s <= t;     out_t = sum_s softmax(S[t, .])_s v_s
//
// Keys come in blocks with a running softmax (attend_chunked): nobody keeps a row of S. A query has
// m, the largest S so far, and in units of 2^m (S being times log2 e here) total = sum_s 2^(S - m)
// and out = sum_s 2^(S - m) v_s; a block that raises m shrinks both. The state is a cache of keys
// and values, `capacity` rows for each sequence, of which `past` tells how many are taken.

template <class T>
struct AttentionArgs {
  int64_t batch = 1, L = 0;
  int n_heads = 0, n_kv_heads = 0, head_dim = 0;  // n_kv_heads divides n_heads
  const T* q = nullptr;                           // (batch L, n_heads head_dim)
  T* out = nullptr;                               // the same
  int64_t q_stride = 0, out_stride = 0;
  // (batch, capacity, n_kv_heads head_dim), these tokens' rows after the past; or, if capacity is
  // 0 and there is no past, (batch L, ..), rows kv_stride apart.
  const T *keys = nullptr, *values = nullptr;
  int64_t capacity = 0, kv_stride = 0;
  const int64_t* past = nullptr;        // (batch) tokens before these, or null: none
  const int64_t* cu_seqlens = nullptr;  // (batch + 1); L is then the longest length
  const int* done = nullptr;            // step: (batch), where not 0 nothing is computed
  float* log_sums = nullptr;            // (batch L, n_heads) or null: log2 sum_s 2^S, for gradients

  __device__ int64_t past_of(int64_t b) const { return past ? past[b] : 0; }
  // Where key 0 of a head of sequence b lies; that of its values is as far from `values`.
  __device__ int64_t first_key(int64_t b, const Rows& rows, int head) const {
    const int64_t row = capacity ? b * capacity : rows.first;
    return row * kv_stride + int64_t{head / (n_heads / n_kv_heads)} * head_dim;
  }
  __device__ float scale() const { return kLog2e * rsqrtf(float(head_dim)); }  // of S
};

constexpr int kMostHeadDim = 256;

// A warp owns a query of a head; lane l has numbers l, l + 32, .. of q and of out. Grid: x =
// queries, 4 a block, y = heads, z = sequences.
template <class T>
__global__ void __launch_bounds__(128) causal_attention_naive_kernel(AttentionArgs<T> a) {
  constexpr int kNumbers = kMostHeadDim / 32;
  const int64_t b = blockIdx.z, t = int64_t{blockIdx.x} * 4 + threadIdx.x / 32;
  const int head = blockIdx.y, lane = threadIdx.x % 32;
  const Rows rows = rows_of(b, a.L, a.cu_seqlens);
  if (t >= rows.count || (a.done && a.done[b])) return;
  const int64_t column = int64_t{head} * a.head_dim, first = a.first_key(b, rows, head);
  const T* q = a.q + (rows.first + t) * a.q_stride + column;
  float q_t[kNumbers], out[kNumbers] = {}, m = -INFINITY, total = 0.f;
#pragma unroll
  for (int i = 0; i < kNumbers; ++i)
    q_t[i] = lane + 32 * i < a.head_dim ? a.scale() * to_float(q[lane + 32 * i]) : 0.f;
  for (int64_t s = 0; s <= a.past_of(b) + t; ++s) {
    const int64_t place = first + s * a.kv_stride + lane;
    float score = 0.f;
#pragma unroll
    for (int i = 0; i < kNumbers; ++i)
      if (lane + 32 * i < a.head_dim) score = fmaf(q_t[i], to_float(a.keys[place + 32 * i]), score);
    score = warp_sum(score);
    const float largest = fmaxf(m, score), shrink = exp2_approx(m - largest);
    const float weight = exp2_approx(score - largest);
    total = fmaf(total, shrink, weight), m = largest;
#pragma unroll
    for (int i = 0; i < kNumbers; ++i)
      if (lane + 32 * i < a.head_dim)
        out[i] = fmaf(out[i], shrink, weight * to_float(a.values[place + 32 * i]));
  }
  T* to = a.out + (rows.first + t) * a.out_stride + column;
#pragma unroll
  for (int i = 0; i < kNumbers; ++i)
    if (lane + 32 * i < a.head_dim) to[lane + 32 * i] = from_float<T>(out[i] / total);
  if (lane == 0 && a.log_sums) a.log_sums[(rows.first + t) * a.n_heads + head] = m + log2f(total);
}

// Since the rung before: tensor cores, for 16-bit types and head_dim up to 64 kColumns, a multiple
// of 8. Block: 4 warps of 16 queries of one head. Shared: q; k and v of two blocks of 64 keys, this
// one and the next on its way; each in tiles as SSD's (columns of 64 numbers). Registers of a warp:
// S (16 x 64), which rounded is operand A of the second product as it stands, and out. Grid: x =
// blocks of 64 queries, the last, which see most keys, first; y = heads, z = sequences.
template <int kColumns>
struct AttentionTiles {
  static constexpr int kTile = kColumns * kSsdColumn;  // bytes of 64 rows
  static constexpr int kBytes = 5 * kTile;             // q; k, v; k, v
};

// Rows [row, row + 64) of a head, of which those below `end` exist, to a tile, by 128 threads.
template <int kColumns, class T>
__device__ inline void copy_rows(uint32_t tile, const T* from, int64_t stride, int64_t row,
                                 int64_t end, int head_dim) {
#pragma unroll
  for (int c = 0; c < kColumns; ++c)
#pragma unroll
    for (int i = 0; i < 64; i += 16) {
      const int r = i + threadIdx.x / 8, piece = threadIdx.x % 8;
      const bool exists = row + r < end && 64 * c + 8 * piece < head_dim;
      const T* p = from + (exists ? (row + r) * stride + 64 * c + 8 * piece : 0);
      copy_async(tile + tile_offset(r, 8 * c + piece), p, exists);
    }
}

// S of a warp's 16 queries and 64 keys: s[j] are keys 8j + 2q, + 1, for rows g and g + 8.
template <class T, int kColumns>
__device__ inline void multiply_keys(float (&s)[8][4], uint32_t tile_q, uint32_t tile_k) {
  for (auto& tile : s) tile[0] = tile[1] = tile[2] = tile[3] = 0.f;
#pragma unroll
  for (int k = 0; k < 4 * kColumns; ++k) {
    uint32_t a[4], b[4];
    load_matrices(a, move_right(tile_q + above(), 2 * k));
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      load_matrices(b, move_right(tile_k + beside(), 2 * k) + tile_offset(16 * j, 0));
      mma<T>(&s[2 * j], a, b);
    }
  }
}

// out += p V, p having become 16 bits.
template <class T, int kColumns>
__device__ inline void multiply_values(float (&out)[8 * kColumns][4], const float (&p)[8][4],
                                       uint32_t tile_v) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {  // 16 keys
    const uint32_t a[4] = {pack_pair<T>(p[2 * j][0], p[2 * j][1]),
                           pack_pair<T>(p[2 * j][2], p[2 * j][3]),
                           pack_pair<T>(p[2 * j + 1][0], p[2 * j + 1][1]),
                           pack_pair<T>(p[2 * j + 1][2], p[2 * j + 1][3])};
#pragma unroll
    for (int c = 0; c < 4 * kColumns; ++c) {
      uint32_t b[4];
      load_matrices_transposed(b, move_right(tile_v + above(), 2 * c) + tile_offset(16 * j, 0));
      mma<T>(&out[2 * c], a, b);
    }
  }
}

__device__ inline float quad_max(float v) {
  v = fmaxf(v, __shfl_xor_sync(~0u, v, 1));
  return fmaxf(v, __shfl_xor_sync(~0u, v, 2));
}
__device__ inline float quad_sum(float v) {
  v += __shfl_xor_sync(~0u, v, 1);
  return v + __shfl_xor_sync(~0u, v, 2);
}

// s -> 2^(s - m) for the two rows of a thread, seen[h] keys of this block being theirs to see.
// Totals are of the thread's own columns until the end.
template <int kTiles>
__device__ inline void running_softmax(float (&s)[8][4], float scale, const int (&seen)[2],
                                       float (&m)[2], float (&total)[2], float (&out)[kTiles][4]) {
  const int column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float largest = m[h];
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int i = 2 * h; i < 2 * h + 2; ++i) {
        s[j][i] = 8 * j + column + i % 2 < seen[h] ? scale * s[j][i] : -INFINITY;
        largest = fmaxf(largest, s[j][i]);
      }
    largest = quad_max(largest);  // the first block has a key for every query: never -INFINITY
    const float shrink = exp2_approx(m[h] - largest);
    m[h] = largest, total[h] *= shrink;
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int i = 2 * h; i < 2 * h + 2; ++i) total[h] += s[j][i] = exp2_approx(s[j][i] - largest);
#pragma unroll
    for (int j = 0; j < kTiles; ++j) out[j][2 * h] *= shrink, out[j][2 * h + 1] *= shrink;
  }
}

template <class T, int kColumns>
__global__ void __launch_bounds__(128, 2) causal_attention_fused_kernel(AttentionArgs<T> a) {
  extern __shared__ __align__(1024) unsigned char attention_tiles[];
  constexpr int kTile = AttentionTiles<kColumns>::kTile;
  const int64_t b = blockIdx.z, first = int64_t{gridDim.x - 1 - blockIdx.x} * 64;
  const int head = blockIdx.y, warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4;
  const Rows rows = rows_of(b, a.L, a.cu_seqlens);
  if (first >= rows.count) return;
  const int64_t past = a.past_of(b), first_key = a.first_key(b, rows, head);
  const int64_t end = past + min(first + 64, rows.count);  // keys that any query here sees
  const uint32_t tile_q = uint32_t(__cvta_generic_to_shared(attention_tiles));
  const auto fetch = [&](int64_t block) {
    const uint32_t to = tile_q + kTile + block % 2 * (2 * kTile);
    copy_rows<kColumns>(to, a.keys + first_key, a.kv_stride, 64 * block, end, a.head_dim);
    copy_rows<kColumns>(to + kTile, a.values + first_key, a.kv_stride, 64 * block, end, a.head_dim);
    copy_async_commit();
  };
  const int64_t column = int64_t{head} * a.head_dim;
  copy_rows<kColumns>(tile_q, a.q + rows.first * a.q_stride + column, a.q_stride, first, rows.count,
                      a.head_dim);
  fetch(0);

  float out[8 * kColumns][4] = {}, m[2] = {-INFINITY, -INFINITY}, total[2] = {0.f, 0.f};
  const int64_t query = first + 16 * warp + g;  // and query + 8
  for (int64_t block = 0; 64 * block < end; ++block) {
    copy_async_wait();
    __syncthreads();  // all copies of this block are there; the one before has been read
    if (64 * (block + 1) < end) fetch(block + 1);
    const uint32_t tile_k = tile_q + kTile + block % 2 * (2 * kTile);
    float s[8][4];
    multiply_keys<T, kColumns>(s, tile_q + tile_offset(16 * warp, 0), tile_k);
    const int64_t left = past + query + 1 - 64 * block;
    running_softmax(s, a.scale(), {int(min(left, int64_t{64})), int(min(left + 8, int64_t{64}))}, m,
                    total, out);
    multiply_values<T, kColumns>(out, s, tile_k + kTile);
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int64_t t = query + 8 * h;
    const float sum = quad_sum(total[h]);
    if (t >= rows.count) continue;
    T* to = a.out + (rows.first + t) * a.out_stride + column;
#pragma unroll
    for (int j = 0; j < 8 * kColumns; ++j)
      if (const int c = 8 * j + threadIdx.x % 4 * 2; c < a.head_dim)
        store(to + c, pack<T>({out[j][2 * h] / sum, out[j][2 * h + 1] / sum}));
    if (threadIdx.x % 4 == 0 && a.log_sums)
      a.log_sums[(rows.first + t) * a.n_heads + head] = m[h] + log2f(sum);
  }
}

// Number i of n parts (out, m and total: head_dim + 2 numbers each) in one: all in units of 2^m of
// the largest m. A part without a key has m = -INFINITY.
__device__ inline float put_together(const float* parts, int n, int head_dim, int i) {
  const int width = head_dim + 2;
  float m = -INFINITY, sum = 0.f;
  for (int p = 0; p < n; ++p) m = fmaxf(m, parts[p * width + head_dim]);
  for (int p = 0; p < n && i != head_dim; ++p)
    if (const float m_p = parts[p * width + head_dim]; m_p > -INFINITY)
      sum = fmaf(exp2_approx(m_p - m), parts[p * width + i], sum);
  return i == head_dim ? m : sum;
}

// Of head h of a block of the step, the groups' sums in one: numbers i of them -> to.
template <int kHeads>
__device__ inline void join_groups(const float (&out)[kHeads][8], const float (&m)[kHeads],
                                   const float (&total)[kHeads], int h, int lanes, int head_dim,
                                   float* to) {
  extern __shared__ __align__(16) float attention_groups[];  // (groups, head_dim + 2)
  const int lane = threadIdx.x % lanes, group = threadIdx.x / lanes, width = head_dim + 2;
  float* mine = attention_groups + group * width;
  if (h > 0) __syncthreads();  // the head before has been read
#pragma unroll
  for (int k = 0; k < kHeads; ++k) {  // registers have no index
    if (k != h) continue;
    for (int i = 0; i < 8 && 8 * lane < head_dim; ++i) mine[8 * lane + i] = out[k][i];
    if (lane == 0) mine[head_dim] = m[k], mine[head_dim + 1] = total[k];
  }
  __syncthreads();  // all groups' sums are there before they are added
  for (int i = threadIdx.x; i < width; i += 128)
    to[i] = put_together(attention_groups, 128 / lanes, head_dim, i);
}

// One token a sequence, L = 1: its cache is read once, some keys by each of `pieces` blocks of four
// warps; what they find is put together by the second kernel. Keys of a block go to groups of
// `lanes` lanes in turn, a lane having 8 numbers of each. A block takes up to kHeads heads that
// share keys. Grid: x = pieces, y = blocks of heads, z = sequences. parts: (batch, n_heads, pieces,
// head_dim + 2): out, m, total.
template <class T, int kHeads>
__global__ void __launch_bounds__(128)
    causal_attention_step_kernel(AttentionArgs<T> a, int lanes, float* parts) {
  launch_next();
  wait_for_previous();
  const int64_t b = blockIdx.z;
  if (a.done && a.done[b]) return;
  const int shared = a.n_heads / a.n_kv_heads, of_group = ceil_div(shared, kHeads);
  const int first_head = blockIdx.y / of_group * shared + blockIdx.y % of_group * kHeads;
  const int heads = min(kHeads, (blockIdx.y / of_group + 1) * shared - first_head);
  const int lane = threadIdx.x % lanes, group = threadIdx.x / lanes, groups = 128 / lanes;
  const bool exists = 8 * lane < a.head_dim;
  const int64_t tokens = a.past_of(b) + 1, piece = ceil_div(tokens, int64_t{gridDim.x});
  const int64_t begin = blockIdx.x * piece, end = min(tokens, begin + piece);
  const int64_t place = a.first_key(b, {b, 1}, first_head) + 8 * lane;

  float q[kHeads][8], out[kHeads][8] = {}, m[kHeads], total[kHeads] = {};
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    const int64_t column = int64_t{first_head + h} * a.head_dim + 8 * lane;
    unpack(load<8>(a.q + b * a.q_stride + column, exists && h < heads), q[h]);
    m[h] = -INFINITY;
  }
  // All groups of a warp take as many turns: they meet at shuffles.
#pragma unroll 2
  for (int64_t turn = begin; turn < end; turn += groups) {
    const int64_t s = turn + group;
    const bool there = exists && s < end;
    float k[8], v[8];
    unpack(load<8>(a.keys + place + s * a.kv_stride, there), k);
    unpack(load<8>(a.values + place + s * a.kv_stride, there), v);
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      float score = 0.f;
#pragma unroll
      for (int i = 0; i < 8; ++i) score = fmaf(q[h][i], k[i], score);
      for (int d = lanes / 2; d > 0; d /= 2) score += __shfl_xor_sync(~0u, score, d);
      if (s >= end) continue;
      score *= a.scale();
      const float largest = fmaxf(m[h], score), shrink = exp2_approx(m[h] - largest);
      const float weight = exp2_approx(score - largest);
      total[h] = fmaf(total[h], shrink, weight), m[h] = largest;
#pragma unroll
      for (int i = 0; i < 8; ++i) out[h][i] = fmaf(out[h][i], shrink, weight * v[i]);
    }
  }

  for (int h = 0; h < heads; ++h)
    join_groups(
        out, m, total, h, lanes, a.head_dim,
        parts + ((b * a.n_heads + first_head + h) * gridDim.x + blockIdx.x) * (a.head_dim + 2));
}

// Grid: x = heads, y = sequences.
template <class T>
__global__ void __launch_bounds__(128)
    causal_attention_join_kernel(AttentionArgs<T> a, int pieces, const float* parts) {
  launch_next();
  wait_for_previous();
  const int64_t b = blockIdx.y;
  if (a.done && a.done[b]) return;
  parts += (b * a.n_heads + blockIdx.x) * pieces * (a.head_dim + 2);
  T* to = a.out + b * a.out_stride + int64_t{blockIdx.x} * a.head_dim;
  const float total = put_together(parts, pieces, a.head_dim, a.head_dim + 1);
  for (int i = threadIdx.x; i < a.head_dim; i += 128)
    to[i] = from_float<T>(put_together(parts, pieces, a.head_dim, i) / total);
}

// May rows be read eight numbers at a time?
template <class T>
bool attention_aligned(const AttentionArgs<T>& a) {
  const auto at = [](const T* p) { return reinterpret_cast<uintptr_t>(p) % (8 * sizeof(T)); };
  return at(a.q) + at(a.keys) + at(a.values) == 0 && a.head_dim % 8 == 0 && a.q_stride % 8 == 0 &&
         a.kv_stride % 8 == 0;
}

template <class T>
dim3 attention_grid(const AttentionArgs<T>& in, int rows_of_block, int heads) {
  return dim3(unsigned(ceil_div(in.L, rows_of_block)), unsigned(heads), unsigned(in.batch));
}

template <class T>
void causal_attention_naive(const AttentionArgs<T>& a, cudaStream_t stream) {
  if (a.head_dim > kMostHeadDim)
    fail("causal_attention: head_dim: expected at most ", kMostHeadDim, ", found ", a.head_dim);
  if (a.batch * a.L == 0) return;
  causal_attention_naive_kernel<<<attention_grid(a, 4, a.n_heads), 128, 0, stream>>>(a);
  CUDA_CHECK(cudaGetLastError());
}

template <class T>
void causal_attention(const AttentionArgs<T>& a, cudaStream_t stream) {
  if constexpr (sizeof(T) == 2) {
    if (a.head_dim <= 128 && attention_aligned(a) && a.out_stride % 2 == 0) {
      if (a.batch * a.L == 0) return;
      const bool narrow = a.head_dim <= 64;
      const auto kernel =
          narrow ? causal_attention_fused_kernel<T, 1> : causal_attention_fused_kernel<T, 2>;
      const int bytes = narrow ? AttentionTiles<1>::kBytes : AttentionTiles<2>::kBytes;
      CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
      kernel<<<attention_grid(a, 64, a.n_heads), 128, bytes, stream>>>(a);
      CUDA_CHECK(cudaGetLastError());
      return;
    }
  }
  causal_attention_naive(a, stream);
}

// Into how many pieces the step cuts a cache: two blocks for every multiprocessor.
inline int attention_pieces(int64_t batch, int n_kv_heads) {
  const int64_t blocks = batch * n_kv_heads;
  return int(std::clamp<int64_t>(2 * multiprocessors() / std::max<int64_t>(1, blocks), 1, 32));
}
// Floats of `parts`.
inline int64_t attention_parts(int64_t batch, int n_heads, int n_kv_heads, int head_dim) {
  return batch * n_heads * attention_pieces(batch, n_kv_heads) * (head_dim + 2);
}
template <class T>
void causal_attention_step(const AttentionArgs<T>& a, float* parts, cudaStream_t stream) {
  if (a.head_dim > kMostHeadDim || !attention_aligned(a)) return causal_attention_naive(a, stream);
  if (a.batch == 0) return;
  int lanes = 1;
  while (8 * lanes < a.head_dim) lanes *= 2;
  const int shared = a.n_heads / a.n_kv_heads, heads = shared > 1 ? 4 : 1;
  const int pieces = attention_pieces(a.batch, a.n_kv_heads);
  const int bytes = 128 / lanes * (a.head_dim + 2) * int(sizeof(float));
  const dim3 grid(unsigned(pieces), unsigned(a.n_kv_heads * ceil_div(shared, heads)),
                  unsigned(a.batch));
  const auto kernel =
      heads == 1 ? causal_attention_step_kernel<T, 1> : causal_attention_step_kernel<T, 4>;
  launch_early(kernel, grid, 128, bytes, stream, a, lanes, parts);
  launch_early(causal_attention_join_kernel<T>, dim3(unsigned(a.n_heads), unsigned(a.batch)), 128,
               0, stream, a, pieces, parts);
}

// --- what stands before it: rotary position, and the new keys and values to the cache ---

template <class T>
struct RotaryArgs {
  int64_t batch = 1, L = 0;
  int n_heads = 0, n_kv_heads = 0, head_dim = 0;
  int turning = 0;  // numbers of a head that turn
  double base = 10000, direction = 1;
  T* qkv = nullptr;  // (batch L, (n_heads + 2 n_kv_heads) head_dim): q and k turn in place
  int64_t stride = 0;
  T *keys = nullptr, *values = nullptr;  // as in AttentionArgs, or null: no cache
  int64_t capacity = 0;
  const int64_t *past = nullptr, *cu_seqlens = nullptr;
  const int* done = nullptr;
};

// One block a token. The angles are the same for all heads. Grid: x = tokens, y = sequences.
template <class T>
__global__ void __launch_bounds__(128) rotary_kernel(RotaryArgs<T> a) {
  extern __shared__ __align__(16) float rotary_angles[];  // (turning): cosines, sines
  const int64_t b = blockIdx.y, t = blockIdx.x;
  const Rows rows = rows_of(b, a.L, a.cu_seqlens);
  if (t >= rows.count || (a.done && a.done[b])) return;
  const int64_t position = t + (a.past ? a.past[b] : 0);
  const int half = a.turning / 2, turned = a.n_heads + a.n_kv_heads;
  for (int i = threadIdx.x; i < half; i += 128) {
    double sine, cosine;
    sincos(a.direction * double(position) * pow(a.base, -2. * i / a.turning), &sine, &cosine);
    rotary_angles[i] = float(cosine), rotary_angles[half + i] = float(sine);
  }
  __syncthreads();  // the angles are there before anybody turns by them
  T* row = a.qkv + (rows.first + t) * a.stride;
  for (int i = threadIdx.x; i < turned * half; i += 128) {
    T* p = row + i / half * a.head_dim + i % half;
    const float cosine = rotary_angles[i % half], sine = rotary_angles[half + i % half];
    const float x = to_float(p[0]), y = to_float(p[half]);
    p[0] = from_float<T>(x * cosine - y * sine);
    p[half] = from_float<T>(x * sine + y * cosine);
  }
  if (!a.keys) return;
  __syncthreads();  // the keys have turned before they are copied
  const int width = a.n_kv_heads * a.head_dim;
  const int64_t to = (b * a.capacity + position) * width;
  for (int i = threadIdx.x; i < width; i += 128) {
    a.keys[to + i] = row[a.n_heads * a.head_dim + i];
    a.values[to + i] = row[turned * a.head_dim + i];
  }
}
template <class T>
void rotary(const RotaryArgs<T>& a, cudaStream_t stream) {
  if (a.batch * a.L == 0 || (a.turning == 0 && !a.keys)) return;
  const dim3 grid(unsigned(a.L), unsigned(a.batch));
  rotary_kernel<<<grid, 128, a.turning * sizeof(float), stream>>>(a);
  CUDA_CHECK(cudaGetLastError());
}

// After the last layer all caches have taken the tokens. One thread a sequence.
static __global__ void advance_past_kernel(int64_t* past, int64_t batch, int64_t L,
                                           const int64_t* cu_seqlens, const int* done) {
  const int64_t b = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (b < batch && !(done && done[b])) past[b] += rows_of(b, L, cu_seqlens).count;
}

// --- the gated MLP between its products: x_gate (rows, 2 width) -> x silu(gate) (rows, width) ---

// Four numbers a thread.
template <class T>
__global__ void __launch_bounds__(256)
    gated_mlp_kernel(const T* x_gate, int64_t rows, int64_t width, T* out) {
  const int64_t i = 4 * (int64_t(blockIdx.x) * 256 + threadIdx.x), row = i / width, c = i % width;
  if (row >= rows) return;
  float x[4], gate[4];
  load4(x, x_gate + row * 2 * width + c), load4(gate, x_gate + row * 2 * width + width + c);
  for (int k = 0; k < 4; ++k) x[k] *= silu(gate[k]);
  store(out + i, pack<T>(x));
}
template <class T>
void gated_mlp(const T* x_gate, int64_t rows, int64_t width, T* out, cudaStream_t stream) {
  if (width % 4) fail("gated_mlp: width: expected a multiple of 4, found ", width);
  if (rows == 0) return;
  gated_mlp_kernel<<<unsigned(ceil_div(rows * width, 1024)), 256, 0, stream>>>(x_gate, rows, width,
                                                                               out);
  CUDA_CHECK(cudaGetLastError());
}

// ============================================================================================
// One token: matrix-vector products fused with what stands around them
// ============================================================================================
//
// For a few sequences at a time a layer costs the reading of its weights, if nothing else is in
// the way: four kernels a layer for Mamba, three for Mamba-2, each a product with what precedes
// and follows it, one CUDA graph for the whole token, and every kernel requests its first weights
// while the one before it is still at work (programmatic dependent launch). Before
// wait_for_previous() a kernel may read weights, which never change, and what changes once a
// token: its own states and `done`. A token's first kernel starts when all of the token before is
// done.
//
//   Mamba     linear_step_kernel  residual -> rms_norm, in_proj, causal_conv1d_step, silu -> x, z
//             linear_step_kernel  x -> x_proj -> dt, B, C
//             scan_decode_kernel  dt_proj, selective_scan_step, gate -> y
//             linear_step_kernel  y -> out_proj, added to the residual
//   Mamba-2   linear_step_kernel  residual -> rms_norm, in_proj, causal_conv1d_step, silu
//                                 -> z, x, B, C, dt
//             ssd_step_kernel     ssd_step, gate -> y (with several groups, its sums of squares)
//             linear_step_kernel  y -> gated_rms_norm, out_proj, added to the residual
//   attention linear_step_kernel  residual -> rms_norm, in_proj, causal_conv1d_step -> q, k, v
//             rotary_kernel       q, k -> turned; k, v -> the cache
//             causal_attention_step_kernel, .._join_kernel -> y;  linear_step_kernel as for Mamba
//   MLP       linear_step_kernel  residual -> rms_norm, fc1;  gated_mlp_kernel;  linear_step_kernel

constexpr int kFewSequences = 4;  // that one launch takes
constexpr int kMostGroups = 8;    // of Mamba-2's norm
constexpr int kStepTaps = 4;      // of the convolution; missing ones are zero

// What is read: x, or in its place
//   rms      x weight / rms(x). W (x weight / rms) = W (x weight) / rms, so nobody waits for the
//            sum of squares: each warp gathers it on its way along the row, and divides at the end
//   grouped  the same with one rms for each group of columns; with several groups from the sums of
//            squares that ssd_step_kernel left
enum class Norm { none, rms, grouped };

// What becomes of v = W[row] . x:
//   plain     out = v
//   residual  out += v + bias
//   conv      out = v + bias; the rows [first, first + count) then take causal_conv1d_step and,
//             if `activate`, silu
enum class Store { plain, residual, conv };

struct NormStep {
  const float* weight = nullptr;  // (cols)
  float eps = 0;
  int n_groups = 1, slots = 0;     // slots: sums of squares per group
  const float* squares = nullptr;  // (batch, n_groups slots)
};
template <class T>
struct ConvStep {
  T* state = nullptr;             // (batch, width - 1, count)
  const float* weight = nullptr;  // (count, width)
  const float* bias = nullptr;    // (count) or null
  const int* done = nullptr;      // (batch) or null: where not 0 the state stays
  int64_t first = 0, count = 0;
  int width = 0;
  bool activate = true;
};

// out[b, row] = store(W[row] . norm(x[b])) for b < batch <= kFewSequences.
template <class T, Norm kNorm, Store kStore>
struct LinearStep {
  using In = std::conditional_t<kNorm == Norm::none, T, float>;
  using Out = std::conditional_t<kStore == Store::conv, T, float>;
  const T* W = nullptr;  // (rows, cols), cols a multiple of 16 bytes
  int64_t rows = 0, cols = 0;
  int batch = 0;
  const In* x = nullptr;  // (batch, cols)
  int64_t x_stride = 0;
  Out* out = nullptr;           // (batch, rows)
  const float* bias = nullptr;  // (rows) or null
  NormStep norm = {};
  ConvStep<T> conv = {};
};

// Asks for the cache lines (128 bytes) of p[0, size).
__device__ inline void prefetch_row(const float* p, int64_t size) {
  for (int64_t i = 32 * threadIdx.x; i < size; i += 32 * blockDim.x)
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p + i));
}

// scales[b n_groups + group] = 1 / rms of the group, for several groups.
__device__ inline void scales_of_groups(const NormStep& norm, int batch, int64_t cols,
                                        float* scales) {
  if (norm.n_groups == 1) return;
  const int lane = threadIdx.x % 32;
  for (int i = threadIdx.x / 32; i < batch * norm.n_groups; i += blockDim.x / 32) {
    float sum = 0.f;
    for (int s = lane; s < norm.slots; s += 32) sum += norm.squares[i * norm.slots + s];
    sum = warp_sum(sum);
    if (lane == 0) scales[i] = rsqrtf(sum * norm.n_groups / cols + norm.eps);
  }
  __syncthreads();  // scales are written before anybody reads them
}

// x[b, column ..], times what the norm asks for but the scale of a row; its squares are added.
template <int n, class T, Norm kNorm, Store kStore>
__device__ inline void load_input(const LinearStep<T, kNorm, kStore>& a, int b, int64_t column,
                                  const float (&weight)[n], const float* scales, float (&x)[n],
                                  float& squares) {
  unpack(load<n>(a.x + b * a.x_stride + column, true), x);
  if constexpr (kNorm != Norm::none) {
    float scale = 1.f;
    if (kNorm == Norm::grouped && a.norm.n_groups > 1)  // n columns lie in one group
      scale = scales[b * a.norm.n_groups + int(column) / int(a.cols / a.norm.n_groups)];
#pragma unroll
    for (int k = 0; k < n; ++k) {
      squares = fmaf(x[k], x[k], squares);
      x[k] *= kNorm == Norm::grouped ? weight[k] * scale : weight[k];
    }
  }
}

// What one output is combined with, requested before the product is made.
template <class T>
struct StoreOperands {
  float bias, residual, conv_bias, taps[kStepTaps];  // taps: of the newest input first
  T past[kStepTaps];                                 // past[k]: k tokens ago
  int keep;
};

// What the kernel before does not change.
template <class T, Norm kNorm, Store kStore>
__device__ inline void load_operands(const LinearStep<T, kNorm, kStore>& a, int64_t row, int b,
                                     StoreOperands<T>& o) {
  if constexpr (kStore != Store::plain) o.bias = a.bias ? a.bias[row] : 0.f;
  if constexpr (kStore == Store::conv) {
    const ConvStep<T>& conv = a.conv;
    const bool convolved = row >= conv.first && row < conv.first + conv.count;
    const int64_t d = convolved ? row - conv.first : 0;
    o.keep = conv.done ? conv.done[b] : 0;
    o.conv_bias = conv.bias ? conv.bias[d] : 0.f;
    const T* state = conv.state + b * (conv.width - 1) * conv.count + d;
#pragma unroll
    for (int k = 0; k < kStepTaps; ++k) {
      const bool there = k < conv.width;
      o.taps[k] = there ? conv.weight[d * conv.width + conv.width - 1 - k] : 0.f;
      if (k > 0) o.past[k] = there ? state[(conv.width - 1 - k) * conv.count] : from_float<T>(0.f);
    }
  }
}

// The convolution's new output from its new input; its state moves on by one token.
template <class T>
__device__ inline float conv_step(const ConvStep<T>& conv, int64_t d, int b, float v,
                                  StoreOperands<T>& o) {
  o.past[0] = from_float<T>(v);
  v = o.conv_bias;
#pragma unroll
  for (int k = kStepTaps - 1; k >= 0; --k) v = fmaf(o.taps[k], to_float(o.past[k]), v);
  T* state = conv.state + b * (conv.width - 1) * conv.count + d;
#pragma unroll
  for (int k = 0; k + 1 < kStepTaps; ++k)
    if (k + 1 < conv.width && !o.keep) state[(conv.width - 2 - k) * conv.count] = o.past[k];
  return conv.activate ? silu(v) : v;
}

template <class T, Norm kNorm, Store kStore>
__device__ inline void store_output(const LinearStep<T, kNorm, kStore>& a, int64_t row, int b,
                                    float v, StoreOperands<T>& o) {
  if constexpr (kStore == Store::plain) a.out[b * a.rows + row] = v;
  if constexpr (kStore == Store::residual) a.out[b * a.rows + row] = o.residual + (v + o.bias);
  if constexpr (kStore == Store::conv) {
    v += o.bias;
    const int64_t d = row - a.conv.first;
    if (d >= 0 && d < a.conv.count) v = conv_step(a.conv, d, b, v, o);
    a.out[b * a.rows + row] = from_float<T>(v);
  }
}

// Where all that a warp has to read fits its ring (below), nothing is left to stream: such a
// product is as long as its way from the wait to the last store. It takes blocks of 12 warps, over
// which a row can be split in more ways, and no more of the ring than it fills, so that blocks of
// the next kernel find room beside it.
constexpr int kLinearRows = 4, kLinearDepth = 4;
struct LinearShape {
  int warps, blocks;  // of a block; on an SM at once
};
constexpr LinearShape kBriefShape{12, 2}, kStreamShape{8, 3}, kFewShape{8, 2};

// W on its way: `split` warps share a group of kLinearRows rows, each lane takes every 32 split-th
// piece of 16 bytes. Pieces pass through a ring in shared memory, kLinearDepth of each row in
// flight, across the end of a group too: while its sums are finished the next group's weights
// arrive. A thread reads only what it has copied itself, so none waits for another.
template <class T, int kWarps>
struct WeightStream {
  static constexpr int n = 16 / sizeof(T);
  const T* W;
  int64_t rows, cols;
  int split, part, pieces, steps, groups, at_once;
  int next_group, next_step = 0;

  __device__ WeightStream(const T* W, int64_t rows, int64_t cols, int split)
      : W(W), rows(rows), cols(cols), split(split), part(threadIdx.x / 32 % split) {
    pieces = cols / n, steps = ceil_div(pieces, 32 * split);
    groups = ceil_div(rows, kLinearRows), at_once = gridDim.x * (kWarps / split);
    next_group = threadIdx.x / 32 / split * gridDim.x + blockIdx.x;  // spread over all blocks
  }
  __device__ int piece(int step) const {
    return (step * split + part) * 32 + int(threadIdx.x % 32);
  }
  __device__ Vector<T, n>* place(int slot, int r) const {
    extern __shared__ float4 linear_ring[];  // (kLinearDepth, kLinearRows, threads)
    return reinterpret_cast<Vector<T, n>*>(linear_ring) + (slot * kLinearRows + r) * (32 * kWarps) +
           threadIdx.x;
  }
  __device__ void fetch(int slot) {
    if (piece(next_step) < pieces && next_group < groups) {
#pragma unroll
      for (int r = 0; r < kLinearRows; ++r) {
        const int64_t row = min(int64_t(next_group) * kLinearRows + r, rows - 1);
        copy_async(place(slot, r), W + row * cols + int64_t(piece(next_step)) * n, true);
      }
    }
    copy_async_commit();
    if (++next_step == steps) next_step = 0, next_group += at_once;
  }
};

// This lane's part of sum[r kBatch + b] = W[4 group + r] . x[b], for the rows of a group. x comes
// through the L1 cache, in which all warps of the SM find it.
template <int kBatch, int kWarps, class T, Norm kNorm, Store kStore>
__device__ inline void multiply(const LinearStep<T, kNorm, kStore>& a, WeightStream<T, kWarps>& W,
                                int group, int& slot, const float* scales,
                                float (&sum)[kLinearRows * kBatch], float (&squares)[kBatch]) {
  constexpr int n = WeightStream<T, kWarps>::n;
  for (int step = 0; step < W.steps; ++step) {
    copy_async_wait_but<kLinearDepth - 1>();
    const int64_t column = int64_t(W.piece(step)) * n;
    if (W.piece(step) < W.pieces && group < W.groups) {
      float norm_weight[n], w[kLinearRows][n];
      if constexpr (kNorm != Norm::none) unpack(load<n>(a.norm.weight + column, true), norm_weight);
#pragma unroll
      for (int r = 0; r < kLinearRows; ++r) unpack(*W.place(slot, r), w[r]);
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (b >= a.batch) break;
        float x[n];
        load_input(a, b, column, norm_weight, scales, x, squares[b]);
#pragma unroll
        for (int r = 0; r < kLinearRows; ++r)
#pragma unroll
          for (int k = 0; k < n; ++k)
            sum[r * kBatch + b] = fmaf(w[r][k], x[k], sum[r * kBatch + b]);
      }
    }
    W.fetch(slot);  // into the place just read
    slot = slot + 1 < kLinearDepth ? slot + 1 : 0;
  }
}

// Sums over the lanes of a warp and the warps of a group: lane i of its first warp gets number i,
// and the squares of sequence i % kBatch.
template <bool kSquares, int kWarps, int kSums, int kBatch>
__device__ inline float2 add_up(float (&sum)[kSums], float (&squares)[kBatch], int split,
                                bool again) {
  __shared__ float partial[kWarps][kSums + kBatch];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, part = warp % split;
  float mine = 0.f, my_squares = 0.f;
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    sum[i] = warp_sum(sum[i]);
    if (lane == i) mine = sum[i];
  }
#pragma unroll
  for (int b = 0; b < kBatch && kSquares; ++b) {
    squares[b] = warp_sum(squares[b]);
    if (lane % kBatch == b) my_squares = squares[b];
  }
  if (split == 1) return {mine, my_squares};
  if (again) __syncthreads();  // the partial sums of the round before have been read
  if (lane < kSums) partial[warp][lane] = mine;
  if (lane < kBatch) partial[warp][kSums + lane] = my_squares;
  __syncthreads();  // partial sums are written before the first warp of each group adds them
#pragma unroll
  for (int p = 1; p < kWarps; ++p) {
    if (part != 0 || p >= split) continue;
    if (lane < kSums) mine += partial[warp + p][lane];
    my_squares += partial[warp + p][kSums + lane % kBatch];
  }
  return {mine, my_squares};
}

template <int kBatch, int kWarps, int kBlocks, class T, Norm kNorm, Store kStore>
__global__ void __launch_bounds__(32 * kWarps, kBlocks)
    linear_step_kernel(LinearStep<T, kNorm, kStore> a, int split) {
  constexpr int kSums = kLinearRows * kBatch;
  static_assert(kSums <= 32, "a lane finishes one sum");
  __shared__ float scales[kBatch * kMostGroups];
  WeightStream<T, kWarps> W(a.W, a.rows, a.cols, split);
  int group = W.next_group;
  const int rounds = ceil_div(W.groups, W.at_once);  // all warps: they share barriers
  // Lane i finishes the sum of row i / kBatch of the group for sequence i % kBatch.
  const int lane = threadIdx.x % 32, b = lane % kBatch;
  const auto row = [&] { return int64_t(group) * kLinearRows + lane / kBatch; };
  const auto finishes = [&] {
    return W.part == 0 && lane < kSums && row() < a.rows && b < a.batch;
  };

#pragma unroll 1
  for (int slot = 0; slot < kLinearDepth; ++slot) W.fetch(slot);
  StoreOperands<T> operands;
  if constexpr (kNorm != Norm::none) prefetch_row(a.norm.weight, a.cols);
  if (finishes()) load_operands(a, row(), b, operands);
  launch_next();
  wait_for_previous();
  if constexpr (kNorm == Norm::grouped) scales_of_groups(a.norm, a.batch, a.cols, scales);

  int slot = 0;
  for (int round = 0; round < rounds; ++round, group += W.at_once) {
    if (finishes()) {
      if (round > 0) load_operands(a, row(), b, operands);
      if constexpr (kStore == Store::residual) operands.residual = a.out[b * a.rows + row()];
    }
    float sum[kSums] = {}, squares[kBatch] = {};
    multiply<kBatch>(a, W, group, slot, scales, sum, squares);
    float2 v = add_up<kNorm != Norm::none, kWarps>(sum, squares, split, round > 0);
    if (kNorm == Norm::rms || (kNorm == Norm::grouped && a.norm.n_groups == 1))
      v.x *= rsqrtf(v.y / a.cols + a.norm.eps);
    if (finishes()) store_output(a, row(), b, v.x, operands);
  }
}

struct LinearPlan {
  int warps, split, steps, rounds, blocks;
};

// As few steps along a row as the warps that fit the GPU can make of it, and no more warps than
// that takes; as few rounds as fit it, and all of one length. What streams takes as many blocks on
// every multiprocessor, so that all have the same to read.
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

template <class T, Norm kNorm, Store kStore>
void linear_step(const LinearStep<T, kNorm, kStore>& a, cudaStream_t stream) {
  const int64_t groups = ceil_div(a.rows, kLinearRows), pieces = a.cols * sizeof(T) / 16;
  const auto launch = [&](auto* kernel, const LinearPlan& plan) {
    const int slot = kLinearRows * plan.warps * 32 * 16,           // bytes of the ring
        slots = std::min(kLinearDepth, plan.steps * plan.rounds);  // no more are ever filled
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    kLinearDepth * slot));
    launch_early(kernel, dim3(unsigned(plan.blocks)), 32 * plan.warps, slots * slot, stream, a,
                 plan.split);
  };
  const LinearPlan brief = linear_plan(kBriefShape, groups, pieces);
  if (a.batch > 1)
    launch(linear_step_kernel<kFewSequences, kFewShape.warps, kFewShape.blocks, T, kNorm, kStore>,
           linear_plan(kFewShape, groups, pieces));
  else if (brief.steps * brief.rounds > kLinearDepth)
    launch(linear_step_kernel<1, kStreamShape.warps, kStreamShape.blocks, T, kNorm, kStore>,
           linear_plan(kStreamShape, groups, pieces));
  else
    launch(linear_step_kernel<1, kBriefShape.warps, kBriefShape.blocks, T, kNorm, kStore>, brief);
}

// --- Mamba: dt_proj, selective_scan_step and the gate ---

template <class T>
struct DtProjection {
  const float* dt_B_C;  // (batch, rank + 2 d_state), in place of ScanArgs' delta, B and C
  const T* weight;      // (d_inner, rank)
  int rank;
};

constexpr int kScanDecodePieces = 10;           // of dt_proj in registers: rank 160
constexpr int kMostStepInputs = 48 * 1024 / 4;  // numbers of dt, B and C in shared memory

// A quarter of a row of dt_proj, one lane's of four: every fourth piece of four numbers in
// registers, what does not fit or is not aligned from memory.
template <class T>
struct DtProjectionRow {
  const T* row;
  int rank, lane, pieces;
  Vector<T, 4> w[kScanDecodePieces];

  __device__ DtProjectionRow(const T* row, int rank, int lane) : row(row), rank(rank), lane(lane) {
    pieces = rank % 4 == 0 ? min(rank / 4, 4 * kScanDecodePieces) : 0;
#pragma unroll
    for (int i = 0; i < kScanDecodePieces; ++i)
      w[i] = load<4>(row + 4 * (4 * i + lane), 4 * i + lane < pieces);
  }
  __device__ float dot(const float* dt) const {  // the sum over the four lanes
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < kScanDecodePieces; ++i) {
      const int piece = 4 * i + lane;
      if (piece >= pieces) break;
      float w_i[4];
      unpack(w[i], w_i);
#pragma unroll
      for (int k = 0; k < 4; ++k) sum = fmaf(w_i[k], dt[4 * piece + k], sum);
    }
    for (int k = 4 * pieces + lane; k < rank; k += 4) sum = fmaf(to_float(row[k]), dt[k], sum);
    sum += __shfl_xor_sync(~0u, sum, 1);
    return sum + __shfl_xor_sync(~0u, sum, 2);
  }
};

// Four lanes share a channel: each takes every fourth piece of the row of dt_proj and of the
// states, four numbers a piece, both in registers before the wait. dt, B and C pass through shared
// memory. Grid: x = channels in blocks of 32, y = sequences.
template <class T>
__global__ void __launch_bounds__(128) scan_decode_kernel(ScanArgs<T> a, DtProjection<T> p) {
  const int lane = threadIdx.x % 4, b = blockIdx.y, N = int(a.d_state);
  const bool exists = blockIdx.x * 32 + threadIdx.x / 4 < a.d_inner;
  const int64_t d = exists ? blockIdx.x * 32 + threadIdx.x / 4 : 0;  // else nothing is stored
  const int width = p.rank + 2 * N;
  const int done = a.done ? a.done[b] : 0;
  float* h = a.hT + (int64_t(b) * a.d_inner + d) * N;
  float h_n[4], A[4];
  unpack(load<4>(h + 4 * lane, 4 * lane < N), h_n);
  const DtProjectionRow<T> dt_proj(p.weight + d * p.rank, p.rank, lane);
  const float bias = a.delta_bias[d], D = a.D[d];
  unpack(load<4>(a.A + d * N + 4 * lane, 4 * lane < N), A);
  launch_next();
  wait_for_previous();

  extern __shared__ float dt[];  // (width): dt, B, C
  const float *B = dt + p.rank, *C = B + N;
  const float x = to_float(a.x[b * a.x_stride + d]), z = to_float(a.z[b * a.z_stride + d]);
  for (int i = threadIdx.x; i < width; i += blockDim.x) dt[i] = p.dt_B_C[int64_t(b) * width + i];
  __syncthreads();  // dt, B and C are written before anybody reads them

  const float delta = a.delta_ratio * softplus(dt_proj.dot(dt) + bias);
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
  if (lane == 0 && exists) a.out[b * a.out_stride + d] = from_float<T>(fmaf(D, x, y) * silu(z));
}

template <class T>
void scan_decode(const ScanArgs<T>& a, const DtProjection<T>& p, cudaStream_t stream) {
  launch_early(scan_decode_kernel<T>, dim3(unsigned(ceil_div(a.d_inner, 32)), unsigned(a.batch)),
               128, int((p.rank + 2 * a.d_state) * sizeof(float)), stream, a, p);
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

// Section 5 of mamba.hpp on the GPU, in double and in its order:
//
//   best_kernel    the best id of each stretch of ids, and every id's key for the sort
//   CUB            the ids of each sequence in the order of their scores, for top-k and top-p
//   weight_kernel  exp((score - best) / temperature), 0 for what top-k drops
//   sample_kernel  top-p, min-p, the draw, and the embedding of the token for the next step
//
// Greedy takes the first and the last. The kernels are static: they are no templates, and several
// tests include this file.

constexpr int kSampleThreads = 1024, kSampleWarps = 32;
constexpr int kStretches = kSampleWarps;  // of a vocabulary: each a block's, or a warp's
constexpr int64_t kMostSequences = 256;   // that draw together

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
  const uint64_t* sequence;    // (batch) numbers of the sequences
  const uint64_t* start;       // (batch) positions of the first tokens drawn
  int64_t* made;               // (batch) tokens drawn so far
  unsigned char* seen;         // (batch, vocab_size) tokens of the history, or null: no penalty
  const unsigned char* never;  // (vocab_size) ids that are not drawn, or null
  const Token* end_tokens;     // (n_end_tokens)
  int64_t n_end_tokens;
  int* done;                      // (batch) set when one of them was drawn
  Best* best;                     // (batch, kStretches)
  uint64_t *keys, *sorted_keys;   // (batch, vocab_size) twice, and the ids that belong to them;
  Token *ids, *sorted_ids;        // null where nothing is sorted
  double *weights, *weight_sums;  // (batch, vocab_size), (batch, kStretches); null if greedy
  Token* log;  // (longest, batch) the tokens for the host, -1: no number among logits
};

// A logit of sequence b, and what the penalty makes of it.
__device__ inline double score_of(const SampleArgs& a, int64_t b, int64_t id) {
  if (a.never && a.never[id]) return -INFINITY;
  const double s = a.logits[b * a.vocab_size + id];
  if (!a.seen || !a.seen[b * a.vocab_size + id]) return s;
  return s < 0 ? s * a.penalty : s / a.penalty;
}

// An unsigned integer in the order of (b, score): the sequence, and below it the score's bits,
// turned so that they sort as integers. Without a penalty a score is a float; with one, the 56
// upper bits of a double (scores that agree in them, 44 bits of the fraction, count as equal).
__host__ __device__ inline int score_bits(const SampleArgs& a) { return a.seen ? 56 : 32; }
__device__ inline uint64_t sort_key(const SampleArgs& a, int64_t b, double score) {
  if (!a.seen) {
    const uint32_t bits = __float_as_uint(float(score) + 0.f);  // no -0
    return uint64_t(b) << 32 | (bits >> 31 ? ~bits : bits | 1u << 31);
  }
  const uint64_t bits = __double_as_longlong(score + 0.);
  return uint64_t(b) << 56 | (bits >> 63 ? ~bits : bits | 1ull << 63) >> 8;
}

// CUB's sort is stable: of equal scores the lower id comes first. Without room: the bytes it needs.
inline void sort_by_score(const SampleArgs& a, void* room, size_t& bytes, cudaStream_t stream) {
  int end = score_bits(a);
  while ((a.batch - 1) >> (end - score_bits(a))) ++end;
  CUDA_CHECK(cub::DeviceRadixSort::SortPairs(room, bytes, a.keys, a.sorted_keys, a.ids,
                                             a.sorted_ids, a.batch * a.vocab_size, 0, end, stream));
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
__device__ inline Best best_of_sequence(const SampleArgs& a, int64_t b) {
  return warp_best(a.best[b * kStretches + threadIdx.x % 32]);
}

// Grid of this kernel and the next: x = stretches of ids, y = sequences.
static __global__ void __launch_bounds__(kSampleThreads) best_kernel(SampleArgs a) {
  launch_next();
  wait_for_previous();
  const int64_t b = blockIdx.y, V = a.vocab_size, stretch = ceil_div(V, kStretches),
                end = min(V, (blockIdx.x + 1) * stretch);
  Best best{-INFINITY, 0, 0};
#pragma unroll 2
  for (int64_t i = blockIdx.x * stretch + threadIdx.x; i < end; i += kSampleThreads) {
    const double s = score_of(a, b, i);
    if (!(s < INFINITY)) best.wrong = 1;
    if (s > best.score) best.score = s, best.id = Token(i);
    if (a.keys) a.keys[b * V + i] = sort_key(a, b, s), a.ids[b * V + i] = Token(i);
  }
  __shared__ Best of_warp[kSampleWarps];
  best = warp_best(best);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = best;
  __syncthreads();  // the warps' best are written before they are read
  if (threadIdx.x >= 32) return;
  best = warp_best(of_warp[threadIdx.x]);
  if (threadIdx.x == 0) a.best[b * kStretches + blockIdx.x] = best;
}

// Weights of the ids, and their sum over a stretch of the sorted ids, or of all in order.
static __global__ void __launch_bounds__(kSampleThreads) weight_kernel(SampleArgs a) {
  launch_next();
  wait_for_previous();
  const int64_t b = blockIdx.y, V = a.vocab_size, stretch = ceil_div(V, kStretches),
                end = min(V, (blockIdx.x + 1) * stretch);
  const double largest = best_of_sequence(a, b).score;
  const uint64_t least_key =  // of those that top-k keeps
      a.top_k > 0 && a.top_k < V ? a.sorted_keys[(b + 1) * V - a.top_k] : 0;
  double sum = 0.;
  for (int64_t i = blockIdx.x * stretch + threadIdx.x; i < end; i += kSampleThreads) {
    const int64_t id = a.sorted_ids ? a.sorted_ids[b * V + i] : i;
    const bool dropped = a.sorted_keys && a.sorted_keys[b * V + i] < least_key;
    const double s = score_of(a, b, id);
    const double weight = dropped ? 0. : exp(fmax((s - largest) / a.temperature, -700.));
    a.weights[b * V + id] = weight;
    sum += weight;
  }
  __shared__ double of_warp[kSampleWarps];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
  __syncthreads();  // the warps' sums are written before they are added
  if (threadIdx.x >= 32) return;
  sum = warp_sum(of_warp[threadIdx.x]);
  if (threadIdx.x == 0) a.weight_sums[b * kStretches + blockIdx.x] = sum;
}

// The first i < count at which the running sum of weight(i) exceeds `part` of the whole, or, should
// rounding leave it below, the last one with a weight. Each round sums 32 stretches, a warp each,
// and goes on with the one in which the sum passes the limit, until that is a single i: 50,280
// numbers, then 1,572, 50, 2. The same bits in all threads, on every run. `sums`: of the first
// round's stretches, or null.
template <class Weight>
__device__ inline int64_t first_above(int64_t count, double part, const double* sums,
                                      const Weight& weight) {
  __shared__ double of_warp[kSampleWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int64_t first = 0;
  double before = 0., limit = -1.;
  for (;; sums = nullptr) {
    const int64_t stretch = ceil_div(count, kStretches);
    if (!sums) {
      double sum = 0.;
#pragma unroll 4
      for (int64_t i = warp * stretch + lane; i < min(count, (warp + 1) * stretch); i += 32)
        sum += weight(first + i);
      sum = warp_sum(sum);
      __syncthreads();  // the sums of the round before have been read
      if (lane == 0) of_warp[warp] = sum;
      __syncthreads();  // the warps' sums are written before they are read
    }
    const double mine = sums ? sums[lane] : of_warp[lane];
    double upto = mine;  // the sum over the stretches up to this lane's
    for (int d = 1; d < 32; d *= 2) {
      const double left = __shfl_up_sync(~0u, upto, d);
      if (lane >= d) upto += left;
    }
    if (limit < 0) limit = part * __shfl_sync(~0u, upto, 31);
    const unsigned any = __ballot_sync(~0u, mine > 0.),
                   past = __ballot_sync(~0u, mine > 0. && before + upto > limit);
    const int pick = past ? __ffs(past) - 1 : any ? 31 - __clz(any) : 0;
    const double left = __shfl_sync(~0u, upto, pick > 0 ? pick - 1 : 0);
    if (pick > 0) before += left;
    first += pick * stretch, count = min(stretch, count - pick * stretch);
    if (stretch == 1) return first;
  }
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

// Draws, in order of ids, from what top-p and min-p leave. Top-p drops the least scores as long as
// all that it drops weigh no more than 1 - top_p of the whole.
__device__ inline Token draw(const SampleArgs& a, int64_t b) {
  const int64_t V = a.vocab_size;
  const double* weights = a.weights + b * V;
  const uint64_t* keys = a.keys + b * V;
  Token least = 0;  // the last that stays
  if (a.top_p < 1) {
    const Token* sorted = a.sorted_ids + b * V;
    least = sorted[first_above(V, 1 - a.top_p, a.weight_sums + b * kStretches,
                               [&](int64_t i) { return weights[sorted[i]]; })];
  }
  const double cut = a.top_p < 1 ? weights[least] : 0., least_weight = fmax(a.min_p, 1e-300);
  const uint64_t cut_key = a.top_p < 1 ? keys[least] : 0;
  const auto kept = [&](int64_t id) {
    const double w = weights[id];
    if (w < cut || w < least_weight) return 0.;
    if (w > cut) return w;  // else by the score, and of equal ones by the id
    return keys[id] > cut_key || (keys[id] == cut_key && id >= least) ? w : 0.;
  };
  const double u = draw_uniform(a.seed, a.sequence[b], a.start[b] + uint64_t(a.made[b]));
  return Token(first_above(V, u, nullptr, kept));
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

// Draws the next token, notes it, and looks up its embedding for the next step: residual (batch,
// d_model). Grid: one block a sequence.
static __global__ void __launch_bounds__(kSampleThreads)
    sample_kernel(SampleArgs a, StoredMatrix embedding, int64_t d_model, float* residual) {
  launch_next();
  wait_for_previous();
  const int64_t b = blockIdx.x;
  const Best best = best_of_sequence(a, b);
  if (a.done[b]) return;
  Token token = best.wrong || best.score == -INFINITY ? -1 : best.id;
  if (token >= 0 && a.temperature > 0) token = draw(a, b);
  __syncthreads();  // all have read seen and made before they change
  if (threadIdx.x == 0) {
    a.log[a.made[b] * a.batch + b] = token;
    a.made[b] += 1;
    if (a.seen && token >= 0) a.seen[b * a.vocab_size + token] = 1;
    if (token < 0) a.done[b] = 1;
    for (int64_t i = 0; i < a.n_end_tokens; ++i)
      if (token == a.end_tokens[i]) a.done[b] = 1;
  }
  const int64_t row = int64_t(max(token, 0)) * d_model;
  for (int64_t i = threadIdx.x; i < d_model; i += kSampleThreads)
    residual[b * d_model + i] = embedding[row + i];
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

/// Draws the next tokens of a batch of texts, options.n each at most, and keeps what that needs.
class Sampler {
 public:
  struct Text {
    uint64_t number;  // with the seed it fixes the random numbers
    const std::vector<Token>& ids;
  };
  /// logits (batch, vocab_size): where they will be before each draw.
  Sampler(const GenerateOptions& options, const std::vector<Text>& texts, int64_t vocab_size,
          const float* logits)
      : log_(texts.size() * static_cast<size_t>(options.n)) {
    const size_t batch = texts.size(), all = batch * static_cast<size_t>(vocab_size);
    if (batch > kMostSequences) fail("sampler: expected at most ", kMostSequences, " sequences");
    const SamplerOptions& o = options.sampler;
    args_.logits = logits, args_.vocab_size = vocab_size, args_.batch = int64_t(batch);
    args_.temperature = o.temperature, args_.top_k = o.top_k, args_.top_p = o.top_p;
    args_.min_p = o.min_p, args_.penalty = o.repetition_penalty, args_.seed = o.seed;
    set_never(options.never);
    set_texts(texts);
    end_tokens_ = {options.end_tokens.data(), options.end_tokens.size()};
    args_.end_tokens = end_tokens_.data(), args_.n_end_tokens = int64_t(end_tokens_.size());
    args_.made = zeros(made_, batch), args_.done = zeros(done_, batch);
    args_.best = zeros(best_, batch * kStretches), args_.log = log_.data();
    if (o.temperature == 0) return;
    args_.weights = zeros(weights_, all),
    args_.weight_sums = zeros(weight_sums_, batch * kStretches);
    if (o.top_p == 1 && (o.top_k == 0 || o.top_k >= vocab_size)) return;
    args_.keys = zeros(keys_, all), args_.sorted_keys = zeros(sorted_keys_, all);
    args_.ids = zeros(ids_, all), args_.sorted_ids = zeros(sorted_ids_, all);
    sort_by_score(args_, nullptr, sort_bytes_, nullptr);
    zeros(sort_room_, sort_bytes_);
  }

  /// residual (batch, d_model): the embeddings of the tokens drawn.
  void draw(const StoredMatrix& embedding, int64_t d_model, float* residual, cudaStream_t stream) {
    const dim3 stretches(kStretches, unsigned(args_.batch));
    launch_early(best_kernel, stretches, kSampleThreads, 0, stream, args_);
    if (args_.keys) sort_by_score(args_, sort_room_.data(), sort_bytes_, stream);
    if (args_.weights) launch_early(weight_kernel, stretches, kSampleThreads, 0, stream, args_);
    launch_early(sample_kernel, dim3(unsigned(args_.batch)), kSampleThreads, 0, stream, args_,
                 embedding, d_model, residual);
  }
  const int* done() const { return args_.done; }  // (batch) not 0: the text is finished
  /// The i-th token drawn for text b, once the GPU has done it.
  Token drawn(int64_t i, size_t b) const { return log_.data()[i * args_.batch + int64_t(b)]; }

 private:
  void set_never(const std::vector<Token>& ids) {
    if (ids.empty()) return;
    std::vector<unsigned char> never(static_cast<size_t>(args_.vocab_size));
    for (const Token id : ids) never[static_cast<size_t>(id)] = 1;
    never_ = {never.data(), never.size()}, args_.never = never_.data();
  }
  void set_texts(const std::vector<Text>& texts) {
    const auto V = static_cast<size_t>(args_.vocab_size);
    std::vector<uint64_t> numbers, starts;
    std::vector<unsigned char> seen(args_.penalty == 1 ? 0 : texts.size() * V);
    for (const Text& text : texts) {
      if (!seen.empty())
        for (const Token id : text.ids) seen[numbers.size() * V + static_cast<size_t>(id)] = 1;
      numbers.push_back(text.number), starts.push_back(text.ids.size());
    }
    numbers_ = {numbers.data(), numbers.size()}, starts_ = {starts.data(), starts.size()};
    seen_ = {seen.data(), seen.size()};
    args_.sequence = numbers_.data(), args_.start = starts_.data(), args_.seen = seen_.data();
  }

  template <class V>
  static V* zeros(DeviceBuffer<V>& buffer, size_t size) {
    buffer = DeviceBuffer<V>(size);
    buffer.zero();
    return buffer.data();
  }

  SampleArgs args_ = {};
  DeviceBuffer<uint64_t> numbers_, starts_;
  DeviceBuffer<unsigned char> seen_, never_;
  DeviceBuffer<Token> end_tokens_;
  DeviceBuffer<int64_t> made_;
  DeviceBuffer<int> done_;
  DeviceBuffer<Best> best_;
  DeviceBuffer<uint64_t> keys_, sorted_keys_;
  DeviceBuffer<Token> ids_, sorted_ids_;
  DeviceBuffer<double> weights_, weight_sums_;
  DeviceBuffer<std::byte> sort_room_;
  size_t sort_bytes_ = 0;
  HostTokens log_;
};

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
  DeviceRow out_proj_bias, norm_bias, norm2, norm2_bias;
  DeviceMatrix fc1, fc2;
};
struct DeviceModel {
  ssm::Sizes sizes;
  DeviceMatrix embedding;
  std::vector<DeviceLayer> layers;
  DeviceRow norm_f;
  DeviceMatrix lm_head;
  bool tied = true;
  DeviceRow norm_f_bias;
};

/// What all weights take on the GPU: matrices as stored, the rest in float32.
inline size_t weight_bytes(const Config& config, DType dtype) {
  DeviceModel model;
  model.layers.resize(static_cast<size_t>(config.n_layer));
  model.tied = config.tie_embeddings;
  size_t bytes = 0;
  for_each_weight(config, model, [&](const std::string&, const auto& shape, const auto& to) {
    const bool matrix = std::is_same_v<decltype(to), const DeviceMatrix&>;
    size_t size = matrix ? dtype_size(dtype) : sizeof(float);
    for (const int64_t extent : shape) size *= static_cast<size_t>(extent);
    bytes += size;
  });
  return bytes;
}

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
void with_weight_type(DType dtype, const Function& f) {
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

// Layers before l that are like it: with a scan, or with attention.
inline Index rank_of(const Config& c, Index l) {
  const auto& layers = c.attention_layers;
  const Index before = std::lower_bound(layers.begin(), layers.end(), l) - layers.begin();
  return c.attends(l) ? before : l - before;
}

// What a layer with attention remembers; nothing where there is no state. As in AttentionArgs.
template <class T>
struct AttentionCache {
  T *conv = nullptr, *keys = nullptr, *values = nullptr;
  int64_t capacity = 0;
  const int64_t* past = nullptr;
};

// What is remembered of `batch` texts, in the order in which the kernels read it:
// conv (n_layer, batch, d_conv - 1, conv_width) as stored, h (n_layer, batch, d_inner, d_state), of
// the layers with a scan. Of those with attention: attention_conv likewise, keys and values
// (their number, batch, capacity, kv_width) as stored, past (batch) tokens, at most `longest`.
struct DeviceState {
  int64_t batch = 0;
  DeviceBuffer<std::byte> conv, attention_conv, keys, values;
  DeviceBuffer<float> h;
  DeviceBuffer<int64_t> past;
  int64_t capacity = 0, longest = 0;
  DeviceState() = default;
  DeviceState(const Config& c, DType dtype, int64_t batch)
      : batch(batch),
        conv(dtype_size(dtype) * scans(c) * batch * (c.d_conv - 1) * c.conv_width()),
        attention_conv(dtype_size(dtype) * attentions(c) * batch * attention_taps(c)),
        h(scans(c) * batch * c.d_inner * c.d_state),
        past(attentions(c) > 0 ? batch : 0) {
    conv.zero();
    attention_conv.zero();
    h.zero();
    past.zero();
  }
  static Index attentions(const Config& c) { return Index(c.attention_layers.size()); }
  static Index scans(const Config& c) { return c.n_layer - attentions(c); }
  static Index attention_taps(const Config& c) {  // numbers of the past that a convolution sees
    return std::max<Index>(0, c.attention.d_conv - 1) * c.attention.in_proj_width();
  }

  template <class T>
  T* layer_conv(const Config& c, Index l) const {
    return reinterpret_cast<T*>(conv.data()) +
           rank_of(c, l) * batch * (c.d_conv - 1) * c.conv_width();
  }
  float* layer_h(const Config& c, Index l) const {
    return h.data() + rank_of(c, l) * batch * c.d_inner * c.d_state;
  }
  template <class T>
  AttentionCache<T> layer_cache(const Config& c, Index l) const {
    const Index i = rank_of(c, l) * batch, row = capacity * c.attention.kv_width();
    return {reinterpret_cast<T*>(attention_conv.data()) + i * attention_taps(c),
            reinterpret_cast<T*>(keys.data()) + i * row,
            reinterpret_cast<T*>(values.data()) + i * row, capacity, past.data()};
  }

  // Is there room for so many more tokens of every text?
  bool has_room(const Config& c, int64_t tokens) const {
    return attentions(c) == 0 || longest + tokens <= capacity;
  }
  // Makes it: twice as much as there was, so that few tokens are copied often. A number has so many
  // bytes.
  void reserve(const Config& c, size_t number, int64_t tokens, cudaStream_t stream) {
    if (has_room(c, tokens)) return;
    const int64_t more = std::max(longest + tokens, std::max<int64_t>(64, 2 * capacity));
    const size_t row = number * size_t(c.attention.kv_width());
    const size_t texts = size_t(attentions(c) * batch);
    need_memory(2 * texts * size_t(more) * row, "keys and values of the past");
    for (DeviceBuffer<std::byte>* cache : {&keys, &values}) {
      DeviceBuffer<std::byte> larger(texts * size_t(more) * row);
      if (longest > 0)
        CUDA_CHECK(cudaMemcpy2DAsync(larger.data(), size_t(more) * row, cache->data(),
                                     size_t(capacity) * row, size_t(longest) * row, texts,
                                     cudaMemcpyDeviceToDevice, stream));
      CUDA_CHECK(cudaStreamSynchronize(stream));  // before the old one goes
      *cache = std::move(larger);
    }
    capacity = more;
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
  cublasHandle_t cublas() const { return cublas_; }
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
  float* residual;    // (rows, d_model)
  T* u;               // (rows, d_model)     rms_norm of it
  T* projected;       // (rows, in_proj_width)  Mamba: x z;  Mamba-2: z x B C dt;  attention: q k v
  T* x;               // (rows, conv_width)  Mamba: x;  Mamba-2: x B C;  attention: q k v
  T* dt_B_C;          // (rows, dt_rank + 2 d_state)
  T *delta, *y;       // (rows, d_inner) twice; Mamba-2's normed y: in delta; attention's: in y
  T *x_gate, *gated;  // (rows, 2 d_intermediate), (rows, d_intermediate): the MLP's
  // for the fused step of a few sequences:
  float* dt_B_C_step = nullptr;  // (rows, dt_rank + 2 d_state)
  float* gated_y = nullptr;      // (rows, d_inner)
  float* squares = nullptr;      // (rows, n_heads ssd_step_blocks)
  // for one token of every sequence:
  float* attention_parts = nullptr;  // see causal_attention_step

  // Of all layers, with a scan or with attention, the widest.
  static int64_t projected_width(const Config& c) {
    return std::max(c.in_proj_width(), c.attention.in_proj_width());
  }
  static int64_t x_width(const Config& c) {
    return std::max(c.conv_width(), c.attention.in_proj_width());
  }
  static int64_t y_width(const Config& c) { return std::max(c.d_inner, c.attention.q_width()); }

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
      take(projected, projected_width(c));
      take(x, x_width(c));
      take(dt_B_C, c.dt_rank + 2 * c.d_state);
      take(delta, c.d_inner);
      take(y, y_width(c));
      take(x_gate, 2 * c.d_intermediate);
      take(gated, c.d_intermediate);
      const ssm::AttentionSizes& at = c.attention;
      if (at.n_heads > 0 && rows <= kMostSequences)
        take(attention_parts, ceil_div(mamba::attention_parts(rows, int(at.n_heads),
                                                              int(at.n_kv_heads), int(at.head_dim)),
                                       std::max<int64_t>(1, rows)));
      if (rows <= kFewSequences) {
        take(dt_B_C_step, c.dt_rank + 2 * c.d_state);
        take(gated_y, c.d_inner);
        take(squares, c.n_heads * ssd_step_blocks(c.head_dim));
      }
      if (measure) room.grow(used);
    }
  }
};

// All operations of ssm_reference.hpp's blocks and model, on the GPU. T: what matrices are stored
// in, and what is handed from operation to operation; the residual stream and the states are
// float32.
template <class T>
struct Compute {
  const Config& config;
  const DeviceModel& model;
  Queue& queue;
  DeviceBuffer<std::byte>&activation_room, &scan_room;
  float delta_ratio;

  const T* head() const { return (model.tied ? model.embedding : model.lm_head).template as<T>(); }
  float eps() const { return float(config.norm_eps); }

  void linear(const T* x, int64_t L, int64_t x_stride, const DeviceMatrix& W, T* y) const {
    queue.linear(x, L, x_stride, W.as<T>(), W.rows, W.cols, y, W.rows);
  }
  void norm(const Activations<T>& a, const DeviceRow& weight, const DeviceRow& bias,
            int64_t L) const {
    if (!config.rms_norm)
      return mamba::layer_norm(a.residual, weight.data(), bias.data(), eps(), L,
                               int(config.d_model), a.u, queue.stream());
    mamba::rms_norm<T, T>(a.residual, nullptr, 0, weight.data(), eps(), L, int(config.d_model), a.u,
                          config.d_model, queue.stream());
  }

  ConvArgs<T> conv_args(const Activations<T>& a, const DeviceLayer& w, T* state) const {
    ConvArgs<T> conv;
    conv.d = config.conv_width(), conv.width = int(config.d_conv);
    conv.x = a.projected + (config.version == 1 ? 0 : config.d_inner);
    conv.x_stride = config.in_proj_width();
    conv.weight = w.conv_weight.data(), conv.bias = w.conv_bias.data();
    conv.state = state, conv.state_out = state;
    conv.out = a.x, conv.out_stride = config.conv_width();
    return conv;
  }

  // x: after the convolution, its rows x_stride apart.
  ScanArgs<T> scan_args(const Activations<T>& a, const DeviceLayer& w, const T* x, int64_t x_stride,
                        float* h) const {
    ScanArgs<T> scan;
    scan.d_inner = config.d_inner, scan.d_state = config.d_state;
    scan.x = x, scan.x_stride = x_stride;
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
  SsdArgs<T> ssd_args(const Activations<T>& a, const DeviceLayer& w, const T* x, int64_t x_stride,
                      float* h) const {
    SsdArgs<T> in;
    in.n_heads = int(config.n_heads), in.head_dim = int(config.head_dim);
    in.d_state = int(config.d_state), in.n_groups = int(config.n_groups);
    in.x = x, in.B = x + config.d_inner, in.C = in.B + config.n_groups * config.d_state;
    in.x_stride = in.B_stride = in.C_stride = x_stride;
    in.dt = a.projected + config.d_inner + config.conv_width();
    in.dt_stride = config.in_proj_width();
    in.A = w.A.data(), in.D = w.D.data(), in.dt_bias = w.dt_bias.data();
    in.dt_min = float(config.dt_min), in.dt_max = float(config.dt_max);
    in.h0 = h, in.hT = h;
    in.out = a.y, in.out_stride = config.d_inner;
    in.delta_ratio = delta_ratio;
    return in;
  }

  // The tokens that a layer takes: L of each of `batch` sequences. step: L is 1, and the step
  // functions do it; done as in ConvArgs.
  struct Tokens {
    int64_t batch, L;
    bool step;
    const int* done;
    const int64_t* cu_seqlens = nullptr;  // (batch + 1) if lengths differ: L is the longest,
    int64_t total = 0;                    // and there are so many tokens
    int64_t rows() const { return cu_seqlens ? total : batch * L; }
    template <class Args>
    void to(Args& args) const {
      args.batch = batch, args.L = L, args.done = done, args.cu_seqlens = cu_seqlens;
    }
  };

  // residual -> rms_norm, in_proj -> a.projected, causal_conv1d and silu -> a.x
  void project_in(const DeviceLayer& w, const Activations<T>& a, const Tokens& tokens,
                  T* conv_state) const {
    const int64_t rows = tokens.rows();
    norm(a, w.norm, w.norm_bias, rows);
    linear(a.u, rows, config.d_model, w.in_proj, a.projected);
    add_bias(a.projected, w.in_proj_bias, rows, config.in_proj_width(), queue.stream());
    ConvArgs<T> conv = conv_args(a, w, conv_state);
    tokens.to(conv);
    tokens.step ? causal_conv1d_step(conv, queue.stream()) : causal_conv1d(conv, queue.stream());
  }
  // residual += out_proj(y)
  void project_out(const DeviceLayer& w, const Activations<T>& a, const T* y, int64_t rows) const {
    queue.linear(y, rows, w.out_proj.cols, w.out_proj.as<T>(), config.d_model, w.out_proj.cols,
                 a.residual, config.d_model, 1.f);
    add_bias(a.residual, w.out_proj_bias, rows, config.d_model, queue.stream());
  }

  // The Mamba block of rms_norm(residual), up to out_proj -> a.y
  void mamba_inner(const DeviceLayer& w, const Activations<T>& a, const Tokens& tokens,
                   T* conv_state, float* h) const {
    const int64_t rows = tokens.rows();
    project_in(w, a, tokens, conv_state);
    linear(a.x, rows, config.d_inner, w.x_proj, a.dt_B_C);
    linear(a.dt_B_C, rows, config.dt_rank + 2 * config.d_state, w.dt_proj, a.delta);
    ScanArgs<T> scan = scan_args(a, w, a.x, config.d_inner, h);
    tokens.to(scan);
    scan_room.grow(tokens.step ? 0 : selective_scan_workspace(scan));
    tokens.step ? selective_scan_step(scan, queue.stream())
                : selective_scan(scan, reinterpret_cast<float*>(scan_room.data()), queue.stream());
  }
  // residual += the Mamba block of rms_norm(residual)
  void mamba_block(const DeviceLayer& w, const Activations<T>& a, const Tokens& tokens,
                   T* conv_state, float* h) const {
    mamba_inner(w, a, tokens, conv_state, h);
    project_out(w, a, a.y, tokens.rows());
  }

  // The same for Mamba-2, up to out_proj -> a.delta
  void mamba2_inner(const DeviceLayer& w, const Activations<T>& a, const Tokens& tokens,
                    T* conv_state, float* h) const {
    const int64_t rows = tokens.rows();
    project_in(w, a, tokens, conv_state);
    SsdArgs<T> in = ssd_args(a, w, a.x, config.conv_width(), h);
    tokens.to(in);
    scan_room.grow(tokens.step ? 0 : ssd_workspace_bytes(in));
    in.workspace = scan_room.data();
    tokens.step ? ssd_step(in, queue.stream()) : ssd(in, queue.stream());
    gated_rms_norm(a.y, config.d_inner, a.projected, config.in_proj_width(), w.gated_norm.data(),
                   eps(), rows, int(config.d_inner), int(config.n_groups), a.delta, config.d_inner,
                   queue.stream());
  }
  void mamba2_block(const DeviceLayer& w, const Activations<T>& a, const Tokens& tokens,
                    T* conv_state, float* h) const {
    mamba2_inner(w, a, tokens, conv_state, h);
    project_out(w, a, a.delta, tokens.rows());
  }

  ConvArgs<T> attention_conv_args(const Activations<T>& a, const DeviceLayer& w, T* state) const {
    ConvArgs<T> conv;
    conv.d = config.attention.in_proj_width(), conv.width = int(config.attention.d_conv);
    conv.x = a.projected, conv.out = a.x, conv.x_stride = conv.out_stride = conv.d;
    conv.weight = w.conv_weight.data(), conv.bias = w.conv_bias.data();
    conv.state = state, conv.state_out = state;
    conv.activate = false;
    return conv;
  }
  RotaryArgs<T> rotary_args(T* qkv, const Tokens& tokens, const AttentionCache<T>& cache) const {
    const ssm::AttentionSizes& at = config.attention;
    RotaryArgs<T> in;
    in.n_heads = int(at.n_heads), in.n_kv_heads = int(at.n_kv_heads);
    in.head_dim = int(at.head_dim), in.turning = int(at.rotary_dim), in.base = at.rotary_base;
    in.qkv = qkv, in.stride = at.in_proj_width();
    in.keys = cache.keys, in.values = cache.values, in.capacity = cache.capacity;
    in.past = cache.past;
    tokens.to(in);
    return in;
  }
  AttentionArgs<T> attention_args(const Activations<T>& a, const T* qkv, const Tokens& tokens,
                                  const AttentionCache<T>& cache) const {
    const ssm::AttentionSizes& at = config.attention;
    AttentionArgs<T> in;
    in.n_heads = int(at.n_heads), in.n_kv_heads = int(at.n_kv_heads);
    in.head_dim = int(at.head_dim);
    in.q = qkv, in.q_stride = at.in_proj_width(), in.out = a.y, in.out_stride = at.q_width();
    in.keys = cache.keys ? cache.keys : qkv + at.q_width();
    in.values = cache.keys ? cache.values : in.keys + at.kv_width();
    in.kv_stride = cache.keys ? at.kv_width() : at.in_proj_width();
    in.capacity = cache.capacity, in.past = cache.past;
    tokens.to(in);
    return in;
  }
  // qkv, turned in place -> a.y
  void attend(const Activations<T>& a, T* qkv, const Tokens& tokens,
              const AttentionCache<T>& cache) const {
    rotary(rotary_args(qkv, tokens, cache), queue.stream());
    const AttentionArgs<T> in = attention_args(a, qkv, tokens, cache);
    tokens.step ? causal_attention_step(in, a.attention_parts, queue.stream())
                : causal_attention(in, queue.stream());
  }
  // The attention block of norm(residual), up to out_proj -> a.y
  void attention_inner(const DeviceLayer& w, const Activations<T>& a, const Tokens& tokens,
                       const AttentionCache<T>& cache) const {
    const int64_t rows = tokens.rows();
    norm(a, w.norm, w.norm_bias, rows);
    linear(a.u, rows, config.d_model, w.in_proj, a.projected);
    add_bias(a.projected, w.in_proj_bias, rows, w.in_proj.rows, queue.stream());
    if (config.attention.d_conv == 0) return attend(a, a.projected, tokens, cache);
    ConvArgs<T> conv = attention_conv_args(a, w, cache.conv);
    tokens.to(conv);
    tokens.step ? causal_conv1d_step(conv, queue.stream()) : causal_conv1d(conv, queue.stream());
    attend(a, a.x, tokens, cache);
  }
  void attention_block(const DeviceLayer& w, const Activations<T>& a, const Tokens& tokens,
                       const AttentionCache<T>& cache) const {
    attention_inner(w, a, tokens, cache);
    project_out(w, a, a.y, tokens.rows());
  }

  // norm2(residual) -> a.x_gate, a.gated;  residual += the MLP of it
  void mlp_inner(const DeviceLayer& w, const Activations<T>& a, int64_t rows) const {
    norm(a, w.norm2, w.norm2_bias, rows);
    linear(a.u, rows, config.d_model, w.fc1, a.x_gate);
    gated_mlp(a.x_gate, rows, config.d_intermediate, a.gated, queue.stream());
  }
  void mlp(const DeviceLayer& w, const Activations<T>& a, int64_t rows) const {
    mlp_inner(w, a, rows);
    queue.linear(a.gated, rows, config.d_intermediate, w.fc2.as<T>(), config.d_model,
                 config.d_intermediate, a.residual, config.d_model, 1.f);
  }

  using Block = void (Compute::*)(const DeviceLayer&, const Activations<T>&, const Tokens&, T*,
                                  float*) const;
  Block scan_block(bool fused) const {
    if (config.version == 1) return fused ? &Compute::fused_mamba_block : &Compute::mamba_block;
    return fused ? &Compute::fused_mamba2_block : &Compute::mamba2_block;
  }
  // state: null for texts from their beginning, of which nothing is kept.
  void all_layers(const Activations<T>& a, const Tokens& tokens, DeviceState* state,
                  bool fused) const {
    const Block block = scan_block(fused);
    for (Index l = 0; l < config.n_layer; ++l) {
      const DeviceLayer& w = model.layers[l];
      if (config.attends(l)) {
        const auto cache = state ? state->layer_cache<T>(config, l) : AttentionCache<T>{};
        fused ? fused_attention_block(w, a, tokens, cache) : attention_block(w, a, tokens, cache);
      } else {
        (this->*block)(w, a, tokens, state ? state->layer_conv<T>(config, l) : nullptr,
                       state ? state->layer_h(config, l) : nullptr);
      }
      if (config.d_intermediate > 0) fused ? fused_mlp(w, a, tokens) : mlp(w, a, tokens.rows());
    }
    if (!state || state->past.size() == 0) return;
    advance_past_kernel<<<unsigned(ceil_div(tokens.batch, 128)), 128, 0, queue.stream()>>>(
        state->past.data(), tokens.batch, tokens.L, tokens.cu_seqlens, tokens.done);
    CUDA_CHECK(cudaGetLastError());
  }

  // a.residual = embedding[ids], ids (L) on the GPU.
  void embed(const Activations<T>& a, const Token* ids, int64_t L) const {
    embedding_kernel<<<unsigned(L), 256, 0, queue.stream()>>>(model.embedding.as<T>(), ids,
                                                              config.d_model, a.residual);
    CUDA_CHECK(cudaGetLastError());
  }

  // ids (L), on the GPU -> a.residual after all layers; `state` advances by L tokens.
  Activations<T> backbone(const Token* ids, int64_t L, DeviceState& state) const {
    const Activations<T> a(config, L, activation_room);
    state.reserve(config, sizeof(T), L, queue.stream());
    embed(a, ids, L);
    all_layers(a, {1, L, false, nullptr}, &state, false);
    state.longest += L;
    return a;
  }

  // rows [first, first + count) of a.residual -> logits (count, vocab_size); a.u is overwritten.
  void lm_head(const Activations<T>& a, int64_t first, int64_t count, float* logits) const {
    Activations<T> rows = a;
    rows.residual += first * config.d_model;
    norm(rows, model.norm_f, model.norm_f_bias, count);
    queue.linear(a.u, count, config.d_model, head(), config.vocab_size, config.d_model, logits,
                 config.vocab_size);
  }

  // Can the fused kernels take this batch? They read rows of matrices 16 bytes at a time, B and C
  // four numbers.
  bool can_fuse(int64_t batch) const {
    const int64_t n = 16 / sizeof(T);
    return batch <= kFewSequences && config.d_model % n == 0 && config.d_inner % n == 0 &&
           config.d_state % 4 == 0 && config.n_groups <= kMostGroups &&
           (batch == 1 || config.in_proj_width() % 4 == 0) &&
           config.d_inner / config.n_groups % n == 0 && config.d_conv <= kStepTaps &&
           config.dt_rank + 2 * config.d_state <= kMostStepInputs && config.rms_norm &&
           config.attention.q_width() % n == 0 && config.attention.in_proj_width() % n == 0 &&
           config.attention.d_conv <= kStepTaps;
  }

  // One token for every sequence of `state`: a.residual holds their embeddings -> logits (batch,
  // vocab_size).
  void step(const Activations<T>& a, DeviceState& state, const int* done, float* logits) const {
    const Tokens tokens{state.batch, 1, true, done};
    const bool fused = can_fuse(state.batch);
    all_layers(a, tokens, &state, fused);
    if (!fused) return lm_head(a, 0, state.batch, logits);
    LinearStep<T, Norm::rms, Store::plain> last{
        head(),     config.vocab_size, config.d_model, int(state.batch),
        a.residual, config.d_model,    logits};
    last.norm = {model.norm_f.data(), eps()};
    linear_step(last, queue.stream());
  }

  // project_in, fused: all rows of in_proj in a.projected, those of the convolution after it.
  void fused_project_in(const DeviceLayer& w, const Activations<T>& a, const Tokens& tokens,
                        T* conv_state) const {
    const Config& c = config;
    LinearStep<T, Norm::rms, Store::conv> in_proj{
        w.in_proj.as<T>(), c.in_proj_width(), c.d_model,   int(tokens.batch),
        a.residual,        c.d_model,         a.projected, w.in_proj_bias.data()};
    in_proj.norm = {w.norm.data(), eps()};
    in_proj.conv = {conv_state,   w.conv_weight.data(),           w.conv_bias.data(),
                    tokens.done,  c.version == 1 ? 0 : c.d_inner, c.conv_width(),
                    int(c.d_conv)};
    linear_step(in_proj, queue.stream());
  }

  void fused_mamba_block(const DeviceLayer& w, const Activations<T>& a, const Tokens& tokens,
                         T* conv_state, float* h) const {
    const Config& c = config;
    const int batch = int(tokens.batch);
    const int64_t width = c.dt_rank + 2 * c.d_state;
    fused_project_in(w, a, tokens, conv_state);
    linear_step(
        LinearStep<T, Norm::none, Store::plain>{w.x_proj.as<T>(), width, c.d_inner, batch,
                                                a.projected, c.in_proj_width(), a.dt_B_C_step},
        queue.stream());
    ScanArgs<T> scan = scan_args(a, w, a.projected, c.in_proj_width(), h);
    tokens.to(scan);
    scan_decode(scan, {a.dt_B_C_step, w.dt_proj.as<T>(), int(c.dt_rank)}, queue.stream());
    linear_step(LinearStep<T, Norm::none, Store::residual>{w.out_proj.as<T>(), c.d_model, c.d_inner,
                                                           batch, a.y, c.d_inner, a.residual,
                                                           w.out_proj_bias.data()},
                queue.stream());
  }

  void fused_mamba2_block(const DeviceLayer& w, const Activations<T>& a, const Tokens& tokens,
                          T* conv_state, float* h) const {
    const Config& c = config;
    fused_project_in(w, a, tokens, conv_state);
    SsdArgs<T> in = ssd_args(a, w, a.projected + c.d_inner, c.in_proj_width(), h);
    tokens.to(in);
    float* squares = c.n_groups > 1 ? a.squares : nullptr;
    ssd_gated_step(in, {a.projected, c.in_proj_width(), a.gated_y, squares}, queue.stream());
    LinearStep<T, Norm::grouped, Store::residual> out_proj{
        w.out_proj.as<T>(), c.d_model, c.d_inner,  int(tokens.batch),
        a.gated_y,          c.d_inner, a.residual, w.out_proj_bias.data()};
    out_proj.norm = {w.gated_norm.data(), eps(), int(c.n_groups),
                     int(c.n_heads / c.n_groups) * ssd_step_blocks(c.head_dim), squares};
    linear_step(out_proj, queue.stream());
  }

  // residual -> norm, W -> out, rounded; conv: where the convolution is to be made, too
  void fused_norm_linear(const Activations<T>& a, int batch, const DeviceRow& weight,
                         const DeviceMatrix& W, const DeviceRow& bias, T* out,
                         const ConvStep<T>& conv = {}) const {
    LinearStep<T, Norm::rms, Store::conv> in{W.as<T>(),  W.rows, W.cols, batch,
                                             a.residual, W.cols, out,    bias.data()};
    in.norm = {weight.data(), eps()};
    in.conv = conv;
    linear_step(in, queue.stream());
  }
  // residual += W x + bias
  void fused_linear_residual(const Activations<T>& a, int batch, const T* x, const DeviceMatrix& W,
                             const DeviceRow& bias) const {
    linear_step(LinearStep<T, Norm::none, Store::residual>{W.as<T>(), W.rows, W.cols, batch, x,
                                                           W.cols, a.residual, bias.data()},
                queue.stream());
  }
  void fused_attention_block(const DeviceLayer& w, const Activations<T>& a, const Tokens& tokens,
                             const AttentionCache<T>& cache) const {
    ConvStep<T> conv;
    if (config.attention.d_conv > 0)
      conv = {cache.conv, w.conv_weight.data(), w.conv_bias.data(),           tokens.done,
              0,          w.in_proj.rows,       int(config.attention.d_conv), false};
    fused_norm_linear(a, int(tokens.batch), w.norm, w.in_proj, w.in_proj_bias, a.projected, conv);
    attend(a, a.projected, tokens, cache);
    fused_linear_residual(a, int(tokens.batch), a.y, w.out_proj, w.out_proj_bias);
  }
  void fused_mlp(const DeviceLayer& w, const Activations<T>& a, const Tokens& tokens) const {
    fused_norm_linear(a, int(tokens.batch), w.norm2, w.fc1, {}, a.x_gate);
    gated_mlp(a.x_gate, tokens.batch, config.d_intermediate, a.gated, queue.stream());
    fused_linear_residual(a, int(tokens.batch), a.gated, w.fc2, {});
  }
};

// ============================================================================================
// Cross-entropy
// ============================================================================================
//
//   nll_t = log(sum_v exp(logits_t[v])) - logits_t[target_t]
//   dlogits_t[v] = scale (exp(logits_t[v]) / sum - (v = target_t))      target -1: both are zero
//
// One block takes a row: it reads the logits once for their maximum and the sum of exponentials,
// each thread for its own and then all for the block, and a second time to put dlogits, as T, into
// their place.  Grid: rows, `stride` floats apart; row t of dlogits begins where that of logits
// did.

constexpr int kEntropyThreads = 512;

// Floats from row to row: a multiple of 8.
inline int64_t logits_stride(int64_t vocab_size) { return ceil_div(vocab_size, int64_t{8}) * 8; }

// Logits i to i + 3 of a row; what lies between its end and the next row is not read.
__device__ inline void load_logits(float (&v)[4], const float* row, int64_t i, int64_t vocab_size) {
  if (i + 4 <= vocab_size) return load4(v, row + i);
  for (int k = 0; k < 4; ++k) v[k] = i + k < vocab_size ? row[i + k] : -INFINITY;
}

// A sum of exp(v - max).
struct ExpSum {
  float max, sum;
  __device__ void add(float other_max, float other_sum) {
    const float m = fmaxf(max, other_max);
    if (m == -INFINITY) return;
    sum = sum * exp2_approx(kLog2e * (max - m)) + other_sum * exp2_approx(kLog2e * (other_max - m));
    max = m;
  }
};

// The same over a row, the same bits in all threads.
__device__ inline ExpSum exp_sum_of_row(const float* logits, int64_t vocab_size) {
  __shared__ ExpSum of_warp[kEntropyThreads / 32];
  ExpSum own{-INFINITY, 0.f};
  for (int64_t i = 4 * threadIdx.x; i < vocab_size; i += 4 * kEntropyThreads) {
    float v[4];
    load_logits(v, logits, i, vocab_size);
    float max = -INFINITY, sum = 0.f;
    for (int k = 0; k < 4; ++k) max = fmaxf(max, v[k]);
    for (int k = 0; k < 4; ++k) sum += exp2_approx(kLog2e * (v[k] - max));
    own.add(max, sum);
  }
  for (int d = 16; d > 0; d /= 2) {
    const float max = __shfl_xor_sync(~0u, own.max, d), sum = __shfl_xor_sync(~0u, own.sum, d);
    own.add(max, sum);
  }
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = own;
  __syncthreads();  // the warps' sums are written before they are added
  own = of_warp[0];
  for (int i = 1; i < kEntropyThreads / 32; ++i) own.add(of_warp[i].max, of_warp[i].sum);
  return own;
}

template <class T>
__global__ void __launch_bounds__(kEntropyThreads)
    cross_entropy_kernel(float* logits, int64_t stride, int64_t vocab_size, const Token* targets,
                         float scale, const float* weights, float* nll, bool* likeliest) {
  float* const row = logits + blockIdx.x * stride;
  T* const dlogits = reinterpret_cast<T*>(row);
  const int64_t target = targets[blockIdx.x];
  const ExpSum all = exp_sum_of_row(row, vocab_size);
  if (threadIdx.x == 0) nll[blockIdx.x] = target < 0 ? 0.f : logf(all.sum) + all.max - row[target];
  if (threadIdx.x == 0 && likeliest) likeliest[blockIdx.x] = target >= 0 && row[target] == all.max;
  if (scale == 0.f) return;  // the loss alone is wanted
  if (weights) scale *= weights[blockIdx.x];
  const float factor = target < 0 ? 0.f : scale / all.sum;
  for (int64_t first = 0; first < vocab_size; first += 4 * kEntropyThreads) {
    const int64_t i = first + 4 * threadIdx.x;
    float v[4] = {};
    if (i < vocab_size) load_logits(v, row, i, vocab_size);
    for (int k = 0; k < 4; ++k)
      v[k] = target < 0 ? 0.f
                        : factor * exp2_approx(kLog2e * (v[k] - all.max)) -
                              (i + k == target ? scale : 0.f);
    __syncthreads();  // logits have been read, also the target's, before they are overwritten
    if (i < vocab_size) store(dlogits + i, pack<T>(v));
  }
}

// logits (rows, vocab_size), rows `stride` floats apart, see logits_stride, from a multiple of 16
// bytes. weights (rows), if given, are of each row's loss; likeliest (rows), if given: is the
// target the likeliest?
template <class T>
void cross_entropy(float* logits, int64_t stride, int64_t rows, int64_t vocab_size,
                   const Token* targets, float scale, float* nll, cudaStream_t stream,
                   const float* weights = nullptr, bool* likeliest = nullptr) {
  if (rows == 0) return;
  const auto kernel = cross_entropy_kernel<T>;
  kernel<<<unsigned(rows), kEntropyThreads, 0, stream>>>(logits, stride, vocab_size, targets, scale,
                                                         weights, nll, likeliest);
  CUDA_CHECK(cudaGetLastError());
}

// ============================================================================================
// The engine
// ============================================================================================

/// Makes GPU `device` the current one; fails in one line where there is none that can run this
/// program.
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

/// FLOP/s of all matrix units at the highest clock, without sparsity; 0 if not known. Products of
/// float32 are exact here, so no matrix unit is in them.
inline double matrix_peak(DType dtype, int device) {
  const auto get = [device](cudaDeviceAttr attribute) {
    int v = 0;
    CUDA_CHECK(cudaDeviceGetAttribute(&v, attribute, device));
    return v;
  };
  const int capability =
      10 * get(cudaDevAttrComputeCapabilityMajor) + get(cudaDevAttrComputeCapabilityMinor);
  // of a multiprocessor and a cycle, in 16 bits and in float32
  const std::map<int, std::pair<int, int>> known = {
      {80, {2048, 128}}, {90, {4096, 256}}, {100, {8192, 256}}};
  const auto found = known.find(capability);
  if (found == known.end()) return 0;
  return 1e3 * get(cudaDevAttrClockRate) * get(cudaDevAttrMultiProcessorCount) *
         (dtype == DType::F32 ? found->second.second : found->second.first);
}

class CudaLearner;  // below, with all that is for gradients

/// Texts side by side, text i at ids [begin[i], begin[i + 1]). After ids[rows[j]] comes targets[j].
struct ScoredTexts {
  std::vector<Token> ids, rows, targets;
  std::vector<int64_t> begin = {0};
  int64_t longest = 0;

  void add(const std::vector<Token>& context, const std::vector<Token>& continuation) {
    for (size_t t = 0; t < continuation.size(); ++t)
      rows.push_back(Token(begin.back() + int64_t(context.size() - 1 + t)));
    targets.insert(targets.end(), continuation.begin(), continuation.end());
    ids.insert(ids.end(), context.begin(), context.end());
    ids.insert(ids.end(), continuation.begin(), continuation.end());
    ids.pop_back();  // nothing is asked of what comes after the last
    longest = std::max(longest, int64_t(ids.size()) - begin.back());
    begin.push_back(int64_t(ids.size()));
  }
};

class CudaEngine {
 public:
  static constexpr const char* kName = "mamba_cuda";
  static constexpr const char* kDescription = "the same as fused kernels, on the GPU";
  static constexpr bool kHasDevice = true;
  static constexpr Index kPiece = 16384;                    // tokens that forward takes at once
  static constexpr size_t kBatch = size_t(kMostSequences);  // texts that are generated together

  using State = DeviceState;
  using Learner = CudaLearner;
  static double peak(const EngineOptions& o) {
    return matrix_peak(o.dtype.value_or(DType::F32), o.device);
  }

  CudaEngine(const Checkpoint& checkpoint, const Config& config, const EngineOptions& options)
      : CudaEngine(config, options, storage(checkpoint, config, options)) {
    need_memory(weight_bytes(config, dtype_), "weights");
    model_ = load_model<DeviceModel>(checkpoint, config, dtype_);
  }
  /// A model that is on the GPU already, its matrices stored as *options.dtype.
  CudaEngine(DeviceModel model, const Config& config, const EngineOptions& options)
      : CudaEngine(config, options, *options.dtype) {
    model_ = std::move(model);
  }

  const Config& config() const { return config_; }
  State new_state() const { return State(config_, dtype_, 1); }
  State from_host(const ssm::State<float>& host) const;
  ssm::State<float> to_host(const State& state) const;

  /// A single token takes the step functions.
  Matrix<float> prefill(State& state, const Token* ids, Index L);
  void forward(State& state, const Token* ids, Index L, const LogitsSink& sink);
  void generate(std::vector<Sequence<State>>& sequences, const GenerateOptions& options,
                const OnToken& on_token);
  /// Of the first of these requests, as many as are worth taking together.
  std::vector<Likelihood> likelihoods(const Request* requests, size_t count);
  /// The mean nll of ids 2 to n, and its gradient for every weight, A_log's in the place of A.
  double gradients(const std::vector<Token>& ids, ssm::Model<float>& gradients);

 private:
  friend struct ModelBench;  // tests/bench.cu

  CudaEngine(const Config& config, const EngineOptions& options, DType dtype)
      : config_(config), dtype_(dtype), delta_ratio_(options.delta_ratio) {
    if (config.attention.head_dim > kMostHeadDim)
      fail("attention: head_dim: expected at most ", kMostHeadDim, " on the GPU, found ",
           config.attention.head_dim);
    use_device(options.device);
    queue_ = std::make_unique<Queue>();
  }
  static DType storage(const Checkpoint& checkpoint, const Config& config,
                       const EngineOptions& options) {
    const DType file =
        find_weight(checkpoint, "backbone.embeddings.weight", config.tie_embeddings).dtype;
    const bool stored = file == DType::BF16 || file == DType::F16;
    return options.dtype.value_or(stored ? file : DType::F32);
  }

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
  /// After this, row `row` of logits_ holds the logits after the last of L > 0 tokens.
  template <class T>
  void prefill_as(State& state, const Token* ids, Index L, Index row);
  template <class T>
  void score_as(const ScoredTexts& texts, std::vector<float>& nll, bool* likeliest);
  template <class T>
  void take_prompts(std::vector<Sequence<State>>& sequences, Index left_out);
  template <class T>
  void generate_as(std::vector<Sequence<State>>& sequences, const GenerateOptions& options,
                   const OnToken& on_token);

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

// The numbers as stored, to a buffer that has their size.
inline void upload_as(DType dtype, const std::vector<float>& from, DeviceBuffer<std::byte>& to) {
  const auto n = static_cast<int64_t>(from.size());
  const Tensor plain = tensor_view("state", {n}, from.data());
  const Tensor stored = dtype == DType::F32 ? plain : to_dtype(plain, dtype);
  if (n > 0) to.copy_from(static_cast<const std::byte*>(stored.data));
}

inline DeviceState device_state(const Config& config, DType dtype, const ssm::State<float>& host) {
  DeviceState state(config, dtype, 1);
  std::vector<float> conv, attention_conv, keys, values, h;
  const auto append = [](std::vector<float>& to, const Matrix<float>& rows) {
    to.insert(to.end(), rows.data(), rows.data() + rows.size());
  };
  for (Index l = 0; l < config.n_layer; ++l) {
    const auto& layer = host.layers[l];
    append(config.attends(l) ? attention_conv : conv, layer.conv);
    append(h, layer.h), append(keys, layer.past.keys), append(values, layer.past.values);
    if (config.attends(l)) state.capacity = state.longest = layer.past.keys.rows();
  }
  upload_as(dtype, conv, state.conv), upload_as(dtype, attention_conv, state.attention_conv);
  state.keys = DeviceBuffer<std::byte>(keys.size() * dtype_size(dtype));
  state.values = DeviceBuffer<std::byte>(values.size() * dtype_size(dtype));
  upload_as(dtype, keys, state.keys), upload_as(dtype, values, state.values);
  if (state.past.size() > 0) state.past.copy_from(&state.longest);
  state.h.copy_from(h.data());
  return state;
}

inline ssm::State<float> host_state(const Config& config, DType dtype, const DeviceState& state) {
  std::vector<std::byte> conv(state.conv.size()), attention_conv(state.attention_conv.size());
  std::vector<std::byte> keys(state.keys.size()), values(state.values.size());
  std::vector<float> h(state.h.size());
  for (const auto& [from, to] : {std::pair{&state.conv, &conv},
                                 {&state.attention_conv, &attention_conv},
                                 {&state.keys, &keys},
                                 {&state.values, &values}})
    from->copy_to(to->data());
  state.h.copy_to(h.data());
  ssm::State<float> host(config);
  const auto take = [&](const std::vector<std::byte>& from, int64_t first, Matrix<float>& to) {
    const std::byte* data = from.data() + size_t(first) * dtype_size(dtype);
    convert(Tensor{"state", dtype, {to.size()}, data, nullptr}, to.data());
  };
  for (Index l = 0; l < config.n_layer; ++l) {
    auto& layer = host.layers[l];
    const Index i = rank_of(config, l), row = config.attention.kv_width();
    take(config.attends(l) ? attention_conv : conv, i * layer.conv.size(), layer.conv);
    if (!config.attends(l)) {
      layer.h = Eigen::Map<const Matrix<float>>(h.data() + i * layer.h.size(), layer.h.rows(),
                                                layer.h.cols());
      continue;
    }
    layer.past.keys.resize(state.longest, row), layer.past.values.resize(state.longest, row);
    take(keys, i * state.capacity * row, layer.past.keys);
    take(values, i * state.capacity * row, layer.past.values);
  }
  return host;
}

inline DeviceState CudaEngine::from_host(const ssm::State<float>& host) const {
  return device_state(config_, dtype_, host);
}
inline ssm::State<float> CudaEngine::to_host(const State& state) const {
  queue_->wait();
  return host_state(config_, dtype_, state);
}

// --- whole texts ---

template <class T>
void CudaEngine::prefill_as(State& state, const Token* ids, Index L, Index row) {
  float* logits = logits_.data() + row * config_.vocab_size;
  if (L == 1) {
    const Activations<T> a(config_, 1, activation_room_);
    state.reserve(config_, sizeof(T), 1, queue_->stream());
    compute<T>().embed(a, upload(ids, 1), 1);
    ++state.longest;
    return compute<T>().step(a, state, nullptr, logits);
  }
  for (Index t = 0; t < L; t += kPiece) {
    const Index count = std::min(kPiece, L - t);
    const auto a = compute<T>().backbone(upload(ids + t, count), count, state);
    if (t + count == L) compute<T>().lm_head(a, count - 1, 1, logits);
  }
}

inline Matrix<float> CudaEngine::prefill(State& state, const Token* ids, Index L) {
  logits_.grow(static_cast<size_t>(config_.vocab_size));
  with_weight_type(dtype_, [&](auto* type) {
    prefill_as<std::remove_pointer_t<decltype(type)>>(state, ids, L, 0);
  });
  return download_logits(std::min<Index>(L, 1));
}

inline void CudaEngine::forward(State& state, const Token* ids, Index L, const LogitsSink& sink) {
  const Index kRows = 256;  // logits are wide: some rows at a time
  logits_.grow(static_cast<size_t>(std::min(L, kRows) * config_.vocab_size));
  with_weight_type(dtype_, [&](auto* type) {
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

// --- score: requests side by side, each from the beginning of a text ---

template <class T>
void CudaEngine::score_as(const ScoredTexts& texts, std::vector<float>& nll, bool* likeliest) {
  const auto count = int64_t(texts.rows.size()), total = texts.begin.back();
  const int64_t piece = std::min<int64_t>(count, 1024);  // logits are wide: some rows at a time
  const int64_t stride = logits_stride(config_.vocab_size);
  const auto up = [](const auto& v) {
    return DeviceBuffer<std::decay_t<decltype(v[0])>>(v.data(), v.size());
  };
  const auto begin = up(texts.begin);
  const auto rows = up(texts.rows), targets = up(texts.targets);
  const DeviceBuffer<float> nll_out(nll.size()), chosen(size_t(piece * config_.d_model));
  const DeviceBuffer<bool> likeliest_out(nll.size());
  logits_.grow(size_t(piece * stride));
  const Compute<T> model = compute<T>();
  Activations<T> a(config_, total, activation_room_);
  model.embed(a, upload(texts.ids.data(), total), total);
  model.all_layers(
      a, {int64_t(texts.begin.size()) - 1, texts.longest, false, nullptr, begin.data(), total},
      nullptr, false);
  const float* const residual = a.residual;
  a.residual = chosen.data();
  for (int64_t first = 0; first < count; first += piece) {
    const int64_t n = std::min(piece, count - first);
    embedding_kernel<<<unsigned(n), 256, 0, queue_->stream()>>>(residual, rows.data() + first,
                                                                config_.d_model, chosen.data());
    CUDA_CHECK(cudaGetLastError());
    model.norm(a, model_.norm_f, model_.norm_f_bias, n);
    queue_->linear(a.u, n, config_.d_model, model.head(), config_.vocab_size, config_.d_model,
                   logits_.data(), stride);
    cross_entropy<T>(logits_.data(), stride, n, config_.vocab_size, targets.data() + first, 0,
                     nll_out.data() + first, queue_->stream(), nullptr,
                     likeliest_out.data() + first);
  }
  queue_->wait();
  nll_out.copy_to(nll.data()), likeliest_out.copy_to(likeliest);
}

inline std::vector<Likelihood> CudaEngine::likelihoods(const Request* requests, size_t count) {
  ScoredTexts texts;
  size_t taken = 0;
  for (; taken < count; ++taken) {
    const Request& r = requests[taken];
    if (taken == kBatch || texts.ids.size() + r.context.size() + r.continuation.size() > kPiece)
      break;
    texts.add(r.context, r.continuation);
  }
  if (taken == 0) return {likelihood(*this, requests[0])};  // alone, piece by piece
  std::vector<float> nll(texts.rows.size());
  const auto likeliest = std::make_unique<bool[]>(nll.size());
  with_weight_type(dtype_, [&](auto* type) {
    if (!nll.empty()) score_as<std::remove_pointer_t<decltype(type)>>(texts, nll, likeliest.get());
  });
  std::vector<Likelihood> found(taken);
  for (size_t i = 0, row = 0; i < taken; ++i)
    for (size_t t = 0; t < requests[i].continuation.size(); ++t, ++row) {
      if (!std::isfinite(nll[row])) fail("logits: expected numbers, found NaN or infinity");
      found[i].logprob -= nll[row], found[i].greedy = found[i].greedy && likeliest[row];
    }
  return found;
}

// --- generation ---
//
// Each sequence takes its prompt alone, in the parallel form; then all draw and step together. One
// step, from the embedding of the last tokens to the next ones, is a CUDA graph. The host launches
// it a few tokens ahead and only reads along: a sequence that has drawn an end token stands still
// on the GPU.

/// What is copied between the layers of one sequence's state and those of a batch; of keys and
/// values, numbers of so many bytes, those of `taken` tokens, for which there is room.
inline void copy_state(const Config& c, const DeviceState& from, Index from_row,
                       const DeviceState& to, Index to_row, cudaStream_t stream, size_t number = 0,
                       Index taken = 0) {
  const auto copy = [&](const auto& to_buffer, const auto& from_buffer, Index layers, size_t bytes,
                        size_t to_pitch, size_t from_pitch) {
    if (bytes == 0 || layers == 0) return;
    auto* to_data = reinterpret_cast<std::byte*>(to_buffer.data()) + to_row * to_pitch;
    auto* from_data =
        reinterpret_cast<const std::byte*>(from_buffer.data()) + from_row * from_pitch;
    CUDA_CHECK(cudaMemcpy2DAsync(to_data, to.batch * to_pitch, from_data, from.batch * from_pitch,
                                 bytes, layers, cudaMemcpyDeviceToDevice, stream));
  };
  const Index scans = DeviceState::scans(c), attentions = DeviceState::attentions(c);
  const auto whole = [&](const auto& to_buffer, const auto& from_buffer, Index layers) {
    const size_t bytes = layers > 0 ? from_buffer.bytes() / (layers * from.batch) : 0;
    copy(to_buffer, from_buffer, layers, bytes, bytes, bytes);
  };
  whole(to.conv, from.conv, scans), whole(to.h, from.h, scans);
  whole(to.attention_conv, from.attention_conv, attentions);
  const size_t row = number * size_t(c.attention.kv_width());
  for (const auto cache : {&DeviceState::keys, &DeviceState::values})
    copy(to.*cache, from.*cache, attentions, size_t(taken) * row, size_t(to.capacity) * row,
         size_t(from.capacity) * row);
  if (attentions > 0)
    copy(to.past, from.past, 1, sizeof(int64_t), sizeof(int64_t), sizeof(int64_t));
}

/// Reads along: appends drawn tokens to their sequences, and hands them on sequence by sequence:
/// those of a later one wait until the earlier ones are finished.
class TokenReader {
 public:
  TokenReader(std::vector<Sequence<DeviceState>>& sequences, const GenerateOptions& options,
              const OnToken& on_token)
      : sequences_(sequences), options_(options), on_token_(on_token) {
    finished_.resize(sequences.size());
    for (const auto& s : sequences) handed_on_.push_back(s.ids.size());
  }
  bool all_finished() const { return current_ == sequences_.size(); }

  /// The i-th token of every sequence.
  void read(const Sampler& sampler, Index i) {
    for (size_t b = 0; b < sequences_.size(); ++b) {
      if (finished_[b]) continue;
      const Token token = sampler.drawn(i, b);
      if (token < 0) fail("sampler: logits: expected numbers, found NaN or infinity");
      sequences_[b].ids.push_back(token);
      finished_[b] = i + 1 == options_.n || contains(options_.end_tokens, token);
    }
    for (; !all_finished(); ++current_) {
      const auto& ids = sequences_[current_].ids;
      size_t& next = handed_on_[current_];
      while (next < ids.size()) on_token_(current_, ids[next++]);
      if (!finished_[current_]) return;
    }
  }

 private:
  std::vector<Sequence<DeviceState>>& sequences_;
  const GenerateOptions& options_;
  const OnToken& on_token_;
  std::vector<char> finished_;
  std::vector<size_t> handed_on_;  // ids of each sequence that were handed on, or are its prompt
  size_t current_ = 0;             // the first unfinished sequence
};

/// All ids but the last `left_out`; row i of logits_ then holds the logits after sequence i.
template <class T>
void CudaEngine::take_prompts(std::vector<Sequence<State>>& sequences, Index left_out) {
  logits_.grow(sequences.size() * config_.vocab_size);
  for (size_t i = 0; i < sequences.size(); ++i) {
    auto& s = sequences[i];
    const size_t end = s.ids.size() - left_out, begin = std::exchange(s.taken, end);
    prefill_as<T>(s.state, s.ids.data() + begin, static_cast<Index>(end - begin),
                  static_cast<Index>(i));
    queue_->wait();  // before the pieces' ids are replaced
  }
}

template <class T>
void CudaEngine::generate_as(std::vector<Sequence<State>>& sequences,
                             const GenerateOptions& options, const OnToken& on_token) {
  take_prompts<T>(sequences, options.n == 0);
  if (options.n == 0) return;
  const cudaStream_t stream = queue_->stream();
  const auto batch = static_cast<Index>(sequences.size());
  State state(config_, dtype_, batch);
  Index longest = 0;
  for (const auto& s : sequences) longest = std::max(longest, Index(s.taken));
  state.reserve(config_, sizeof(T), longest + std::min<Index>(options.n, 256), stream);
  state.longest = longest;
  std::vector<Sampler::Text> texts;
  for (Index i = 0; i < batch; ++i) {
    copy_state(config_, sequences[i].state, 0, state, i, stream, sizeof(T),
               Index(sequences[i].taken));
    texts.push_back({sequences[i].index, sequences[i].ids});
  }
  Sampler sampler(options, texts, config_.vocab_size, logits_.data());
  const Activations<T> a(config_, batch, activation_room_);
  CUDA_CHECK(cudaDeviceSynchronize());  // the buffers above were filled outside of the stream
  const auto draw = [&] {
    sampler.draw({model_.embedding.bytes.data(), dtype_}, config_.d_model, a.residual, stream);
  };
  std::optional<Graph> step;
  const auto capture = [&] {
    step.emplace(stream, [&] {
      compute<T>().step(a, state, sampler.done(), logits_.data());
      draw();
    });
  };
  capture();

  constexpr Index kAhead = 8;  // tokens that the GPU may be ahead of the host
  std::vector<Event> drawn(kAhead);
  TokenReader reader(sequences, options, on_token);
  Index launched = 0;
  for (Index i = 0; i < options.n && !reader.all_finished(); ++i) {
    for (; launched < std::min(options.n, i + kAhead); ++launched) {
      if (launched > 0 && !state.has_room(config_, 1)) {  // the caches move: another graph
        state.reserve(config_, sizeof(T), 1, stream);
        capture();
      }
      launched == 0 ? draw() : step->launch(stream);
      state.longest += launched > 0;
      drawn[launched % kAhead].record(stream);
    }
    drawn[i % kAhead].wait();
    reader.read(sampler, i);
  }
  queue_->wait();
  for (Index i = 0; i < batch; ++i) {
    Sequence<State>& s = sequences[i];
    s.taken = s.ids.size() - 1;
    s.state.longest = std::min<Index>(s.state.longest, Index(s.taken));
    s.state.reserve(config_, sizeof(T), Index(s.taken) - s.state.longest, stream);
    s.state.longest = Index(s.taken);
    copy_state(config_, state, i, s.state, 0, stream, sizeof(T), Index(s.taken));
  }
  queue_->wait();
}

inline void CudaEngine::generate(std::vector<Sequence<State>>& sequences,
                                 const GenerateOptions& options, const OnToken& on_token) {
  check(options.sampler);
  if (sequences.empty()) return;
  with_weight_type(dtype_, [&](auto* type) {
    generate_as<std::remove_pointer_t<decltype(type)>>(sequences, options, on_token);
  });
}

// ============================================================================================
// Inference ends here: what follows is for gradients
// ============================================================================================
//
// A gradient is named after its input, with a d before it, and is of one scalar loss. Gradients of
// states go in and out like the states do: in comes that of the state after the piece, out goes
// that of the state before it, so that pieces are walked from the last to the first. Gradients of
// weights are float and are added to what is there. Sums over rows, channels and sequences have a
// fixed order: the same bits on every run.

// --- selective scan -----------------------------------------------------------------------------
//
//   dy_t     = dout_t silu(z_t)
//   g_t      = C_t dy_t + u_t,   u_{t-1} = a_t g_t,   a_t = exp(delta_t A)     u_{L-1} = dhT
//   dx_t     = delta_t (g_t . B_t) + D dy_t
//   ddelta_t = (x_t (g_t . B_t) + A . (g_t a_t h_{t-1})) slope_t  slope: softplus', ratio
//   dB_t     = sum_d delta_t x_t g_t           dC_t = sum_d dy_t h_t
//   dz_t     = dout_t y_t silu'(z_t)           dh0  = u_{-1}
//   dA       = sum_t delta_t g_t a_t h_{t-1}   dD   = sum_t dy_t x_t
//
// g_t is the gradient of h_t. The forward pass keeps nothing: the states are computed once more.

template <class T>
struct ScanBackwardArgs {
  ScanArgs<T> in;                                        // out and hT are not used
  const T* dout = nullptr;                               // (batch L, d_inner)
  const float* dhT = nullptr;                            // (batch, d_inner, d_state) or null
  T *dx = nullptr, *ddelta = nullptr;                    // (batch L, d_inner)
  T *dB = nullptr, *dC = nullptr;                        // (batch L, n_groups d_state)
  T* dz = nullptr;                                       // as z
  float *dA = nullptr, *dD = nullptr, *dbias = nullptr;  // as A, D, delta_bias; added to
  float* dh0 = nullptr;  // (batch, d_inner, d_state) or null; may be dhT
  int64_t dout_stride = 0, dx_stride = 0, ddelta_stride = 0, dB_stride = 0, dC_stride = 0;
  int64_t dz_stride = 0;
  int64_t n_rows = 0;  // with cu_seqlens: of all sequences; 0: at most batch L
};

// 1 / (1 + e^-x): nothing overflows.
__device__ inline float sigmoid(float x) {
  const float e = exp2_approx(-kLog2e * fabsf(x)), r = reciprocal_approx(1.f + e);
  return x < 0.f ? e * r : r;
}

// What the backward needs of n pairs (t, d) alone.
template <int n>
struct ScanPoints {
  float x[n], delta[n], dy[n];
  float slope[n];  // of delta: by delta_raw
  float dgate[n];  // dout silu'(z)
};
template <int n, class T>
__device__ inline ScanPoints<n> scan_points(const ScanArgs<T>& a, const float (&x)[n],
                                            const float (&delta_raw)[n], const float (&z)[n],
                                            const float (&dout)[n]) {
  ScanPoints<n> p;
#pragma unroll
  for (int i = 0; i < n; ++i)
    p.x[i] = x[i], p.delta[i] = delta_raw[i], p.dy[i] = dout[i], p.slope[i] = 1.f, p.dgate[i] = 0.f;
  if (a.delta_softplus) {
#pragma unroll
    for (int i = 0; i < n; ++i)
      p.delta[i] = softplus(delta_raw[i]), p.slope[i] = sigmoid(delta_raw[i]);
  }
#pragma unroll
  for (int i = 0; i < n; ++i) p.delta[i] *= a.delta_ratio, p.slope[i] *= a.delta_ratio;
  if (a.z) {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const float s = sigmoid(z[i]);
      p.dy[i] = dout[i] * z[i] * s, p.dgate[i] = dout[i] * s * fmaf(z[i], 1.f - s, 1.f);
    }
  }
  return p;
}

// What is left to be done there when the sums over states are known: y = C . h, gB = g . B,
// gh = A . (g a h_{t-1}).
template <int n>
struct ScanPointGradients {
  float dx[n], ddelta[n], dz[n], dD[n];
};
template <int n>
__device__ inline ScanPointGradients<n> finish_points(const ScanPoints<n>& p, const float (&D)[n],
                                                      const float (&y)[n], const float (&gB)[n],
                                                      const float (&gh)[n]) {
  ScanPointGradients<n> g;
#pragma unroll
  for (int i = 0; i < n; ++i) {
    g.dx[i] = fmaf(p.delta[i], gB[i], D[i] * p.dy[i]);
    g.ddelta[i] = fmaf(p.x[i], gB[i], gh[i]) * p.slope[i];
    g.dz[i] = p.dgate[i] * fmaf(D[i], p.x[i], y[i]);
    g.dD[i] = p.dy[i] * p.x[i];
  }
  return g;
}

// Sums that several blocks contribute to, each to its own place, until all are there and are added
// up in order. `states` is d_state, or more if places are padded.
struct ScanParts {
  int64_t blocks = 0, rows = 0, walks = 0, states = 0;
  float* BC = nullptr;      // (blocks of channels, rows, {dB, dC}, states)
  float* A = nullptr;       // (walks, d_inner, states); a walk: a sequence, or a piece of one
  float* D_bias = nullptr;  // (walks, {dD, dbias}, d_inner)

  int64_t size(int64_t d_inner) const {
    return 2 * blocks * rows * states + walks * d_inner * (states + 2);
  }
  void place(float* at, int64_t d_inner) {
    BC = at, A = BC + 2 * blocks * rows * states, D_bias = A + walks * d_inner * states;
  }
};

template <class T>
int64_t rows_in_all(const ScanBackwardArgs<T>& a) {
  return a.in.cu_seqlens && a.n_rows ? a.n_rows : a.in.batch * a.in.L;
}

// Entry i of dB and dC, from the parts of all blocks of channels of a group.
template <class T>
__device__ inline void add_BC_parts(const ScanBackwardArgs<T>& a, const ScanParts& parts,
                                    int64_t i) {
  const int64_t width = 2 * parts.states, groups = a.in.n_groups, N = a.in.d_state;
  const int64_t n = i % parts.states, t = i / width / groups, group = i / width % groups;
  if (t >= (a.in.cu_seqlens ? a.in.cu_seqlens[a.in.batch] : parts.rows) || n >= N) return;
  const int64_t of_group = parts.blocks / groups;
  const float* part = parts.BC + (group * of_group * parts.rows + t) * width + i % width;
  float sum = 0.f;
#pragma unroll 8
  for (int64_t k = 0; k < of_group; ++k) sum += part[k * parts.rows * width];
  const bool of_C = i % width >= parts.states;
  T* const row = of_C ? a.dC + t * a.dC_stride : a.dB + t * a.dB_stride;
  row[group * N + n] = from_float<T>(sum);
}

// Adds the parts of all walks to entry i of dA, dD and dbias.
template <class T>
__device__ inline void add_weight_parts(const ScanBackwardArgs<T>& a, const ScanParts& parts,
                                        int64_t i) {
  const int64_t d_inner = a.in.d_inner, of_A = d_inner * parts.states;
  if (i >= of_A + 2 * d_inner) return;
  const float* part = i < of_A ? parts.A + i : parts.D_bias + (i - of_A);
  const int64_t step = i < of_A ? of_A : 2 * d_inner, n = i % parts.states;
  float* to = i < of_A             ? a.dA + i / parts.states * a.in.d_state + n
              : i < of_A + d_inner ? a.dD + (i - of_A)
                                   : a.dbias + (i - of_A - d_inner);
  if (i < of_A ? n >= a.in.d_state : !(i < of_A + d_inner ? a.dD : a.dbias)) return;
  float sum = 0.f;
#pragma unroll 8
  for (int64_t k = 0; k < parts.walks; ++k) sum += part[k * step];
  *to += sum;
}

// One thread an entry.
template <class T>
__global__ void selective_scan_backward_sum_kernel(ScanBackwardArgs<T> a, ScanParts parts) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t of_BC = 2 * parts.rows * a.in.n_groups * parts.states;
  i < of_BC ? add_BC_parts(a, parts, i) : add_weight_parts(a, parts, i - of_BC);
}

// Per row and channel, for one state after the other: h of every row, and the sums over states.
struct ScanHistory {
  float *h, *y, *gB, *gh;  // (rows, d_inner)
};

// One thread owns one channel. State by state it walks forward, leaving h of every row in memory,
// and back; at last it walks over all rows to make what is left of the sums over states. A block is
// a warp: it adds up what its channels, of one group, give to dB and dC.
template <class T>
__global__ void __launch_bounds__(32)
    selective_scan_backward_naive_kernel(ScanBackwardArgs<T> a, ScanHistory of, ScanParts parts) {
  const ScanArgs<T>& in = a.in;
  const int64_t N = in.d_state, channels = in.d_inner / in.n_groups, blocks = parts.blocks;
  const int64_t b = blockIdx.x / blocks, block = blockIdx.x % blocks;
  const int64_t group = block / (blocks / in.n_groups);
  const int64_t c = block % (blocks / in.n_groups) * 32 + threadIdx.x;
  const bool exists = c < channels;  // others lend a hand in sums
  const int64_t d = group * channels + (exists ? c : 0), i = b * in.d_inner + d;
  const Rows rows = rows_of(b, in.L, in.cu_seqlens);
  const int64_t end = rows.first + rows.count;
  const float bias = in.delta_bias ? in.delta_bias[d] : 0.f;
  const auto points = [&](int64_t t) {  // one
    return scan_points<1>(in, {to_float(in.x[t * in.x_stride + d])},
                          {to_float(in.delta[t * in.delta_stride + d]) + bias},
                          {in.z ? to_float(in.z[t * in.z_stride + d]) : 0.f},
                          {exists ? to_float(a.dout[t * a.dout_stride + d]) : 0.f});
  };
  for (int64_t n = 0; n < N; ++n) {
    const T *B = in.B + group * N + n, *C = in.C + group * N + n;
    const float A = in.A[d * N + n], h0 = in.h0 ? in.h0[i * N + n] : 0.f;
    float h = h0, dA = 0.f, u = a.dhT && exists ? a.dhT[i * N + n] : 0.f;
    for (int64_t t = rows.first; t < end && exists; ++t) {
      const ScanPoints<1> p = points(t);
      const float delta = *p.delta;
      const int64_t at = t * in.d_inner + d;
      h = expf(delta * A) * h + delta * *p.x * to_float(B[t * in.B_stride]);
      of.h[at] = h;
      of.y[at] = (n > 0 ? of.y[at] : 0.f) + to_float(C[t * in.C_stride]) * h;
    }
    for (int64_t t = end - 1; t >= rows.first; --t) {
      const ScanPoints<1> p = points(t);
      const float delta = *p.delta, dy = *p.dy;
      const int64_t at = t * in.d_inner + d;
      const float B_t = to_float(B[t * in.B_stride]), C_t = to_float(C[t * in.C_stride]);
      const float before = t > rows.first && exists ? of.h[at - in.d_inner] : h0;
      const float a_t = expf(delta * A), g = C_t * dy + u, gah = g * a_t * before;
      const float dB = warp_sum(g * delta * *p.x), dC = warp_sum(exists ? dy * of.h[at] : 0.f);
      if (threadIdx.x == 0) {
        float* const part = parts.BC + (block * parts.rows + t) * 2 * N + n;
        part[0] = dB, part[N] = dC;
      }
      u = a_t * g, dA += delta * gah;
      if (!exists) continue;
      of.gB[at] = (n > 0 ? of.gB[at] : 0.f) + g * B_t;
      of.gh[at] = (n > 0 ? of.gh[at] : 0.f) + A * gah;
    }
    if (exists) parts.A[i * N + n] = dA;
    if (exists && a.dh0) a.dh0[i * N + n] = u;
  }
  if (!exists) return;
  float dD = 0.f, dbias = 0.f;
  for (int64_t t = rows.first; t < end; ++t) {
    const int64_t at = t * in.d_inner + d;
    const auto g =
        finish_points<1>(points(t), {in.D ? in.D[d] : 0.f}, {of.y[at]}, {of.gB[at]}, {of.gh[at]});
    a.dx[t * a.dx_stride + d] = from_float<T>(*g.dx);
    a.ddelta[t * a.ddelta_stride + d] = from_float<T>(*g.ddelta);
    if (in.z) a.dz[t * a.dz_stride + d] = from_float<T>(*g.dz);
    dD += *g.dD, dbias += *g.ddelta;
  }
  parts.D_bias[2 * b * in.d_inner + d] = dD;
  parts.D_bias[(2 * b + 1) * in.d_inner + d] = dbias;
}

// Since the rung before: time is cut into pieces that all run at once, sums over states and
// channels are taken in registers, and what is done once per (t, d) is not repeated for each state.
// For d_state <= 16, in three steps:
//
//   summary  walks every piece forward from a zero state, a short way (kRows rows) after the other,
//            and leaves the state at the start of each way, h_way; the state at the end, `first`;
//            and `later`, the gradient of the state before the piece where that after it is zero:
//            u = sum_t P_t C_t dy_t, P_t = a_0 .. a_t.
//   link     walks over the pieces, forward with the state, and back with its gradient. Over a
//            whole piece the decay is exp(A sum_t delta_t). Then `first` is the state before the
//            piece and `later` the gradient of the state after it.
//   fused    walks a piece's ways from the last to the first, each forward from
//            h_way + exp(A sum_t delta_t) first, keeping p_t = a_t h_{t-1} in shared memory, and
//            back.
//
// A warp owns 32 channels of one group, a lane kChannels of them times kStates states: lane l
// channels 4 (l / 4) .. and states 4 (l % 4) .. Sums over states or channels begin inside of a
// lane, go on between lanes, by exchanges that halve the number of sums, and end with channel l's
// in lane l, which also prepares and finishes what is done once per (t, d). A block's warps then
// add up dB and dC in shared memory. Per (t, d, n): 3 exps, 7 instructions in `summary`, 4 forward
// and 12 back.
struct BackTile {
  static constexpr int kRows = 8, kWarps = 4, kChannels = 4, kStates = 4, kN = 16;
  static constexpr int kThreads = 32 * kWarps;  // and channels of a block
};

// Every sequence in `count` pieces of `length` rows, a multiple of kRows; the last may be shorter.
struct ScanPieces {
  int64_t count = 1, length = 0;
  float *first = nullptr, *later = nullptr;  // (batch, count, d_inner, kN)
  float* h_way = nullptr;                    // (ways, d_inner, kN)
  float* total = nullptr;                    // (batch, count, d_inner): sum of delta_t
  float* before = nullptr;                   // (ways, d_inner): the same from the piece to the way

  // Ways of all pieces: row t of sequence b begins one at (first row of b + t) / kRows + b.
  static int64_t ways(int64_t rows, int64_t batch) { return rows / BackTile::kRows + batch + 1; }
};

// A way of a warp, as floats: what its lanes read of each other.
struct BackRows {
  static constexpr int kRows = BackTile::kRows, kN = BackTile::kN;
  alignas(16) float delta[kRows][32], delta_x[kRows][32], dy[kRows][32];
  alignas(16) float B[kRows][kN], C[kRows][kN];
};
struct BackMemory {  // of a block of the fused kernel
  static constexpr int kRows = BackTile::kRows;
  struct Warp {
    BackRows rows;
    alignas(16) float x[kRows][32], slope[kRows][32], dgate[kRows][32];
    // Of a lane's channels, each its p_t of the lane's states; when row t is walked back, {y, g .
    // B, A . (g p)}, each of the lane's channels, so far as the lane's states go.
    Vector<float, 4> p[kRows][BackTile::kChannels][32];
  } warp[BackTile::kWarps];
  alignas(16) float BC[2][BackTile::kWarps][kRows][32];  // of ways with even and odd numbers
};

// Where a warp works. A lane has three places in it: it walks time with 4 channels and 4 states,
// prepares and finishes 4 channels of two rows of a way, and fetches 4 states of one row of B and
// C.
template <class T>
struct BackWarp {
  static constexpr int kRows = BackTile::kRows, kN = BackTile::kN;
  static_assert(kRows == 8,
                "32 lanes: 4 rows of 8 times 4 channels, twice; 8 rows of 4 times 4 states");
  const ScanBackwardArgs<T>& a;
  const int lane = threadIdx.x % 32;
  // The first of 4 channels, from bits 0, 2 and 4 of the lane's number; and of 4 states, from bits
  // 1 and 3. Lanes side by side have the same states, every other two the same channels: shared
  // memory serves them together.
  const int walked = 4 * lane_bits<21>(lane), state = 4 * lane_bits<10>(lane);
  const int row = lane / 8, served = lane % 8 * 4;  // rows `row` and row + 4; 4 channels
  Rows rows;
  int64_t sequence, piece, block, group;  // piece: of all; block: of channels, of all groups
  int64_t channel;                        // the warp's first
  int n_channels;                         // of the warp, that exist

  __device__ BackWarp(const ScanBackwardArgs<T>& a, const ScanPieces& pieces) : a(a) {
    const ScanArgs<T>& in = a.in;
    const int channels = in.d_inner / in.n_groups, blocks = ceil_div(channels, BackTile::kThreads);
    block = blockIdx.x % (blocks * in.n_groups), piece = blockIdx.x / (blocks * in.n_groups);
    sequence = piece / pieces.count, group = block / blocks;
    rows = rows_of(sequence, in.L, in.cu_seqlens);
    const int64_t skip = min(rows.count, piece % pieces.count * pieces.length);
    rows = {rows.first + skip, min(pieces.length, rows.count - skip)};
    const int c = block % blocks * BackTile::kThreads + threadIdx.x / 32 * 32;
    channel = group * channels + c, n_channels = min(32, channels - c);
  }
  // The lane that walks with these channels and states.
  __device__ static int walker(int channels, int states) {
    return channels / 4 % 2 | channels / 8 % 2 * 4 | channels / 16 * 16 | states / 4 % 2 * 2 |
           states / 8 * 8;
  }
  __device__ int ways() const { return ceil_div(int(rows.count), kRows); }
  __device__ int64_t way(int j) const { return rows.first / kRows + sequence + j; }

  // --- as it walks
  __device__ void load_A(float (&A)[4][4]) const {  // times log2(e), as the exps take it
    const int64_t N = a.in.d_state;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float* from = a.in.A + (channel + walked + k) * N + state;
#pragma unroll
      for (int n = 0; n < 4; ++n)
        A[k][n] = walked < n_channels && state < N ? kLog2e * from[n] : 0.f;
    }
  }
  // To and from (d_inner, kN).
  __device__ void load_states(const float* from, float (&h)[4][4]) const {
#pragma unroll
    for (int k = 0; k < 4; ++k) unpack(Vector<float, 4>(), h[k]);
    if (walked >= n_channels) return;
    from += (channel + walked) * kN + state;
#pragma unroll
    for (int k = 0; k < 4; ++k) unpack(load<4>(from + k * kN, true), h[k]);
  }
  __device__ void store_states(float* to, const float (&h)[4][4]) const {
    if (walked >= n_channels) return;
    to += (channel + walked) * kN + state;
#pragma unroll
    for (int k = 0; k < 4; ++k) store(to + k * kN, pack<float>(h[k]));
  }
  __device__ void of_channels(const float (&row)[32], float (&to)[4]) const {
    unpack(load<4>(&row[walked], true), to);
  }
  __device__ void of_states(const float (&row)[kN], float (&to)[4]) const {
    unpack(load<4>(&row[state], true), to);
  }

  // --- as it fetches and prepares
  struct Raw {
    Vector<T, 4> x[2], delta[2], z[2], dout[2], B, C;
  };
  // Where a lane reads the way that it fetches next.
  struct Cursor {
    const T *x, *delta, *z, *dout, *B, *C;
  };
  __device__ Cursor cursor(int j) const {
    const ScanArgs<T>& in = a.in;
    const int64_t t = rows.first + j * kRows + row, t_BC = rows.first + j * kRows + lane / 4;
    const int64_t d = channel + served, n = group * in.d_state + lane % 4 * 4;
    return {in.x + t * in.x_stride + d,    in.delta + t * in.delta_stride + d,
            in.z + t * in.z_stride + d,    a.dout + t * a.dout_stride + d,
            in.B + t_BC * in.B_stride + n, in.C + t_BC * in.C_stride + n};
  }
  // Fetches way j, to which the cursor points, and moves the cursor on by so many ways.
  __device__ void fetch(int j, Cursor& from, int ways, Raw& raw) const {
    const ScanArgs<T>& in = a.in;
    const int left = int(rows.count) - j * kRows, of_channels = served < n_channels ? left : 0;
    const auto both = [&](Vector<T, 4>(&to)[2], const T*& p, int64_t stride) {
      to[0] = load<4>(p, row < of_channels), to[1] = load<4>(p + 4 * stride, row + 4 < of_channels);
      p += ways * kRows * stride;
    };
    both(raw.x, from.x, in.x_stride), both(raw.delta, from.delta, in.delta_stride);
    both(raw.dout, from.dout, a.dout_stride);
    if (in.z) both(raw.z, from.z, in.z_stride);
    const bool inside = lane / 4 < left && lane % 4 * 4 < in.d_state;
    raw.B = load<4>(from.B, inside), raw.C = load<4>(from.C, inside);
    from.B += ways * kRows * in.B_stride, from.C += ways * kRows * in.C_stride;
  }
  __device__ void load_served(const float* from, float (&to)[4]) const {  // zeros without it
#pragma unroll
    for (int i = 0; i < 4; ++i)
      to[i] = from && served < n_channels ? from[channel + served + i] : 0.f;
  }
  // Leaves what was fetched for the other lanes. f(row, points): for what only this lane needs.
  template <class Function>
  __device__ void prepare(int j, const Raw& raw, const float (&bias)[4], BackRows& to,
                          const Function& f) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float x[4], delta[4], z[4] = {}, dout[4], delta_x[4];
      unpack(raw.x[half], x), unpack(raw.delta[half], delta), unpack(raw.dout[half], dout);
      if (a.in.z) unpack(raw.z[half], z);
      const int r = row + 4 * half;
#pragma unroll
      for (int i = 0; i < 4; ++i) delta[i] += bias[i];
      ScanPoints<4> p = scan_points(a.in, x, delta, z, dout);
      const bool inside = j * kRows + r < rows.count;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (!inside) p.delta[i] = p.slope[i] = 0.f;  // the state stands still
        delta_x[i] = p.delta[i] * x[i];
      }
      store(&to.delta[r][served], pack<float>(p.delta));
      store(&to.delta_x[r][served], pack<float>(delta_x));
      store(&to.dy[r][served], pack<float>(p.dy));
      f(r, p);
    }
    float B[4], C[4];
    unpack(raw.B, B), unpack(raw.C, C);
    store(&to.B[lane / 4][lane % 4 * 4], pack<float>(B));
    store(&to.C[lane / 4][lane % 4 * 4], pack<float>(C));
  }
};

template <class T>
__global__ void __launch_bounds__(BackTile::kThreads, 3)
    selective_scan_backward_summary_kernel(ScanBackwardArgs<T> a, ScanPieces pieces) {
  __shared__ BackRows of_warp[BackTile::kWarps];
  BackRows& rows = of_warp[threadIdx.x / 32];
  const BackWarp<T> warp(a, pieces);
  const int64_t d_inner = a.in.d_inner, own = warp.channel + warp.lane;  // a channel
  const bool exists = warp.lane < warp.n_channels;
  float A[4][4], h[4][4] = {}, u[4][4] = {}, P[4][4], bias[4], total = 0.f;
  warp.load_A(A);
  warp.load_served(a.in.delta_bias, bias);
#pragma unroll
  for (int k = 0; k < 16; ++k) P[k / 4][k % 4] = 1.f;
  typename BackWarp<T>::Raw raw;
  const int ways = warp.ways();
  auto cursor = warp.cursor(0);
  if (ways > 0) warp.fetch(0, cursor, 1, raw);
  for (int j = 0; j < ways; ++j) {
    warp.store_states(pieces.h_way + warp.way(j) * d_inner * BackTile::kN, h);
    if (exists) pieces.before[warp.way(j) * d_inner + own] = total;
    __syncwarp();  // all lanes have read the way before
    warp.prepare(j, raw, bias, rows, [](int, const ScanPoints<4>&) {});
    __syncwarp();  // what is prepared is there to be read
    if (j + 1 < ways) warp.fetch(j + 1, cursor, 1, raw);
#pragma unroll
    for (int r = 0; r < BackTile::kRows; ++r) total += rows.delta[r][warp.lane];
#pragma unroll 4
    for (int r = 0; r < BackTile::kRows; ++r) {
      float delta[4], delta_x[4], dy[4], B[4], C[4];
      warp.of_channels(rows.delta[r], delta), warp.of_channels(rows.delta_x[r], delta_x);
      warp.of_channels(rows.dy[r], dy), warp.of_states(rows.B[r], B);
      warp.of_states(rows.C[r], C);
#pragma unroll
      for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const float a_t = exp2_approx(delta[k] * A[k][n]);
          P[k][n] *= a_t;
          u[k][n] = fmaf(P[k][n], C[n] * dy[k], u[k][n]);
          h[k][n] = fmaf(a_t, h[k][n], delta_x[k] * B[n]);
        }
    }
  }
  const int64_t at = warp.piece * d_inner;
  warp.store_states(pieces.first + at * BackTile::kN, h);
  warp.store_states(pieces.later + at * BackTile::kN, u);
  if (exists) pieces.total[at + own] = total;
}

// One thread owns a state. It asks for the numbers of several pieces at once.
template <class T>
__global__ void selective_scan_backward_link_kernel(ScanBackwardArgs<T> a, ScanPieces pieces) {
  constexpr int kAhead = 8, kN = BackTile::kN;
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, n = i % kN;
  const int64_t d_inner = a.in.d_inner, d = i / kN % d_inner, b = i / kN / d_inner;
  if (b >= a.in.batch) return;
  const bool exists = n < a.in.d_state;
  const int64_t state = (b * d_inner + d) * a.in.d_state + n;
  const float A = exists ? kLog2e * a.in.A[d * a.in.d_state + n] : 0.f;
  // Of pieces k, k + step, ..: *v is replaced by what comes before the piece in this direction.
  const auto walk = [&](float* v, float carried, int64_t k, int64_t step) {
    for (int64_t left = pieces.count; left > 0; left -= kAhead) {
      float own[kAhead], decay[kAhead];
#pragma unroll
      for (int s = 0; s < kAhead; ++s) {
        const int64_t at = ((b * pieces.count + k + s * step) * d_inner + d);
        own[s] = s < left ? v[at * kN + n] : 0.f;
        decay[s] = s < left ? exp2_approx(A * pieces.total[at]) : 1.f;
      }
#pragma unroll
      for (int s = 0; s < kAhead; ++s) {
        if (s < left) v[((b * pieces.count + k + s * step) * d_inner + d) * kN + n] = carried;
        carried = fmaf(decay[s], carried, own[s]);
      }
      k += kAhead * step;
    }
    return carried;
  };
  walk(pieces.first, exists && a.in.h0 ? a.in.h0[state] : 0.f, 0, 1);
  const float u = walk(pieces.later, exists && a.dhT ? a.dhT[state] : 0.f, pieces.count - 1, -1);
  if (exists && a.dh0) a.dh0[state] = u;
}

// Adds v over the two lanes that differ in kBit: the one without it goes on with the first half of
// the sums, the other with the second; both find them in front.
template <int kBit, int kHalf, int n>
__device__ inline void exchange_halves(float (&v)[n], int lane) {
  const bool upper = lane & kBit;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const float low = v[i], high = v[i + kHalf];
    v[i] = (upper ? high : low) + __shfl_xor_sync(~0u, upper ? low : high, kBit);
  }
}

// What a lane of the fused kernel carries from row to row, back in time.
template <class T>
struct BackLane {
  const BackWarp<T>& warp;
  BackMemory::Warp& memory;
  float A[4][4], u[4][4], dA[4][4] = {};           // as it walks
  float D[4], bias[4], dD[4] = {}, dbias[4] = {};  // as it prepares and finishes
  T *dx, *ddelta, *dz;                             // row `row` of the way

  __device__ BackLane(const BackWarp<T>& warp, BackMemory::Warp& memory)
      : warp(warp), memory(memory) {
    warp.load_A(A);
    const ScanBackwardArgs<T>& a = warp.a;
    warp.load_served(a.in.D, D), warp.load_served(a.in.delta_bias, bias);
    const int64_t t = warp.rows.first + (warp.ways() - 1) * BackTile::kRows + warp.row;
    const int64_t d = warp.channel + warp.served;
    dx = a.dx + t * a.dx_stride + d, ddelta = a.ddelta + t * a.ddelta_stride + d;
    dz = a.dz + t * a.dz_stride + d;
  }

  __device__ void prepare(int j, const typename BackWarp<T>::Raw& raw) {
    warp.prepare(j, raw, bias, memory.rows, [&](int r, const ScanPoints<4>& p) {
      store(&memory.x[r][warp.served], pack<float>(p.x));
      store(&memory.slope[r][warp.served], pack<float>(p.slope));
      store(&memory.dgate[r][warp.served], pack<float>(p.dgate));
    });
  }

  // From the state before the way: leaves p_t of every row.
  __device__ void forward(float (&h)[4][4]) {
    const BackRows& rows = memory.rows;
#pragma unroll 4
    for (int r = 0; r < BackTile::kRows; ++r) {
      float delta[4], delta_x[4], B[4];
      warp.of_channels(rows.delta[r], delta), warp.of_channels(rows.delta_x[r], delta_x);
      warp.of_states(rows.B[r], B);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        float p[4];
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          p[n] = exp2_approx(delta[k] * A[k][n]) * h[k][n];
          h[k][n] = fmaf(delta_x[k], B[n], p[n]);
        }
        memory.p[r][k][warp.lane] = pack<float>(p);
      }
    }
  }

  // Row r: leaves y, g . B and A . (g p) of the lane's channels, and adds to dB and dC of its
  // states.
  __device__ void row(int r, float (&BC)[8]) {
    const BackRows& rows = memory.rows;
    float delta[4], delta_x[4], dy[4], B[4], C[4];
    warp.of_channels(rows.delta[r], delta), warp.of_channels(rows.delta_x[r], delta_x);
    warp.of_channels(rows.dy[r], dy), warp.of_states(rows.B[r], B), warp.of_states(rows.C[r], C);
    float y[4] = {}, gB[4] = {}, gh[4] = {};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      float p[4];
      unpack(memory.p[r][k][warp.lane], p);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const float a_t = exp2_approx(delta[k] * A[k][n]), g = fmaf(C[n], dy[k], u[k][n]);
        const float h = fmaf(delta_x[k], B[n], p[n]), gp = g * p[n];
        y[k] = fmaf(C[n], h, y[k]);
        gB[k] = fmaf(g, B[n], gB[k]);
        gh[k] = fmaf(A[k][n], gp, gh[k]);
        dA[k][n] = fmaf(delta[k], gp, dA[k][n]);
        BC[n] = fmaf(g, delta_x[k], BC[n]);
        BC[4 + n] = fmaf(dy[k], h, BC[4 + n]);
        u[k][n] = a_t * g;
      }
    }
    Vector<float, 4>(&sums)[4][32] = memory.p[r];  // in the place of the lane's own p
    sums[0][warp.lane] = pack<float>(y), sums[1][warp.lane] = pack<float>(gB);
    sums[2][warp.lane] = pack<float>(gh);
  }

  // Walks a way back; leaves the warp's dB and dC of each row in BC_of.
  __device__ void back(float (&BC_of)[BackTile::kRows][32]) {
    const int lane = warp.lane, place = warp.walked / 16 * 16 + warp.state + warp.walked / 4 % 4;
#pragma unroll 2
    for (int r = BackTile::kRows - 1; r >= 0; --r) {
      float BC[8] = {};
      row(r, BC);
      exchange_halves<16, 4>(BC, lane), exchange_halves<4, 2>(BC, lane);
      exchange_halves<1, 1>(BC, lane);
      BC_of[r][place] = BC[0];
    }
  }

  // Sum q of row r over all states, for the lane's channels that are served. Lanes start with
  // different states, so that shared memory has no bank conflicts.
  __device__ void add_states(int r, int q, float (&sum)[4]) const {
    unpack(Vector<float, 4>(), sum);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float part[4];
      const int states = 4 * (i ^ warp.served / 16);
      unpack(memory.p[r][q][warp.walker(warp.served, states)], part);
#pragma unroll
      for (int k = 0; k < 4; ++k) sum[k] += part[k];
    }
  }

  // Completes the gradients of the lane's two rows of way j, and goes on to way j - 1.
  __device__ void finish(int j) {
    const ScanBackwardArgs<T>& a = warp.a;
    if (warp.served >= warp.n_channels) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = warp.row + 4 * half;
      const auto read = [&](const float(&rows)[BackTile::kRows][32], float(&to)[4]) {
        unpack(load<4>(&rows[r][warp.served], true), to);
      };
      ScanPoints<4> p;
      float y[4], gB[4], gh[4];
      read(memory.x, p.x), read(memory.rows.delta, p.delta), read(memory.rows.dy, p.dy);
      read(memory.slope, p.slope), read(memory.dgate, p.dgate);
      add_states(r, 0, y), add_states(r, 1, gB), add_states(r, 2, gh);
#pragma unroll
      for (int i = 0; i < 4; ++i) gh[i] *= kLn2;  // A was taken times log2(e)
      const ScanPointGradients<4> g = finish_points(p, D, y, gB, gh);
#pragma unroll
      for (int i = 0; i < 4; ++i) dD[i] += g.dD[i], dbias[i] += g.ddelta[i];
      if (j * BackTile::kRows + r >= warp.rows.count) continue;
      store(dx + 4 * half * a.dx_stride, pack<T>(g.dx));
      store(ddelta + 4 * half * a.ddelta_stride, pack<T>(g.ddelta));
      if (a.in.z) store(dz + 4 * half * a.dz_stride, pack<T>(g.dz));
    }
    dx -= BackTile::kRows * a.dx_stride, ddelta -= BackTile::kRows * a.ddelta_stride;
    dz -= BackTile::kRows * a.dz_stride;
  }
};

// Adds up the dB and dC of a block's warps: one thread two sums of a row.
__device__ inline void add_warps(const float (&BC)[BackTile::kWarps][BackTile::kRows][32], int left,
                                 float* to) {
  const int r = threadIdx.x / 16, i = threadIdx.x % 16 * 2;
  static_assert(BackTile::kThreads == 16 * BackTile::kRows, "all rows");
  float sum[2] = {};
#pragma unroll
  for (int w = 0; w < BackTile::kWarps; ++w) {
    float of_warp[2];
    unpack(load<2>(&BC[w][r][i], true), of_warp);
    sum[0] += of_warp[0], sum[1] += of_warp[1];
  }
  if (r < left) store(to + r * 32 + i, pack<float>(sum));
}

template <class T>
__global__ void __launch_bounds__(BackTile::kThreads, 2)
    selective_scan_backward_fused_kernel(ScanBackwardArgs<T> a, ScanPieces pieces,
                                         ScanParts parts) {
  extern __shared__ __align__(32) unsigned char shared_memory[];
  constexpr int kRows = BackTile::kRows, kN = BackTile::kN;
  auto& block = *reinterpret_cast<BackMemory*>(shared_memory);
  const BackWarp<T> warp(a, pieces);
  BackLane<T> lane(warp, block.warp[threadIdx.x / 32]);
  const int64_t d_inner = a.in.d_inner, at = warp.piece * d_inner;
  const int64_t own = warp.channel + warp.lane;  // a channel
  const bool exists = warp.lane < warp.n_channels;
  float first[4][4];
  warp.load_states(pieces.first + at * kN, first);
  warp.load_states(pieces.later + at * kN, lane.u);
  typename BackWarp<T>::Raw raw;
  const int ways = warp.ways();
  float h[4][4], before = 0.f;
  const auto fetch_start = [&](int j) {
    warp.load_states(pieces.h_way + warp.way(j) * d_inner * kN, h);
    before = exists ? pieces.before[warp.way(j) * d_inner + own] : 0.f;
  };
  if (ways > 0) fetch_start(ways - 1);
  auto cursor = warp.cursor(ways - 1);
  if (ways > 0) warp.fetch(ways - 1, cursor, -1, raw);
  for (int j = ways - 1; j >= 0; --j) {
    lane.prepare(j, raw);
    __syncwarp();  // what is prepared is there to be read
    if (j > 0) warp.fetch(j - 1, cursor, -1, raw);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float sum = __shfl_sync(~0u, before, warp.walked + k);
#pragma unroll
      for (int n = 0; n < 4; ++n)
        h[k][n] = fmaf(exp2_approx(sum * lane.A[k][n]), first[k][n], h[k][n]);
    }
    lane.forward(h);
    if (j > 0) fetch_start(j - 1);
    lane.back(block.BC[j & 1][threadIdx.x / 32]);
    // dB and dC of all warps are there; all have read those of way j + 2. Sums over states are
    // there.
    __syncthreads();
    const int64_t t = warp.rows.first + j * kRows;
    add_warps(block.BC[j & 1], int(warp.rows.count) - j * kRows,
              parts.BC + (warp.block * parts.rows + t) * 2 * kN);
    lane.finish(j);
  }
  warp.store_states(parts.A + at * kN, lane.dA);
  const auto store_served = [&](float(&v)[4], float* to) {  // over the lanes of the same channels
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      v[i] += __shfl_xor_sync(~0u, v[i], 8), v[i] += __shfl_xor_sync(~0u, v[i], 16);
      if (warp.row == 0 && warp.served < warp.n_channels) to[warp.served + i] = v[i];
    }
  };
  store_served(lane.dD, parts.D_bias + 2 * at + warp.channel);
  store_served(lane.dbias, parts.D_bias + 2 * at + d_inner + warp.channel);
}

// --- launchers ------------------------------------------------------------------------------

template <class T>
void selective_scan_backward_sum(const ScanBackwardArgs<T>& a, const ScanParts& parts,
                                 cudaStream_t stream) {
  const int64_t entries =
      2 * parts.rows * a.in.n_groups * parts.states + a.in.d_inner * (parts.states + 2);
  selective_scan_backward_sum_kernel<<<ceil_div(entries, 128), 128, 0, stream>>>(a, parts);
  CUDA_CHECK(cudaGetLastError());
}

template <class T>
ScanParts naive_scan_parts(const ScanBackwardArgs<T>& a) {
  const int64_t blocks = a.in.n_groups * ceil_div(a.in.d_inner / a.in.n_groups, 32);
  return {blocks, rows_in_all(a), a.in.batch, a.in.d_state};
}

// Bytes of workspace that the launcher of the same name needs.
template <class T>
size_t selective_scan_backward_naive_workspace(const ScanBackwardArgs<T>& a) {
  return sizeof(float) *
         (4 * rows_in_all(a) * a.in.d_inner + naive_scan_parts(a).size(a.in.d_inner));
}

template <class T>
void selective_scan_backward_naive(const ScanBackwardArgs<T>& a, float* workspace,
                                   cudaStream_t stream) {
  if (a.in.batch * a.in.d_inner == 0) return;
  ScanParts parts = naive_scan_parts(a);
  const int64_t each = parts.rows * a.in.d_inner;
  const ScanHistory history{workspace, workspace + each, workspace + 2 * each,
                            workspace + 3 * each};
  parts.place(workspace + 4 * each, a.in.d_inner);
  selective_scan_backward_naive_kernel<<<a.in.batch * parts.blocks, 32, 0, stream>>>(a, history,
                                                                                     parts);
  CUDA_CHECK(cudaGetLastError());
  selective_scan_backward_sum(a, parts, stream);
}

// Into how many pieces the fused kernel cuts each sequence: so that its blocks, of which each
// multiprocessor holds two, come in rounds that are nearly full. A piece costs as much as its rows
// and some more.
template <class T>
ScanPieces scan_pieces(const ScanBackwardArgs<T>& a) {
  constexpr int64_t kLeast = 32, kMost = 512, kMore = 16;
  const int64_t blocks =
      a.in.batch * a.in.n_groups * ceil_div(a.in.d_inner / a.in.n_groups, BackTile::kThreads);
  ScanPieces best;
  int64_t least = INT64_MAX;
  for (int64_t count = 1; count <= std::clamp<int64_t>(a.in.L / kLeast, 1, kMost); ++count) {
    const int64_t length = ceil_div(ceil_div(a.in.L, count), BackTile::kRows) * BackTile::kRows;
    const int64_t cost = ceil_div(blocks * count, 2 * multiprocessors()) * (length + kMore);
    if (cost < least) least = cost, best.count = count, best.length = length;
  }
  return best;
}

// May four neighbouring channels, and four neighbouring states of B and C, be read and written at
// once?
template <class T>
bool moves_four(const ScanBackwardArgs<T>& a) {
  return reads_four(a.in) && aligned4(a.dout, a.dout_stride) && aligned4(a.dx, a.dx_stride) &&
         aligned4(a.ddelta, a.ddelta_stride) && aligned4(a.dz, a.dz_stride);
}

template <class T>
bool scan_backward_is_fused(const ScanBackwardArgs<T>& a) {
  return a.in.d_state <= BackTile::kN && moves_four(a) && int(sizeof(BackMemory)) <= shared_bytes();
}

template <class T>
ScanParts fused_scan_parts(const ScanBackwardArgs<T>& a, const ScanPieces& pieces) {
  const int64_t blocks = a.in.n_groups * ceil_div(a.in.d_inner / a.in.n_groups, BackTile::kThreads);
  return {blocks, rows_in_all(a), a.in.batch * pieces.count, BackTile::kN};
}

// Bytes of workspace that `selective_scan_backward` needs: 9.5 for each row and channel, of which 8
// are a state every kRows rows, and little more for each piece.
template <class T>
size_t selective_scan_backward_workspace(const ScanBackwardArgs<T>& a) {
  if (a.in.batch * a.in.d_inner == 0) return 0;
  if (!scan_backward_is_fused(a)) return selective_scan_backward_naive_workspace(a);
  const ScanPieces pieces = scan_pieces(a);
  const int64_t ways = ScanPieces::ways(rows_in_all(a), a.in.batch);
  return sizeof(float) * (a.in.d_inner * (a.in.batch * pieces.count * (2 * BackTile::kN + 1) +
                                          ways * (BackTile::kN + 1)) +
                          fused_scan_parts(a, pieces).size(a.in.d_inner));
}

template <class T>
void selective_scan_backward_fused(const ScanBackwardArgs<T>& a, float* workspace,
                                   cudaStream_t stream) {
  ScanPieces pieces = scan_pieces(a);
  ScanParts parts = fused_scan_parts(a, pieces);
  const int64_t d = a.in.d_inner, states = parts.walks * d * BackTile::kN;
  const int64_t ways = ScanPieces::ways(parts.rows, a.in.batch);
  const auto take = [&](int64_t size) { return std::exchange(workspace, workspace + size); };
  pieces.first = take(states), pieces.later = take(states);
  pieces.h_way = take(ways * d * BackTile::kN);
  parts.place(take(parts.size(d)), d);
  pieces.total = take(parts.walks * d), pieces.before = take(ways * d);

  const int64_t grid = parts.walks * parts.blocks, threads = BackTile::kThreads;
  selective_scan_backward_summary_kernel<<<grid, threads, 0, stream>>>(a, pieces);
  CUDA_CHECK(cudaGetLastError());
  const int64_t links = a.in.batch * d * BackTile::kN;
  selective_scan_backward_link_kernel<<<ceil_div(links, 128), 128, 0, stream>>>(a, pieces);
  CUDA_CHECK(cudaGetLastError());
  const auto kernel = selective_scan_backward_fused_kernel<T>;
  constexpr int bytes = sizeof(BackMemory);
  CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  kernel<<<grid, threads, bytes, stream>>>(a, pieces, parts);
  CUDA_CHECK(cudaGetLastError());
  selective_scan_backward_sum(a, parts, stream);
}

// Every gradient of `selective_scan`.
template <class T>
void selective_scan_backward(const ScanBackwardArgs<T>& a, float* workspace, cudaStream_t stream) {
  const int64_t N = a.in.d_state;
  if (N < 1 || N > kMaxStates)
    fail("selective_scan_backward: d_state: expected 1 to ", kMaxStates, ", found ", N);
  if (a.in.d_inner % a.in.n_groups != 0)
    fail("selective_scan_backward: d_inner: expected a multiple of n_groups ", a.in.n_groups,
         ", found ", a.in.d_inner);
  if (a.in.batch * a.in.d_inner == 0) return;
  if (!scan_backward_is_fused(a)) return selective_scan_backward_naive(a, workspace, stream);
  selective_scan_backward_fused(a, workspace, stream);
}

// ---------------------------------------------------------------------------------------
// ssd backward. From dy, the gradient of y, and dh_T, that of the state after the sequence, walking
// back (a_t = exp(delta_t A), products of vectors are outer, <,> sums over all of h):
//
//   dC_t = sum_p dy_t[p] h_t[p,:]         dh_t    += dy_t C_t^T
//   dX_t = dh_t B_t                       dB_t     = sum_p delta_t x_t[p] dh_t[p,:]
//   dh_{t-1} = a_t dh_t                   dl_t     = <dh_{t-1}, h_{t-1}>      l_t = delta_t A
//   dx_t = delta_t dX_t + D dy_t          ddelta_t = A dl_t + x_t . dX_t
//   dA   = sum_t delta_t dl_t             dD       = sum_t dy_t . x_t
//
// dB and dC are sums over the heads of a group, dA, dD and ddt_bias over the batch: blocks leave
// their parts in the workspace, and two small kernels add these up in order.
// ---------------------------------------------------------------------------------------

// Gradients beside what they are gradients of; rows of those of type T are *_stride apart. `out`,
// `hT` and `done` of the forward are not used. A null pointer: not given (zero), or not wanted.
template <class T>
struct SsdBackwardArgs : SsdArgs<T> {
  const T* dout = nullptr;         // (batch, L, heads, head_dim)
  const float* dhT = nullptr;      // (batch, heads, head_dim, d_state) or null
  T* dx = nullptr;                 // (batch, L, heads, head_dim)
  T* ddt = nullptr;                // (batch, L, heads)
  T *dB = nullptr, *dC = nullptr;  // (batch, L, groups, d_state)
  int64_t dout_stride = 0, dx_stride = 0, ddt_stride = 0, dB_stride = 0, dC_stride = 0;
  float *dA = nullptr, *dD = nullptr, *ddt_bias = nullptr;  // (heads), each null, or added to
  float* dh0 = nullptr;  // (batch, heads, head_dim, d_state) or null; may be dhT
};

// What is kept and what is left to be added up, in the workspace.
struct SsdBackwardRoom {
  int64_t chunks = 0;     // of a sequence of L tokens
  int parts = 0;          // of the heads of a group, in dB and dC
  void* start = nullptr;  // states at the starts of chunks, and (fused) gradients of those at
  void* end = nullptr;    // their ends
  float* dh = nullptr;    // (batch, heads, head_dim, d_state), on its way back (naive)
  float *dB = nullptr, *dC = nullptr;  // (batch L, groups, parts, d_state)
  int64_t summands = 0;                // of dA, dD and ddt_bias
  float* of_head = nullptr;            // (summands, 3, heads): dA, dD, ddt_bias
};

// The gradient of dt from that of delta. Where delta was clamped it does not depend on dt.
template <class T>
__device__ inline float ssd_ddt(const SsdArgs<T>& a, float biased_dt, float ddelta) {
  const float delta = softplus(biased_dt);
  if (delta < a.dt_min || delta > a.dt_max) return 0.f;
  const float sigmoid = reciprocal_approx(1.f + exp2_approx(-kLog2e * biased_dt));
  return a.delta_ratio * sigmoid * ddelta;
}

// One thread for each number of dB and dC.
template <class T>
__global__ void ssd_backward_sum_heads_kernel(SsdBackwardArgs<T> a, SsdBackwardRoom room) {
  const int64_t N = a.d_state, i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int64_t t = i / (N * a.n_groups), column = i % (N * a.n_groups);
  if (t >= (a.cu_seqlens ? a.cu_seqlens[a.batch] : a.batch * a.L)) return;
  const int64_t from = i / N * room.parts * N + i % N;
  float dB = 0, dC = 0;
  for (int part = 0; part < room.parts; ++part) {
    dB += room.dB[from + part * N];
    dC += room.dC[from + part * N];
  }
  a.dB[t * a.dB_stride + column] = from_float<T>(dB);
  a.dC[t * a.dC_stride + column] = from_float<T>(dC);
}

// A warp for each number of dA, dD and ddt_bias.
template <class T>
__global__ void ssd_backward_sum_batch_kernel(SsdBackwardArgs<T> a, SsdBackwardRoom room) {
  const int i = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
  if (i >= 3 * a.n_heads) return;
  float sum = 0;
  for (int64_t k = lane; k < room.summands; k += 32) sum += room.of_head[k * 3 * a.n_heads + i];
  sum = warp_sum(sum);
  float* const to = i < a.n_heads ? a.dA : i < 2 * a.n_heads ? a.dD : a.ddt_bias;
  if (to && lane == 0) to[i % a.n_heads] += sum;
}

// --- naive: the recurrence as written above. A block walks one head of one sequence, first
// forward, to keep h at every kSsdNaiveSteps steps, then back over these chunks; a warp takes rows
// p = w, w + kSsdNaiveWarps, ... of h, one at a time, lane i states i, i + 32, ... of it. In a
// chunk it first makes the states anew (in its own memory), then walks back. dB and dC of a chunk:
// in shared memory, one for each warp, to be added up.

constexpr int kSsdNaiveSteps = 16, kSsdNaiveWarps = 4;

// What a row p of a head's state needs of step t.
struct SsdNaiveStep {
  float delta, decay, x;
};
template <class T>
__device__ inline SsdNaiveStep ssd_naive_step(const SsdArgs<T>& a, int64_t t, int head, int p) {
  const float dt = to_float(a.dt[t * a.dt_stride + head]);
  const float delta = ssd_delta(a, dt + (a.dt_bias ? a.dt_bias[head] : 0.f));
  const int64_t channel = int64_t{head} * a.head_dim + p;
  return {delta, expf(delta * a.A[head]), to_float(a.x[t * a.x_stride + channel])};
}

// f(i, n) for the states n of this lane.
template <class Function>
__device__ inline void each_state(int N, const Function& f) {
  for (int i = 0; i < kSsdNaiveStates && int(threadIdx.x) % 32 + 32 * i < N; ++i)
    f(i, int(threadIdx.x) % 32 + 32 * i);
}

// h_t of a row from h_{t-1}.
template <class T>
__device__ inline void ssd_naive_advance(float (&h)[kSsdNaiveStates],
                                         const float (&before)[kSsdNaiveStates],
                                         const SsdArgs<T>& a, int64_t t, int head, int p) {
  const SsdNaiveStep step = ssd_naive_step(a, t, head, p);
  const T* B = a.B + t * a.B_stride + head / (a.n_heads / a.n_groups) * a.d_state;
  each_state(a.d_state, [&](int i, int n) {
    h[i] = step.decay * before[i] + step.delta * step.x * to_float(B[n]);
  });
}

// What a warp adds up over its rows in one chunk.
struct SsdNaiveSums {
  float *dB, *dC;                   // (kSsdNaiveSteps, d_state), in shared memory
  float dl[kSsdNaiveSteps] = {};    // over this lane's states
  float x_dX[kSsdNaiveSteps] = {};  // x . dX, over all states
  float dD = 0;
};

// Row p of a head in the chunk of `steps` steps from token t0 on: `start` is h before it, dh is
// read from `dh_after` (null: zero) and left in `dh_before`.
template <class T>
__device__ void ssd_naive_row_backward(const SsdBackwardArgs<T>& a, int64_t t0, int steps, int head,
                                       int p, const float* start, const float* dh_after,
                                       float* dh_before, SsdNaiveSums& sums) {
  const int64_t N = a.d_state, channel = int64_t{head} * a.head_dim + p;
  const int64_t group = head / (a.n_heads / a.n_groups) * N;
  float h[kSsdNaiveSteps + 1][kSsdNaiveStates], dh[kSsdNaiveStates];
  each_state(N, [&](int i, int n) {
    h[0][i] = start[n];
    dh[i] = dh_after ? dh_after[n] : 0.f;
  });
  for (int s = 0; s < steps; ++s) ssd_naive_advance(h[s + 1], h[s], a, t0 + s, head, p);
  for (int s = steps - 1; s >= 0; --s) {
    const int64_t t = t0 + s;
    const SsdNaiveStep step = ssd_naive_step(a, t, head, p);
    const float dy = to_float(a.dout[t * a.dout_stride + channel]);
    float dX = 0;
    each_state(N, [&](int i, int n) {
      sums.dC[s * N + n] += dy * h[s + 1][i];
      dh[i] += dy * to_float(a.C[t * a.C_stride + group + n]);
      dX += dh[i] * to_float(a.B[t * a.B_stride + group + n]);
      sums.dB[s * N + n] += step.delta * step.x * dh[i];
      dh[i] *= step.decay;
      sums.dl[s] += dh[i] * h[s][i];
    });
    dX = warp_sum(dX);
    sums.x_dX[s] += step.x * dX;
    sums.dD += dy * step.x;
    if (threadIdx.x % 32 == 0)
      a.dx[t * a.dx_stride + channel] =
          from_float<T>(step.delta * dX + (a.D ? a.D[head] * dy : 0.f));
  }
  each_state(N, [&](int i, int n) { dh_before[n] = dh[i]; });
}

// h at the starts of all chunks of a head.
template <class T>
__device__ void ssd_naive_starts(const SsdBackwardArgs<T>& a, const Rows& rows, int64_t b, int head,
                                 float* start) {
  const int64_t P = a.head_dim, N = a.d_state;
  for (int64_t p = threadIdx.x / 32; p < P; p += kSsdNaiveWarps) {
    float h[kSsdNaiveStates];
    each_state(N, [&](int i, int n) {
      h[i] = a.h0 ? a.h0[((b * a.n_heads + head) * P + p) * N + n] : 0.f;
    });
    for (int64_t t = 0; t < rows.count || t == 0; ++t) {
      if (t % kSsdNaiveSteps == 0)
        each_state(N, [&](int i, int n) { start[(t / kSsdNaiveSteps * P + p) * N + n] = h[i]; });
      if (t < rows.count) ssd_naive_advance(h, h, a, rows.first + t, head, p);
    }
  }
}

// The sums of all warps of a block, by one thread each, for one step: ddt; to dA and ddt_bias.
struct SsdNaiveOfHead {
  float dA = 0, dD = 0, ddt_bias = 0;
};
template <class T>
__device__ inline void ssd_naive_finish_step(const SsdBackwardArgs<T>& a, int64_t t, int head,
                                             float dl, float x_dX, SsdNaiveOfHead& of_head) {
  const float biased = to_float(a.dt[t * a.dt_stride + head]) + (a.dt_bias ? a.dt_bias[head] : 0.f);
  const float ddt = ssd_ddt(a, biased, a.A[head] * dl + x_dX);
  a.ddt[t * a.ddt_stride + head] = from_float<T>(ddt);
  of_head.dA += ssd_delta(a, biased) * dl;
  of_head.ddt_bias += ddt;
}

template <class T>
__global__ void __launch_bounds__(32 * kSsdNaiveWarps)
    ssd_backward_naive_kernel(SsdBackwardArgs<T> a, SsdBackwardRoom room) {
  extern __shared__ float of_warps[];  // (warps, dB and dC, steps, N)
  __shared__ float dl[kSsdNaiveWarps][kSsdNaiveSteps], x_dX[kSsdNaiveWarps][kSsdNaiveSteps];
  __shared__ float dD[kSsdNaiveWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, head = blockIdx.x % a.n_heads;
  const int64_t b = blockIdx.x / a.n_heads, P = a.head_dim, N = a.d_state;
  const int64_t size = kSsdNaiveSteps * N, row0 = (b * a.n_heads + head) * P;
  const Rows rows = rows_of(b, a.L, a.cu_seqlens);
  float* const start = static_cast<float*>(room.start) + row0 * room.chunks * N;
  ssd_naive_starts(a, rows, b, head, start);  // each warp's own rows
  SsdNaiveOfHead of_head;
  const int64_t last = max(int64_t{0}, ceil_div(rows.count, kSsdNaiveSteps) - 1);
  for (int64_t c = last; c >= 0; --c) {
    const int64_t t0 = rows.first + c * kSsdNaiveSteps;
    const int steps = min(rows.first + rows.count - t0, int64_t{kSsdNaiveSteps});
    SsdNaiveSums sums{of_warps + 2 * warp * size, of_warps + (2 * warp + 1) * size};
    for (int64_t i = lane; i < 2 * size; i += 32) sums.dB[i] = 0;
    __syncwarp();  // the zeros before what is added to them
    for (int64_t p = warp; p < P; p += kSsdNaiveWarps)
      ssd_naive_row_backward(a, t0, steps, head, p, start + (c * P + p) * N,
                             c < last ? room.dh + (row0 + p) * N
                             : a.dhT  ? a.dhT + (row0 + p) * N
                                      : nullptr,
                             room.dh + (row0 + p) * N, sums);
    for (int s = 0; s < steps; ++s) {
      const float dl_s = warp_sum(sums.dl[s]);
      if (lane == 0) dl[warp][s] = dl_s, x_dX[warp][s] = sums.x_dX[s];
    }
    of_head.dD += sums.dD;
    __syncthreads();  // the warps' sums before they are added
    const auto over_warps = [&](const float* of_warp, int64_t stride) {
      float sum = 0;
      for (int w = 0; w < kSsdNaiveWarps; ++w) sum += of_warp[w * stride];
      return sum;
    };
    for (int64_t i = threadIdx.x; i < steps * N; i += 32 * kSsdNaiveWarps) {
      const int64_t to = ((t0 + i / N) * a.n_heads + head) * N + i % N;
      room.dB[to] = over_warps(of_warps + i, 2 * size);
      room.dC[to] = over_warps(of_warps + size + i, 2 * size);
    }
    if (int(threadIdx.x) < steps)
      ssd_naive_finish_step(a, t0 + lane, head, over_warps(&dl[0][lane], kSsdNaiveSteps),
                            over_warps(&x_dX[0][lane], kSsdNaiveSteps), of_head);
    __syncthreads();  // these reads before the sums of the next chunk
  }
  if (lane == 0) dD[warp] = of_head.dD;
  __syncthreads();  // dD of all warps
  if (warp > 0) return;
  float* const to = room.of_head + b * 3 * a.n_heads + head;
  const float dA = warp_sum(of_head.dA), ddt_bias = warp_sum(of_head.ddt_bias);
  if (lane > 0) return;
  to[0] = dA, to[2 * a.n_heads] = ddt_bias, to[a.n_heads] = 0;
  for (const float v : dD) to[a.n_heads] += v;
}

// --- fused: the matrix form on tensor cores, all chunks at once. For a chunk of Q steps with the
// state h before it and G, the gradient of the state after it; a(s, t) as in the forward, M[t,s] =
// a(s, t) delta_s (C_t . B_s), f_s = a(s, Q-1):
//
//   dS[t,s] = a(s, t) delta_s (dy_t . x_s)            S = C B^T
//   dC = dS B    +  diag(a(-1, t)) dy h               dB = dS^T C  +  diag(f delta) x G
//   dx = (M + D)^T dy  +  diag(f delta) B G^T         dh = a(-1, Q-1) G  +  (diag(a(-1, t)) dy)^T C
//
// The gradient of l_r = delta_r A: every factor a in which l_r stands, times its gradient. With
//
//   W'[t,s] = a(s, t) (C_t . B_s) (dy_t . x_s),
//   u_t = a(-1, t) dy_t . (h C_t),  v_s = f_s x_s . (G B_s):
//
//   x_s . dX_s = v_s + sum over t >= s of W'[t,s]
//   dl_r = sum over s < r <= t of delta_s W'[t,s],  where column s = -1 is u_t, row t = Q is v_s,
//          and their corner is a(-1, Q-1) <G, h>: additions alone, differences of sums would cancel
//
// ssd_backward_states_kernel walks forward for h and, other blocks, back for G: the last formula
// has the form of the forward's h' with dy for x and C for B. It keeps both for each chunk, rounded
// to T as they are read: 4 P N bytes, for 64 steps of P = 64, N = 128 512 bytes a step and head.
// ssd_backward_fused_kernel makes all else, one chunk of one group, or of a part of its heads, to a
// block, so that S is made once, and dB and dC add up over the heads in registers.
// Rounding to 16 bits, beside inputs and outputs: M, dS, h, G, and the weighted x and dy of the
// last two: to first order |error| <= 3 eps m of dx, dB, dC, eps m of dh0, 4 eps m of ddt, dA,
// ddt_bias.

// A quad's 4 x 4 words, transposed: lane q had word j of row q.
__device__ inline void transpose_quad(uint32_t (&v)[4]) {
  const int q = threadIdx.x % 4;
#pragma unroll
  for (int d = 1; d < 4; d *= 2)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & d) continue;
      const uint32_t got = __shfl_xor_sync(~0u, q & d ? v[i] : v[i | d], d);
      if (q & d)
        v[i] = got;
      else
        v[i | d] = got;
    }
}

// A row g (half 0) or g + 8 (half 1) of four neighbouring result tiles, rounded, as this lane's 16
// bytes of it: columns 8q .. of the 32.
template <class T>
__device__ inline uint4 pack_row(const float (*d)[4], int half) {
  uint32_t v[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) v[j] = pack_pair<T>(d[j][2 * half], d[j][2 * half + 1]);
  transpose_quad(v);
  return {v[0], v[1], v[2], v[3]};
}

// A warp of the states kernel has 16 rows p and 64 states, from n on. f(place in `state` (heads, P,
// N), element of h, its right neighbour) for all pairs that exist.
template <class T, class Float, class Function>
__device__ inline void each_pair_of_column(Float* state, float (&h)[8][4], const SsdArgs<T>& a,
                                           const SsdRows& rows, int n, const Function& f) {
  const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  state += (int64_t{rows.head} * a.head_dim + rows.p + g) * a.d_state + n + 2 * q;
#pragma unroll
  for (int k = 0; k < 4; k += 2, state += 8 * a.d_state)
#pragma unroll
    for (int j = 0; j < 8; ++j)
      if (rows.active && n + 8 * j + 2 * q < a.d_state) f(state + 8 * j, h[j][k], h[j][k + 1]);
}

// h, or G, of a chunk as it is kept: (heads, P, N) of T.
template <class T>
__device__ inline void store_rounded_state(T* to, const float (&h)[8][4], const SsdArgs<T>& a,
                                           const SsdRows& rows, int n) {
  const int g = threadIdx.x % 32 / 4;
  n += threadIdx.x % 4 * 8;
  to += (int64_t{rows.head} * a.head_dim + rows.p + g) * a.d_state + n;
#pragma unroll
  for (int half = 0; half < 2; ++half, to += 8 * a.d_state)
#pragma unroll
    for (int j = 0; j < 8; j += 4) {
      const uint4 row = pack_row<T>(&h[j], half);
      if (rows.active && n + 8 * j < a.d_state) *reinterpret_cast<uint4*>(to + 8 * j) = row;
    }
}

template <int kStates>
using SsdStateTiles = SsdTiles<kStates, 64, 2, 0, 0, false>;

// Block: 64 rows (head, p) of one sequence, four warps for each 64 states. Grid: x = the rows;
// y = 0: h, 1: G. Registers: the warp's part of h. Shared: B and x of two chunks, and their decays.
template <int kStates>
constexpr int kSsdStateThreads = 2 * kStates;

template <class T, int kStates>
__global__ void __launch_bounds__(kSsdStateThreads<kStates>, 384 / kStates)
    ssd_backward_states_kernel(SsdBackwardArgs<T> a, SsdBackwardRoom room) {
  using Tiles = SsdStateTiles<kStates>;
  const bool back = blockIdx.y == 1;
  SsdArgs<T> in = a;
  if (back) in.x = a.dout, in.x_stride = a.dout_stride, in.B = a.C, in.B_stride = a.C_stride;
  const SsdBlock block =
      ssd_block<64, true>(in, SsdSegments{room.chunks * kSsdChunk, 1, nullptr, nullptr});
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  const int column = warp / 4;  // of the states
  const SsdRows rows = ssd_rows(in, block, warp % 4 * 16);
  const SsdHead head = ssd_head(in, rows.head);
  extern __shared__ __align__(128) char shared[];
  const uint32_t base = __cvta_generic_to_shared(shared);
  SsdDecays* decays = reinterpret_cast<SsdDecays*>(shared + Tiles::kDecays);  // [2]

  const int64_t chunks = ceil_div(block.end, kSsdChunk);
  const auto start_of = [&](int64_t i) { return (back ? chunks - 1 - i : i) * kSsdChunk; };
  T dt[2] = {};
  const auto fetch = [&](int64_t i) {  // the i-th chunk, its decays, and dt of the next
    const int64_t t = start_of(i);
    for (int c = 0; c < Tiles::kStage / kSsdColumn; ++c)
      copy_column<Tiles, kSsdStateThreads<kStates>>(base + i % 2 * Tiles::kStage, c, in, block, t);
    copy_async_commit();
    if (warp != 0) return;
    SsdDecays& to = decays[i % 2];
    make_decays(to, in, head, dt, steps_from(block, t));
    if (back) reinterpret_cast<float2*>(to.fade)[threadIdx.x] = pair_at(&to.carry[2 * threadIdx.x]);
    if (i + 1 < chunks) load_dt(dt, in, block, head.index, start_of(i + 1));
  };
  float h[1][8][4];
  for (auto& tile : h[0]) tile[0] = tile[1] = tile[2] = tile[3] = 0;
  const float* from = back ? a.dhT : a.h0;
  if (from)
    each_pair_of_column(
        from + block.b * ssd_state_size(in), h[0], in, rows, 64 * column,
        [](const float* from, float& h0, float& h1) { h0 = from[0], h1 = from[1]; });
  T* const to = static_cast<T*>(back ? room.end : room.start);
  if (chunks > 0) load_dt(dt, in, block, head.index, start_of(0)), fetch(0);
#pragma unroll 1
  for (int64_t i = 0; i < chunks; ++i) {
    copy_async_wait();
    __syncthreads();  // this chunk's copies and decays before their reads; all reads of the last
    if (i + 1 < chunks) fetch(i + 1);
    const int64_t chunk = start_of(i) / kSsdChunk;
    store_rounded_state(to + (block.b * room.chunks + chunk) * ssd_state_size(in), h[0], in, rows,
                        64 * column);
    const uint32_t stage = base + i % 2 * Tiles::kStage;
    advance_state<T>(h, stage + Tiles::kX + beside(warp % 4 * 2), stage + column * kSsdColumn,
                     decays[i % 2]);
  }
  if (back && a.dh0)
    each_pair_of_column(a.dh0 + block.b * ssd_state_size(in), h[0], in, rows, 64 * column,
                        [](float* to, float& h0, float& h1) { to[0] = h0, to[1] = h1; });
}

constexpr int kSsdBackwardThreads = 256;

// Of 64 rows of a head in one chunk, in shared memory: what is added up over more than a warp.
struct alignas(16) SsdBackwardSums {
  float W[kSsdChunk * (kSsdChunk + 3) / 2];  // row t: u_t, then W'[t,s] for s <= t; see at
  float u[2][kSsdChunk], v[2][kSsdChunk];    // from the two halves of the states
  float G_h[kSsdBackwardThreads / 32], dy_x[kSsdBackwardThreads / 32];  // from the warps
  float x_dX[kSsdChunk];
  float dl_before[kSsdChunk], x_dX_before[kSsdChunk], dy_x_before;  // from the head's rows before
  __device__ float& at(int t, int s) { return W[t * (t + 3) / 2 + s + 1]; }
};
struct alignas(16) SsdBackwardSteps {  // of a head in a chunk
  SsdDecays decays;
  float delta[kSsdChunk], biased_dt[kSsdChunk];
};

// Shared memory of a block, as offsets of tiles: B and C; h and G, x and dy of a head; M and dS.
template <int kStates>
struct SsdBackwardTiles {
  static constexpr int kColumns = kStates / 64, kBytes = kColumns * kSsdColumn;
  static constexpr int kB = 0, kC = kBytes, kH = 2 * kBytes, kG = 3 * kBytes, kX = 4 * kBytes;
  static constexpr int kDy = kX + kSsdColumn, kM = kDy + kSsdColumn, kS = kM + kSsdColumn;
  static constexpr int kSums = kS + kSsdColumn, kSteps = kSums + int(sizeof(SsdBackwardSums));
  static constexpr int kAll = kSteps + 2 * int(sizeof(SsdBackwardSteps));
};

// 64 rows of `width` numbers, `stride` apart, to a tile: zeros beyond `rows` and `width`.
template <int kColumns, class T>
__device__ inline void copy_tile(uint32_t tile, const T* from, int64_t stride, int rows,
                                 int width) {
  const int row = threadIdx.x / 8, piece = threadIdx.x % 8;
#pragma unroll
  for (int c = 0; c < kColumns; ++c)
#pragma unroll
    for (int r = 0; r < 64; r += kSsdBackwardThreads / 8)
      copy_async(tile + c * kSsdColumn + tile_offset(row + r, piece),
                 from + (row + r) * stride + 64 * c + 8 * piece,
                 row + r < rows && 64 * c + 8 * piece < width);
}

// Addresses are sums of the tile's and of what a lane adds to all tiles, to keep few of them.

// Two numbers of a tile, row `row` + g (row a multiple of 8) and columns 8 piece + 2q, + 1.
__device__ inline uint32_t& word_of(uint32_t tile, int row, int piece) {
  const uint32_t g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  return *static_cast<uint32_t*>(__cvta_shared_to_generic(
      tile + tile_offset(row, 0) + move_right(tile_offset(g, 0) + 4 * q, piece)));
}
// Operand A: 16 rows from `row` on, or (kTransposed) columns, and 16 columns, or rows, from 16k on.
template <bool kTransposed>
__device__ inline void load_operand_A(uint32_t (&A)[4], uint32_t tile, int row, int k) {
  if constexpr (kTransposed)
    load_matrices_transposed(A, tile + tile_offset(16 * k, 0) + move_right(beside(), row / 8));
  else
    load_matrices(A, tile + tile_offset(row, 0) + move_right(above(), 2 * k));
}
// d (16 x 16) += A B: B is rows 16k .. and columns from `column` on of a tile, or (kTransposed) the
// transpose of columns 16k .. and rows from `column` on.
template <class T, bool kTransposed>
__device__ inline void multiply_tile(float (*d)[4], const uint32_t (&A)[4], uint32_t tile,
                                     int column, int k) {
  uint32_t B[4];
  if constexpr (kTransposed)
    load_matrices(B, tile + tile_offset(column, 0) + move_right(beside(), 2 * k));
  else
    load_matrices_transposed(B, tile + tile_offset(16 * k, 0) + move_right(above(), column / 8));
  mma<T>(d, A, B);
}

// What a warp of the eight computes: 16 steps, and one half of the columns, of each result.
struct SsdBackwardWarp {
  int step, half, g, q;  // the first step; as in "tensor cores" above
};

// d (16 steps t x 32 steps s) += A B^T, as far as s <= t. For S and for dy x^T.
template <class T, int kColumns>
__device__ inline void multiply_causal(float (&d)[4][4], const SsdBackwardWarp& warp, uint32_t A,
                                       uint32_t B) {
#pragma unroll
  for (int k = 0; k < 4 * kColumns; ++k) {
    uint32_t of_A[4];
    load_operand_A<false>(of_A, A, warp.step, k);
#pragma unroll
    for (int j = 0; j < 2; ++j)
      if (32 * warp.half + 16 * j <= warp.step)
        multiply_tile<T, true>(&d[2 * j], of_A, B, 32 * warp.half + 16 * j, k);
  }
}

// From S and dM = dy x^T: M, with D, and dS to their tiles; W' to its sums. Returns this thread's
// part of the sum of dy_t . x_t.
template <class T>
__device__ inline float make_M_and_dS(const SsdBackwardWarp& warp, const float (&S)[4][4],
                                      const float (&dM)[4][4], const SsdBackwardSteps& steps,
                                      float D, uint32_t tile_M, uint32_t tile_dS,
                                      SsdBackwardSums& sums) {
  float dy_x = 0;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int s0 = 32 * warp.half + 8 * j + 2 * warp.q;
    if (32 * warp.half + 8 * j >= warp.step + 16) break;
    const float2 delta = pair_at(&steps.delta[s0]), cum = pair_at(&steps.decays.cum[s0]);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int t = warp.step + warp.g + 8 * i;
      const float cum_t = steps.decays.cum[t];
      float M[2], dS[2];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int s = s0 + k;
        const float a = s <= t ? exp2_approx(cum_t - (k ? cum.y : cum.x)) : 0.f;
        const float a_S = a * S[j][2 * i + k], dM_ts = dM[j][2 * i + k];
        M[k] = a_S * (k ? delta.y : delta.x) + (s == t ? D : 0.f);
        dS[k] = a * dM_ts * (k ? delta.y : delta.x);
        dy_x += s == t ? dM_ts : 0.f;
        if (s <= t) sums.at(t, s) = a_S * dM_ts;
      }
      word_of(tile_M, warp.step + 8 * i, 4 * warp.half + j) = pack_pair<T>(M[0], M[1]);
      word_of(tile_dS, warp.step + 8 * i, 4 * warp.half + j) = pack_pair<T>(dS[0], dS[1]);
    }
  }
  return dy_x;
}

// d (16 steps x half of the states) += diag(scale) X h, and dot += the products of X h with the
// same part of `other`, by row. For dC: dy, h, C; for dB: x, G, B.
template <class T, int kTiles>
__device__ inline void multiply_state(float (&d)[kTiles][4], float (&dot)[2],
                                      const SsdBackwardWarp& warp, uint32_t X, uint32_t h,
                                      uint32_t other, const float* scale) {
  const float by[2] = {scale[warp.step + warp.g], scale[warp.step + warp.g + 8]};
  uint32_t A[4][4];
#pragma unroll
  for (int k = 0; k < 4; ++k) load_operand_A<false>(A[k], X, warp.step, k);
#pragma unroll
  for (int j = 0; j < kTiles; j += 2) {
    const int column = 8 * (kTiles * warp.half + j);
    float part[2][4] = {};
#pragma unroll
    for (int k = 0; k < 4; ++k) multiply_tile<T, false>(part, A[k], h, column, k);
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // tile j + i / 2, row g + 8 (i % 2)
      const float* v = &part[i / 2][i % 2 * 2];
      float of_other[2];
      const int piece = kTiles * warp.half + j + i / 2;
      unpack(Vector<T, 2>{{word_of(other, warp.step + i % 2 * 8, piece)}}, of_other);
      dot[i % 2] += v[0] * of_other[0] + v[1] * of_other[1];
      float* to = &d[j + i / 2][i % 2 * 2];
      to[0] += by[i % 2] * v[0], to[1] += by[i % 2] * v[1];
    }
  }
}

// d (16 steps x half of the columns) += dS B, or (kTransposed) dS^T C, or M^T dy.
template <class T, bool kTransposed, int kTiles>
__device__ inline void multiply_masked(float (&d)[kTiles][4], const SsdBackwardWarp& warp,
                                       uint32_t mask, uint32_t other) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (kTransposed ? 16 * k < warp.step : 16 * k > warp.step) continue;
    uint32_t A[4];
    load_operand_A<kTransposed>(A, mask, warp.step, k);
#pragma unroll
    for (int j = 0; j < kTiles; j += 2)
      multiply_tile<T, false>(&d[j], A, other, 8 * (kTiles * warp.half + j), k);
  }
}

// dx (16 steps x 32 of 64 p) = diag(fade) B G^T + M^T dy, to `dx`, the tile's first number.
template <class T, int kColumns>
__device__ inline void make_dx(const SsdBackwardWarp& warp, uint32_t B, uint32_t G, uint32_t M,
                               uint32_t dy, const float* fade, T* dx, int64_t stride, int steps) {
  float d[4][4] = {};
#pragma unroll
  for (int k = 0; k < 4 * kColumns; ++k) {
    uint32_t A[4];
    load_operand_A<false>(A, B, warp.step, k);
#pragma unroll
    for (int j = 0; j < 4; j += 2) multiply_tile<T, true>(&d[j], A, G, 32 * warp.half + 8 * j, k);
  }
#pragma unroll
  for (int j = 0; j < 4; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) d[j][i] *= fade[warp.step + warp.g + i / 2 * 8];
  multiply_masked<T, true>(d, warp, M, dy);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int s = warp.step + warp.g + 8 * i;
    const uint4 row = pack_row<T>(d, i);
    if (s < steps) *reinterpret_cast<uint4*>(dx + s * stride + 32 * warp.half + 8 * warp.q) = row;
  }
}

// This thread's part of <G, h>: tiles alike in memory.
template <class T>
__device__ inline float multiply_elements(const char* G, const char* h, int bytes) {
  float sum = 0;
  for (int i = 16 * threadIdx.x; i < bytes; i += 16 * kSsdBackwardThreads) {
    float g_i[8], h_i[8];
    unpack(*reinterpret_cast<const Vector<T, 8>*>(G + i), g_i);
    unpack(*reinterpret_cast<const Vector<T, 8>*>(h + i), h_i);
#pragma unroll
    for (int k = 0; k < 8; ++k) sum += g_i[k] * h_i[k];
  }
  return sum;
}

// A warp's u and v, and its parts of <G, h> and of the sum of dy_t . x_t, to the sums of the block.
__device__ inline void hand_over_sums(SsdBackwardSums& sums, const SsdBackwardWarp& warp,
                                      float (&u)[2], float (&v)[2], float G_h, float dy_x) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    for (int d = 1; d < 4; d *= 2)
      u[i] += __shfl_xor_sync(~0u, u[i], d), v[i] += __shfl_xor_sync(~0u, v[i], d);
    const int t = warp.step + warp.g + 8 * i;
    if (warp.q == 0) sums.u[warp.half][t] = u[i], sums.v[warp.half][t] = v[i];
  }
  G_h = warp_sum(G_h), dy_x = warp_sum(dy_x);
  if (threadIdx.x % 32 == 0) sums.G_h[threadIdx.x / 32] = G_h, sums.dy_x[threadIdx.x / 32] = dy_x;
}

// W'[t,s] -> the sums over t' >= t of delta_s W'[t',s], for s < t; x . dX. A thread makes column s,
// one more that of s = -1.
__device__ inline void sum_W_columns(SsdBackwardSums& sums, const SsdBackwardSteps& steps) {
  const SsdDecays& decays = steps.decays;
  const int s = threadIdx.x, last = kSsdChunk - 1;
  float sum = 0;
  if (s <= last) {
    const float delta = steps.delta[s];
    sum = exp2_approx(decays.cum[last] - decays.cum[s]) * (sums.v[0][s] + sums.v[1][s]);
#pragma unroll 8
    for (int t = last; t > s; --t) sum += sums.at(t, s), sums.at(t, s) = delta * sum;
    sums.x_dX[s] = sum + sums.at(s, s);
  } else if (s == kSsdChunk) {
    for (const float v : sums.G_h) sum += v;
    sum *= decays.carry[last];
#pragma unroll 8
    for (int t = last; t >= 0; --t)
      sum += decays.carry[t] * (sums.u[0][t] + sums.u[1][t]), sums.at(t, -1) = sum;
  }
}

// dl_r from these; after the head's last rows (head_ends): ddt; the chunk's parts of dA, dD,
// ddt_bias. A thread makes step r, 0 to 63.
template <class T>
__device__ inline void finish_backward_steps(const SsdBackwardArgs<T>& a, SsdBackwardSums& sums,
                                             const SsdBackwardSteps& steps, int head,
                                             bool head_starts, bool head_ends, T* ddt, int count,
                                             float* of_head) {
  const int r = threadIdx.x;
  if (r >= kSsdChunk) return;
  float dl = 0, x_dX = sums.x_dX[r], dy_x = 0;
#pragma unroll 8
  for (int s = -1; s < r; ++s) dl += sums.at(r, s);
  for (const float v : sums.dy_x) dy_x += v;
  if (!head_starts) dl += sums.dl_before[r], x_dX += sums.x_dX_before[r];
  if (!head_starts && r == 0) dy_x += sums.dy_x_before;
  if (!head_ends) {
    sums.dl_before[r] = dl, sums.x_dX_before[r] = x_dX;
    if (r == 0) sums.dy_x_before = dy_x;
    return;
  }
  const float d = ssd_ddt(a, steps.biased_dt[r], a.A[head] * dl + x_dX);
  if (r < count) ddt[r * a.ddt_stride + head] = from_float<T>(d);
  const float dA = warp_sum(steps.delta[r] * dl), ddt_bias = warp_sum(r < count ? d : 0.f);
  if (r % 32 > 0) return;
  of_head += r / 32 * 3 * a.n_heads + head;
  of_head[0] = dA, of_head[a.n_heads] = r == 0 ? dy_x : 0.f, of_head[2 * a.n_heads] = ddt_bias;
}

// Decays, delta and dt of a head, by one warp.
template <class T>
__device__ inline void make_backward_steps(SsdBackwardSteps& to, const SsdArgs<T>& a,
                                           const SsdBlock& block, int index) {
  const int lane = threadIdx.x % 32, count = steps_from(block, block.begin);
  const SsdHead head = ssd_head(a, index);
  T dt[2];
  load_dt(dt, a, block, index, block.begin);
  make_decays(to.decays, a, head, dt, count);
  for (int i = 0; i < 2; ++i) {
    const int t = 2 * lane + i;
    to.biased_dt[t] = to_float(dt[i]) + head.dt_bias;
    to.delta[t] = t < count ? ssd_delta(a, to.biased_dt[t]) : 0.f;
  }
}

// dB or dC of the chunk, from this block's heads.
template <class T, int kTiles>
__device__ inline void store_part(float* to, int64_t stride, const float (&d)[kTiles][4],
                                  const SsdBackwardWarp& warp, int count, int d_state) {
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const int t = warp.step + warp.g + 8 * i, n = 8 * (kTiles * warp.half + j) + 2 * warp.q;
      if (t < count && n < d_state)
        *reinterpret_cast<float2*>(to + t * stride + n) = {d[j][2 * i], d[j][2 * i + 1]};
    }
}

// What a block of the fused kernel works on: one chunk, some heads of a group.
struct SsdBackwardPart {
  SsdBlock block;       // the chunk, as of a segment
  int64_t number, row;  // of all chunks; of its first token
  int count;            // steps, 0 beyond the end of a shorter sequence
  int first, end, group, part;
};
template <class T>
__device__ inline SsdBackwardPart ssd_backward_part(const SsdArgs<T>& a,
                                                    const SsdBackwardRoom& room) {
  const int heads = a.n_heads / a.n_groups;
  SsdBackwardPart to = {};
  to.part = blockIdx.x % room.parts, to.group = blockIdx.x / room.parts % a.n_groups;
  to.number = blockIdx.x / room.parts / a.n_groups;
  to.first = to.group * heads + heads * to.part / room.parts;
  to.end = to.group * heads + heads * (to.part + 1) / room.parts;
  const Rows rows = rows_of(to.number / room.chunks, a.L, a.cu_seqlens);
  to.block.begin = to.number % room.chunks * kSsdChunk, to.block.end = rows.count;
  to.block.row = rows.first, to.row = rows.first + to.block.begin;
  to.count = max(0, steps_from(to.block, to.block.begin));
  return to;
}

// The sums of a chunk beyond the end of its sequence.
__device__ inline void nothing_of_heads(float* of_head, const SsdBackwardPart& of, int n_heads) {
  const int heads = of.end - of.first;
  for (int i = threadIdx.x; i < 6 * heads; i += kSsdBackwardThreads)
    of_head[i / heads * n_heads + of.first + i % heads] = 0;
}

// B and C of the chunk; x, dy, h and G of 64 rows p of a head: on their way.
template <class Tiles, class T>
__device__ inline void fetch_group(uint32_t base, const SsdArgs<T>& a, const SsdBackwardPart& of) {
  const int N = a.d_state;
  const int64_t n = int64_t{of.group} * N;
  copy_tile<Tiles::kColumns>(base + Tiles::kB, a.B + of.row * a.B_stride + n, a.B_stride, of.count,
                             N);
  copy_tile<Tiles::kColumns>(base + Tiles::kC, a.C + of.row * a.C_stride + n, a.C_stride, of.count,
                             N);
}
template <class Tiles, class T>
__device__ inline void fetch_head(uint32_t base, const SsdBackwardArgs<T>& a,
                                  const SsdBackwardRoom& room, const SsdBackwardPart& of, int head,
                                  int p) {
  const int64_t N = a.d_state, channel = int64_t{head} * a.head_dim + p;
  const int64_t state = of.number * ssd_state_size(a) + channel * N;
  copy_tile<1>(base + Tiles::kX, a.x + of.row * a.x_stride + channel, a.x_stride, of.count, 64);
  copy_tile<1>(base + Tiles::kDy, a.dout + of.row * a.dout_stride + channel, a.dout_stride,
               of.count, 64);
  copy_tile<Tiles::kColumns>(base + Tiles::kH, static_cast<const T*>(room.start) + state, N, 64, N);
  copy_tile<Tiles::kColumns>(base + Tiles::kG, static_cast<const T*>(room.end) + state, N, 64, N);
}

// Block: 8 warps, one chunk of one sequence, some heads of a group, one after the other, 64 rows p
// at a time. A warp makes 16 steps and half of the columns of each result.
// Registers: the warp's parts of S, dB and dC.
// Shared: see SsdBackwardTiles. Two blocks on a multiprocessor hide each other's waits.
template <class T, int kStates>
__global__ void __launch_bounds__(kSsdBackwardThreads, kStates <= 128 ? 2 : 1)
    ssd_backward_fused_kernel(SsdBackwardArgs<T> a, SsdBackwardRoom room) {
  using Tiles = SsdBackwardTiles<kStates>;
  const SsdBackwardPart of = ssd_backward_part(a, room);
  float* const of_head = room.of_head + of.number * 6 * a.n_heads;  // two summands
  if (of.count == 0) return nothing_of_heads(of_head, of, a.n_heads);
  extern __shared__ __align__(128) char shared[];
  const uint32_t base = __cvta_generic_to_shared(shared);
  SsdBackwardSums& sums = *reinterpret_cast<SsdBackwardSums*>(shared + Tiles::kSums);
  SsdBackwardSteps* const all_steps = reinterpret_cast<SsdBackwardSteps*>(shared + Tiles::kSteps);
  const int w = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const SsdBackwardWarp warp = {w % 4 * 16, w / 4, lane / 4, lane % 4};
  const auto arrived = [&] {
    copy_async_commit(), copy_async_wait();
    __syncthreads();  // all copies, and what was written before, before what follows reads them
  };
  fetch_group<Tiles>(base, a, of), fetch_head<Tiles>(base, a, room, of, of.first, 0);
  if (w == 7) make_backward_steps(all_steps[0], a, of.block, of.first);
  arrived();
  float S[4][4] = {}, dB[kStates / 16][4] = {}, dC[kStates / 16][4] = {};
  multiply_causal<T, Tiles::kColumns>(S, warp, base + Tiles::kC, base + Tiles::kB);

#pragma unroll 1
  for (int head = of.first, p = 0; head < of.end;) {
    const SsdBackwardSteps& steps = all_steps[(head - of.first) % 2];
    const bool head_ends = p + 64 == a.head_dim;
    const int next = head + head_ends, next_p = head_ends ? 0 : p + 64;
    arrived();
    float dM[4][4] = {}, u[2] = {}, v[2] = {};
    multiply_causal<T, 1>(dM, warp, base + Tiles::kDy, base + Tiles::kX);
    const float dy_x = make_M_and_dS<T>(warp, S, dM, steps, a.D ? a.D[head] : 0.f, base + Tiles::kM,
                                        base + Tiles::kS, sums);
    __syncthreads();  // M and dS before their reads
    multiply_state<T>(dC, u, warp, base + Tiles::kDy, base + Tiles::kH, base + Tiles::kC,
                      steps.decays.carry);
    multiply_masked<T, false>(dC, warp, base + Tiles::kS, base + Tiles::kB);
    multiply_state<T>(dB, v, warp, base + Tiles::kX, base + Tiles::kG, base + Tiles::kB,
                      steps.decays.fade);
    multiply_masked<T, true>(dB, warp, base + Tiles::kS, base + Tiles::kC);
    make_dx<T, Tiles::kColumns>(warp, base + Tiles::kB, base + Tiles::kG, base + Tiles::kM,
                                base + Tiles::kDy, steps.decays.fade,
                                a.dx + of.row * a.dx_stride + int64_t{head} * a.head_dim + p,
                                a.dx_stride, of.count);
    hand_over_sums(sums, warp, u, v,
                   multiply_elements<T>(shared + Tiles::kG, shared + Tiles::kH, Tiles::kBytes),
                   dy_x);
    __syncthreads();  // all sums before they are added; all reads of tiles before they change
    if (next < of.end) {
      fetch_head<Tiles>(base, a, room, of, next, next_p);
      if (w == 7 && head_ends)
        make_backward_steps(all_steps[(next - of.first) % 2], a, of.block, next);
    }
    sum_W_columns(sums, steps);
    __syncthreads();  // the columns before the rows
    finish_backward_steps(a, sums, steps, head, p == 0, head_ends, a.ddt + of.row * a.ddt_stride,
                          of.count, of_head);
    head = next, p = next_p;
  }
  const int64_t stride = int64_t{a.n_groups} * room.parts * a.d_state;
  const int64_t to = of.row * stride + (int64_t{of.group} * room.parts + of.part) * a.d_state;
  store_part<T>(room.dB + to, stride, dB, warp, of.count, a.d_state);
  store_part<T>(room.dC + to, stride, dC, warp, of.count, a.d_state);
}

// --- launchers of the backward

enum class SsdBackwardRung { kNaive, kFused };

// The fastest rung that can do it, as in ssd_rung.
template <class T>
SsdBackwardRung ssd_backward_rung(const SsdBackwardArgs<T>& a) {
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  const bool tiles =
      sizeof(T) == 2 && a.head_dim % 64 == 0 && a.d_state % 8 == 0 && a.d_state <= 256 &&
      (a.x_stride | a.B_stride | a.C_stride | a.dout_stride | a.dx_stride) % 8 == 0 &&
      aligned(a.x) && aligned(a.B) && aligned(a.C) && aligned(a.dout) && aligned(a.dx);
  return tiles ? SsdBackwardRung::kFused : SsdBackwardRung::kNaive;
}

// Into how many parts are the heads of a group split? More fill the GPU, but each makes S anew,
// which costs about as much as kStart heads, and has dB and dC to be added up.
template <class T>
int ssd_backward_parts(const SsdBackwardArgs<T>& a, int64_t chunks) {
  constexpr int64_t kStart = 1;
  const int64_t at_once = (a.d_state <= 128 ? 2 : 1) * multiprocessors();
  const int heads = a.n_heads / a.n_groups;
  int best = 1;
  int64_t least = INT64_MAX;
  for (int parts = 1; parts <= std::min(heads, 16); ++parts) {
    const int64_t cost = ceil_div(a.batch * chunks * a.n_groups * parts, at_once) *
                         (ceil_div(heads, parts) + kStart);
    if (cost < least) least = cost, best = parts;
  }
  return best;
}

// Lays the workspace out; returns its bytes.
template <class T>
size_t ssd_backward_room(const SsdBackwardArgs<T>& a, SsdBackwardRung rung, SsdBackwardRoom& room) {
  const bool naive = rung == SsdBackwardRung::kNaive;
  size_t bytes = 0;
  const auto take = [&](auto*& p, int64_t count, size_t size) {
    p = static_cast<std::remove_reference_t<decltype(p)>>(
        static_cast<void*>(static_cast<char*>(a.workspace) + bytes));
    bytes += ceil_div(count * size, 256) * 256;
  };
  const int64_t state = a.batch * ssd_state_size(a);
  room.chunks = std::max<int64_t>(1, ceil_div(a.L, naive ? kSsdNaiveSteps : kSsdChunk));
  room.parts = naive ? a.n_heads / a.n_groups : ssd_backward_parts(a, room.chunks);
  room.summands = naive ? a.batch : 2 * a.batch * room.chunks;
  take(room.start, state * room.chunks, naive ? sizeof(float) : sizeof(T));
  if (!naive) take(room.end, state * room.chunks, sizeof(T));
  if (naive && !a.dh0) take(room.dh, state, sizeof(float));
  if (naive && a.dh0) room.dh = a.dh0;
  take(room.dB, a.batch * a.L * a.n_groups * room.parts * a.d_state, sizeof(float));
  take(room.dC, a.batch * a.L * a.n_groups * room.parts * a.d_state, sizeof(float));
  take(room.of_head, room.summands * 3 * a.n_heads, sizeof(float));
  return bytes;
}
template <class T>
size_t ssd_backward_workspace_bytes(const SsdBackwardArgs<T>& a, SsdBackwardRung rung) {
  SsdBackwardRoom room;
  return ssd_backward_room(a, rung, room);
}
template <class T>
size_t ssd_backward_workspace_bytes(const SsdBackwardArgs<T>& a) {
  return ssd_backward_workspace_bytes(a, ssd_backward_rung(a));
}

template <class T>
void ssd_backward_naive(const SsdBackwardArgs<T>& a, const SsdBackwardRoom& room,
                        cudaStream_t stream) {
  if (a.d_state > 32 * kSsdNaiveStates)
    fail("ssd_backward: d_state: expected at most ", 32 * kSsdNaiveStates, ", found ", a.d_state);
  const int bytes = 2 * kSsdNaiveWarps * kSsdNaiveSteps * a.d_state * int(sizeof(float));
  CUDA_CHECK(cudaFuncSetAttribute(ssd_backward_naive_kernel<T>,
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  ssd_backward_naive_kernel<<<a.batch * a.n_heads, 32 * kSsdNaiveWarps, bytes, stream>>>(a, room);
  CUDA_CHECK(cudaGetLastError());
}

template <int kStates, class T>
void ssd_backward_fused(const SsdBackwardArgs<T>& a, const SsdBackwardRoom& room,
                        cudaStream_t stream) {
  const auto states = ssd_backward_states_kernel<T, kStates>;
  const auto fused = ssd_backward_fused_kernel<T, kStates>;
  constexpr int kStateBytes = SsdStateTiles<kStates>::kBarriers;
  constexpr int kBytes = SsdBackwardTiles<kStates>::kAll;
  const auto allow = cudaFuncAttributeMaxDynamicSharedMemorySize;
  CUDA_CHECK(cudaFuncSetAttribute(states, allow, kStateBytes));
  CUDA_CHECK(cudaFuncSetAttribute(fused, allow, kBytes));
  const dim3 rows(unsigned(a.batch * a.n_heads * a.head_dim / 64), 2);
  states<<<rows, kSsdStateThreads<kStates>, kStateBytes, stream>>>(a, room);
  CUDA_CHECK(cudaGetLastError());
  const int64_t blocks = a.batch * room.chunks * a.n_groups * room.parts;
  fused<<<blocks, kSsdBackwardThreads, kBytes, stream>>>(a, room);
  CUDA_CHECK(cudaGetLastError());
}

template <class T>
void ssd_backward_sum(const SsdBackwardArgs<T>& a, const SsdBackwardRoom& room,
                      cudaStream_t stream) {
  const int64_t numbers = a.batch * a.L * a.n_groups * a.d_state;
  if (numbers > 0)
    ssd_backward_sum_heads_kernel<<<ceil_div(numbers, 256), 256, 0, stream>>>(a, room);
  ssd_backward_sum_batch_kernel<<<ceil_div(3 * a.n_heads, 8), 256, 0, stream>>>(a, room);
  CUDA_CHECK(cudaGetLastError());
}

template <class T>
void ssd_backward(const SsdBackwardArgs<T>& a, SsdBackwardRung rung, cudaStream_t stream) {
  if (a.batch == 0 || a.n_heads == 0) return;
  SsdBackwardRoom room;
  ssd_backward_room(a, rung, room);
  if (rung == SsdBackwardRung::kNaive) ssd_backward_naive(a, room, stream);
  if constexpr (sizeof(T) == 2)
    if (rung == SsdBackwardRung::kFused) {
      if (a.d_state <= 64)
        ssd_backward_fused<64>(a, room, stream);
      else if (a.d_state <= 128)
        ssd_backward_fused<128>(a, room, stream);
      else
        ssd_backward_fused<256>(a, room, stream);
    }
  ssd_backward_sum(a, room, stream);
}
template <class T>
void ssd_backward(const SsdBackwardArgs<T>& a, cudaStream_t stream) {
  ssd_backward(a, ssd_backward_rung(a), stream);
}

// --- sums over rows ------------------------------------------------------------------------------
//
// A weight's gradient is a sum over all rows of all sequences. Each block leaves its part of it,
// and the parts are then added up in order: the same bits on every run.

// Columns [0, split) are added to `to`, the others to `rest`; either may be null.
struct ColumnSums {
  const float* parts;  // (rows, columns)
  int64_t rows, columns;
  float* to;
  int64_t split;
  float* rest;
};

// Each of the 8 warps of a block takes every eighth row of 32 columns. Grid: columns.
static __global__ void __launch_bounds__(256) add_column_sums_kernel(ColumnSums a) {
  __shared__ float of_warp[8][32];
  wait_for_previous();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t c = int64_t(blockIdx.x) * 32 + lane;
  float sum = 0.f;
#pragma unroll 8
  for (int64_t r = warp; r < a.rows; r += 8)
    sum += c < a.columns ? a.parts[r * a.columns + c] : 0.f;
  of_warp[warp][lane] = sum;
  __syncthreads();  // all warps' sums are there before they are added
  float* const to = c < a.split ? a.to : a.rest;
  if (warp > 0 || c >= a.columns || !to) return;
  for (int i = 1; i < 8; ++i) sum += of_warp[i][lane];
  to[c < a.split ? c : c - a.split] += sum;
}
inline void add_column_sums(const ColumnSums& a, cudaStream_t stream) {
  if (a.rows * a.columns == 0) return;
  launch_early(add_column_sums_kernel, dim3(unsigned(ceil_div(a.columns, 32))), 256, 0, stream, a);
}

// Rows that a block sums up where its grid is one of pieces of rows: all blocks together fill a GPU
// several times, and there are at most kMostParts parts to add up.
constexpr int64_t kMostParts = 1024;
inline int64_t rows_of_part(int64_t rows) {
  return std::max<int64_t>(1, ceil_div(rows, kMostParts));
}
inline int64_t count_parts(int64_t rows) { return ceil_div(rows, rows_of_part(rows)); }

// parts (parts, d) = sums over runs of `each` rows of dy.  Grid: channels, parts.
template <class T>
__global__ void __launch_bounds__(128)
    bias_backward_kernel(const T* dy, int64_t stride, int64_t rows, int64_t each, int64_t d,
                         float* parts) {
  const int64_t c = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (c >= d) return;
  const int64_t begin = blockIdx.y * each, end = min(rows, begin + each);
  float sum = 0.f;
#pragma unroll 4
  for (int64_t t = begin; t < end; ++t) sum += to_float(dy[t * stride + c]);
  parts[blockIdx.y * d + c] = sum;
}
// dbias (d) += the sum over the rows of dy.
template <class T>
void bias_backward(const T* dy, int64_t stride, int64_t rows, int64_t d, float* dbias,
                   float* workspace, cudaStream_t stream) {
  if (rows * d == 0) return;
  const dim3 grid(unsigned(ceil_div(d, 128)), unsigned(count_parts(rows)));
  bias_backward_kernel<<<grid, 128, 0, stream>>>(dy, stride, rows, rows_of_part(rows), d,
                                                 workspace);
  CUDA_CHECK(cudaGetLastError());
  add_column_sums({workspace, count_parts(rows), d, dbias, d, nullptr}, stream);
}

// Floats of workspace for bias_backward, rms_norm_backward and gated_rms_norm_backward.
inline int64_t row_parts(int64_t rows, int64_t d) { return count_parts(rows) * d; }

// silu(x) = x s and its derivative s + x s (1 - s), s = 1 / (1 + e^-x): e^-x may be infinite, s is
// then 0.
struct SiluPoint {
  float value, slope;
};
__device__ inline SiluPoint silu_point(float x) {
  const float s = reciprocal_approx(1.f + exp2_approx(-kLog2e * x)), value = x * s;
  return {value, fmaf(value, 1.f - s, s)};
}

// --- causal convolution --------------------------------------------------------------------------
//
//   s[t]       = bias + sum_k weight[k] x[t - (width - 1) + k]       out[t] = act(s[t])
//   ds[t]      = dout[t] act'(s[t])                                  0 outside of the sequence
//   dx[t]      = sum_k weight[k] ds[t + (width - 1) - k]
//   dweight[k] = sum_t ds[t] x[t - (width - 1) + k]                  dbias = sum_t ds[t]
//
// x begins with the width - 1 rows of the state: their dx is dstate. The last width - 1 rows of
// state and x are the next state: its gradient dstate_out is added to their dx.

template <class T>
struct ConvBackwardArgs {
  ConvArgs<T> in;                              // out and state_out are not used
  const T* dout = nullptr;                     // (batch L, d)
  const float* dstate_out = nullptr;           // (batch, width - 1, d) or null
  T* dx = nullptr;                             // (batch L, d)
  float *dweight = nullptr, *dbias = nullptr;  // (d, width); (d) or null; added to
  float* dstate = nullptr;                     // (batch, width - 1, d) or null; not dstate_out
  int64_t dout_stride = 0, dx_stride = 0;
};

// A warp owns 32 kVector neighbouring channels and some rows of them. It walks them forwards, a
// window of x and one of ds sliding through registers: s[t] needs the last width inputs, dx[t] is
// complete when ds[t + width - 1] is there. So a warp begins with the width - 1 inputs before its
// rows and goes on for width - 1 steps after them. x and dout are asked for kConvAhead rows before
// their step. dweight and dbias stay in registers; a block adds up those of its warps, which are
// neighbours in time. Grid as in the forward kernel.
constexpr int kConvAhead = 4;

// Blocks on a multiprocessor at once, see kConvBlocks.
template <class T>
constexpr int kConvBackwardBlocks = sizeof(T) == 2 ? 4 : 3;

// dx of row p of x, p >= -(width - 1): before the sequence it is that of the state.
template <int kVector, class T>
__device__ inline void store_conv_dx(const ConvBackwardArgs<T>& a, int64_t b, const Rows& rows,
                                     int64_t d, int64_t p, float (&dx)[kVector]) {
  const int64_t past = a.in.width - 1, kept = p - (rows.count - past);  // row of the next state
  if (a.dstate_out && kept >= 0)
    for (int i = 0; i < kVector; ++i) dx[i] += a.dstate_out[(b * past + kept) * a.in.d + d + i];
  if (p >= 0) return store(a.dx + (rows.first + p) * a.dx_stride + d, pack<T>(dx));
  if (a.dstate && p >= -past) store(a.dstate + (b * past + past + p) * a.in.d + d, pack<float>(dx));
}

// What a thread holds of kVector channels.
template <int kWidth, int kVector>
struct ConvWindows {
  float weight[kVector][kWidth], bias[kVector];
  float x[kWidth][kVector], ds[kWidth][kVector];  // of the last kWidth steps
  float dweight[kVector][kWidth] = {}, dbias[kVector] = {};

  // One step: x[kWidth - 1] and dout have arrived -> dx of kWidth - 1 steps before. `activate` is 1
  // or 0: a branch would keep the channels' exponentials from running side by side. `own`: the step
  // is one of the warp's rows.
  __device__ void step(const float (&dout)[kVector], float activate, bool own,
                       float (&dx)[kVector]) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      float s = bias[i], sum = 0.f;
#pragma unroll
      for (int k = 0; k < kWidth; ++k) s = fmaf(weight[i][k], x[k][i], s);
      const float now = dout[i] * fmaf(activate, silu_point(s).slope, 1.f - activate);
      const float of_own = own ? now : 0.f;
      ds[kWidth - 1][i] = now, dbias[i] += of_own;
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        dweight[i][k] = fmaf(of_own, x[k][i], dweight[i][k]);
        sum = fmaf(weight[i][k], ds[kWidth - 1 - k][i], sum);
      }
      dx[i] = sum;
#pragma unroll
      for (int k = 0; k + 1 < kWidth; ++k) x[k][i] = x[k + 1][i], ds[k][i] = ds[k + 1][i];
    }
  }
};

// The sums of a block's warps, added up in order -> parts (part, [dweight (d, width), dbias (d)]).
template <int kWidth, int kVector, class T>
__device__ inline void store_conv_part(const ConvBackwardArgs<T>& a,
                                       const ConvWindows<kWidth, kVector>& w, int64_t part,
                                       int64_t d, float* parts) {
  constexpr int kSums = kVector * (kWidth + 1);
  __shared__ float sums[kConvWarps][kSums][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) sums[warp][i * (kWidth + 1) + k][lane] = w.dweight[i][k];
    sums[warp][i * (kWidth + 1) + kWidth][lane] = w.dbias[i];
  }
  __syncthreads();  // all warps' sums are there before they are added
  if (warp > 0 || d >= a.in.d) return;
  float* const to = parts + part * a.in.d * (a.in.width + 1);
#pragma unroll
  for (int j = 0; j < kSums; ++j) {
    float sum = sums[0][j][lane];
    for (int i = 1; i < kConvWarps; ++i) sum += sums[i][j][lane];
    const int64_t channel = d + j / (kWidth + 1);
    const int k = j % (kWidth + 1), tap = k - (kWidth - a.in.width);
    if (k == kWidth) to[a.in.d * a.in.width + channel] = sum;
    if (k < kWidth && tap >= 0) to[channel * a.in.width + tap] = sum;
  }
}

template <class T, int kWidth, int kVector>
__global__ void __launch_bounds__(32 * kConvWarps, kConvBackwardBlocks<T>)
    causal_conv1d_backward_kernel(ConvBackwardArgs<T> a, unsigned blocks, unsigned pieces,
                                  int rows_of_warp, float* parts) {
  const int64_t part = blockIdx.x / blocks, b = part / pieces;
  const int64_t d = kVector * (blockIdx.x % blocks * 32 + threadIdx.x % 32);
  const int64_t begin = (part % pieces * kConvWarps + threadIdx.x / 32) * rows_of_warp;
  const Rows rows = rows_of(b, a.in.L, a.in.cu_seqlens);
  const int64_t end = min(begin + rows_of_warp, rows.count);
  ConvWindows<kWidth, kVector> w;
  const bool exists = d < a.in.d && (begin < rows.count || begin == 0);
  if (exists) {
    load_taps(a.in, d, w.weight, w.bias);
#pragma unroll
    for (int k = 0; k + 1 < kWidth; ++k) {
      const int64_t t = begin - (kWidth - 1) + k;
      const bool known = t >= -(a.in.width - 1) && t < rows.count;
      unpack(known ? conv_input<kVector>(a.in, b, rows, t, d) : Vector<T, kVector>{}, w.x[k]);
      for (int i = 0; i < kVector; ++i) w.ds[k][i] = 0.f;
    }
  }
  // From here on rows count from `begin`: n of its own, of which and of the next it reads `stop`.
  const int n = int(end - begin), stop = int(min(end + kWidth - 1, rows.count) - begin);
  const T* x = a.in.x + (rows.first + begin) * a.in.x_stride + d;  // the next row to ask for
  const T* dout = a.dout + (rows.first + begin) * a.dout_stride + d;
  T* to = a.dx + (rows.first + begin - (kWidth - 1)) * a.dx_stride + d;  // of the next dx
  const bool with_state = a.dstate_out || (a.dstate && begin == 0);
  const float activate = a.in.activate ? 1.f : 0.f;
  Vector<T, kVector> x_ahead[kConvAhead], dout_ahead[kConvAhead];
  const auto fetch = [&](int r, bool some) {
    x_ahead[r] = load<kVector>(x, some);
    dout_ahead[r] = load<kVector>(dout, some);
    x += a.in.x_stride, dout += a.dout_stride;
  };
#pragma unroll
  for (int r = 0; r < kConvAhead; ++r) fetch(r, exists && r < stop);
  // kWidth steps from `first` on. `plain`: their rows, and those asked for meanwhile, are the warp's
  // own and none is a state's: no choices, so that the steps overlap.
  const auto steps = [&](auto plain, int first) {
    constexpr bool kPlain = decltype(plain)::value;
#pragma unroll
    for (int r = 0; r < kWidth; ++r) {
      const int t = first + r, p = t - (kWidth - 1);
      float dout_t[kVector], dx[kVector];
      unpack(x_ahead[r % kConvAhead], w.x[kWidth - 1]);
      unpack(dout_ahead[r % kConvAhead], dout_t);
      fetch(r % kConvAhead, kPlain || t + kConvAhead < stop);
      w.step(dout_t, activate, kPlain || t < n, dx);
      if (!kPlain && with_state && (p >= 0 || begin == 0) && p < n)
        store_conv_dx<kVector>(a, b, rows, d, begin + p, dx);
      else if (kPlain || (p >= 0 && p < n))
        store(to, pack<T>(dx));
      to += a.dx_stride;
    }
  };
  for (int first = 0; exists && first < n + kWidth - 1; first += kWidth)
    if (!with_state && first >= kWidth - 1 && first + kWidth + kConvAhead <= n)
      steps(std::true_type(), first);
    else
      steps(std::false_type(), first);
  store_conv_part(a, w, part, d, parts);
}

// Grid: blocks of channels times pieces of a sequence, as many as take the least time if the GPU
// works on `at_once` of them, then on as many more: a few left over would have it to themselves.
// What a block does before its first row and after its last takes as long as ten rows.
struct ConvBackwardGrid {
  bool aligned;  // four channels can be read at a time
  int64_t blocks, pieces;
  int rows_of_warp;
};
template <class T>
ConvBackwardGrid conv_backward_grid(const ConvBackwardArgs<T>& a) {
  const ConvArgs<T>& in = a.in;
  const bool aligned = in.width == 4 && aligned4(in.x, in.x_stride) && aligned4(in.state, in.d) &&
                       aligned4(in.weight, 4) && aligned4(in.bias, 4) &&
                       aligned4(a.dout, a.dout_stride) && aligned4(a.dx, a.dx_stride) &&
                       aligned4(a.dstate, in.d);
  ConvBackwardGrid best{aligned, ceil_div(in.d, (aligned ? 4 : 1) * 32), 0, 0};
  const int64_t at_once = kConvBackwardBlocks<T> * multiprocessors();
  const int64_t all = std::max<int64_t>(1, best.blocks * in.batch);
  const int64_t most = std::max<int64_t>(1, 8 * at_once / all);
  int64_t least = std::numeric_limits<int64_t>::max();
  for (int64_t pieces = 1; pieces <= most; ++pieces) {
    const int64_t rows = std::max<int64_t>(8, ceil_div(in.L, kConvWarps * pieces));
    const int64_t time = ceil_div(all * pieces, at_once) * (rows + 10);
    if (time < least) least = time, best.pieces = pieces, best.rows_of_warp = int(rows);
  }
  best.pieces = std::max<int64_t>(1, ceil_div(in.L, kConvWarps * best.rows_of_warp));
  return best;
}
// Bytes of workspace that causal_conv1d_backward needs.
template <class T>
size_t causal_conv1d_backward_workspace(const ConvBackwardArgs<T>& a) {
  return sizeof(float) * a.in.batch * conv_backward_grid(a).pieces * a.in.d * (a.in.width + 1);
}

template <class T>
void causal_conv1d_backward(const ConvBackwardArgs<T>& a, float* workspace, cudaStream_t stream) {
  const ConvArgs<T>& in = a.in;
  if (in.width < 2 || in.width > 8)
    fail("causal_conv1d_backward: width: expected 2 to 8, found ", in.width);
  if (in.batch * in.d == 0) return;
  const ConvBackwardGrid grid = conv_backward_grid(a);
  const int64_t parts = in.batch * grid.pieces;
  const auto kernel = grid.aligned    ? causal_conv1d_backward_kernel<T, 4, 4>
                      : in.width <= 4 ? causal_conv1d_backward_kernel<T, 4, 1>
                                      : causal_conv1d_backward_kernel<T, 8, 1>;
  kernel<<<unsigned(parts * grid.blocks), 32 * kConvWarps, 0, stream>>>(
      a, unsigned(grid.blocks), unsigned(grid.pieces), grid.rows_of_warp, workspace);
  CUDA_CHECK(cudaGetLastError());
  const int64_t weights = in.d * in.width;
  add_column_sums({workspace, parts, weights + in.d, a.dweight, weights, a.dbias}, stream);
}

// --- norms ---------------------------------------------------------------------------------------
//
//   out = v s weight, s = 1 / sqrt(mean(v^2) + eps)       v: the residual, or y silu(z) of a group
//   dv  = s (weight dout) - v s^3 mean(v weight dout)     dweight = sum over rows of dout v s
//
// One block takes some rows, one after the other, and of gated_rms_norm one group of channels;
// dweight stays in shared memory, each number with the thread that adds to it. A row is read twice,
// the second time from the cache.

// The sums of both numbers over a block of kThreads threads.
template <int kThreads>
__device__ inline void block_sums(float& a, float& b) {
  __shared__ float of_warp[2][kThreads / 32];
  a = warp_sum(a), b = warp_sum(b);
  __syncthreads();  // the last call's sums have been read before these are written
  if (threadIdx.x % 32 == 0) of_warp[0][threadIdx.x / 32] = a, of_warp[1][threadIdx.x / 32] = b;
  __syncthreads();  // the warps' sums are written before they are added
  a = of_warp[0][0], b = of_warp[1][0];
  for (int i = 1; i < kThreads / 32; ++i) a += of_warp[0][i], b += of_warp[1][i];
}

// dv = scale weight dout - back v
struct NormSlopes {
  float scale, back;
};
template <int kThreads>
__device__ inline NormSlopes norm_slopes(float squares, float along, int d, float eps) {
  block_sums<kThreads>(squares, along);
  const float scale = rsqrtf(squares / d + eps);
  return {scale, scale * scale * scale * (along / d)};
}

// The first pass over a row: sums of v^2 and of v weight dout, v_of(v, i) giving v[i .. i + 4).
template <class T, class Values>
__device__ inline NormSlopes norm_slopes_of_row(const T* dout, const float* weight, int d,
                                                float eps, const Values& v_of) {
  float squares = 0.f, along = 0.f;
  for (int i = 4 * threadIdx.x; i < d; i += 4 * kNormThreads) {
    float v[4], w[4], g[4];
    v_of(v, i), load4(w, weight + i), load4(g, dout + i);
    squares += sum_of_squares(v);
    for (int k = 0; k < 4; ++k) along = fmaf(v[k], w[k] * g[k], along);
  }
  return norm_slopes<kNormThreads>(squares, along, d, eps);
}

// The second: dv[i .. i + 4), and dweight.
template <class T, class Values, class Function>
__device__ inline void norm_gradients_of_row(const T* dout, const float* weight, int d,
                                             const NormSlopes& s, float* dweight,
                                             const Values& v_of, const Function& take_dv) {
  for (int i = 4 * threadIdx.x; i < d; i += 4 * kNormThreads) {
    float v[4], w[4], g[4], sum[4];
    v_of(v, i), load4(w, weight + i), load4(g, dout + i), load4(sum, dweight + i);
    for (int k = 0; k < 4; ++k) {
      sum[k] = fmaf(g[k], v[k] * s.scale, sum[k]);
      v[k] = s.scale * w[k] * g[k] - s.back * v[k];
    }
    store(dweight + i, pack<float>(sum));
    take_dv(v, i);
  }
}

// Each thread begins with zeros in its own numbers of a row in shared memory, and ends by leaving
// them in `to`.
__device__ inline void zero_row(float* row, int d) {
  for (int i = 4 * threadIdx.x; i < d; i += 4 * kNormThreads) store(row + i, Vector<float, 4>{});
}
__device__ inline void leave_row(const float* row, int d, float* to) {
  for (int i = 4 * threadIdx.x; i < d; i += 4 * kNormThreads) store(to + i, load<4>(row + i, true));
}

template <class T>
struct NormBackwardArgs {
  int64_t rows = 0;
  int d = 0;
  float eps = 0;
  const float* residual = nullptr;  // (rows, d)
  const float* weight = nullptr;    // (d)
  const T* dout = nullptr;          // (rows, d)
  float* d_residual = nullptr;      // (rows, d), added to
  T* rounded = nullptr;             // (rows, d) the same as T, or null; may be dout
  float* dweight = nullptr;         // (d), added to
};

template <class T>
__global__ void __launch_bounds__(kNormThreads)
    rms_norm_backward_kernel(NormBackwardArgs<T> a, int64_t each, float* parts) {
  extern __shared__ __align__(16) float dweight_row[];
  zero_row(dweight_row, a.d);
  const int64_t end = min(a.rows, (blockIdx.x + int64_t{1}) * each);
  for (int64_t row = blockIdx.x * each; row < end; ++row) {
    const float* residual = a.residual + row * a.d;
    const T* dout = a.dout + row * a.d;
    const auto v_of = [&](float(&v)[4], int i) { load4(v, residual + i); };
    const NormSlopes s = norm_slopes_of_row(dout, a.weight, a.d, a.eps, v_of);
    const auto take_dv = [&](const float(&dv)[4], int i) {
      float* const to = a.d_residual + row * a.d + i;
      float sum[4];
      load4(sum, to);
      for (int k = 0; k < 4; ++k) sum[k] += dv[k];
      store(to, pack<float>(sum));
      if (a.rounded) store(a.rounded + row * a.d + i, pack<T>(sum));
    };
    norm_gradients_of_row(dout, a.weight, a.d, s, dweight_row, v_of, take_dv);
  }
  leave_row(dweight_row, a.d, parts + int64_t{blockIdx.x} * a.d);
}

// workspace: row_parts(rows, d) floats.
template <class T>
void rms_norm_backward(const NormBackwardArgs<T>& a, float* workspace, cudaStream_t stream) {
  if (a.d % 4) fail("rms_norm_backward: width: expected a multiple of 4, found ", a.d);
  if (a.rows == 0) return;
  const int64_t parts = count_parts(a.rows);
  rms_norm_backward_kernel<<<unsigned(parts), kNormThreads, a.d * sizeof(float), stream>>>(
      a, rows_of_part(a.rows), workspace);
  CUDA_CHECK(cudaGetLastError());
  add_column_sums({workspace, parts, a.d, a.dweight, a.d, nullptr}, stream);
}

// layer_norm: v is the residual less its mean, and dv less its own: mean(dv) = s mean(weight dout),
// for v has none. A number a thread at a time.
template <class T>
__global__ void __launch_bounds__(kNormThreads)
    layer_norm_backward_kernel(NormBackwardArgs<T> a, int64_t each, float* parts) {
  extern __shared__ __align__(16) float dweight_row[];
  for (int i = threadIdx.x; i < a.d; i += kNormThreads) dweight_row[i] = 0.f;
  const int64_t end = min(a.rows, (blockIdx.x + int64_t{1}) * each);
  for (int64_t row = blockIdx.x * each; row < end; ++row) {
    const float* const x = a.residual + row * a.d;
    float* const to = a.d_residual + row * a.d;
    float sum = 0.f, slopes = 0.f, squares = 0.f, along = 0.f;
    const auto slope = [&](int i) { return a.weight[i] * to_float(a.dout[row * a.d + i]); };
    for (int i = threadIdx.x; i < a.d; i += kNormThreads) sum += x[i], slopes += slope(i);
    block_sums<kNormThreads>(sum, slopes);
    const float mean = sum / a.d, mean_slope = slopes / a.d;
    for (int i = threadIdx.x; i < a.d; i += kNormThreads) {
      const float v = x[i] - mean;
      squares = fmaf(v, v, squares), along = fmaf(v, slope(i), along);
    }
    const NormSlopes s = norm_slopes<kNormThreads>(squares, along, a.d, a.eps);
    for (int i = threadIdx.x; i < a.d; i += kNormThreads) {
      const float v = x[i] - mean;
      const float dv = s.scale * (slope(i) - mean_slope) - s.back * v;
      dweight_row[i] = fmaf(to_float(a.dout[row * a.d + i]), v * s.scale, dweight_row[i]);
      to[i] += dv;
      if (a.rounded) a.rounded[row * a.d + i] = from_float<T>(to[i]);
    }
  }
  for (int i = threadIdx.x; i < a.d; i += kNormThreads)
    parts[int64_t{blockIdx.x} * a.d + i] = dweight_row[i];
}
// workspace as above; the gradient of the bias is bias_backward's.
template <class T>
void layer_norm_backward(const NormBackwardArgs<T>& a, float* workspace, cudaStream_t stream) {
  if (a.rows == 0) return;
  const int64_t parts = count_parts(a.rows);
  layer_norm_backward_kernel<<<unsigned(parts), kNormThreads, a.d * sizeof(float), stream>>>(
      a, rows_of_part(a.rows), workspace);
  CUDA_CHECK(cudaGetLastError());
  add_column_sums({workspace, parts, a.d, a.dweight, a.d, nullptr}, stream);
}

// y, z, dout, dy, dz (rows, d), their rows so far apart; the mean square is that of each of
// `groups` equal runs of channels.
template <class T>
struct GatedNormBackwardArgs {
  int64_t rows = 0;
  int d = 0, groups = 1;
  float eps = 0;
  const T *y = nullptr, *z = nullptr, *dout = nullptr;
  const float* weight = nullptr;  // (d)
  T *dy = nullptr, *dz = nullptr;
  float* dweight = nullptr;  // (d), added to
  int64_t y_stride = 0, z_stride = 0, dout_stride = 0, dy_stride = 0, dz_stride = 0;
};

template <class T>
__global__ void __launch_bounds__(kNormThreads)
    gated_rms_norm_backward_kernel(GatedNormBackwardArgs<T> a, int64_t each, float* parts) {
  extern __shared__ __align__(16) float dweight_row[];
  const int width = a.d / a.groups;
  const int64_t first = int64_t{blockIdx.y} * width;
  const float* weight = a.weight + first;
  zero_row(dweight_row, width);
  const int64_t end = min(a.rows, (blockIdx.x + int64_t{1}) * each);
  for (int64_t row = blockIdx.x * each; row < end; ++row) {
    const T *y = a.y + row * a.y_stride + first, *z = a.z + row * a.z_stride + first;
    const T* dout = a.dout + row * a.dout_stride + first;
    const auto v_of = [&](float(&v)[4], int i) {
      float gate[4];
      load4(v, y + i), load4(gate, z + i);
      for (int k = 0; k < 4; ++k) v[k] *= silu(gate[k]);
    };
    const NormSlopes s = norm_slopes_of_row(dout, weight, width, a.eps, v_of);
    const auto take_dv = [&](const float(&dv)[4], int i) {
      float dy[4], dz[4];
      load4(dy, y + i), load4(dz, z + i);
      for (int k = 0; k < 4; ++k) {
        const SiluPoint gate = silu_point(dz[k]);
        dz[k] = dv[k] * dy[k] * gate.slope, dy[k] = dv[k] * gate.value;
      }
      store(a.dy + row * a.dy_stride + first + i, pack<T>(dy));
      store(a.dz + row * a.dz_stride + first + i, pack<T>(dz));
    };
    norm_gradients_of_row(dout, weight, width, s, dweight_row, v_of, take_dv);
  }
  leave_row(dweight_row, width, parts + int64_t{blockIdx.x} * a.d + first);
}

// workspace: row_parts(rows, d) floats.
template <class T>
void gated_rms_norm_backward(const GatedNormBackwardArgs<T>& a, float* workspace,
                             cudaStream_t stream) {
  const int width = a.d / a.groups;
  if (width % 4) fail("gated_rms_norm_backward: group: expected a multiple of 4, found ", width);
  if (a.rows == 0) return;
  const dim3 grid(unsigned(count_parts(a.rows)), unsigned(a.groups));
  gated_rms_norm_backward_kernel<<<grid, kNormThreads, width * sizeof(float), stream>>>(
      a, rows_of_part(a.rows), workspace);
  CUDA_CHECK(cudaGetLastError());
  add_column_sums({workspace, grid.x, a.d, a.dweight, a.d, nullptr}, stream);
}

// --- causal attention ----------------------------------------------------------------------------
//
//   p[t,s]   = 2^(S[t,s] - log_sums_t)            S in units of log 2, as in the forward
//   dv_s     = sum_t p[t,s] dout_t                dp[t,s] = dout_t . v_s
//   dS[t,s]  = p[t,s] (dp[t,s] - dout_t . out_t)
//   dq_t     = sum_s dS[t,s] k_s / sqrt(P)        dk_s    = sum_t dS[t,s] q_t / sqrt(P)
//
// p is made again from the forward's log_sums, once by the owners of queries and once by those of
// keys, so that every sum has one owner. There is no past: training begins texts anew.

template <class T>
struct AttentionBackwardArgs {
  AttentionArgs<T> in;                            // with out and log_sums; without a cache
  const T* dout = nullptr;                        // (batch L, n_heads head_dim)
  T *dq = nullptr, *dk = nullptr, *dv = nullptr;  // as q, keys, values
  float* along = nullptr;                         // (batch L, n_heads) room for dout . out
  int64_t dout_stride = 0, d_stride = 0;          // d_stride: of dq, dk and dv
};

// A warp's numbers of a row: lane l has l, l + 32, ..
constexpr int kAttentionNumbers = kMostHeadDim / 32;
template <class T>
__device__ inline void load_row(const T* p, int n, float (&v)[kAttentionNumbers]) {
#pragma unroll
  for (int i = 0; i < kAttentionNumbers; ++i) {
    const int c = threadIdx.x % 32 + 32 * i;
    v[i] = c < n ? to_float(p[c]) : 0.f;
  }
}
template <class T>
__device__ inline void store_row(T* p, int n, float scale, const float (&v)[kAttentionNumbers]) {
#pragma unroll
  for (int i = 0; i < kAttentionNumbers; ++i)
    if (const int c = threadIdx.x % 32 + 32 * i; c < n) p[c] = from_float<T>(scale * v[i]);
}
__device__ inline float row_dot(const float (&a)[kAttentionNumbers],
                                const float (&b)[kAttentionNumbers]) {
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < kAttentionNumbers; ++i) sum = fmaf(a[i], b[i], sum);
  return warp_sum(sum);
}
__device__ inline void row_add(float (&sum)[kAttentionNumbers], float scale,
                               const float (&v)[kAttentionNumbers]) {
#pragma unroll
  for (int i = 0; i < kAttentionNumbers; ++i) sum[i] = fmaf(scale, v[i], sum[i]);
}

// along = dout . out. A warp takes a query of a head. Grid of this kernel and the next: x =
// queries, 4 a block, y = heads, z = sequences.
template <class T>
__global__ void __launch_bounds__(128)
    causal_attention_backward_along_kernel(AttentionBackwardArgs<T> a) {
  const AttentionArgs<T>& in = a.in;
  const int64_t t = int64_t{blockIdx.x} * 4 + threadIdx.x / 32, head = blockIdx.y;
  const Rows rows = rows_of(blockIdx.z, in.L, in.cu_seqlens);
  if (t >= rows.count) return;
  const int64_t row = rows.first + t, column = head * in.head_dim;
  float out[kAttentionNumbers], dout[kAttentionNumbers];
  load_row(in.out + row * in.out_stride + column, in.head_dim, out);
  load_row(a.dout + row * a.dout_stride + column, in.head_dim, dout);
  const float along = row_dot(dout, out);
  if (threadIdx.x % 32 == 0) a.along[row * in.n_heads + head] = along;
}

// A warp owns a query of a head: dq_t.
template <class T>
__global__ void __launch_bounds__(128)
    causal_attention_backward_queries_kernel(AttentionBackwardArgs<T> a) {
  const AttentionArgs<T>& in = a.in;
  const int64_t b = blockIdx.z, t = int64_t{blockIdx.x} * 4 + threadIdx.x / 32;
  const int head = blockIdx.y, P = in.head_dim;
  const Rows rows = rows_of(b, in.L, in.cu_seqlens);
  if (t >= rows.count) return;
  const int64_t row = rows.first + t, column = int64_t{head} * P, i = row * in.n_heads + head;
  const int64_t first = in.first_key(b, rows, head);
  float q[kAttentionNumbers], dout[kAttentionNumbers], dq[kAttentionNumbers] = {};
  load_row(in.q + row * in.q_stride + column, P, q);
  load_row(a.dout + row * a.dout_stride + column, P, dout);
  for (int64_t s = 0; s <= t; ++s) {
    float k[kAttentionNumbers], v[kAttentionNumbers];
    load_row(in.keys + first + s * in.kv_stride, P, k);
    load_row(in.values + first + s * in.kv_stride, P, v);
    const float p = exp2_approx(in.scale() * row_dot(q, k) - in.log_sums[i]);
    row_add(dq, p * (row_dot(dout, v) - a.along[i]), k);
  }
  store_row(a.dq + row * a.d_stride + column, P, rsqrtf(float(P)), dq);
}

// A warp owns a key and its value: the sums over the queries of all heads that share them. Grid: x
// = keys, 4 a block, y = heads of keys, z = sequences.
template <class T>
__global__ void __launch_bounds__(128)
    causal_attention_backward_keys_kernel(AttentionBackwardArgs<T> a) {
  const AttentionArgs<T>& in = a.in;
  const int64_t b = blockIdx.z, s = int64_t{blockIdx.x} * 4 + threadIdx.x / 32;
  const int P = in.head_dim, shared = in.n_heads / in.n_kv_heads;
  const Rows rows = rows_of(b, in.L, in.cu_seqlens);
  if (s >= rows.count) return;
  const int64_t place = in.first_key(b, rows, blockIdx.y * shared) + s * in.kv_stride;
  float k[kAttentionNumbers], v[kAttentionNumbers];
  float dk[kAttentionNumbers] = {}, dv[kAttentionNumbers] = {};
  load_row(in.keys + place, P, k), load_row(in.values + place, P, v);
  for (int head = blockIdx.y * shared; head < int(blockIdx.y + 1) * shared; ++head)
    for (int64_t row = rows.first + s; row < rows.first + rows.count; ++row) {
      float q[kAttentionNumbers], dout[kAttentionNumbers];
      load_row(in.q + row * in.q_stride + int64_t{head} * P, P, q);
      load_row(a.dout + row * a.dout_stride + int64_t{head} * P, P, dout);
      const int64_t i = row * in.n_heads + head;
      const float p = exp2_approx(in.scale() * row_dot(q, k) - in.log_sums[i]);
      row_add(dv, p, dout);
      row_add(dk, p * (row_dot(dout, v) - a.along[i]), q);
    }
  const int64_t to = (rows.first + s) * a.d_stride + int64_t{blockIdx.y} * P;
  store_row(a.dk + to, P, rsqrtf(float(P)), dk), store_row(a.dv + to, P, 1.f, dv);
}

// Since the rung before: tensor cores, for what the forward's fused kernel takes. A block owns 64
// rows, queries of a head or keys and values that heads share, and walks the others, 64 at a time:
//   kOfQueries   own q, dout;  others k, v     S = q k^T,  dP = dout v^T,  dq += dS k
//   else         own k, v;     others q, dout  the transposes of both,     dk += dS q, dv += p dout
// Both kernels make S and dP: no sum has two owners, so no atomics. Shared and registers as in the
// forward, with two tiles of own rows. Grid: x = blocks of rows, the longest first, y = heads, of
// keys if not kOfQueries, z = sequences.
template <int kColumns>
constexpr int kAttentionBackwardBytes = 6 * AttentionTiles<kColumns>::kTile;

// A warp's 16 rows times `scale` -> p, those of the rows that exist.
template <class T, int kTiles>
__device__ inline void store_rows(T* p, int64_t stride, int64_t left, int head_dim, float scale,
                                  const float (&v)[kTiles][4]) {
  const int g = threadIdx.x % 32 / 4;
#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
      if (const int c = 8 * j + threadIdx.x % 4 * 2; g + 8 * h < left && c < head_dim)
        store(p + (g + 8 * h) * stride + c,
              pack<T>({scale * v[j][2 * h], scale * v[j][2 * h + 1]}));
}

// S -> p and dP -> dS of a warp's 16 rows from `row` on and the 64 columns from `column` on; zeros
// where a query does not see a key.
template <bool kOfQueries, class T>
__device__ inline void softmax_backward(float (&p)[8][4], float (&dS)[8][4],
                                        const AttentionBackwardArgs<T>& a, const Rows& rows,
                                        int64_t head, int64_t row, int64_t column) {
  const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  const float scale = a.in.scale();
#pragma unroll
  for (int j = 0; j < 8; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t own = row + g + i / 2 * 8, other = column + 8 * j + 2 * q + i % 2;
      const int64_t t = kOfQueries ? own : other, s = kOfQueries ? other : own;
      const bool seen = s <= t && t < rows.count;
      const int64_t at = (rows.first + t) * a.in.n_heads + head;
      p[j][i] = seen ? exp2_approx(fmaf(scale, p[j][i], -a.in.log_sums[at])) : 0.f;
      dS[j][i] = seen ? p[j][i] * (dS[j][i] - a.along[at]) : 0.f;
    }
}

template <class T, int kColumns, bool kOfQueries>
__global__ void __launch_bounds__(128, kColumns == 1 ? 2 : 1)
    causal_attention_backward_fused_kernel(AttentionBackwardArgs<T> a) {
  extern __shared__ __align__(1024) unsigned char attention_tiles[];
  constexpr int kTile = AttentionTiles<kColumns>::kTile;
  const AttentionArgs<T>& in = a.in;
  const Rows rows = rows_of(blockIdx.z, in.L, in.cu_seqlens);
  const int64_t block = kOfQueries ? gridDim.x - 1 - blockIdx.x : blockIdx.x, first = 64 * block;
  if (first >= rows.count) return;
  const int P = in.head_dim, shared = kOfQueries ? 1 : in.n_heads / in.n_kv_heads;
  const int first_head = blockIdx.y * shared;
  const int64_t key = in.first_key(blockIdx.z, rows, first_head);
  const uint32_t own = uint32_t(__cvta_generic_to_shared(attention_tiles));
  const auto copy_q = [&](uint32_t to, int head, int64_t row) {  // and dout
    const int64_t column = int64_t{head} * P;
    copy_rows<kColumns>(to, in.q + rows.first * in.q_stride + column, in.q_stride, row, rows.count,
                        P);
    copy_rows<kColumns>(to + kTile, a.dout + rows.first * a.dout_stride + column, a.dout_stride,
                        row, rows.count, P);
  };
  const auto copy_k = [&](uint32_t to, int64_t row) {  // and v
    copy_rows<kColumns>(to, in.keys + key, in.kv_stride, row, rows.count, P);
    copy_rows<kColumns>(to + kTile, in.values + key, in.kv_stride, row, rows.count, P);
  };
  const int64_t blocks = kOfQueries ? block + 1 : ceil_div(rows.count, 64) - block;  // of a head
  const auto place = [&](int64_t turn) { return 64 * (turn % blocks + (kOfQueries ? 0 : block)); };
  const auto fetch = [&](int64_t turn) {
    const uint32_t to = own + 2 * kTile + turn % 2 * (2 * kTile);
    kOfQueries ? copy_k(to, place(turn)) : copy_q(to, first_head + int(turn / blocks), place(turn));
    copy_async_commit();
  };
  kOfQueries ? copy_q(own, first_head, first) : copy_k(own, first);
  fetch(0);

  constexpr int kTiles = 8 * kColumns;
  float sum[kTiles][4] = {}, of_values[kOfQueries ? 1 : kTiles][4] = {};
  const int64_t warp = threadIdx.x / 32, row = first + 16 * warp, left = rows.count - row;
  for (int64_t turn = 0; turn < blocks * shared; ++turn) {
    copy_async_wait();
    __syncthreads();  // all copies of this turn are there; those of the turn before have been read
    if (turn + 1 < blocks * shared) fetch(turn + 1);
    const uint32_t other = own + 2 * kTile + turn % 2 * (2 * kTile);
    const uint32_t mine = own + tile_offset(uint32_t(16 * warp), 0);
    float p[8][4], dS[8][4];
    multiply_keys<T, kColumns>(p, mine, other);
    multiply_keys<T, kColumns>(dS, mine + kTile, other + kTile);
    softmax_backward<kOfQueries>(p, dS, a, rows, first_head + turn / blocks, row, place(turn));
    multiply_values<T, kColumns>(sum, dS, other);
    if constexpr (!kOfQueries) multiply_values<T, kColumns>(of_values, p, other + kTile);
  }
  const int64_t to = (rows.first + row) * a.d_stride + int64_t{blockIdx.y} * P;
  store_rows((kOfQueries ? a.dq : a.dk) + to, a.d_stride, left, P, rsqrtf(float(P)), sum);
  if constexpr (!kOfQueries) store_rows(a.dv + to, a.d_stride, left, P, 1.f, of_values);
}

template <class T>
void causal_attention_backward_naive(const AttentionBackwardArgs<T>& a, cudaStream_t stream) {
  const AttentionArgs<T>& in = a.in;
  causal_attention_backward_queries_kernel<<<attention_grid(in, 4, in.n_heads), 128, 0, stream>>>(
      a);
  CUDA_CHECK(cudaGetLastError());
  causal_attention_backward_keys_kernel<<<attention_grid(in, 4, in.n_kv_heads), 128, 0, stream>>>(
      a);
  CUDA_CHECK(cudaGetLastError());
}
template <class T, int kColumns>
void causal_attention_backward_fused(const AttentionBackwardArgs<T>& a, cudaStream_t stream) {
  const auto launch = [&](auto* kernel, int heads) {
    constexpr int kBytes = kAttentionBackwardBytes<kColumns>;
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
    kernel<<<attention_grid(a.in, 64, heads), 128, kBytes, stream>>>(a);
    CUDA_CHECK(cudaGetLastError());
  };
  launch(causal_attention_backward_fused_kernel<T, kColumns, true>, a.in.n_heads);
  launch(causal_attention_backward_fused_kernel<T, kColumns, false>, a.in.n_kv_heads);
}

// in.out and in.log_sums are those of the forward.
template <class T>
void causal_attention_backward(const AttentionBackwardArgs<T>& a, cudaStream_t stream) {
  const AttentionArgs<T>& in = a.in;
  if (in.batch * in.L == 0) return;
  causal_attention_backward_along_kernel<<<attention_grid(in, 4, in.n_heads), 128, 0, stream>>>(a);
  CUDA_CHECK(cudaGetLastError());
  if constexpr (sizeof(T) == 2) {
    const bool aligned = attention_aligned(in) && a.dout_stride % 8 == 0 && a.d_stride % 2 == 0 &&
                         reinterpret_cast<uintptr_t>(a.dout) % 16 == 0;
    if (aligned && in.head_dim <= 64) return causal_attention_backward_fused<T, 1>(a, stream);
    if (aligned && in.head_dim <= 128) return causal_attention_backward_fused<T, 2>(a, stream);
  }
  causal_attention_backward_naive(a, stream);
}

// --- the gated MLP ---
//
//   dx = dgated silu(gate),      dgate = dgated x silu'(gate)
//
// Four numbers a thread, as in the forward kernel.
template <class T>
__global__ void __launch_bounds__(256)
    gated_mlp_backward_kernel(const T* x_gate, const T* dgated, int64_t rows, int64_t width,
                              T* dx_gate) {
  const int64_t i = 4 * (int64_t(blockIdx.x) * 256 + threadIdx.x), row = i / width, c = i % width;
  if (row >= rows) return;
  const int64_t place = row * 2 * width + c;
  float x[4], gate[4], d[4];
  load4(x, x_gate + place), load4(gate, x_gate + place + width), load4(d, dgated + i);
  for (int k = 0; k < 4; ++k) {
    const auto point = silu_point(gate[k]);
    x[k] *= d[k] * point.slope, d[k] *= point.value;
  }
  store(dx_gate + place, pack<T>(d)), store(dx_gate + place + width, pack<T>(x));
}
template <class T>
void gated_mlp_backward(const T* x_gate, const T* dgated, int64_t rows, int64_t width, T* dx_gate,
                        cudaStream_t stream) {
  if (rows == 0) return;
  gated_mlp_backward_kernel<<<unsigned(ceil_div(rows * width, 1024)), 256, 0, stream>>>(
      x_gate, dgated, rows, width, dx_gate);
  CUDA_CHECK(cudaGetLastError());
}

// --- embedding -----------------------------------------------------------------------------------
//
//   dE[id] += sum over the rows t with ids[t] = id of d_residual[t]
//
// The rows are sorted by id, those of one id keeping their order, and each run of them is summed.

static __global__ void embedding_keys_kernel(const Token* ids, int64_t rows, uint64_t* keys,
                                             Token* positions) {
  const int64_t t = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (t < rows) keys[t] = uint64_t(ids[t]), positions[t] = Token(t);
}

// The block at the begin of a run takes it; the others have nothing to do.  Grid: rows, channels.
static __global__ void __launch_bounds__(128)
    embedding_backward_kernel(const uint64_t* ids, const Token* positions, int64_t rows,
                              int64_t d_model, const float* d_residual, float* d_embedding) {
  const int64_t begin = blockIdx.x, c = int64_t(blockIdx.y) * blockDim.x + threadIdx.x;
  const uint64_t id = ids[begin];
  if (c >= d_model || (begin > 0 && ids[begin - 1] == id)) return;
  int64_t end = begin + 1;  // the first row of a higher id lies in [end, above]
  for (int64_t above = rows; end < above;) {
    const int64_t middle = (end + above) / 2;
    ids[middle] == id ? end = middle + 1 : above = middle;
  }
  float sum = 0.f;
#pragma unroll 8
  for (int64_t i = begin; i < end; ++i) sum += d_residual[positions[i] * d_model + c];
  d_embedding[int64_t(id) * d_model + c] += sum;
}

class EmbeddingBackward {
 public:
  // d_embedding (vocab_size, d_model) += the rows of d_residual (rows, d_model).
  void operator()(const Token* ids, int64_t rows, int64_t vocab_size, int64_t d_model,
                  const float* d_residual, float* d_embedding, cudaStream_t stream) {
    if (rows == 0) return;
    keys_.grow(size_t(2 * rows)), positions_.grow(size_t(2 * rows));
    uint64_t *keys = keys_.data(), *sorted_keys = keys + rows;
    Token *positions = positions_.data(), *sorted = positions + rows;
    int bits = 1;
    while ((vocab_size - 1) >> bits) ++bits;
    size_t bytes = 0;
    for (const bool measure : {true, false}) {
      if (!measure) room_.grow(bytes);
      if (!measure)
        embedding_keys_kernel<<<unsigned(ceil_div(rows, 256)), 256, 0, stream>>>(ids, rows, keys,
                                                                                 positions);
      CUDA_CHECK(cudaGetLastError());
      CUDA_CHECK(cub::DeviceRadixSort::SortPairs(measure ? nullptr : room_.data(), bytes, keys,
                                                 sorted_keys, positions, sorted, rows, 0, bits,
                                                 stream));
    }
    const dim3 grid(unsigned(rows), unsigned(ceil_div(d_model, 128)));
    embedding_backward_kernel<<<grid, 128, 0, stream>>>(sorted_keys, sorted, rows, d_model,
                                                        d_residual, d_embedding);
    CUDA_CHECK(cudaGetLastError());
  }

 private:
  DeviceBuffer<uint64_t> keys_;
  DeviceBuffer<Token> positions_;
  DeviceBuffer<std::byte> room_;
};

// ============================================================================================
// The model's backward
// ============================================================================================

// A float for every number of every weight: gradients, or what the trainer keeps. The members of
// ssm::Layer and ssm::Model, which for_each_weight names; A (d_inner, d_state) row by row.
struct FloatLayer {
  float *norm = nullptr, *in_proj = nullptr, *in_proj_bias = nullptr;
  float *conv_weight = nullptr, *conv_bias = nullptr, *x_proj = nullptr, *dt_proj = nullptr;
  float *dt_bias = nullptr, *A = nullptr, *D = nullptr, *gated_norm = nullptr;
  float *out_proj = nullptr, *out_proj_bias = nullptr, *norm_bias = nullptr, *norm2 = nullptr;
  float *norm2_bias = nullptr, *fc1 = nullptr, *fc2 = nullptr;
};
struct FloatModel {
  float *embedding = nullptr, *norm_f = nullptr, *lm_head = nullptr, *norm_f_bias = nullptr;
  std::vector<FloatLayer> layers;
  bool tied = true;
  float* head() const { return tied ? embedding : lm_head; }
};

inline int64_t size_of(const std::vector<int64_t>& shape) {
  return std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
}

// All of them in one buffer, weight after weight, each from a multiple of 64 numbers on, with zeros
// between.
struct FlatModel {
  FloatModel at;
  DeviceBuffer<float> numbers;

  FlatModel(const Config& config, bool tied) {
    at.layers.resize(static_cast<size_t>(config.n_layer));
    at.tied = tied;
    numbers = DeviceBuffer<float>(static_cast<size_t>(place(config, nullptr)));
    place(config, numbers.data());
    numbers.zero();
  }

 private:
  int64_t place(const Config& config, float* to) {
    int64_t used = 0;
    for_each_weight(config, at, [&](const std::string&, const auto& shape, float*& weight) {
      weight = to ? to + used : nullptr;
      used += ceil_div(size_of(shape), int64_t{64}) * 64;
    });
    return used;
  }
};

// A batch of texts, one behind another: to tell targets[i] from ids up to i, for every i where it
// is not -1.
struct TextBatch {
  int64_t batch = 0, L = 0, rows = 0;              // L: of the longest
  const int64_t* cu_seqlens = nullptr;             // (batch + 1), or null: all are L tokens long
  const Token *ids = nullptr, *targets = nullptr;  // (rows)
  const float* weights = nullptr;                  // (rows) of each row's loss, or null: 1
  const DeviceState* before = nullptr;             // states to begin with; null: zero
  DeviceState* after = nullptr;                    // where to leave those at the end; with `before`
};

// Memory that stays from batch to batch.
struct TrainingRoom {
  DeviceBuffer<std::byte> forward, backward;  // activations of one layer, and their gradients
  DeviceBuffer<std::byte> kept;               // activations of layers that are not recomputed
  DeviceBuffer<std::byte> work, conv;         // of one operation; a convolution's state
  DeviceBuffer<float> stream, logits, nll, h;
  EmbeddingBackward embedding;
  int64_t rows = 0, kept_layers = 0;  // for which `kept` was made
};

// Gradients of all operations of ssm_reference.hpp's blocks and model, each right after the one
// that it leads back through. `a` are activations of the forward pass, `d` their gradients, of the
// same names: d.y of a.y. Weights' gradients are added to `gradients`, in float32.
//
// What is kept for them, numbers per token: the residual stream before every block and every MLP,
// d_model floats each; and for as many layers as there is memory for, in T,
//   Mamba    5 d_inner + dt_rank + 2 d_state                   projected, x, dt_B_C, delta, y
//   Mamba-2  5 d_inner + 4 n_groups d_state + n_heads          projected, x B C, y, normed y
// The other layers go forward once more from the residual stream when their turn comes.
template <class T>
struct ComputeBackward {
  const Compute<T>& forward;
  const FloatModel& gradients;
  TrainingRoom& room;
  std::function<void(const float*)> done = {};  // gradients from there on (FlatModel) are final
  using Tokens = typename Compute<T>::Tokens;

  const Config& config() const { return forward.config; }
  const Queue& queue() const { return forward.queue; }
  cudaStream_t stream() const { return forward.queue.stream(); }
  float* work(size_t bytes) const {
    room.work.grow(bytes);
    return reinterpret_cast<float*>(room.work.data());
  }

  // Of y = x W^T:  dx = dy W + beta dx,  dW += dy^T x.  x, dx (rows, cols), dy (rows, outputs)
  void linear_backward(const T* x, int64_t x_stride, const T* dy, int64_t dy_stride, int64_t rows,
                       const T* W, int64_t outputs, int64_t cols, float* dW, T* dx,
                       float beta = 0.f) const {
    if (rows == 0) return;
    const float one = 1.f;
    const auto type = kCudaType<T>;
    CUBLAS_CHECK(cublasGemmEx(queue().cublas(), CUBLAS_OP_N, CUBLAS_OP_N, int(cols), int(rows),
                              int(outputs), &one, W, type, int(cols), dy, type, int(dy_stride),
                              &beta, dx, type, int(x_stride), CUBLAS_COMPUTE_32F,
                              CUBLAS_GEMM_DEFAULT));
    CUBLAS_CHECK(cublasGemmEx(queue().cublas(), CUBLAS_OP_N, CUBLAS_OP_T, int(cols), int(outputs),
                              int(rows), &one, x, type, int(x_stride), dy, type, int(dy_stride),
                              &one, dW, CUDA_R_32F, int(cols), CUBLAS_COMPUTE_32F,
                              CUBLAS_GEMM_DEFAULT));
  }
  void linear_backward(const T* x, int64_t x_stride, const T* dy, int64_t dy_stride, int64_t rows,
                       const DeviceMatrix& W, float* dW, T* dx, float beta = 0.f) const {
    linear_backward(x, x_stride, dy, dy_stride, rows, W.as<T>(), W.rows, W.cols, dW, dx, beta);
  }
  void bias_backward(const T* dy, int64_t rows, int64_t d, float* dbias) const {
    if (dbias)
      mamba::bias_backward(dy, d, rows, d, dbias, work(sizeof(float) * row_parts(rows, d)),
                           stream());
  }
  // d.residual += what comes through the norm of a.residual, whose gradient is d.u; rounded -> d.u
  void norm_backward(const Activations<T>& a, const Activations<T>& d, const DeviceRow& weight,
                     int64_t rows, float* dweight, float* dbias) const {
    const auto d_model = int(config().d_model);
    bias_backward(d.u, rows, d_model, dbias);
    const NormBackwardArgs<T> norm{rows, d_model,    forward.eps(), a.residual, weight.data(),
                                   d.u,  d.residual, d.u,           dweight};
    float* const parts = work(sizeof(float) * row_parts(rows, d_model));
    config().rms_norm ? mamba::rms_norm_backward(norm, parts, stream())
                      : mamba::layer_norm_backward(norm, parts, stream());
  }

  // d.u, of out_proj's output -> d_y
  void project_out_backward(const DeviceLayer& w, const FloatLayer& g, const T* y,
                            const Activations<T>& d, T* d_y, int64_t rows) const {
    bias_backward(d.u, rows, config().d_model, g.out_proj_bias);
    linear_backward(y, w.out_proj.cols, d.u, config().d_model, rows, w.out_proj, g.out_proj, d_y);
  }
  // d.x -> d.projected, its other columns being there already -> d.residual and, rounded, d.u
  void project_in_backward(const DeviceLayer& w, const FloatLayer& g, const Activations<T>& a,
                           const Activations<T>& d, const Tokens& tokens,
                           const T* conv_state) const {
    const int64_t rows = tokens.rows(), width = config().in_proj_width();
    ConvBackwardArgs<T> conv;
    conv.in = forward.conv_args(a, w, nullptr);
    conv.in.state = conv_state;
    tokens.to(conv.in);
    conv.dout = d.x, conv.dout_stride = config().conv_width();
    conv.dx = d.projected + (conv.in.x - a.projected), conv.dx_stride = width;
    conv.dweight = g.conv_weight, conv.dbias = g.conv_bias;
    causal_conv1d_backward(conv, work(causal_conv1d_backward_workspace(conv)), stream());
    bias_backward(d.projected, rows, width, g.in_proj_bias);
    linear_backward(a.u, config().d_model, d.projected, width, rows, w.in_proj, g.in_proj, d.u);
    norm_backward(a, d, w.norm, rows, g.norm, g.norm_bias);
  }

  ScanBackwardArgs<T> scan_backward_args(const DeviceLayer& w, const FloatLayer& g,
                                         const Activations<T>& a, const Activations<T>& d,
                                         const Tokens& tokens, const float* h) const {
    ScanBackwardArgs<T> scan;
    scan.in = forward.scan_args(a, w, a.x, config().d_inner, nullptr);
    scan.in.h0 = h;
    tokens.to(scan.in);
    scan.n_rows = tokens.rows();
    scan.dout = d.y, scan.dx = d.x, scan.ddelta = d.delta;
    scan.dB = d.dt_B_C + config().dt_rank, scan.dC = scan.dB + config().d_state;
    scan.dz = d.projected + config().d_inner;
    scan.dA = g.A, scan.dD = g.D, scan.dbias = g.dt_bias;
    scan.dout_stride = scan.dx_stride = scan.ddelta_stride = config().d_inner;
    scan.dB_stride = scan.dC_stride = scan.in.B_stride, scan.dz_stride = scan.in.z_stride;
    return scan;
  }

  // d.u: gradient of the block's output. a.u, and d.residual, which is added to, as in rms_norm.
  void mamba_block_backward(const DeviceLayer& w, const FloatLayer& g, const Activations<T>& a,
                            const Activations<T>& d, const Tokens& tokens, const T* conv_state,
                            const float* h) const {
    const int64_t rows = tokens.rows(), width = config().dt_rank + 2 * config().d_state;
    project_out_backward(w, g, a.y, d, d.y, rows);
    const auto scan = scan_backward_args(w, g, a, d, tokens, h);
    selective_scan_backward(scan, work(selective_scan_backward_workspace(scan)), stream());
    linear_backward(a.dt_B_C, width, d.delta, config().d_inner, rows, w.dt_proj, g.dt_proj,
                    d.dt_B_C);
    linear_backward(a.x, config().d_inner, d.dt_B_C, width, rows, w.x_proj, g.x_proj, d.x, 1.f);
    project_in_backward(w, g, a, d, tokens, conv_state);
  }

  SsdBackwardArgs<T> ssd_backward_args(const DeviceLayer& w, const FloatLayer& g,
                                       const Activations<T>& a, const Activations<T>& d,
                                       const Tokens& tokens, const float* h) const {
    SsdBackwardArgs<T> ssd;
    static_cast<SsdArgs<T>&>(ssd) = forward.ssd_args(a, w, a.x, config().conv_width(), nullptr);
    ssd.h0 = h;
    tokens.to(ssd);
    ssd.dout = d.y, ssd.dx = d.x, ssd.dB = d.x + config().d_inner;
    ssd.dC = ssd.dB + config().n_groups * config().d_state;
    ssd.ddt = d.projected + config().d_inner + config().conv_width();
    ssd.dA = g.A, ssd.dD = g.D, ssd.ddt_bias = g.dt_bias;
    ssd.dout_stride = config().d_inner, ssd.ddt_stride = config().in_proj_width();
    ssd.dx_stride = ssd.dB_stride = ssd.dC_stride = config().conv_width();
    return ssd;
  }

  // The same for Mamba-2.
  void mamba2_block_backward(const DeviceLayer& w, const FloatLayer& g, const Activations<T>& a,
                             const Activations<T>& d, const Tokens& tokens, const T* conv_state,
                             const float* h) const {
    const int64_t rows = tokens.rows(), d_inner = config().d_inner;
    const int64_t width = config().in_proj_width();
    project_out_backward(w, g, a.delta, d, d.delta, rows);
    gated_rms_norm_backward<T>({rows, int(d_inner), int(config().n_groups), forward.eps(), a.y,
                                a.projected, d.delta, w.gated_norm.data(), d.y, d.projected,
                                g.gated_norm, d_inner, width, d_inner, d_inner, width},
                               work(sizeof(float) * row_parts(rows, d_inner)), stream());
    auto ssd = ssd_backward_args(w, g, a, d, tokens, h);
    ssd.workspace = work(ssd_backward_workspace_bytes(ssd));
    ssd_backward(ssd, stream());
    project_in_backward(w, g, a, d, tokens, conv_state);
  }

  // The same for attention. The forward runs again for the sums of its softmax.
  void attention_block_backward(const DeviceLayer& w, const FloatLayer& g, const Activations<T>& a,
                                const Activations<T>& d, const Tokens& tokens) const {
    const ssm::AttentionSizes& at = config().attention;
    const int64_t rows = tokens.rows(), width = at.in_proj_width();
    project_out_backward(w, g, a.y, d, d.y, rows);
    AttentionBackwardArgs<T> attention;
    T* const dqkv = at.d_conv > 0 ? d.x : d.projected;
    attention.in = forward.attention_args(a, at.d_conv > 0 ? a.x : a.projected, tokens, {});
    attention.in.log_sums = work(2 * sizeof(float) * size_t(rows * at.n_heads));
    attention.along = attention.in.log_sums + rows * at.n_heads;
    attention.dout = d.y, attention.dout_stride = at.q_width(), attention.d_stride = width;
    attention.dq = dqkv, attention.dk = dqkv + at.q_width();
    attention.dv = attention.dk + at.kv_width();
    causal_attention(attention.in, stream());
    causal_attention_backward(attention, stream());
    RotaryArgs<T> turn = forward.rotary_args(dqkv, tokens, {});
    turn.direction = -1;
    rotary(turn, stream());
    if (at.d_conv > 0) {
      ConvBackwardArgs<T> conv;
      conv.in = forward.attention_conv_args(a, w, nullptr);
      tokens.to(conv.in);
      conv.dout = d.x, conv.dx = d.projected, conv.dout_stride = conv.dx_stride = width;
      conv.dweight = g.conv_weight, conv.dbias = g.conv_bias;
      causal_conv1d_backward(conv, work(causal_conv1d_backward_workspace(conv)), stream());
    }
    bias_backward(d.projected, rows, width, g.in_proj_bias);
    linear_backward(a.u, config().d_model, d.projected, width, rows, w.in_proj, g.in_proj, d.u);
    norm_backward(a, d, w.norm, rows, g.norm, g.norm_bias);
  }

  // The MLP's, whose activations are made again from a.residual, the stream before it.
  void mlp_backward(const DeviceLayer& w, const FloatLayer& g, const Activations<T>& a,
                    const Activations<T>& d, int64_t rows) const {
    const int64_t width = config().d_intermediate, d_model = config().d_model;
    forward.mlp_inner(w, a, rows);
    linear_backward(a.gated, width, d.u, d_model, rows, w.fc2, g.fc2, d.gated);
    gated_mlp_backward(a.x_gate, d.gated, rows, width, d.x_gate, stream());
    linear_backward(a.u, d_model, d.x_gate, 2 * width, rows, w.fc1, g.fc1, d.u);
    norm_backward(a, d, w.norm2, rows, g.norm2, g.norm2_bias);
  }

  // --- what is kept ---

  // Calls f(member, numbers per token) for what a layer keeps.
  template <class Function>
  void for_each_kept(Activations<T>& a, const Function& f) const {
    const Config& c = config();
    f(a.projected, a.projected_width(c));
    f(a.x, a.x_width(c));
    if (c.version == 1) f(a.dt_B_C, c.dt_rank + 2 * c.d_state);
    f(a.delta, c.d_inner);
    f(a.y, a.y_width(c));
  }
  int64_t kept_numbers(Activations<T> a, int64_t rows) const {  // of a layer
    int64_t sum = 0;
    for_each_kept(a,
                  [&](T*&, int64_t width) { sum += ceil_div(rows * width, int64_t{128}) * 128; });
    return sum;
  }
  // The residual stream before layer l and, with `mlp`, before its MLP.
  Index streams() const { return config().n_layer * (config().d_intermediate > 0 ? 2 : 1); }
  float* residual(const Activations<T>& a, Index l, int64_t rows, bool mlp = false) const {
    const Index i = config().d_intermediate > 0 ? 2 * l + mlp : l;
    return i < streams() ? room.stream.data() + i * rows * config().d_model : a.residual;
  }
  // The activations of layer l: its own where they are kept, else those that all share.
  Activations<T> of_layer(Activations<T> a, Index l, int64_t rows) const {
    if (l >= room.kept_layers) return a;
    T* next = reinterpret_cast<T*>(room.kept.data()) + l * kept_numbers(a, rows);
    for_each_kept(a, [&](T*& p, int64_t width) {
      p = std::exchange(next, next + ceil_div(rows * width, int64_t{128}) * 128);
    });
    return a;
  }

  // Rows of logits at a time: at most 256 MiB of them. A row is a multiple of 8 numbers long.
  int64_t logits_stride() const { return mamba::logits_stride(config().vocab_size); }
  int64_t logits_rows(int64_t rows) const {
    return std::min(rows, std::max<int64_t>(128, (int64_t{1} << 26) / logits_stride() / 128 * 128));
  }

  // Bytes for so many rows without any that a layer keeps, or an operation's own.
  size_t least_bytes(int64_t rows) const {
    const Config& c = config();
    const int64_t numbers =
        kept_numbers({c, 0, room.forward}, rows) + rows * (c.d_model + 3 * c.d_intermediate);
    return 2 * (sizeof(T) * numbers + sizeof(float) * rows * c.d_model) +
           sizeof(float) * (streams() * rows * c.d_model + logits_rows(rows) * logits_stride());
  }
  size_t operation_bytes(const Activations<T>& a, const Activations<T>& d,
                         const Tokens& tokens) const {
    const DeviceLayer& w = forward.model.layers[0];
    const FloatLayer& g = gradients.layers[0];
    if (config().version == 1)
      return selective_scan_backward_workspace(scan_backward_args(w, g, a, d, tokens, nullptr));
    return ssd_backward_workspace_bytes(ssd_backward_args(w, g, a, d, tokens, nullptr));
  }

  // Makes room for a batch, and chooses how many layers keep their activations.
  void make_room(const Tokens& tokens) const {
    const int64_t rows = tokens.rows();
    if (rows <= room.rows) return;
    room = TrainingRoom{};
    need_memory(least_bytes(rows), "activations of a batch");
    const Activations<T> a(config(), rows, room.forward), d(config(), rows, room.backward);
    room.stream = DeviceBuffer<float>(size_t(streams() * rows * config().d_model));
    room.logits = DeviceBuffer<float>(size_t(logits_rows(rows) * logits_stride()));
    room.nll = DeviceBuffer<float>(size_t(rows));
    work(operation_bytes(a, d, tokens));
    size_t available = 0, total = 0;
    CUDA_CHECK(cudaMemGetInfo(&available, &total));
    const size_t layer = sizeof(T) * size_t(kept_numbers(a, rows));
    const size_t spare = total / 32;  // for the rest
    const Index most = available > spare ? Index((available - spare) / layer) : 0;
    room.kept_layers = std::min<Index>(config().n_layer, most);
    room.kept = DeviceBuffer<std::byte>(size_t(room.kept_layers) * layer);
    room.rows = rows;
    if (room.kept_layers < config().n_layer)
      std::cerr << "activations of " << config().n_layer - room.kept_layers << " of "
                << config().n_layer << " layers are recomputed: no memory to keep them\n";
  }

  // --- the whole model ---

  // Activations of a layer with the residual stream before it, once the forward pass is over.
  Activations<T> activations_again(const TextBatch& b, const Tokens& tokens, Activations<T> a,
                                   Index l) const {
    a = of_layer(a, l, b.rows);
    a.residual = residual(a, l, b.rows);
    const DeviceLayer& w = forward.model.layers[l];
    if (l < room.kept_layers) return forward.norm(a, w.norm, w.norm_bias, b.rows), a;
    if (config().attends(l)) return forward.attention_inner(w, a, tokens, {}), a;
    T* conv = nullptr;
    float* h = nullptr;
    if (b.before) {  // of this layer, to be advanced once more
      const size_t conv_bytes = b.before->conv.bytes() / DeviceState::scans(config());
      const size_t h_size = b.before->h.size() / DeviceState::scans(config());
      room.conv.grow(conv_bytes), room.h.grow(h_size);
      conv = reinterpret_cast<T*>(room.conv.data()), h = room.h.data();
      const auto copy = [&](void* to, const void* from, size_t bytes) {
        CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream()));
      };
      copy(conv, b.before->layer_conv<T>(config(), l), conv_bytes);
      copy(h, b.before->layer_h(config(), l), sizeof(float) * h_size);
    }
    config().version == 1 ? forward.mamba_inner(w, a, tokens, conv, h)
                          : forward.mamba2_inner(w, a, tokens, conv, h);
    return a;
  }

  // ids -> `last`.residual after all layers. keep: what the backward pass needs stays.
  void all_layers(const TextBatch& b, const Tokens& tokens, const Activations<T>& last,
                  bool keep) const {
    const auto block = forward.scan_block(false);
    Activations<T> a = last;
    if (keep) a.residual = residual(last, 0, b.rows);
    forward.embed(a, b.ids, b.rows);
    for (Index l = 0; l < config().n_layer; ++l) {
      const DeviceLayer& w = forward.model.layers[l];
      const bool mlp = config().d_intermediate > 0;
      float *const middle = mlp ? residual(last, l, b.rows, true) : nullptr, *const after =
                                                                                 residual(last,
                                                                                          l + 1,
                                                                                          b.rows);
      if (keep) {
        a = of_layer(last, l, b.rows);
        a.residual = copy_stream(residual(last, l, b.rows), mlp ? middle : after, b.rows);
      }
      if (config().attends(l))
        forward.attention_block(w, a, tokens, {});
      else
        (forward.*block)(w, a, tokens, b.after ? b.after->layer_conv<T>(config(), l) : nullptr,
                         b.after ? b.after->layer_h(config(), l) : nullptr);
      if (mlp && keep) a.residual = copy_stream(middle, after, b.rows);
      if (mlp) forward.mlp(w, a, b.rows);
    }
  }
  float* copy_stream(const float* from, float* to, int64_t rows) const {
    CUDA_CHECK(cudaMemcpyAsync(to, from, sizeof(float) * rows * config().d_model,
                               cudaMemcpyDeviceToDevice, stream()));
    return to;
  }

  // a.residual after all layers -> room.nll; and, unless scale is 0, d.residual and d.u of the
  // gradient of scale times their sum. Logits are there for some rows at a time.
  void head_backward(const TextBatch& b, const Activations<T>& a, const Activations<T>& d,
                     float scale) const {
    const Config& c = config();
    const int64_t d_model = c.d_model, vocab_size = c.vocab_size, stride = logits_stride();
    forward.norm(a, forward.model.norm_f, forward.model.norm_f_bias, b.rows);
    float* const logits = room.logits.data();
    for (int64_t first = 0; first < b.rows; first += logits_rows(b.rows)) {
      const int64_t rows = std::min(b.rows - first, logits_rows(b.rows));
      const T* hidden = a.u + first * d_model;
      queue().linear(hidden, rows, d_model, forward.head(), vocab_size, d_model, logits, stride);
      cross_entropy<T>(logits, stride, rows, vocab_size, b.targets + first, scale,
                       room.nll.data() + first, stream(), b.weights ? b.weights + first : nullptr);
      if (scale != 0.f)
        linear_backward(hidden, d_model, reinterpret_cast<const T*>(logits),
                        stride * int64_t(sizeof(float) / sizeof(T)), rows, forward.head(),
                        vocab_size, d_model, gradients.head(), d.u + first * d_model);
    }
    if (scale == 0.f) return;
    CUDA_CHECK(cudaMemsetAsync(d.residual, 0, sizeof(float) * b.rows * d_model, stream()));
    norm_backward(a, d, forward.model.norm_f, b.rows, gradients.norm_f, gradients.norm_f_bias);
  }

  // Adds the gradients of scale times the sum of weight nll. Returns the nll of each row.
  std::vector<float> operator()(const TextBatch& b, float scale) const {
    if (b.rows == 0) return {};
    const Tokens tokens{b.batch, b.L, false, nullptr, b.cu_seqlens, b.rows};
    make_room(tokens);
    const Activations<T> last(config(), b.rows, room.forward), d(config(), b.rows, room.backward);
    all_layers(b, tokens, last, scale != 0.f);
    head_backward(b, last, d, scale);
    for (Index l = config().n_layer; l-- > 0 && scale != 0.f;) {
      const DeviceLayer& w = forward.model.layers[l];
      const FloatLayer& g = gradients.layers[l];
      if (done && l + 1 < config().n_layer) done(gradients.layers[l + 1].norm);
      if (config().d_intermediate > 0) {
        Activations<T> before = last;
        before.residual = residual(last, l, b.rows, true);
        mlp_backward(w, g, before, d, b.rows);
      }
      const Activations<T> a = activations_again(b, tokens, last, l);
      if (config().attends(l)) {
        attention_block_backward(w, g, a, d, tokens);
        continue;
      }
      const T* conv = b.before ? b.before->layer_conv<T>(config(), l) : nullptr;
      const float* h = b.before ? b.before->layer_h(config(), l) : nullptr;
      const auto block_backward = config().version == 1 ? &ComputeBackward::mamba_block_backward
                                                        : &ComputeBackward::mamba2_block_backward;
      (this->*block_backward)(w, g, a, d, tokens, conv, h);
    }
    if (scale != 0.f)
      room.embedding(b.ids, b.rows, config().vocab_size, config().d_model, d.residual,
                     gradients.embedding, stream());
    std::vector<float> nll(static_cast<size_t>(b.rows));
    CUDA_CHECK(cudaMemcpyAsync(nll.data(), room.nll.data(), sizeof(float) * nll.size(),
                               cudaMemcpyDeviceToHost, stream()));
    queue().wait();
    return nll;
  }
};

// Pieces of texts on the GPU.
class TextsOnGpu {
 public:
  TextBatch upload(const Batch& pieces, const Queue& queue) {
    std::vector<Token> ids, targets;
    std::vector<int64_t> begin = {0};
    std::vector<float> weights;
    TextBatch b;
    bool ragged = false, weighed = false;
    for (const Piece& piece : pieces) {
      const auto n = std::max<Index>(0, static_cast<Index>(piece.ids.size()) - 1);
      ids.insert(ids.end(), piece.ids.begin(), piece.ids.begin() + n);
      for (Index t = 0; t < n; ++t) targets.push_back(t + 1 >= piece.first ? piece.ids[t + 1] : -1);
      ragged = ragged || n != static_cast<Index>(pieces[0].ids.size()) - 1;
      weights.insert(weights.end(), n, float(piece.weight));
      weighed = weighed || piece.weight != 1;
      begin.push_back(begin.back() + n);
      b.L = std::max(b.L, int64_t{n});
    }
    b.batch = static_cast<int64_t>(pieces.size()), b.rows = begin.back();
    b.ids = copy(ids_, ids, queue), b.targets = copy(targets_, targets, queue);
    b.cu_seqlens = ragged ? copy(begin_, begin, queue) : nullptr;
    b.weights = weighed ? copy(weights_, weights, queue) : nullptr;
    queue.wait();  // the host's vectors are about to vanish
    return b;
  }

 private:
  template <class Number>
  static const Number* copy(DeviceBuffer<Number>& to, const std::vector<Number>& from,
                            const Queue& queue) {
    to.grow(from.size());
    CUDA_CHECK(cudaMemcpyAsync(to.data(), from.data(), from.size() * sizeof(Number),
                               cudaMemcpyHostToDevice, queue.stream()));
    return to.data();
  }
  DeviceBuffer<Token> ids_, targets_;
  DeviceBuffer<int64_t> begin_;
  DeviceBuffer<float> weights_;
};

// A weight's numbers, of the host's matrix and of the GPU's: row by row there.
template <class Matrix_>
void upload_weight(const Matrix_& from, float* to) {
  const Matrix<float> rows = from;
  CUDA_CHECK(cudaMemcpy(to, rows.data(), rows.size() * sizeof(float), cudaMemcpyHostToDevice));
}
template <class Matrix_>
void download_weight(const float* from, const std::vector<int64_t>& shape, Matrix_& to) {
  const Index rows = Matrix_::RowsAtCompileTime == 1 ? 1 : shape[0];
  Matrix<float> numbers(rows, size_of(shape) / rows);
  CUDA_CHECK(
      cudaMemcpy(numbers.data(), from, numbers.size() * sizeof(float), cudaMemcpyDeviceToHost));
  to = numbers;
}

// Calls f(name, shape, weight of `model`, place in `flat`) for every weight of both.
template <class Model, class Function>
void for_each_pair(const Config& config, Model& model, const FloatModel& flat, const Function& f) {
  std::vector<float*> places;
  for_each_weight(config, flat,
                  [&](const std::string&, const auto&, float* p) { places.push_back(p); });
  size_t next = 0;
  for_each_weight(config, model, [&](const std::string& name, const auto& shape, auto& weight) {
    f(name, shape, weight, places[next++]);
  });
}

inline ssm::Model<float> download_model(const Config& config, const FloatModel& flat) {
  ssm::Model<float> model;
  model.sizes = config, model.tied = flat.tied;
  model.layers.resize(static_cast<size_t>(config.n_layer));
  for_each_pair(config, model, flat, [](const std::string&, const auto& shape, auto& to, float* p) {
    download_weight(p, shape, to);
  });
  return model;
}

// --- mamba gradients -----------------------------------------------------------------------------

inline double CudaEngine::gradients(const std::vector<Token>& ids, ssm::Model<float>& gradients) {
  const FlatModel sums(config_, model_.tied);
  TrainingRoom room;
  TextsOnGpu texts;
  const TextBatch text = texts.upload({Piece{ids}}, *queue_);
  double loss = 0;
  with_weight_type(dtype_, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Compute<T> forward = compute<T>();
    for (const float nll : ComputeBackward<T>{forward, sums.at, room}(text, 1.f)) loss += nll;
  });
  gradients = download_model(config_, sums.at);
  const float scale = 1.f / float(text.rows);  // of the mean; f16 has room for that of the sum only
  for_each_weight(config_, gradients,
                  [&](const std::string&, const auto&, auto& g) { g *= scale; });
  for (size_t l = 0; l < gradients.layers.size(); ++l) {  // A = -exp(A_log): dA_log = dA A
    ssm::StateMatrix<float>& dA = gradients.layers[l].A;
    Matrix<float> A(dA.rows(), dA.cols());
    model_.layers[l].A.copy_to(A.data());
    dA.array() *= A.array();
  }
  return loss / double(text.rows);
}

// ============================================================================================
// The trainer's kernels
// ============================================================================================
//
// Parameters, gradients g and AdamW's moments m and v lie in float32 in four flat buffers of the
// same places. The model that computes is a copy: matrices in T, A = -exp(A_log), the rest as it
// is.
//
//   g  = scale dloss/dw, for A_log:  dA_log = dA A
//   m  = beta1 m + (1 - beta1) g,   v = beta2 v + (1 - beta2) g^2
//   w -= lr weight_decay w + lr (m / (1 - beta1^steps)) / (sqrt(v / (1 - beta2^steps)) + eps)

constexpr int kParameterChunk = 4096, kUpdateThreads = 256;

enum class ParameterKind { row, matrix, A_log };
struct ParameterChunk {  // of one parameter: at most kParameterChunk numbers
  int64_t first;         // in the flat buffers
  void* copy;            // of the same numbers, in the model that computes
  int count;
  ParameterKind kind;
  bool decays;
};
struct FlatParameters {
  const ParameterChunk* chunks;
  int64_t n_chunks;
  float *w, *g, *m, *v;
};

__device__ inline float parameter_gradient(const ParameterChunk& c, const float* g, int i) {
  const float to_A = c.kind == ParameterKind::A_log ? static_cast<const float*>(c.copy)[i] : 1.f;
  return g[c.first + i] * to_A;
}
template <class T>
__device__ inline void copy_parameter(const ParameterChunk& c, int i, float w) {
  if (c.kind == ParameterKind::matrix)
    static_cast<T*>(c.copy)[i] = from_float<T>(w);
  else
    static_cast<float*>(c.copy)[i] = c.kind == ParameterKind::A_log ? -expf(w) : w;
}

// parts[block] = the sum of g^2 over every gridDim.x-th chunk.
static __global__ void __launch_bounds__(kUpdateThreads)
    gradient_norm_kernel(FlatParameters a, double* parts) {
  __shared__ double of_warp[kUpdateThreads / 32];
  double sum = 0;
  for (int64_t k = blockIdx.x; k < a.n_chunks; k += gridDim.x) {
    const ParameterChunk c = a.chunks[k];
    for (int i = threadIdx.x; i < c.count; i += kUpdateThreads) {
      const double g = parameter_gradient(c, a.g, i);
      sum += g * g;
    }
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
  __syncthreads();  // the warps' sums are written before they are added
  if (threadIdx.x > 0) return;
  for (int i = 1; i < kUpdateThreads / 32; ++i) sum += of_warp[i];
  parts[blockIdx.x] = sum;
}

template <class T>
__global__ void __launch_bounds__(kUpdateThreads) copy_parameters_kernel(FlatParameters a) {
  const ParameterChunk c = a.chunks[blockIdx.x];
  for (int i = threadIdx.x; i < c.count; i += kUpdateThreads)
    copy_parameter<T>(c, i, a.w[c.first + i]);
}

struct AdamWStep {  // the numbers of one step
  float scale, beta1, beta2, eps;
  float decay;        // lr weight_decay
  float lr, v_scale;  // lr / (1 - beta1^steps), 1 / (1 - beta2^steps)
};

template <class T>
__global__ void __launch_bounds__(kUpdateThreads) adamw_kernel(FlatParameters a, AdamWStep s) {
  const ParameterChunk c = a.chunks[blockIdx.x];
  float *w = a.w + c.first, *m = a.m + c.first, *v = a.v + c.first;
#pragma unroll 4
  for (int i = threadIdx.x; i < c.count; i += kUpdateThreads) {
    const float g = s.scale * parameter_gradient(c, a.g, i);
    const float m_i = fmaf(s.beta1, m[i], (1.f - s.beta1) * g);
    const float v_i = fmaf(s.beta2, v[i], (1.f - s.beta2) * g * g);
    const float decayed = c.decays ? fmaf(-s.decay, w[i], w[i]) : w[i];
    const float w_i = decayed - s.lr * m_i / (sqrtf(v_i * s.v_scale) + s.eps);
    m[i] = m_i, v[i] = v_i, w[i] = w_i, a.g[c.first + i] = 0.f;
    copy_parameter<T>(c, i, w_i);
  }
}

// ============================================================================================
// Several GPUs
// ============================================================================================
//
// Each GPU has a program of its own, a rank, that has all weights and learns from its share of a
// step's batches. Gradients are summed by NCCL, from the last layer to the first, while the layers
// before are still on the way back; then every rank takes the same step. Rank 0 alone writes and
// speaks.

// What NCCL's nccl.h declares of what is used here; the library is opened when it is needed.
struct Nccl {
  struct Id {
    char bytes[128];
  };
  using Comm = struct NcclComm*;
  static constexpr int kFloat32 = 7, kFloat64 = 8, kSum = 0;

  int (*get_unique_id)(Id*);
  int (*comm_init_rank)(Comm*, int count, Id, int rank);
  int (*all_reduce)(const void* from, void* to, size_t n, int type, int what, Comm, cudaStream_t);
  const char* (*error_string)(int);

  Nccl() {
    ::setenv("NCCL_ALGO", "Ring", 0);      // sums in one order, the same in every run,
    ::setenv("NCCL_NVLS_ENABLE", "0", 0);  // and not in the switches between the GPUs
    void* const library = ::dlopen("libnccl.so.2", RTLD_NOW);
    if (!library) fail("no NCCL (NVIDIA's library for several GPUs): ", ::dlerror());
    const auto find = [&](const char* name, auto& function) {
      void* const found = ::dlsym(library, name);
      if (!found) fail("wrong NCCL: expected ", name, " in libnccl.so.2, found none");
      function = reinterpret_cast<std::decay_t<decltype(function)>>(found);
    };
    find("ncclGetUniqueId", get_unique_id);
    find("ncclCommInitRank", comm_init_rank);
    find("ncclAllReduce", all_reduce);
    find("ncclGetErrorString", error_string);
  }
  void check(int error, const char* call) const {
    if (error != 0) fail("NCCL: ", error_string(error), ": ", call);
  }
};

// Sockets between rank 0 and each other rank, watched by a thread: a rank that ends, in whatever
// way, ends all, and rank 0 says why. It lives as long as the program.
class Lifeline {
 public:
  // kind: i NCCL's id, in text; e rank ends because of text; x rank 0 said why; d all is done
  struct Message {
    char kind = 0, text[1023] = {};
  };

  Lifeline(Index rank, std::vector<int> sockets) : rank_(rank), sockets_(std::move(sockets)) {
    std::thread([this] { watch(); }).detach();
  }
  void send(char kind, std::string_view text = {}) const {
    Message m{kind, {}};
    std::memcpy(m.text, text.data(), std::min(text.size(), sizeof m.text - 1));
    for (const int socket : sockets_) ::send(socket, &m, sizeof m, MSG_NOSIGNAL);
  }
  Message wait_for_id() { return id_.get_future().get(); }

  /// This rank ends by an error. Rank 0 says so when this returns; from others it does not.
  void failed(const char* why) {
    if (ending_.exchange(true)) sleep_forever();
    send(rank_ == 0 ? 'x' : 'e', why);
    if (rank_ > 0) ::sleep(10), ::_exit(1);  // rank 0 ends it sooner
  }
  /// All ranks come to this before one ends.
  void done() {
    if (rank_ > 0) send('d');
    over_.get_future().wait();
    if (rank_ == 0) send('d');
  }

 private:
  void watch() {
    std::vector<pollfd> polls;
    for (const int socket : sockets_) polls.push_back({socket, POLLIN, 0});
    for (size_t left = polls.size(); left > 0;) {
      ::poll(polls.data(), polls.size(), -1);
      for (size_t i = 0; i < polls.size(); ++i) {
        if (polls[i].revents == 0) continue;
        Message m;
        if (::recv(polls[i].fd, &m, sizeof m, MSG_WAITALL) != sizeof m) m.kind = 0;
        if (m.kind == 'i')
          id_.set_value(m);
        else if (m.kind == 'd')
          polls[i].fd = -1, --left;
        else if (m.kind == 'x')
          ::_exit(1);
        else
          end(rank_ == 0 ? Index(i) + 1 : 0, m.kind == 'e' ? m.text : "it ended without a word");
      }
    }
    over_.set_value();
  }
  [[noreturn]] void end(Index of, const std::string& why) {
    if (ending_.exchange(true)) sleep_forever();
    const std::string line =
        std::string(CudaEngine::kName) + ": rank " + std::to_string(of) + ": " + why + "\n";
    if (::write(2, line.data(), line.size()) >= 0) send(rank_ == 0 ? 'x' : 'e', why);
    ::_exit(1);
  }
  [[noreturn]] static void sleep_forever() {
    for (;;) ::pause();
  }

  Index rank_;
  std::vector<int> sockets_;  // of rank 0: to 1, 2, ..; of others: to 0
  std::atomic<bool> ending_{false};
  std::promise<Message> id_;
  std::promise<void> over_;
};

// NCCL between the ranks, on a stream of its own.
class CudaRanks : public Ranks {
 public:
  CudaRanks(Index rank_, Index count_, Lifeline& lifeline) {
    rank = rank_, count = count_;
    nccl_ = std::make_unique<Nccl>();
    Nccl::Id id;
    if (rank == 0) {
      nccl_->check(nccl_->get_unique_id(&id), "ncclGetUniqueId");
      lifeline.send('i', {id.bytes, sizeof id.bytes});
    } else {
      std::memcpy(id.bytes, lifeline.wait_for_id().text, sizeof id.bytes);
    }
    nccl_->check(nccl_->comm_init_rank(&comm_, int(count), id, int(rank)), "ncclCommInitRank");
    CUDA_CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  }
  void sum(std::vector<double>& numbers) override {
    sums_.grow(numbers.size());
    CUDA_CHECK(cudaMemcpyAsync(sums_.data(), numbers.data(), numbers.size() * sizeof(double),
                               cudaMemcpyHostToDevice, stream_));
    all_reduce(sums_.data(), numbers.size(), Nccl::kFloat64);
    CUDA_CHECK(cudaMemcpyAsync(numbers.data(), sums_.data(), numbers.size() * sizeof(double),
                               cudaMemcpyDeviceToHost, stream_));
    CUDA_CHECK(cudaStreamSynchronize(stream_));
  }
  /// Gradients from number `first` on are final after what `compute` was given: sums those that were
  /// not summed before, when they are a bucket, an eighth of all.
  void sum_bucket(const DeviceBuffer<float>& numbers, int64_t first, cudaStream_t compute) {
    if (summed_ < 0) summed_ = int64_t(numbers.size());
    if (summed_ == first || (first > 0 && summed_ - first < int64_t(numbers.size() / 8))) return;
    ready_.record(compute);
    ready_.hold(stream_);
    all_reduce(numbers.data() + first, size_t(summed_ - first), Nccl::kFloat32);
    summed_ = first;
  }
  /// And those that are left, before what `compute` is given next.
  void sum_rest(const DeviceBuffer<float>& numbers, cudaStream_t compute) {
    sum_bucket(numbers, 0, compute);
    summed_ = -1;
    ready_.record(stream_);
    ready_.hold(compute);
  }

 private:
  template <class Number>
  void all_reduce(Number* numbers, size_t n, int type) const {
    nccl_->check(nccl_->all_reduce(numbers, numbers, n, type, Nccl::kSum, comm_, stream_),
                 "ncclAllReduce");
  }
  std::unique_ptr<Nccl> nccl_;
  Nccl::Comm comm_ = nullptr;  // it, too, lives as long as the program
  cudaStream_t stream_ = nullptr;
  Event ready_;
  DeviceBuffer<double> sums_;
  int64_t summed_ = -1;  // numbers from here on were, of this step; -1: none
};

// ============================================================================================
// The learner
// ============================================================================================

// What train.hpp asks of a program, see there.
class CudaLearner {
 public:
  using Scalar = float;

  CudaLearner(const Config& config, Learned<float> learned, const EngineOptions& options);

  double accumulate(const Batch& batch, double scale);
  std::vector<double> losses(const Batch& batch);
  double gradient_norm();
  void update(const ssm::AdamW& adamw, double scale);
  Index steps() const { return steps_; }
  Learned<float> learned() const;
  std::vector<ssm::State<float>> carried() const;
  void carry(const std::vector<ssm::State<float>>& states);

  void merge(size_t which, const Matrix<float>& A, const Matrix<float>& B);
  std::pair<Matrix<float>, Matrix<float>> pull_back(size_t which, const Matrix<float>& A,
                                                    const Matrix<float>& B);
  void forget_gradients() { g_->numbers.zero(); }

 private:
  static constexpr unsigned kNormBlocks = 1024;

  void make_copies();
  void make_chunks();
  std::vector<float> run(TextBatch batch, float scale);
  void begin_states(const Batch& batch);
  FlatParameters flat() const {
    return {chunks_.data(),
            static_cast<int64_t>(chunks_.size()),
            w_->numbers.data(),
            g_->numbers.data(),
            m_ ? m_->numbers.data() : nullptr,
            v_ ? v_->numbers.data() : nullptr};
  }
  template <class Function>
  void with_type(const Function& f) const {
    if (dtype_ == DType::F32) return f(static_cast<float*>(nullptr));
    f(static_cast<__nv_bfloat16*>(nullptr));
  }

  Config config_;
  DType dtype_;
  float delta_ratio_;
  Index steps_;
  CudaRanks* ranks_;  // null: one GPU
  std::unique_ptr<Queue> queue_;
  std::unique_ptr<FlatModel> w_, g_, m_, v_;  // as in FlatParameters; no moments: held, for LoRA
  DeviceModel model_;                         // the copy to compute with
  DeviceBuffer<ParameterChunk> chunks_;
  DeviceBuffer<double> norm_parts_;
  DeviceBuffer<std::byte> activation_room_, scan_room_;
  TrainingRoom room_;
  TextsOnGpu texts_;
  DeviceState slots_;           // --carry-state: of each slot's last piece
  DeviceState before_, after_;  // of the pieces of a batch
};

inline CudaLearner::CudaLearner(const Config& config, Learned<float> learned,
                                const EngineOptions& options)
    : config_(config),
      dtype_(options.dtype.value_or(DType::F32)),
      delta_ratio_(options.delta_ratio),
      steps_(learned.steps),
      ranks_(static_cast<CudaRanks*>(options.ranks)) {
  if (dtype_ == DType::F16) fail_usage("train: --dtype: expected f32 or bf16, found f16");
  use_device(options.device);
  queue_ = std::make_unique<Queue>();
  const size_t floats = weight_bytes(config, DType::F32);
  const bool held = learned.m.layers.empty();
  need_memory((held ? 2 : 4) * floats + weight_bytes(config, dtype_),
              held ? "parameters and gradients" : "parameters, gradients and moments");
  for (auto* flat : {&w_, &g_, &m_, &v_})
    if (!held || flat == &w_ || flat == &g_)
      *flat = std::make_unique<FlatModel>(config, learned.weights.tied);
  const auto up = [](const std::string&, const auto&, const auto& from, float* to) {
    upload_weight(from, to);
  };
  for_each_pair(config, learned.weights, w_->at, up);
  if (m_) for_each_pair(config, learned.m, m_->at, up);
  if (v_) for_each_pair(config, learned.v, v_->at, up);
  make_copies();
  make_chunks();
  norm_parts_ = DeviceBuffer<double>(kNormBlocks);
  CUDA_CHECK(cudaDeviceSynchronize());  // the buffers above were filled outside of the stream
  with_type([&](auto* type) {
    const auto kernel = copy_parameters_kernel<std::remove_pointer_t<decltype(type)>>;
    kernel<<<unsigned(chunks_.size()), kUpdateThreads, 0, queue_->stream()>>>(flat());
    CUDA_CHECK(cudaGetLastError());
  });
}

// Room for the model that computes.
inline void CudaLearner::make_copies() {
  model_.sizes = config_, model_.tied = w_->at.tied;
  model_.layers.resize(static_cast<size_t>(config_.n_layer));
  for_each_weight(config_, model_, [&](const std::string&, const auto& shape, auto& to) {
    const auto size = static_cast<size_t>(size_of(shape));
    if constexpr (std::is_same_v<decltype(to), DeviceMatrix&>) {
      to.rows = shape[0], to.cols = shape[1];
      to.bytes = DeviceBuffer<std::byte>(size * dtype_size(dtype_));
    } else {
      to = DeviceBuffer<float>(size);
    }
  });
}

inline void CudaLearner::make_chunks() {
  std::vector<ParameterChunk> chunks;
  for_each_pair(
      config_, model_, w_->at,
      [&](const std::string& name, const auto& shape, auto& weight, float* place) {
        using Weight = std::remove_reference_t<decltype(weight)>;
        ParameterChunk c{place - w_->numbers.data(), nullptr, 0, ParameterKind::row, false};
        size_t number = sizeof(float);
        if constexpr (std::is_same_v<Weight, DeviceMatrix>) {
          c.kind = ParameterKind::matrix, number = dtype_size(dtype_);
          c.copy = weight.bytes.data();
        } else {
          if (std::is_same_v<Weight, DeviceStateMatrix>) c.kind = ParameterKind::A_log;
          c.copy = weight.data();
        }
        c.decays = Parameter<float>{name, shape, nullptr, 0}.decays();
        for (int64_t left = size_of(shape); left > 0; left -= kParameterChunk) {
          c.count = int(std::min<int64_t>(left, kParameterChunk));
          chunks.push_back(c);
          c.first += kParameterChunk;
          c.copy = static_cast<std::byte*>(c.copy) + kParameterChunk * number;
        }
      });
  chunks_ = DeviceBuffer<ParameterChunk>(chunks.data(), chunks.size());
}

inline std::vector<float> CudaLearner::run(TextBatch batch, float scale) {
  std::vector<float> nll;
  with_type([&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Compute<T> forward{config_, model_, *queue_, activation_room_, scan_room_, delta_ratio_};
    std::function<void(const float*)> done;
    if (ranks_ && ranks_->last && scale != 0.f)
      done = [&](const float* from) {
        ranks_->sum_bucket(g_->numbers, from - g_->numbers.data(), queue_->stream());
      };
    nll = ComputeBackward<T>{forward, g_->at, room_, done}(batch, scale);
  });
  return nll;
}

// The sums of each piece's rows.
inline std::vector<double> sums_of_pieces(const Batch& batch, const std::vector<float>& nll) {
  std::vector<double> sums;
  auto row = nll.begin();
  for (const Piece& piece : batch) {
    const auto end = row + std::max<Index>(0, static_cast<Index>(piece.ids.size()) - 1);
    sums.push_back(std::accumulate(row, end, 0.0));
    row = end;
  }
  return sums;
}

// The states that the pieces of a batch begin in -> before_ and, to be advanced, after_.
inline void CudaLearner::begin_states(const Batch& batch) {
  if (!config_.attention_layers.empty())
    fail("--carry-state: expected layers with a scan, whose state has one size, found attention");
  const auto n = std::max_element(batch.begin(), batch.end(),
                                  [](const auto& a, const auto& b) { return a.slot < b.slot; })
                     ->slot +
                 1;
  if (slots_.batch < n) {
    DeviceState more(config_, dtype_, n);
    for (Index s = 0; s < slots_.batch; ++s)
      copy_state(config_, slots_, s, more, s, queue_->stream());
    queue_->wait();
    std::swap(slots_, more);
  }
  for (DeviceState* state : {&before_, &after_}) {
    *state = DeviceState(config_, dtype_, static_cast<int64_t>(batch.size()));
    for (size_t i = 0; i < batch.size(); ++i)
      if (batch[i].slot >= 0 && !batch[i].begins)
        copy_state(config_, slots_, batch[i].slot, *state, Index(i), queue_->stream());
  }
}

inline double CudaLearner::accumulate(const Batch& batch, double scale) {
  TextBatch b = texts_.upload(batch, *queue_);
  const auto carries = [](const Piece& piece) { return piece.slot >= 0; };
  const bool any = std::any_of(batch.begin(), batch.end(), carries);
  if (any) begin_states(batch), b.before = &before_, b.after = &after_;
  const std::vector<double> nll = sums_of_pieces(batch, run(b, float(scale)));
  double sum = 0;
  for (size_t i = 0; i < batch.size(); ++i) {
    sum += batch[i].weight * nll[i];
    if (carries(batch[i]))
      copy_state(config_, after_, Index(i), slots_, batch[i].slot, queue_->stream());
  }
  return sum;
}

inline std::vector<double> CudaLearner::losses(const Batch& batch) {
  return sums_of_pieces(batch, run(texts_.upload(batch, *queue_), 0.f));
}

inline double CudaLearner::gradient_norm() {
  if (ranks_) ranks_->sum_rest(g_->numbers, queue_->stream());
  const unsigned blocks = unsigned(std::min<size_t>(kNormBlocks, chunks_.size()));
  gradient_norm_kernel<<<blocks, kUpdateThreads, 0, queue_->stream()>>>(flat(), norm_parts_.data());
  CUDA_CHECK(cudaGetLastError());
  std::vector<double> parts(blocks);
  CUDA_CHECK(cudaMemcpyAsync(parts.data(), norm_parts_.data(), blocks * sizeof(double),
                             cudaMemcpyDeviceToHost, queue_->stream()));
  queue_->wait();
  return std::sqrt(std::accumulate(parts.begin(), parts.end(), 0.0));
}

inline void CudaLearner::update(const ssm::AdamW& o, double scale) {
  ++steps_;
  const double m_scale = 1 / (1 - std::pow(o.beta1, double(steps_)));
  const double v_scale = 1 / (1 - std::pow(o.beta2, double(steps_)));
  const AdamWStep step{float(scale),
                       float(o.beta1),
                       float(o.beta2),
                       float(o.eps),
                       float(o.lr * o.weight_decay),
                       float(o.lr * m_scale),
                       float(v_scale)};
  with_type([&](auto* type) {
    const auto kernel = adamw_kernel<std::remove_pointer_t<decltype(type)>>;
    kernel<<<unsigned(chunks_.size()), kUpdateThreads, 0, queue_->stream()>>>(flat(), step);
    CUDA_CHECK(cudaGetLastError());
  });
}

inline Learned<float> CudaLearner::learned() const {
  queue_->wait();
  Learned<float> all{download_model(config_, w_->at), {}, {}, steps_};
  if (m_) all.m = download_model(config_, m_->at), all.v = download_model(config_, v_->at);
  return all;
}

// --- LoRA, see train.hpp: the small factors come and go, W and dW stay here ---

// Where the numbers of weight number `which` begin in the flat buffers, its first chunk, its shape.
struct FlatPlace {
  int64_t first, chunk, rows, cols;
};
inline FlatPlace place_of(const Config& config, const FlatModel& flat, size_t which) {
  FlatPlace found{};
  int64_t chunk = 0;
  for_each_weight(config, flat.at, [&](const std::string&, const auto& shape, const float* p) {
    const int64_t size = size_of(shape);
    if (which-- == 0) found = {p - flat.numbers.data(), chunk, shape[0], size / shape[0]};
    chunk += ceil_div(size, int64_t{kParameterChunk});
  });
  return found;
}

// W + B A -> the copy of W to compute with.
inline void CudaLearner::merge(size_t which, const Matrix<float>& A, const Matrix<float>& B) {
  const FlatPlace W = place_of(config_, *w_, which);
  const Matrix<float> A_T = A.transpose();  // (cols, r)
  const DeviceBuffer<float> a(A_T.data(), A_T.size()), b(B.data(), B.size());
  DeviceBuffer<float> sum(static_cast<size_t>(W.rows * W.cols));
  CUDA_CHECK(cudaMemcpyAsync(sum.data(), w_->numbers.data() + W.first, sum.bytes(),
                             cudaMemcpyDeviceToDevice, queue_->stream()));
  queue_->linear(b.data(), W.rows, A.rows(), a.data(), W.cols, A.rows(), sum.data(), W.cols, 1.f);
  FlatParameters one = flat();  // but for this weight alone
  one.chunks += W.chunk, one.n_chunks = ceil_div(W.rows * W.cols, int64_t{kParameterChunk});
  one.w = sum.data() - W.first;
  with_type([&](auto* type) {
    const auto kernel = copy_parameters_kernel<std::remove_pointer_t<decltype(type)>>;
    kernel<<<unsigned(one.n_chunks), kUpdateThreads, 0, queue_->stream()>>>(one);
    CUDA_CHECK(cudaGetLastError());
  });
  queue_->wait();  // sum is about to vanish
}

// dA (r, cols) = B^T dW and dB (rows, r) = dW A^T
inline std::pair<Matrix<float>, Matrix<float>> CudaLearner::pull_back(size_t which,
                                                                      const Matrix<float>& A,
                                                                      const Matrix<float>& B) {
  const FlatPlace W = place_of(config_, *w_, which);
  const float* const dW = g_->numbers.data() + W.first;
  const int64_t r = A.rows();
  const DeviceBuffer<float> a(A.data(), A.size()), b(B.data(), B.size());
  DeviceBuffer<float> da(a.size()), db(b.size());
  const float one = 1.f, zero = 0.f;
  CUBLAS_CHECK(cublasGemmEx(queue_->cublas(), CUBLAS_OP_N, CUBLAS_OP_T, int(W.cols), int(r),
                            int(W.rows), &one, dW, CUDA_R_32F, int(W.cols), b.data(), CUDA_R_32F,
                            int(r), &zero, da.data(), CUDA_R_32F, int(W.cols), CUBLAS_COMPUTE_32F,
                            CUBLAS_GEMM_DEFAULT));
  queue_->linear(dW, W.rows, W.cols, a.data(), r, W.cols, db.data(), r);
  queue_->wait();
  Matrix<float> dA(r, W.cols), dB(W.rows, r);
  da.copy_to(dA.data()), db.copy_to(dB.data());
  return {dA, dB};
}

inline std::vector<ssm::State<float>> CudaLearner::carried() const {
  std::vector<ssm::State<float>> states;
  for (Index s = 0; s < slots_.batch; ++s) {
    DeviceState one(config_, dtype_, 1);
    copy_state(config_, slots_, s, one, 0, queue_->stream());
    queue_->wait();
    states.push_back(host_state(config_, dtype_, one));
  }
  return states;
}

inline void CudaLearner::carry(const std::vector<ssm::State<float>>& states) {
  slots_ = DeviceState(config_, dtype_, static_cast<int64_t>(states.size()));
  for (size_t s = 0; s < states.size(); ++s) {
    const DeviceState one = device_state(config_, dtype_, states[s]);
    copy_state(config_, one, 0, slots_, Index(s), queue_->stream());
    queue_->wait();
  }
}

// --- mamba train on several GPUs -----------------------------------------------------------------

// The number that a launcher set.
inline Index rank_variable(const char* name, Index least, Index most) {
  const char* const text = std::getenv(name);
  const std::vector<Token> number = parse_ids(text ? text : "", name);
  if (number.size() != 1 || number[0] < least || number[0] > most)
    fail_usage(name, ": expected a number from ", least, " to ", most, ", found ",
               quote(text ? text : ""));
  return number[0];
}

constexpr int kRankSeconds = 300;  // in which all ranks are to be there

// The socket of another rank to rank 0, which says who called.
inline int call_rank_0(const addrinfo& at, int rank) {
  for (int tries = 0;; ++tries, std::this_thread::sleep_for(std::chrono::milliseconds(100))) {
    const int socket = ::socket(at.ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (::connect(socket, at.ai_addr, at.ai_addrlen) == 0 &&
        ::send(socket, &rank, sizeof rank, MSG_NOSIGNAL) == sizeof rank)
      return socket;
    check_call(tries < 10 * kRankSeconds, "cannot reach", "rank 0 (NCCL_COMM_ID)");
    ::close(socket);
  }
}

// The sockets of rank 0 to all others.
inline std::vector<int> await_ranks(const addrinfo& at, Index count) {
  const int door = ::socket(at.ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0), yes = 1;
  ::setsockopt(door, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
  check_call(::bind(door, at.ai_addr, at.ai_addrlen) == 0 && ::listen(door, int(count)) == 0,
             "cannot listen", "NCCL_COMM_ID");
  std::vector<int> sockets(static_cast<size_t>(count - 1), -1);
  for (Index there = 1; there < count;) {
    pollfd wait = {door, POLLIN, 0};
    if (::poll(&wait, 1, 1000 * kRankSeconds) < 1)
      fail("WORLD_SIZE: expected ", count, " ranks within ", kRankSeconds, " s, found ", there);
    const int socket = ::accept4(door, nullptr, nullptr, SOCK_CLOEXEC);
    int other = 0;
    const bool told = ::recv(socket, &other, sizeof other, MSG_WAITALL) == sizeof other;
    if (told && other > 0 && other < count && sockets[other - 1] < 0)
      sockets[other - 1] = socket, ++there;
    else
      ::close(socket);
  }
  ::close(door);
  return sockets;
}

// Joins the programs that a launcher started.
inline std::vector<int> join_ranks(Index& rank, Index count, int& device) {
  rank = rank_variable("RANK", 0, count - 1);
  device = int(rank_variable("LOCAL_RANK", 0, 1024));
  const char* const variable = std::getenv("NCCL_COMM_ID");
  const std::string address = variable ? variable : "";
  const size_t colon = std::min(address.rfind(':'), address.size());
  addrinfo hints = {}, *at = nullptr;
  hints.ai_socktype = SOCK_STREAM;
  if (colon + 1 >= address.size() ||
      ::getaddrinfo(address.substr(0, colon).c_str(), &address[colon + 1], &hints, &at) != 0)
    fail_usage("NCCL_COMM_ID: expected host:port of rank 0, found ", quote(address));
  ::unsetenv("NCCL_COMM_ID");  // that port is ours: NCCL finds one for itself
  return rank == 0 ? await_ranks(*at, count) : std::vector<int>{call_rank_0(*at, int(rank))};
}

// Becomes `count` programs, of which this one is rank 0; they end when it ends.
inline std::vector<int> fork_ranks(Index& rank, Index count) {
  std::vector<int> sockets;
  const pid_t me = ::getpid();
  for (Index other = 1; other < count; ++other) {
    int pair[2];
    check_call(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0, "--gpus", "socket");
    const pid_t child = ::fork();
    check_call(child >= 0, "--gpus", "fork");
    ::close(pair[child == 0 ? 0 : 1]);
    if (child > 0) {
      sockets.push_back(pair[0]);
      continue;
    }
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (::getppid() != me) ::_exit(1);
    for (const int socket : sockets) ::close(socket);
    rank = other;
    return {pair[1]};
  }
  return sockets;
}

struct CudaTrain : Train<CudaEngine> {
  static constexpr Index kMostRanks = 1024;
  Index gpus = 1;

  void declare(CLI::App* sub) {
    Train::declare(sub);
    sub->add_option("--gpus", gpus,
                    "how many learn together, each from --accumulate batches a step; or RANK, "
                    "WORLD_SIZE, LOCAL_RANK and NCCL_COMM_ID=host:port are set for each of them")
        ->check(CLI::Range(Index{1}, kMostRanks))
        ->excludes("--device");
  }

  void run() {
    const bool launched = gpus == 1 && std::getenv("WORLD_SIZE");
    const Index count = launched ? rank_variable("WORLD_SIZE", 1, kMostRanks) : gpus;
    if (count == 1) return Train::run();
    if (data_options.carry_state) fail_usage("--carry-state: expected one GPU, found ", count);
    Index rank = 0;
    const std::vector<int> sockets =
        launched ? join_ranks(rank, count, engine_options.device) : fork_ranks(rank, count);
    if (!launched) engine_options.device = int(rank);
    if (rank > 0) std::cerr.setstate(std::ios::failbit);  // rank 0 speaks
    static Lifeline* const lifeline = new Lifeline(rank, sockets);
    try {
      use_device(engine_options.device);
      options.ranks = std::make_shared<CudaRanks>(rank, count, *lifeline);
      engine_options.ranks = options.ranks.get();
      Train::run();
    } catch (const std::exception& error) {
      lifeline->failed(error.what());
      throw;
    }
    lifeline->done();
    while (rank == 0 && ::wait(nullptr) > 0) {
    }
  }
};

}  // namespace mamba

#ifndef MAMBA_NO_MAIN
#include "verify.hpp"

// Kernels that `mamba_cuda verify --so` runs work on the GPU's memory.
struct DeviceMemory {
  static constexpr bool kDevice = true;
  mamba::DeviceBuffer<char> bytes;
  explicit DeviceMemory(std::string_view from) : bytes(from.data(), from.size()) {}
  void* data() const { return bytes.data(); }
  void copy_to(char* host) const { bytes.copy_to(host); }
};

int main(int argc, char** argv) {
  using namespace mamba;
  std::vector<Command> more = verify::commands<DeviceMemory>();
  more.push_back(command<CudaTrain>("train", "train a model, from nothing or onward"));
  return run<CudaEngine>(argc, argv, more);
}
#endif
