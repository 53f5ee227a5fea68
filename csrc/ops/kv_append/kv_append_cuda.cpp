#include "ops/kv_append/kv_append_cuda.h"

#include "ops/kv_append/kv_append_args.h"
#include "torch/cuda_call.h"

namespace resq {
namespace {

Tensor kv_append(const Tensor& k, const Tensor& v, const std::optional<Tensor>& cos,
                 const std::optional<Tensor>& sin, const std::optional<Tensor>& key_rotation,
                 Tensor cache, const Tensor& slot_mapping, int64_t hi_bits,
                 const std::optional<Tensor>& q) {
  const char* op = "kv_append";
  const cuda::Call on(op, k);
  const KvAppendCall call = kv_append_call(k, v, cos, sin, key_rotation, cache, slot_mapping,
                                           hi_bits, q, RopeForm::kAsGiven);
  check_device(op, "v", v, k);
  if (cos) check_device(op, "cos", *cos, k);
  if (sin) check_device(op, "sin", *sin, k);
  if (key_rotation) check_device(op, "key_rotation", *key_rotation, k);
  check_device(op, "cache", cache, k);
  check_device(op, "slot_mapping", slot_mapping, k);
  if (q) check_device(op, "q", *q, k);
  cuda::check_aligned_tokens(op, "k", k);
  cuda::check_aligned_tokens(op, "v", v);
  if (q) cuda::check_aligned_tokens(op, "q", *q);
  cuda::check_aligned(op, "cache", cache);
  cuda::kv_append(call.params, on.device(), on.stream());
  return call.rotated_q;
}

}  // namespace
}  // namespace resq

RESQ_CUDA_IMPL(m) { m.impl("kv_append", TORCH_BOX(&resq::kv_append)); }
