// The pieces of linear_logprobs that a thread computes, on vectors of W floats. Included once for each instruction set.
#pragma once

#include "problem.h"
#include "products.h"

namespace latro::linear_logprobs {
namespace {

// Vocabulary entries whose products are in the second-level cache at once, with columns of them beside.
constexpr int ENTRIES = 96;
constexpr int COLUMNS = 256;
constexpr int TILE_STRIDE = COLUMNS + 16;  // rows of a tile a power of two apart would share their places in the cache

// Tokens whose exponentials lie packed in that cache at once, for the gradient of hidden.
constexpr int GRAD_TOKENS = 192;

// Vectors of logits that become exponentials together, to hide each other's latency; and how many of them are summed
// before their sum is added to the strip's.
constexpr int FOLDED = 4;
constexpr int CHAINED = 16;

// Of a product whose logit does not count.
constexpr float TAKEN = -__builtin_inff();
// Its logit: minus infinity times its exponential would be NaN.
constexpr float LOWEST = -1e30f;

// A guess of the largest logit only has to be within e^60 of it.
constexpr int GUESSED = 64;

template <class Size>
LATRO_INLINE Size round_up(Size x, int to) {
  return (x + to - 1) / to * to;
}

LATRO_INLINE int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}

// Products of bfloat16 are of pairs where the instruction set has them, and otherwise of numbers widened to float.
template <class T>
struct UnitOf {
  typedef float Type;
  static constexpr int SIZE = 1;
};

#if LATRO_PAIRS != LATRO_PAIRS_NONE
template <>
struct UnitOf<Bfloat16> {
  typedef uint32_t Type;
  static constexpr int SIZE = 2;
};
#endif

LATRO_INLINE uint32_t pair(Bfloat16 low, Bfloat16 high) {
  return low.bits | static_cast<uint32_t>(high.bits) << 16;
}

// Copies of rows of numbers as units; zeros behind the last.
template <int W>
struct Copies {
  // Along a row: to[0..padded) from from[0..count).
  static void copy_units(const float* from, int64_t count, int64_t padded, float* to) {
    std::memcpy(to, from, sizeof(float) * count);
    std::memset(to + count, 0, sizeof(float) * (padded - count));
  }

  static void copy_units(const Bfloat16* from, int64_t count, int64_t padded, float* to) {
    int64_t i = 0;
    for (; i + W <= count; i += W) {
      store<W>(to + i, load<W>(from + i));
    }
    for (; i < count; ++i) {
      to[i] = to_float(from[i]);
    }
    std::memset(to + count, 0, sizeof(float) * (padded - count));
  }

  static void copy_units(const Bfloat16* from, int64_t count, int64_t padded, uint32_t* to) {
    std::memset(to + count / 2, 0, sizeof(uint32_t) * (padded - count / 2));
    std::memcpy(to, from, sizeof(Bfloat16) * count);
  }

  // Across rows that follow each other: a row of `count` numbers, beside the next when units are pairs.
  template <class T>
  static void copy_across(const T* from, const T* /*next*/, int64_t count, int64_t padded, float* to) {
    copy_units(from, count, padded, to);
  }

  static void copy_across(const Bfloat16* from, const Bfloat16* next, int64_t count, int64_t padded, uint32_t* to) {
    int64_t i = 0;
    for (; i + W <= count; i += W) {
      const Bits<W> low = (Bits<W>)load<W>(from + i) >> 16;
      const Bits<W> high = next ? (Bits<W>)load<W>(next + i) : Bits<W>{};
      const Bits<W> both = low | high;
      std::memcpy(to + i, &both, sizeof(both));
    }
    for (; i < count; ++i) {
      to[i] = pair(from[i], next ? next[i] : Bfloat16{0});
    }
    std::memset(to + count, 0, sizeof(uint32_t) * (padded - count));
  }
};

template <int W, class T>
struct Kernel {
  typedef typename UnitOf<T>::Type Unit;
  static constexpr int UNIT = UnitOf<T>::SIZE;
  static constexpr int P = PANEL<W>;
  static constexpr int R = ROWS<W>;
  static_assert(BLOCK_ROWS % R == 0 && ENTRIES % R == 0 && GRAD_TOKENS % BLOCK_ROWS == 0);
  static_assert(LANES % P == 0 && COLUMNS % P == 0 && LANES % (FOLDED * W) == 0);

