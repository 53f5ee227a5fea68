// hadamard between torch and the kernels: checks, output, the operator of any device.
#pragma once

#include <cmath>

#include "ops/hadamard/hadamard.h"
#include "torch/tensor.h"

namespace resq {

template <class Device>
Tensor hadamard(const Tensor& x, double scale) {
  const char* op = "hadamard";
  const Device device(op, x);
  const FloatType type = float_type(op, "x", x);
  const int64_t n = last_dimension(op, "x", x), rows = row_count(x);
  const HadamardPlan* plan = checked_hadamard_plan(op, "x", n);
  check_rows(op, "x", x);
  const Tensor input = device.aligned(contiguous_rows(x));
  const Tensor y = allocate(x, sizes_of(x), x.scalar_type());
  run(device, HadamardParams{rows, input.const_data_ptr(), y.mutable_data_ptr(), type, plan,
                             static_cast<float>(scale / std::sqrt(static_cast<double>(n)))});
  return y;
}

}  // namespace resq
