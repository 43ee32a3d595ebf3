// The two matrix products of tree attention, in blocks of sums that stay in registers. Included as kernel.h is.
#pragma once

#include "../simd.h"

namespace latro::tree_attention {
namespace {

// Rows of a register block: with N_BLOCKS vectors beside each, they fill the registers without spilling.
constexpr int ROWS = 6;

// A product is summed in runs of this many, and then the runs. In one run it would err as eager's product does, and the
// gradients, whose probabilities are computed a second time here, 10 to 20 % more than eager's.
constexpr int SHORT_SUM = 32;

// What the products multiply, in units of 32 bits: a float or, where the instruction set multiplies them, a pair of
// bfloat16 that are neighbours in the sum. What is below takes either; rows and columns hold units.
template <class T, bool PAIRS = HAS_PAIRS>
struct Factor {
  using Number = float;
  using Unit = float;
};

template <>
struct Factor<Bfloat16, true> {
  using Number = Bfloat16;
  using Unit = uint32_t;
};

template <int W>
LATRO_INLINE Float<W> add_product(Float<W> sum, Float<W> b, float a) {
  return sum + b * a;
}

template <int W>
LATRO_INLINE Float<W> add_product(Float<W> sum, Bits<W> b, uint32_t a) {
  return add_dot<W>(sum, b, Bits<W>{} + a);
}

LATRO_INLINE int round_up(int x, int to) {
  return (x + to - 1) / to * to;
}

LATRO_INLINE int smaller(int a, int b) {
  return a < b ? a : b;
}

LATRO_INLINE int larger(int a, int b) {
  return a > b ? a : b;
}

// An initialiser would be a memset, and through memory.
template <int W, int M, int N>
LATRO_INLINE void set_to_zero(Float<W> (&sum)[M][N]) {
#pragma GCC unroll 8
  for (int r = 0; r < M; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      sum[r][n] = Float<W>{};
    }
  }
}

// C[r][block * W + lane] = sum_k A[r][k] * B[block][k][lane], for M rows and as many times N blocks of W columns as
// there are in `blocks`.
template <int W, int M, int N, class Unit>
void multiply_blocks(int blocks, const Unit* a, int lda, const Unit* b, int K, float* c, int ldc) {
  for (; blocks >= N; blocks -= N) {
    for (int first = 0; first < K; first += SHORT_SUM) {
      Float<W> sum[M][N];
      set_to_zero<W>(sum);
      for (int k = first; k < smaller(K, first + SHORT_SUM); ++k) {
        decltype(load<W>(b)) columns[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
          columns[n] = load<W>(b + (static_cast<int64_t>(n) * K + k) * W);
        }
#pragma GCC unroll 8
        for (int r = 0; r < M; ++r) {
          const Unit factor = a[static_cast<int64_t>(r) * lda + k];
#pragma GCC unroll 8
          for (int n = 0; n < N; ++n) {
            sum[r][n] = add_product<W>(sum[r][n], columns[n], factor);
          }
        }
      }
      for (int r = 0; r < M; ++r) {
        for (int n = 0; n < N; ++n) {
          float* to = c + r * ldc + n * W;
          store<W>(to, first ? load<W>(to) + sum[r][n] : sum[r][n]);
        }
      }
    }
    b += static_cast<int64_t>(N) * K * W;
    c += N * W;
  }
}

// C[r][0..N*W] = scale[r] * C[r] + sum_k A(r, k) * B[k][0..N*W], with A(r, k) = a[r * row + k * column].
template <int W, int M, int N, class Unit>
void accumulate_block(
    const Unit* a, int row, int column, const Unit* b, int ldb, int K, float* c, int ldc, const float* scale) {
  // From zero: a long sum errs less when it is put together from short ones.
  Float<W> sum[M][N];
  set_to_zero<W>(sum);
  for (int k = 0; k < K; ++k) {
    decltype(load<W>(b)) values[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      values[n] = load<W>(b + static_cast<int64_t>(k) * ldb + n * W);
    }
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r) {
      const Unit factor = a[static_cast<int64_t>(r) * row + static_cast<int64_t>(k) * column];
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        sum[r][n] = add_product<W>(sum[r][n], values[n], factor);
      }
    }
  }
  for (int r = 0; r < M; ++r) {
    for (int n = 0; n < N; ++n) {
      float* to = c + static_cast<int64_t>(r) * ldc + n * W;
      store<W>(to, load<W>(to) * (scale ? scale[r] : 1.0f) + sum[r][n]);
    }
  }
}

// Calls CALL(rows) with the number as a constant: the sums of a block then stay in registers.
#define LATRO_FOR_ROWS(rows, CALL) \
  switch (rows) {                  \
    case 1:                        \
      CALL(1);                     \
      break;                       \
    case 2:                        \
      CALL(2);                     \
      break;                       \
    case 3:                        \
      CALL(3);                     \
      break;                       \
    case 4:                        \
      CALL(4);                     \
      break;                       \
    case 5:                        \
      CALL(5);                     \
      break;                       \
    default:                       \
      CALL(6);                     \
  }

// Up to ROWS rows of A against `blocks` blocks of W packed columns, N at a time while they last.
template <int W, int N, class Unit>
void multiply(int rows, int blocks, const Unit* a, int lda, const Unit* b, int K, float* c, int ldc) {
#define LATRO_CALL(M) multiply_blocks<W, M, N>(blocks, a, lda, b, K, c, ldc)
  LATRO_FOR_ROWS(rows, LATRO_CALL)
#undef LATRO_CALL
  if constexpr (N > 1) {
    const int rest = blocks % N;
    const int done = blocks - rest;
    if (rest > 0) {
      multiply<W, N / 2>(rows, rest, a, lda, b + static_cast<int64_t>(done) * K * W, K, c + done * W, ldc);
    }
  }
}

// Up to ROWS rows of C, each of `blocks` vectors, N at a time while they last.
template <int W, int N, class Unit>
void accumulate(
    int rows,
    int blocks,
    const Unit* a,
    int row,
    int column,
    const Unit* b,
    int ldb,
    int K,
    float* c,
    int ldc,
    const float* scale) {
  for (; blocks >= N; blocks -= N) {
#define LATRO_CALL(M) accumulate_block<W, M, N>(a, row, column, b, ldb, K, c, ldc, scale)
    LATRO_FOR_ROWS(rows, LATRO_CALL)
#undef LATRO_CALL
    b += N * W;
    c += N * W;
  }
  if constexpr (N > 1) {
    if (blocks > 0) {
      accumulate<W, N / 2>(rows, blocks, a, row, column, b, ldb, K, c, ldc, scale);
    }
  }
}

}  // namespace
}  // namespace latro::tree_attention
