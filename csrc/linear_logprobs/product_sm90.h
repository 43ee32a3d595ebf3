// hidden [M, D] weight [V, D]^T of bfloat16 or float16 on a GPU of capability 9.0, and what head_math.h's Finish makes
// of it: statistics of each row in a tile of TILE_V columns, E = 2^(logit - offset), or both. Logits are never stored.
//
//                                   256 entries of weight
//     cluster of   block 0  hidden  [ 64 x 256, warpgroup 1 ]
//     2 blocks              hidden  [ 64 x 256, warpgroup 2 ]
//                  block 1  hidden  [ 64 x 256, warpgroup 1 ]
//                           hidden  [ 64 x 256, warpgroup 2 ]
//
// In steps of 64 numbers of D, one thread of each block has its 128 rows of hidden copied to its shared memory, and
// half of the entries of weight to that of both blocks. The sums stay in registers, 128 a thread, and become E there.
//
// Memory traffic: the clusters at work share at most GROUP rows of tiles, and go along the vocabulary together; what
// they read lies in the L2 cache. So hidden is read once, and weight once for each 2048 rows of hidden. E is written
// once; the statistics are 12 bytes for 256 logits.
//
// Blocks take tile after tile, and the next tile's operands are copied while this one's sums become E. Expected, not
// measured: a tile's products take D / 64 times 1024 cycles, its E and statistics about 3000 (1500 instructions a
// thread), or 4.5 % where D = 4096. Some of that is hidden, because a warpgroup that is ahead makes its E while the
// other still multiplies; it cannot be farther ahead than the STAGES that are copied.
#pragma once

#include <algorithm>

#include "../check.h"
#include "../cuda/device.h"
#include "../cuda/hopper.h"
#include "head_math.h"

namespace latro::head {

template <class T>
struct Operands {
  const T* hidden;  // [M, stride_h]
  int64_t stride_h;
  const T* weight;  // [V, stride_w]
  int64_t stride_w;
  int64_t D;
};

namespace sm90 {

using hopper::Barrier;
using hopper::TensorMap;
using hopper::WARPGROUP;

constexpr int CLUSTER = 2;    // blocks, one below the other
constexpr int CONSUMERS = 2;  // warpgroups that multiply, one below the other
constexpr int ROWS = 64;      // of one of them: an instruction's
constexpr int TILE_M = CONSUMERS * ROWS;
constexpr int TILE_V = 256;
constexpr int STEP = 64;   // numbers of D: a row of the swizzled tile
constexpr int DEPTH = 16;  // of an instruction
constexpr int STAGES = 4;  // that fit in shared memory
constexpr int PRODUCT_THREADS = (1 + CONSUMERS) * WARPGROUP;
constexpr int SUMS = ROWS * TILE_V / WARPGROUP;

// Each of the block's threads starts with 168: most of what the copying ones have go to those that multiply.
constexpr int COPYING_REGISTERS = 24;
constexpr int MULTIPLYING_REGISTERS = 240;
static_assert(COPYING_REGISTERS + CONSUMERS * MULTIPLYING_REGISTERS <= 3 * 168);

// Rows of tiles that are at work at once: 132 blocks have about 8 x 8 tiles, and a square of them reads the least.
constexpr int GROUP = 8;

template <class T>
struct Stage {
  T hidden[TILE_M][STEP];
  T weight[TILE_V][STEP];
};

template <class T>
struct Shared {
  Stage<T> stages[STAGES];
  Barrier filled[STAGES];
  Barrier released[STAGES];
};
static_assert(sizeof(Shared<uint16_t>) <= 227 * 1024);

// Which stage is next, and the parity of the phase that its barriers are in.
struct Turn {
  int stage = 0;
  int parity = 0;

  __device__ void advance() {
    stage = stage + 1 == STAGES ? 0 : stage + 1;
    parity ^= stage == 0;
  }
};

// The tiles of the clusters, in the order in which they are taken: `group` rows of them, column by column.
struct Order {
  int rows;
  int columns;
  int group;

