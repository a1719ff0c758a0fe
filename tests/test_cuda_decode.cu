// Claims: the norms, and the product of decode with its norm and its residual, compute what
// ssm_reference.hpp says in double, up to rounding.
#include "support_cuda.hpp"

using namespace test;
using namespace mamba;

// --- norms ---

TEST_CASE("cuda rms_norm, gated_rms_norm: match the reference, per group") {
  for (const Index d : {4, 12, 768, 5120})
    for (const Index groups : {1, 2}) {
      if (d / groups % 4) continue;
      Random random(3);
      const Index L = 5;
      const Matrix<double> r = stored<float>(random.matrix<double>(L, d)),
                           y = stored<bf16>(random.matrix<double>(L, d)),
                           z = stored<bf16>(random.matrix<double>(L, d));
      const Row<double> w = stored<float>(random.matrix<double>(1, d)).row(0);
      const DeviceBuffer<float> r_d = up<float>(r), w_d = up<float>(Matrix<double>(w)),
                                plain = poisoned<float>(L * d);
      const DeviceBuffer<bf16> y_d = up<bf16>(y), z_d = up<bf16>(z), gated = poisoned<bf16>(L * d);
      rms_norm<float, float>(r_d.data(), nullptr, 0, w_d.data(), 1e-5f, L, int(d), plain.data(), d,
                             nullptr);
      const Matrix<double> want = ssm::rms_norm<double>(r, w, 1e-5);
      check_close("rms_norm", down(plain, L, d), want, Matrix<double>(want.cwiseAbs()), 256,
                  0x1p-24);
      gated_rms_norm(y_d.data(), d, z_d.data(), d, w_d.data(), 1e-5f, L, int(d), int(groups),
                     gated.data(), d, nullptr);
      const Matrix<double> want_gated = ssm::gated_rms_norm<double>(y, z, w, 1e-5, groups);
      check_close("gated_rms_norm", down(gated, L, d), want_gated,
                  Matrix<double>(want_gated.cwiseAbs()), 4, 0x1p-8);
    }
}

// --- the product of decode ---

namespace {

// Few rows and many, pieces that do not fill a warp, several rounds; between them all splits of a
// row, and rows longer than the ring.
template <class T>
void linear_step_matches(const char* dtype) {
  Random random(17);
  constexpr Index n = 16 / sizeof(T);
  for (const Index rows : {1, 3, 30, 517, 13000})
    for (const Index cols : {n, 5 * n, 33 * n, 100 * n, 2000 * n})
      for (const Index batch : {1, 2, 3, 4}) {
        if (rows > 5000 && (cols > 5 * n || batch == 3)) continue;
        if (rows > 30 && cols > 100 * n) continue;
        const Matrix<double> W = stored<T>(random.matrix<double>(rows, cols)),
                             x = stored<T>(random.matrix<double>(batch, cols)),
                             r = stored<float>(random.matrix<double>(batch, cols)),
                             before = stored<float>(random.matrix<double>(batch, rows));
        const Row<double> w = stored<float>(random.matrix<double>(1, cols)).row(0);
        const DeviceBuffer<T> W_d = up<T>(W), x_d = up<T>(x);
        const DeviceBuffer<float> r_d = up<float>(r), w_d = up<float>(Matrix<double>(w)),
                                  out = poisoned<float>(batch * rows);
        INFO(dtype << ": rows " << rows << ", cols " << cols << ", batch " << batch);
        linear_step(LinearStep<T, Norm::none, Store::plain>{W_d.data(), rows, cols, int(batch),
                                                            x_d.data(), cols, out.data()},
                    nullptr);
        check_close("W x", down(out, batch, rows), Matrix<double>(x * W.transpose()),
                    Matrix<double>(x.cwiseAbs() * W.cwiseAbs().transpose()), 256, 0x1p-24);
        const Matrix<double> u = ssm::rms_norm<double>(r, w, 1e-5);
        const auto check_normed = [&](const char* what, auto step) {
          const DeviceBuffer<float> residual = up<float>(before);
          step.W = W_d.data(), step.rows = rows, step.cols = cols, step.batch = int(batch);
          step.x = r_d.data(), step.x_stride = cols, step.out = residual.data();
          step.norm = {w_d.data(), 1e-5f};
          linear_step(step, nullptr);
          check_close(what, down(residual, batch, rows), Matrix<double>(before + u * W.transpose()),
                      Matrix<double>(before.cwiseAbs() + u.cwiseAbs() * W.cwiseAbs().transpose()),
                      256, 0x1p-24);
        };
        check_normed("residual + W rms_norm(r)", LinearStep<T, Norm::rms, Store::residual>{});
        check_normed("residual + W gated_rms_norm(r), gate applied, one group",
                     LinearStep<T, Norm::grouped, Store::residual>{});
      }
}

}  // namespace

TEST_CASE("cuda linear_step: the product, its norm and its residual match the reference") {
  linear_step_matches<float>("f32");
  linear_step_matches<bf16>("bf16");
  linear_step_matches<half>("f16");
}
