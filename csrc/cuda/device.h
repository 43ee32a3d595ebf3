// What every kernel starts from: how it is launched, its shared memory, and the few device functions that CUDA spells
// otherwise than C++. With LATRO_EMULATED a C++ compiler builds the same source, and its threads run on the CPU: see
// tests/emulated_cuda/emulated.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "../host_device.h"

#ifdef LATRO_EMULATED
#include <emulated.h>
#else
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#endif

namespace latro {

constexpr int WARP = 32;

struct Launch {
  dim3 grid;
  dim3 block;
  size_t shared_bytes = 0;
  cudaStream_t stream = nullptr;
  unsigned cluster = 1;  // neighbours along x that run at once and see each other's shared memory
};

#ifdef LATRO_EMULATED

using emulated::DeviceGuard;

inline cudaStream_t current_stream(int32_t /*device*/) {
  return nullptr;
}

template <class... Parameters>
void launch(void (*kernel)(Parameters...), const Launch& how, std::type_identity_t<Parameters>... arguments) {
  emulated::run({how.grid, how.block, how.shared_bytes, how.cluster}, [&] { kernel(arguments...); });
}

inline char* dynamic_shared() {
  return emulated::shared_of(emulated::this_thread().rank);
}

inline float fast_exp2(float x) {
  const float result = std::exp2(x);
  return result < std::numeric_limits<float>::min() ? 0 : result;
}

inline float fast_reciprocal(float x) {
  return 1 / x;
}

#else

using torch::stable::accelerator::DeviceGuard;

inline cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

template <class... Parameters>
void launch(void (*kernel)(Parameters...), const Launch& how, std::type_identity_t<Parameters>... arguments) {
  constexpr size_t WITHOUT_ASKING = 48 * 1024;
  if (how.shared_bytes > WITHOUT_ASKING) {
    STD_CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(how.shared_bytes)));
  }
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {how.cluster, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = how.grid;
  config.blockDim = how.block;
  config.dynamicSmemBytes = how.shared_bytes;
  config.stream = how.stream;
  config.attrs = &cluster;
  config.numAttrs = how.cluster > 1;
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, arguments...));
}

// Launch::shared_bytes, from an address that any copy and any swizzle accepts.
__device__ __forceinline__ char* dynamic_shared() {
  extern __shared__ __align__(1024) char memory[];
  return memory;
}

// Within 2 units in the last place of a normal result; smaller ones are 0.
__device__ __forceinline__ float fast_exp2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// Within 1 unit in the last place of a normal result.
__device__ __forceinline__ float fast_reciprocal(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

#endif

// The sum over a warp, in every lane.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int offset = WARP / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xffffffff, value, offset);
  }
  return value;
}

// The highest of a warp, in every lane; NaN is passed over.
__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int offset = WARP / 2; offset > 0; offset /= 2) {
    value = fmaxf(value, __shfl_xor_sync(0xffffffff, value, offset));
  }
  return value;
}

}  // namespace latro
