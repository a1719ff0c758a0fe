// Claims: the backward of every operation but the scans, whole models' gradients and the trainer on
// the GPU are those of the reference in double, up to rounding, and the same bits on every run.
#include "support_cuda.hpp"

#include "finetuned.hpp"
#include "random_model.hpp"

using namespace test;
using namespace mamba;

namespace {

// Sequences of these lengths behind one another: their rows, and where each begins.
struct Ragged {
  std::vector<Index> lengths;
  std::vector<std::int64_t> begin = {0};
  explicit Ragged(const std::vector<Index>& all) : lengths(all) {
    for (const Index L : all) begin.push_back(begin.back() + L);
  }
  Index batch() const { return static_cast<Index>(lengths.size()); }
  Index rows() const { return begin.back(); }
  Index longest() const { return *std::max_element(lengths.begin(), lengths.end()); }
};

struct ConvProblem {
  Matrix<double> x, dout, weight, bias, state, dstate;  // states of all sequences one after another
};

struct ConvTruth {
  Matrix<double> dx, dweight, dbias, dstate;
  Matrix<double> size_dx, size_dweight, size_dbias, size_dstate;  // of the terms that were added
};

/// The reference, sequence by sequence; out = silu of the convolution if `activate`.
ConvTruth conv_truth(const ConvProblem& p, const Ragged& r, bool activate) {
  const Index past = p.weight.cols() - 1;
  ConvTruth want;
  want.dx = want.size_dx = Matrix<double>(p.x.rows(), p.x.cols());
  want.dweight = want.size_dweight = Matrix<double>::Zero(p.weight.rows(), p.weight.cols());
  want.dbias = want.size_dbias = Matrix<double>::Zero(1, p.x.cols());
  want.dstate = p.dstate, want.size_dstate = p.dstate.cwiseAbs();
  const Matrix<double> w_abs = p.weight.cwiseAbs(), b_abs = p.bias.cwiseAbs();
  for (Index b = 0; b < r.batch(); ++b) {
    const Index first = r.begin[b], L = r.lengths[b];
    const Matrix<double> x = p.x.middleRows(first, L), state = p.state.middleRows(b * past, past);
    const Matrix<double> x_abs = x.cwiseAbs(), state_abs = state.cwiseAbs();
    Matrix<double> after = state, after_abs = state_abs, ds = p.dout.middleRows(first, L);
    const Matrix<double> s = ssm::causal_conv1d<double>(x, p.weight, p.bias, after);
    const Matrix<double> s_abs = ssm::causal_conv1d<double>(x_abs, w_abs, b_abs, after_abs);
    Matrix<double> ds_abs = ds.cwiseAbs();
    if (activate) {  // |silu''| <= 1/2
      ds.array() *= ssm::silu_derivative(s.array());
      ds_abs.array() *= 1 + s_abs.array();
    }
    const auto of = ssm::causal_conv1d_backward<double>(x, p.weight, p.bias, state, ds,
                                                        want.dstate.middleRows(b * past, past));
    const auto size = ssm::causal_conv1d_backward<double>(
        x_abs, w_abs, b_abs, state_abs, ds_abs, want.size_dstate.middleRows(b * past, past));
    want.dx.middleRows(first, L) = of.x, want.size_dx.middleRows(first, L) = size.x;
    want.dweight += of.weight, want.size_dweight += size.weight;
    want.dbias += ds.colwise().sum(), want.size_dbias += ds_abs.colwise().sum();
  }
  return want;
}

template <class T>
ConvProblem conv_problem(const Ragged& r, Index d, Index width, bool bias, Random& random) {
  const Index past = r.batch() * (width - 1);
  return {stored<T>(random.matrix<double>(r.rows(), d)),
          stored<T>(random.matrix<double>(r.rows(), d)),
          stored<float>(random.matrix<double>(d, width)),
          bias ? stored<float>(random.matrix<double>(1, d)) : Matrix<double>(),
          stored<T>(random.matrix<double>(past, d)),
          stored<float>(random.matrix<double>(past, d))};
}

/// Rows padded to `stride` numbers.
template <class T>
DeviceBuffer<T> up_strided(const Matrix<double>& m, Index stride) {
  Matrix<double> wide = Matrix<double>::Zero(m.rows(), stride);
  wide.leftCols(m.cols()) = m;
  return up<T>(wide);
}

/// states: with those of the convolution and their gradients.
template <class T>
void conv_backward_matches(const Ragged& r, Index d, Index width, bool bias, bool activate,
                           Index pad, Random& random, Worst& worst) {
  INFO("width " << width << ", d " << d << ", rows " << r.rows() << ", bias " << bias);
  const ConvProblem p = conv_problem<T>(r, d, width, bias, random);
  const ConvTruth want = conv_truth(p, r, activate);
  const Index stride = d + pad, past = r.batch() * (width - 1);
  const auto x = up_strided<T>(p.x, stride), dout = up_strided<T>(p.dout, stride);
  const auto dx = poisoned<T>(r.rows() * stride), state = up<T>(p.state);
  const auto weight = up<float>(p.weight), b = up<float>(p.bias), dstate_out = up<float>(p.dstate);
  const auto dstate = poisoned<float>(past * d);
  const Matrix<double> ones = Matrix<double>::Ones(d, width), one = Matrix<double>::Ones(1, d);
  const auto dweight = up<float>(ones), dbias = up<float>(one);
  const DeviceBuffer<std::int64_t> cu_seqlens(r.begin.data(), r.begin.size());
  ConvBackwardArgs<T> a;
  a.in.batch = r.batch(), a.in.L = r.longest(), a.in.d = d, a.in.width = int(width);
  a.in.x = x.data(), a.in.weight = weight.data(), a.in.bias = optional(b);
  a.in.state = state.data(), a.in.x_stride = stride, a.in.activate = activate;
  if (r.batch() > 1) a.in.cu_seqlens = cu_seqlens.data();
  a.dout = dout.data(), a.dx = dx.data(), a.dout_stride = a.dx_stride = stride;
  a.dstate_out = dstate_out.data(), a.dstate = dstate.data();
  a.dweight = dweight.data(), a.dbias = bias ? dbias.data() : nullptr;
  const auto room = poisoned<float>(causal_conv1d_backward_workspace(a) / sizeof(float));
  causal_conv1d_backward(a, room.data(), nullptr);
  const Matrix<double> got = down(dx, r.rows(), stride).leftCols(d);
  const auto check = [&](const char* name, const Matrix<double>& of, const Matrix<double>& truth,
                         const Matrix<double>& size, double k, double eps) {
    return check_close(name, of, truth, Matrix<double>(size.array() + kRule<T>.smallest), k, eps);
  };
  worst.of_out =
      std::max(worst.of_out, check("dx", got, want.dx, want.size_dx, kRule<T>.k, kRule<T>.eps));
  const double eps = kRule<float>.eps;
  worst.of_state =
      std::max({worst.of_state,
                check("dstate", down(dstate, past, d), want.dstate, want.size_dstate, 256, eps),
                check("dweight", down(dweight, d, width), want.dweight + ones,
                      want.size_dweight + ones, 256, eps)});
  const Matrix<double> want_bias = bias ? Matrix<double>(want.dbias + one) : one;
  check("dbias", down(dbias, 1, d), want_bias, want.size_dbias + one, 256, eps);
}

template <class T>
void conv_backward_matches_everywhere(const char* type) {
  Worst worst{std::string("causal_conv1d_backward ") + type, 0, 0, "roundings"};
  Random random(5);
  for (const Index width : {2, 3, 4, 7})
    for (const Index d : {1, 5, 64, 132})
      for (const Index L : {0, 1, 2, 3, 31, 32, 33, 63, 257})
        conv_backward_matches<T>(Ragged({L}), d, width, L % 2 == 1, d != 64, 0, random, worst);
  for (const Index width : {3, 4})
    for (const Index pad : {0, 3, 4})
      conv_backward_matches<T>(Ragged({5, 0, 130, 2, 1}), 20, width, true, true, pad, random,
                               worst);
}

template <class T>
void norm_backward_matches(Index rows, Index d, Worst& worst) {
  INFO("rows " << rows << ", d " << d);
  Random random(7);
  const Matrix<double> x = stored<float>(random.matrix<double>(rows, d));
  const Matrix<double> dout = stored<T>(random.matrix<double>(rows, d));
  const Matrix<double> weight = stored<float>(random.matrix<double>(1, d));
  const Matrix<double> before = stored<float>(random.matrix<double>(rows, d));
  const auto want = ssm::rms_norm_backward<double>(x, weight, 1e-5, dout);
  const Matrix<double> g = dout.cwiseAbs() * weight.row(0).cwiseAbs().asDiagonal();
  Matrix<double> size = before.cwiseAbs(), size_weight = Matrix<double>::Ones(1, d);
  for (Index t = 0; t < rows; ++t) {
    const double r = 1 / std::sqrt(x.row(t).squaredNorm() / double(d) + 1e-5);
    const auto n = (r * x.row(t).cwiseAbs()).eval();
    size.row(t) += r * (g.row(t) + n * (g.row(t).dot(n) / double(d)));
    size_weight += dout.row(t).cwiseAbs().cwiseProduct(n);
  }
  const Matrix<double> one = Matrix<double>::Ones(1, d);
  const auto x_d = up<float>(x), weight_d = up<float>(weight), dx = up<float>(before),
             dweight = up<float>(one);
  const auto dout_d = up<T>(dout);
  const auto room = poisoned<float>(row_parts(rows, d));
  rms_norm_backward<T>({rows, int(d), 1e-5f, x_d.data(), weight_d.data(), dout_d.data(), dx.data(),
                        dout_d.data(), dweight.data()},
                       room.data(), nullptr);
  const Matrix<double> got = down(dx, rows, d), sum = want.x + before;
  worst.of_out = std::max(worst.of_out, check_close("dx", got, sum, size, 64, kRule<float>.eps));
  CHECK(max_difference(down(dout_d, rows, d), stored<T>(got)) == 0);
  worst.of_state = std::max(
      worst.of_state, check_close("dweight", down(dweight, 1, d), Matrix<double>(want.weight + one),
                                  size_weight, 64, kRule<float>.eps));
}

template <class T>
void gated_norm_backward_matches(Index rows, Index d, Index groups, Worst& worst) {
  INFO("rows " << rows << ", d " << d << ", groups " << groups);
  Random random(8);
  const auto draw = [&](Index n) { return stored<T>(random.matrix<double>(n, d)); };
  const Matrix<double> y = draw(rows), z = draw(rows), dout = draw(rows);
  const Matrix<double> weight = stored<float>(random.matrix<double>(1, d));
  const auto want = ssm::gated_rms_norm_backward<double>(y, z, weight, 1e-5, groups, dout);
  const Matrix<double> v = y.cwiseAbs().array() * ssm::silu(z.array()).abs();
  const Matrix<double> dout_abs = dout.cwiseAbs();
  Matrix<double> dv(rows, d), size_weight = Matrix<double>::Ones(1, d);
  for (Index t = 0; t < rows; ++t)
    for (Index c = 0, n = d / groups; c < d; c += n) {
      const auto part = v.row(t).segment(c, n);
      const double r = 1 / std::sqrt(part.squaredNorm() / double(n) + 1e-5);
      const auto g =
          dout_abs.row(t).segment(c, n).cwiseProduct(weight.row(0).segment(c, n).cwiseAbs()).eval();
      dv.row(t).segment(c, n) = r * (g + r * r * part * (g.dot(part) / double(n)));
      size_weight.row(0).segment(c, n) += r * part.cwiseProduct(dout_abs.row(t).segment(c, n));
    }
  const Matrix<double> size_y = dv.array() * (1 + z.array().abs()) + kRule<T>.smallest;
  const Matrix<double> size_z = dv.array() * (y.array().abs() * 1.2) + kRule<T>.smallest;
  const Index stride = d + 4;
  const auto y_d = up<T>(y), z_d = up_strided<T>(z, stride), dout_d = up<T>(dout);
  const auto dy = poisoned<T>(rows * d), dz = poisoned<T>(rows * stride);
  const Matrix<double> one = Matrix<double>::Ones(1, d);
  const auto weight_d = up<float>(weight), dweight = up<float>(one),
             room = poisoned<float>(row_parts(rows, d));
  gated_rms_norm_backward<T>(
      {rows, int(d), int(groups), 1e-5f, y_d.data(), z_d.data(), dout_d.data(), weight_d.data(),
       dy.data(), dz.data(), dweight.data(), d, stride, d, d, stride},
      room.data(), nullptr);
  const Matrix<double> got_z = down(dz, rows, stride).leftCols(d);
  const double k = sizeof(T) == 4 ? 64 : 4;
  worst.of_out =
      std::max({worst.of_out, check_close("dy", down(dy, rows, d), want.y, size_y, k, kRule<T>.eps),
                check_close("dz", got_z, want.z, size_z, k, kRule<T>.eps)});
  worst.of_state = std::max(
      worst.of_state, check_close("dweight", down(dweight, 1, d), Matrix<double>(want.weight + one),
                                  size_weight, 64, kRule<float>.eps));
}

template <class T>
void norms_backward_match(const char* type) {
  Worst rms{std::string("rms_norm_backward ") + type, 0, 0, "roundings"},
      gated{std::string("gated_rms_norm_backward ") + type, 0, 0, "roundings"};
  for (const Index rows : {0, 1, 3, 33})
    for (const Index d : {4, 64, 1028}) norm_backward_matches<T>(rows, d, rms);
  norm_backward_matches<T>(kMostParts + 3, 4, rms);
  for (const Index rows : {0, 1, 3, 33})
    for (const Index groups : {1, 2, 3})
      gated_norm_backward_matches<T>(rows, 24 * 12, groups, gated);
}

template <class T>
void cross_entropy_matches(Index vocab, float scale, Worst& worst) {
  INFO("vocabulary " << vocab);
  Random random(9);
  const Index rows = 5, stride = ceil_div(vocab, Index{8}) * 8;
  Matrix<double> logits = random.matrix<double>(rows, vocab, 4);
  logits.row(1).array() += 300;
  logits.row(2).array() -= 1000;
  logits = stored<float>(logits);
  const std::vector<Token> targets = {0, Token(vocab - 1), Token(vocab / 2), -1, Token(vocab / 3)};
  Matrix<double> nll = Matrix<double>::Zero(rows, 1), want = Matrix<double>::Zero(rows, vocab);
  for (Index t = 0; t < rows; ++t) {
    if (targets[t] < 0) continue;
    const double max = logits.row(t).maxCoeff();
    const auto e = (logits.row(t).array() - max).exp().eval();
    nll(t, 0) = std::log(e.sum()) + max - logits(t, targets[t]);
    want.row(t) = scale * e / e.sum();
    want(t, targets[t]) -= scale;
  }
  const auto logits_d = up_strided<float>(logits, stride), nll_d = poisoned<float>(rows);
  const DeviceBuffer<Token> targets_d(targets.data(), targets.size());
  cross_entropy<T>(logits_d.data(), stride, rows, vocab, targets_d.data(), scale, nll_d.data(),
                   nullptr);
  const Matrix<double> size = (logits.rowwise().maxCoeff().cwiseAbs().array() + 40).matrix();
  worst.of_state = std::max(
      worst.of_state, check_close("nll", down(nll_d, rows, 1), nll, size, 4, kRule<float>.eps));
  CUDA_CHECK(cudaDeviceSynchronize());
  std::vector<T> got(rows * stride * sizeof(float) / sizeof(T));
  CUDA_CHECK(cudaMemcpy(got.data(), logits_d.data(), got.size() * sizeof(T), cudaMemcpyDefault));
  Matrix<double> dlogits(rows, vocab), size_d(rows, vocab);
  for (Index t = 0; t < rows; ++t)
    for (Index v = 0; v < vocab; ++v) {
      dlogits(t, v) = float(got[t * stride * sizeof(float) / sizeof(T) + v]);
      const double distance = logits.row(t).maxCoeff() - logits(t, v);  // rounded in the exponent
      size_d(t, v) = std::abs(want(t, v)) * (1 + distance) + kRule<T>.smallest + 0x1p-126;
      if (v == targets[t]) size_d(t, v) += scale;
    }
  worst.of_out =
      std::max(worst.of_out, check_close("dlogits", dlogits, want, size_d, 8, kRule<T>.eps));
}

}  // namespace

