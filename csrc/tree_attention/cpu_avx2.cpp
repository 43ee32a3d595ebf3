// Tree attention compiled for AVX2 with FMA.
#if defined(__x86_64__)
#include <cstdint>
#include <cstring>

#include "problem.h"

// Everything below is compiled for the instruction set, and nothing that other files share: no standard templates.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#include "kernel.h"

namespace latro::tree_attention {

const InstructionSet* avx2() {
  static const InstructionSet set = {
      "avx2",
      {Kernels<8, float>::scratch_size, Kernels<8, float>::forward, Kernels<8, float>::backward},
      {Kernels<8, Bfloat16>::scratch_size, Kernels<8, Bfloat16>::forward, Kernels<8, Bfloat16>::backward}};
  return &set;
}

}  // namespace latro::tree_attention

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else

#include "problem.h"

const latro::tree_attention::InstructionSet* latro::tree_attention::avx2() {
  return nullptr;
}

#endif
