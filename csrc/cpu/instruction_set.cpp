#include "instruction_set.h"

#include <cstdlib>
#include <string>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "../check.h"

namespace latro {
namespace {

// The best first; emulated last, which is never the best.
std::vector<const InstructionSet*> that_run_here() {
  std::vector<const InstructionSet*> sets;
  for (const InstructionSet* set : {avx512_bf16(), avx512(), avx2(), portable(), emulated()}) {
    if (set && set->runs_here()) {
      sets.push_back(set);
    }
  }
  return sets;
}

std::string names() {
  std::string text;
  for (const InstructionSet* set : that_run_here()) {
    text += (text.empty() ? "" : ",") + std::string(set->name);
  }
  return text;
}

}  // namespace

const InstructionSet& instruction_set(const char* op) {
  static const std::vector<const InstructionSet*> sets = that_run_here();
  const char* wish = std::getenv("LATRO_CPU");
  if (!wish || !*wish) {
    return *sets.front();
  }
  for (const InstructionSet* set : sets) {
    if (set->name == std::string(wish)) {
      return *set;
    }
  }
  require(false, op, ": LATRO_CPU must be one of ", names(), " on this machine, got ", wish);
  return *sets.front();
}

}  // namespace latro

STABLE_TORCH_LIBRARY_IMPL(latro_kernels, CompositeExplicitAutograd, m) {
  m.impl("instruction_sets", TORCH_BOX(&latro::names));
}
