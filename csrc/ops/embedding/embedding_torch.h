// embedding between torch and the kernels: checks, output, the operator of any device.
#pragma once

#include "ops/embedding/embedding.h"
#include "torch/tensor.h"

namespace resq {

template <class Device>
Tensor embedding(const Tensor& ids, const Tensor& packed_weight, const Tensor& weight_scale,
                 int64_t k_lo, int64_t k_hi, ScalarType dtype) {
  const char* op = "embedding";
  const Device device(op, packed_weight);
  if (k_lo < 0 || k_hi < 0 || k_lo % 2 != 0) {
    fail(op, "k_lo, k_hi", "none negative and k_lo even",
         std::to_string(k_lo) + ", " + std::to_string(k_hi));
  }
  if (ids.scalar_type() != ScalarType::Long) fail(op, "ids", "int64", describe(ids));
  check_device(op, "ids", ids, packed_weight);
  check_count(op, "ids", "ids", ids.numel());
  check_tensor(op, "weight_scale", weight_scale, {ScalarType::Float}, {kAnySize, 2});
  check_device(op, "weight_scale", weight_scale, packed_weight);
  const int64_t n = weight_scale.size(0);
  check_tensor(op, "packed_weight", packed_weight, {ScalarType::Byte},
               {device.packed_weight_bytes(n, k_lo, k_hi)});
  check_float_dtype(op, "dtype", dtype);
  std::vector<int64_t> sizes = sizes_of(ids);
  sizes.push_back(k_lo + k_hi);
  const Tensor id_list = contiguous_rows(ids), y = allocate(packed_weight, sizes, dtype);
  run(device, EmbeddingParams{.y = y.mutable_data_ptr(),
                              .ids = id_list.const_data_ptr<int64_t>(),
                              .packed_weight = packed_weight.const_data_ptr<uint8_t>(),
                              .weight_scale = weight_scale.const_data_ptr<float>(),
                              .type = float_type(op, "dtype", y),
                              .count = ids.numel(),
                              .n = n,
                              .k_lo = k_lo,
                              .k_hi = k_hi});
  return y;
}

}  // namespace resq
