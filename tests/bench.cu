// Measurements of the GPU program: one JSON object a line, against the limits of this GPU, which
// are measured in the same run.
//
//   build/bench_cuda [OP ...] [--cold] [--skip-naive] [--only TEXT]
//
// Without OP: all of bandwidth, matmul, selective_scan, selective_scan_backward, causal_conv1d,
// causal_conv1d_backward, ssd, ssd_backward, causal_attention, rms_norm, gated_rms_norm, their
// backwards as norm_backward, sampler, decode, prefill, train. A kernel runs in a CUDA graph of up
// to ten calls, its data in the L2 cache as far as they fit, or, with --cold, alone after 256 MiB
// of other writes. --only: the rows whose "shape" contains TEXT. All data and weights are random.
// The floor is the time to move each input and output once; of attention and prefill, to multiply.
#define MAMBA_NO_MAIN
#include "../mamba.cu"

#include "random_model.hpp"

namespace mamba {

/// Milliseconds that f, which only launches, keeps the GPU busy: the median of `repeat` runs.
/// `before` comes ahead of each run and is not timed.
template <class Function, class Before>
double median_ms(cudaStream_t stream, Index repeat, const Function& f, const Before& before) {
  std::vector<double> times;
  for (Index i = -3; i < repeat; ++i) {  // three to warm up
    Event start(true), end(true);
    before();
    start.record(stream);
    f();
    end.record(stream);
    end.wait();
    if (i >= 0) times.push_back(start.milliseconds_to(end));
  }
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  return times[times.size() / 2];
}
template <class Function>
double median_ms(cudaStream_t stream, Index repeat, const Function& f) {
  return median_ms(stream, repeat, f, [] {});
}

/// Bytes a second, read and written, that a large copy reaches.
double copy_bandwidth(cudaStream_t stream) {
  const DeviceBuffer<float> from(size_t{1} << 28), to(size_t{1} << 28);
  fill_random(from.data(), int64_t(from.size()), 1.f, 0.f, 7);
  const double ms = median_ms(stream, 10, [&] {
    CUDA_CHECK(
        cudaMemcpyAsync(to.data(), from.data(), from.bytes(), cudaMemcpyDeviceToDevice, stream));
  });
  return 2e3 * double(from.bytes()) / ms;
}

/// Multiply-adds a second, times two, that a large product of this type reaches on random numbers.
template <class T>
double matmul_peak(const Queue& queue) {
  constexpr int64_t n = 8192;
  const DeviceBuffer<T> x(n * n), W(n * n), y(n * n);
  fill_random(x.data(), n * n, 1.f, 0.f, 0);
  fill_random(W.data(), n * n, 1.f, 0.f, 1);
  return 2e3 * double(n) * n * n / median_ms(queue.stream(), 10, [&] {
           queue.linear(x.data(), n, n, W.data(), n, n, y.data(), n);
         });
}

struct Flags {
  std::vector<std::string> ops;
  bool cold = false, skip_naive = false, states = false;
  std::string only;
};

struct Figure {
  std::string op, kernel, shape;
  DType dtype;
  double bytes, flops;
};

/// What all measurements share: the stream, the limits, and how a line is made.
class Bench {
 public:
  explicit Bench(const Flags& flags)
      : flags_(flags), cold_(size_t{256} << 20), bandwidth_(copy_bandwidth(stream())) {}

  const Queue& queue() const { return queue_; }
  cudaStream_t stream() const { return queue_.stream(); }
  double bandwidth() const { return bandwidth_; }
  bool states() const { return flags_.states; }
  bool wants(const std::string& shape) const {
    return shape.find(flags_.only) != std::string::npos;
  }

  template <class T>
  DeviceBuffer<T> random(int64_t size, float scale = 1, float offset = 0) {
    DeviceBuffer<T> buffer(static_cast<size_t>(size));
    fill_random(buffer.data(), size, scale, offset, ++seed_);
    return buffer;
  }

  void print(const Figure& f, double ms, double floor) const {
    std::cout << nlohmann::ordered_json{{"op", f.op},       {"kernel", f.kernel},
                                        {"shape", f.shape}, {"dtype", dtype_name(f.dtype)},
                                        {"ms", ms},         {"bytes", f.bytes},
                                        {"flops", f.flops}, {"percent_of_floor", 100 * floor / ms}}
              << std::endl;
  }

  /// Times a kernel, or several in a row. Slow ones are repeated less often. The floor is the time
  /// to move the bytes, or `multiply` seconds if those are more.
  template <class Launch>
  void report(const Figure& f, const Launch& launch, double multiply = 0) const {
    if (flags_.skip_naive && f.kernel.find("naive") != std::string::npos) return;
    const double once = median_ms(stream(), 1, launch);
    const Index repeat = once > 20 ? 3 : 20, calls = std::clamp<Index>(Index(10 / once), 1, 10);
    const auto flush = [&] {
      CUDA_CHECK(cudaMemsetAsync(cold_.data(), 0, cold_.bytes(), stream()));
    };
    double ms = 0;
    if (flags_.cold) {
      ms = median_ms(stream(), repeat, launch, flush);
    } else {
      const Graph graph(stream(), [&] {
        for (Index i = 0; i < calls; ++i) launch();
      });
      ms = median_ms(stream(), repeat, [&] { graph.launch(stream()); }) / double(calls);
    }
    print(f, ms, 1e3 * std::max(f.bytes / bandwidth_, multiply));
  }

