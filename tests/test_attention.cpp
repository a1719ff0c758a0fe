// Claims: attention is what its definition says, in every form and cut anywhere; rotary position
// leaves products that depend on distance alone; configs of hybrids are read, written and refused.
#include "support.hpp"

using namespace test;
using ssm::Form;
using ssm::kForms;

namespace {

struct AttentionProblem {
  Matrix<double> q, k, v;
  ssm::AttentionInputs<double> in;
  ssm::AttentionState<double> past;

  AttentionProblem(Index L, Index before, Index heads, Index kv_heads, Index P, double scale = 1) {
    Random random(static_cast<std::uint64_t>(100 * L + before));
    q = random.matrix<double>(L, heads * P, scale);
    k = random.matrix<double>(L, kv_heads * P), v = random.matrix<double>(L, kv_heads * P);
    past = {random.matrix<double>(before, kv_heads * P),
            random.matrix<double>(before, kv_heads * P)};
    in = {q, k, v, P};
  }
};

/// out[t, head] = sum_s p_s v_s by the definition, number by number.
Matrix<double> by_definition(const AttentionProblem& p) {
  const Index L = p.q.rows(), P = p.in.head_dim, before = p.past.keys.rows();
  const Index heads = p.q.cols() / P, shared = heads / (p.k.cols() / P);
  Matrix<double> out(L, heads * P);
  for (Index t = 0; t < L; ++t)
    for (Index i = 0; i < heads; ++i) {
      std::vector<double> weight;
      const auto row = [&](const Matrix<double>& old, const Matrix<double>& now, Index s, Index c) {
        const Index column = i / shared * P + c;
        return s < before ? old(s, column) : now(s - before, column);
      };
      for (Index s = 0; s <= before + t; ++s) {
        double product = 0;
        for (Index c = 0; c < P; ++c) product += p.q(t, i * P + c) * row(p.past.keys, p.k, s, c);
        weight.push_back(std::exp(product / std::sqrt(static_cast<double>(P))));
      }
      const double sum = std::accumulate(weight.begin(), weight.end(), 0.0);
      for (Index c = 0; c < P; ++c) {
        double value = 0;
        for (Index s = 0; s <= before + t; ++s)
          value += weight[static_cast<std::size_t>(s)] / sum * row(p.past.values, p.v, s, c);
        out(t, i * P + c) = value;
      }
    }
  return out;
}

mamba::Config config_of(const mamba::Json& json) {
  return mamba::config_from_json(json, true, "config.json");
}

}  // namespace

TEST_CASE("causal_attention: every form is the definition, with and without a past") {
  for (const Index L : {0, 1, 2, 31, 64, 65, 130})
    for (const Index before : {0, 1, 63, 70})
      for (const Index kv_heads : {1, 3}) {
        const AttentionProblem p(L, before, 3, kv_heads, 4);
        const Matrix<double> want = by_definition(p);
        for (const Form form : kForms) {
          ssm::AttentionState<double> state = p.past;
          const Matrix<double> got = ssm::causal_attention(p.in, state, form);
          CAPTURE(L, before, kv_heads, int(form));
          CHECK(max_difference(got, want) < 1e-13);
          CHECK(state.keys.rows() == before + L);
          CHECK(max_difference(state.values.bottomRows(L), p.v) == 0);
        }
      }
}

TEST_CASE("causal_attention: cut anywhere, in pieces of any form") {
  const AttentionProblem p(20, 5, 4, 2, 6);
  ssm::AttentionState<double> whole = p.past;
  const Matrix<double> want = ssm::causal_attention(p.in, whole);
  for (const Form form : kForms)
    for (Index cut = 0; cut <= 20; ++cut) {
      ssm::AttentionState<double> state = p.past;
      Matrix<double> got(20, want.cols());
      for (const auto& [first, count] :
           {std::pair<Index, Index>{0, cut}, {cut, 0}, {cut, 20 - cut}})
        got.middleRows(first, count) = ssm::causal_attention<double>(
            {p.q.middleRows(first, count), p.k.middleRows(first, count),
             p.v.middleRows(first, count), p.in.head_dim},
            state, form, 3);
      CAPTURE(cut, int(form));
      CHECK(max_difference(got, want) < 1e-13);
      CHECK(max_difference(state.keys, whole.keys) == 0);
    }
}

