// Tensors of pack_weight -> checked PackWeightParams; the output is allocated here.
#pragma once

#include "ops/pack_weight/pack_weight.h"
#include "torch/allocate.h"

namespace resq {

struct PackWeightCall {
  PackWeightParams params;
  Tensor packed;
};

// `packed_bytes(n, k_lo, k_hi)` is the size of the device's layout.
inline PackWeightCall pack_weight_call(const Tensor& codes_lo, const Tensor& codes_hi,
                                       int64_t (*packed_bytes)(int64_t, int64_t, int64_t)) {
  const char* op = "pack_weight";
  check_tensor(op, "codes_lo", codes_lo, {ScalarType::Byte}, {kAnySize, kAnySize});
  check_tensor(op, "codes_hi", codes_hi, {ScalarType::Char}, {codes_lo.size(0), kAnySize});
  check_device(op, "codes_hi", codes_hi, codes_lo);
  const int64_t n = codes_lo.size(0), k_lo = codes_lo.size(1) * 2, k_hi = codes_hi.size(1);
  Tensor packed = allocate(codes_lo, {packed_bytes(n, k_lo, k_hi)}, ScalarType::Byte);
  return {{.n = n,
           .k_lo = k_lo,
           .k_hi = k_hi,
           .codes_lo = codes_lo.const_data_ptr<uint8_t>(),
           .codes_hi = codes_hi.const_data_ptr<int8_t>(),
           .packed_weight = packed.mutable_data_ptr<uint8_t>()},
          packed};
}

}  // namespace resq
