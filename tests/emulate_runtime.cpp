// The parts of the CUDA runtime and of cuBLAS that mamba.cu calls, for the emulated GPU of
// emulate.hpp: device memory is host memory, a stream does everything at once, a product is three
// loops.
#include "emulate.hpp"

namespace {

using emulated::Work;
constexpr cudaError_t kDone = cudaSuccess;

template <class Handle>
Handle handle(void* p) {
  return reinterpret_cast<Handle>(p);
}

float element(const void* p, cudaDataType type, std::size_t i) {
  if (type == CUDA_R_16BF) return static_cast<const __nv_bfloat16*>(p)[i];
  if (type == CUDA_R_16F) return static_cast<const __half*>(p)[i];
  return static_cast<const float*>(p)[i];
}
void store(void* p, cudaDataType type, std::size_t i, float v) {
  if (type == CUDA_R_16BF)
    static_cast<__nv_bfloat16*>(p)[i] = v;
  else if (type == CUDA_R_16F)
    static_cast<__half*>(p)[i] = v;
  else
    static_cast<float*>(p)[i] = v;
}

}  // namespace

// clang-format off
extern "C" {

// memory: NaN until it is written
cudaError_t cudaMalloc(void** p, size_t n) {
  if (posix_memalign(p, 256, n ? n : 1)) return cudaErrorMemoryAllocation;
  std::memset(*p, 0xff, n);
  return kDone;
}
cudaError_t cudaFree(void* p) { std::free(p); return kDone; }
cudaError_t cudaHostAlloc(void** p, size_t n, unsigned) { *p = std::calloc(1, n); return kDone; }
cudaError_t cudaFreeHost(void* p) { std::free(p); return kDone; }
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *free = *total = size_t{16} << 30;
  return kDone;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t n, cudaMemcpyKind) {
  std::memcpy(to, from, n);
  return kDone;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t n, cudaMemcpyKind, cudaStream_t) {
  emulated::submit([=] { std::memcpy(to, from, n); });
  return kDone;
}
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                              size_t width, size_t height, cudaMemcpyKind, cudaStream_t) {
  for (size_t i = 0; i < height; ++i)
    std::memcpy(static_cast<char*>(to) + i * to_pitch,
                static_cast<const char*>(from) + i * from_pitch, width);
  return kDone;
}
cudaError_t cudaMemset(void* to, int v, size_t n) { std::memset(to, v, n); return kDone; }
cudaError_t cudaMemsetAsync(void* to, int v, size_t n, cudaStream_t) {
  std::memset(to, v, n);
  return kDone;
}

// devices: like an A100 with few multiprocessors, so that small shapes take all ways
cudaError_t cudaGetDeviceCount(int* n) { *n = 8; return kDone; }
cudaError_t cudaGetDevice(int* n) { *n = 0; return kDone; }
cudaError_t cudaSetDevice(int) { return kDone; }
cudaError_t cudaDeviceGetAttribute(int* v, cudaDeviceAttr attribute, int) {
  *v = 0;
  if (attribute == cudaDevAttrMultiProcessorCount) *v = 12;
  if (attribute == cudaDevAttrComputeCapabilityMajor) *v = 8;
  if (attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin) *v = sizeof emulated::shared_memory;
  return kDone;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  std::memset(p, 0, sizeof *p);
  p->major = 8;
  return kDone;
}
cudaError_t cudaDriverGetVersion(int* v) { *v = CUDART_VERSION; return kDone; }
cudaError_t cudaRuntimeGetVersion(int* v) { *v = CUDART_VERSION; return kDone; }
cudaError_t cudaDeviceSynchronize() { return kDone; }
cudaError_t cudaGetLastError() { return kDone; }
const char* cudaGetErrorString(cudaError_t) { return "error of the emulated GPU"; }

// streams, events, graphs
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned) { *s = nullptr; return kDone; }
cudaError_t cudaStreamDestroy(cudaStream_t) { return kDone; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return kDone; }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return kDone; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) { *e = nullptr; return kDone; }
cudaError_t cudaEventDestroy(cudaEvent_t) { return kDone; }
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return kDone; }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return kDone; }
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t, cudaEvent_t) { *ms = 1; return kDone; }
cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
  emulated::captured = new std::vector<Work>;
  return kDone;
}
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
  *graph = handle<cudaGraph_t>(std::exchange(emulated::captured, nullptr));
  return kDone;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
  *exec = handle<cudaGraphExec_t>(graph);
  return kDone;
}
cudaError_t cudaGraphDestroy(cudaGraph_t) { return kDone; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  delete handle<std::vector<Work>*>(exec);
  return kDone;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t) {
  for (const Work& work : *handle<std::vector<Work>*>(exec)) work();
  return kDone;
}

cublasStatus_t cublasCreate_v2(cublasHandle_t* h) { *h = nullptr; return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasDestroy_v2(cublasHandle_t) { return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasSetStream_v2(cublasHandle_t, cudaStream_t) { return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasSetWorkspace_v2(cublasHandle_t, void*, size_t) {
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasSetMathMode(cublasHandle_t, cublasMath_t) { return CUBLAS_STATUS_SUCCESS; }
const char* cublasGetStatusString(cublasStatus_t) { return "error of the emulated GPU"; }

// C (n, m) = op(B) (n, k) op(A)^T (k, m) + beta C, row by row; a matrix of rows to be summed over
// is not transposed in A and transposed in B
cublasStatus_t cublasGemmEx(cublasHandle_t, cublasOperation_t A_op, cublasOperation_t B_op, int m,
                            int n, int k, const void*, const void* A, cudaDataType A_type, int lda,
                            const void* B, cudaDataType B_type, int ldb, const void* beta, void* C,
                            cudaDataType C_type, int ldc, cublasComputeType_t, cublasGemmAlgo_t) {
  const float keep = *static_cast<const float*>(beta);
  emulated::submit([=] {
    const auto row = [k](const void* p, cudaDataType type, int i, int stride, bool across) {
      std::vector<float> numbers(k);
      for (int l = 0; l < k; ++l) {
        const int r = across ? l : i, c = across ? i : l;  // row and column of the matrix at p
        numbers[l] = element(p, type, std::size_t(r) * stride + c);
      }
      return numbers;
    };
    std::vector<std::vector<float>> rows;
    for (int j = 0; j < n; ++j) rows.push_back(row(B, B_type, j, ldb, B_op != CUBLAS_OP_N));
    for (int i = 0; i < m; ++i) {
      const std::vector<float> a = row(A, A_type, i, lda, A_op == CUBLAS_OP_N);
      for (int j = 0; j < n; ++j) {
        const std::size_t at = std::size_t(j) * ldc + i;
        float sum = keep == 0 ? 0.f : keep * element(C, C_type, at);
        for (int l = 0; l < k; ++l) sum += a[l] * rows[j][l];
        store(C, C_type, at, sum);
      }
    }
  });
  return CUBLAS_STATUS_SUCCESS;
}

}  // extern "C"
