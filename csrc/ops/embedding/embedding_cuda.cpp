#include "ops/embedding/embedding_cuda.h"

#include "ops/embedding/embedding_args.h"
#include "torch/cuda_call.h"

namespace resq {
namespace {

Tensor embedding(const Tensor& ids, const Tensor& packed_weight, const Tensor& weight_scale,
                 int64_t k_lo, int64_t k_hi, ScalarType dtype) {
  const char* op = "embedding";
  const cuda::Call on(op, packed_weight);
  check_device(op, "ids", ids, packed_weight);
  check_device(op, "weight_scale", weight_scale, packed_weight);
  cuda::check_row_count(op, "ids", ids.numel());
  const EmbeddingCall call =
      embedding_call(ids, packed_weight, weight_scale, k_lo, k_hi, dtype, cuda_packed_weight_bytes);
  cuda::embedding(call.params, cuda::weight_layout(on.family()), on.stream());
  return call.y;
}

}  // namespace
}  // namespace resq

RESQ_CUDA_IMPL(m) { m.impl("embedding", TORCH_BOX(&resq::embedding)); }
