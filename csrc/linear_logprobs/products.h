// Matrix products from packed operands, in blocks of sums that stay in registers. Included as kernel.h is.
//
// Along the axis that is summed, operands are units: a float, or a pair of bfloat16 where the instruction set
// multiplies pairs. One operand lies in panels of PANEL columns, [units][PANEL]; the other in rows, or packed as
// [units][ROWS].
#pragma once

#include "../simd.h"

namespace latro::linear_logprobs {
namespace {

template <int W>
constexpr int ROWS = W == 16 ? 12 : 6;  // with two vectors beside each, they fill the registers without spilling
template <int W>
constexpr int PANEL = 2 * W;

// Units that are summed before the sums go to memory: a panel of them takes 16 KiB of the first-level cache.
template <int W>
constexpr int DEPTH = 2048 / W;

// The same for logits, where a longer chain of roundings would err up to twice as much as eager; shorter for the
// portable set, whose products are rounded before they are added.
template <int W>
constexpr int CHAIN = W == 4 ? 16 : 128;

template <int W, class Unit>
struct Arithmetic;

template <int W>
struct Arithmetic<W, float> {
  typedef Float<W> Units;
  LATRO_INLINE Float<W> add(Float<W> sum, Units b, float a) {
    return sum + b * a;
  }
};

template <int W>
struct Arithmetic<W, uint32_t> {
  typedef Bits<W> Units;
  LATRO_INLINE Float<W> add(Float<W> sum, Units b, uint32_t a) {
    return add_dot<W>(sum, b, Bits<W>{} + a);
  }
};

// C[ROWS][PANEL] = or += A · B, with A(r, k) = a[r * row + k * step].
template <int W, class Unit>
LATRO_INLINE void multiply_block(
    int depth, const Unit* a, int64_t row, int64_t step, const Unit* b, float* c, int64_t ldc, bool add) {
  typedef typename Arithmetic<W, Unit>::Units Units;
  Float<W> sum[ROWS<W>][2] = {};
  for (int k = 0; k < depth; ++k) {
    Units low;
    Units high;
    std::memcpy(&low, b + k * PANEL<W>, sizeof(low));
    std::memcpy(&high, b + k * PANEL<W> + W, sizeof(high));
#pragma GCC unroll 16
    for (int r = 0; r < ROWS<W>; ++r) {
      const Unit factor = a[r * row + k * step];
      sum[r][0] = Arithmetic<W, Unit>::add(sum[r][0], low, factor);
      sum[r][1] = Arithmetic<W, Unit>::add(sum[r][1], high, factor);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS<W>; ++r) {
    float* to = c + r * ldc;
    store<W>(to, add ? load<W>(to) + sum[r][0] : sum[r][0]);
    store<W>(to + W, add ? load<W>(to + W) + sum[r][1] : sum[r][1]);
  }
}

// The same for A in rows of SLICE units, and for A packed [units][ROWS].
template <int W, int SLICE, class Unit>
void multiply_rows(int depth, const Unit* a, const Unit* b, float* c, int64_t ldc, bool add) {
  multiply_block<W, Unit>(depth, a, SLICE, 1, b, c, ldc, add);
}

template <int W, class Unit>
void multiply_packed(int depth, const Unit* a, const Unit* b, float* c, int64_t ldc, bool add) {
  multiply_block<W, Unit>(depth, a, 1, ROWS<W>, b, c, ldc, add);
}

// C = A · B for `rows` rows of A, a multiple of ROWS, and `columns` columns of panels that are `units` long. A lies in
// slices of SLICE units, [slices][most_rows][SLICE]: rows a power of two apart would share their places in the cache.
template <int W, int SLICE, class Unit>
void multiply(
    int rows, int most_rows, int64_t units, int columns, const Unit* a, const Unit* panels, float* c, int64_t ldc) {
  for (int64_t k = 0; k < units; k += SLICE, a += most_rows * SLICE) {
    const int depth = static_cast<int>(units - k < SLICE ? units - k : SLICE);
    for (int column = 0; column < columns; column += PANEL<W>) {
      const Unit* b = panels + column * units + k * PANEL<W>;
      for (int r = 0; r < rows; r += ROWS<W>) {
        multiply_rows<W, SLICE, Unit>(depth, a + r * SLICE, b, c + r * ldc + column, ldc, k > 0);
      }
    }
  }
}

}  // namespace
}  // namespace latro::linear_logprobs