  static int64_t units(int64_t count) {
    return (count + UNIT - 1) / UNIT;
  }

  static const T* row(const Rows& rows, int64_t index) {
    return static_cast<const T*>(rows.data) + index * rows.stride;
  }

  static int64_t packed_size(const Problem& in, int64_t padded) {
    const int64_t transposed = units(in.D) * padded;
    const int64_t scaled = units(padded) * round_up(in.D, P);
    return sizeof(Unit) * (transposed > scaled ? transposed : scaled);
  }

  static int64_t scratch_size(const Problem& in, int64_t padded) {
    const int64_t left = ENTRIES * round_up(units(in.D > padded ? in.D : padded), DEPTH<W>);
    const int64_t blocks = DEPTH<W> * (GRAD_TOKENS + HIDDEN_GRAD_COLUMNS);
    return (left > blocks ? left : blocks) + ENTRIES * TILE_STRIDE;
  }

  static void pack_hidden(const Problem& in, const Tokens& tokens, int64_t first, int64_t last, void* packed) {
    const int64_t depth = units(in.D);
    for (int64_t t = first; t < last; ++t) {
      Unit* to = static_cast<Unit*>(packed) + t / P * P * depth + t % P;
      const T* from = t < tokens.count ? row(in.hidden, tokens.rows[t]) : nullptr;
      for (int64_t k = 0; k < depth; ++k) {
        to[k * P] = from ? unit_along(from, k, in.D) : Unit{};
      }
    }
  }

  LATRO_INLINE Unit unit_along(const T* from, int64_t k, int64_t count) {
    if constexpr (UNIT == 1) {
      return to_float(from[k]);
    } else {
      return pair(from[2 * k], 2 * k + 1 < count ? from[2 * k + 1] : Bfloat16{0});
    }
  }

