// The kernels of every operator on vectors of W floats. Included once for each instruction set.
//
// A set is a constant: code that filled it in would be of its instructions, and run before the machine is asked for
// them.
#pragma once

#include "../linear_logprobs/kernel.h"
#include "../tree_attention/kernel.h"

namespace latro {
namespace {

template <int W>
constexpr InstructionSet kernels(const char* name, bool (*runs_here)()) {
  return {
      name,
      runs_here,
      tree_attention::kernels<W, float>(),
      tree_attention::kernels<W, Bfloat16>(),
      linear_logprobs::kernels<W, float>(),
      linear_logprobs::kernels<W, Bfloat16>()};
}

}  // namespace
}  // namespace latro