 private:
  const Flags& flags_;
  Queue queue_;
  const DeviceBuffer<std::byte> cold_;  // larger than the L2 cache: written before each run
  double bandwidth_;
  uint64_t seed_ = 0;
};

std::string shape_of(std::initializer_list<std::pair<const char*, int64_t>> sizes) {
  std::string text;
  for (const auto& [name, size] : sizes)
    text += (text.empty() ? "" : ", ") + std::string(name) + " " + std::to_string(size);
  return text;
}

struct Sizes {
  int64_t batch, width, L;
};

template <class T>
void bench_conv(Bench& bench, DType dtype, const Sizes& s) {
  const std::string shape = shape_of({{"batch", s.batch}, {"d", s.width}, {"L", s.L}});
  if (!bench.wants(shape)) return;
  constexpr int64_t kWidth = 4;
  const int64_t d = s.width, rows = s.batch * s.L;
  const auto x = bench.random<T>(rows * d), state = bench.random<T>(s.batch * (kWidth - 1) * d);
  const DeviceBuffer<T> out(static_cast<size_t>(rows * d));
  const auto weight = bench.random<float>(d * kWidth), bias = bench.random<float>(d);
  ConvArgs<T> a;
  a.batch = s.batch, a.L = s.L, a.d = d, a.width = int(kWidth);
  a.x = x.data(), a.weight = weight.data(), a.bias = bias.data();
  a.state = a.state_out = state.data(), a.out = out.data();
  a.x_stride = a.out_stride = d;
  const auto figure = [&](const char* kernel, int64_t tokens) {
    return Figure{"causal_conv1d",
                  kernel,
                  shape,
                  dtype,
                  double(2 * tokens * d + 2 * s.batch * (kWidth - 1) * d) * sizeof(T),
                  2. * double(kWidth * d * tokens)};
  };
  const cudaStream_t stream = bench.stream();
  bench.report(figure("causal_conv1d_naive_kernel", rows), [&] { causal_conv1d_naive(a, stream); });
  bench.report(figure("causal_conv1d_fused_kernel", rows), [&] { causal_conv1d(a, stream); });
  a.L = 1;
  bench.report(figure("causal_conv1d_step_kernel", s.batch),
               [&] { causal_conv1d_step(a, stream); });
}

template <class T>
void bench_conv_backward(Bench& bench, DType dtype, const Sizes& s) {
  const std::string shape = shape_of({{"batch", s.batch}, {"d", s.width}, {"L", s.L}});
  if (!bench.wants(shape)) return;
  constexpr int64_t kWidth = 4;
  const int64_t d = s.width, rows = s.batch * s.L;
  const auto x = bench.random<T>(rows * d), dout = bench.random<T>(rows * d);
  const DeviceBuffer<T> dx(x.size());
  const auto weight = bench.random<float>(d * kWidth), bias = bench.random<float>(d);
  DeviceBuffer<float> dweight(weight.size()), dbias(bias.size());
  dweight.zero(), dbias.zero();
  ConvBackwardArgs<T> a;
  a.in.batch = s.batch, a.in.L = s.L, a.in.d = d, a.in.width = int(kWidth);
  a.in.x = x.data(), a.in.weight = weight.data(), a.in.bias = bias.data(), a.in.x_stride = d;
  a.dout = dout.data(), a.dx = dx.data(), a.dout_stride = a.dx_stride = d;
  a.dweight = dweight.data(), a.dbias = dbias.data();
  const int64_t of_state = bench.states() ? s.batch * (kWidth - 1) * d : 0;
  const auto state = bench.random<T>(of_state);
  const auto dstate_out = bench.random<float>(of_state), dstate = bench.random<float>(of_state);
  a.in.state = state.data(), a.dstate_out = dstate_out.data(), a.dstate = dstate.data();
  const DeviceBuffer<std::byte> room(causal_conv1d_backward_workspace(a));
  bench.report(
      {"causal_conv1d_backward", "causal_conv1d_backward_kernel", shape, dtype,
       double(3 * rows * d + of_state) * sizeof(T) + double(2 * of_state) * sizeof(float),
       6. * double(kWidth * d * rows)},
      [&] { causal_conv1d_backward(a, reinterpret_cast<float*>(room.data()), bench.stream()); });
}

template <class T>
void bench_scan(Bench& bench, DType dtype, const Sizes& s) {
  const std::string shape = shape_of({{"batch", s.batch}, {"d_inner", s.width}, {"L", s.L}});
  if (!bench.wants(shape)) return;
  const int64_t d = s.width, N = 16, rows = s.batch * s.L;
  const auto x = bench.random<T>(rows * d), delta = bench.random<T>(rows * d),
             z = bench.random<T>(rows * d), B = bench.random<T>(rows * N),
             C = bench.random<T>(rows * N);
  const DeviceBuffer<T> out(static_cast<size_t>(rows * d));
  const auto A = bench.random<float>(d * N, 7.f, -8.f), D = bench.random<float>(d),
             bias = bench.random<float>(d, 2.f, -4.6f), h = bench.random<float>(s.batch * d * N);
  ScanArgs<T> a;
  a.batch = s.batch, a.L = s.L, a.d_inner = d, a.d_state = N;
  a.x = x.data(), a.delta = delta.data(), a.A = A.data(), a.B = B.data();
  a.C = C.data(), a.D = D.data(), a.z = z.data(), a.delta_bias = bias.data();
  a.hT = h.data(), a.out = out.data();
  a.x_stride = a.delta_stride = a.z_stride = a.out_stride = d;
  a.B_stride = a.C_stride = N;
  const DeviceBuffer<std::byte> workspace(selective_scan_workspace(a));
  const auto figure = [&](const char* kernel, int64_t tokens, int states) {
    return Figure{
        "selective_scan",
        kernel,
        shape,
        dtype,
        double(tokens * (4 * d + 2 * N)) * sizeof(T) +
            double(states * s.batch * d * N) * sizeof(float),
        7. * double(d * N * tokens)};  // a product and exp for A_bar, two for B_bar x, ...
  };
  const cudaStream_t stream = bench.stream();
  bench.report(figure("selective_scan_naive_kernel", rows, 1),
               [&] { selective_scan_naive(a, stream); });
  bench.report(figure("selective_scan_registers_kernel", rows, 1),
               [&] { selective_scan_registers(a, stream); });
  bench.report(figure("selective_scan_lanes_kernel", rows, 1),
               [&] { selective_scan_lanes(a, stream); });
  bench.report(figure("selective_scan_fused_kernel", rows, 1),
               [&] { selective_scan(a, reinterpret_cast<float*>(workspace.data()), stream); });
  a.L = 1, a.h0 = h.data();
  bench.report(figure("selective_scan_step_kernel", s.batch, 2),
               [&] { selective_scan_step(a, stream); });
}

template <class T>
void bench_scan_backward(Bench& bench, DType dtype, const Sizes& s) {
  const std::string shape = shape_of({{"batch", s.batch}, {"d_inner", s.width}, {"L", s.L}});
  if (!bench.wants(shape)) return;
  const int64_t d = s.width, N = 16, rows = s.batch * s.L;
  const auto x = bench.random<T>(rows * d), delta = bench.random<T>(rows * d),
             z = bench.random<T>(rows * d), dout = bench.random<T>(rows * d),
             B = bench.random<T>(rows * N), C = bench.random<T>(rows * N);
  const DeviceBuffer<T> dx(x.size()), ddelta(x.size()), dz(x.size()), dB(B.size()), dC(C.size());
  const auto A = bench.random<float>(d * N, 7.f, -8.f), D = bench.random<float>(d),
             bias = bench.random<float>(d, 2.f, -4.6f);
  DeviceBuffer<float> dA(A.size()), dD(D.size()), dbias(bias.size());
  for (DeviceBuffer<float>* sums : {&dA, &dD, &dbias}) sums->zero();
  ScanBackwardArgs<T> a;
  a.in.batch = s.batch, a.in.L = s.L, a.in.d_inner = d, a.in.d_state = N;
  a.in.x = x.data(), a.in.delta = delta.data(), a.in.A = A.data(), a.in.B = B.data();
  a.in.C = C.data(), a.in.D = D.data(), a.in.z = z.data(), a.in.delta_bias = bias.data();
  a.in.x_stride = a.in.delta_stride = a.in.z_stride = a.dout_stride = d;
  a.dx_stride = a.ddelta_stride = a.dz_stride = d;
  a.in.B_stride = a.in.C_stride = a.dB_stride = a.dC_stride = N;
  a.dout = dout.data(), a.dx = dx.data(), a.ddelta = ddelta.data(), a.dz = dz.data();
  a.dB = dB.data(), a.dC = dC.data(), a.dA = dA.data(), a.dD = dD.data(), a.dbias = dbias.data();
  const int64_t of_state = bench.states() ? s.batch * d * N : 0;
  const auto h0 = bench.random<float>(of_state), dhT = bench.random<float>(of_state),
             dh0 = bench.random<float>(of_state);
  a.in.h0 = h0.data(), a.dhT = dhT.data(), a.dh0 = dh0.data();
  const auto report = [&](const char* kernel, size_t workspace_bytes, const auto& launch) {
    const DeviceBuffer<std::byte> workspace(workspace_bytes);
    bench.report({"selective_scan_backward", kernel, shape, dtype,
                  double(rows * (7 * d + 4 * N)) * sizeof(T) +
                      double(2 * d * N + 3 * of_state) * sizeof(float),
                  17. * double(d * N * rows)},
                 [&] { launch(a, reinterpret_cast<float*>(workspace.data()), bench.stream()); });
  };
  if (s.L <= 2048)
    report("selective_scan_backward_naive_kernel", selective_scan_backward_naive_workspace(a),
           selective_scan_backward_naive<T>);
  report("selective_scan_backward_fused_kernel", selective_scan_backward_workspace(a),
         selective_scan_backward<T>);
}

template <class T>
void bench_ssd(Bench& bench, DType dtype, const Sizes& s) {
  const std::string shape = shape_of({{"batch", s.batch}, {"L", s.L}, {"heads", s.width}});
  if (!bench.wants(shape)) return;
  const int64_t H = s.width, P = 64, N = 128, d = H * P, rows = s.batch * s.L;
  const auto x = bench.random<T>(rows * d), dt = bench.random<T>(rows * H),
             B = bench.random<T>(rows * N), C = bench.random<T>(rows * N);
  const DeviceBuffer<T> out(static_cast<size_t>(rows * d));
  const auto A = bench.random<float>(H, 7.f, -8.f), D = bench.random<float>(H),
             bias = bench.random<float>(H, 2.f, -4.6f), h = bench.random<float>(s.batch * d * N);
  SsdArgs<T> a;
  a.batch = s.batch, a.L = s.L, a.n_heads = int(H), a.head_dim = int(P), a.d_state = int(N);
  a.x = x.data(), a.dt = dt.data(), a.B = B.data(), a.C = C.data(), a.A = A.data();
  a.D = D.data(), a.dt_bias = bias.data(), a.hT = h.data(), a.out = out.data();
  a.x_stride = a.out_stride = d, a.dt_stride = H, a.B_stride = a.C_stride = N;
  const auto figure = [&](const char* kernel, int64_t tokens, int states) {
    return Figure{"ssd",
                  kernel,
                  shape,
                  dtype,
                  double(tokens * (2 * d + H + 2 * N)) * sizeof(T) +
                      double(states * s.batch * d * N) * sizeof(float),
                  5. * double(d * N * tokens)};  // of the recurrence
  };
  const cudaStream_t stream = bench.stream();
  bench.report(figure("ssd_naive_kernel", rows, 1), [&] { ssd_naive(a, stream); });
  if constexpr (sizeof(T) == 2) {
    for (const SsdRung rung : {SsdRung::kFused, SsdRung::kWarpgroup}) {
      const bool warpgroup = rung == SsdRung::kWarpgroup;
      if (rung > ssd_rung(a)) continue;
      const SsdSegments segments = ssd_segments(a, rung);
      const DeviceBuffer<std::byte> workspace(ssd_workspace_bytes(a, rung));
      a.workspace = workspace.data();
      bench.report(figure(warpgroup ? "ssd_warpgroup_kernel" : "ssd_fused_kernel", rows, 1),
                   [&] { ssd_split(a, rung, segments, stream); });
    }
  }
  a.L = 1, a.h0 = h.data();
  bench.report(figure("ssd_step_kernel", s.batch, 2), [&] { ssd_step(a, stream); });
}

template <class T>
void bench_ssd_backward(Bench& bench, DType dtype, const Sizes& s) {
  const std::string shape = shape_of({{"batch", s.batch}, {"L", s.L}, {"heads", s.width}});
  if (!bench.wants(shape)) return;
  const int64_t H = s.width, P = 64, N = 128, d = H * P, rows = s.batch * s.L;
  const auto x = bench.random<T>(rows * d), dt = bench.random<T>(rows * H),
             B = bench.random<T>(rows * N), C = bench.random<T>(rows * N),
             dout = bench.random<T>(rows * d), dx = bench.random<T>(rows * d),
             ddt = bench.random<T>(rows * H), dB = bench.random<T>(rows * N),
             dC = bench.random<T>(rows * N);
  const auto A = bench.random<float>(H, 7.f, -8.f), D = bench.random<float>(H),
             bias = bench.random<float>(H, 2.f, -4.6f), of_heads = bench.random<float>(3 * H);
  SsdBackwardArgs<T> a;
  a.batch = s.batch, a.L = s.L, a.n_heads = int(H), a.head_dim = int(P), a.d_state = int(N);
  a.x = x.data(), a.dt = dt.data(), a.B = B.data(), a.C = C.data(), a.A = A.data();
  a.D = D.data(), a.dt_bias = bias.data(), a.dout = dout.data();
  a.dx = dx.data(), a.ddt = ddt.data(), a.dB = dB.data(), a.dC = dC.data();
  a.dA = of_heads.data(), a.dD = a.dA + H, a.ddt_bias = a.dD + H;
  a.x_stride = a.dout_stride = a.dx_stride = d, a.dt_stride = a.ddt_stride = H;
  a.B_stride = a.C_stride = a.dB_stride = a.dC_stride = N;
  const int64_t of_state = bench.states() ? s.batch * d * N : 0;
  const auto h0 = bench.random<float>(of_state), dhT = bench.random<float>(of_state),
             dh0 = bench.random<float>(of_state);
  a.h0 = h0.data(), a.dhT = dhT.data(), a.dh0 = dh0.data();
  for (const SsdBackwardRung rung : {SsdBackwardRung::kNaive, SsdBackwardRung::kFused}) {
    const bool naive = rung == SsdBackwardRung::kNaive;
    const DeviceBuffer<std::byte> workspace(ssd_backward_workspace_bytes(a, rung));
    a.workspace = workspace.data();
    bench.report(
        {"ssd_backward", naive ? "ssd_backward_naive_kernel" : "ssd_backward_fused_kernel", shape,
         dtype,
         double(rows * (3 * d + 2 * H + 4 * N)) * sizeof(T) + double(3 * of_state) * sizeof(float),
         14. * double(d * N * rows)},  // of the recurrence, the states made again
        [&] { ssd_backward(a, rung, bench.stream()); });
  }
}

/// Causal attention of 16 heads (width head_dim) over a text, its gradients, and one token after it.
template <class T>
void bench_attention(Bench& bench, DType dtype, const Sizes& s, double peak) {
  const std::string shape =
      shape_of({{"batch", s.batch}, {"heads", 16}, {"head_dim", s.width}, {"L", s.L}});
  if (!bench.wants(shape)) return;
  const int64_t P = s.width, d = 16 * P, rows = s.batch * s.L;
  const auto qkv = bench.random<T>(rows * 3 * d), dout = bench.random<T>(rows * d);
  const DeviceBuffer<T> out(dout.size()), dqkv(qkv.size());
  const DeviceBuffer<float> sums(size_t(2 * rows * 16));
  AttentionBackwardArgs<T> a;
  a.in.batch = s.batch, a.in.L = s.L, a.in.n_heads = a.in.n_kv_heads = 16, a.in.head_dim = int(P);
  a.in.q = qkv.data(), a.in.keys = a.in.q + d, a.in.values = a.in.keys + d;
  a.in.q_stride = a.in.kv_stride = a.d_stride = 3 * d, a.in.out_stride = a.dout_stride = d;
  a.in.out = out.data(), a.in.log_sums = sums.data(), a.along = sums.data() + rows * 16;
  a.dout = dout.data(), a.dq = dqkv.data(), a.dk = a.dq + d, a.dv = a.dk + d;
  const double pairs = double(rows) * double(s.L + 1) / 2 * double(d);  // multiply-adds of q k
  bench.report(
      {"causal_attention", "causal_attention_fused_kernel", shape, dtype,
       double(4 * rows * d) * sizeof(T), 4 * pairs},
      [&] { causal_attention(a.in, bench.stream()); }, 4 * pairs / peak);
  bench.report(
      {"causal_attention_backward", "causal_attention_backward_fused_kernel", shape, dtype,
       double(8 * rows * d) * sizeof(T), 10 * pairs},
      [&] { causal_attention_backward(a, bench.stream()); }, 10 * pairs / peak);
  AttentionArgs<T> step = a.in;
  DeviceBuffer<int64_t> past(static_cast<size_t>(s.batch));
  past.copy_from(std::vector<int64_t>(past.size(), s.L - 1).data());
  const DeviceBuffer<float> parts(size_t(attention_parts(s.batch, 16, 16, int(P))));
  step.L = 1, step.log_sums = nullptr, step.capacity = s.L, step.past = past.data();
  bench.report({"causal_attention", "causal_attention_step_kernel", shape, dtype,
                double(2 * rows * d) * sizeof(T), 4 * double(rows * d)},
               [&] { causal_attention_step(step, parts.data(), bench.stream()); });
}

template <class T>
void bench_norms(Bench& bench, DType dtype, const Sizes& s, bool gated) {
  const std::string shape = shape_of({{"rows", s.batch * s.L}, {"d", s.width}});
  if (!bench.wants(shape)) return;
  const int64_t d = s.width, rows = s.batch * s.L;
  const auto x = bench.random<T>(rows * d), z = bench.random<T>(rows * d);
  const auto residual = bench.random<float>(rows * d), weight = bench.random<float>(d);
  const DeviceBuffer<T> out(static_cast<size_t>(rows * d));
  const double numbers = double(rows * d);
  if (gated)
    bench.report({"gated_rms_norm", "gated_rms_norm_kernel", shape, dtype, numbers * 3 * sizeof(T),
                  8 * numbers},
                 [&] {
                   gated_rms_norm(x.data(), d, z.data(), d, weight.data(), 1e-5f, rows, int(d), 1,
                                  out.data(), d, bench.stream());
                 });
  else
    bench.report(
        {"rms_norm", "rms_norm_kernel", shape, dtype, numbers * (2 * sizeof(T) + 8), 5 * numbers},
        [&] {
          rms_norm(residual.data(), x.data(), d, weight.data(), 1e-5f, rows, int(d), out.data(), d,
                   bench.stream());
        });
}

template <class T>
void bench_norms_backward(Bench& bench, DType dtype, const Sizes& s) {
  const std::string shape = shape_of({{"rows", s.batch * s.L}, {"d", s.width}});
  if (!bench.wants(shape)) return;
  const int64_t d = s.width, rows = s.batch * s.L;
  const auto y = bench.random<T>(rows * d), z = bench.random<T>(rows * d),
             dout = bench.random<T>(rows * d);
  const auto residual = bench.random<float>(rows * d), weight = bench.random<float>(d);
  const DeviceBuffer<T> dy(y.size()), dz(y.size());
  DeviceBuffer<float> d_residual(residual.size()), dweight(weight.size());
  d_residual.zero(), dweight.zero();
  const DeviceBuffer<float> room(size_t(row_parts(rows, d)));
  const double numbers = double(rows * d);
  bench.report({"norm_backward", "rms_norm_backward_kernel", shape, dtype,
                numbers * (2 * sizeof(T) + 12), 10 * numbers},
               [&] {
                 rms_norm_backward<T>({rows, int(d), 1e-5f, residual.data(), weight.data(),
                                       dout.data(), d_residual.data(), dy.data(), dweight.data()},
                                      room.data(), bench.stream());
               });
  bench.report({"norm_backward", "gated_rms_norm_backward_kernel", shape, dtype,
                numbers * 5 * sizeof(T), 20 * numbers},
               [&] {
                 gated_rms_norm_backward<T>(
                     {rows, int(d), 1, 1e-5f, y.data(), z.data(), dout.data(), weight.data(),
                      dy.data(), dz.data(), dweight.data(), d, d, d, d, d},
                     room.data(), bench.stream());
               });
}

void bench_sampler(Bench& bench, int64_t batch) {
  const std::string shape = shape_of({{"batch", batch}, {"vocab_size", 50280}});
  if (!bench.wants(shape)) return;
  constexpr int64_t V = 50280, kMostDraws = 4096;
  const auto logits = bench.random<float>(batch * V, 10.f), residual = bench.random<float>(batch),
             embedding = bench.random<float>(V);
  const std::vector<Token> prompt = {0};
  const std::vector<Sampler::Text> texts(static_cast<size_t>(batch), {0, prompt});
  const auto report = [&](const char* rules, float temperature, int top_k, float top_p) {
    GenerateOptions options;
    options.n = kMostDraws, options.sampler.temperature = temperature;
    options.sampler.top_k = top_k, options.sampler.top_p = top_p;
    Sampler sampler(options, texts, V, logits.data());
    CUDA_CHECK(cudaDeviceSynchronize());
    bench.report({"sampler", rules, shape, DType::F32, double(batch * V) * 4, 0}, [&] {
      sampler.draw({embedding.data(), DType::F32}, 1, residual.data(), bench.stream());
    });
    CUDA_CHECK(cudaDeviceSynchronize());
  };
  report("greedy", 0, 0, 1);
  report("temperature 0.8", 0.8f, 0, 1);
  report("top-k 50", 0.8f, 50, 1);
  report("top-p 0.95", 0.8f, 0, 0.95f);
}

/// Whole models of random weights.
struct ModelBench {
  const Bench& bench;
  std::string name;
  DType dtype;
  Config config = published_config(name);
  double matrices = 0, rest = 0;  // matrices: each number costs a multiply-add a token
  std::unique_ptr<CudaEngine> engine;

