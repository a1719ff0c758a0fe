// This project's kernels behind verify.h, to be judged as anybody's (make verify-kernels):
//
//   VERIFY_RUNG=lanes ./mamba_cuda verify --so build/verify_kernels.so --op selective_scan
//
// Rungs: naive, registers, lanes, fused, warpgroup; without one the operation chooses, as in the
// program. Where fused and warpgroup take only widths that tiles divide, channels of a group,
// head_dim and d_state are filled up with zeros, which change nothing else.
#include <deque>
#include <functional>

#define MAMBA_NO_MAIN
#include "mamba.cu"
#include "verify.h"

namespace mamba {

// A tensor of the file, its axes in order and dense, and the strides that the kernels want.
struct Layout {
  int64_t shape[4], stride[4], size;
};

template <class From, class To>
__global__ void relayout_kernel(const From* file, To* ours, Layout l, bool back) {
  int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, rest = i, at = 0;
  if (i >= l.shape[0] * l.shape[1] * l.shape[2] * l.shape[3]) return;
  for (int k = 3; k >= 0; --k) at += rest % l.shape[k] * l.stride[k], rest /= l.shape[k];
  if (back)
    const_cast<From*>(file)[i] = from_float<From>(to_float(ours[at]));
  else
    ours[at] = from_float<To>(to_float(file[i]));
}

class Problem {
 public:
  const ::call& call;
  const std::string rung = std::getenv("VERIFY_RUNG") ? std::getenv("VERIFY_RUNG") : "";

  explicit Problem(const ::call& call) : call(call) {}
  const ::tensor* find(const std::string& name) const {
    for (int i = 0; i < call.count; ++i)
      if (call.tensors[i].name == name) return &call.tensors[i];
    return nullptr;
  }
  const int64_t* shape(const char* name) const { return find(name)->shape; }
  double option(const char* name) const { return *static_cast<double*>(find(name)->data); }
  bool is(const char* name) const { return rung == name; }

  template <class T>
  T* room(int64_t size, int fill = 0) {
    DeviceBuffer<char>& buffer = memory_.emplace_back(size * sizeof(T));
    CUDA_CHECK(cudaMemset(buffer.data(), fill, buffer.bytes()));
    return reinterpret_cast<T*>(buffer.data());
  }
  // An input as the kernels want it; null if the case has none.
  template <class T>
  T* in(const char* name, const Layout& l) {
    const ::tensor* tensor = find(name);
    if (!tensor) return nullptr;
    T* const to = room<T>(l.size);
    move(*tensor, to, l, false);
    return to;
  }
  // An output, NaN as yet, or 0 where sums are added to it. finish() hands it over.
  template <class T>
  T* out(const char* name, const Layout& l, bool sum = false) {
    const ::tensor* tensor = find(name);
    if (!tensor) return nullptr;
    T* const from = room<T>(l.size, sum ? 0 : 0xff);
    outputs_.push_back([=] { move(*tensor, from, l, true); });
    return from;
  }
  int finish() const {
    for (const auto& write : outputs_) write();
    CUDA_CHECK(cudaDeviceSynchronize());
    return VERIFY_DONE;
  }

