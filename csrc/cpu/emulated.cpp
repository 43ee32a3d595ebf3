// Every CPU kernel as avx512_bf16 has it, compiled for whatever the compiler targets by default. For tests, so that it
// is compiled fast: as the others are, it would take half of the time of an install.
#ifndef __clang__
#pragma GCC optimize("O1")
#endif

#include <cstdint>
#include <cstring>

#include "instruction_set.h"

#define LATRO_PAIRS LATRO_PAIRS_EMULATED
#include "kernels.h"

namespace latro {

const InstructionSet* emulated() {
  static constexpr InstructionSet set = kernels<16>("emulated", [] { return true; });
  return &set;
}

}  // namespace latro
