// rms_norm between torch and the kernels: checks, output, the operator of any device.
#pragma once

#include "ops/rms_norm/rms_norm.h"
#include "torch/norm.h"
#include "torch/tensor.h"

namespace resq {

template <class Device>
Tensor rms_norm(const Tensor& x, const std::optional<Tensor>& weight, double eps) {
  const char* op = "rms_norm";
  const Device device(op, x);
  const FloatType type = float_type(op, "x", x);
  const int64_t columns = last_dimension(op, "x", x), rows = row_count(x);
  const FloatType weight_type = checked_norm(op, weight, eps, x, columns);
  check_rows(op, "x", x);
  const Tensor x_rows = contiguous_rows(x);
  const Tensor weight_row = weight ? contiguous_rows(*weight) : x_rows;
  const Tensor y = allocate(x, sizes_of(x), x.scalar_type());
  run(device, RmsNormParams{.rows = rows,
                            .columns = columns,
                            .x = x_rows.const_data_ptr(),
                            .y = y.mutable_data_ptr(),
                            .type = type,
                            .weight = weight ? weight_row.const_data_ptr() : nullptr,
                            .weight_type = weight_type,
                            .eps = static_cast<float>(eps)});
  return y;
}

}  // namespace resq
