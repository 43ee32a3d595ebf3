// One call of linear_logprobs, as plain pointers: what the instruction sets share.
//
// Logits are made transposed, a vocabulary entry per row and a token per column: maximum and sum then run along
// columns without a horizontal step, and both gradients read what was kept in the order it was written.
// V vocabulary, D hidden, N tokens (distinct pairs of a hidden row and a temperature).
#pragma once

#include <cstdint>

namespace latro::linear_logprobs {

// Columns that hidden_grad takes at once, at most; and what its tokens come in multiples of.
constexpr int HIDDEN_GRAD_COLUMNS = 1024;
constexpr int BLOCK_ROWS = 12;

// Blocks of tokens are padded to this.
constexpr int64_t LANES = 64;

// Rows of D contiguous elements; the stride is in elements.
struct Rows {
  const void* data;
  int64_t stride;
};

// A vocabulary entry that is the target of a token. Its exponential is kept as 0, and is in no sum.
struct Target {
  int32_t entry;
  int32_t token;
};

// Consecutive tokens that are worked on at once. Arrays of tokens are as long as `padded`, a multiple of 64.
struct Tokens {
  int64_t count;
  int64_t padded;
  const int64_t* rows;           // [count], of hidden
  const float* scale;            // [padded], logit_scale over the temperature
  const float* inv_temperature;  // [padded]
  const Target* targets;         // sorted by entry, then token
  int64_t target_count;
};

struct Problem {
  int64_t V, D;
  Rows hidden;
  Rows weight;
  const float* bias;  // [V], or null
  float logit_scale;
  float softcap;  // 0: none
};

// Sums over a range of the vocabulary without the targets, one number for each token, of logits less its shift.
struct Sums {
  float* most;
  float* sum;       // of exponentials
  float* weighted;  // of exponentials times logits less the largest
  float* target;    // [target_count], the logit less the shift; and the slope of the softcap there
  float* slope;
};

// A part of a [V, tokens] matrix in the dtype of the operands, from row `entry` on.
struct Exponentials {
  void* data;
  int64_t stride;
};

// The vocabulary entries [begin, end).
struct Entries {
  int64_t begin;
  int64_t end;
};

struct WeightGrad {
  void* data;  // [V, D], from the first entry of the call on
  bool is_float;
  bool accumulate;
  float* bias;                 // [V], added to; or null
  const float* target_factor;  // [target_count]
  const float* factor;         // [padded]
};

// The kernels of one instruction set and dtype; each is a piece of work for one thread.
struct Kernels {
  int panel;  // columns that lie together in packed operands

  // Bytes of packed tokens, and floats of scratch that a thread needs.
  int64_t (*packed_size)(const Problem&, int64_t padded);
  int64_t (*scratch_size)(const Problem&, int64_t padded);

  // Tokens [first, last), multiples of `panel`, of hidden transposed: what logits are made of.
  void (*pack_hidden)(const Problem&, const Tokens&, int64_t first, int64_t last, void* packed);
  // Columns [first, last) of hidden, multiples of `panel`, each row times its factor: what weight_grad is made of.
  void (*pack_scaled)(const Problem&, const Tokens&, const float* factor, int64_t first, int64_t last, void* packed);

  // A guess of each token's largest logit, from some entries of the vocabulary.
  void (*guess)(
      const Problem&, const Tokens&, const void* packed, int64_t first, int64_t last, float* shift, float* scratch);

  // Exponentials of logits less shift; their sums unless `sums` is null.
  void (*exponentials)(
      const Problem&,
      const Tokens&,
      const void* packed,
      const float* shift,
      Entries,
      const Sums* sums,
      const Exponentials*,
      float* scratch);

  // grad[token][D] = or += sum over the entries of the exponentials times weight rows.
  void (*hidden_grad)(
      const Problem&,
      const Exponentials&,
      Entries,
      int64_t first_token,
      int64_t last_token,
      int64_t first_column,
      int64_t last_column,
      bool add,
      float* grad,
      int64_t stride,
      float* scratch);

  // grad[entry] = or += sum over the tokens of exponentials times scaled hidden rows, and the targets' exact terms.
  void (*weight_grad)(
      const Problem&,
      const Tokens&,
      const void* scaled,
      const Exponentials&,
      Entries,
      const WeightGrad&,
      float* scratch);

  // to[0..D] += factor * weight[entry].
  void (*add_weight_row)(const Problem&, int64_t entry, float factor, float* to);
  // Adds to a row of the gradient of hidden, in its dtype.
  void (*add_to_row)(const float* from, int64_t D, void* to);
};

}  // namespace latro::linear_logprobs
