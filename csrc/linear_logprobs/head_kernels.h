// The kernels of latro_kernels/linear_logprobs/strips.py, which says what they compute, who calls them, and when.
//
// Each logit is read once, 16 bytes at a time, and stays in registers until its row's sums and its E are made. Sums
// have a fixed order and there are no atomics: the same bits every time. T: the dtype of hidden, weight, bias and E. M
// scored tokens, V entries of the vocabulary, D hidden.
#pragma once

#include <cmath>
#include <cstdint>

#include "../cuda/device.h"
#include "head_math.h"

namespace latro::head {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;

// Numbers that a lane reads at once: 16 bytes of the smallest dtype.
constexpr int RUN = 8;
// Columns of a tile: what a warp holds in 32 registers per lane.
constexpr int RUNS = 4;
constexpr int TILE = RUNS * WARP * RUN;

// 16 bytes at a time where WIDTH is RUN, for which the caller answers; one number where it is 1.
template <int WIDTH, class T>
__device__ __forceinline__ void load(const T* from, float (&to)[WIDTH]) {
  struct alignas(WIDTH == 1 ? sizeof(T) : 16) Numbers {
    T of[WIDTH];
  };
  const Numbers numbers = *reinterpret_cast<const Numbers*>(from);
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) {
    to[i] = static_cast<float>(numbers.of[i]);
  }
}

template <int WIDTH, class T>
__device__ __forceinline__ void store(T* to, const float (&from)[WIDTH]) {
  struct alignas(WIDTH == 1 ? sizeof(T) : 16) Numbers {
    T of[WIDTH];
  } numbers;
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) {
    numbers.of[i] = static_cast<T>(from[i]);
  }
  *reinterpret_cast<Numbers*>(to) = numbers;
}

// The logit of the target: likely not far from the maximum. A warp for each token.
template <class T, int WIDTH>
__global__ void __launch_bounds__(THREADS) guess_kernel(
    const T* hidden,
    const T* weight,
    int64_t stride_w,
    const T* bias,
    const int64_t* targets,
    float* state,
    int64_t M,
    int64_t D,
    float logit_scale,
    float softcap) {
  const int64_t m = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / WARP;
  if (m >= M) {
    return;
  }
  const int lane = threadIdx.x % WARP;
  const T* row = hidden + m * D;
  const T* entry = weight + targets[m] * stride_w;
  float product = 0;
  for (int64_t d = lane * WIDTH; d < D; d += WARP * WIDTH) {
    float x[WIDTH], w[WIDTH];
    load(row + d, x);
    load(entry + d, w);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      product += x[i] * w[i];
    }
  }
  product = warp_sum(product);
  if (lane != 0) {
    return;
  }
  product += bias ? static_cast<float>(bias[targets[m]]) : 0;
  const Scale scale = scale_of(state[TEMPERATURE * M + m], logit_scale, softcap);
  const float logit = softcap > 0 ? logit_of<true>(product, scale) : logit_of<false>(product, scale);
  const bool guessed = std::fabs(logit) < MOST_GUESS;
  state[GUESS * M + m] = guessed ? std::rint(logit) : 0;
  state[GUESSED * M + m] = guessed;
}

