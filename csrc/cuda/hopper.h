// What a GPU of capability 9.0 has beyond others, as functions: barriers that count bytes, boxes of a matrix copied to
// the shared memory of several blocks, products of 128 threads, clusters of blocks. tests/emulated_cuda/
// emulated_hopper.h has the same functions for the emulator.
//
// A tile of a matrix lies in shared memory as rows of 128 bytes, 64 numbers, of which bits 4 to 6 of an address are
// exclusive-ored with bits 7 to 9 (the "128-byte swizzle"): both the copies and the products speak it.
#pragma once

#include "device.h"

#ifndef LATRO_EMULATED
#include <cuda.h>
#endif

// Machine code for 9.0 is not enough: the products are in that of 9.0a alone.
#if defined(LATRO_EMULATED) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define LATRO_HOPPER 1
#else
#define LATRO_HOPPER 0
#endif

namespace latro::hopper {

constexpr int WARPGROUP = 128;
constexpr int ROW_BYTES = 128;
constexpr int SWIZZLE_BYTES = 1024;  // after which the swizzle repeats: a tile begins at a multiple of it

// In shared memory. Its phases end when as many threads have arrived as it was made for, and all bytes that were
// expected have landed; it then is in its next phase. The parity of the first is 0.
struct Barrier {
  uint64_t state;
};

}  // namespace latro::hopper

#ifdef LATRO_EMULATED
#include <emulated_hopper.h>
#else

namespace latro::hopper {

// Of a matrix [rows, columns] and the boxes that are copied of it: `box_rows` rows of ROW_BYTES.
using TensorMap = CUtensorMap;

// By the driver, which is found through the runtime: nothing has to be linked with it.
inline TensorMap tensor_map_of_type(
    CUtensorMapDataType type,
    int bytes,
    const void* matrix,
    int64_t rows,
    int64_t columns,
    int64_t stride,
    int box_rows) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
  STD_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result));
#else
  STD_CUDA_CHECK(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result));
#endif
  STD_TORCH_CHECK(result == cudaDriverEntryPointSuccess, "the CUDA driver has no cuTensorMapEncodeTiled");
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(stride * bytes)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(ROW_BYTES / bytes), static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[] = {1, 1};
  TensorMap map;
  const CUresult status = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found)(
      &map, type, 2, const_cast<void*>(matrix), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(status == CUDA_SUCCESS, "cuTensorMapEncodeTiled failed with ", static_cast<int>(status));
  return map;
}

// Numbers outside the matrix are zeros in a box. matrix and stride are multiples of 16 bytes.
template <class T>
TensorMap tensor_map(const T* matrix, int64_t rows, int64_t columns, int64_t stride, int box_rows) {
  constexpr bool IS_HALF = std::is_same_v<T, torch::headeronly::Half>;
  static_assert(IS_HALF || std::is_same_v<T, torch::headeronly::BFloat16>);
  constexpr auto TYPE = IS_HALF ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  return tensor_map_of_type(TYPE, sizeof(T), matrix, rows, columns, stride, box_rows);
}

// Of the current device.
inline int multiprocessors() {
  int device = 0;
  int count = 0;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

__device__ __forceinline__ int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Of all threads of all blocks of the cluster.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

__device__ __forceinline__ void init(Barrier& barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals) : "memory");
}

// Makes barriers that this thread has made known to copies and, after cluster_sync, to other blocks.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrives, and has the phase last until so many more bytes have landed.
__device__ __forceinline__ void arrive_expecting(Barrier& barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes)
               : "memory");
}

// Arrives at the same barrier of another block of the cluster, or of this one. It orders nothing for that block but
// what this thread has read: a release to the cluster would wait for all that the thread has written to memory.
__device__ __forceinline__ void arrive_at(Barrier& barrier, int rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(shared_address(&barrier)),
      "r"(rank)
      : "memory");
}

// Until the phase of this parity has ended. Of a new barrier, the one before the first, whose parity is 1, has.
__device__ __forceinline__ void wait(Barrier& barrier, int parity) {
  uint32_t ended = 0;
  while (!ended) {
    asm volatile(
        "{\n"
        ".reg .pred ended;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
        "selp.u32 %0, 1, 0, ended;\n"
        "}"
        : "=r"(ended)
        : "r"(shared_address(&barrier)), "r"(parity)
        : "memory");
  }
}

// Begins to copy the box whose first number is matrix[row, column]; its bytes land at `barrier`.
__device__ __forceinline__ void copy_box(
    const TensorMap& map, int64_t row, int64_t column, void* to, Barrier& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          shared_address(to)),
      "l"(&map), "r"(static_cast<int>(column)), "r"(static_cast<int>(row)), "r"(shared_address(&barrier))
      : "memory");
}