TEST_CASE(
    "cuda causal_conv1d_backward: matches the reference, states included, in ragged batches of "
    "strided rows") {
  conv_backward_matches_everywhere<float>("f32");
  conv_backward_matches_everywhere<bf16>("bf16");
  conv_backward_matches_everywhere<half>("f16");
}

TEST_CASE("cuda rms_norm_backward, gated_rms_norm_backward: match the reference, groups included") {
  norms_backward_match<float>("f32");
  norms_backward_match<bf16>("bf16");
  norms_backward_match<half>("f16");
}

TEST_CASE("cuda cross_entropy: loss and gradient of logits, rows without a target, huge logits") {
  Worst f32{"cross_entropy f32", 0, 0, "roundings"}, b16{"cross_entropy bf16", 0, 0, "roundings"};
  for (const Index vocab : {1, 3, 64, 519, 5000}) {
    cross_entropy_matches<float>(vocab, 0.25f, f32);
    cross_entropy_matches<bf16>(vocab, 0.25f, b16);
  }
}

TEST_CASE("cuda embedding_backward: rows of one id are summed in order; bias_backward sums rows") {
  Random random(10);
  for (const Index rows : {0, 1, 7, 200, 2100})
    for (const Index d : {1, 64, 130}) {
      INFO("rows " << rows << ", d " << d);
      const Index vocab = 37;
      std::vector<Token> ids;
      for (Index t = 0; t < rows; ++t)  // every other one the same
        ids.push_back(t % 2 ? 5 : Token(random.uniform() * double(vocab)));
      const Matrix<double> dy = stored<float>(random.matrix<double>(rows, d));
      Matrix<double> want = Matrix<double>::Ones(vocab, d), size = want;
      for (Index t = 0; t < rows; ++t)
        want.row(ids[t]) += dy.row(t), size.row(ids[t]) += dy.row(t).cwiseAbs();
      const auto got = up<float>(Matrix<double>(Matrix<double>::Ones(vocab, d)));
      const DeviceBuffer<Token> ids_d(ids.data(), ids.size());
      const auto dy_d = up<float>(dy);
      EmbeddingBackward embedding_backward;
      embedding_backward(ids_d.data(), rows, vocab, d, dy_d.data(), got.data(), nullptr);
      check_close("d_embedding", down(got, vocab, d), want, size, 64, kRule<float>.eps);
      const auto bias = up<float>(Matrix<double>(Matrix<double>::Ones(1, d))),
                 room = poisoned<float>(row_parts(rows, d));
      bias_backward(dy_d.data(), d, rows, d, bias.data(), room.data(), nullptr);
      const Matrix<double> one = Matrix<double>::Ones(1, d);
      check_close("dbias", down(bias, 1, d), Matrix<double>(dy.colwise().sum() + one.row(0)),
                  Matrix<double>(dy.cwiseAbs().colwise().sum() + one.row(0)), 64, kRule<float>.eps);
    }
}

