#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "ops/pack_weight/pack_weight.h"
#include "torch/check.h"

namespace resq {
namespace {

Tensor pack_weight(const Tensor& codes_lo, const Tensor& codes_hi) {
  const char* op = "pack_weight";
  check_tensor(op, "codes_lo", codes_lo, {ScalarType::Byte}, {kAnySize, kAnySize});
  check_tensor(op, "codes_hi", codes_hi, {ScalarType::Char}, {codes_lo.size(0), kAnySize});
  const int64_t n = codes_lo.size(0), k_lo = codes_lo.size(1) * 2, k_hi = codes_hi.size(1);
  Tensor packed = torch::stable::new_empty(codes_lo, {packed_weight_bytes(n, k_lo, k_hi)});
  const PackWeightParams params{.n = n,
                                .k_lo = k_lo,
                                .k_hi = k_hi,
                                .codes_lo = codes_lo.const_data_ptr<uint8_t>(),
                                .codes_hi = codes_hi.const_data_ptr<int8_t>(),
                                .packed_weight = packed.mutable_data_ptr<uint8_t>()};
  torch::stable::parallel_for(0, packed_blocks(n), 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) pack_weight_block(params, block);
  });
  return packed;
}

}  // namespace
}  // namespace resq

STABLE_TORCH_LIBRARY_IMPL(resq, CPU, m) { m.impl("pack_weight", TORCH_BOX(&resq::pack_weight)); }