// The same to each block of the cluster whose bit is set in `ranks`, at the same place and the same barrier there.
__device__ __forceinline__ void copy_box_to(
    uint16_t ranks, const TensorMap& map, int64_t row, int64_t column, void* to, Barrier& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
      "l"(&map), "r"(static_cast<int>(column)), "r"(static_cast<int>(row)), "r"(shared_address(&barrier)), "h"(ranks)
      : "memory");
}

// Gives registers of this warpgroup back to the block, or takes them: so many per thread remain.
template <int REGISTERS>
__device__ __forceinline__ void keep_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// Before the first product, and whenever a thread has touched the accumulators.
__device__ __forceinline__ void begin_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// Products begun so far are a group.
__device__ __forceinline__ void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Until all but the last GROUPS groups have read their operands and written their sums.
template <int GROUPS>
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(GROUPS) : "memory");
}

// Until all have. The accumulators are named so that no use of theirs is moved before the wait.
template <int COUNT>
__device__ __forceinline__ void finish_products(float (&accumulators)[COUNT]) {
  wait_for_products<0>();
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    asm volatile("" : "+f"(accumulators[i])::"memory");
  }
}

// Sixteen accumulators of an instruction.
#define LATRO_FLOATS(x, i)                                                                                    \
  "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3]), "+f"(x[i + 4]), "+f"(x[i + 5]), "+f"(x[i + 6]), \
      "+f"(x[i + 7]), "+f"(x[i + 8]), "+f"(x[i + 9]), "+f"(x[i + 10]), "+f"(x[i + 11]), "+f"(x[i + 12]),      \
      "+f"(x[i + 13]), "+f"(x[i + 14]), "+f"(x[i + 15])

#define LATRO_PRODUCT_64_256_16(TYPE)                                                                     \
  asm volatile(                                                                                           \
      "{\n"                                                                                               \
      ".reg .pred accumulate;\n"                                                                          \
      "setp.ne.b32 accumulate, %130, 0;\n"                                                                \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE "." TYPE                                        \
      " {"                                                                                                \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                            \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                  \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                  \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "                  \
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "                  \
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "                  \
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "      \
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, " \
      "%128, %129, accumulate, 1, 1, 0, 0;\n"                                                             \
      "}"                                                                                                 \
      : LATRO_FLOATS(sums, 0), LATRO_FLOATS(sums, 16), LATRO_FLOATS(sums, 32), LATRO_FLOATS(sums, 48),    \
        LATRO_FLOATS(sums, 64), LATRO_FLOATS(sums, 80), LATRO_FLOATS(sums, 96), LATRO_FLOATS(sums, 112)   \
      : "l"(a), "l"(b), "r"(static_cast<int>(add)))

// Begins sums (+)= A B^T of a warpgroup, A [64, 16] and B [256, 16] as descriptors from operand(). sums[4 j + 2 r + c]
// of lane l in warp w is of row 16 w + l / 4 + 8 r and column 8 j + 2 (l % 4) + c.
template <class T>
__device__ __forceinline__ void begin_product_64_256_16(float (&sums)[128], uint64_t a, uint64_t b, bool add) {
  if constexpr (std::is_same_v<T, torch::headeronly::Half>) {
    LATRO_PRODUCT_64_256_16("f16");
  } else {
    LATRO_PRODUCT_64_256_16("bf16");
  }
}

#undef LATRO_PRODUCT_64_256_16
#undef LATRO_FLOATS

// Two numbers rounded to T, the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t rounded_pair(float low, float high) {
  uint32_t pair;
  if constexpr (std::is_same_v<T, torch::headeronly::Half>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
}

}  // namespace latro::hopper

#endif

namespace latro::hopper {

// The descriptor of an operand of a product: of rows of a swizzled tile, and from this number of a row on. Its fields
// are of 16 bytes: where it begins, a distance that a swizzled tile of 64 numbers has no use for, that of 8 rows to the
// next 8, and the kind of swizzle, 1 being this one.
__device__ __forceinline__ uint64_t operand(const void* shared) {
  constexpr uint64_t UNUSED = 1;
  constexpr uint64_t EIGHT_ROWS = 8 * ROW_BYTES / 16;
  constexpr uint64_t SWIZZLE_128 = 1;
  return (shared_address(shared) & 0x3ffff) / 16 | UNUSED << 16 | EIGHT_ROWS << 32 | SWIZZLE_128 << 62;
}

}  // namespace latro::hopper
