// Claims: the threaded matrix product is the product in double within rounding, at every size and storage
// type, the same bits for every number of threads.
#define MAMBA_NO_MAIN
#include "../mamba.cpp"

#include <cmath>
#include <random>

#include "catch.hpp"

using namespace mamba;

namespace {

constexpr Index kSizes[] = {1, 3, 5, 17, 80, 257};
constexpr Index kLengths[] = {0, 1, 2, 3, 7, 16, 33, 130};
constexpr DType kStoredTypes[] = {DType::F32, DType::BF16, DType::F16};

// The value of a 16-bit float, from its definition: sign, exponent, fraction.
double decode(DType dtype, std::uint16_t bits) {
  const int fraction_bits = dtype == DType::F16 ? 10 : 7, bias = dtype == DType::F16 ? 15 : 127;
  const int exponent = (bits & 0x7fff) >> fraction_bits;
  const int fraction = bits & ((1 << fraction_bits) - 1);
  const double sign = bits >> 15 ? -1 : 1;
  if (exponent == 2 * bias + 1) return fraction ? std::nan("") : sign * INFINITY;
  const int implicit = exponent ? 1 << fraction_bits : 0;
  return sign * std::ldexp(implicit + fraction, std::max(exponent, 1) - bias - fraction_bits);
}

// Random weights stored as dtype from an odd 16-bit address on, and their values.
struct RandomWeight {
  RandomWeight(DType dtype, Index rows, Index cols, std::mt19937& rng)
      : stored(rows * cols * 4 + 2), values(rows, cols) {
    std::normal_distribution<float> normal;
    for (Index i = 0; i < rows * cols; ++i) {
      const float value = normal(rng);
      std::uint32_t bits;
      std::memcpy(&bits, &value, 4);
      if (dtype == DType::F32) std::memcpy(&stored[2 + 4 * i], &bits, 4);
      values.data()[i] = value;
      if (dtype == DType::F32) continue;
      const auto half = static_cast<std::uint16_t>(
          dtype == DType::BF16 ? bits >> 16 : (rng() & 0x83ff) | (rng() % 18 << 10));
      std::memcpy(&stored[2 + 2 * i], &half, 2);
      values.data()[i] = decode(dtype, half);
    }
    weight = {dtype, rows, cols, stored.data() + 2, nullptr};
  }
  std::vector<char> stored;
  Matrix<double> values;
  Weight weight;
};

}  // namespace

TEST_CASE("linear: x W^T is the product in double within rounding, at every size and dtype") {
  // k = 6: the sum over the lanes of a register rounds at most 4 times, the products and the sums
  // in each lane add roundings of either sign.
  const double eps = std::ldexp(1, -24), k = 6;
  std::mt19937 rng(1);
  double worst = 0;
  for (const DType dtype : kStoredTypes)
    for (const Index rows : kSizes)
      for (const Index cols : {1, 3, 5, 17, 80, 257, 1600})
        for (const Index L : kLengths) {
          if (rows * cols > 100000) continue;
          const RandomWeight w(dtype, rows, cols, rng);
          Matrix<float> x(L, cols);
          for (float& v : x.reshaped()) v = std::normal_distribution<float>()(rng);
          const Matrix<float> y = linear(x, w.weight);
          const Matrix<double> xd = x.cast<double>();
          const Matrix<double> want = xd * w.values.transpose();
          const Matrix<double> size = xd.cwiseAbs() * w.values.transpose().cwiseAbs();
          REQUIRE(y.rows() == L);
          REQUIRE(y.cols() == rows);
          for (Index t = 0; t < L; ++t)
            for (Index i = 0; i < rows; ++i)
              worst = std::max(worst, std::abs(y(t, i) - want(t, i)) / (eps * size(t, i)));
        }
  WARN("worst error: " << worst << " eps sum |x||w|");
  CHECK(worst <= k);
}

