// What the GPU tests share: mamba.cu, numbers to the device and back, and the kernel checker's bound.
#pragma once

#include "support.hpp"

#define MAMBA_NO_MAIN
#include "mamba.cu"
#include "verify.hpp"

namespace test {

using mamba::DeviceBuffer;
using mamba::verify::Bounded;
using mamba::verify::Rule;
using bf16 = __nv_bfloat16;
using half = __half;

// Before the first test: where there is no GPU there is nothing to test.
inline const bool gpu_here = [] {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess && count > 0) return true;
  std::cout << "GPU tests: skipped, no GPU here\n";
  std::exit(0);
}();

// Numbers of each storage type are judged as the kernel checker judges them (verify.hpp).
template <class T>
inline constexpr Rule kRule = mamba::verify::rule(mamba::DType::F32);
template <>
inline constexpr Rule kRule<bf16> = mamba::verify::rule(mamba::DType::BF16);
template <>
inline constexpr Rule kRule<half> = mamba::verify::rule(mamba::DType::F16);

/// Checks that every number is within the bound of the reference's, which knows it. Returns the
/// worst error in units of the bound.
template <class Want>
double check_bounded(const char* name, const Matrix<double>& got, const Want& want,
                     const Rule& rule) {
  REQUIRE(got.rows() == want.rows());
  REQUIRE(got.cols() == want.cols());
  double worst = 0;
  Index row = 0, col = 0;
  for (Index r = 0; r < got.rows(); ++r)
    for (Index c = 0; c < got.cols(); ++c)
      if (const double d = mamba::verify::distance(got(r, c), want(r, c), rule); d > worst)
        worst = d, row = r, col = c;
  INFO(name << ": worst at (" << row << ", " << col << "): " << worst << " bounds");
  CHECK(worst <= 1);
  return worst;
}
inline Matrix<Bounded> bounded(const Matrix<double>& m) { return m.cast<Bounded>(); }

/// A scan's inputs; of the optional ones an empty matrix is none.
inline ssm::ScanInputs<Bounded> scan_inputs(const Matrix<Bounded>& x, const Matrix<Bounded>& delta,
                                            const StateMatrix<Bounded>& A, const Matrix<Bounded>& B,
                                            const Matrix<Bounded>& C, const Matrix<Bounded>& D,
                                            const Matrix<Bounded>& z, const Matrix<Bounded>& bias,
                                            bool softplus) {
  ssm::ScanInputs<Bounded> in;
  in.x = x, in.delta = delta, in.A = A, in.B = B, in.C = C;
  if (D.size()) in.D = D;
  if (z.size()) in.z = z;
  if (bias.size()) in.delta_bias = bias;
  in.delta_softplus = softplus;
  return in;
}

struct Worst {  // the largest errors that were seen, printed at the end of a test
  std::string what;
  double of_out = 0, of_state = 0;
  const char* unit = "bounds";
  ~Worst() {
    std::cout << what << ": worst output " << of_out << ", worst state " << of_state << " " << unit
              << "\n";
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
template <class M>
auto of(M& m, Index b, Index batch) {
  return m.middleRows(b * m.rows() / batch, m.rows() / batch);
}

inline const std::vector<Index> kLengths = {0, 1, 2, 3, 31, 32, 33, 63, 257, 513};

}  // namespace test
