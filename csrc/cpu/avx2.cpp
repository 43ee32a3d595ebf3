// Every CPU kernel compiled for AVX2 with FMA.
#if defined(__x86_64__)
#include <cstdint>
#include <cstring>

#include "instruction_set.h"

// Everything below is compiled for the instruction set, and nothing that other files share: no standard templates.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define LATRO_PAIRS LATRO_PAIRS_NONE
#include "kernels.h"

namespace latro {

const InstructionSet* avx2() {
  static constexpr InstructionSet set = kernels<8>("avx2", [] {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  });
  return &set;
}

}  // namespace latro

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else

#include "instruction_set.h"

const latro::InstructionSet* latro::avx2() {
  return nullptr;
}

#endif
