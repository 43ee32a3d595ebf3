// CUDA C++ for a C++ compiler: the words of the language, and a launch whose threads are fibers of one CPU thread.
//
// A thread runs until it waits: at a barrier, or for the other lanes of its warp. Threads go in the order of their
// indices, or with LATRO_EMULATOR_SEED in another order each round, and so do blocks: a kernel that is right does not
// notice. Blocks run one after another, those of a cluster at once. Shared memory starts as NaN, for every block anew.
// What hardware would leave undefined or hang on is an exception out of launch(): threads that wait for ever, lanes of
// a warp that meet in different functions, a mask that is not full.
//
// Not emulated: that blocks of a grid run at once, memory order weaker than the CPU's, the rounding of approximate
// instructions.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <string>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// The module's thread-local storage is the static shared memory of the block that runs: the loader knows its bounds.
#define __shared__ static thread_local

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {
  }
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

using cudaStream_t = void*;

namespace emulated {

struct DeviceGuard {
  explicit DeviceGuard(int32_t /*device*/) {
  }
};

struct Grid {
  dim3 grid;
  dim3 block;
  size_t shared_bytes;
  unsigned cluster;
};

struct Thread {
  unsigned thread;   // in its block
  unsigned block;    // in the grid
  unsigned rank;     // of the block in its cluster
  unsigned cluster;  // blocks in a cluster
};

using Where = std::source_location;

// Calls kernel once for each thread; throws std::runtime_error with what went wrong.
void run(const Grid& grid, const std::function<void()>& kernel);

// The thread that runs, or whose predicate does.
Thread this_thread();

// The dynamic shared memory of a block of this cluster, at a multiple of 1024.
char* shared_of(unsigned rank);

// Ends the launch with this message.
[[noreturn]] void fail(const std::string& message);

// Other threads run until ready(context), which is asked any number of times. `what` is for the message of a deadlock.
void yield_until(const char* what, bool (*ready)(void*), void* context, Where where);

template <class Ready>
void yield_until(const char* what, Ready ready, Where where = Where::current()) {
  yield_until(what, [](void* context) { return (*static_cast<Ready*>(context))(); }, &ready, where);
}

// What happens only once every thread waits, for as long as it returns true: whatever may come late, comes then.
void when_stuck(std::function<bool()> act);

// Waits for `threads` threads of the block at barrier `id`; for 0 threads: for all that have not returned.
void sync_threads(int id, unsigned threads, const char* what, Where where = Where::current());

inline void sync_some(int id, int threads, Where where = Where::current()) {
  sync_threads(id, threads, "sync_some", where);
}

// The value that lane `source` of this warp gives; all its lanes must come, each with a source of its own.
uint64_t exchange(const char* what, unsigned mask, uint64_t value, unsigned source, Where where);

// Bit i is whether lane i of this warp gives true.
unsigned ballot(const char* what, unsigned mask, bool value, Where where);

inline unsigned lane() {
  return this_thread().thread % 32;
}

template <class T>
T exchange_as(const char* what, unsigned mask, T value, unsigned source, Where where) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(what, mask, bits, source, where);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulated

inline void __syncthreads(emulated::Where where = emulated::Where::current()) {
  emulated::sync_threads(0, 0, "__syncthreads", where);
}

inline void __syncwarp(unsigned mask = 0xffffffff, emulated::Where where = emulated::Where::current()) {
  emulated::ballot("__syncwarp", mask, true, where);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, emulated::Where where = emulated::Where::current()) {
  return emulated::exchange_as("__shfl_sync", mask, value, source % 32, where);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int flips, emulated::Where where = emulated::Where::current()) {
  return emulated::exchange_as("__shfl_xor_sync", mask, value, emulated::lane() ^ flips, where);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, emulated::Where where = emulated::Where::current()) {
  const unsigned lane = emulated::lane();
  return emulated::exchange_as("__shfl_down_sync", mask, value, lane + by < 32 ? lane + by : lane, where);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, emulated::Where where = emulated::Where::current()) {
  const unsigned lane = emulated::lane();
  return emulated::exchange_as("__shfl_up_sync", mask, value, by <= lane ? lane - by : lane, where);
}

inline unsigned __ballot_sync(unsigned mask, int value, emulated::Where where = emulated::Where::current()) {
  return emulated::ballot("__ballot_sync", mask, value != 0, where);
}

inline int __any_sync(unsigned mask, int value, emulated::Where where = emulated::Where::current()) {
  return emulated::ballot("__any_sync", mask, value != 0, where) != 0;
}

inline int __all_sync(unsigned mask, int value, emulated::Where where = emulated::Where::current()) {
  return emulated::ballot("__all_sync", mask, value == 0, where) == 0;
}

[[noreturn]] inline void __trap() {
  emulated::fail("__trap");
}

// Vectors, aligned as in CUDA.
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

inline uint2 make_uint2(unsigned x, unsigned y) {
  return {x, y};
}
inline float2 make_float2(float x, float y) {
  return {x, y};
}
inline int4 make_int4(int x, int y, int z, int w) {
  return {x, y, z, w};
}
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}
inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}

template <class T>
T __ldg(const T* from) {
  return *from;
}
template <class T>
T __ldcs(const T* from) {
  return *from;
}
template <class T>
void __stcs(T* to, T value) {
  *to = value;
}

inline unsigned __float_as_uint(float x) {
  return std::bit_cast<unsigned>(x);
}
inline int __float_as_int(float x) {
  return std::bit_cast<int>(x);
}
inline float __uint_as_float(unsigned x) {
  return std::bit_cast<float>(x);
}
inline float __int_as_float(int x) {
  return std::bit_cast<float>(x);
}