  ModelBench(const Bench& bench, const std::string& name, DType dtype)
      : bench(bench), name(name), dtype(dtype) {
    DeviceModel model = random_model(config, dtype);
    for_each_weight(config, model, [&](const std::string&, const auto&, const auto& to) {
      if constexpr (std::is_same_v<decltype(to), const DeviceMatrix&>)
        matrices += double(to.rows * to.cols);
      else
        rest += double(to.size());
    });
    EngineOptions options;
    options.dtype = dtype;
    engine = std::make_unique<CudaEngine>(std::move(model), config, options);
  }
  double weight_bytes() const { return matrices * double(dtype_size(dtype)) + rest * 4; }

  /// A state after so many tokens (zeros, for time does not depend on them), and room for more.
  DeviceState state_after(int64_t batch, int64_t context, int64_t more) const {
    DeviceState state(config, dtype, batch);
    const cudaStream_t stream = engine->queue_->stream();
    state.reserve(config, dtype_size(dtype), context + more, stream);
    if (state.past.size() == 0) return state;
    state.keys.zero(), state.values.zero();
    state.past.copy_from(std::vector<int64_t>(size_t(batch), context).data());
    state.longest = context;
    return state;
  }

  /// A greedy token of every sequence, each after a text of so many tokens.
  template <class T>
  void decode(int64_t batch, int64_t context = 0) {
    constexpr Index kSteps = 20, kRepeat = 20;
    const cudaStream_t stream = engine->queue_->stream();
    DeviceState state = state_after(batch, context, kSteps * (kRepeat + 3));
    engine->logits_.grow(static_cast<size_t>(batch * config.vocab_size));
    const Activations<T> a(config, batch, engine->activation_room_);
    const std::vector<Token> prompt = {0};
    const std::vector<Sampler::Text> texts(static_cast<size_t>(batch), {0, prompt});
    GenerateOptions greedy;
    greedy.n = kSteps * (kRepeat + 3), greedy.sampler.temperature = 0;
    Sampler sampler(greedy, texts, config.vocab_size, engine->logits_.data());
    CUDA_CHECK(cudaMemset(a.residual, 0, batch * config.d_model * sizeof(float)));
    CUDA_CHECK(cudaDeviceSynchronize());
    const Graph graph(stream, [&] {
      engine->compute<T>().step(a, state, sampler.done(), engine->logits_.data());
      sampler.draw({engine->model_.embedding.bytes.data(), dtype}, config.d_model, a.residual,
                   stream);
    });
    const double ms = median_ms(stream, kRepeat,
                                [&] {
                                  for (Index i = 0; i < kSteps; ++i) graph.launch(stream);
                                }) /
                      kSteps;
    const double keys =
        double(DeviceState::attentions(config) * batch * context * config.attention.kv_width()) *
        double(dtype_size(dtype));
    const double bytes =
        weight_bytes() + 2. * double(state.h.bytes() + state.conv.bytes()) + 2. * keys;
    bench.print({"decode", "step",
                 name + ", batch " + std::to_string(batch) + ", after " + std::to_string(context),
                 dtype, bytes, 2 * matrices * double(batch)},
                ms, bytes / bench.bandwidth() * 1e3);
  }