// Of products that the vendor's kernel has made: a warp for each row and tile.
template <class T, bool SOFTCAP, bool STATISTICS>
__global__ void __launch_bounds__(THREADS) epilogue_kernel(const float* products, int64_t stride, Finish<T> out) {
  const int64_t m = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / WARP;
  if (m >= out.M) {
    return;
  }
  const int lane = threadIdx.x % WARP;
  const int64_t tile = blockIdx.y;
  const int64_t first = tile * TILE;
  const int columns = static_cast<int>(out.V - first < TILE ? out.V - first : TILE);
  const Scale scale = scale_of(out.state[TEMPERATURE * out.M + m], out.logit_scale, out.softcap);
  const auto column = [&](int run) { return (run * WARP + lane) * RUN; };

  float logits[RUNS][RUN];
  float slopes[RUNS][RUN];
#pragma unroll
  for (int run = 0; run < RUNS; ++run) {
    float product[RUN] = {};
    if (column(run) < columns) {
      load(products + m * stride + first + column(run), product);
    }
#pragma unroll
    for (int i = 0; i < RUN; ++i) {
      if (out.bias && column(run) + i < columns) {
        product[i] += static_cast<float>(out.bias[first + column(run) + i]);
      }
      logits[run][i] = logit_of<SOFTCAP>(product[i], scale);
      slopes[run][i] = SOFTCAP ? slope_of(product[i], scale) : 1;
    }
  }

  const int64_t target = out.targets[m] - out.first_v - first;
  const bool has_target = target >= 0 && target < columns;
  if (has_target || columns < TILE) {  // the same for a whole warp, and seldom
#pragma unroll
    for (int run = 0; run < RUNS; ++run) {
#pragma unroll
      for (int i = 0; i < RUN; ++i) {
        const bool is_target = has_target && column(run) + i == target;
        if (STATISTICS && is_target) {
          out.state[LOGIT * out.M + m] = logits[run][i];
          out.state[SLOPE * out.M + m] = slopes[run][i];
        }
        logits[run][i] = is_target || column(run) + i >= columns ? -INFINITY : logits[run][i];
      }
    }
  }

  float offset = out.state[(STATISTICS ? GUESS : SHIFT) * out.M + m];
  float highest = -INFINITY;
  if (STATISTICS) {
#pragma unroll
    for (int run = 0; run < RUNS; ++run) {
#pragma unroll
      for (int i = 0; i < RUN; ++i) {
        highest = fmaxf(highest, logits[run][i]);
      }
    }
    highest = warp_max(highest);
    offset += steps(highest, offset, out.state[GUESSED * out.M + m] != 0);
  }
  float sum = 0;
  float moment = 0;
#pragma unroll
  for (int run = 0; run < RUNS; ++run) {
    float exponentials[RUN];
#pragma unroll
    for (int i = 0; i < RUN; ++i) {
      const float exponential = fast_exp2(logits[run][i] - offset);
      if (STATISTICS) {
        sum += exponential;
        moment += moment_of(exponential, logits[run][i], highest);
      }
      exponentials[i] = SOFTCAP ? exponential * slopes[run][i] : exponential;
    }
    if (out.exponentials && column(run) < columns) {
      store(out.exponentials + m * out.stride_e + first + column(run), exponentials);
    }
  }
  if (STATISTICS) {
    sum = warp_sum(sum);
    moment = warp_sum(moment);
    if (lane == 0) {
      out.write_partials(m, tile, highest, sum, moment);
    }
  }
}

// A block of COMBINED rows: a warp's lanes are rows, its warps share out the tiles.
constexpr int COMBINED = WARP;

// The sum, or the maximum, over the warps of a block, for each lane, in every thread.
template <class Operation>
__device__ float across_warps(float value, Operation operation) {
  __shared__ float of_warp[WARPS][WARP];
  __syncthreads();
  of_warp[threadIdx.x / WARP][threadIdx.x % WARP] = value;
  __syncthreads();
  float total = of_warp[0][threadIdx.x % WARP];
  for (int warp = 1; warp < WARPS; ++warp) {
    total = operation(total, of_warp[warp][threadIdx.x % WARP]);
  }
  return total;
}

__device__ float highest_of_tiles(const float* partials, int64_t M, int64_t m, int64_t first, int64_t end) {
  float highest = -INFINITY;
  for (int64_t tile = first + threadIdx.x / WARP; m < M && tile < end; tile += WARPS) {
    highest = fmaxf(highest, partials[tile * M + m]);
  }
  return across_warps(highest, [](float a, float b) { return fmaxf(a, b); });
}

