// Tree attention compiled for whatever the compiler targets by default: SSE2 or NEON.
#include <cstdint>
#include <cstring>

#include "problem.h"

#include "kernel.h"

namespace latro::tree_attention {

const InstructionSet* portable() {
  static const InstructionSet set = {
      "portable",
      {Kernels<4, float>::scratch_size, Kernels<4, float>::forward, Kernels<4, float>::backward},
      {Kernels<4, Bfloat16>::scratch_size, Kernels<4, Bfloat16>::forward, Kernels<4, Bfloat16>::backward}};
  return &set;
}

}  // namespace latro::tree_attention
