// The pictures, read back from their PNG files.
#include <array>
#include <cmath>
#include <filesystem>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include "support.hpp"

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"
#define STB_IMAGE_STATIC
#define STB_IMAGE_IMPLEMENTATION
#define STBI_ONLY_PNG
#include <stb/stb_image.h>
#pragma GCC diagnostic pop

namespace {

using mamba::Colour;
const double kInf = std::numeric_limits<double>::infinity();
const double kNaN = std::numeric_limits<double>::quiet_NaN();

struct Image {
  int width = 0, height = 0;
  std::vector<unsigned char> rgb;

  explicit Image(const std::string& path) {
    int channels = 0;
    unsigned char* data = stbi_load(path.c_str(), &width, &height, &channels, 0);
    REQUIRE(data != nullptr);
    REQUIRE(channels == 3);
    rgb.assign(data, data + std::size_t(3) * width * height);
    stbi_image_free(data);
  }

  bool is(int x, int y, Colour c) const {
    const unsigned char* p = &rgb[3 * (std::size_t(y) * width + x)];
    return p[0] == c.r && p[1] == c.g && p[2] == c.b;
  }

  // How many pixels left of `until` have the colour, and where they are on average.
  struct Spot {
    long count;
    double x, y;
  };
  Spot spot(Colour c, int from = 0, int until = 1 << 20) const {
    Spot all{0, 0, 0};
    for (int y = 0; y < height; ++y)
      for (int x = from; x < std::min(width, until); ++x)
        if (is(x, y, c)) all.count += 1, all.x += x, all.y += y;
    return {all.count, all.x / double(all.count), all.y / double(all.count)};
  }

  // Words that run out of the picture, or end at its very edge, would leave a mark here.
  bool edges_are_white() const {
    for (int y = 0; y < height; ++y)
      for (int x = 0; x < width; ++x) {
        const bool edge = std::min({x, y, width - 1 - x, height - 1 - y}) < 4;
        if (edge && !is(x, y, mamba::kWhite)) return false;
      }
    return true;
  }
};

const std::string kLong(300, 'W');

}  // namespace

TEST_CASE("line_chart: every series is there in its colour, in a picture of the size asked") {
  const test::TempFolder scratch;
  std::vector<mamba::Series> series;
  for (int s = 0; s < 6; ++s)
    series.push_back({"series " + std::to_string(s), {1, 2, 3}, {1. + s, 2. * s, 7. - s}});
  mamba::ChartOptions options;
  options.width = 900;
  options.height = 640;
  mamba::line_chart(scratch / "a.png", "title", "x", "y", series, options);
  const Image image(scratch / "a.png");
  CHECK(image.width == 900);
  CHECK(image.height == 640);
  CHECK(image.edges_are_white());
  for (int s = 0; s < 6; ++s) CHECK(image.spot(mamba::kLineColours[s]).count > 500);
  CHECK(image.spot(mamba::kLineColours[6]).count > 500);  // black: frame and words
}

TEST_CASE("line_chart: values grow to the right and upwards, evenly in the logarithm") {
  const test::TempFolder scratch;
  std::vector<mamba::Series> series;
  for (double v : {1., 100., 10000.}) series.push_back({"", {v}, {v}});
  for (bool log : {true, false}) {
    mamba::ChartOptions options;
    options.log_x = options.log_y = log;
    mamba::line_chart(scratch / "a.png", "t", "x", "y", series, options);
    const Image image(scratch / "a.png");
    std::array<Image::Spot, 3> at;
    for (std::size_t i = 0; i < 3; ++i) at[i] = image.spot(mamba::kLineColours[i]);
    CHECK(at[0].x < at[1].x);
    CHECK(at[1].x < at[2].x);
    CHECK(at[0].y > at[1].y);
    CHECK(at[1].y > at[2].y);
    const double middle = log ? 0.5 : 99. / 9999;
    CHECK(std::abs((at[1].x - at[0].x) / (at[2].x - at[0].x) - middle) < 0.005);
    CHECK(std::abs((at[1].y - at[0].y) / (at[2].y - at[0].y) - middle) < 0.005);
  }
}

