// search_scale between torch and the kernels: checks, output, the operator of any device.
#pragma once

#include <vector>

#include "ops/search_scale/search_scale.h"
#include "torch/tensor.h"

namespace resq {

template <class Device>
Tensor search_scale(const Tensor& weight, int64_t bits) {
  const char* op = "search_scale";
  const Device device(op, weight);
  const FloatType type = float_type(op, "weight", weight);
  const int64_t columns = last_dimension(op, "weight", weight), rows = row_count(weight);
  check_rows(op, "weight", weight);
  check_bits(op, "bits", bits);
  std::vector<int64_t> sizes = sizes_of(weight);
  sizes.pop_back();
  Tensor scale = allocate(weight, sizes, ScalarType::Float);
  if (columns == 0) {
    torch::stable::zero_(scale);
    return scale;
  }
  const Tensor input = contiguous_rows(weight);
  run(device, SearchScaleParams{rows, columns, input.const_data_ptr(),
                                static_cast<float*>(scale.mutable_data_ptr()), type,
                                ClipGrid(static_cast<int>(bits))});
  return scale;
}

}  // namespace resq
