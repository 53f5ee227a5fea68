#include "ops/pack_weight/pack_weight_cuda.h"

#include "ops/pack_weight/pack_weight_args.h"
#include "torch/cuda_call.h"

namespace resq {
namespace {

Tensor pack_weight(const Tensor& codes_lo, const Tensor& codes_hi) {
  const cuda::Call on("pack_weight", codes_lo);
  const PackWeightCall call = pack_weight_call(codes_lo, codes_hi, cuda_packed_weight_bytes);
  cuda::pack_weight(call.params, cuda::weight_layout(on.family()), on.stream());
  return call.packed;
}

}  // namespace
}  // namespace resq

RESQ_CUDA_IMPL(m) { m.impl("pack_weight", TORCH_BOX(&resq::pack_weight)); }