TEST_CASE("line_chart: no data, odd data and endless words neither crash nor leave the picture") {
  const test::TempFolder scratch;
  std::vector<mamba::Series> many;
  for (int s = 0; s < 60; ++s) many.push_back({kLong, {double(s)}, {double(-s)}});
  const std::map<std::string, std::vector<mamba::Series>> cases = {
      {"no series", {}},
      {"an empty series", {{"empty", {}, {}}}},
      {"one point", {{"one", {5}, {5}}}},
      {"one point at zero", {{"", {0}, {0}}}},
      {"constant", {{"constant", {1, 2, 3}, {7, 7, 7}}}},
      {"nearly constant", {{"", {1, 2, 3}, {7, 7 + 1e-15, 7}}}},
      {"only NaN", {{"nan", {kNaN, 1}, {1, kNaN}}}},
      {"gaps", {{"gaps", {1, 2, 3, 4, 5}, {1, kNaN, kInf, -kInf, 5}}}},
      {"huge", {{"huge", {-1.7e308, 1, 1.7e308}, {1.7e308, 1, -1.7e308}}}},
      {"tiny", {{"tiny", {5e-324, 1e-310, 0}, {5e-324, 0, 1e-308}}}},
      {"wide", {{"wide", {-1e299, 1e299}, {-1.23456789e299, 9e299}}}},
      {"negative", {{"negative", {-3, -2, -1}, {-3, 0, 3}}}},
      {"long labels", {{"l", {1.23456789e-7, 1.234567895e-7}, {-123456.789, -123456.7891}}}},
      {"many series with long names", many},
      {"bytes that are no ASCII", {{"\xc3\xa9\xff\n\t\x01", {1, 2}, {1, 2}}}},
  };
  for (const auto& [name, series] : cases)
    for (bool log : {false, true})
      for (int width : {600, 1200}) {
        CAPTURE(name, log, width);
        mamba::ChartOptions options;
        options.log_x = options.log_y = log;
        options.width = width;
        options.height = width * 2 / 3;
        mamba::line_chart(scratch / "a.png", kLong, kLong, kLong, series, options);
        CHECK(Image(scratch / "a.png").edges_are_white());
      }
}

TEST_CASE("heat_map: cells lie where rows and columns say, and what is not finite is grey") {
  const test::TempFolder scratch;
  const std::string path = scratch / "a.png";
  mamba::heat_map(path, "t", "x", "y", {{0, 0.5}, {kNaN, 1}}, {"a", "b"}, {"c", "d"}, "bar");
  const Image image(path);
  CHECK(image.edges_are_white());
  const int cells = image.width * 3 / 4;  // the colour bar is right of it
  const auto low = image.spot({68, 1, 84}, 0, cells), high = image.spot({253, 231, 37}, 0, cells),
             middle = image.spot({33, 145, 140}, 0, cells),
             missing = image.spot(mamba::kMissing, 0, cells);
  for (const auto& each : {low, high, middle, missing}) CHECK(each.count > 50000);
  CHECK(low.y == middle.y);
  CHECK(low.y < missing.y);
  CHECK(low.x == missing.x);
  CHECK(low.x < high.x);
  CHECK(missing.y == high.y);
  mamba::HeatOptions options;
  options.low = -1;
  options.high = 1;
  mamba::heat_map(path, "t", "x", "y", {{0, 0}}, {}, {}, "bar", options);
  CHECK(Image(path).spot({33, 145, 140}).count > 400000);  // 0 is now the middle
}

TEST_CASE("heat_map: no data, odd data and endless words neither crash nor leave the picture") {
  const test::TempFolder scratch;
  const auto table = [](std::size_t rows, std::size_t columns, double v) {
    return std::vector<std::vector<double>>(rows, std::vector<double>(columns, v));
  };
  for (const auto& values :
       {table(0, 0, 0), table(3, 0, 0), table(1, 1, 5), table(2, 3, kNaN), table(2, 3, kInf),
        table(1, 2, 1.7e308), table(40, 30, -1e-310), table(3000, 2000, 0.5), table(1, 3000, 0),
        std::vector<std::vector<double>>{{-1e299, 1e299}}}) {
    const std::vector<std::string> rows(values.size(), kLong);
    const std::vector<std::string> columns(values.empty() ? 0 : values[0].size(), kLong);
    mamba::HeatOptions options;
    for (int width : {600, 1200}) {
      options.width = width;
      options.height = width * 2 / 3;
      CAPTURE(values.size(), columns.size(), width);
      mamba::heat_map(scratch / "a.png", kLong, kLong, kLong, values, rows, columns, kLong,
                      options);
      CHECK(Image(scratch / "a.png").edges_are_white());
    }
  }
}