TEST_CASE("causal_attention: large products neither overflow nor vanish") {
  const AttentionProblem p(40, 0, 2, 2, 4, 1e4);
  ssm::AttentionState<double> sequential, chunked;
  sequential.keys = sequential.values = chunked.keys = chunked.values = Matrix<double>(0, 8);
  const Matrix<double> want = ssm::causal_attention(p.in, sequential);
  CHECK(want.allFinite());
  CHECK(max_difference(ssm::causal_attention(p.in, chunked, Form::chunked, 7), want) < 1e-10);
}

TEST_CASE("causal_attention: inputs that do not fit are refused by name") {
  AttentionProblem p(3, 2, 4, 2, 4);
  p.in.k = p.in.k.leftCols(6);
  CHECK_THROWS_WITH(ssm::causal_attention(p.in, p.past),
                    Catch::Contains("causal_attention: k: expected"));
}

TEST_CASE("rotary: products depend on the distance alone, and what does not turn stays") {
  Random random(3);
  const Matrix<double> q = random.matrix<double>(1, 10), k = random.matrix<double>(1, 10);
  const auto product = [&](Index t, Index s) {
    return ssm::rotary<double>(q, 10, 6, t).row(0).dot(ssm::rotary<double>(k, 10, 6, s).row(0));
  };
  CHECK(product(5, 2) == Approx(product(1003, 1000)).margin(1e-12));
  CHECK(std::abs(product(5, 2) - product(5, 3)) > 1e-3);
  const Matrix<double> turned = ssm::rotary<double>(q, 10, 6, 7);
  CHECK(max_difference(turned.rightCols(4), q.rightCols(4)) == 0);
  CHECK(turned.norm() == Approx(q.norm()).epsilon(1e-14));
  CHECK(turned(0) == Approx(q(0) * std::cos(7.0) - q(3) * std::sin(7.0)).epsilon(1e-14));
  CHECK(max_difference(ssm::rotary_backward<double>(turned, 10, 6, 7), q) < 1e-14);
}

TEST_CASE("layer_norm: mean 0 and variance 1 before weight and bias") {
  Random random(4);
  const Matrix<double> x = random.matrix<double>(3, 50);
  const Row<double> weight = Row<double>::Ones(50), bias = random.matrix<double>(1, 50);
  const Matrix<double> n = ssm::layer_norm(x, weight, bias, 1e-12).rowwise() - bias;
  for (Index t = 0; t < 3; ++t) {
    CHECK(n.row(t).mean() == Approx(0).margin(1e-14));
    CHECK(n.row(t).squaredNorm() / 50 == Approx(1).epsilon(1e-10));
  }
}

TEST_CASE("hybrids: the published shapes") {
  const auto parameters = [](const mamba::Config& c) {
    double sum = 0;
    mamba::for_each_shape(c, [&](const std::string&, const mamba::Shape& shape) {
      sum += std::accumulate(shape.begin(), shape.end(), 1.0, std::multiplies<>());
    });
    return sum;
  };
  const mamba::Config transformer = mamba::published_config("transformerpp-2.7b");
  CHECK(transformer.attention_layers.size() == 32);
  CHECK(parameters(transformer) == Approx(2.7e9).epsilon(0.02));
  const mamba::Config hybrid = mamba::published_config("mamba2attn-2.7b");
  CHECK(hybrid.attention_layers == std::vector<Index>{9, 18, 27, 36, 45, 56});
  CHECK(parameters(hybrid) == Approx(2.7e9).epsilon(0.02));
  CHECK_THROWS_WITH(mamba::published_config("transformerpp-130m"), Catch::Contains("--shape"));
}