  struct Tile {
    int row;
    int column;
  };

  HOST_DEVICE int count() const {
    return rows * columns;
  }

  HOST_DEVICE Tile at(int i) const {
    const int first = i / (group * columns) * group;
    const int height = rows - first < group ? rows - first : group;
    const int within = i - first * columns;
    return {first + within % height, within / height};
  }
};

inline Order order_of(int64_t M, int64_t V) {
  const int rows = static_cast<int>((M + CLUSTER * TILE_M - 1) / (CLUSTER * TILE_M));
  const int columns = static_cast<int>((V + TILE_V - 1) / TILE_V);
  const int groups = (rows + GROUP - 1) / GROUP;
  return {rows, columns, (rows + groups - 1) / groups};
}

// One thread of each block: fills the stages, as they are released, with what both blocks multiply.
template <class T>
__device__ void copy_tiles(
    Shared<T>& shared, const TensorMap& hidden, const TensorMap& weight, const Order& order, int64_t D) {
  constexpr int HALF = TILE_V / CLUSTER;
  constexpr uint16_t BOTH = (1 << CLUSTER) - 1;
  const int rank = hopper::cluster_rank();
  Turn turn;
  for (int i = blockIdx.x / CLUSTER; i < order.count(); i += gridDim.x / CLUSTER) {
    const Order::Tile tile = order.at(i);
    for (int64_t d = 0; d < D; d += STEP) {
      Stage<T>& stage = shared.stages[turn.stage];
      Barrier& filled = shared.filled[turn.stage];
      hopper::wait(shared.released[turn.stage], turn.parity ^ 1);
      hopper::arrive_expecting(filled, sizeof(Stage<T>));
      const int64_t row = (static_cast<int64_t>(tile.row) * CLUSTER + rank) * TILE_M;
      hopper::copy_box(hidden, row, d, stage.hidden, filled);
      const int64_t column = static_cast<int64_t>(tile.column) * TILE_V + rank * HALF;
      hopper::copy_box_to(BOTH, weight, column, d, stage.weight[rank * HALF], filled);
      turn.advance();
    }
  }
}

// This warp has read the stage. Half of its next contents come from the other block, so both blocks wait for this.
template <class T>
__device__ __forceinline__ void release(Shared<T>& shared, int stage) {
  __syncwarp();
  const int lane = threadIdx.x % WARP;
  if (lane < CLUSTER) {
    hopper::arrive_at(shared.released[stage], lane);
  }
}

// sums = the products of this warpgroup's rows of the block's tile.
template <class T>
__device__ __forceinline__ void multiply_tile(
    float (&sums)[SUMS], Shared<T>& shared, Turn& turn, int consumer, int64_t D) {
  int before = 0;
  for (int64_t d = 0; d < D; d += STEP) {
    const Stage<T>& stage = shared.stages[turn.stage];
    hopper::wait(shared.filled[turn.stage], turn.parity);
    hopper::begin_products();
#pragma unroll
    for (int k = 0; k < STEP; k += DEPTH) {
      hopper::begin_product_64_256_16<T>(
          sums, hopper::operand(&stage.hidden[consumer * ROWS][k]), hopper::operand(&stage.weight[0][k]),
          d > 0 || k > 0);
    }
    hopper::commit_products();
    hopper::wait_for_products<1>();
    if (d > 0) {
      release(shared, before);
    }
    before = turn.stage;
    turn.advance();
  }
  hopper::finish_products(sums);
  release(shared, before);
}

// What is known of a row before its products are: read before them, and not touched until they are there.
struct Row {
  int64_t m;
  bool counts;  // else it is behind the last, and made but not written
  float temperature;
  float offset;
  float guessed;
  int64_t target;
};

template <bool STATISTICS, class T>
__device__ __forceinline__ Row read_row(const Finish<T>& out, int64_t m) {
  Row row = {m, m < out.M, 1, 0, 0, -1};
  if (row.counts) {
    row.temperature = out.state[TEMPERATURE * out.M + m];
    row.offset = out.state[(STATISTICS ? GUESS : SHIFT) * out.M + m];
    row.guessed = out.state[GUESSED * out.M + m];
    row.target = out.targets[m];
  }
  return row;
}

// A logit is made in two halves: its argument, which takes the place of its product, and the logit of that. -infinity
// is the argument of what does not count. A real one would be it too: with a softcap, where it means -cap, an argument
// ends where tanh is -1 and its slope 0.
template <bool SOFTCAP>
__device__ __forceinline__ float argument_of(float product, Scale scale) {
  constexpr float LOWEST = -64;
  const float argument = scale.rate * product;
  return SOFTCAP && argument < LOWEST ? LOWEST : argument;
}

struct Logit {
  float value;
  float slope;  // of the softcap
};

// Both from one exponential: tanh is off by 2^-24, where operands have 8 or 11 bits. For those Scale::rest is left out.
template <bool SOFTCAP>
__device__ __forceinline__ Logit logit_of_argument(float argument, Scale scale) {
  if (!SOFTCAP) {
    return {argument, 1};
  }
  constexpr float BITS = -2.885390081777927f;  // -2 log2 e
  const float decay = fast_exp2(BITS * std::fabs(argument));
  const float share = fast_reciprocal(1 + decay);
  const float tanh = std::copysign((1 - decay) * share, argument);
  return {argument == -INFINITY ? argument : scale.cap * tanh, 4 * decay * share * share};
}

constexpr int QUAD = 4;  // lanes that hold a row: 2 of every 8 columns each

__device__ __forceinline__ float quad_sum(float value) {
  value += __shfl_xor_sync(0xffffffff, value, 1);
  return value + __shfl_xor_sync(0xffffffff, value, 2);
}

__device__ __forceinline__ float quad_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(0xffffffff, value, 1));
  return fmaxf(value, __shfl_xor_sync(0xffffffff, value, 2));
}

