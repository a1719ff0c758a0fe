// A libnccl.so.2 for the emulated GPU (emulate.hpp), whose memory is the host's: what mamba.cu
// calls of NCCL, between processes of one machine, through a piece of memory that all of them have.
// A rank that ends leaves the others waiting, as with NCCL itself.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

namespace {

constexpr int kRanks = 8;
constexpr std::size_t kRoom = 1 << 16;  // bytes at a time

struct Shared {  // zero at first
  std::atomic<int> arrived, round;
  std::size_t asked[kRanks][2];  // numbers, type
  alignas(64) unsigned char numbers[kRanks][kRoom];
};
struct Id {
  char name[128];
};
struct Comm {
  Shared* shared;
  int count, rank;

  void meet() {  // all come here before one goes on
    const int now = shared->round;
    if (++shared->arrived == count)
      shared->arrived = 0, ++shared->round;
    else
      while (shared->round == now) ::usleep(20);
  }
};

template <class Number>
void sum(Comm* comm, const Number* from, Number* to, std::size_t n) {
  constexpr std::size_t kMost = kRoom / sizeof(Number);
  for (; n > 0; n -= std::min(n, kMost), from += kMost, to += kMost) {
    const std::size_t some = std::min(n, kMost);
    std::memcpy(comm->shared->numbers[comm->rank], from, some * sizeof(Number));
    comm->meet();
    for (std::size_t i = 0; i < some; ++i) {
      to[i] = 0;
      for (int r = 0; r < comm->count; ++r)
        to[i] += reinterpret_cast<const Number*>(comm->shared->numbers[r])[i];
    }
    comm->meet();  // all have read before one writes
  }
}

}  // namespace

extern "C" {

int ncclGetUniqueId(Id* id) {
  static int number = 0;
  *id = {};
  std::snprintf(id->name, sizeof id->name, "/fake_nccl.%d.%d", int(::getpid()), number++);
  return 0;
}

int ncclCommInitRank(Comm** comm, int count, Id id, int rank) {
  const int file = ::shm_open(id.name, O_RDWR | O_CREAT, 0600);
  if (count > kRanks || file < 0 || ::ftruncate(file, sizeof(Shared)) != 0) return 2;
  void* const p = ::mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  ::close(file);
  *comm = new Comm{static_cast<Shared*>(p), count, rank};
  (*comm)->meet();
  if (rank == 0) ::shm_unlink(id.name);
  return 0;
}

int ncclAllReduce(const void* from, void* to, std::size_t n, int type, int, Comm* comm, void*) {
  const std::size_t mine[] = {n, std::size_t(type)};
  std::memcpy(comm->shared->asked[comm->rank], mine, sizeof mine);
  comm->meet();
  for (int r = 0; r < comm->count; ++r)
    if (std::memcmp(comm->shared->asked[r], mine, sizeof mine) != 0) {
      std::fprintf(stderr, "fake NCCL: ranks sum different numbers\n");
      std::abort();
    }
  comm->meet();
  type == 7 ? sum(comm, static_cast<const float*>(from), static_cast<float*>(to), n)
            : sum(comm, static_cast<const double*>(from), static_cast<double*>(to), n);
  return 0;
}

const char* ncclGetErrorString(int) { return "error of the fake NCCL"; }

}  // extern "C"
