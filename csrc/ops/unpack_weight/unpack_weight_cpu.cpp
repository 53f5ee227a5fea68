#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "ops/unpack_weight/unpack_weight.h"
#include "torch/check.h"

namespace resq {
namespace {

std::tuple<Tensor, Tensor> unpack_weight(const Tensor& packed_weight, int64_t n, int64_t k_lo,
                                         int64_t k_hi) {
  const char* op = "unpack_weight";
  if (n < 0 || k_lo < 0 || k_hi < 0 || k_lo % 2 != 0) {
    std::ostringstream got;
    got << n << ", " << k_lo << ", " << k_hi;
    fail(op, "n, k_lo, k_hi", "none negative and k_lo even", got.str());
  }
  check_tensor(op, "packed_weight", packed_weight, {ScalarType::Byte},
               {packed_weight_bytes(n, k_lo, k_hi)});
  Tensor codes_lo = torch::stable::new_empty(packed_weight, {n, k_lo / 2});
  Tensor codes_hi = torch::stable::new_empty(packed_weight, {n, k_hi}, ScalarType::Char);
  const UnpackWeightParams params{.n = n,
                                  .k_lo = k_lo,
                                  .k_hi = k_hi,
                                  .packed_weight = packed_weight.const_data_ptr<uint8_t>(),
                                  .codes_lo = codes_lo.mutable_data_ptr<uint8_t>(),
                                  .codes_hi = codes_hi.mutable_data_ptr<int8_t>()};
  torch::stable::parallel_for(0, packed_blocks(n), 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) unpack_weight_block(params, block);
  });
  return {codes_lo, codes_hi};
}

}  // namespace
}  // namespace resq

STABLE_TORCH_LIBRARY_IMPL(resq, CPU, m) {
  m.impl("unpack_weight", TORCH_BOX(&resq::unpack_weight));
}
