// Tree attention for one key head and one prompt, on vectors of W floats. Included once for each instruction set.
//
// Depth-first order makes a path contiguous in scratch: a token at depth d of its path writes its key and value to slot
// d, and slots 0..d are then the token's own path, whatever branch was there before. So a tile of queries (consecutive
// tokens of one path) attends to a dense prefix, and the mask is a comparison of depths at the tile's last keys, and at
// its first ones when there is a window.
//
// Rows of a tile are ordered token first, then query head, so that a causal limit grows with the row.
// T tokens, E head size, G query heads per key head, n tokens in a tile.
#pragma once

#include "problem.h"
#include "products.h"

namespace latro::tree_attention {
namespace {

constexpr float MINUS_INFINITY = -__builtin_inff();

// Sums over the rows of a tile go in runs too: gradients may all have one sign there, and one run would err more than
// eager's sums do.
constexpr int SHORT_ROW_SUM = 64;

// to[0..padded] = from[0..E], zeros behind.
template <int W, class T>
LATRO_INLINE void copy_row(const T* from, int E, float* to, int padded) {
  int e = 0;
  for (; e + W <= E; e += W) {
    store<W>(to + e, load<W>(from + e));
  }
  for (; e < E; ++e) {
    to[e] = to_float(from[e]);
  }
  for (; e < padded; ++e) {
    to[e] = 0;
  }
}

template <int W, class T>
LATRO_INLINE void write_row(const float* from, int E, float scale, T* to) {
  int e = 0;
  for (; e + W <= E; e += W) {
    store<W>(to + e, load<W>(from + e) * scale);
  }
  for (; e < E; ++e) {
    from_float(to + e, from[e] * scale);
  }
}

// One token's row as lane `slot % W` of packed block `slot / W`, [E][W].
template <int W, class T>
LATRO_INLINE void pack_column(const T* from, int E, int slot, float* packed) {
  float* to = packed + static_cast<int64_t>(slot / W) * E * W + slot % W;
  for (int e = 0; e < E; ++e) {
    to[static_cast<int64_t>(e) * W] = to_float(from[e]);
  }
}

// The keys [begin, end) of one row, and scores that are not of them.
struct Span {
  int begin;
  int end;
};

template <int W, class T>
struct Worker {
  static constexpr int N_BLOCKS = W == 16 ? 4 : 2;
  // Keys per chunk. Forward, a block of scores stays in the first-level cache and a chunk of keys in the second;
  // backward, the scores of a whole tile and their gradients do.
  static constexpr int CHUNK = 256;
  static constexpr int BACKWARD_CHUNK = 128;

  const Problem& in;
  const int64_t head;  // the key head
  const int E, padded, G;
  const bool capped;
  float* arena;

  // Scratch, all of it as long as the longest path or as one tile.
  float* keys;     // packed [slots / W][E][W]
  float* values;   // [slots][padded]
  float* queries;  // [rows][padded]
  float* out;      // [rows][padded]
  float* row_max;  // [rows]
  float* row_sum;  // [rows]
  float* scores;   // [ROWS][CHUNK]
  float row_scale[ROWS];

  // The backward pass: rows of a tile are in the order of queries.
  float* value_columns;  // packed as keys
  float* key_rows;       // [slots][padded]
  float* grad_out;       // [rows][padded]
  float* grad_q;         // [rows][padded]
  float* grad_k;         // [slots][padded], without the scale
  float* grad_v;         // [slots][padded]
  float* probabilities;  // [rows][BACKWARD_CHUNK]
  float* score_grads;    // [rows][BACKWARD_CHUNK]
  float* row_share;      // [rows], one over the sum
  float* row_delta;      // [rows], sum of grad_out * out
  int32_t* owner;        // [slots], the token whose gradients are being summed there
  int filled;            // slots that have an owner

  Worker(const Problem& problem, int64_t key_head, float* scratch)
      : in(problem),
        head(key_head),
        E(problem.E),
        padded(round_up(problem.E, W)),
        G(problem.H / problem.Hkv),
        capped(problem.softcap > 0),
        arena(scratch) {
  }

