// A GPU of fibers, for machines without one: what emulate.py makes of mamba.cu and its tests is
// compiled against this file by a C++ compiler. The threads of a block are fibers of one thread;
// each runs until it meets the others at a barrier or a shuffle, in rising and in falling order in
// turns. Copies to shared memory (cp.async) arrive as late as they may. Blocks, kernels and copies
// follow one another.
//
// Found here: wrong indices, masks, counts, barriers and tails; with the host's AddressSanitizer,
// accesses outside of buffers. Not found: races between warps, memory ordering, overlap of kernels,
// and nothing about speed. Approximate instructions are exact; wgmma, which works in the
// background, is done at once.
#pragma once

#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <type_traits>
#include <vector>

#undef __device__
#undef __global__
#undef __shared__
#undef __launch_bounds__
#define __device__
#define __global__
#define __shared__ static  // one block at a time
#define __launch_bounds__(...)
#define threadIdx emulated::thread
#define blockIdx emulated::block
#define blockDim emulated::block_size
#define gridDim emulated::grid_size
#define __CUDA_ARCH_FEAT_SM90_ALL  // kernels for Hopper run, too

namespace emulated {

using Work = std::function<void()>;
struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};
inline Index3 thread, block, block_size, grid_size;
alignas(1024) inline unsigned char shared_memory[227 << 10];

[[noreturn]] inline void give_up(const char* what) {
  std::fprintf(stderr, "emulated GPU: %s\n", what);
  std::abort();
}

// --- fibers ---------------------------------------------------------------------------------

struct Fiber {
  void* stack_pointer = nullptr;
  bool done = false;
  std::vector<char> stack;
  std::deque<std::vector<Work>> groups;  // committed copies
  std::vector<Work> group;               // the one that is open
};
inline std::vector<Fiber> fibers;
inline void* scheduler = nullptr;
inline const Work* kernel = nullptr;
inline int current = 0, alive = 0;
inline long progress = 0;

#if !defined(__x86_64__)
#error "the emulated GPU switches stacks on x86-64 only"
#endif
extern "C" void emulated_switch(void** save, void* to);
asm(R"(
.pushsection .text
.weak emulated_switch
emulated_switch:
  push %rbx; push %rbp; push %r12; push %r13; push %r14; push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15; pop %r14; pop %r13; pop %r12; pop %rbp; pop %rbx
  ret
.popsection
)");

inline void yield() { emulated_switch(&fibers[current].stack_pointer, scheduler); }

inline void run_fiber() {
  (*kernel)();
  fibers[current].done = true;
  --alive, ++progress;
  for (;;) yield();
}

inline void prepare(Fiber& fiber) {
  if (fiber.stack.empty()) fiber.stack.resize(96 << 10);
  const auto top = reinterpret_cast<std::uintptr_t>(fiber.stack.data() + fiber.stack.size());
  void** frame = reinterpret_cast<void**>(top / 64 * 64);
  *--frame = nullptr;
  *--frame = reinterpret_cast<void*>(&run_fiber);  // where the first switch returns to
  for (int saved = 0; saved < 6; ++saved) *--frame = nullptr;
  fiber.stack_pointer = frame;
  fiber.done = false;
  fiber.groups.clear(), fiber.group.clear();
}

struct Barrier {
  int count = 0, generation = 0;
  void wait(int threads) {
    const int mine = generation;
    ++progress;
    if (++count == threads) count = 0, ++generation;
    while (generation == mine) yield();
  }
};
inline Barrier all_threads, named_barriers[16], warp_barriers[32][32];

inline void run_block(int threads, bool backwards) {
  all_threads = {};
  for (Barrier& b : named_barriers) b = {};
  for (auto& of_warp : warp_barriers)
    for (Barrier& b : of_warp) b = {};
  for (int t = 0; t < threads; ++t) prepare(fibers[t]);
  for (alive = threads; alive > 0;) {
    const long before = progress;
    for (int i = 0; i < threads; ++i) {
      current = backwards ? threads - 1 - i : i;
      thread = {unsigned(current), 0, 0};
      if (!fibers[current].done) emulated_switch(&scheduler, fibers[current].stack_pointer);
    }
    if (progress == before) give_up("all threads wait: a barrier that not all reach");
  }
}