// --- whole models --------------------------------------------------------------------------------

namespace {

struct Tiny {
  std::string name, folder;
  Config config;
  ssm::Model<double> model;
  std::vector<Token> ids;
};
std::vector<Tiny> tiny_models(const std::string& golden = root("tests/golden")) {
  std::vector<Tiny> all;
  for (const std::string name : {"mamba1-hf", "mamba2-hf", "transformerpp-original",
                                 "mamba2attn-original", "mamba1attn-mlp-original"}) {
    const std::string folder = golden + "/" + name;
    if (!std::filesystem::exists(folder)) continue;
    const Checkpoint file = read_checkpoint(folder);
    const Config config = read_config(folder);
    all.push_back({name, folder, config, load_model<ssm::Model<double>>(file, config),
                   tokens(read_safetensors(folder + "/expected.safetensors").at("ids"), 0, 40)});
  }
  return all;
}

/// The largest difference of each tensor, as a part of its largest number; prints and returns the
/// worst.
template <class Got, class Want>
double worst_gradient(const Config& config, Got& got, Want& want, const std::string& what) {
  std::vector<Matrix<double>> expected;
  for_each_weight(config, want, [&](const std::string&, const auto&, const auto& w) {
    expected.push_back(w.template cast<double>());
  });
  double worst = 0;
  std::size_t i = 0;
  for_each_weight(config, got, [&](const std::string& name, const auto&, const auto& g) {
    const Matrix<double> from = g.template cast<double>();
    const Matrix<double> to = expected[i].topRows(from.rows());  // without a vocabulary's padding
    INFO(what << " " << name);
    const double d = max_difference(from, to) / to.cwiseAbs().maxCoeff();
    CHECK(d < INFINITY);
    worst = std::max(worst, d);
    ++i;
  });
  std::cout << what << ": worst gradient is off by " << worst << " of its tensor's largest\n";
  return worst;
}

/// The gradients that the reference adds up for a batch of pieces from the zero state.
ssm::Model<double> reference_gradients(const ssm::Model<double>& model, const Batch& batch,
                                       double scale, double& loss) {
  auto sum = ssm::zeros_like(model);
  loss = 0;
  for (const Piece& piece : batch) {
    std::vector<Token> targets(piece.ids.begin() + 1, piece.ids.end());
    for (Index t = 0; t + 1 < piece.first; ++t) targets[t] = -1;
    ssm::State<double> state(model.sizes);
    loss += ssm::loss_and_gradients(model, piece.ids.data(), targets.data(), Index(targets.size()),
                                    state, scale, sum);
  }
  return sum;
}

}  // namespace