  float* take(int64_t size) {
    float* taken = arena;
    arena += (size + 15) / 16 * 16;
    return taken;
  }

  int slots() const {
    return round_up(in.longest_path, W);
  }

  int rows() const {
    return G * in.tile;
  }

  const T* row_of(const Operand& operand, int64_t h, int64_t t) const {
    return static_cast<const T*>(operand.data) + h * operand.head_stride + t * operand.token_stride;
  }

  T* row_of(const Result& result, int64_t h, int64_t t) const {
    return static_cast<T*>(result.data) + h * result.head_stride + t * result.token_stride;
  }

  // The keys that the token at this depth sees, as columns of a chunk that starts at `first`.
  Span seen(int depth, int first, int columns) const {
    const int begin = in.window > 0 ? larger(0, depth - in.window + 1 - first) : 0;
    return {smaller(begin, columns), larger(0, smaller(depth + 1 - first, columns))};
  }

  // Blocks of W columns that any of the rows [r, r + count) sees.
  Span blocks_seen(int depth, int r, int count, int first, int columns) const {
    const int begin = seen(depth + r / G, first, columns).begin;
    const int end = seen(depth + (r + count - 1) / G, first, columns).end;
    return end > begin ? Span{begin / W, (end + W - 1) / W} : Span{0, 0};
  }

  // Of columns that the row does not see, minus infinity.
  LATRO_INLINE Float<W> masked(Float<W> s, Int<W> column, Span span) {
    const Int<W> hidden = (column < span.begin) | (column >= span.end);
    return hidden ? Float<W>{} + MINUS_INFINITY : s;
  }

  void forward_scratch() {
    keys = take(static_cast<int64_t>(slots()) * E);
    values = take(static_cast<int64_t>(slots()) * padded);
    queries = take(static_cast<int64_t>(rows()) * padded);
    out = take(static_cast<int64_t>(rows()) * padded);
    row_max = take(rows());
    row_sum = take(rows());
    scores = take(ROWS * CHUNK);
  }

  void forward(int64_t first_tile, int64_t last_tile) {
    forward_scratch();
    for (int64_t n = first_tile; n < last_tile; ++n) {
      const int begin = in.tiles[2 * n];
      forward_tile(begin, in.tiles[2 * n + 1] - begin, static_cast<int>(in.positions[begin]));
    }
  }

  void load_keys_and_values(int begin, int n, int depth) {
    for (int i = 0; i < n; ++i) {
      pack_column<W>(row_of(in.k, head, begin + i), E, depth + i, keys);
      copy_row<W>(row_of(in.v, head, begin + i), E, values + static_cast<int64_t>(depth + i) * padded, padded);
    }
  }

  void load_queries(const Operand& operand, int begin, int n, float* to) {
    for (int i = 0; i < n; ++i) {
      for (int g = 0; g < G; ++g) {
        copy_row<W>(
            row_of(operand, head * G + g, begin + i), E, to + (static_cast<int64_t>(i) * G + g) * padded, padded);
      }
    }
  }

  void forward_tile(int begin, int n, int depth) {
    load_keys_and_values(begin, n, depth);
    load_queries(in.q, begin, n, queries);
    const int all = n * G;
    std::memset(out, 0, sizeof(float) * all * padded);
    for (int r = 0; r < all; ++r) {
      row_max[r] = in.sinks ? in.sinks[head * G + r % G] : MINUS_INFINITY;
      row_sum[r] = in.sinks ? 1 : 0;
    }
    const int visible = depth + n;
    const int start = in.window > 0 ? larger(0, depth - in.window + 1) / CHUNK * CHUNK : 0;
    for (int first = start; first < visible; first += CHUNK) {
      const int columns = smaller(CHUNK, visible - first);
      for (int r = 0; r < all; r += ROWS) {
        forward_rows(depth, r, smaller(ROWS, all - r), first, columns);
      }
    }
    for (int r = 0; r < all; ++r) {
      const int64_t h = head * G + r % G;
      const int64_t t = begin + r / G;
      write_row<W>(out + static_cast<int64_t>(r) * padded, E, 1 / row_sum[r], row_of(in.out, h, t));
      in.row_max[h * in.T + t] = row_max[r];
      in.row_sum[h * in.T + t] = row_sum[r];
    }
  }

