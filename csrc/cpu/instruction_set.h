// The instruction sets that the CPU kernels are compiled for, and the one to use.
#pragma once

#include "../linear_logprobs/problem.h"
#include "../tree_attention/problem.h"

namespace latro {

struct InstructionSet {
  const char* name;
  bool (*runs_here)();
  tree_attention::Kernels attention_float32;
  tree_attention::Kernels attention_bfloat16;
  linear_logprobs::Kernels logprobs_float32;
  linear_logprobs::Kernels logprobs_bfloat16;
};

// Null where the compiler does not target it.
const InstructionSet* avx512_bf16();
const InstructionSet* avx512();
const InstructionSet* avx2();
const InstructionSet* portable();
// avx512_bf16 in portable C++: slow, and there so that its arithmetic is tested on every machine.
const InstructionSet* emulated();

// The best that runs here, or the one that LATRO_CPU names.
const InstructionSet& instruction_set(const char* op);

}  // namespace latro
