// What the GPU tests share: mamba.cu, numbers to the device and back, and the bounds of each
// storage type.
#pragma once

#include "support.hpp"

#define MAMBA_NO_MAIN
#include "mamba.cu"

namespace test {

using mamba::DeviceBuffer;
using bf16 = __nv_bfloat16;
using half = __half;

// Before the first test: where there is no GPU there is nothing to test.
inline const bool gpu_here = [] {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess && count > 0) return true;
  std::cout << "GPU tests: skipped, no GPU here\n";
  std::exit(0);
}();

// Numerics (DESIGN): |got - want| <= k eps m. One k for each storage type. float: as for the forms
// of the reference, sums in other orders and decays exp(sum of delta A). 16 bits: what is stored is
// rounded once, tensor cores read factors rounded once more each; the rest is float.
template <class T>
inline constexpr double kEps = 0x1p-24;
template <>
inline constexpr double kEps<bf16> = 0x1p-8;
template <>
inline constexpr double kEps<half> = 0x1p-11;
template <class T>
inline constexpr double kTiny = 0;  // below the smallest normal number, spacing is that of it
template <>
inline constexpr double kTiny<half> = 0x1p-14;
template <class T>
inline constexpr double kBound = sizeof(T) == 4 ? 256 : 4;

struct Worst {  // the largest multiples of eps m that were seen, printed at the end of a test
  std::string what;
  double of_out = 0, of_state = 0;
  ~Worst() {
    std::cout << what << ": worst output " << of_out << ", worst state " << of_state
              << " roundings\n";
  }
};

template <class T>
float stored(double v) {
  return static_cast<float>(static_cast<T>(static_cast<float>(v)));
}
template <class T>
Matrix<double> stored(const Matrix<double>& m) {
  return m.unaryExpr([](double v) { return static_cast<double>(stored<T>(v)); });
}
template <class T, class M>
DeviceBuffer<T> up(const M& m) {
  std::vector<T> host(static_cast<std::size_t>(m.size()));
  for (Index r = 0, i = 0; r < m.rows(); ++r)
    for (Index c = 0; c < m.cols(); ++c)
      host[static_cast<std::size_t>(i++)] = static_cast<T>(static_cast<float>(m(r, c)));
  return DeviceBuffer<T>(host.data(), host.size());
}
template <class T>
Matrix<double> down(const DeviceBuffer<T>& buffer, Index rows, Index cols) {
  CUDA_CHECK(cudaDeviceSynchronize());
  std::vector<T> host(buffer.size());
  if (!host.empty()) buffer.copy_to(host.data());
  Matrix<double> m(rows, cols);
  for (Index i = 0; i < m.size(); ++i)
    m.data()[i] = static_cast<double>(static_cast<float>(host[static_cast<std::size_t>(i)]));
  return m;
}
template <class T>
DeviceBuffer<T> poisoned(Index size) {  // NaN in every type
  DeviceBuffer<T> buffer(static_cast<std::size_t>(size));
  if (size > 0) CUDA_CHECK(cudaMemset(buffer.data(), 0xff, buffer.bytes()));
  return buffer;
}
template <class T>
const T* optional(const DeviceBuffer<T>& buffer) {
  return buffer.size() ? buffer.data() : nullptr;
}

// Blocks of rows of one matrix, one for each sequence.
inline auto of(Matrix<double>& m, Index b, Index batch) {
  return m.middleRows(b * m.rows() / batch, m.rows() / batch);
}

inline const std::vector<Index> kLengths = {0, 1, 2, 3, 31, 32, 33, 63, 257, 513};

}  // namespace test