  void forward_rows(int depth, int r, int count, int first, int columns) {
    const Span blocks = blocks_seen(depth, r, count, first, columns);
    if (blocks.end == blocks.begin) {
      return;
    }
    const int64_t packed = static_cast<int64_t>(first / W + blocks.begin) * E * W;
    multiply<W, N_BLOCKS>(
        count, blocks.end - blocks.begin, queries + static_cast<int64_t>(r) * padded, padded, keys + packed, E,
        scores + blocks.begin * W, CHUNK);
    for (int i = 0; i < count; ++i) {
      softmax_row(scores + i * CHUNK, blocks, seen(depth + (r + i) / G, first, columns), r + i, row_scale + i);
    }
    const int from = blocks.begin * W;
    const int to = smaller(blocks.end * W, columns);
    accumulate<W, N_BLOCKS>(
        count, scores + from, CHUNK, 1, values + static_cast<int64_t>(first + from) * padded, padded, to - from,
        out + static_cast<int64_t>(r) * padded, padded, padded, row_scale);
  }

  // One row of scores to e^(score - maximum), with the running maximum and sum.
  void softmax_row(float* s, Span blocks, Span span, int r, float* scale) {
    const Int<W> lane = iota<W>();
    Float<W> most = Float<W>{} + MINUS_INFINITY;
    for (int b = blocks.begin; b < blocks.end; ++b) {
      Float<W> x = load<W>(s + b * W) * in.scale;
      if (capped) {
        x = tanh<W>(x / in.softcap) * in.softcap;
      }
      if (b * W < span.begin || (b + 1) * W > span.end) {
        x = masked(x, lane + b * W, span);
      }
      store<W>(s + b * W, x);
      most = max<W>(x, most);
    }
    const float before = row_max[r];
    const float now = max_of<W>(most) > before ? max_of<W>(most) : before;
    const float shift = now == MINUS_INFINITY ? 0 : now;
    Float<W> total = {};
    for (int b = blocks.begin; b < blocks.end; ++b) {
      const Float<W> p = exp<W>(load<W>(s + b * W) - shift);
      store<W>(s + b * W, p);
      total += p;
    }
    *scale = before == now ? 1 : exp<W>(Float<W>{} + (before - shift))[0];
    row_max[r] = now;
    row_sum[r] = row_sum[r] * *scale + sum<W>(total);
  }

  void backward_scratch() {
    keys = take(static_cast<int64_t>(slots()) * E);
    value_columns = take(static_cast<int64_t>(slots()) * E);
    key_rows = take(static_cast<int64_t>(slots()) * padded);
    grad_k = take(static_cast<int64_t>(slots()) * padded);
    grad_v = take(static_cast<int64_t>(slots()) * padded);
    queries = take(static_cast<int64_t>(rows()) * padded);
    grad_out = take(static_cast<int64_t>(rows()) * padded);
    grad_q = take(static_cast<int64_t>(rows()) * padded);
    probabilities = take(static_cast<int64_t>(rows()) * BACKWARD_CHUNK);
    score_grads = take(static_cast<int64_t>(rows()) * BACKWARD_CHUNK);
    row_max = take(rows());
    row_share = take(rows());
    row_delta = take(rows());
    owner = reinterpret_cast<int32_t*>(take(slots()));
  }

  void backward(int64_t first_tile, int64_t last_tile) {
    backward_scratch();
    filled = 0;
    for (int64_t n = first_tile; n < last_tile; ++n) {
      const int begin = in.tiles[2 * n];
      backward_tile(begin, in.tiles[2 * n + 1] - begin, static_cast<int>(in.positions[begin]));
    }
    write_key_grads(0);
  }

  // Slots from `from` on will not be seen again: another branch begins there.
  void write_key_grads(int from) {
    for (int slot = from; slot < filled; ++slot) {
      const float* of_key = grad_k + static_cast<int64_t>(slot) * padded;
      const float* of_value = grad_v + static_cast<int64_t>(slot) * padded;
      write_row<W>(of_key, E, in.scale, row_of(in.grad_k, head, owner[slot]));
      write_row<W>(of_value, E, 1, row_of(in.grad_v, head, owner[slot]));
    }
    filled = smaller(filled, from);
  }

