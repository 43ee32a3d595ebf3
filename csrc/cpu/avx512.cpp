// Every CPU kernel compiled for AVX-512.
#if defined(__x86_64__)
#include <cstdint>
#include <cstring>

#include "instruction_set.h"

// Everything below is compiled for the instruction set, and nothing that other files share: no standard templates.
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#endif

#define LATRO_PAIRS LATRO_PAIRS_NONE
#include "kernels.h"

namespace latro {

const InstructionSet* avx512() {
  static constexpr InstructionSet set = kernels<16>("avx512", [] {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
  });
  return &set;
}

}  // namespace latro

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else

#include "instruction_set.h"

const latro::InstructionSet* latro::avx512() {
  return nullptr;
}

#endif