TEST_CASE("hybrids: a config that was written is read as the same") {
  const TempFolder folder;
  for (const char* name : {"transformerpp", "mamba2attn", "mamba1attn-mlp"}) {
    const mamba::Config c = mamba::read_config(root("tests/golden/") + name + "-original");
    mamba::write_config(folder.path, c);
    const mamba::Config d = mamba::read_config(folder.path);
    CAPTURE(name);
    CHECK(mamba::original_config(c) == mamba::original_config(d));
    CHECK(d.attention.in_proj_width() == c.attention.in_proj_width());
    CHECK(d.d_inner == c.d_inner);
  }
}

TEST_CASE("hybrids: what is not computed is refused by name") {
  const mamba::Json attn = {{"num_heads", 4}, {"causal", true}};
  const mamba::Json good = {{"d_model", 32}, {"n_layer", 2}, {"attn_layer_idx", {1}}};
  const auto with = [&](const char* key, const mamba::Json& value) {
    mamba::Json json = good, cfg = attn;
    cfg[key] = value;
    json["attn_cfg"] = cfg;
    return json;
  };
  const mamba::Config c = config_of(with("num_heads_kv", 2));
  CHECK(c.attends(1));
  CHECK(!c.attends(0));
  CHECK(c.attention.head_dim == 8);
  CHECK(c.attention.in_proj_width() == 64);
  const std::vector<std::pair<const char*, mamba::Json>> wrong = {
      {"causal", false},         {"num_heads", 0},      {"num_heads", 5},
      {"num_heads_kv", 3},       {"mlp_dim", 64},       {"softmax_scale", 0.5},
      {"rotary_emb_dim", 3},     {"rotary_emb_dim", 9}, {"rotary_emb_interleaved", true},
      {"rotary_emb_base", -1.0}, {"d_conv", -1},        {"num_heads", nullptr}};
  for (const auto& [key, value] : wrong) {
    CAPTURE(key, value.dump());
    CHECK_THROWS_WITH(config_of(with(key, value)),
                      Catch::Contains(std::string("attn_cfg: ") + key));
  }
  mamba::Json far = with("num_heads", 4);
  far["attn_layer_idx"] = {2};
  CHECK_THROWS_WITH(config_of(far), Catch::Contains("attn_layer_idx: expected layers below 2"));
}

TEST_CASE("hybrids: a saved state is read back, and one that does not fit ends in one line") {
  const mamba::Config config = mamba::read_config(root("tests/golden/mamba2attn-original"));
  const TempFolder folder;
  Random random(6);
  const auto state_of = [&](Index past) {
    ssm::State<float> state(config);
    for (auto& layer : state.layers)
      for (auto* m : {&layer.past.keys, &layer.past.values})
        *m = random.matrix<float>(m->cols() > 0 ? past : 0, m->cols());
    return state;
  };
  const auto load = [&](const ssm::State<float>& state, std::vector<Token> ids) {
    mamba::save_state(folder / "state", ids, state);
    return mamba::load_state(folder / "state", config, ids = {});
  };
  for (const Index past : {0, 1, 5}) {
    const auto state = state_of(past);
    const auto again = load(state, std::vector<Token>(static_cast<std::size_t>(past + 1)));
    CHECK(max_difference(again.layers[1].past.values, state.layers[1].past.values) == 0);
  }
  CHECK_THROWS_WITH(load(state_of(3), {1, 2, 3}),
                    Catch::Contains("ids: expected 4, one more than keys, found 3"));
  auto wrong = state_of(3);
  wrong.layers[1].past.values.conservativeResize(2, Eigen::NoChange);
  CHECK_THROWS_WITH(load(wrong, {1, 2, 3, 4}),
                    Catch::Contains("layers.1.values: expected (3, 32) for this model"));
  wrong.layers[1].past = {Matrix<float>(3, 7), Matrix<float>(3, 7)};
  CHECK_THROWS_WITH(load(wrong, {1, 2, 3, 4}), Catch::Contains("layers.1.keys: expected"));
}
