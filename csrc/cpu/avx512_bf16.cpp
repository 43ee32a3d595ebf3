// Every CPU kernel compiled for AVX-512 with its bfloat16 dot product.
#if defined(__x86_64__)
#include <immintrin.h>
#include <cstdint>
#include <cstring>

#include "instruction_set.h"

// Everything below is compiled for the instruction set, and nothing that other files share: no standard templates.
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,prefer-vector-width=512")
#endif

#define LATRO_PAIRS LATRO_PAIRS_AVX512
#include "kernels.h"

namespace latro {

const InstructionSet* avx512_bf16() {
  static constexpr InstructionSet set = kernels<16>("avx512_bf16", [] {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("avx512bf16");
  });
  return &set;
}

}  // namespace latro

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else

#include "instruction_set.h"

const latro::InstructionSet* latro::avx512_bf16() {
  return nullptr;
}

#endif
