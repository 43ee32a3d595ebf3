// A product for tests/test_emulated_hopper.py, right and with each mistake that copies and products allow that run
// beside the threads. out[block] of a cluster of two is a [64, D] b [256, D]^T, zeros where a and b end earlier.

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <map>
#include <string>

#include "cuda/hopper.h"
#include "library.h"

namespace latro {
namespace {

using T = torch::headeronly::Half;
using hopper::Barrier;
using hopper::TensorMap;

enum Mistake { NONE, OPERANDS_TOO_EARLY, SUMS_TOO_EARLY, COPIES_TOO_EARLY, NOT_BEGUN, BYTES, ARRIVALS, NOT_MADE };

constexpr int ROWS = 64;
constexpr int COLUMNS = 256;
constexpr int STEP = 64;
constexpr int BLOCKS = 2;

struct Shared {
  T a[ROWS][STEP];
  T b[COLUMNS][STEP];
  Barrier filled;
};

template <Mistake MISTAKE>
__global__ void __launch_bounds__(hopper::WARPGROUP)
    product_kernel(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, int64_t D, float* out) {
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared());
  const int rank = hopper::cluster_rank();
  if (threadIdx.x == 0 && MISTAKE != NOT_MADE) {
    hopper::init(shared.filled, 1);
    hopper::publish_barriers();
  }
  hopper::cluster_sync();
  float sums[128];
  for (int64_t d = 0; d < D; d += STEP) {
    if (threadIdx.x == 0 || MISTAKE == ARRIVALS) {
      constexpr int HALF = COLUMNS / BLOCKS;
      hopper::arrive_expecting(shared.filled, sizeof(shared.a) + sizeof(shared.b) + (MISTAKE == BYTES));
      hopper::copy_box(a, 0, d, shared.a, shared.filled);
      hopper::copy_box_to(3, b, rank * HALF, d, shared.b[rank * HALF], shared.filled);
    }
    if (MISTAKE != OPERANDS_TOO_EARLY) {
      hopper::wait(shared.filled, d / STEP % 2);
    }
    if (MISTAKE != NOT_BEGUN) {
      hopper::begin_products();
    }
    for (int k = 0; k < STEP; k += 16) {
      hopper::begin_product_64_256_16<T>(
          sums, hopper::operand(&shared.a[0][k]), hopper::operand(&shared.b[0][k]), d > 0 || k > 0);
    }
    hopper::commit_products();
    if (d + STEP < D && MISTAKE != COPIES_TOO_EARLY) {
      hopper::wait_for_products<0>();
    }
    hopper::cluster_sync();
  }
  if (MISTAKE != SUMS_TOO_EARLY) {
    hopper::finish_products(sums);
  }
  const int lane = threadIdx.x % WARP;
  for (int i = 0; i < 128; ++i) {
    const int row = threadIdx.x / WARP * 16 + lane / 4 + i / 2 % 2 * 8;
    const int column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    out[(rank * ROWS + row) * COLUMNS + column] = sums[i];
  }
  hopper::finish_products(sums);
}

const std::map<std::string, void (*)(TensorMap, TensorMap, int64_t, float*)> KERNELS = {
    {"none", product_kernel<NONE>},
    {"operands are read before they are copied", product_kernel<OPERANDS_TOO_EARLY>},
    {"sums are read before they are made", product_kernel<SUMS_TOO_EARLY>},
    {"operands are overwritten before they are read", product_kernel<COPIES_TOO_EARLY>},
    {"products that nothing begins", product_kernel<NOT_BEGUN>},
    {"a barrier that expects too much", product_kernel<BYTES>},
    {"a barrier at which too many arrive", product_kernel<ARRIVALS>},
    {"a barrier that is not made", product_kernel<NOT_MADE>},
};

void product(std::string mistake, torch::stable::Tensor a, torch::stable::Tensor b, torch::stable::Tensor out) {
  const auto map = [](const torch::stable::Tensor& matrix, int box_rows) {
    const T* numbers = static_cast<const T*>(matrix.const_data_ptr());
    return hopper::tensor_map(numbers, matrix.size(0), matrix.size(1), matrix.stride(0), box_rows);
  };
  const Launch how = {
      .grid = BLOCKS,
      .block = hopper::WARPGROUP,
      .shared_bytes = sizeof(Shared),
      .stream = current_stream(0),
      .cluster = BLOCKS,
  };
  launch(KERNELS.at(mistake), how, map(a, ROWS), map(b, COLUMNS / BLOCKS), a.size(1), out.mutable_data_ptr<float>());
}

}  // namespace
}  // namespace latro

STABLE_TORCH_LIBRARY(LATRO_NAMESPACE, m) {
  m.def("product(str mistake, Tensor a, Tensor b, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(LATRO_NAMESPACE, LATRO_CUDA_KEY, m) {
  m.impl("product", TORCH_BOX(&latro::product));
}
