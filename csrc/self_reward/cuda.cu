// self_reward for CUDA tensors: one launch of one block, so that the phases need no more than __syncthreads and every
// sum has a fixed order. The work is a few additions per scored token, nothing beside one layer of the model.
// Index tensors are not checked here: that would read the device back.

#include "../cuda/device.h"
#include "../library.h"
#include "call.h"

namespace latro::self_reward {
namespace {

constexpr int THREADS = 1024;
constexpr int WARPS = THREADS / WARP;
static_assert(WARPS == WARP, "block_sum hands the sum of one warp to each lane");

// The sum over the block, in every thread.
__device__ double block_sum(double value) {
  __shared__ double of_warp[WARPS];
  value = warp_sum(value);
  if (threadIdx.x % WARP == 0) {
    of_warp[threadIdx.x / WARP] = value;
  }
  __syncthreads();
  return warp_sum(of_warp[threadIdx.x % WARP]);
}

// The first token of segment s, or of the next one that has any; segment is sorted.
template <class T>
__device__ int64_t first_token(const Arguments<T>& in, int64_t s) {
  int64_t low = 0;
  int64_t high = in.M;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (in.segment[middle] < s) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// One warp sums one segment. Each rationale has one segment of either kind, so no two warps write the same place.
template <class T>
__device__ void sum_segment(const Arguments<T>& in, const Exact& exact, int64_t s, Range tokens) {
  const bool is_rationale = in.kind[s] == RATIONALE;
  if (!is_rationale && !is_right_answer(in, s)) {
    return;
  }
  const int lane = threadIdx.x % WARP;
  double logp = 0;
  double kl = in.ref_logps ? 0 : NAN;
  for (int64_t m = tokens.begin + lane; m < tokens.end; m += WARP) {
    logp += in.logps[m];
    kl += is_rationale ? kl_term(in.options.kl, log_ratio(in, m)) : 0;
  }
  logp = warp_sum(logp);
  kl = warp_sum(kl);
  if (lane == 0 && is_rationale) {
    exact.rationale_logp[in.rationale[s]] = logp;
    exact.kl[in.rationale[s]] = kl;
  } else if (lane == 0) {
    exact.answer_logp[in.rationale[s]] = logp;
  }
}

template <class T>
__global__ void __launch_bounds__(THREADS)
    self_reward_kernel(Arguments<T> in, Exact exact, Results<T> out, int64_t* first /* [S + 1] */) {
  for (int64_t s = threadIdx.x; s <= in.S; s += THREADS) {
    first[s] = first_token(in, s);
  }
  __syncthreads();
  for (int64_t s = threadIdx.x / WARP; s < in.S; s += WARPS) {
    sum_segment(in, exact, s, {first[s], first[s + 1]});
  }
  __syncthreads();
  for (int64_t r = threadIdx.x; r < in.R; r += THREADS) {
    exact.reward[r] = reward(in.options, exact.answer_logp[r], exact.kl[r]);
  }
  __syncthreads();
  double loss = 0;
  for (int64_t r = threadIdx.x; r < in.R; r += THREADS) {
    exact.advantage[r] = advantage(in, exact.reward, r);
    loss += loss_term(in, exact, r);
    round_terms(exact, out, r);
  }
  loss = block_sum(loss);  // synchronises: every advantage is written when it returns
  if (threadIdx.x == 0) {
    *out.loss = static_cast<T>(loss);
  }
  for (int64_t m = threadIdx.x; m < in.M; m += THREADS) {
    out.coefficients[m] = static_cast<T>(coefficient(in, exact.advantage, m));
  }
}

struct Cuda {
  template <class T>
  static void run(const Arguments<T>& in, const Exact& exact, const Results<T>& out, const Tensor& logps) {
    const int32_t device = logps.get_device_index();
    const DeviceGuard guard(device);
    const Tensor first = torch::stable::new_empty(logps, {in.S + 1}, ScalarType::Long);
    const Launch one_block = {.grid = 1, .block = THREADS, .stream = current_stream(device)};
    launch(self_reward_kernel<T>, one_block, in, exact, out, first.mutable_data_ptr<int64_t>());
  }
};

}  // namespace
}  // namespace latro::self_reward

STABLE_TORCH_LIBRARY_IMPL(LATRO_NAMESPACE, LATRO_CUDA_KEY, m) {
  m.impl("self_reward", TORCH_BOX(&latro::self_reward::self_reward<latro::self_reward::Cuda>));
}