__global__ void __launch_bounds__(THREADS) combine_kernel(
    const float* partials, int64_t tiles, float* state, float* logps, float* entropy, int64_t M, bool headroom) {
  const int64_t m = static_cast<int64_t>(blockIdx.x) * COMBINED + threadIdx.x % WARP;
  const bool is_row = m < M;
  const float highest = highest_of_tiles(partials, M, m, 0, tiles);
  const float guess = is_row ? state[GUESS * M + m] : 0;
  const bool guessed = is_row && state[GUESSED * M + m] != 0;
  const float logit = is_row ? state[LOGIT * M + m] : 0;
  const float row_steps = steps(highest, guess, guessed);
  const float top = fmaxf(highest, logit);
  Others others = {0, 0};
  for (int64_t tile = threadIdx.x / WARP; is_row && tile < tiles; tile += WARPS) {
    const float* of_tile = partials + tile * M + m;
    const float tile_highest = of_tile[TILE_HIGHEST * tiles * M];
    add_tile(
        others, tile_highest, of_tile[TILE_SUM * tiles * M], of_tile[TILE_MOMENT * tiles * M],
        steps(tile_highest, guess, guessed), row_steps, top);
  }
  const auto plus = [](float a, float b) { return a + b; };
  others.sum = across_warps(others.sum, plus);
  others.moment = across_warps(others.moment, plus);
  if (!is_row || threadIdx.x >= WARP) {
    return;
  }
  const Token token = finish(others, logit, state[SLOPE * M + m], guess + row_steps, top, headroom);
  logps[m] = token.logp;
  entropy[m] = token.entropy;
  state[HIGHEST * M + m] = highest;
  state[SHIFT * M + m] = token.shift;
  state[TOTAL * M + m] = token.total;
  state[ENTRY * M + m] = token.entry;
}

template <class T>
__device__ void scale_range(T* values, int64_t count, float factor) {
  for (int64_t i = threadIdx.x; i < count; i += THREADS) {
    values[i] = static_cast<T>(static_cast<float>(values[i]) * factor);
  }
}

// Gives E, and rows of unit, the offset that their row has now. Seldom any: then the tiles' maxima are all that is
// read.
template <class T>
__global__ void __launch_bounds__(THREADS) settle_kernel(
    const float* partials,
    int64_t first,
    int64_t end,
    int64_t width,
    float* state,
    T* exponentials,
    int64_t stride,
    int64_t columns,
    float* unit,
    int64_t M,
    int64_t D) {
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * COMBINED;
  const int64_t m = begin + threadIdx.x % WARP;
  const float before = m < M ? state[HIGHEST * M + m] : 0;
  const float highest = fmaxf(before, highest_of_tiles(partials, M, m, first, end));
  const float guess = m < M ? state[GUESS * M + m] : 0;
  const bool guessed = m < M && state[GUESSED * M + m] != 0;
  const float now = steps(highest, guess, guessed);
  float is_off = unit && steps(before, guess, guessed) != now;
  for (int64_t tile = first + threadIdx.x / WARP; m < M && tile < end; tile += WARPS) {
    is_off = steps(partials[tile * M + m], guess, guessed) != now ? 1 : is_off;
  }
  __shared__ bool row_is_off[COMBINED];
  is_off = across_warps(is_off, [](float a, float b) { return fmaxf(a, b); });
  if (threadIdx.x < WARP) {
    row_is_off[threadIdx.x] = m < M && is_off != 0;
  }
  __syncthreads();
  for (int64_t r = begin; r < begin + COMBINED; ++r) {
    if (!row_is_off[r - begin]) {
      continue;
    }
    const float row_guess = state[GUESS * M + r];
    const bool row_guessed = state[GUESSED * M + r] != 0;
    const float row_before = state[HIGHEST * M + r];
    float row_highest = row_before;
    for (int64_t tile = first; tile < end; ++tile) {
      row_highest = fmaxf(row_highest, partials[tile * M + r]);
    }
    const float row_steps = steps(row_highest, row_guess, row_guessed);
    for (int64_t tile = first; tile < end; ++tile) {
      const float tile_steps = steps(partials[tile * M + r], row_guess, row_guessed);
      if (tile_steps != row_steps) {
        const int64_t column = (tile - first) * width;
        const int64_t count = columns - column < width ? columns - column : width;
        scale_range(exponentials + r * stride + column, count, std::exp2(tile_steps - row_steps));
      }
    }
    const float steps_before = steps(row_before, row_guess, row_guessed);
    if (unit && steps_before != row_steps) {
      scale_range(unit + r * D, D, std::exp2(steps_before - row_steps));
    }
  }
  __syncthreads();
  if (threadIdx.x < WARP && m < M) {
    state[HIGHEST * M + m] = highest;
  }
}

// Tokens are sorted by their row of hidden: [begins[m], ends[m]) are those of token m's. Those with its temperature too
// are its fellows, and have the same logits.
__device__ __forceinline__ bool are_fellows(const float* state, int64_t M, int64_t m, int64_t j) {
  return state[TEMPERATURE * M + m] == state[TEMPERATURE * M + j];
}

