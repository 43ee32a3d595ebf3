// The arithmetic of the linear head on a GPU, for host and device.
//
// Logits are in bits, natural ones times log2 e. What they are exponentiated from, an offset, is a whole number: the
// target's logit, rounded, and for a tile that is far above it `steps` more. So rescaling multiplies by a power of two,
// which is exact. A token's target is in no sum: 1 - p is the share of the others, and nothing cancels.
//
// M scored tokens, V entries of a strip of the vocabulary, D hidden.
#pragma once

#include <cmath>
#include <cstdint>

#include "../host_device.h"

namespace latro::head {

constexpr float LN_2 = 0.6931471805599453f;

// How far, in bits, a logit may be above its offset. Then E, its sum over 10^6 entries, and a coefficient of 10^-9 over
// that sum are normal numbers of bfloat16 and float32; what rounds to zero is below 2^-68 of the largest.
constexpr float MOST = 58;
// The steps of a tile that has no finite logit: any other's are more.
constexpr float NOWHERE = -3.4e38f;
// A guess beyond it is none, so that a guess and steps add up exactly.
constexpr float MOST_GUESS = 1 << 20;
// Of float16, which has not the range for a guess: E = 2^14 p, far from its smallest number, and about exact at p = 1.
constexpr float HEADROOM = 14;

// Rows of the state [STATE_ROWS, M].
enum State {
  TEMPERATURE,
  GUESS,    // the target's logit as a whole number, 0 where it is too far from 0
  GUESSED,  // 1, or 0 where it is
  LOGIT,    // of the target
  SLOPE,    // of the softcap there
  HIGHEST,  // of the other logits that have been seen
  SHIFT,    // the offset of the whole row, and of E that is made again
  TOTAL,    // of 2^(logit - SHIFT), with the target's
  ENTRY,    // what E would hold at the target to have the right gradient: TOTAL (p - 1) SLOPE
  STATE_ROWS,
};

// Planes of the partials [PARTIALS, tiles, M], of the others in a tile.
enum Partial {
  TILE_HIGHEST,
  TILE_SUM,     // of 2^(logit - offset)
  TILE_MOMENT,  // of 2^(logit - offset) (logit - TILE_HIGHEST)
  PARTIALS,
};

// What is added to the guess to be the offset of logits up to `highest`; it grows with it.
HOST_DEVICE inline float steps(float highest, float guess, bool guessed) {
  const float distance = highest - guess;
  if (distance > MOST) {
    return std::ceil(distance);
  }
  if (!guessed && distance < -MOST) {
    return std::fmax(std::ceil(distance), NOWHERE);
  }
  return 0;
}

// The head's numbers for one token: logit = cap * tanh(rate * product), or rate * product without a softcap.
struct Scale {
  float rate;
  float cap;
  // What rounding took from the factor that has log2 e in it, as a share of it: it would be off in every logit alike.
  // Positive, so that an infinity stays one.
  float rest;
};

struct Factor {
  float rounded;
  float rest;
};

HOST_DEVICE inline Factor factor_of(double exact) {
  float rounded = static_cast<float>(exact);
  if (std::fabs(rounded) > std::fabs(exact)) {
    rounded = std::nextafter(rounded, 0.0f);
  }
  const float rest = static_cast<float>((exact - rounded) / rounded);
  return {rounded, rest > 0 ? rest : 1e-30f};
}

HOST_DEVICE inline Scale scale_of(float temperature, float logit_scale, float softcap) {
  constexpr double LOG2_E = 1.4426950408889634;
  if (softcap > 0) {
    const Factor cap = factor_of(LOG2_E * softcap / temperature);
    return {logit_scale / softcap, cap.rounded, cap.rest};
  }
  const Factor rate = factor_of(LOG2_E * logit_scale / temperature);
  return {rate.rounded, 0, rate.rest};
}

template <bool SOFTCAP>
HOST_DEVICE inline float logit_of(float product, Scale scale) {
  const float logit = SOFTCAP ? scale.cap * std::tanh(scale.rate * product) : scale.rate * product;
  return logit + logit * scale.rest;
}

// 1 - tanh^2, without its cancellation where the logit is near the cap.
HOST_DEVICE inline float slope_of(float product, Scale scale) {
  const float decay = std::exp(-2 * std::fabs(scale.rate * product));
  return 4 * decay / ((1 + decay) * (1 + decay));
}

// What a moment counts of a logit: an impossible entry has none, not 0 * inf.
HOST_DEVICE inline float moment_of(float exponential, float logit, float highest) {
  constexpr float LOWEST = -1000;
  return exponential * std::fmax(logit - highest, LOWEST);
}

// The others of one token, over all tiles: sums relative to the row's offset, the moment to `top`.
struct Others {
  float sum;
  float moment;
};

struct Token {
  float logp;
  float entropy;
  float shift;
  float total;
  float entry;
};

// Adds a tile's sums to the row's.
HOST_DEVICE inline void add_tile(
    Others& others, float tile_highest, float sum, float moment, float tile_steps, float row_steps, float top) {
  const float factor = std::exp2(tile_steps - row_steps);
  others.sum += factor * sum;
  others.moment += factor * (moment + moment_of(sum, tile_highest, top));
}

// top: the highest logit, the target's or another's.
HOST_DEVICE inline Token finish(Others others, float logit, float slope, float offset, float top, bool headroom) {
  const float own = logit == INFINITY ? NAN : std::exp2(logit - offset);
  const float total = others.sum + own;
  Token token;
  token.logp = logit - offset > -60 ? -std::log1p(others.sum / own) : (logit - offset) * LN_2 - std::log(total);
  const float above = std::rint(top - offset);
  const float moment = own == 0 ? others.moment : others.moment + own * (logit - top);
  token.entropy = std::log(total * std::exp2(-above)) - (top - offset - above + moment / total) * LN_2;
  token.shift = headroom ? offset + (std::log2(total) - HEADROOM) : offset;
  const float factor = std::exp2(offset - token.shift);
  token.total = total * factor;
  token.entry = -others.sum * factor * slope;
  return token;
}

// What is made of the products of hidden [M, D] and a strip of the vocabulary: statistics of its tiles, E, or both.
template <class T>
struct Finish {
  int64_t M;
  int64_t V;        // of the strip
  int64_t first_v;  // where it begins
  float logit_scale;
  float softcap;           // 0: none
  const int64_t* targets;  // [M]
  const T* bias;           // [V] of the strip, or null
  float* state;            // [STATE_ROWS, M]
  T* exponentials;  // E [M, stride_e] from the strip's first column on, or null; 16-byte aligned, as the stride is
  int64_t stride_e;
  float* partials;  // [PARTIALS, tiles, M] or null: then E has the offset SHIFT
  int64_t tiles;
  int64_t first_tile;  // the strip's in partials

  HOST_DEVICE void write_partials(int64_t m, int64_t tile, float highest, float sum, float moment) const {
    float* of_tile = partials + (first_tile + tile) * M + m;
    of_tile[TILE_HIGHEST * tiles * M] = highest;
    of_tile[TILE_SUM * tiles * M] = sum;
    of_tile[TILE_MOMENT * tiles * M] = moment;
  }
};

}  // namespace latro::head
