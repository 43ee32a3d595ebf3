// Vectors of W floats in the compiler's own vector extension: one source for AVX-512, AVX2, SSE2 and NEON.
// Everything here has internal linkage: it is compiled once for each instruction set, and the copies must not mix.
#pragma once

#include <cstdint>
#include <cstring>

// How LATRO_PAIRS, which the including file defines, multiplies pairs of bfloat16: not at all (they are widened to
// float32 first), by AVX-512's instruction, or in portable C++ as that does.
#define LATRO_PAIRS_NONE 0
#define LATRO_PAIRS_AVX512 1
#define LATRO_PAIRS_EMULATED 2

#define LATRO_INLINE static inline __attribute__((always_inline))

namespace latro {
namespace {

template <int W>
struct Vector {
  typedef float F __attribute__((vector_size(W * sizeof(float))));
  typedef int32_t I __attribute__((vector_size(W * sizeof(int32_t))));
  typedef uint32_t U __attribute__((vector_size(W * sizeof(uint32_t))));  // for bits: a NaN's may overflow an int
  typedef uint16_t H __attribute__((vector_size(W * sizeof(uint16_t))));
};
template <int W>
using Float = typename Vector<W>::F;
template <int W>
using Int = typename Vector<W>::I;
template <int W>
using Bits = typename Vector<W>::U;

struct Bfloat16 {
  uint16_t bits;
};

template <int W>
LATRO_INLINE Float<W> load(const float* p) {
  Float<W> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <int W>
LATRO_INLINE void store(float* p, Float<W> v) {
  std::memcpy(p, &v, sizeof(v));
}

template <int W>
LATRO_INLINE Bits<W> load(const uint32_t* p) {
  Bits<W> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <int W>
LATRO_INLINE void store(uint32_t* p, Bits<W> v) {
  std::memcpy(p, &v, sizeof(v));
}

template <int W>
LATRO_INLINE Float<W> load(const Bfloat16* p) {
  typename Vector<W>::H half;
  std::memcpy(&half, p, sizeof(half));
  return (Float<W>)(__builtin_convertvector(half, Bits<W>) << 16);
}

// The bits of v as bfloat16, to nearest even; a NaN stays one.
#if LATRO_PAIRS == LATRO_PAIRS_AVX512
template <int W>
LATRO_INLINE typename Vector<W>::H to_bfloat16(Float<W> v) {
  static_assert(W == 16);
  return (typename Vector<W>::H)_mm512_cvtneps_pbh((__m512)v);
}
#else
template <int W>
LATRO_INLINE typename Vector<W>::H to_bfloat16(Float<W> v) {
  const Bits<W> bits = (Bits<W>)v;
  const Bits<W> rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Bits<W> kept = v == v ? rounded : (bits >> 16) | 0x40;
  return __builtin_convertvector(kept, typename Vector<W>::H);
}
#endif

template <int W>
LATRO_INLINE void store(Bfloat16* p, Float<W> v) {
  const typename Vector<W>::H half = to_bfloat16<W>(v);
  std::memcpy(p, &half, sizeof(half));
}

LATRO_INLINE float to_float(float x) {
  return x;
}

LATRO_INLINE float to_float(Bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

LATRO_INLINE void from_float(float* p, float x) {
  *p = x;
}

LATRO_INLINE void from_float(Bfloat16* p, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  p->bits = static_cast<uint16_t>(x == x ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : (bits >> 16) | 0x40);
}

constexpr bool HAS_PAIRS = LATRO_PAIRS != LATRO_PAIRS_NONE;

#if LATRO_PAIRS == LATRO_PAIRS_AVX512
// sum + a.low * b.low + a.high * b.high, for pairs of bfloat16 in 32 bits.
template <int W>
LATRO_INLINE Float<W> add_dot(Float<W> sum, Bits<W> a, Bits<W> b) {
  static_assert(W == 16);
  return (Float<W>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
#else
template <int W>
LATRO_INLINE Float<W> add_dot(Float<W> sum, Bits<W> a, Bits<W> b) {
  const Float<W> high = (Float<W>)(a & 0xffff0000u) * (Float<W>)(b & 0xffff0000u) + sum;
  return (Float<W>)(a << 16) * (Float<W>)(b << 16) + high;
}
#endif

template <int W>
LATRO_INLINE Int<W> iota() {
  Int<W> v;
  for (int i = 0; i < W; ++i) {
    v[i] = i;
  }
  return v;
}

template <int W>
LATRO_INLINE float sum(Float<W> v) {
  float total = 0;
  for (int i = 0; i < W; ++i) {
    total += v[i];
  }
  return total;
}

template <int W>
LATRO_INLINE Float<W> max(Float<W> a, Float<W> b) {
  return a > b ? a : b;
}

template <int W>
LATRO_INLINE float max_of(Float<W> v) {
  float most = v[0];
  for (int i = 1; i < W; ++i) {
    most = v[i] > most ? v[i] : most;
  }
  return most;
}

// e^x for x <= 88, as Cephes' expf has it: 2^n e^f with |f| <= ln 2 / 2. 0 from -88 down.
template <int W>
LATRO_INLINE Float<W> exp(Float<W> x) {
  const Float<W> low = Float<W>{} - 88.0f;
  const Float<W> clamped = x < low ? low : x;
  const Float<W> shifter = Float<W>{} + (12582912.0f + 127);  // 1.5 * 2^23, which rounds to an integer; 127 is 2^0
  const Float<W> shifted = clamped * 1.44269504f + shifter;
  const Float<W> n = shifted - shifter;
  const Float<W> f =
      (clamped - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts: n times the first is exact
  Float<W> p = Float<W>{} + 1.9875691500e-4f;
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * (f * f) + f + 1.0f;
  // The integer sits in the low bits of the shifted number; at -88 it is 0, and so is the power.
  return p * (Float<W>)(((Bits<W>)shifted) << 23);
}

// Cephes' tanhf: a polynomial near 0, where 1 - 2 / (e^2x + 1) cancels.
template <int W>
LATRO_INLINE Float<W> tanh(Float<W> x) {
  const Float<W> a = x < 0.0f ? -x : x;
  const Float<W> z = x * x;
  Float<W> p = Float<W>{} - 5.70498872745e-3f;
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const Float<W> near = p * z * x + x;
  const Float<W> far = 1.0f - 2.0f / (exp<W>((a > 20.0f ? Float<W>{} + 20.0f : a) * 2.0f) + 1.0f);
  return a < 0.625f ? near : (x < 0.0f ? -far : far);
}

}  // namespace
}  // namespace latro