TEST_CASE("canvas: what falls outside is not drawn and does not come back on the other side") {
  const test::TempFolder scratch;
  mamba::Canvas canvas(600, 400);
  const Colour blue = mamba::kLineColours[0];
  canvas.fill(-10, -10, 700, 3, blue);
  canvas.marker(-3, 100, 1, blue);
  canvas.marker(603, 200, 0, blue);
  canvas.line(-50, 300, 650, 300, blue);
  canvas.line(300, -500, 300, -400, blue);
  canvas.text(590, 250, kLong);
  canvas.text(100, 395, kLong, 3);
  canvas.text(100, 1000, kLong, 2, true);
  canvas.write_png(scratch / "a.png");
  const Image image(scratch / "a.png");
  CHECK(image.spot(blue, 0, 1).count == 3 + 9 + 3);      // whole pixels of fill, square, line
  CHECK(image.spot(blue, 599, 600).count == 3 + 7 + 3);  // of fill, disc, line
  CHECK(image.spot(mamba::kBlack, 0, 100).count == 0);
}

TEST_CASE("axis: ticks are few, round and within the axis") {
  const auto ticks = [](std::vector<double> values, bool log, int count) {
    mamba::Axis axis;
    axis.log = log;
    for (double v : values) axis.include(v);
    axis.close(0);
    return axis.ticks(count);
  };
  using Ticks = std::vector<double>;
  CHECK(ticks({0, 10}, false, 5) == Ticks{0, 2, 4, 6, 8, 10});
  CHECK(ticks({-1, 1}, false, 4) == Ticks{-1, -0.5, 0, 0.5, 1});
  CHECK(ticks({9, 31}, false, 6) == Ticks{10, 15, 20, 25, 30});
  CHECK(ticks({256, 512, 2048}, true, 10) == Ticks{256, 512, 1024, 2048});
  CHECK(ticks({1, 65536}, true, 6) == Ticks{1, 8, 64, 512, 4096, 32768});
  CHECK(ticks({3, 70}, true, 9) == Ticks{5, 10, 20, 50});
  CHECK(ticks({1, 3e6}, true, 8) == Ticks{1, 10, 100, 1000, 10000, 100000, 1000000});
  CHECK(mamba::tick_labels(ticks({3, 4}, true, 5)) ==
        std::vector<std::string>{"3", "3.2", "3.4", "3.6", "3.8", "4"});
  CHECK(mamba::tick_labels(ticks({-0.2, 0.2}, false, 3)) ==
        std::vector<std::string>{"-0.2", "0", "0.2"});
  CHECK(mamba::tick_label(3 * 0.1) == "0.3");
}

TEST_CASE("pictures: what cannot be drawn or written ends in one line and leaves no file") {
  const test::TempFolder scratch;
  const auto none = scratch / "no such directory/a.png";
  CHECK_THROWS_AS(mamba::line_chart(none, "t", "x", "y", {}), std::runtime_error);
  const auto path = scratch / "a.png";
  CHECK_THROWS_WITH(mamba::line_chart(path, "t", "x", "y", {{"s", {1, 2}, {1}}}),
                    "line chart: series s: expected 2 y, found 1");
  CHECK_THROWS_WITH(mamba::heat_map(path, "t", "x", "y", {{1, 2}, {1}}, {}, {}, "b"),
                    "heat map: expected 2 values in every row, found 1");
  mamba::ChartOptions small;
  small.width = 10;
  CHECK_THROWS_WITH(mamba::line_chart(path, "t", "x", "y", {}, small),
                    "picture: expected 600 x 400 to 10000 x 10000 pixels, found 10 x 800");
  CHECK(scratch.empty());
}
