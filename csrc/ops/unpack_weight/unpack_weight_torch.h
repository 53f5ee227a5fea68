// unpack_weight between torch and the kernels: checks, outputs, the operator of any device.
#pragma once

#include <tuple>

#include "ops/unpack_weight/unpack_weight.h"
#include "torch/tensor.h"

namespace resq {

template <class Device>
std::tuple<Tensor, Tensor> unpack_weight(const Tensor& packed_weight, int64_t n, int64_t k_lo,
                                         int64_t k_hi) {
  const char* op = "unpack_weight";
  const Device device(op, packed_weight);
  if (n < 0 || k_lo < 0 || k_hi < 0 || k_lo % 2 != 0) {
    std::ostringstream got;
    got << n << ", " << k_lo << ", " << k_hi;
    fail(op, "n, k_lo, k_hi", "none negative and k_lo even", got.str());
  }
  check_tensor(op, "packed_weight", packed_weight, {ScalarType::Byte},
               {device.packed_weight_bytes(n, k_lo, k_hi)});
  const Tensor codes_lo = allocate(packed_weight, {n, k_lo / 2}, ScalarType::Byte);
  const Tensor codes_hi = allocate(packed_weight, {n, k_hi}, ScalarType::Char);
  run(device, UnpackWeightParams{.n = n,
                                 .k_lo = k_lo,
                                 .k_hi = k_hi,
                                 .packed_weight = packed_weight.const_data_ptr<uint8_t>(),
                                 .codes_lo = codes_lo.mutable_data_ptr<uint8_t>(),
                                 .codes_hi = codes_hi.mutable_data_ptr<int8_t>()});
  return {codes_lo, codes_hi};
}

}  // namespace resq
