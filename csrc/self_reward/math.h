// The self-reward formulas and the arrays they run over, for host and device. Everything is double: log-probs of a long
// rationale are summed, then subtracted from sums of about the same size.
// M scored tokens, S segments, R rationales.
#pragma once

#include <cmath>
#include <cstdint>

#include "../host_device.h"

namespace latro::self_reward {

enum Kind : int64_t { RATIONALE = 0, ANSWER = 1, BASELINE = 2 };
enum class Kl { k1, k2, k3 };
enum class Scale { none, group, batch };

struct Options {
  double beta;
  double answer_weight;
  double floor;  // -inf: no floor
  Kl kl;
  Scale scale;
};

struct Range {
  int64_t begin;
  int64_t end;
};

// Added to a standard deviation before dividing by it; TRL's value.
constexpr double DEVIATION_EPSILON = 1e-4;

// One token's share of the KL to the reference; d = logp - ref_logp.
HOST_DEVICE inline double kl_term(Kl kl, double d) {
  switch (kl) {
    case Kl::k1:
      return d;
    case Kl::k2:
      return 0.5 * d * d;
    default:
      return std::expm1(-d) + d;
  }
}

// d kl_term / d logp, for the estimators that are differentiated (k1 enters through the reward).
HOST_DEVICE inline double kl_slope(Kl kl, double d) {
  return kl == Kl::k2 ? d : -std::expm1(-d);
}

HOST_DEVICE inline bool kl_in_reward(const Options& options) {
  return options.kl == Kl::k1 && options.beta != 0;
}

HOST_DEVICE inline bool kl_in_loss(const Options& options) {
  return options.kl != Kl::k1 && options.beta != 0;
}

HOST_DEVICE inline double reward(const Options& options, double answer_logp, double kl) {
  // Not fmax: a NaN must stay one.
  const double floored = answer_logp < options.floor ? options.floor : answer_logp;
  return kl_in_reward(options) ? floored - options.beta * kl : floored;
}

// The rationales that share the prompt of rationale r; prompt is sorted.
HOST_DEVICE inline Range group_of(const int64_t* prompt, int64_t R, int64_t r) {
  Range group = {r, r + 1};
  while (group.begin > 0 && prompt[group.begin - 1] == prompt[r]) {
    --group.begin;
  }
  while (group.end < R && prompt[group.end] == prompt[r]) {
    ++group.end;
  }
  return group;
}

HOST_DEVICE inline double deviation(const double* values, Range range) {
  const double n = static_cast<double>(range.end - range.begin);
  double sum = 0;
  for (int64_t i = range.begin; i < range.end; ++i) {
    sum += values[i];
  }
  const double mean = sum / n;
  double squares = 0;
  for (int64_t i = range.begin; i < range.end; ++i) {
    squares += (values[i] - mean) * (values[i] - mean);
  }
  return std::sqrt(squares / (n - 1));
}

// A_r = reward_r - mean of the other rewards of its prompt, scaled when asked.
HOST_DEVICE inline double leave_one_out(
    const Options& options, const double* reward, const int64_t* prompt, int64_t R, int64_t r) {
  const Range group = group_of(prompt, R, r);
  double others = 0;
  for (int64_t i = group.begin; i < group.end; ++i) {
    others += i == r ? 0 : reward[i];
  }
  const double advantage = reward[r] - others / static_cast<double>(group.end - group.begin - 1);
  if (options.scale == Scale::none) {
    return advantage;
  }
  const Range spread = options.scale == Scale::group ? group : Range{0, R};
  return advantage / (deviation(reward, spread) + DEVIATION_EPSILON);
}

// What one rationale adds to the loss.
HOST_DEVICE inline double loss_term(
    const Options& options, double advantage, double rationale_logp, double answer_logp, double kl) {
  const double policy = -(advantage * rationale_logp + options.answer_weight * answer_logp);
  return kl_in_loss(options) ? policy + options.beta * kl : policy;
}

// d loss / d logp of a rationale's token; d is not read unless the KL is in the loss.
HOST_DEVICE inline double rationale_coefficient(const Options& options, double advantage, double d) {
  return kl_in_loss(options) ? options.beta * kl_slope(options.kl, d) - advantage : -advantage;
}

HOST_DEVICE inline double answer_coefficient(const Options& options) {
  return -options.answer_weight;
}

template <class T>
struct Arguments {
  int64_t M, S, R;
  const T* logps;            // [M]
  const int64_t* segment;    // [M], sorted
  const int64_t* kind;       // [S]
  const int64_t* rationale;  // [S]
  const int64_t* option;     // [S]
  const int64_t* prompt;     // [R], sorted
  const T* ref_logps;        // [M], or null: the KL is not measured
  const T* advantage;        // [R], or null: leave one out
  Options options;
};

// log π/π0 of one rationale token; NaN where there is no reference to measure it against.
template <class T>
HOST_DEVICE double log_ratio(const Arguments<T>& in, int64_t m) {
  return in.ref_logps ? static_cast<double>(in.logps[m]) - static_cast<double>(in.ref_logps[m]) : NAN;
}

template <class T>
HOST_DEVICE bool is_right_answer(const Arguments<T>& in, int64_t segment) {
  return in.kind[segment] == ANSWER && in.option[segment] == 0;
}

template <class T>
HOST_DEVICE double advantage(const Arguments<T>& in, const double* reward, int64_t r) {
  return in.advantage ? static_cast<double>(in.advantage[r]) : leave_one_out(in.options, reward, in.prompt, in.R, r);
}

// d loss / d logps[m], reward and advantage held constant.
template <class T>
HOST_DEVICE double coefficient(const Arguments<T>& in, const double* advantage, int64_t m) {
  const int64_t s = in.segment[m];
  if (in.kind[s] == RATIONALE) {
    return rationale_coefficient(in.options, advantage[in.rationale[s]], log_ratio(in, m));
  }
  return is_right_answer(in, s) ? answer_coefficient(in.options) : 0;
}

// [R] each, before rounding to the dtype of the log-probs.
struct Exact {
  double* reward;
  double* advantage;
  double* kl;
  double* rationale_logp;
  double* answer_logp;
};

template <class T>
struct Results {
  T* loss;            // scalar
  T* reward;          // [R]
  T* advantage;       // [R]
  T* kl;              // [R]
  T* rationale_logp;  // [R]
  T* answer_logp;     // [R]
  T* coefficients;    // [M]
};

template <class T>
HOST_DEVICE void round_terms(const Exact& exact, const Results<T>& out, int64_t r) {
  out.reward[r] = static_cast<T>(exact.reward[r]);
  out.advantage[r] = static_cast<T>(exact.advantage[r]);
  out.kl[r] = static_cast<T>(exact.kl[r]);
  out.rationale_logp[r] = static_cast<T>(exact.rationale_logp[r]);
  out.answer_logp[r] = static_cast<T>(exact.answer_logp[r]);
}

template <class T>
HOST_DEVICE double loss_term(const Arguments<T>& in, const Exact& exact, int64_t r) {
  return loss_term(in.options, exact.advantage[r], exact.rationale_logp[r], exact.answer_logp[r], exact.kl[r]);
}

}  // namespace latro::self_reward