TEST_CASE("cuda gradients: whole models' are the reference's, the same bits twice") {
  for (Tiny& tiny : tiny_models())
    for (const DType dtype : {DType::F32, DType::BF16, DType::F16}) {
      auto engine = open_model<CudaEngine>(tiny.folder, dtype);
      double want_loss = 0;
      const double scale = 1 / double(tiny.ids.size() - 1);
      auto want = reference_gradients(tiny.model, {Piece{tiny.ids}}, scale, want_loss);
      ssm::Model<float> got, again;
      const double loss = engine.gradients(tiny.ids, got);
      CHECK(engine.gradients(tiny.ids, again) == loss);
      const bool exact = dtype == DType::F32;
      CHECK(std::abs(loss - want_loss) <= (exact ? 1e-5 : 0.1));
      const std::string what = "cuda gradients " + tiny.name + " " + dtype_name(dtype);
      CHECK(worst_gradient(tiny.config, got, want, what) <= (exact ? 1e-5 : 0.2));
      CHECK(worst_gradient(tiny.config, again, got, what + " twice") == 0);
    }
}

// --- the learner ---------------------------------------------------------------------------------

namespace {

Learned<float> learned_of(const Tiny& tiny) {
  return {parameters_of<float>(read_checkpoint(tiny.folder), tiny.config),
          zeros<float>(tiny.config), zeros<float>(tiny.config)};
}
template <class Scalar>
Learned<double> in_double(const Config& config, Learned<Scalar> from) {
  Learned<double> to{zeros<double>(config), zeros<double>(config), zeros<double>(config),
                     from.steps};
  using Models = std::pair<ssm::Model<Scalar>*, ssm::Model<double>*>;
  for (const auto& [source, target] :
       {Models{&from.weights, &to.weights}, {&from.m, &to.m}, {&from.v, &to.v}}) {
    const auto p = parameters(config, *source);
    const auto q = parameters(config, *target);
    for (std::size_t i = 0; i < p.size(); ++i)
      q[i].values() = p[i].values().template cast<double>();
  }
  return to;
}

/// The reference in double: what the learner under test is to do.
struct LearnerInDouble {
  Config config;
  Learned<double> learned;
  ssm::Model<double> sum = zeros<double>(config);
  std::vector<ssm::State<double>> slots = {ssm::State<double>(config), ssm::State<double>(config)};