// words[i] of lane j becomes words[j] of lane i.
__device__ __forceinline__ void transpose_quad(uint32_t (&words)[QUAD]) {
#pragma unroll
  for (int bit = 1; bit < QUAD; bit *= 2) {
    const bool has_bit = threadIdx.x & bit;
#pragma unroll
    for (int i = 0; i < QUAD; ++i) {
      if (i & bit) {
        continue;
      }
      const uint32_t received = __shfl_xor_sync(0xffffffff, has_bit ? words[i] : words[i | bit], bit);
      words[i] = has_bit ? received : words[i];
      words[i | bit] = has_bit ? words[i | bit] : received;
    }
  }
}

constexpr int EIGHTS = TILE_V / 8;

// Of the tile that begins at column `first`.
__device__ __forceinline__ int columns_from(int64_t first, int64_t V) {
  return V - first < TILE_V ? static_cast<int>(V - first) : TILE_V;
}

// A bias [columns] to both rows: sums[4 j + 2 r + c] is of column 8 j + 2 lane + c.
template <class T>
__device__ __forceinline__ void add_bias(float (&sums)[SUMS], const T* bias, int columns) {
  const int lane = threadIdx.x % QUAD;
#pragma unroll
  for (int j = 0; j < EIGHTS; ++j) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int v = 8 * j + 2 * lane + c;
      const float added = v < columns ? static_cast<float>(bias[v]) : 0;
      sums[4 * j + c] += added;
      sums[4 * j + 2 + c] += added;
    }
  }
}

// The pair of words[j] is of columns 8 j + 2 lane and the next; `to` begins with the first of all. A quad writes 64
// bytes at once.
template <class T>
__device__ __forceinline__ void write_exponentials(const uint32_t (&words)[EIGHTS], T* to, int columns) {
  const int lane = threadIdx.x % QUAD;
  to += 8 * lane;
  columns -= 8 * lane;
#pragma unroll
  for (int j = 0; j < EIGHTS; j += QUAD) {
    uint32_t run[] = {words[j], words[j + 1], words[j + 2], words[j + 3]};
    transpose_quad(run);
    if (8 * j < columns) {
      // Nobody reads it soon: the cache is for the operands.
      __stcs(reinterpret_cast<uint4*>(to + 8 * j), make_uint4(run[0], run[1], run[2], run[3]));
    }
  }
}

