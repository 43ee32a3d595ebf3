// Every CPU kernel as avx512_bf16 has it, compiled for whatever the compiler targets by default.
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