  double accumulate(const Batch& batch, double scale) {
    const auto model = computed(learned.weights);
    double loss = 0;
    for (const Piece& piece : batch) {
      std::vector<Token> targets(piece.ids.begin() + 1, piece.ids.end());
      for (Index t = 0; t + 1 < piece.first; ++t) targets[t] = -1;
      ssm::State<double> state(config);
      if (!piece.begins) state = slots[piece.slot];
      loss += ssm::loss_and_gradients(model, piece.ids.data(), targets.data(),
                                      Index(targets.size()), state, scale, sum);
      if (piece.slot >= 0) slots[piece.slot] = state;
    }
    return loss / scale;
  }
  double gradient_norm() {
    double squares = 0;
    for (const auto& p : parameters(config, sum)) squares += p.values().square().sum();
    return std::sqrt(squares);
  }
  void update(const ssm::AdamW& adamw, double scale) {
    ++learned.steps;
    const auto w = parameters(config, learned.weights), m = parameters(config, learned.m),
               v = parameters(config, learned.v), g = parameters(config, sum);
    for (std::size_t i = 0; i < w.size(); ++i) {
      g[i].values() *= scale;
      ssm::adamw_step<double>(adamw, learned.steps, w[i].decays(), g[i].values(), m[i].values(),
                              v[i].values(), w[i].values());
      g[i].values().setZero();
    }
  }
};

/// The largest norm of a difference of tensors, as a part of the tensor's norm.
double worst_norm(const Config& config, ssm::Model<double>& got, ssm::Model<double>& want) {
  const auto p = parameters(config, got), q = parameters(config, want);
  double worst = 0;
  for (std::size_t i = 0; i < p.size(); ++i) {
    const double size = std::sqrt(q[i].values().square().sum());
    const double d = std::sqrt((p[i].values() - q[i].values()).square().sum()) / (size + 1e-30);
    if (!(d <= worst)) worst = std::isnan(d) ? INFINITY : d;
  }
  return worst;
}

EngineOptions options_of(DType dtype) {
  EngineOptions options;
  options.dtype = dtype;
  return options;
}

std::vector<Token> part(const std::vector<Token>& ids, Index first, Index count) {
  return {ids.begin() + first, ids.begin() + first + count};
}

}  // namespace