  void backward_tile(int begin, int n, int depth) {
    write_key_grads(depth);
    for (int i = 0; i < n; ++i) {
      const T* key = row_of(in.k, head, begin + i);
      pack_column<W>(key, E, depth + i, keys);
      copy_row<W>(key, E, key_rows + static_cast<int64_t>(depth + i) * padded, padded);
      pack_column<W>(row_of(in.v, head, begin + i), E, depth + i, value_columns);
      owner[depth + i] = begin + i;
    }
    filled = depth + n;
    std::memset(grad_k + static_cast<int64_t>(depth) * padded, 0, sizeof(float) * n * padded);
    std::memset(grad_v + static_cast<int64_t>(depth) * padded, 0, sizeof(float) * n * padded);
    load_queries(in.q, begin, n, queries);
    load_queries(in.grad_out, begin, n, grad_out);
    const int all = n * G;
    std::memset(grad_q, 0, sizeof(float) * all * padded);
    for (int r = 0; r < all; ++r) {
      load_row_terms(r, head * G + r % G, begin + r / G);
    }

    const int start = in.window > 0 ? larger(0, depth - in.window + 1) / BACKWARD_CHUNK * BACKWARD_CHUNK : 0;
    for (int first = start; first < filled; first += BACKWARD_CHUNK) {
      const int columns = smaller(BACKWARD_CHUNK, filled - first);
      for (int r = 0; r < all; r += ROWS) {
        backward_rows(depth, r, smaller(ROWS, all - r), first, columns);
      }
      for (int j = 0; j < columns; j += ROWS) {
        backward_keys(depth, all, first + j, smaller(ROWS, columns - j), j);
      }
    }
    for (int r = 0; r < all; ++r) {
      const float* from = grad_q + static_cast<int64_t>(r) * padded;
      write_row<W>(from, E, in.scale, row_of(in.grad_q, head * G + r % G, begin + r / G));
    }
  }

  void load_row_terms(int r, int64_t h, int64_t t) {
    const T* out_row = row_of(in.out, h, t);
    const float* grad = grad_out + static_cast<int64_t>(r) * padded;
    Float<W> total = {};
    int e = 0;
    for (; e + W <= E; e += W) {
      total += load<W>(out_row + e) * load<W>(grad + e);
    }
    float delta = sum<W>(total);
    for (; e < E; ++e) {
      delta += to_float(out_row[e]) * grad[e];
    }
    row_delta[r] = delta;
    row_max[r] = in.row_max[h * in.T + t];
    row_share[r] = 1 / in.row_sum[h * in.T + t];
    if (in.grad_sinks) {
      in.grad_sinks[h * in.T + t] = -delta * row_share[r] * exp<W>(Float<W>{} + (in.sinks[h] - row_max[r]))[0];
    }
  }

  void backward_rows(int depth, int r, int count, int first, int columns) {
    const Span blocks = blocks_seen(depth, r, count, first, columns);
    float* p = probabilities + static_cast<int64_t>(r) * BACKWARD_CHUNK;
    float* ds = score_grads + static_cast<int64_t>(r) * BACKWARD_CHUNK;
    // backward_keys reads blocks of keys of which these rows may see a part.
    for (int b = 0; b < (columns + W - 1) / W; ++b) {
      if (b < blocks.begin || b >= blocks.end) {
        for (int i = 0; i < count; ++i) {
          store<W>(p + i * BACKWARD_CHUNK + b * W, Float<W>{});
          store<W>(ds + i * BACKWARD_CHUNK + b * W, Float<W>{});
        }
      }
    }
    if (blocks.end == blocks.begin) {
      return;
    }
    const int64_t packed = static_cast<int64_t>(first / W + blocks.begin) * E * W;
    const int from = blocks.begin * W;
    const int64_t row = static_cast<int64_t>(r) * padded;
    const int seen_blocks = blocks.end - blocks.begin;
    multiply<W, N_BLOCKS>(count, seen_blocks, queries + row, padded, keys + packed, E, p + from, BACKWARD_CHUNK);
    multiply<W, N_BLOCKS>(
        count, seen_blocks, grad_out + row, padded, value_columns + packed, E, ds + from, BACKWARD_CHUNK);
    for (int i = 0; i < count; ++i) {
      const Span span = seen(depth + (r + i) / G, first, columns);
      score_gradients(p + i * BACKWARD_CHUNK, ds + i * BACKWARD_CHUNK, blocks, span, r + i);
    }
    const int to = smaller(blocks.end * W, columns);
    accumulate<W, N_BLOCKS>(
        count, ds + from, BACKWARD_CHUNK, 1, key_rows + static_cast<int64_t>(first + from) * padded, padded, to - from,
        grad_q + row, padded, padded, nullptr);
  }