// What a stream is given happens at once, or is noted while a graph is captured.
inline std::vector<Work>* captured = nullptr;
inline void submit(Work work) { captured ? captured->push_back(std::move(work)) : work(); }

template <class Kernel, class... Arguments>
void launch(Kernel k, dim3 grid, int threads, std::size_t shared_bytes, Arguments... arguments) {
  submit([=] {
    if (grid.x == 0 || grid.y == 0 || grid.y > 65535 || grid.z - 1 > 65534 || threads < 1 ||
        threads > 1024 || shared_bytes > sizeof shared_memory)
      give_up("invalid launch configuration");
    const Work body = [&] { k(arguments...); };
    kernel = &body;
    if (fibers.size() < std::size_t(threads)) fibers.resize(threads);
    grid_size = {grid.x, grid.y, grid.z}, block_size = {unsigned(threads), 1, 1};
    for (unsigned z = 0; z < grid.z; ++z)
      for (unsigned y = 0; y < grid.y; ++y)
        for (unsigned x = 0; x < grid.x; ++x) {
          block = {x, y, z};
          std::memset(shared_memory, 0xff, shared_bytes);  // NaN in every type
          run_block(threads, (x + y + z) % 2 != 0);
        }
  });
}

// --- what the threads of a warp do together ---------------------------------------------------

inline unsigned char exchanged[32][32][64];  // by warp and lane
inline int lane() { return current % 32; }

// f(at), at(l) the value of lane l, for the lanes of the mask.
template <class T, class Function>
void together(unsigned mask, const T& value, const Function& f) {
  static_assert(sizeof(T) <= 64, "does not fit");
  auto& slots = exchanged[current / 32];
  Barrier& barrier = warp_barriers[current / 32][__builtin_ctz(mask)];
  std::memcpy(slots[lane()], &value, sizeof value);
  barrier.wait(__builtin_popcount(mask));  // all values are there
  f([&](int l) {
    T of_lane;
    std::memcpy(&of_lane, slots[l & 31], sizeof of_lane);
    return of_lane;
  });
  barrier.wait(__builtin_popcount(mask));  // all have been read
}

template <class T>
double half_of(std::uint32_t word, int half) {
  T pair[2];
  std::memcpy(pair, &word, sizeof word);
  return float(pair[half]);
}
template <class T>
std::uint32_t pack(float low, float high) {
  const T pair[2] = {T(low), T(high)};
  std::uint32_t word;
  std::memcpy(&word, pair, sizeof word);
  return word;
}

// mma.m16n8k16: lane 4 g + t holds the pairs (row g or g + 8, columns 2 t or 2 t + 8) of A, (rows 2
// t or 2 t + 8, column g) of B, and two neighbouring columns of rows g and g + 8 of D.
template <class T>
void mma(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  struct Fragments {
    std::uint32_t a[4], b[2];
  };
  together(~0u, Fragments{{a[0], a[1], a[2], a[3]}, {b0, b1}}, [&](const auto& at) {
    const int g = lane() / 4, t = lane() % 4;
    for (int i = 0; i < 4; ++i) {
      const int row = g + 8 * (i / 2), column = 2 * t + i % 2;
      double sum = d[i];
      for (int k = 0; k < 16; ++k)
        sum += half_of<T>(at(row % 8 * 4 + k % 8 / 2).a[row / 8 + k / 8 * 2], k % 2) *
               half_of<T>(at(column * 4 + k % 8 / 2).b[k / 8], k % 2);
      d[i] = float(sum);
    }
  });
}

// ldmatrix.x4: lane l names row l % 8 of matrix l / 8.
inline void load_matrices(std::uint32_t (&r)[4], std::uint32_t address, bool transposed) {
  together(~0u, address, [&](const auto& at) {
    const int g = lane() / 4, t = lane() % 4;
    for (int matrix = 0; matrix < 4; ++matrix)
      for (int half = 0; half < 2; ++half) {
        const int row = transposed ? 2 * t + half : g, column = transposed ? g : 2 * t + half;
        std::memcpy(reinterpret_cast<char*>(&r[matrix]) + 2 * half,
                    shared_memory + at(8 * matrix + row) + 2 * column, 2);
      }
  });
}
inline void store_matrices(std::uint32_t address, std::array<std::uint32_t, 4> r, bool transposed) {
  const int g = lane() / 4, t = lane() % 4;
  together(~0u, address, [&](const auto& at) {
    for (int matrix = 0; matrix < 4; ++matrix)
      for (int half = 0; half < 2; ++half) {
        const int row = transposed ? 2 * t + half : g, column = transposed ? g : 2 * t + half;
        std::memcpy(shared_memory + at(8 * matrix + row) + 2 * column,
                    reinterpret_cast<char*>(&r[matrix]) + 2 * half, 2);
      }
  });
}