// E = 0 also at the targets of a token's fellows.
template <class T>
__global__ void __launch_bounds__(THREADS) clear_targets_kernel(
    const int64_t* begins,
    const int64_t* ends,
    const int64_t* targets,
    const float* state,
    int64_t first_v,
    T* exponentials,
    int64_t stride,
    int64_t M,
    int64_t V) {
  const int64_t m = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (m >= M) {
    return;
  }
  for (int64_t j = begins[m]; j < ends[m]; ++j) {
    const int64_t v = targets[j] - first_v;
    if (v >= 0 && v < V && are_fellows(state, M, m, j)) {
      exponentials[m * stride + v] = static_cast<T>(0.0f);
    }
  }
}

// What a token and its fellows have at its target, where E is 0, over their TOTAL and times their coefficients.
__global__ void __launch_bounds__(THREADS) couple_targets_kernel(
    const float* coefficients,
    const int64_t* begins,
    const int64_t* ends,
    const int64_t* targets,
    const float* state,
    float* out,
    int64_t M) {
  const int64_t m = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (m >= M) {
    return;
  }
  // Of sums of its own row: with those of a fellow's it would lose digits.
  const float share = std::exp2(state[LOGIT * M + m] - state[SHIFT * M + m]) / state[TOTAL * M + m];
  const float slope = state[SLOPE * M + m];
  bool is_first = true;  // of those that share the target: it speaks for all
  float total = 0;
  for (int64_t j = begins[m]; j < ends[m]; ++j) {
    if (!are_fellows(state, M, m, j)) {
      continue;
    }
    const bool shares_target = targets[j] == targets[m];
    is_first = is_first && (j >= m || !shares_target);
    total += coefficients[j] * (shares_target ? state[ENTRY * M + j] / state[TOTAL * M + j] : share * slope);
  }
  out[m] = is_first ? total : 0;
}

// out[row] += the sum of coefficients[m] values[m] over the tokens m of a row, in their order; and with a weight, of
// of_targets[m] weight[target m]. The first of a row's tokens has its block do the whole run.
template <class Value, class T, class Out, int WIDTH>
__global__ void __launch_bounds__(THREADS) add_rows_kernel(
    const Value* values,
    const float* coefficients,
    const int64_t* order,
    const int64_t* rows,
    const int64_t* ends,
    const T* weight,
    int64_t stride_w,
    const int64_t* targets,
    const float* of_targets,
    Out* out,
    int64_t D) {
  const int64_t i = blockIdx.x;
  const int64_t row = rows[i];
  if (i > 0 && rows[i - 1] == row) {
    return;
  }
  const int64_t d = (static_cast<int64_t>(blockIdx.y) * THREADS + threadIdx.x) * WIDTH;
  if (d >= D) {
    return;
  }
  float total[WIDTH];
  load(out + row * D + d, total);
  for (int64_t j = i; j < ends[i]; ++j) {
    const int64_t m = order[j];
    float value[WIDTH];
    load(values + m * D + d, value);
#pragma unroll
    for (int k = 0; k < WIDTH; ++k) {
      total[k] += coefficients[m] * value[k];
    }
    if (weight) {
      load(weight + targets[m] * stride_w + d, value);
#pragma unroll
      for (int k = 0; k < WIDTH; ++k) {
        total[k] += of_targets[m] * value[k];
      }
    }
  }
  store(out + row * D + d, total);
}

// out += E^T coefficients. A block has as many columns as a warp's lanes read at once; its warps share out the rows.
template <class T>
__global__ void __launch_bounds__(THREADS) add_bias_grad_kernel(
    const T* exponentials, int64_t stride, const float* coefficients, float* out, int64_t M, int64_t V) {
  const int64_t v = (static_cast<int64_t>(blockIdx.x) * WARP + threadIdx.x % WARP) * RUN;
  float total[RUN] = {};
  for (int64_t m = threadIdx.x / WARP; v < V && m < M; m += WARPS) {
    float values[RUN];
    load(exponentials + m * stride + v, values);
#pragma unroll
    for (int i = 0; i < RUN; ++i) {
      total[i] += coefficients[m] * values[i];
    }
  }
  for (int i = 0; i < RUN; ++i) {
    const float sum = across_warps(total[i], [](float a, float b) { return a + b; });
    if (threadIdx.x < WARP && v + i < V) {
      out[v + i] += sum;
    }
  }
}

}  // namespace latro::head
