// Tree attention for one key head and one prompt, on vectors of W floats. Included once for each instruction set.
//
// Depth-first order makes a path contiguous in scratch: a token at depth d of its path writes its key and value to slot
// d, and slots 0..d are then the token's own path, whatever branch was there before. So a tile of queries (consecutive
// tokens of one path) attends to a dense prefix, and the mask is a comparison of depths at the tile's last keys, and at
// its first ones when there is a window.
//
// Rows of a tile are ordered token first, then query head, so that a causal limit grows with the row.
// Products are of units (Factor in products.h): a float, or two bfloat16 that are neighbours in the sum.
//
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

// `count` numbers, zeros behind them where it is less than W.
template <int W, class T>
LATRO_INLINE Float<W> load_up_to(const T* from, int count) {
  if (count >= W) {
    return load<W>(from);
  }
  Float<W> v = {};
  for (int i = 0; i < count; ++i) {
    v[i] = to_float(from[i]);
  }
  return v;
}

// to[0..padded] = from[0..E], zeros behind.
template <int W, class T, class Number>
LATRO_INLINE void copy_row(const T* from, int E, Number* to, int padded) {
  for (int e = 0; e < padded; e += W) {
    store<W>(to + e, load_up_to<W>(from + e, E - e));
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

// Stores W numbers of one row among those of the row that it makes pairs with: of an even row as the first of each,
// with zeros for the second; of an odd row over those.
template <int W>
LATRO_INLINE void store_paired(float* to, int, Float<W> v) {
  store<W>(to, v);
}

template <int W>
LATRO_INLINE void store_paired(uint32_t* to, int row, Float<W> v) {
  const Bits<W> bits = __builtin_convertvector(to_bfloat16<W>(v), Bits<W>);
  store<W>(to, row % 2 ? (load<W>(to) & 0xffff) | bits << 16 : bits);
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
  // Rows to prefetch: in a model's layout the rows of a head are too far apart for the hardware to.
  static constexpr int AHEAD = 8;

  using Number = typename Factor<T>::Number;
  using Unit = typename Factor<T>::Unit;
  static constexpr int NUMBERS = sizeof(Unit) / sizeof(Number);  // in a unit

  const Problem& in;
  const int64_t head;  // the key head
  const int E, padded, G;
  const int units;  // of E numbers
  const bool capped;
  float* const arena;
  int64_t taken = 0;  // floats of it

  // Scratch, all of it as long as the longest path or as one tile. Units pair numbers of one row (_rows, and columns),
  // or those of two rows at the same place (_pairs).
  Number* packing;     // [padded]
  Unit* key_columns;   // packed [slots / W][units][W]
  Unit* value_pairs;   // [slots / NUMBERS][padded]
  Number* query_rows;  // [rows][padded]
  float* out;          // [rows][padded]
  float* row_max;      // [rows]
  float* row_sum;      // [rows]
  float* scores;       // [ROWS][CHUNK], or [ROWS][BACKWARD_CHUNK]
  float row_scale[ROWS];

  // The backward pass: rows of a tile are in the order of queries.
  Unit* value_columns;       // packed as keys
  Unit* key_pairs;           // [slots / NUMBERS][padded]
  Unit* query_pairs;         // [rows / NUMBERS][padded]
  Number* grad_out_rows;     // [rows][padded]
  Unit* grad_out_pairs;      // [rows / NUMBERS][padded]
  float* grad_q;             // [rows][padded]
  float* grad_k;             // [slots][padded], without the scale
  float* grad_v;             // [slots][padded]
  float* probability_grads;  // [ROWS][BACKWARD_CHUNK]
  Unit* probability_pairs;   // [rows / NUMBERS][BACKWARD_CHUNK]
  Unit* score_grad_pairs;    // [rows / NUMBERS][BACKWARD_CHUNK]
  float* row_share;          // [rows], one over the sum
  float* row_delta;          // [rows], sum of grad_out * out
  int32_t* owner;            // [slots], the token whose gradients are being summed there
  int filled;                // slots that have an owner

  Worker(const Problem& problem, int64_t key_head, float* scratch)
      : in(problem),
        head(key_head),
        E(problem.E),
        padded(round_up(problem.E, W)),
        G(problem.H / problem.Hkv),
        units((problem.E + NUMBERS - 1) / NUMBERS),
        capped(problem.softcap > 0),
        arena(scratch) {
  }

  // Without an arena, only counts.
  template <class X>
  void take(X*& pointer, int64_t count) {
    const int64_t floats = (count * static_cast<int64_t>(sizeof(X)) + 3) / 4;
    pointer = arena ? reinterpret_cast<X*>(arena + taken) : nullptr;
    taken += (floats + 15) / 16 * 16;
  }

  int slots() const {
    return round_up(in.longest_path, W);
  }

  int rows() const {
    return round_up(G * in.tile, NUMBERS);
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

  // `instead` for columns that the row does not see.
  LATRO_INLINE Float<W> masked(Float<W> x, Int<W> column, Span span, float instead) {
    const Int<W> hidden = (column < span.begin) | (column >= span.end);
    return hidden ? Float<W>{} + instead : x;
  }

  void forward_scratch() {
    const int64_t of_slots = static_cast<int64_t>(slots()) * padded;
    const int64_t of_rows = static_cast<int64_t>(rows()) * padded;
    take(packing, padded);
    take(key_columns, static_cast<int64_t>(slots()) * units);
    take(value_pairs, of_slots / NUMBERS);
    take(query_rows, of_rows);
    take(out, of_rows);
    take(row_max, rows());
    take(row_sum, rows());
    take(scores, ROWS * CHUNK);
  }

  void forward(int64_t first_tile, int64_t last_tile) {
    forward_scratch();
    for (int64_t n = first_tile; n < last_tile; ++n) {
      const int begin = in.tiles[2 * n];
      forward_tile(begin, in.tiles[2 * n + 1] - begin, static_cast<int>(in.positions[begin]));
    }
  }

  void prefetch_row(const T* row) const {
    for (int e = 0; e < E; e += 64 / sizeof(T)) {
      __builtin_prefetch(row + e);
    }
  }

  // One operand's rows of n tokens at slots from `depth` on, as lanes of packed columns.
  void pack_columns(const Operand& operand, int begin, int n, int depth, Unit* packed) {
    for (int i = 0; i < n; ++i) {
      prefetch_row(row_of(operand, head, begin + smaller(i + AHEAD, n - 1)));
      copy_row<W>(row_of(operand, head, begin + i), E, packing, padded);
      const Unit* from = reinterpret_cast<const Unit*>(packing);
      const int slot = depth + i;
      Unit* to = packed + static_cast<int64_t>(slot / W) * units * W + slot % W;
      for (int u = 0; u < units; ++u) {
        to[static_cast<int64_t>(u) * W] = from[u];
      }
    }
  }

  // The same rows, each beside the one that it makes pairs with.
  void pair_slots(const Operand& operand, int begin, int n, int depth, Unit* pairs) {
    for (int i = 0; i < n; ++i) {
      prefetch_row(row_of(operand, head, begin + smaller(i + AHEAD, n - 1)));
      pair_row(row_of(operand, head, begin + i), depth + i, pairs);
    }
  }

  void pair_row(const T* from, int row, Unit* pairs) {
    Unit* to = pairs + static_cast<int64_t>(row / NUMBERS) * padded;
    for (int e = 0; e < padded; e += W) {
      store_paired<W>(to + e, row, load_up_to<W>(from + e, E - e));
    }
  }

  const T* tile_row(const Operand& operand, int begin, int r) const {
    return row_of(operand, head * G + r % G, begin + r / G);
  }

  T* tile_row(const Result& result, int begin, int r) const {
    return row_of(result, head * G + r % G, begin + r / G);
  }

  void load_rows(const Operand& operand, int begin, int count, Number* to) {
    for (int r = 0; r < count; ++r) {
      prefetch_row(tile_row(operand, begin, smaller(r + AHEAD, count - 1)));
      copy_row<W>(tile_row(operand, begin, r), E, to + static_cast<int64_t>(r) * padded, padded);
    }
  }

  // Columns of packed keys or values against rows of queries or their gradients.
  void score(int count, Span blocks, int first, const Number* rows, const Unit* columns, float* to, int stride) {
    multiply<W, N_BLOCKS>(
        count, blocks.end - blocks.begin, reinterpret_cast<const Unit*>(rows), padded / NUMBERS,
        columns + static_cast<int64_t>(first / W + blocks.begin) * units * W, units, to + blocks.begin * W, stride);
  }

  void forward_tile(int begin, int n, int depth) {
    pack_columns(in.k, begin, n, depth, key_columns);
    pair_slots(in.v, begin, n, depth, value_pairs);
    const int all = n * G;
    load_rows(in.q, begin, all, query_rows);
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
      const int64_t at = (head * G + r % G) * in.T + begin + r / G;
      write_row<W>(out + static_cast<int64_t>(r) * padded, E, 1 / row_sum[r], tile_row(in.out, begin, r));
      in.row_max[at] = row_max[r];
      in.row_sum[at] = row_sum[r];
    }
  }

  void forward_rows(int depth, int r, int count, int first, int columns) {
    const Span blocks = blocks_seen(depth, r, count, first, columns);
    if (blocks.end == blocks.begin) {
      return;
    }
    const int64_t row = static_cast<int64_t>(r) * padded;
    score(count, blocks, first, query_rows + row, key_columns, scores, CHUNK);
    for (int i = 0; i < count; ++i) {
      softmax_row(scores + i * CHUNK, blocks, seen(depth + (r + i) / G, first, columns), r + i, row_scale + i);
    }
    accumulate_seen(count, blocks, first, columns, scores, CHUNK, value_pairs, out + row, row_scale);
  }

  // C = scale * C + A B for rows of A that hold numbers of the keys in `blocks`, and B's pairs of keys.
  void accumulate_seen(
      int count,
      Span blocks,
      int first,
      int columns,
      const float* a,
      int stride,
      const Unit* pairs,
      float* c,
      const float* scale) {
    const int from = blocks.begin * W;
    const int to = smaller(blocks.end * W, columns);
    accumulate<W, N_BLOCKS>(
        count, padded / W, reinterpret_cast<const Unit*>(a) + from / NUMBERS, stride, 1,
        pairs + static_cast<int64_t>((first + from) / NUMBERS) * padded, padded, (to - from + NUMBERS - 1) / NUMBERS, c,
        padded, scale);
  }

  // One row of scores to numbers e^(score - maximum), in its place, with the running maximum and sum.
  void softmax_row(float* s, Span blocks, Span span, int r, float* scale) {
    const Int<W> lane = iota<W>();
    Float<W> most = Float<W>{} + MINUS_INFINITY;
    for (int b = blocks.begin; b < blocks.end; ++b) {
      Float<W> x = load<W>(s + b * W) * in.scale;
      if (capped) {
        x = tanh<W>(x / in.softcap) * in.softcap;
      }
      if (b * W < span.begin || (b + 1) * W > span.end) {
        x = masked(x, lane + b * W, span, MINUS_INFINITY);
      }
      store<W>(s + b * W, x);
      most = max<W>(x, most);
    }
    const float before = row_max[r];
    const float now = max_of<W>(most) > before ? max_of<W>(most) : before;
    const float shift = now == MINUS_INFINITY ? 0 : now;
    Number* numbers = reinterpret_cast<Number*>(s);
    for (int b = blocks.begin; b < blocks.end; ++b) {
      const Float<W> p = exp<W>(load<W>(s + b * W) - shift);
      store<W>(numbers + b * W, p);
    }
    // In a loop of its own: in the one above its sum finds no register, and each step waits for the last one's store.
    Float<W> total = {};
    for (int b = blocks.begin; b < blocks.end; ++b) {
      total += load<W>(numbers + b * W);
    }
    *scale = before == now ? 1 : exp<W>(Float<W>{} + (before - shift))[0];
    row_max[r] = now;
    row_sum[r] = row_sum[r] * *scale + sum<W>(total);
  }

  void backward_scratch() {
    const int64_t of_slots = static_cast<int64_t>(slots()) * padded;
    const int64_t of_rows = static_cast<int64_t>(rows()) * padded;
    take(packing, padded);
    take(key_columns, static_cast<int64_t>(slots()) * units);
    take(value_columns, static_cast<int64_t>(slots()) * units);
    take(key_pairs, of_slots / NUMBERS);
    take(query_rows, of_rows);
    take(grad_out_rows, of_rows);
    take(grad_q, of_rows);
    take(grad_k, of_slots);
    take(grad_v, of_slots);
    take(scores, ROWS * BACKWARD_CHUNK);
    take(probability_grads, ROWS * BACKWARD_CHUNK);
    take(probability_pairs, rows() / NUMBERS * BACKWARD_CHUNK);
    take(score_grad_pairs, rows() / NUMBERS * BACKWARD_CHUNK);
    take(row_max, rows());
    take(row_share, rows());
    take(row_delta, rows());
    take(owner, slots());
    if constexpr (NUMBERS == 1) {
      query_pairs = query_rows;
      grad_out_pairs = grad_out_rows;
    } else {
      take(query_pairs, of_rows / NUMBERS);
      take(grad_out_pairs, of_rows / NUMBERS);
    }
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
    pack_columns(in.k, begin, n, depth, key_columns);
    pair_slots(in.k, begin, n, depth, key_pairs);
    pack_columns(in.v, begin, n, depth, value_columns);
    for (int i = 0; i < n; ++i) {
      owner[depth + i] = begin + i;
    }
    filled = depth + n;
    std::memset(grad_k + static_cast<int64_t>(depth) * padded, 0, sizeof(float) * n * padded);
    std::memset(grad_v + static_cast<int64_t>(depth) * padded, 0, sizeof(float) * n * padded);
    const int all = n * G;
    load_rows_and_pairs(in.q, begin, all, query_rows, query_pairs);
    load_rows_and_pairs(in.grad_out, begin, all, grad_out_rows, grad_out_pairs);
    std::memset(grad_q, 0, sizeof(float) * all * padded);
    for (int r = 0; r < all; ++r) {
      prefetch_row(tile_row(in.out, begin, smaller(r + AHEAD, all - 1)));
      load_row_terms(r, begin);
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
      write_row<W>(grad_q + static_cast<int64_t>(r) * padded, E, in.scale, tile_row(in.grad_q, begin, r));
    }
  }

  void load_rows_and_pairs(const Operand& operand, int begin, int count, Number* rows, Unit* pairs) {
    load_rows(operand, begin, count, rows);
    if constexpr (NUMBERS > 1) {  // for a float they are the same
      for (int r = 0; r < count; ++r) {
        pair_row(tile_row(operand, begin, r), r, pairs);
      }
    }
  }

  void load_row_terms(int r, int begin) {
    const T* out_row = tile_row(in.out, begin, r);
    const T* grad_row = tile_row(in.grad_out, begin, r);
    Float<W> total = {};
    for (int e = 0; e < E; e += W) {
      total += load_up_to<W>(out_row + e, E - e) * load_up_to<W>(grad_row + e, E - e);
    }
    const int64_t h = head * G + r % G;
    const int64_t at = h * in.T + begin + r / G;
    row_delta[r] = sum<W>(total);
    row_max[r] = in.row_max[at];
    row_share[r] = 1 / in.row_sum[at];
    if (in.grad_sinks) {
      in.grad_sinks[at] = -row_delta[r] * row_share[r] * exp<W>(Float<W>{} + (in.sinks[h] - row_max[r]))[0];
    }
  }

  void backward_rows(int depth, int r, int count, int first, int columns) {
    const Span blocks = blocks_seen(depth, r, count, first, columns);
    // backward_keys reads blocks of keys of which these rows may see a part.
    for (int b = 0; b < (columns + W - 1) / W; ++b) {
      if (b < blocks.begin || b >= blocks.end) {
        for (int i = 0; i < count; ++i) {
          store_gradients(r + i, b, Float<W>{}, Float<W>{});
        }
      }
    }
    if (blocks.end == blocks.begin) {
      return;
    }
    const int64_t row = static_cast<int64_t>(r) * padded;
    score(count, blocks, first, query_rows + row, key_columns, scores, BACKWARD_CHUNK);
    score(count, blocks, first, grad_out_rows + row, value_columns, probability_grads, BACKWARD_CHUNK);
    for (int i = 0; i < count; ++i) {
      const Span span = seen(depth + (r + i) / G, first, columns);
      score_gradients(scores + i * BACKWARD_CHUNK, probability_grads + i * BACKWARD_CHUNK, blocks, span, r + i);
    }
    accumulate_seen(count, blocks, first, columns, probability_grads, BACKWARD_CHUNK, key_pairs, grad_q + row, nullptr);
  }

  // Block b of one row, where backward_keys finds it.
  void store_gradients(int r, int b, Float<W> probability, Float<W> score_grad) {
    const int64_t at = static_cast<int64_t>(r / NUMBERS) * BACKWARD_CHUNK + b * W;
    store_paired<W>(probability_pairs + at, r, probability);
    store_paired<W>(score_grad_pairs + at, r, score_grad);
  }

  // One row: scores to probabilities, and gradients of probabilities to gradients of scores, in their place too.
  void score_gradients(const float* s, float* grads, Span blocks, Span span, int r) {
    const Int<W> lane = iota<W>();
    for (int b = blocks.begin; b < blocks.end; ++b) {
      Float<W> x = load<W>(s + b * W) * in.scale;
      Float<W> slope = Float<W>{} + 1.0f;
      if (capped) {
        const Float<W> t = tanh<W>(x / in.softcap);
        slope = 1.0f - t * t;
        x = t * in.softcap;
      }
      const bool is_partial = b * W < span.begin || (b + 1) * W > span.end;
      if (is_partial) {
        x = masked(x, lane + b * W, span, MINUS_INFINITY);
      }
      const Float<W> probability = exp<W>(x - row_max[r]) * row_share[r];
      Float<W> score_grad = probability * (load<W>(grads + b * W) - row_delta[r]) * slope;
      if (is_partial) {
        score_grad = masked(score_grad, lane + b * W, span, 0);  // the key may be none of this path
      }
      store<W>(reinterpret_cast<Number*>(grads) + b * W, score_grad);
      store_gradients(r, b, probability, score_grad);
    }
  }

  // grad_v += Pᵀ grad_out and grad_k += dSᵀ q for the keys in slots [slot, slot + count), columns from j on.
  void backward_keys(int depth, int all, int slot, int count, int j) {
    const int from = larger(0, slot - depth) * G;  // rows before it see none of these keys
    const int to = in.window > 0 ? smaller(all, (slot + count - 1 + in.window - depth) * G) : all;
    if (from >= to) {
      return;
    }
    const int last = (to + NUMBERS - 1) / NUMBERS;
    for (int row = from / NUMBERS; row < last; row += SHORT_ROW_SUM) {
      const int rows = smaller(SHORT_ROW_SUM, last - row);
      const int64_t scores_at = static_cast<int64_t>(row) * BACKWARD_CHUNK + j;
      const int64_t rows_at = static_cast<int64_t>(row) * padded;
      const int64_t slot_at = static_cast<int64_t>(slot) * padded;
      accumulate<W, N_BLOCKS>(
          count, padded / W, probability_pairs + scores_at, 1, BACKWARD_CHUNK, grad_out_pairs + rows_at, padded, rows,
          grad_v + slot_at, padded, nullptr);
      accumulate<W, N_BLOCKS>(
          count, padded / W, score_grad_pairs + scores_at, 1, BACKWARD_CHUNK, query_pairs + rows_at, padded, rows,
          grad_k + slot_at, padded, nullptr);
    }
  }
};

template <int W, class T>
Kernels kernels() {
  return {
      [](const Problem& problem, bool is_backward) {
        Worker<W, T> worker(problem, 0, nullptr);
        is_backward ? worker.backward_scratch() : worker.forward_scratch();
        return worker.taken;
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