// Statistics and E of row R of the two whose sums are in this thread.
template <bool SOFTCAP, bool STATISTICS, int R, class T>
__device__ __forceinline__ void finish_row(float (&sums)[SUMS], const Row& row, int tile, const Finish<T>& out) {
  const int lane = threadIdx.x % QUAD;
  const int64_t first = static_cast<int64_t>(tile) * TILE_V;
  const int columns = columns_from(first, out.V);
  const Scale scale = scale_of(row.temperature, out.logit_scale, out.softcap);
  float arguments[EIGHTS][2];
#pragma unroll
  for (int j = 0; j < EIGHTS; ++j) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      arguments[j][c] = argument_of<SOFTCAP>(sums[4 * j + 2 * R + c], scale);
    }
  }
  const int64_t behind = row.target - out.first_v - first;
  const bool has_target = 0 <= behind && behind < columns && behind % 8 / 2 == lane;
  if (has_target || columns < TILE_V) {
    const int target = has_target ? static_cast<int>(behind) : -1;
    float of_target = 0;
#pragma unroll
    for (int j = 0; j < EIGHTS; ++j) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int v = 8 * j + 2 * lane + c;
        of_target = v == target ? arguments[j][c] : of_target;
        arguments[j][c] = v == target || v >= columns ? -INFINITY : arguments[j][c];
      }
    }
    if (STATISTICS && has_target) {
      const Logit logit = logit_of_argument<SOFTCAP>(of_target, scale);
      out.state[LOGIT * out.M + row.m] = logit.value;
      out.state[SLOPE * out.M + row.m] = logit.slope;
    }
  }

  float offset = row.offset;
  float highest = -INFINITY;
  if (STATISTICS) {
#pragma unroll
    for (int j = 0; j < EIGHTS; ++j) {
      highest = fmaxf(highest, fmaxf(arguments[j][0], arguments[j][1]));
    }
    highest = logit_of_argument<SOFTCAP>(quad_max(highest), scale).value;
    offset += steps(highest, offset, row.guessed != 0);
  }

  float sum = 0;
  float moment = 0;
  uint32_t words[EIGHTS];
#pragma unroll
  for (int j = 0; j < EIGHTS; ++j) {
    float entries[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const Logit logit = logit_of_argument<SOFTCAP>(arguments[j][c], scale);
      const float exponential = fast_exp2(logit.value - offset);
      if (STATISTICS) {
        sum += exponential;
        moment += moment_of(exponential, logit.value, highest);
      }
      entries[c] = exponential * logit.slope;
    }
    words[j] = hopper::rounded_pair<T>(entries[0], entries[1]);
  }
  if (out.exponentials) {
    write_exponentials(words, out.exponentials + row.m * out.stride_e + first, row.counts ? columns : 0);
  }
  if (STATISTICS) {
    sum = quad_sum(sum);
    moment = quad_sum(moment);
    if (row.counts && lane == 0) {
      out.write_partials(row.m, tile, highest, sum, moment);
    }
  }
}

template <bool SOFTCAP, bool STATISTICS, class T>
__device__ __forceinline__ void finish_tile(float (&sums)[SUMS], const Row (&rows)[2], int tile, const Finish<T>& out) {
  if (out.bias) {
    const int64_t first = static_cast<int64_t>(tile) * TILE_V;
    add_bias(sums, out.bias + first, columns_from(first, out.V));
  }
  finish_row<SOFTCAP, STATISTICS, 0>(sums, rows[0], tile, out);
  finish_row<SOFTCAP, STATISTICS, 1>(sums, rows[1], tile, out);
}

