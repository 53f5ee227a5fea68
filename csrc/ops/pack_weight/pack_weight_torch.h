// pack_weight between torch and the kernels: checks, output, the operator of any device.
#pragma once

#include "ops/pack_weight/pack_weight.h"
#include "torch/tensor.h"

namespace resq {

template <class Device>
Tensor pack_weight(const Tensor& codes_lo, const Tensor& codes_hi) {
  const char* op = "pack_weight";
  const Device device(op, codes_lo);
  check_tensor(op, "codes_lo", codes_lo, {ScalarType::Byte}, {kAnySize, kAnySize});
  check_tensor(op, "codes_hi", codes_hi, {ScalarType::Char}, {codes_lo.size(0), kAnySize});
  check_device(op, "codes_hi", codes_hi, codes_lo);
  const int64_t n = codes_lo.size(0), k_lo = codes_lo.size(1) * 2, k_hi = codes_hi.size(1);
  const int64_t bytes = device.packed_weight_bytes(n, k_lo, k_hi);
  const Tensor packed_weight = allocate(codes_lo, {bytes}, ScalarType::Byte);
  run(device, PackWeightParams{.n = n,
                               .k_lo = k_lo,
                               .k_hi = k_hi,
                               .codes_lo = codes_lo.const_data_ptr<uint8_t>(),
                               .codes_hi = codes_hi.const_data_ptr<int8_t>(),
                               .packed_weight = packed_weight.mutable_data_ptr<uint8_t>()});
  return packed_weight;
}

}  // namespace resq
