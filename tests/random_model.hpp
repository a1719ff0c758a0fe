// A model of random weights on the GPU, for measurements and for shapes without a checkpoint.
// Include it after mamba.cu.
#pragma once

namespace mamba {

// Uniform numbers in [-scale, scale) plus `offset`, by hashing the index (splitmix64).
template <class T>
__global__ void random_kernel(T* out, int64_t size, float scale, float offset, uint64_t seed) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < size;
       i += int64_t(gridDim.x) * blockDim.x) {
    uint64_t v = (i + seed * 0x100000001B3ull + 1) * 0x9E3779B97F4A7C15ull;
    v = (v ^ v >> 30) * 0xBF58476D1CE4E5B9ull;
    v = (v ^ v >> 27) * 0x94D049BB133111EBull;
    out[i] = from_float<T>(fmaf(scale, float((v ^ v >> 31) >> 40) * 0x1p-23f - 1.f, offset));
  }
}
template <class T>
void fill_random(T* out, int64_t size, float scale, float offset, uint64_t seed) {
  launch_early(random_kernel<T>, dim3(1024), 256, 0, nullptr, out, size, scale, offset, seed);
  CUDA_CHECK(cudaDeviceSynchronize());
}

/// Matrices stored as dtype; spread as at the start of training, so that nothing overflows.
inline DeviceModel random_model(const Config& config, DType dtype) {
  DeviceModel model;
  model.sizes = config;
  model.layers.resize(static_cast<size_t>(config.n_layer));
  uint64_t seed = 1;
  for_each_weight(config, model, [&](const std::string& name, const auto& shape, auto& to) {
    const auto named = [&](const char* part) { return name.find(part) != std::string::npos; };
    int64_t size = 1;
    for (const int64_t extent : shape) size *= extent;
    if constexpr (std::is_same_v<std::remove_reference_t<decltype(to)>, DeviceMatrix>) {
      to.rows = shape[0], to.cols = shape[1];
      to.bytes = DeviceBuffer<std::byte>(static_cast<size_t>(size) * dtype_size(dtype));
      with_weight_type(dtype, [&](auto* type) {
        fill_random(reinterpret_cast<decltype(type)>(to.bytes.data()), size,
                    std::sqrt(3.f / float(shape[1])), 0.f, ++seed);
      });
    } else {
      to = DeviceBuffer<float>(static_cast<size_t>(size));
      const auto [scale, offset] = named("A_log")           ? std::pair(7.f, -8.f)  // A itself
                                   : named("dt_")           ? std::pair(2.f, -4.6f)
                                   : named("conv1d.weight") ? std::pair(0.5f, 0.f)
                                                            : std::pair(0.f, 1.f);
      fill_random(to.data(), size, scale, offset, ++seed);
    }
  });
  return model;
}

}  // namespace mamba
