// Every CPU kernel compiled for whatever the compiler targets by default: SSE2 or NEON.
#include <cstdint>
#include <cstring>

#include "instruction_set.h"

#define LATRO_PAIRS LATRO_PAIRS_NONE
#include "kernels.h"

namespace latro {

const InstructionSet* portable() {
  static constexpr InstructionSet set = kernels<4>("portable", [] { return true; });
  return &set;
}

}  // namespace latro