// wgmma.m64n64k16 by each warp for its own 16 rows of d: four tiles of mma, a operand a.
// A described tile has rows of 128 bytes, in which 16-byte piece c of row r lies at c ^ (r % 8).
inline void in_tile(void* to, std::uint64_t tile, int row, int column) {
  const std::uint32_t start = std::uint32_t(tile & 0x3fff) * 16 + row * 128 + column * 2;
  std::memcpy(to, shared_memory + (start ^ (start / 128 % 8 * 16)), 2);
}
template <class T>
void multiply_async(float (*d)[4], const std::uint32_t (&a)[4], std::uint64_t b, int add,
                    bool transposed) {
  const int g = lane() / 4, t = lane() % 4;
  for (int j = 0; j < 8; ++j) {
    std::uint16_t of_b[4];  // rows k 2t, 2t + 1 (+ 8), column n 8j + g
    for (int i = 0; i < 4; ++i) {
      const int k = 2 * t + i % 2 + i / 2 * 8, n = 8 * j + g;
      transposed ? in_tile(&of_b[i], b, k, n) : in_tile(&of_b[i], b, n, k);
    }
    std::uint32_t words[2];
    std::memcpy(words, of_b, sizeof words);
    if (!add) d[j][0] = d[j][1] = d[j][2] = d[j][3] = 0;
    mma<T>(d[j], a, words[0], words[1]);
  }
}
template <class T>
void multiply_async(float (*d)[4], std::uint64_t a, std::uint64_t b, int add, bool transposed) {
  std::uint16_t of_a[8];  // rows g, g + 8 of the warp's, columns 2t, 2t + 1 (+ 8)
  for (int i = 0; i < 8; ++i)
    in_tile(&of_a[i], a, current % 128 / 32 * 16 + lane() / 4 + i / 2 % 2 * 8,
            lane() % 4 * 2 + i % 2 + i / 4 * 8);
  std::uint32_t words[4];
  std::memcpy(words, of_a, sizeof words);
  multiply_async<T>(d, words, b, add, transposed);
}
inline std::uint32_t transpose_matrix(std::uint32_t r) {
  std::uint32_t word = 0;
  together(~0u, r, [&](const auto& at) {
    const int g = lane() / 4, t = lane() % 4;
    for (int half = 0; half < 2; ++half)
      word |= (at((2 * t + half) * 4 + g / 2) >> 16 * (g % 2) & 0xffff) << 16 * half;
  });
  return word;
}

// --- single instructions ----------------------------------------------------------------------

inline float flush(float x) { return std::fabs(x) < 0x1p-126f ? 0.f : x; }  // .ftz
inline float exp2(float x) { return flush(std::exp2(x)); }
inline float reciprocal(float x) { return flush(1.f / x); }

inline void copy_async(std::uint32_t to, const void* from, std::size_t bytes, bool valid) {
  if (to % bytes || to + bytes > sizeof shared_memory) give_up("cp.async: bad shared address");
  if (valid && reinterpret_cast<std::uintptr_t>(from) % bytes) give_up("cp.async: misaligned");
  fibers[current].group.push_back([=] {
    valid ? std::memcpy(shared_memory + to, from, bytes)
          : std::memset(shared_memory + to, 0, bytes);
  });
}

}  // namespace emulated

inline void __pipeline_commit() {
  emulated::Fiber& fiber = emulated::fibers[emulated::current];
  fiber.groups.push_back(std::move(fiber.group));
  fiber.group.clear();
}
inline void __pipeline_wait_prior(std::size_t pending) {
  auto& groups = emulated::fibers[emulated::current].groups;
  for (; groups.size() > pending; groups.pop_front())
    for (const emulated::Work& copy : groups.front()) copy();
}
inline void __barrier_sync_count(unsigned barrier, unsigned threads) {
  emulated::named_barriers[barrier].wait(threads);
}

