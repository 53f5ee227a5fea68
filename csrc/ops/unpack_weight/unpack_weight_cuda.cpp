#include "ops/unpack_weight/unpack_weight_cuda.h"

#include <tuple>

#include "ops/unpack_weight/unpack_weight_args.h"
#include "torch/cuda_call.h"

namespace resq {
namespace {

std::tuple<Tensor, Tensor> unpack_weight(const Tensor& packed_weight, int64_t n, int64_t k_lo,
                                         int64_t k_hi) {
  const cuda::Call on("unpack_weight", packed_weight);
  const UnpackWeightCall call =
      unpack_weight_call(packed_weight, n, k_lo, k_hi, cuda_packed_weight_bytes);
  cuda::unpack_weight(call.params, cuda::weight_layout(on.family()), on.stream());
  return {call.codes_lo, call.codes_hi};
}

}  // namespace
}  // namespace resq

RESQ_CUDA_IMPL(m) { m.impl("unpack_weight", TORCH_BOX(&resq::unpack_weight)); }
