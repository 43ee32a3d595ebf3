// One call of tree attention, as plain pointers: what the instruction sets share.
#pragma once

#include <cstdint>

namespace latro::tree_attention {

// [heads, T, E] with E contiguous; strides in elements.
struct Operand {
  const void* data;
  int64_t head_stride;
  int64_t token_stride;
};

struct Result {
  void* data;
  int64_t head_stride;
  int64_t token_stride;
};

struct Problem {
  int64_t T;
  int H, Hkv, E;
  float scale;
  float softcap;       // 0: none
  int window;          // 0: none
  const float* sinks;  // [H], or null
  Operand q, k, v;
  Result out;
  float* row_max;            // [H, T], of the scores
  float* row_sum;            // [H, T], of e^(score - maximum)
  const int32_t* tiles;      // [tiles, 2]: first row, and one past the last
  const int64_t* positions;  // [T]
  int tile;                  // most rows of a tile
  int longest_path;
  // The backward pass alone.
  Operand grad_out;
  Result grad_q, grad_k, grad_v;
  float* grad_sinks;  // [H, T], to be summed over T in order; or null
};

// The kernels of one instruction set and dtype. A task is a range of tiles (whole prompts) and a key head.
struct Kernels {
  int64_t (*scratch_size)(const Problem&, bool is_backward);  // floats
  void (*forward)(const Problem&, int64_t head, int64_t first_tile, int64_t last_tile, float* scratch);
  void (*backward)(const Problem&, int64_t head, int64_t first_tile, int64_t last_tile, float* scratch);
};

}  // namespace latro::tree_attention
