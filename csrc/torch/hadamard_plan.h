// The plan of an op's row size, or the sentence that says why there is none.
#pragma once

#include "core/hadamard.h"
#include "torch/check.h"

namespace resq {

inline const HadamardPlan* checked_hadamard_plan(const char* op, const char* argument, int64_t n) {
  const HadamardPlan* plan = hadamard_plan(n);
  if (plan == nullptr) {
    fail(op, argument, "rows of 2^a * m elements with Paley orders m (12, 20, 28, ...)",
         std::to_string(n));
  }
  return plan;
}

}  // namespace resq
