// Every operator of latro_kernels, as callers see it. Each backend registers its kernels beside their code.
// T tokens, M scored tokens, S segments, R rationales.

#include <Python.h>

#include "library.h"

STABLE_TORCH_LIBRARY(LATRO_NAMESPACE, m) {
  // The instruction sets that the CPU kernels can use here, the best first, between commas.
  m.def("instruction_sets() -> str");

  // Attention over a tree: q [H, T, E], k and v [Hkv, T, E], tiles [tiles, 2] int32 and positions [T] of the
  // PrefixTree. out is [T, H, E]; stats [2, H, T] are the maximum of each row's scores and its sum of e^(score -
  // maximum). Gradients are stored as out is; grad_sinks is empty without sinks.
  m.def(
      "tree_attention(Tensor q, Tensor k, Tensor v, Tensor tiles, Tensor positions, Tensor? sinks, "
      "float scale, float? softcap, int? window) -> (Tensor out, Tensor stats)");
  m.def(
      "tree_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor stats, "
      "Tensor tiles, Tensor positions, Tensor? sinks, float scale, float? softcap, int? window) "
      "-> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_sinks)");

  // Log-probs of targets under a linear head, and the entropy of each. numbers are temperature, softcap (0: none) and
  // logit_scale, in float64: as a tensor, because torch.compile would start again for each new value. state [3, M],
  // exponentials [entries kept, M padded] and unit_grad [M padded + 12, D padded] are for the backward pass:
  // exponentials take at most `budget` bytes, and those that are not kept are made again; unit_grad replaces them where
  // weight and bias need no gradient.
  m.def(
      "linear_logprobs(Tensor hidden, Tensor weight, Tensor? bias, Tensor rows, Tensor targets, Tensor numbers, "
      "Tensor? temperatures, int budget, bool unit_grad) "
      "-> (Tensor logps, Tensor entropy, Tensor state, Tensor exponentials, Tensor unit_grad)");
  // Adds to hidden_grad and to bias_grad, which is float32; writes weight_grad, or adds to it when it is float32.
  m.def(
      "linear_logprobs_backward(Tensor grad, Tensor hidden, Tensor weight, Tensor? bias, Tensor rows, Tensor targets, "
      "Tensor numbers, Tensor? temperatures, Tensor state, Tensor exponentials, Tensor unit_grad, "
      "Tensor(a!)? hidden_grad, Tensor(b!)? weight_grad, Tensor(c!)? bias_grad, "
      "bool accumulate) -> ()");

  // The steps of the same on a GPU, which latro_kernels/linear_logprobs/strips.py puts together; see there.
  m.def(
      "head_guess(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor(a!) state, "
      "float logit_scale, float softcap) -> ()");
  m.def(
      "head_epilogue(Tensor products, Tensor like, Tensor? bias, Tensor targets, Tensor(a!) state, "
      "Tensor(b!)? exponentials, Tensor(c!)? partials, int first_tile, int first_v, float logit_scale, float softcap) "
      "-> ()");
  m.def(
      "head_product_and_epilogue(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor(a!) state, "
      "Tensor(b!)? exponentials, Tensor(c!)? partials, int first_tile, int first_v, float logit_scale, float softcap) "
      "-> ()");
  m.def("head_combine(Tensor partials, Tensor(a!) state, Tensor(b!) logps, Tensor(c!) entropy, bool headroom) -> ()");
  m.def(
      "head_settle(Tensor partials, int first_tile, int tiles, int width, Tensor(a!) state, "
      "Tensor(b!) exponentials, Tensor(c!)? unit) -> ()");
  m.def(
      "head_clear_targets(Tensor begins, Tensor ends, Tensor targets, Tensor state, int first_v, "
      "Tensor(a!) exponentials) -> ()");
  m.def(
      "head_couple_targets(Tensor coefficients, Tensor begins, Tensor ends, Tensor targets, Tensor state, "
      "Tensor(a!) out) -> ()");
  m.def(
      "head_add_rows(Tensor values, Tensor coefficients, Tensor order, Tensor rows, Tensor ends, Tensor? weight, "
      "Tensor targets, Tensor? of_targets, Tensor(a!) out) -> ()");
  m.def("head_add_bias_grad(Tensor exponentials, Tensor coefficients, Tensor(a!) out) -> ()");

  // Reward, leave-one-out advantage, KL and loss of R rationales from M token log-probs, and d loss / d logps
  // with reward and advantage held constant. The loss is the sum over rationales; the caller divides it, and the
  // coefficients with it. loss is a scalar, reward to answer_logp are [R], coefficients is [M].
  m.def(
      "self_reward(Tensor logps, Tensor segment, Tensor kind, Tensor rationale, Tensor option, Tensor prompt, "
      "Tensor? ref_logps, Tensor? advantage, float beta, float answer_weight, "
      "str kl, float? floor, str? scale) "
      "-> (Tensor loss, Tensor reward, Tensor advantage, Tensor kl, Tensor rationale_logp, Tensor answer_logp, "
      "Tensor coefficients)");
}

// Importing the module is what runs the registrations; it holds nothing else.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