template <bool SOFTCAP, bool STATISTICS, class T>
__device__ void multiply_tiles(Shared<T>& shared, const Order& order, int64_t D, const Finish<T>& out) {
  const int consumer = threadIdx.x / WARPGROUP - 1;
  const int warp = threadIdx.x % WARPGROUP / WARP;
  const int first_row = consumer * ROWS + warp * 16 + threadIdx.x % WARP / QUAD;
  float sums[SUMS];
  Turn turn;
  for (int i = blockIdx.x / CLUSTER; i < order.count(); i += gridDim.x / CLUSTER) {
    const Order::Tile tile = order.at(i);
    const int64_t m = (static_cast<int64_t>(tile.row) * CLUSTER + hopper::cluster_rank()) * TILE_M + first_row;
    const Row rows[] = {read_row<STATISTICS>(out, m), read_row<STATISTICS>(out, m + 8)};
    multiply_tile(sums, shared, turn, consumer, D);
    finish_tile<SOFTCAP, STATISTICS>(sums, rows, tile.column, out);
  }
}

template <class T, bool SOFTCAP, bool STATISTICS>
__global__ void __launch_bounds__(PRODUCT_THREADS, 1) product_kernel(
    const __grid_constant__ TensorMap hidden,
    const __grid_constant__ TensorMap weight,
    const __grid_constant__ Order order,
    int64_t D,
    const __grid_constant__ Finish<T> out) {
#if LATRO_HOPPER
  Shared<T>& shared = *reinterpret_cast<Shared<T>*>(dynamic_shared());
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; ++stage) {
      hopper::init(shared.filled[stage], 1);
      hopper::init(shared.released[stage], CLUSTER * CONSUMERS * WARPGROUP / WARP);
    }
    hopper::publish_barriers();
  }
  hopper::cluster_sync();
  if (threadIdx.x < WARPGROUP) {
    hopper::keep_registers<COPYING_REGISTERS>();
    if (threadIdx.x == 0) {
      copy_tiles(shared, hidden, weight, order, D);
    }
  } else {
    hopper::take_registers<MULTIPLYING_REGISTERS>();
    multiply_tiles<SOFTCAP, STATISTICS>(shared, order, D, out);
  }
  hopper::cluster_sync();  // no block is gone while the other arrives at its barriers
#else
  __trap();
#endif
}

}  // namespace sm90

// Whether the copies can read the operands.
template <class T>
bool fused_product_fits(const Operands<T>& in) {
  constexpr int NUMBERS = 16 / sizeof(T);
  const auto reads = [](const T* matrix, int64_t stride) {
    return reinterpret_cast<uintptr_t>(matrix) % 16 == 0 && stride % NUMBERS == 0;
  };
  return in.D % NUMBERS == 0 && reads(in.hidden, in.stride_h) && reads(in.weight, in.stride_w);
}

// clusters: 0 for as many as the device runs at once. Two neighbouring multiprocessors are always one unit of a GPU, so
// that any count of them is half as many clusters.
template <class T>
void launch_product_sm90(const Operands<T>& in, const Finish<T>& out, int clusters, cudaStream_t stream) {
  using namespace sm90;
  require(fused_product_fits(in), "linear_logprobs: the fused product needs rows of whole 16 bytes");
  const TensorMap hidden = hopper::tensor_map(in.hidden, out.M, in.D, in.stride_h, TILE_M);
  const TensorMap weight = hopper::tensor_map(in.weight, out.V, in.D, in.stride_w, TILE_V / CLUSTER);
  const Order order = order_of(out.M, out.V);
  const int most = clusters > 0 ? clusters : hopper::multiprocessors() / CLUSTER;
  const Launch how = {
      .grid = dim3(CLUSTER * std::min(order.count(), most)),
      .block = dim3(PRODUCT_THREADS),
      .shared_bytes = sizeof(Shared<T>),
      .stream = stream,
      .cluster = CLUSTER,
  };
  const auto start = [&](auto kernel) { launch(kernel, how, hidden, weight, order, in.D, out); };
  if (out.softcap > 0) {
    start(out.partials ? product_kernel<T, true, true> : product_kernel<T, true, false>);
  } else {
    start(out.partials ? product_kernel<T, false, true> : product_kernel<T, false, false>);
  }
}

}  // namespace latro::head
