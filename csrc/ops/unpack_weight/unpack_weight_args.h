// Tensors of unpack_weight -> checked UnpackWeightParams; the outputs are allocated here.
#pragma once

#include "ops/unpack_weight/unpack_weight.h"
#include "torch/allocate.h"

namespace resq {

struct UnpackWeightCall {
  UnpackWeightParams params;
  Tensor codes_lo, codes_hi;
};

// `packed_bytes(n, k_lo, k_hi)` is the size of the device's layout.
inline UnpackWeightCall unpack_weight_call(const Tensor& packed_weight, int64_t n, int64_t k_lo,
                                           int64_t k_hi,
                                           int64_t (*packed_bytes)(int64_t, int64_t, int64_t)) {
  const char* op = "unpack_weight";
  if (n < 0 || k_lo < 0 || k_hi < 0 || k_lo % 2 != 0) {
    std::ostringstream got;
    got << n << ", " << k_lo << ", " << k_hi;
    fail(op, "n, k_lo, k_hi", "none negative and k_lo even", got.str());
  }
  check_tensor(op, "packed_weight", packed_weight, {ScalarType::Byte},
               {packed_bytes(n, k_lo, k_hi)});
  Tensor codes_lo = allocate(packed_weight, {n, k_lo / 2}, ScalarType::Byte);
  Tensor codes_hi = allocate(packed_weight, {n, k_hi}, ScalarType::Char);
  return {{.n = n,
           .k_lo = k_lo,
           .k_hi = k_hi,
           .packed_weight = packed_weight.const_data_ptr<uint8_t>(),
           .codes_lo = codes_lo.mutable_data_ptr<uint8_t>(),
           .codes_hi = codes_hi.mutable_data_ptr<int8_t>()},
          codes_lo,
          codes_hi};
}

}  // namespace resq
