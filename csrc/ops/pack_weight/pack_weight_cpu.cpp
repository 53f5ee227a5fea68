#include <torch/csrc/stable/library.h>

#include "ops/pack_weight/pack_weight_args.h"
#include "torch/cpu_call.h"

namespace resq {
namespace {

Tensor pack_weight(const Tensor& codes_lo, const Tensor& codes_hi) {
  const PackWeightCall call = pack_weight_call(codes_lo, codes_hi, packed_weight_bytes);
  const PackWeightParams& params = call.params;
  log_cpu_kernel("pack_weight", cpu::Isa::kScalar);
  torch::stable::parallel_for(0, packed_blocks(params.n), 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) pack_weight_block(params, block);
  });
  return call.packed;
}

}  // namespace
}  // namespace resq

STABLE_TORCH_LIBRARY_IMPL(resq, CPU, m) { m.impl("pack_weight", TORCH_BOX(&resq::pack_weight)); }
