// Tensors of embedding -> checked EmbeddingParams; the output is allocated here.
#pragma once

#include "ops/embedding/embedding.h"
#include "torch/mixed_rows.h"

namespace resq {

struct EmbeddingCall {
  EmbeddingParams params;
  Tensor y, ids;  // ids may be a contiguous copy
};

// `packed_bytes(n, k_lo, k_hi)` is the size of the device's layout.
inline EmbeddingCall embedding_call(const Tensor& ids, const Tensor& packed_weight,
                                    const Tensor& weight_scale, int64_t k_lo, int64_t k_hi,
                                    ScalarType dtype,
                                    int64_t (*packed_bytes)(int64_t, int64_t, int64_t)) {
  const char* op = "embedding";
  if (k_lo < 0 || k_hi < 0 || k_lo % 2 != 0) {
    fail(op, "k_lo, k_hi", "none negative and k_lo even",
         std::to_string(k_lo) + ", " + std::to_string(k_hi));
  }
  if (ids.scalar_type() != ScalarType::Long) fail(op, "ids", "int64", describe(ids));
  check_tensor(op, "weight_scale", weight_scale, {ScalarType::Float}, {kAnySize, 2});
  const int64_t n = weight_scale.size(0);
  check_tensor(op, "packed_weight", packed_weight, {ScalarType::Byte},
               {packed_bytes(n, k_lo, k_hi)});
  check_float_dtype(op, "dtype", dtype);
  std::vector<int64_t> sizes = sizes_of(ids);
  sizes.push_back(k_lo + k_hi);
  Tensor rows = contiguous_rows(ids), y = allocate(packed_weight, sizes, dtype);
  return {{.y = y.mutable_data_ptr(),
           .ids = rows.const_data_ptr<int64_t>(),
           .packed_weight = packed_weight.const_data_ptr<uint8_t>(),
           .weight_scale = weight_scale.const_data_ptr<float>(),
           .type = float_type(op, "dtype", y),
           .count = ids.numel(),
           .n = n,
           .k_lo = k_lo,
           .k_hi = k_hi},
          y,
          rows};
}

}  // namespace resq
