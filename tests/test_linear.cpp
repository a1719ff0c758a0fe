// Claims: the threaded matrix product is the product in double within rounding, at every size and
// storage type, the same bits for every number of threads.
#define MAMBA_NO_MAIN
#include "../mamba.cpp"

#include <tbb/task_arena.h>

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

// Random weights stored as dtype, and their values.
struct RandomWeight {
  RandomWeight(DType dtype, Index rows, Index cols, std::mt19937& rng)
      : stored(rows * cols * 4), values(rows, cols) {
    std::normal_distribution<float> normal;
    for (Index i = 0; i < rows * cols; ++i) {
      const float value = normal(rng);
      std::uint32_t bits;
      std::memcpy(&bits, &value, 4);
      if (dtype == DType::F32) std::memcpy(&stored[4 * i], &bits, 4);
      values.data()[i] = value;
      if (dtype == DType::F32) continue;
      const auto half = static_cast<std::uint16_t>(
          dtype == DType::BF16 ? bits >> 16 : (rng() & 0x83ff) | (rng() % 18 << 10));
      std::memcpy(&stored[2 * i], &half, 2);
      values.data()[i] = decode(dtype, half);
    }
    weight = {dtype, rows, cols, stored.data(), nullptr};
  }
  std::vector<char> stored;
  Matrix<double> values;
  Weight weight;
};

// f() with n threads, also where there are fewer cores.
template <class Function>
void with_threads(int n, const Function& f) {
  const tbb::global_control limit(tbb::global_control::max_allowed_parallelism,
                                  static_cast<std::size_t>(n));
  tbb::task_arena(n).execute(f);
}

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

TEST_CASE("linear: of a wider matrix only the given columns are read") {
  std::mt19937 rng(3);
  for (const DType dtype : kStoredTypes)
    for (const Index L : kLengths) {
      const RandomWeight w(dtype, 17, 80, rng);
      Matrix<float> x = Matrix<float>::Constant(L, 97, std::nanf(""));
      x.middleCols(3, 80).setRandom();
      const Matrix<float> alone = x.middleCols(3, 80);
      CHECK(linear(x.middleCols(3, 80), w.weight) == linear(alone, w.weight));
    }
}

TEST_CASE("linear: the same bits for every number of threads") {
  std::mt19937 rng(4);
  for (const DType dtype : kStoredTypes)
    for (const Index L : kLengths)
      for (const Index rows : {Index{80}, Index{1030}}) {
        const RandomWeight w(dtype, rows, 1601, rng);
        const Matrix<float> x = Matrix<float>::Random(L, 1601);
        Matrix<float> one, several;
        with_threads(1, [&] { one = linear(x, w.weight); });
        for (const int n : {2, 3, 4}) {
          with_threads(n, [&] { several = linear(x, w.weight); });
          CHECK(several == one);
        }
      }
}

TEST_CASE("linear: x must have as many columns as W") {
  std::mt19937 rng(5);
  const RandomWeight w(DType::F32, 3, 5, rng);
  const Matrix<float> x = Matrix<float>::Zero(2, 4);
  CHECK_THROWS_WITH(linear(x, w.weight), "linear: x: expected 5 columns, found 4");
}

TEST_CASE("linear: weights at any address of a file are read") {
  std::mt19937 rng(6);
  for (const DType dtype : kStoredTypes)
    for (const Index offset : {0, 1, 2, 3}) {
      const RandomWeight w(dtype, 3, 5, rng);
      const auto bytes = std::make_shared<std::vector<char>>(static_cast<std::size_t>(offset));
      bytes->insert(bytes->end(), w.stored.begin(), w.stored.end());
      Weight weight;
      assign(Tensor{"W", dtype, {3, 5}, bytes->data() + offset, bytes}, {}, weight);
      CHECK(weight.dtype == dtype);
      CHECK(reinterpret_cast<std::uintptr_t>(weight.data) % dtype_size(dtype) == 0);
      for (Index i = 0; i < 3; ++i) CHECK(row(weight, i).cast<double>() == w.values.row(i));
    }
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
  for (const int threads : {1, 2, 4})
    for (const Index n : {Index{0}, Index{1}, Index{10}, Index{1001}})
      with_threads(threads, [&] {
        std::vector<int> count(n);
        std::vector<Index> ends(n);
        parallel_for(n, 7, [&](Index begin, Index size) {
          for (Index i = begin; i < begin + size; ++i) ++count[i], ends[i] = begin + size;
        });
        for (Index i = 0; i < n; ++i) {
          CHECK(count[i] == 1);
          CHECK(ends[i] == std::min(n, i / 7 * 7 + 7));
        }
      });
}

TEST_CASE("parallel_for: an exception in a piece arrives in the caller") {
  CHECK_THROWS(parallel_for(100, 1, [](Index i, Index) {
    if (i == 42) fail("piece ", i);
  }));
}