  template <class T>
  void prefill(int64_t L, double peak) {
    DeviceState state(config, dtype, 1);
    engine->logits_.grow(static_cast<size_t>(config.vocab_size));
    std::vector<Token> ids;
    for (Index t = 0; t < L; ++t) ids.push_back(static_cast<Token>(t * 7919 % config.vocab_size));
    const double ms = median_ms(engine->queue_->stream(), 20, [&] {
      state.longest = 0;  // each time from the start of a text
      CUDA_CHECK(
          cudaMemsetAsync(state.past.data(), 0, state.past.bytes(), engine->queue_->stream()));
      engine->prefill_as<T>(state, ids.data(), L, 0);
    });
    const double head = double(config.vocab_size * config.d_model);
    const double flops = 2 * ((matrices - head) * double(L) + head);
    bench.print(
        {"prefill", "prefill", name + ", L " + std::to_string(L), dtype, weight_bytes(), flops}, ms,
        std::max(weight_bytes() / bench.bandwidth(), flops / peak) * 1e3);
  }
};

void bench_models(const Bench& bench, bool decode, bool prefill) {
  if (!decode && !prefill) return;
  const double peak = matmul_peak<__nv_bfloat16>(bench.queue());
  for (const char* name :
       {"130m", "2.8b", "mamba2-130m", "mamba2-2.7b", "mamba2attn-2.7b", "transformerpp-2.7b"}) {
    if (!bench.wants(name)) continue;
    ModelBench model(bench, name, DType::BF16);
    const bool large = std::string(name).find("130m") == std::string::npos;
    if (decode)
      for (const int64_t batch : {1, 4, 64}) model.decode<__nv_bfloat16>(batch);
    if (decode && large) {  // against length: where a scan overtakes attention
      for (const int64_t context : {512, 2048, 8192, 32768, 131072})
        model.decode<__nv_bfloat16>(1, context);
      model.decode<__nv_bfloat16>(64, 2048);
    }
    if (prefill)
      for (const int64_t L : {512, 1024, 2048, 4096, 8192, 16384, 32768})
        if (large || L == 2048 || L == 16384) model.prefill<__nv_bfloat16>(L, peak);
  }
}

/// Steps of training: `batch` texts of L tokens, AdamW, from the official start.
void bench_training(const Bench& bench, const std::string& name, int64_t batch, int64_t L) {
  const std::string shape = name + ", " + shape_of({{"batch", batch}, {"L", L}});
  if (!bench.wants(shape)) return;
  const Config config = published_config(name);
  double matrices = 0;
  Learned<float> learned{zeros<float>(config), zeros<float>(config), zeros<float>(config)};
  initialize(config, learned.weights, 1);
  for (const auto& p : parameters(config, learned.weights))
    if (p.shape.size() == 2 && p.decays()) matrices += double(p.size);
  EngineOptions options;
  options.dtype = DType::BF16;
  CudaLearner learner(config, std::move(learned), options);
  Batch texts(static_cast<size_t>(batch));
  for (Piece& text : texts)
    for (int64_t t = 0; t <= L; ++t)
      text.ids.push_back(Token(uniform(7, uint64_t(&text - texts.data()), uint64_t(t)) *
                               double(config.vocab_size)));
  const double tokens = double(scored(texts));
  std::vector<double> ms;
  for (int step = 0; step < 10; ++step) {
    const double start = now();
    const double loss = learner.accumulate(texts, 1 / tokens) / tokens;
    const double norm = learner.gradient_norm();
    learner.update({1e-3, 0.9, 0.95, 1e-8, 0.1}, std::min(1., 1 / norm));
    if (step >= 3) ms.push_back(1e3 * (now() - start));
    if (step == 0 || step == 9) std::cerr << shape << ": loss " << loss << "\n";
  }
  std::nth_element(ms.begin(), ms.begin() + ms.size() / 2, ms.end());
  size_t available = 0, total = 0;
  CUDA_CHECK(cudaMemGetInfo(&available, &total));
  const double median = ms[ms.size() / 2], flops = 6 * matrices * tokens;
  std::cout << nlohmann::ordered_json{{"op", "train"},
                                      {"shape", shape},
                                      {"dtype", "bf16"},
                                      {"ms", median},
                                      {"tokens_per_s", 1e3 * tokens / median},
                                      {"flops", flops},
                                      {"memory_in_use", double(total - available)}}
            << std::endl;
}

constexpr Sizes kScanShapes[] = {{1, 1536, 2048}, {8, 1536, 2048},  {1, 5120, 2048},
                                 {8, 5120, 2048}, {1, 5120, 16384}, {1, 1536, 65536},
                                 {1, 5120, 65536}};
constexpr Sizes kConvShapes[] = {{1, 1536, 2048}, {1, 5120, 2048},  {8, 1536, 2048},
                                 {8, 5120, 2048}, {1, 5120, 16384}, {1, 1536, 65536}};
constexpr Sizes kSsdShapes[] = {{8, 24, 2048},  {1, 80, 2048},   {8, 80, 2048},
                                {1, 128, 2048}, {1, 128, 16384}, {1, 128, 65536}};
constexpr Sizes kSsdBackwardShapes[] = {
    {8, 24, 2048}, {1, 80, 2048}, {8, 80, 2048}, {1, 80, 16384}};
constexpr Sizes kAttentionShapes[] = {
    {8, 64, 2048}, {8, 128, 2048}, {1, 64, 16384}, {1, 128, 16384}};
constexpr Sizes kNormShapes[] = {{1, 768, 2048}, {1, 5120, 2048}, {8, 5120, 2048}};

void run_bench(const Flags& flags) {
  using bf16 = __nv_bfloat16;
  const auto asked = [&](const std::string& op) {
    return flags.ops.empty() || std::count(flags.ops.begin(), flags.ops.end(), op) > 0;
  };
  use_device(0);
  Bench bench(flags);
  using Json = nlohmann::ordered_json;
  if (asked("bandwidth"))
    std::cout << Json{{"op", "bandwidth"}, {"GB/s", bench.bandwidth() / 1e9}} << std::endl;
  if (asked("matmul"))
    for (const auto& [dtype, peak] : {std::pair("bf16", matmul_peak<bf16>(bench.queue())),
                                      std::pair("f32", matmul_peak<float>(bench.queue()))})
      std::cout << Json{{"op", "matmul"}, {"dtype", dtype}, {"TFLOP/s", peak / 1e12}} << std::endl;
  if (asked("selective_scan"))
    for (const Sizes& s : kScanShapes)
      bench_scan<bf16>(bench, DType::BF16, s), bench_scan<float>(bench, DType::F32, s);
  if (asked("selective_scan_backward"))
    for (const Sizes& s : kScanShapes)
      bench_scan_backward<bf16>(bench, DType::BF16, s),
          bench_scan_backward<float>(bench, DType::F32, s);
  if (asked("causal_conv1d"))
    for (const Sizes& s : kConvShapes)
      bench_conv<bf16>(bench, DType::BF16, s), bench_conv<float>(bench, DType::F32, s);
  if (asked("causal_conv1d_backward"))
    for (const Sizes& s : kConvShapes)
      bench_conv_backward<bf16>(bench, DType::BF16, s),
          bench_conv_backward<float>(bench, DType::F32, s);
  if (asked("norm_backward"))
    for (const Sizes& s : kNormShapes) bench_norms_backward<bf16>(bench, DType::BF16, s);
  if (asked("ssd"))
    for (const Sizes& s : kSsdShapes) bench_ssd<bf16>(bench, DType::BF16, s);
  if (asked("ssd_backward"))
    for (const Sizes& s : kSsdBackwardShapes) bench_ssd_backward<bf16>(bench, DType::BF16, s);
  if (asked("causal_attention")) {
    const double peak = matmul_peak<bf16>(bench.queue());
    for (const Sizes& s : kAttentionShapes) bench_attention<bf16>(bench, DType::BF16, s, peak);
  }
  for (const bool gated : {false, true})
    if (asked(gated ? "gated_rms_norm" : "rms_norm"))
      for (const Sizes& s : kNormShapes) bench_norms<bf16>(bench, DType::BF16, s, gated);
  if (asked("sampler"))
    for (const int64_t batch : {1, 64}) bench_sampler(bench, batch);
  bench_models(bench, asked("decode"), asked("prefill"));
  if (asked("train"))
    for (const char* name : {"130m", "mamba2-130m"}) bench_training(bench, name, 8, 2048);
  if (asked("train")) bench_training(bench, "2.8b", 1, 16384);
}

}  // namespace mamba

int main(int argc, char** argv) {
  CLI::App app("speed of the GPU program's kernels and models");
  mamba::Flags flags;
  app.add_option("op", flags.ops, "what to measure; all without")
      ->check(CLI::IsMember({"bandwidth", "matmul", "selective_scan", "selective_scan_backward",
                             "causal_conv1d", "causal_conv1d_backward", "ssd", "ssd_backward",
                             "causal_attention", "rms_norm", "gated_rms_norm", "norm_backward",
                             "sampler", "decode", "prefill", "train"}));
  app.add_flag("--cold", flags.cold, "with a cold L2 cache, one call at a time");
  app.add_flag("--skip-naive", flags.skip_naive, "leave out the naive rungs");
  app.add_flag("--states", flags.states,
               "backward: with a state before and a state's gradient after");
  app.add_option("--only", flags.only, "shapes that contain this text");
  CLI11_PARSE(app, argc, argv);
  try {
    mamba::run_bench(flags);
  } catch (const std::exception& e) {
    std::cerr << "bench: " << e.what() << "\n";
    return 1;
  }
}
