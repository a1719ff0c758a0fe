// What the tests share: where files are, random inputs, and the bound that every comparison uses.
#pragma once

#include <cstdlib>
#include <filesystem>
#include <iostream>
#include <optional>
#include <string>

#include "../mamba.hpp"
#include "catch.hpp"

namespace test {

using mamba::Index;
using mamba::Matrix;
using mamba::Random;
using mamba::Token;
using ssm::Row;
using ssm::StateMatrix;

/// A path in the repository.
inline std::string root(const std::string& path) {
  const char* given = std::getenv("MAMBA_ROOT");
  return std::string(given ? given : ".") + "/" + path;
}

/// The folder of further test data that MAMBA_TEST_DATA names, or nothing; a test that needs it
/// says that it was skipped.
inline std::optional<std::string> extra_data() {
  const char* given = std::getenv("MAMBA_TEST_DATA");
  if (given && *given) return std::string(given);
  WARN("skipped: needs MAMBA_TEST_DATA");
  return {};
}

/// The golden folders to go through: the repository's, and those of MAMBA_TEST_DATA if it is set.
inline std::vector<std::string> golden_folders() {
  std::vector<std::string> folders = {root("tests/golden")};
  const char* given = std::getenv("MAMBA_TEST_DATA");
  if (given && *given)
    for (const char* name : {"/golden", "/golden-hybrids"})
      folders.push_back(given + std::string(name));
  return folders;
}

inline std::vector<std::string> files_matching(const std::string& folder,
                                               const std::string& start) {
  std::vector<std::string> found;
  for (const auto& entry : std::filesystem::directory_iterator(folder))
    if (entry.path().filename().string().rfind(start, 0) == 0)
      found.push_back(entry.path().string());
  std::sort(found.begin(), found.end());
  return found;
}

/// A folder of its own for a test's files, removed at the end.
struct TempFolder {
  std::string path;
  TempFolder() {
    std::string name = (std::filesystem::temp_directory_path() / "mamba_test_XXXXXX").string();
    REQUIRE(::mkdtemp(name.data()) != nullptr);
    path = name;
  }
  ~TempFolder() { std::filesystem::remove_all(path); }
  TempFolder(const TempFolder&) = delete;
  TempFolder& operator=(const TempFolder&) = delete;
  std::string operator/(const std::string& name) const { return path + "/" + name; }
  std::size_t files() const {
    const std::filesystem::directory_iterator begin(path), end;
    return static_cast<std::size_t>(std::distance(begin, end));
  }
  bool empty() const { return files() == 0; }
};

/// A tensor of a file as a matrix: the last extent is columns, all others together are rows.
template <class Scalar>
Matrix<Scalar> matrix(const mamba::Tensor& tensor) {
  const Index cols = tensor.shape.empty() ? 1 : tensor.shape.back();
  Matrix<Scalar> m(cols ? static_cast<Index>(tensor.size()) / cols : 0, cols);
  mamba::convert(tensor, m.data());
  return m;
}

/// Checks |got - want| <= k eps magnitude, entry by entry (README: Verification), where magnitude
/// is the natural size of the terms that were added. NaN never passes. Returns the worst multiple
/// of eps * magnitude.
template <class Got, class Want, class Size>
double check_close(const char* name, const Got& got, const Want& want, const Size& magnitude,
                   double k, double eps) {
  REQUIRE(got.rows() == want.rows());
  REQUIRE(got.cols() == want.cols());
  double worst = 0;
  Index row = 0, col = 0;
  for (Index r = 0; r < got.rows(); ++r) {
    for (Index c = 0; c < got.cols(); ++c) {
      const double error =
          std::abs(static_cast<double>(got(r, c)) - static_cast<double>(want(r, c)));
      const double unit = eps * static_cast<double>(magnitude(r, c)) + 1e-300;
      if (!(error / unit <= worst))
        worst = std::isnan(error) ? INFINITY : error / unit, row = r, col = c;
    }
  }
  INFO(name << ": worst at (" << row << ", " << col << "): " << worst
            << " units of rounding, allowed " << k);
  CHECK(worst <= k);
  return worst;
}

/// Largest |a - b|; NaN and a wrong shape count as infinite.
template <class A, class B>
double max_difference(const A& a, const B& b) {
  if (a.rows() != b.rows() || a.cols() != b.cols()) return INFINITY;
  double worst = 0;
  for (Index r = 0; r < a.rows(); ++r)
    for (Index c = 0; c < a.cols(); ++c) {
      const double d = std::abs(static_cast<double>(a(r, c)) - static_cast<double>(b(r, c)));
      if (!(d <= worst)) worst = std::isnan(d) ? INFINITY : d;
    }
  return worst;
}

// --- whole models, for the tests of either program: Engine is what mamba.hpp asks for ---

/// The token ids of a tensor: `count` of them from `first` on, or all.
inline std::vector<Token> tokens(const mamba::Tensor& tensor, Index first = 0, Index count = -1) {
  const auto all = mamba::values<std::int64_t>(tensor);
  const auto begin = all.begin() + first;
  return {begin, count < 0 ? all.end() : begin + count};
}

/// A model with expected logits, a matrix for each sequence of ids.
struct Case {
  std::string folder;
  std::vector<std::vector<Token>> ids;
  std::vector<Matrix<double>> logits;
};

inline std::vector<Case> golden_models() {
  std::vector<Case> cases;
  for (const std::string& folder : golden_folders())
    for (const std::string& path : files_matching(folder, "")) {
      if (!std::filesystem::exists(path + "/expected.safetensors")) continue;
      const mamba::Checkpoint file = mamba::read_safetensors(path + "/expected.safetensors");
      const auto& shape = file.at("logits").shape;  // (batch, L, vocab_size)
      const Matrix<double> logits = matrix<double>(file.at("logits"));
      Case c{path, {}, {}};
      for (Index b = 0; b < shape[0]; ++b) {
        c.ids.push_back(tokens(file.at("ids"), b * shape[1], shape[1]));
        c.logits.push_back(logits.middleRows(b * shape[1], shape[1]));
      }
      cases.push_back(c);
    }
  return cases;
}

inline const std::vector<std::string> kModes = {"parallel",  "recurrent", "chunked=1",
                                                "chunked=3", "chunked=7", "chunked=64"};

template <class Engine>
Engine open_model(const std::string& folder, std::optional<mamba::DType> dtype = {},
                  float delta_ratio = 1) {
  mamba::EngineOptions options;
  options.dtype = dtype;
  options.delta_ratio = delta_ratio;
  return {mamba::read_checkpoint(folder), mamba::read_config(folder), options};
}

template <class Engine>
Matrix<float> logits_of(Engine& engine, const std::vector<Token>& ids, const std::string& mode) {
  Matrix<float> all(static_cast<Index>(ids.size()), engine.config().vocab_size);
  auto state = engine.new_state();
  mamba::walk(
      engine, state, ids.data(), static_cast<Index>(ids.size()), mamba::parse_mode(mode),
      [&](Index first, const Matrix<float>& rows) { all.middleRows(first, rows.rows()) = rows; });
  return all;
}

/// Saves the state of a text in the making after some tokens, and goes on from the file: the same
/// text.
template <class Engine>
void a_saved_state_goes_on(Engine& engine) {
  using Sequence = mamba::Sequence<typename Engine::State>;
  const TempFolder folder;
  mamba::GenerateOptions options;
  const auto run = [&](Sequence& s, Index n) {
    options.n = n;
    std::vector<Sequence> one;
    one.push_back(std::move(s));
    engine.generate(one, options, [](std::size_t, Token) {});
    s = std::move(one[0]);
  };
  Sequence whole{{7, 8, 9, 10, 11}, engine.new_state(), 0, 0};
  run(whole, 20);
  for (const Index first : {0, 1, 9}) {
    Sequence part{{7, 8, 9, 10, 11}, engine.new_state(), 0, 0};
    run(part, first);
    mamba::save_state(folder / "state", part.ids, engine.to_host(part.state));
    Sequence next{{}, engine.new_state(), 0, 0};
    next.state = engine.from_host(mamba::load_state(folder / "state", engine.config(), next.ids));
    next.taken = next.ids.size() - 1;
    run(next, 20 - first);
    CAPTURE(first);
    CHECK(next.ids == whole.ids);
  }
}

}  // namespace test