TEST_CASE(
    "cuda learner: gradients, states and updates of ragged, carried batches are the reference's") {
  for (const Tiny& tiny : tiny_models()) {
    CAPTURE(tiny.name);
    const bool attention = !tiny.config.attention_layers.empty();
    CudaLearner learner(tiny.config, learned_of(tiny), options_of(DType::F32));
    LearnerInDouble truth{tiny.config, in_double(tiny.config, learned_of(tiny))};
    const auto& ids = tiny.ids;
    std::vector<Batch> batches = {
        {{part(ids, 0, 9), 1}, {part(ids, 9, 2), 1}, {part(ids, 3, 30), 21}, {part(ids, 5, 9), 8}},
        {{part(ids, 0, 11), 1, 0, true}, {part(ids, 20, 11), 1, 1, true}},
        {{part(ids, 10, 11), 1, 0, false}, {part(ids, 7, 5), 1, 1, true}},
        {{part(ids, 20, 3), 1, 0, false}, {part(ids, 11, 9), 1, 1, false}}};
    if (attention) {
      CHECK_THROWS_WITH(learner.accumulate(batches[1], 1), Catch::Contains("--carry-state"));
      batches = {batches[0], {{part(ids, 2, 30), 1}, {part(ids, 7, 30), 1}}, batches[0]};
    }
    for (std::size_t i = 0; i < batches.size(); ++i) {
      CAPTURE(i);
      const double want = truth.accumulate(batches[i], 0.25);
      CHECK(std::abs(learner.accumulate(batches[i], 0.25) - want) <= 1e-5 * want);
      if (i == 1) continue;  // two batches at a step
      const double norm = truth.gradient_norm();
      CHECK(std::abs(learner.gradient_norm() - norm) <= 1e-5 * norm);
      // m is the gradient. A bias of the keys has none but rounding, for the softmax does not see
      // it: a larger eps keeps AdamW from blowing that up.
      const ssm::AdamW adamw{1e-3, 0, 0.95, attention ? 1e-2 : 1e-8, 0.1};
      truth.update(adamw, 0.5), learner.update(adamw, 0.5);
      auto got = in_double(tiny.config, learner.learned());
      CHECK(got.steps == truth.learned.steps);
      CHECK(worst_norm(tiny.config, got.m, truth.learned.m) <= 2e-5);
      CHECK(worst_norm(tiny.config, got.v, truth.learned.v) <= 4e-5);
      CHECK(worst_norm(tiny.config, got.weights, truth.learned.weights) <= 2e-5);
    }
    if (attention) continue;
    const auto carried = learner.carried();
    REQUIRE(carried.size() == 2);
    for (std::size_t s = 0; s < 2; ++s)
      for (Index l = 0; l < tiny.config.n_layer; ++l) {
        CHECK(max_difference(carried[s].layers[l].h, truth.slots[s].layers[l].h) < 1e-4);
        CHECK(max_difference(carried[s].layers[l].conv, truth.slots[s].layers[l].conv) < 1e-4);
      }
  }
}