TEST_CASE("linear: row t of a product is the product of row t, to the bit") {
  std::mt19937 rng(2);
  for (const DType dtype : kStoredTypes)
    for (const Index L : kLengths) {
      const RandomWeight w(dtype, 83, 1601, rng);
      const Matrix<float> x = Matrix<float>::Random(L, 1601);
      const Matrix<float> y = linear(x, w.weight);
      for (Index t = 0; t < L; ++t) CHECK(y.row(t) == linear(x.row(t), w.weight));
    }
}

TEST_CASE("linear: strided x and y are read and written only where they should be") {
  std::mt19937 rng(3);
  for (const DType dtype : kStoredTypes)
    for (const Index L : kLengths) {
      const RandomWeight w(dtype, 17, 80, rng);
      const Matrix<float> x = Matrix<float>::Random(L, 97);
      Matrix<float> y = Matrix<float>::Constant(L, 23, 7);
      linear(x.data() + 3, L, 97, w.weight, y.data() + 2, 23);
      CHECK(y.middleCols(2, 17) == linear(x.middleCols(3, 80), w.weight));
      CHECK((y.leftCols(2).array() == 7).all());
      CHECK((y.rightCols(4).array() == 7).all());
    }
}

TEST_CASE("linear: the same bits for every number of threads") {
  std::mt19937 rng(4);
  const int threads = omp_get_max_threads();
  for (const DType dtype : kStoredTypes)
    for (const Index L : kLengths)
      for (const Index rows : {Index{80}, Index{1030}}) {
        const RandomWeight w(dtype, rows, 1601, rng);
        const Matrix<float> x = Matrix<float>::Random(L, 1601);
        omp_set_num_threads(1);
        const Matrix<float> one = linear(x, w.weight);
        for (const int n : {2, 3, 4}) {
          omp_set_num_threads(n);
          CHECK(linear(x, w.weight) == one);
        }
      }
  omp_set_num_threads(threads);
}

TEST_CASE("linear: every 16-bit pattern is read as the value it stores") {
  std::vector<std::uint16_t> bits(1 << 16);
  for (std::size_t i = 0; i < bits.size(); ++i) bits[i] = static_cast<std::uint16_t>(i);
  for (const DType dtype : {DType::BF16, DType::F16}) {
    const Matrix<float> got = row({dtype, 1, 1 << 16, bits.data(), nullptr}, 0);
    for (Index i = 0; i < got.size(); ++i) {
      const double want = decode(dtype, bits[i]);
      if (!(got(i) == want || (std::isnan(got(i)) && std::isnan(want))))
        FAIL("pattern " << i << ": expected " << want << ", found " << got(i));
    }
  }
}

TEST_CASE("linear: row i is row i of the weights, and only rows of W are rows") {
  std::mt19937 rng(5);
  for (const DType dtype : kStoredTypes)
    for (const Index cols : kSizes) {
      const RandomWeight w(dtype, 3, cols, rng);
      for (Index i = 0; i < 3; ++i) CHECK(row(w.weight, i).cast<double>() == w.values.row(i));
      CHECK_THROWS(row(w.weight, 3));
      CHECK_THROWS(row(w.weight, -1));
    }
}

TEST_CASE("parallel_for: covers 0 to n once, in pieces that do not depend on the threads") {
  const int threads = omp_get_max_threads();
  for (const int t : {1, 2, 4})
    for (const Index n : {Index{0}, Index{1}, Index{10}, Index{1001}}) {
      omp_set_num_threads(t);
      std::vector<int> count(n);
      std::vector<Index> ends(n);
      parallel_for(n, 7, [&](Index begin, Index end) {
        for (Index i = begin; i < end; ++i) ++count[i], ends[i] = end;
      });
      for (Index i = 0; i < n; ++i) {
        CHECK(count[i] == 1);
        CHECK(ends[i] == std::min(n, i / 7 * 7 + 7));
      }
    }
  omp_set_num_threads(threads);
}

TEST_CASE("parallel_for: an exception in a piece arrives in the caller") {
  CHECK_THROWS(parallel_for(100, 1, [](Index i, Index) {
    if (i == 42) fail("piece ", i);
  }));
}
