// self_reward for CPU tensors. One thread: the work is a few additions per scored token.

#include <torch/csrc/stable/library.h>

#include <vector>

#include "call.h"

namespace latro::self_reward {
namespace {

void check_index(const char* name, const int64_t* index, int64_t size, int64_t limit) {
  for (int64_t i = 0; i < size; ++i) {
    require(
        0 <= index[i] && index[i] < limit, OP, ": ", name, " must be in [0, ", limit, "), got ", index[i], " at index ",
        i);
  }
}

void check_sorted(const char* name, const int64_t* index, int64_t size) {
  for (int64_t i = 1; i < size; ++i) {
    require(
        index[i - 1] <= index[i], OP, ": ", name, " must be sorted, got ", index[i - 1], " before ", index[i],
        " at index ", i);
  }
}

template <class T>
void check_one_segment_each(const Arguments<T>& in) {
  std::vector<int64_t> rationales(in.R);
  std::vector<int64_t> answers(in.R);
  for (int64_t s = 0; s < in.S; ++s) {
    rationales[in.rationale[s]] += in.kind[s] == RATIONALE;
    answers[in.rationale[s]] += in.kind[s] == ANSWER && in.option[s] == 0;
  }
  for (int64_t r = 0; r < in.R; ++r) {
    require(
        rationales[r] == 1 && answers[r] == 1, OP, ": rationale ", r,
        " must have one rationale segment and one answer segment of option 0, got ", rationales[r], " and ",
        answers[r]);
  }
}

template <class T>
void check_groups(const Arguments<T>& in) {
  for (int64_t r = 0; r < in.R; ++r) {
    const Range group = group_of(in.prompt, in.R, r);
    require(
        group.end - group.begin > 1, OP, ": leaving one out needs two rationales per prompt, got one for prompt ",
        in.prompt[r], "; sample more, or give advantage");
  }
}

template <class T>
void check(const Arguments<T>& in) {
  require(in.R > 0, OP, ": prompt must name at least one rationale, got none");
  check_index("segment", in.segment, in.M, in.S);
  check_sorted("segment", in.segment, in.M);
  check_index("kind", in.kind, in.S, BASELINE + 1);
  check_index("rationale", in.rationale, in.S, in.R);
  check_sorted("prompt", in.prompt, in.R);
  check_one_segment_each(in);
  if (!in.advantage) {
    check_groups(in);
  }
}

template <class T>
void sum_segments(const Arguments<T>& in, const Exact& exact) {
  for (int64_t r = 0; r < in.R; ++r) {
    exact.rationale_logp[r] = 0;
    exact.answer_logp[r] = 0;
    exact.kl[r] = in.ref_logps ? 0 : NAN;
  }
  for (int64_t m = 0; m < in.M; ++m) {
    const int64_t s = in.segment[m];
    const int64_t r = in.rationale[s];
    if (in.kind[s] == RATIONALE) {
      exact.rationale_logp[r] += in.logps[m];
      exact.kl[r] += kl_term(in.options.kl, log_ratio(in, m));
    } else if (is_right_answer(in, s)) {
      exact.answer_logp[r] += in.logps[m];
    }
  }
}

struct Cpu {
  template <class T>
  static void run(const Arguments<T>& in, const Exact& exact, const Results<T>& out, const Tensor& /*logps*/) {
    check(in);
    sum_segments(in, exact);
    for (int64_t r = 0; r < in.R; ++r) {
      exact.reward[r] = reward(in.options, exact.answer_logp[r], exact.kl[r]);
    }
    double loss = 0;
    for (int64_t r = 0; r < in.R; ++r) {
      exact.advantage[r] = advantage(in, exact.reward, r);
      loss += loss_term(in, exact, r);
      round_terms(exact, out, r);
    }
    *out.loss = static_cast<T>(loss);
    for (int64_t m = 0; m < in.M; ++m) {
      out.coefficients[m] = static_cast<T>(coefficient(in, exact.advantage, m));
    }
  }
};

}  // namespace
}  // namespace latro::self_reward

STABLE_TORCH_LIBRARY_IMPL(latro_kernels, CPU, m) {
  m.impl("self_reward", TORCH_BOX(&latro::self_reward::self_reward<latro::self_reward::Cpu>));
}