TEST_CASE("cuda learner: one that begins where another stopped goes on to the same bits") {
  for (const Tiny& tiny : tiny_models())
    for (const DType dtype : {DType::F32, DType::BF16}) {
      CudaLearner whole(tiny.config, learned_of(tiny), options_of(dtype));
      const ssm::AdamW adamw{1e-3, 0.9, 0.95, 1e-8, 0.1};
      const Index slot = tiny.config.attention_layers.empty() ? 0 : -1;
      const auto step = [&](CudaLearner& learner, Index first, bool begins) {
        learner.accumulate({{part(tiny.ids, first, 12), 1, slot, begins}}, 1);
        const double norm = learner.gradient_norm();
        learner.update(adamw, 1 / norm);
        return norm;
      };
      step(whole, 0, true);
      CudaLearner next(tiny.config, whole.learned(), options_of(dtype));
      if (slot == 0) next.carry(whole.carried());
      CHECK(step(next, 11, false) == step(whole, 11, false));
      CHECK(next.losses({{tiny.ids}}) == whole.losses({{tiny.ids}}));
      auto a = in_double(tiny.config, next.learned()), b = in_double(tiny.config, whole.learned());
      CHECK(worst_norm(tiny.config, a.weights, b.weights) == 0);
      CHECK(worst_norm(tiny.config, a.v, b.v) == 0);
    }
}