// mbarrier: of the phase that is not over, the arrivals to come; and its number.
struct __mbarrier_t {
  std::uint16_t count, pending;
  std::uint32_t phase;
};
inline void __mbarrier_init(__mbarrier_t* barrier, unsigned count) {
  *barrier = {std::uint16_t(count), std::uint16_t(count), 0};
}
inline void __mbarrier_arrive(__mbarrier_t* barrier) {
  ++emulated::progress;
  if (--barrier->pending == 0) barrier->pending = barrier->count, ++barrier->phase;
}
inline bool __mbarrier_try_wait_parity(__mbarrier_t* barrier, bool parity, unsigned) {
  if (barrier->phase % 2 == parity) emulated::yield();
  return barrier->phase % 2 != parity;
}

inline void __syncthreads() { emulated::all_threads.wait(blockDim.x); }
inline int __syncthreads_or(int v) {
  static int any;
  __syncthreads();
  any = 0;
  __syncthreads();
  if (v) any = 1;
  __syncthreads();
  return any;
}
inline void __syncwarp() {
  emulated::together(~0u, 0, [](const auto&) {});
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int d) {
  emulated::together(mask, v, [&](const auto& at) { v = at(emulated::lane() ^ d); });
  return v;
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, int d) {
  emulated::together(mask, v, [&](const auto& at) {
    if (emulated::lane() >= d) v = at(emulated::lane() - d);
  });
  return v;
}
template <class T>
T __shfl_sync(unsigned mask, T v, int lane) {
  emulated::together(mask, v, [&](const auto& at) { v = at(lane); });
  return v;
}
inline unsigned __ballot_sync(unsigned mask, bool vote) {
  unsigned votes = 0;
  emulated::together(mask, vote, [&](const auto& at) {
    for (int l = 0; l < 32; ++l) votes |= unsigned(mask >> l & 1 && at(l)) << l;
  });
  return votes;
}
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v ? __builtin_clz(v) : 32; }

// CUB's stable sort of pairs by the bits [begin, end) of their keys.
namespace cub {
struct DeviceRadixSort {
  template <class Key, class Value>
  static cudaError_t SortPairs(void* room, std::size_t& bytes, const Key* keys, Key* sorted_keys,
                               const Value* values, Value* sorted_values, std::int64_t count,
                               int begin, int end, cudaStream_t) {
    bytes = 1;
    if (!room) return cudaSuccess;
    emulated::submit([=] {
      std::multimap<Key, std::int64_t> order;
      for (std::int64_t i = 0; i < count; ++i)
        order.emplace(keys[i] << (64 - end) >> (64 - end + begin), i);
      std::int64_t next = 0;
      for (const auto& [bits, i] : order)
        sorted_keys[next] = keys[i], sorted_values[next++] = values[i];
    });
    return cudaSuccess;
  }
};
}  // namespace cub

inline float __log2f(float x) { return std::log2(x); }
inline float rsqrtf(float x) { return float(1 / std::sqrt(double(x))); }
inline long long __double_as_longlong(double v) {
  long long bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned v) {
  float f;
  std::memcpy(&f, &v, sizeof f);
  return f;
}
inline unsigned __float_as_uint(float v) {
  unsigned bits;
  std::memcpy(&bits, &v, sizeof v);
  return bits;
}
inline std::size_t __cvta_generic_to_shared(const void* p) {
  return static_cast<const unsigned char*>(p) - emulated::shared_memory;
}
inline void* __cvta_shared_to_generic(std::size_t address) {
  return emulated::shared_memory + address;
}
template <class A, class B>
std::common_type_t<A, B> min(A a, B b) {
  using C = std::common_type_t<A, B>;
  return C(b) < C(a) ? C(b) : C(a);
}
template <class A, class B>
std::common_type_t<A, B> max(A a, B b) {
  using C = std::common_type_t<A, B>;
  return C(a) < C(b) ? C(b) : C(a);
}
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  *attributes = {};
  attributes->numRegs = 128;  // like a kernel that was compiled for this GPU
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}
