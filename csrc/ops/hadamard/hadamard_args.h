// Tensors of hadamard -> checked HadamardParams; the output is allocated here.
#pragma once

#include <cmath>

#include "ops/hadamard/hadamard.h"
#include "torch/hadamard_plan.h"
#include "torch/mixed_rows.h"

namespace resq {

struct HadamardCall {
  HadamardParams params;
  Tensor y;
  Tensor x;  // contiguous; params point into it
};

inline HadamardCall hadamard_call(const Tensor& x, double scale) {
  const char* op = "hadamard";
  const FloatType type = float_type(op, "x", x);
  const int64_t n = last_dimension(op, "x", x);
  const HadamardPlan* plan = checked_hadamard_plan(op, "x", n);
  const Tensor rows = contiguous_rows(x);
  const Tensor y = allocate(x, with_last(x, n), x.scalar_type());
  return {{row_count(x), rows.const_data_ptr(), y.mutable_data_ptr(), type, plan,
           static_cast<float>(scale / std::sqrt(static_cast<double>(n)))},
          y,
          rows};
}

}  // namespace resq