TEST_CASE("cuda gradients: layers that are recomputed give the same bits as layers that are kept") {
  for (const Tiny& tiny : tiny_models()) {
    const auto model =
        load_model<DeviceModel>(read_checkpoint(tiny.folder), tiny.config, DType::BF16);
    Queue queue;
    DeviceBuffer<std::byte> activation_room, scan_room;
    const Compute<bf16> forward{tiny.config, model, queue, activation_room, scan_room, 1.f};
    TrainingRoom room;
    TextsOnGpu texts;
    DeviceState before(tiny.config, DType::BF16, 2), after(tiny.config, DType::BF16, 2);
    TextBatch batch = texts.upload({{part(tiny.ids, 0, 9)}, {part(tiny.ids, 9, 20)}}, queue);
    fill_random(before.h.data(), Index(before.h.size()), 1.f, 0.f, 5);
    std::vector<std::vector<float>> gradients;
    for (const Index kept : {Index{-1}, Index{0}, Index{1}}) {
      const FlatModel sums(tiny.config, model.tied);
      copy_state(tiny.config, before, 0, after, 0, queue.stream());
      copy_state(tiny.config, before, 1, after, 1, queue.stream());
      batch.before = &before, batch.after = &after;
      if (kept >= 0) room.kept_layers = kept;
      ComputeBackward<bf16>{forward, sums.at, room}(batch, 1.f);
      if (kept < 0) CHECK(room.kept_layers == tiny.config.n_layer);
      gradients.emplace_back(sums.numbers.size());
      sums.numbers.copy_to(gradients.back().data());
      CHECK(gradients.back() == gradients.front());
    }
  }
}

TEST_CASE("cuda learner: golden training, eight steps in float32") {
  const auto data = extra_data();
  if (!data) return;
  for (const Tiny& tiny : tiny_models(*data + "/golden")) {
    const std::string name = tiny.name.substr(0, 6);
    const Checkpoint file = read_safetensors(*data + "/golden/training_" + name + ".safetensors");
    const auto loss = values<double>(file.at("loss")), norms = values<double>(file.at("grad_norm"));
    const auto shape = file.at("ids").shape;
    CudaLearner learner(tiny.config, learned_of(tiny), options_of(DType::F32));
    for (Index step = 0; step < shape[0]; ++step) {
      Batch batch;
      for (Index i = 0; i < shape[1]; ++i)
        batch.push_back({tokens(file.at("ids"), (step * shape[1] + i) * shape[2], shape[2])});
      CAPTURE(name, step);
      const double mean = learner.accumulate(batch, 1.0 / scored(batch)) / scored(batch);
      CHECK(std::abs(mean - loss[step]) <= 2e-5 * loss[step]);
      const double norm = learner.gradient_norm();
      CHECK(std::abs(norm - norms[step]) <= 2e-5 * norms[step]);
      learner.update({3e-3, 0.9, 0.95, 1e-8, 0.1}, std::min(1.0, 1 / (norm + 1e-6)));
    }
    // AdamW's first step is lr g / |g|. Where |g| is below the rounding of the sums that g is made
    // of, 2^-22 of the tensor's largest, float32 does not know its sign: such entries are left out.
    Learned<float> got = learner.learned();
    double worst = 0;
    Index left_out = 0;
    for_each_weight(tiny.config, got.weights, [&](const std::string& weight, const auto&, auto& w) {
      const auto of = [&](const char* what) {
        const auto numbers = values<double>(file.at(what + weight));
        return Matrix<double>(Eigen::Map<const Matrix<double>>(numbers.data(), w.rows(), w.cols()));
      };
      const Matrix<double> want = of("final."), g = of("grad."), now = w.template cast<double>();
      const auto known = (g.array() == 0 || g.array().abs() > 0x1p-22 * g.cwiseAbs().maxCoeff());
      INFO(name << " " << weight);
      const double d = known.select(now - want, 0).norm() / want.norm();
      CHECK(d <= 2e-5);
      worst = std::max(worst, d), left_out += g.size() - known.count();
    });
    CHECK(left_out <= 8);
    std::cout << "cuda golden training " << name << ": worst weight is off by " << worst
              << " of its tensor's norm; entries left out: " << left_out << "\n";
  }
}

TEST_CASE("cuda lora: ten steps of SFT and of DPO in float32 are those of PEFT and torch") {
  for (const int version : {1, 2})
    for (const bool pairs : {false, true}) {
      const double worst = Finetuned<CudaLearner>(version).ten_steps(pairs);
      CAPTURE(version, pairs, worst);
      CHECK(worst < 1e-3);
    }
}