  // One row: scores to probabilities, and gradients of probabilities to gradients of scores.
  void score_gradients(float* p, float* ds, Span blocks, Span span, int r) {
    const Int<W> lane = iota<W>();
    for (int b = blocks.begin; b < blocks.end; ++b) {
      Float<W> x = load<W>(p + b * W) * in.scale;
      Float<W> slope = Float<W>{} + 1.0f;
      if (capped) {
        const Float<W> t = tanh<W>(x / in.softcap);
        slope = 1.0f - t * t;
        x = t * in.softcap;
      }
      if (b * W < span.begin || (b + 1) * W > span.end) {
        x = masked(x, lane + b * W, span);
      }
      const Float<W> probability = exp<W>(x - row_max[r]) * row_share[r];
      store<W>(p + b * W, probability);
      store<W>(ds + b * W, probability * (load<W>(ds + b * W) - row_delta[r]) * slope);
    }
  }

  // grad_v += Pᵀ grad_out and grad_k += dSᵀ q for the keys in slots [slot, slot + count), columns from j on.
  void backward_keys(int depth, int all, int slot, int count, int j) {
    const int from = larger(0, slot - depth) * G;  // rows before it see none of these keys
    const int to = in.window > 0 ? smaller(all, (slot + count - 1 + in.window - depth) * G) : all;
    if (from >= to) {
      return;
    }
    for (int row = from; row < to; row += SHORT_ROW_SUM) {
      const int rows = smaller(SHORT_ROW_SUM, to - row);
      const int64_t scores_at = static_cast<int64_t>(row) * BACKWARD_CHUNK + j;
      const int64_t rows_at = static_cast<int64_t>(row) * padded;
      const int64_t slot_at = static_cast<int64_t>(slot) * padded;
      accumulate<W, N_BLOCKS>(
          count, probabilities + scores_at, 1, BACKWARD_CHUNK, grad_out + rows_at, padded, rows, grad_v + slot_at,
          padded, padded, nullptr);
      accumulate<W, N_BLOCKS>(
          count, score_grads + scores_at, 1, BACKWARD_CHUNK, queries + rows_at, padded, rows, grad_k + slot_at, padded,
          padded, nullptr);
    }
  }

  int64_t scratch_size(bool is_backward) const {
    const int64_t of_slots = static_cast<int64_t>(slots()) * (is_backward ? 2 * E + 3 * padded + 1 : E + padded);
    const int64_t of_rows =
        static_cast<int64_t>(rows()) * (is_backward ? 3 * padded + 2 * BACKWARD_CHUNK + 3 : 2 * padded + 2);
    return of_slots + of_rows + (is_backward ? 0 : ROWS * CHUNK) + 16 * 16;  // each piece is rounded up to 16 floats
  }
};

template <int W, class T>
constexpr Kernels kernels() {
  return {
      [](const Problem& problem, bool is_backward) {
        return Worker<W, T>(problem, 0, nullptr).scratch_size(is_backward);
      },
      [](const Problem& problem, int64_t head, int64_t first_tile, int64_t last_tile, float* scratch) {
        Worker<W, T>(problem, head, scratch).forward(first_tile, last_tile);
      },
      [](const Problem& problem, int64_t head, int64_t first_tile, int64_t last_tile, float* scratch) {
        Worker<W, T>(problem, head, scratch).backward(first_tile, last_tile);
      }};
}

}  // namespace
}  // namespace latro::tree_attention
