// The kernels of every operator on vectors of W floats. Included once for each instruction set.
#pragma once

#include "../tree_attention/kernel.h"

namespace latro {
namespace {

template <int W>
InstructionSet kernels(const char* name, bool (*runs_here)()) {
  return {name, runs_here, tree_attention::kernels<W, float>(), tree_attention::kernels<W, Bfloat16>()};
}

}  // namespace
}  // namespace latro
