// Kernels for tests/test_emulator.py, right ones and wrong ones. Each writes out[blocks, threads].

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <map>
#include <string>

#include "cuda/device.h"
#include "library.h"

namespace latro {
namespace {

using emulated::sync_some;

__device__ float& mine(float* out) {
  return out[blockIdx.x * blockDim.x + threadIdx.x];
}

template <bool BARRIER>
__global__ void reverse_kernel(float* out) {
  __shared__ float values[1024];
  values[threadIdx.x] = threadIdx.x;
  if (BARRIER) {
    __syncthreads();
  }
  mine(out) = values[blockDim.x - 1 - threadIdx.x];
}

__global__ void uninitialised_kernel(float* out) {
  __shared__ float fixed;
  const float* dynamic = reinterpret_cast<const float*>(dynamic_shared());
  mine(out) = std::isnan(fixed) && std::isnan(*dynamic) && reinterpret_cast<uintptr_t>(dynamic) % 1024 == 0;
  __syncthreads();
  fixed = 0;
}

__global__ void shuffles_kernel(float* out) {
  const int lane = threadIdx.x % WARP;
  bool right = __shfl_xor_sync(0xffffffff, lane, 5) == (lane ^ 5);
  right &= __shfl_sync(0xffffffff, 0.5 * lane, 7) == 3.5;
  right &= __shfl_down_sync(0xffffffff, 1.f * lane, 4) == (lane < 28 ? lane + 4 : lane);
  right &= __shfl_up_sync(0xffffffff, 1u * lane, 4) == (lane < 4 ? lane : lane - 4);
  right &= __ballot_sync(0xffffffff, lane == 3 || lane == 31) == (1u << 3 | 1u << 31);
  right &= __any_sync(0xffffffff, lane == 9) && !__any_sync(0xffffffff, 0);
  right &= __all_sync(0xffffffff, 1) && !__all_sync(0xffffffff, lane != 9);
  right &= warp_sum(static_cast<double>(lane)) == 496 && warp_max(lane == 11 ? NAN : lane) == 31;
  mine(out) = right;
}

__global__ void half_a_block_kernel(float* out) {
  __shared__ float values[1024];
  if (threadIdx.x >= blockDim.x / 2) {
    return;
  }
  values[threadIdx.x] = threadIdx.x;
  __syncthreads();  // of those that have not returned
  mine(out) = values[blockDim.x / 2 - 1 - threadIdx.x];
}

// The first half of the block hands its numbers to the second.
__global__ void named_barriers_kernel(float* out) {
  float* values = reinterpret_cast<float*>(dynamic_shared());
  const int half = blockDim.x / 2;
  const bool first = threadIdx.x < half;
  if (first) {
    values[threadIdx.x] = threadIdx.x;
    sync_some(1, half);
    mine(out) = values[half - 1 - threadIdx.x];
  }
  sync_some(2, blockDim.x);
  if (!first) {
    mine(out) = values[threadIdx.x - half];
  }
}

// Each block of a cluster reads the next one's shared memory, and has static memory of its own.
__global__ void cluster_kernel(float* out) {
  __shared__ float fixed;
  const emulated::Thread self = emulated::this_thread();
  volatile float* own = reinterpret_cast<float*>(dynamic_shared());
  volatile float* next = reinterpret_cast<float*>(emulated::shared_of((self.rank + 1) % self.cluster));
  if (threadIdx.x == 0) {
    fixed = *own = blockIdx.x;
  }
  __syncthreads();
  emulated::yield_until("the next block", [&] { return !std::isnan(*next); });
  mine(out) = *next + 100 * fixed;
}

__global__ void turns_kernel(float* out) {
  __shared__ int begun;
  if (std::isnan(std::bit_cast<float>(begun))) {
    begun = 0;
  }
  mine(out) = begun++;
}

__global__ void late_kernel(float* out) {
  static bool arrived;
  arrived = false;
  emulated::when_stuck([] { return !std::exchange(arrived, true); });
  mine(out) = arrived;
  __syncthreads();
  emulated::yield_until("what is late", [] { return arrived; });
  mine(out) += 2 * arrived;
}

__global__ void barrier_in_a_branch_kernel(float*) {
  if (threadIdx.x < WARP) {
    sync_some(1, 2 * WARP);
  } else {
    __syncthreads();
  }
}

__global__ void shuffle_in_a_branch_kernel(float* out) {
  if (threadIdx.x % WARP < 16) {
    mine(out) = __shfl_xor_sync(0xffffffff, 1.f, 1);
  }
}

__global__ void different_shuffles_kernel(float* out) {
  mine(out) = threadIdx.x % 2 ? __shfl_xor_sync(0xffffffff, 1.f, 1) : __shfl_sync(0xffffffff, 1.f, 1);
}

__global__ void part_of_the_mask_kernel(float* out) {
  mine(out) = __shfl_xor_sync(0xffff, 1.f, 1);
}

__global__ void missing_lane_kernel(float* out) {
  mine(out) = __shfl_xor_sync(0xffffffff, 1.f, 16);
}

__global__ void trap_kernel(float*) {
  if (threadIdx.x == 3) {
    __trap();
  }
  __syncthreads();
}

const std::map<std::string, void (*)(float*)> KERNELS = {
    {"reverse", reverse_kernel<true>},
    {"reverse without a barrier", reverse_kernel<false>},
    {"uninitialised", uninitialised_kernel},
    {"shuffles", shuffles_kernel},
    {"half a block", half_a_block_kernel},
    {"named barriers", named_barriers_kernel},
    {"cluster", cluster_kernel},
    {"turns", turns_kernel},
    {"late", late_kernel},
    {"barrier in a branch", barrier_in_a_branch_kernel},
    {"shuffle in a branch", shuffle_in_a_branch_kernel},
    {"different shuffles", different_shuffles_kernel},
    {"part of the mask", part_of_the_mask_kernel},
    {"missing lane", missing_lane_kernel},
    {"trap", trap_kernel},
};

void run(std::string kernel, torch::stable::Tensor out, int64_t shared_bytes, int64_t cluster) {
  const Launch how = {
      .grid = static_cast<unsigned>(out.size(0)),
      .block = static_cast<unsigned>(out.size(1)),
      .shared_bytes = static_cast<size_t>(shared_bytes),
      .stream = current_stream(0),
      .cluster = static_cast<unsigned>(cluster),
  };
  launch(KERNELS.at(kernel), how, out.mutable_data_ptr<float>());
}

}  // namespace
}  // namespace latro

STABLE_TORCH_LIBRARY(LATRO_NAMESPACE, m) {
  m.def("run(str kernel, Tensor(a!) out, int shared_bytes, int cluster) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(LATRO_NAMESPACE, LATRO_CUDA_KEY, m) {
  m.impl("run", TORCH_BOX(&latro::run));
}