  static void pack_scaled(
      const Problem& in, const Tokens& tokens, const float* factor, int64_t first, int64_t last, void* packed) {
    const int64_t depth = units(tokens.padded);
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t column = first; column < last; column += P) {
        Unit* to = static_cast<Unit*>(packed) + column * depth + k * P;
        T scaled[UNIT][P];
        for (int part = 0; part < UNIT; ++part) {
          const int64_t t = k * UNIT + part;
          const T* from = t < tokens.count ? row(in.hidden, tokens.rows[t]) : nullptr;
          for (int i = 0; i < P; ++i) {
            from_float(scaled[part] + i, from && column + i < in.D ? to_float(from[column + i]) * factor[t] : 0);
          }
        }
        Copies<W>::copy_across(scaled[0], scaled[UNIT - 1], P, P, to);
      }
    }
  }

  // The left operand in slices of SLICE units, from row_of(i) for i < count, to a multiple of R rows.
  template <int SLICE, class RowOf>
  static int load_left(RowOf row_of, int count, int64_t length, Unit* left) {
    const int padded = round_up(count, R);
    for (int i = 0; i < padded; ++i) {
      const T* from = i < count ? row_of(i) : nullptr;
      Unit* to = left + i * SLICE;
      for (int64_t first = 0; first < length; first += SLICE * UNIT, to += ENTRIES * SLICE) {
        const int64_t part = smaller(SLICE * UNIT, length - first);
        if (from) {
          Copies<W>::copy_units(from + first, part, units(part), to);
        } else {
          std::memset(to, 0, sizeof(Unit) * units(part));
        }
      }
    }
    return padded;
  }

  // What becomes of a product of a hidden row and a weight row.
  struct Logit {
    Float<W> value;
    Float<W> slope;  // of the softcap
  };

  LATRO_INLINE Logit logit(const Problem& in, Float<W> product, float bias, Float<W> scale, Float<W> inverse) {
    if (in.softcap <= 0) {
      return {product * scale + bias * scale, Float<W>{} + 1};
    }
    const Float<W> t = tanh<W>((product + bias) * (in.logit_scale / in.softcap));
    return {t * in.softcap * inverse, 1 - t * t};
  }

  LATRO_INLINE float bias(const Problem& in, int64_t entry) {
    return in.bias ? in.bias[entry] : 0;
  }

  static void guess(
      const Problem& in,
      const Tokens& tokens,
      const void* packed,
      int64_t first,
      int64_t last,
      float* shift,
      float* scratch) {
    float* tile = scratch;
    Unit* left = reinterpret_cast<Unit*>(scratch + ENTRIES * TILE_STRIDE);
    const int count = static_cast<int>(smaller(GUESSED, in.V));
    const auto entry = [&](int i) { return i * in.V / count; };
    const int rows = load_left<CHAIN<W>>([&](int i) { return row(in.weight, entry(i)); }, count, in.D, left);
    const int64_t depth = units(in.D);
    for (int64_t t = first; t < last; t += COLUMNS) {
      const int columns = static_cast<int>(smaller(COLUMNS, last - t));
      multiply<W, CHAIN<W>, Unit>(
          rows, ENTRIES, depth, columns, left, static_cast<const Unit*>(packed) + t * depth, tile, TILE_STRIDE);
      for (int j = 0; j < columns; j += W) {
        Float<W> most = Float<W>{} - __builtin_inff();
        for (int i = 0; i < count; ++i) {
          const Float<W> z = logit(
                                 in, load<W>(tile + i * TILE_STRIDE + j), bias(in, entry(i)),
                                 load<W>(tokens.scale + t + j), load<W>(tokens.inv_temperature + t + j))
                                 .value;
          most = max<W>(z, most);
        }
        const Float<W> none = Float<W>{} - __builtin_inff();
        store<W>(shift + t + j, most == none ? Float<W>{} : most);
      }
    }
  }

  static void exponentials(
      const Problem& in,
      const Tokens& tokens,
      const void* packed,
      const float* shift,
      Entries entries,
      const Sums* sums,
      const Exponentials* out,
      float* scratch) {
    float* tile = scratch;
    Unit* left = reinterpret_cast<Unit*>(scratch + ENTRIES * TILE_STRIDE);
    const int64_t depth = units(in.D);
    if (sums) {
      for (int64_t t = 0; t < tokens.padded; ++t) {
        sums->most[t] = LOWEST;
        sums->sum[t] = sums->weighted[t] = 0;
      }
    }
    for (int64_t v = entries.begin; v < entries.end; v += ENTRIES) {
      const int count = static_cast<int>(smaller(ENTRIES, entries.end - v));
      const int rows = load_left<CHAIN<W>>([&](int i) { return row(in.weight, v + i); }, count, in.D, left);
      const Entries targets = targets_of(tokens, v, v + count);
      for (int64_t t = 0; t < tokens.padded; t += COLUMNS) {
        const int columns = static_cast<int>(smaller(COLUMNS, tokens.padded - t));
        multiply<W, CHAIN<W>, Unit>(
            rows, ENTRIES, depth, columns, left, static_cast<const Unit*>(packed) + t * depth, tile, TILE_STRIDE);
        take_targets(in, tokens, shift, targets, v, t, columns, sums, tile);
        if (sums) {
          fold_tile<true>(in, tokens, shift, v, count, t, columns, out != nullptr, tile, *sums);
        } else {
          fold_tile<false>(in, tokens, shift, v, count, t, columns, true, tile, Sums{});
        }
        // A row at a time: the rows lie far apart, each on a page of its own.
        for (int i = 0; out && i < count; ++i) {
          T* to = static_cast<T*>(out->data) + (v - entries.begin + i) * out->stride + t;
          add_or_set(tile + i * TILE_STRIDE, columns, false, to);
        }
      }
    }
  }

  // The targets of entries [begin, end), as a range of tokens.targets.
  static Entries targets_of(const Tokens& tokens, int64_t begin, int64_t end) {
    const auto first_from = [&](int64_t entry) {
      int64_t low = 0;
      int64_t high = tokens.target_count;
      while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (tokens.targets[middle].entry < entry) {
          low = middle + 1;
        } else {
          high = middle;
        }
      }
      return low;
    };
    return {first_from(begin), first_from(end)};
  }

  // Reads the targets' logits, and marks their products: 1 - p is a sum of the others, not a difference.
  static void take_targets(
      const Problem& in,
      const Tokens& tokens,
      const float* shift,
      Entries targets,
      int64_t v,
      int64_t t,
      int columns,
      const Sums* sums,
      float* tile) {
    for (int64_t i = targets.begin; i < targets.end; ++i) {
      const Target target = tokens.targets[i];
      if (target.token < t || target.token >= t + columns) {
        continue;
      }
      float* product = tile + (target.entry - v) * TILE_STRIDE + target.token - t;
      if (sums) {
        const Logit at = logit(
            in, Float<W>{} + *product, bias(in, target.entry), Float<W>{} + tokens.scale[target.token],
            Float<W>{} + tokens.inv_temperature[target.token]);
        sums->target[i] = at.value[0] - shift[target.token];
        sums->slope[i] = at.slope[0];
      }
      *product = TAKEN;
    }
  }

  // Products to exponentials, which stay in the tile to be kept, and their sums down the columns.
  template <bool SUM>
  static void fold_tile(
      const Problem& in,
      const Tokens& tokens,
      const float* shifts,
      int64_t v,
      int count,
      int64_t t,
      int columns,
      bool keep,
      float* tile,
      Sums sums) {
    constexpr int N = FOLDED;
    for (int j = 0; j < columns; j += N * W) {
      const int64_t at = t + j;
      Float<W> scale[N], inverse[N], shift[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        scale[n] = load<W>(tokens.scale + at + n * W);
        inverse[n] = load<W>(tokens.inv_temperature + at + n * W);
        shift[n] = load<W>(shifts + at + n * W);
      }
      for (int first = 0; first < count; first += CHAINED) {
        const int last = first + CHAINED < count ? first + CHAINED : count;
        Float<W> x[CHAINED][N], slope[CHAINED][N], most[N], sum[N] = {}, weighted[N] = {};
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
          most[n] = Float<W>{} + LOWEST;
        }
        for (int i = first; i < last; ++i) {
          const float b = bias(in, v + i);
#pragma GCC unroll 4
          for (int n = 0; n < N; ++n) {
            const Float<W> product = load<W>(tile + i * TILE_STRIDE + j + n * W);
            const Logit z = logit(in, product, b, scale[n], inverse[n]);
            const Float<W> above = z.value - shift[n];
            const Float<W> low = Float<W>{} + LOWEST;
            x[i - first][n] = ((above < low) | (product == TAKEN)) ? low : above;
            if (in.softcap > 0) {
              slope[i - first][n] = z.slope;
            }
            most[n] = max<W>(x[i - first][n], most[n]);
          }
        }
        for (int i = first; i < last; ++i) {
#pragma GCC unroll 4
          for (int n = 0; n < N; ++n) {
            const Float<W> e = exp<W>(x[i - first][n]);
            if (SUM) {
              sum[n] += e;
              weighted[n] += e * (x[i - first][n] - most[n]);
            }
            if (keep) {
              store<W>(tile + i * TILE_STRIDE + j + n * W, in.softcap > 0 ? e * slope[i - first][n] : e);
            }
          }
        }
        if (SUM) {
#pragma GCC unroll 4
          for (int n = 0; n < N; ++n) {
            add_sums(most[n], sum[n], weighted[n], at + n * W, sums);
          }
        }
      }
    }
  }

  // Exponentials are weighted by how far their logits lie below the largest so far: where one has nearly all of the
  // sum, the entropy is made of what is left.
  LATRO_INLINE void add_sums(Float<W> most, Float<W> sum, Float<W> weighted, int64_t at, Sums to) {
    const Float<W> most_before = load<W>(to.most + at);
    const Float<W> sum_before = load<W>(to.sum + at);
    const Float<W> top = max<W>(most, most_before);
    const Float<W> moved = sum_before * (most_before - top) + sum * (most - top);
    store<W>(to.most + at, top);
    store<W>(to.sum + at, sum_before + sum);
    store<W>(to.weighted + at, load<W>(to.weighted + at) + weighted + moved);
  }

  static void hidden_grad(
      const Problem& in,
      const Exponentials& kept,
      Entries entries,
      int64_t first_token,
      int64_t last_token,
      int64_t first_column,
      int64_t last_column,
      bool add,
      float* grad,
      int64_t stride,
      float* scratch) {
    const int64_t columns = last_column - first_column;
    const int64_t width = smaller(columns, in.D - first_column);
    Unit* left = reinterpret_cast<Unit*>(scratch);
    Unit* right = left + DEPTH<W> * GRAD_TOKENS;
    for (int64_t v = entries.begin; v < entries.end; v += DEPTH<W> * UNIT) {
      const Entries part = {v, smaller(entries.end, v + DEPTH<W> * UNIT)};
      const int depth = static_cast<int>(units(part.end - part.begin));
      pack_across<P>(row(in.weight, v) + first_column, in.weight.stride, part, width, right);
      const T* e = static_cast<const T*>(kept.data) + (v - entries.begin) * kept.stride;
      for (int64_t first = first_token; first < last_token; first += GRAD_TOKENS) {
        const int64_t tokens = smaller(GRAD_TOKENS, last_token - first);
        pack_across<R>(e + first, kept.stride, part, tokens, left);
        for (int64_t column = 0; column < columns; column += P) {
          for (int64_t t = 0; t < tokens; t += R) {
            multiply_packed<W, Unit>(
                depth, left + t * depth, right + column * depth, grad + (first + t) * stride + first_column + column,
                stride, add || v > entries.begin);
          }
        }
      }
    }
  }

  // Rows of `count` numbers, one for each entry, as panels of SIZE columns.
  template <int SIZE>
  static void pack_across(const T* from, int64_t stride, Entries entries, int64_t count, Unit* to) {
    const int64_t depth = units(entries.end - entries.begin);
    for (int64_t k = 0; k < depth; ++k) {
      const T* first = from + k * UNIT * stride;
      const bool alone = (k + 1) * UNIT > entries.end - entries.begin;
      split<SIZE>(first, alone ? nullptr : first + stride, count, to + k * SIZE, depth * SIZE);
    }
  }

  // A row in pieces of SIZE units, each `stride` after the one before; zeros behind the last.
  template <int SIZE>
  static void split(const T* from, const T* next, int64_t count, Unit* to, int64_t stride) {
    int64_t i = 0;
    for (; i + SIZE <= count; i += SIZE, to += stride) {
      if constexpr (sizeof(T) == sizeof(Unit)) {
        std::memcpy(to, from + i, sizeof(Unit) * SIZE);  // of constant size: no call
      } else {
        Copies<W>::copy_across(from + i, next ? next + i : nullptr, SIZE, SIZE, to);
      }
    }
    if (i < count) {
      Copies<W>::copy_across(from + i, next ? next + i : nullptr, count - i, SIZE, to);
    }
  }

  static void weight_grad(
      const Problem& in,
      const Tokens& tokens,
      const void* scaled,
      const Exponentials& kept,
      Entries entries,
      const WeightGrad& grad,
      float* scratch) {
    float* tile = scratch;
    Unit* left = reinterpret_cast<Unit*>(scratch + ENTRIES * TILE_STRIDE);
    const int64_t depth = units(tokens.padded);
    for (int64_t v = entries.begin; v < entries.end; v += ENTRIES) {
      const int count = static_cast<int>(smaller(ENTRIES, entries.end - v));
      const T* e = static_cast<const T*>(kept.data) + (v - entries.begin) * kept.stride;
      const int rows = load_left<DEPTH<W>>([&](int i) { return e + i * kept.stride; }, count, tokens.padded, left);
      const Entries targets = targets_of(tokens, v, v + count);
      for (int64_t column = 0; grad.data && column < in.D; column += COLUMNS) {
        const int columns = static_cast<int>(smaller(COLUMNS, round_up(in.D, P) - column));
        multiply<W, DEPTH<W>, Unit>(
            rows, ENTRIES, depth, columns, left, static_cast<const Unit*>(scaled) + column * depth, tile, TILE_STRIDE);
        add_targets(in, tokens, targets, v, column, columns, grad, tile);
        for (int i = 0; i < count; ++i) {
          const int64_t at = (v - entries.begin + i) * in.D + column;
          write_grad(tile + i * TILE_STRIDE, smaller(columns, in.D - column), at, grad);
        }
      }
      for (int i = 0; grad.bias && i < count; ++i) {
        grad.bias[v + i] += bias_grad(tokens, e + i * kept.stride, grad.factor);
      }
      for (int64_t i = targets.begin; grad.bias && i < targets.end; ++i) {
        grad.bias[tokens.targets[i].entry] += grad.target_factor[i];
      }
    }
  }

  static void add_targets(
      const Problem& in,
      const Tokens& tokens,
      Entries targets,
      int64_t v,
      int64_t column,
      int columns,
      const WeightGrad& grad,
      float* tile) {
    for (int64_t i = targets.begin; i < targets.end; ++i) {
      const T* from = row(in.hidden, tokens.rows[tokens.targets[i].token]) + column;
      float* to = tile + (tokens.targets[i].entry - v) * TILE_STRIDE;
      add_scaled(from, smaller(columns, in.D - column), grad.target_factor[i], to);
    }
  }

  static void add_scaled(const T* from, int64_t count, float factor, float* to) {
    int64_t i = 0;
    for (; i + W <= count; i += W) {
      store<W>(to + i, load<W>(to + i) + load<W>(from + i) * factor);
    }
    for (; i < count; ++i) {
      to[i] += to_float(from[i]) * factor;
    }
  }

  static float bias_grad(const Tokens& tokens, const T* e, const float* factor) {
    double total = 0;
    for (int64_t first = 0; first < tokens.padded; first += CHAIN<W>) {
      Float<W> part = {};
      for (int64_t t = first; t < smaller(first + CHAIN<W>, tokens.padded); t += W) {
        part += load<W>(e + t) * load<W>(factor + t);
      }
      total += sum<W>(part);
    }
    return static_cast<float>(total);
  }

  static void write_grad(const float* from, int64_t count, int64_t at, const WeightGrad& grad) {
    if (grad.is_float) {
      add_or_set(from, count, grad.accumulate, static_cast<float*>(grad.data) + at);
    } else {
      add_or_set(from, count, grad.accumulate, static_cast<T*>(grad.data) + at);
    }
  }

  template <class To>
  static void add_or_set(const float* from, int64_t count, bool add, To* to) {
    int64_t i = 0;
    for (; i + W <= count; i += W) {
      store<W>(to + i, add ? load<W>(to + i) + load<W>(from + i) : load<W>(from + i));
    }
    for (; i < count; ++i) {
      from_float(to + i, add ? to_float(to[i]) + from[i] : from[i]);
    }
  }

  static void add_weight_row(const Problem& in, int64_t entry, float factor, float* to) {
    add_scaled(row(in.weight, entry), in.D, factor, to);
  }

  static void add_to_row(const float* from, int64_t D, void* to) {
    add_or_set(from, D, true, static_cast<T*>(to));
  }
};

template <int W, class T>
constexpr Kernels kernels() {
  typedef Kernel<W, T> K;
  return {
      K::P,           K::packed_size, K::scratch_size,   K::pack_hidden, K::pack_scaled, K::guess, K::exponentials,
      K::hidden_grad, K::weight_grad, K::add_weight_row, K::add_to_row,
  };
}

}  // namespace
}  // namespace latro::linear_logprobs
