// Tree attention compiled for AVX-512.
#if defined(__x86_64__)
#include <cstdint>
#include <cstring>

#include "problem.h"

// Everything below is compiled for the instruction set, and nothing that other files share: no standard templates.
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#endif

#include "kernel.h"

namespace latro::tree_attention {

const InstructionSet* avx512() {
  static const InstructionSet set = {
      "avx512",
      {Kernels<16, float>::scratch_size, Kernels<16, float>::forward, Kernels<16, float>::backward},
      {Kernels<16, Bfloat16>::scratch_size, Kernels<16, Bfloat16>::forward, Kernels<16, Bfloat16>::backward}};
  return &set;
}

}  // namespace latro::tree_attention

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else

#include "problem.h"

const latro::tree_attention::InstructionSet* latro::tree_attention::avx512() {
  return nullptr;
}

#endif