 private:
  template <class T>
  static void move(const ::tensor& tensor, T* ours, const Layout& l, bool back) {
    const auto launch = [&](auto* file) {
      using From = std::remove_pointer_t<decltype(file)>;
      const int64_t n = l.shape[0] * l.shape[1] * l.shape[2] * l.shape[3];
      const From* data = static_cast<const From*>(tensor.data);
      if (n > 0) relayout_kernel<From, T><<<ceil_div(n, 256), 256>>>(data, ours, l, back);
      CUDA_CHECK(cudaGetLastError());
    };
    if (tensor.dtype == VERIFY_F32) launch(static_cast<float*>(nullptr));
    if (tensor.dtype == VERIFY_BF16) launch(static_cast<__nv_bfloat16*>(nullptr));
    if (tensor.dtype == VERIFY_F16) launch(static_cast<__half*>(nullptr));
  }
  std::deque<DeviceBuffer<char>> memory_;
  std::vector<std::function<void()>> outputs_;
};

inline int64_t up_to(int64_t n, int64_t multiple) { return ceil_div(n, multiple) * multiple; }

template <class T>
int judged_scan(Problem& p) {
  const int64_t *u = p.shape("u"), batch = u[0], L = u[2], G = p.shape("B")[1];
  const int64_t channels = u[1] / G, states = p.shape("A")[1];
  const int64_t C = p.is("fused") ? up_to(channels, 4) : channels, d = G * C;
  const int64_t N = p.is("fused") ? up_to(states, 4) : states;
  const Layout rows{{batch, G, channels, L}, {L * d, C, 1, d}, batch * L * d},
      BC{{batch, G, states, L}, {L * G * N, N, 1, G * N}, batch * L * G * N},
      A{{1, G, channels, states}, {0, C * N, N, 1}, d * N},
      each{{1, 1, G, channels}, {0, 0, C, 1}, d},
      state{{batch, G, channels, states}, {d * N, C * N, N, 1}, batch * d * N};
  ScanBackwardArgs<T> g;
  ScanArgs<T>& a = g.in;
  a.batch = batch, a.L = L, a.d_inner = d, a.d_state = N, a.n_groups = G;
  a.x = p.in<T>("u", rows), a.delta = p.in<T>("delta", rows), a.z = p.in<T>("z", rows);
  a.B = p.in<T>("B", BC), a.C = p.in<T>("C", BC), a.A = p.in<float>("A", A);
  a.D = p.in<float>("D", each), a.delta_bias = p.in<float>("delta_bias", each);
  a.h0 = p.in<float>("h0", state), a.delta_softplus = p.call.softplus;
  a.x_stride = a.delta_stride = a.z_stride = a.out_stride = d, a.B_stride = a.C_stride = G * N;
  if (p.call.backward) {
    g.dout = p.in<T>("dout", rows), g.dhT = p.in<float>("dhT", state);
    g.dx = p.out<T>("du", rows), g.ddelta = p.out<T>("ddelta", rows), g.dz = p.out<T>("dz", rows);
    g.dB = p.out<T>("dB", BC), g.dC = p.out<T>("dC", BC), g.dA = p.out<float>("dA", A, true);
    g.dD = p.out<float>("dD", each, true), g.dbias = p.out<float>("ddelta_bias", each, true);
    g.dh0 = p.out<float>("dh0", state);
    g.dout_stride = g.dx_stride = g.ddelta_stride = g.dz_stride = d;
    g.dB_stride = g.dC_stride = G * N;
    if (p.is("naive")) {
      const size_t bytes = selective_scan_backward_naive_workspace(g);
      selective_scan_backward_naive(g, reinterpret_cast<float*>(p.room<char>(bytes)), nullptr);
    } else if (p.is("") || (p.is("fused") && scan_backward_is_fused(g))) {
      const size_t bytes = selective_scan_backward_workspace(g);
      selective_scan_backward(g, reinterpret_cast<float*>(p.room<char>(bytes)), nullptr);
    } else {
      return VERIFY_UNSUPPORTED;
    }
    return p.finish();
  }
  a.out = p.out<T>("out", rows), a.hT = p.out<float>("hT", state);
  if (p.is("naive"))
    selective_scan_naive(a, nullptr);
  else if (p.is("registers") && N <= 64)
    selective_scan_registers(a, nullptr);
  else if (p.is("lanes"))
    selective_scan_lanes(a, nullptr);
  else if (p.is("") || (p.is("fused") && reads_four(a)))
    selective_scan(a, reinterpret_cast<float*>(p.room<char>(selective_scan_workspace(a))), nullptr);
  else
    return VERIFY_UNSUPPORTED;
  return p.finish();
}

template <class T>
int judged_ssd(Problem& p) {
  const int64_t *x = p.shape("x"), *B = p.shape("B"), batch = x[0], L = x[1], H = x[2], G = B[2];
  const bool tiles = p.is("fused") || p.is("warpgroup");
  const int64_t P = tiles ? up_to(x[3], 64) : x[3], N = tiles ? up_to(B[3], 8) : B[3];
  const Layout rows{{batch, L, H, x[3]}, {L * H * P, H * P, P, 1}, batch * L * H * P},
      steps{{1, batch, L, H}, {0, L * H, H, 1}, batch * L * H},
      BC{{batch, L, G, B[3]}, {L * G * N, G * N, N, 1}, batch * L * G * N},
      each{{1, 1, 1, H}, {0, 0, 0, 1}, H},
      state{{batch, H, x[3], B[3]}, {H * P * N, P * N, N, 1}, batch * H * P * N};
  SsdBackwardArgs<T> a;
  a.batch = batch, a.L = L, a.n_heads = int(H), a.head_dim = int(P), a.d_state = int(N);
  a.n_groups = int(G), a.x = p.in<T>("x", rows), a.dt = p.in<T>("dt", steps);
  a.B = p.in<T>("B", BC), a.C = p.in<T>("C", BC), a.A = p.in<float>("A", each);
  a.D = p.in<float>("D", each), a.dt_bias = p.in<float>("dt_bias", each);
  a.h0 = p.in<float>("h0", state);
  a.x_stride = a.out_stride = a.dout_stride = a.dx_stride = H * P, a.dt_stride = a.ddt_stride = H;
  a.B_stride = a.C_stride = a.dB_stride = a.dC_stride = G * N;
  if (!(p.is("") || p.is("naive") || (tiles && sizeof(T) == 2))) return VERIFY_UNSUPPORTED;
  if (p.call.backward) {
    a.dout = p.in<T>("dout", rows), a.dhT = p.in<float>("dhT", state);
    a.dx = p.out<T>("dx", rows), a.ddt = p.out<T>("ddt", steps), a.dB = p.out<T>("dB", BC);
    a.dC = p.out<T>("dC", BC), a.dA = p.out<float>("dA", each, true);
    a.dD = p.out<float>("dD", each, true), a.ddt_bias = p.out<float>("ddt_bias", each, true);
    a.dh0 = p.out<float>("dh0", state);
    const SsdBackwardRung rung = p.is("naive") ? SsdBackwardRung::kNaive : ssd_backward_rung(a);
    if (p.is("warpgroup") || (p.is("fused") && rung != SsdBackwardRung::kFused))
      return VERIFY_UNSUPPORTED;
    a.workspace = p.room<char>(ssd_backward_workspace_bytes(a, rung));
    ssd_backward(a, rung, nullptr);
    return p.finish();
  }
  a.out = p.out<T>("out", rows), a.hT = p.out<float>("hT", state);
  const SsdArgs<T>& forward = a;
  const SsdRung best = ssd_rung(forward);
  const SsdRung rung = p.is("naive") ? SsdRung::kNaive : p.is("fused") ? SsdRung::kFused : best;
  if (rung > best || (p.is("warpgroup") && best != SsdRung::kWarpgroup)) return VERIFY_UNSUPPORTED;
  a.workspace = p.room<char>(ssd_workspace_bytes(forward, rung));
  if constexpr (sizeof(T) == 2)
    if (rung != SsdRung::kNaive) ssd_split(forward, rung, ssd_segments(forward, rung), nullptr);
  if (rung == SsdRung::kNaive) ssd_naive(forward, nullptr);
  return p.finish();
}

template <class T>
int judged_conv(Problem& p) {
  const int64_t *x = p.shape("x"), batch = x[0], d = x[1], L = x[2], width = p.shape("weight")[1];
  const Layout rows{{1, batch, d, L}, {0, L * d, 1, d}, batch * L * d},
      weight{{1, 1, d, width}, {0, 0, width, 1}, d * width}, each{{1, 1, 1, d}, {0, 0, 0, 1}, d},
      state{{1, batch, d, width - 1}, {0, (width - 1) * d, 1, d}, batch * (width - 1) * d};
  if (width < 2 || !(p.is("") || p.is("fused") || (p.is("naive") && !p.call.backward)))
    return VERIFY_UNSUPPORTED;
  ConvBackwardArgs<T> g;
  ConvArgs<T>& a = g.in;
  a.batch = batch, a.L = L, a.d = d, a.width = int(width), a.activate = p.option("silu") != 0;
  a.x = p.in<T>("x", rows), a.weight = p.in<float>("weight", weight);
  a.bias = p.in<float>("bias", each), a.state = p.in<T>("initial_states", state);
  a.x_stride = a.out_stride = g.dout_stride = g.dx_stride = d;
  if (p.call.backward) {
    g.dout = p.in<T>("dout", rows), g.dstate_out = p.in<float>("dfinal_states", state);
    g.dx = p.out<T>("dx", rows), g.dweight = p.out<float>("dweight", weight, true);
    g.dbias = p.out<float>("dbias", each, true), g.dstate = p.out<float>("dinitial_states", state);
    const size_t bytes = causal_conv1d_backward_workspace(g);
    causal_conv1d_backward(g, reinterpret_cast<float*>(p.room<char>(bytes)), nullptr);
    return p.finish();
  }
  a.out = p.out<T>("out", rows), a.state_out = p.out<T>("final_states", state);
  if (p.is("naive")) causal_conv1d_naive(a, nullptr);
  if (p.is("naive")) a.out = p.room<T>(rows.size);  // it leaves no state: the other one does
  causal_conv1d(a, nullptr);
  return p.finish();
}

template <class T>
int judged_norm(Problem& p, bool gated) {
  const int64_t *x = p.shape("x"), rows = x[0] * x[1], d = x[2];
  const int64_t group = gated ? int64_t(p.option("group_size")) : d;
  const float eps = float(p.option("eps"));
  if (group % 4 || !(p.is("") || p.is("fused"))) return VERIFY_UNSUPPORTED;
  const Layout all{{1, 1, rows, d}, {0, 0, d, 1}, rows * d}, each{{1, 1, 1, d}, {0, 0, 0, 1}, d};
  const float* weight = p.in<float>("weight", each);
  const T *y = gated ? p.in<T>("x", all) : nullptr, *z = p.in<T>("z", all);
  float* residual = gated ? nullptr : p.in<float>("x", all);
  if (!p.call.backward) {
    T* out = p.out<T>("out", all);
    if (gated)
      gated_rms_norm(y, d, z, d, weight, eps, rows, int(d), int(d / group), out, d, nullptr);
    else
      rms_norm<T>(residual, nullptr, d, weight, eps, rows, int(d), out, d, nullptr);
    return p.finish();
  }
  float* const workspace = p.room<float>(row_parts(rows, d));
  const T* dout = p.in<T>("dout", all);
  T* dx = p.out<T>("dx", all);
  float* dweight = p.out<float>("dweight", each, true);
  if (gated)
    gated_rms_norm_backward<T>({rows, int(d), int(d / group), eps, y, z, dout, weight, dx,
                                p.out<T>("dz", all), dweight, d, d, d, d, d},
                               workspace, nullptr);
  else
    rms_norm_backward<T>(
        {rows, int(d), eps, residual, weight, dout, p.room<float>(rows * d), dx, dweight},
        workspace, nullptr);
  return p.finish();
}

template <class T>
int judged(Problem& p) {
  const std::string op = p.call.op;
  if (op == "selective_scan") return judged_scan<T>(p);
  if (op == "ssd") return judged_ssd<T>(p);
  if (op == "causal_conv1d") return judged_conv<T>(p);
  return judged_norm<T>(p, op == "gated_rms_norm");
}

}  // namespace mamba

extern "C" int verify_kernel(const struct call* call) try {
  mamba::Problem problem(*call);
  const int dtype = call->tensors[0].dtype;
  if (dtype == VERIFY_F32) return mamba::judged<float>(problem);
  if (dtype == VERIFY_BF16) return mamba::judged<__nv_bfloat16>(problem);
  if (dtype == VERIFY_F16) return mamba::judged<__half>(problem);
  return VERIFY_UNSUPPORTED;
} catch (const std::exception& error) {
  std::cerr << "verify_kernels: " << error.what() << "\n";
  return 2;
}
