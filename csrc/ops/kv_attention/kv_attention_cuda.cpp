#include "ops/kv_attention/kv_attention_cuda.h"

#include "ops/kv_attention/kv_attention_args.h"
#include "torch/cuda_call.h"

namespace resq {
namespace {

Tensor kv_attention(const Tensor& q, const Tensor& cache, const Tensor& block_table,
                    const Tensor& seq_lens, const Tensor& query_starts, double scale,
                    const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
                    const std::optional<Tensor>& key_rotation, std::optional<ScalarType> out_dtype,
                    std::optional<int64_t> high_dims) {
  const char* op = "kv_attention";
  const cuda::Call on(op, q);
  const KvAttentionCall call =
      kv_attention_call(q, cache, block_table, seq_lens, query_starts, scale, cos, sin,
                        key_rotation, out_dtype, high_dims, RopeForm::kAsGiven);
  check_device(op, "cache", cache, q);
  check_device(op, "block_table", block_table, q);
  check_device(op, "seq_lens", seq_lens, q);
  check_device(op, "query_starts", query_starts, q);
  if (cos) check_device(op, "cos", *cos, q);
  if (sin) check_device(op, "sin", *sin, q);
  if (key_rotation) check_device(op, "key_rotation", *key_rotation, q);
  cuda::check_aligned_tokens(op, "q", q);
  cuda::check_aligned(op, "cache", cache);
  if (q.numel() == 0) return call.out;

  const KvAttentionParams& p = call.params;
  cuda::KvAttentionCuda work{.params = p,
                             .seq_lens = seq_lens.const_data_ptr<int32_t>(),
                             .query_starts = query_starts.const_data_ptr<int32_t>(),
                             .tokens = q.size(0),
                             .sequences = block_table.size(0),
                             .pages = cache.size(0),
                             .queries = {p.q, p.q_type},
                             .query_stride = p.q_stride};
  const int64_t rows = work.tokens * p.n_q;
  const int64_t state_bytes =
      rows * work.splits() * cuda::kv_cuda_state_floats(p.head_dim) * int64_t{sizeof(float)};
  const bool split = work.splits() > 1 && state_bytes <= cuda::kKvMaxStateBytes;
  const bool rotate = p.cos.data || p.rotation.data;
  const Tensor rotated = allocate(q, {rotate ? rows * p.head_dim : 0}, ScalarType::Float);
  const Tensor states = allocate(q, {split ? state_bytes / 4 : 0}, ScalarType::Float);
  work.states = split ? states.mutable_data_ptr<float>() : nullptr;

  if (rotate) {
    cuda::kv_attention_prepare(work, rotated.mutable_data_ptr<float>(), on.stream());
    work.queries = {rotated.const_data_ptr(), FloatType::kFloat32};
    work.query_stride = p.n_q * p.head_dim;
  }
  if (on.family() == cuda::Family::kSm90) {
    cuda::kv_attention_attend_sm90(work, on.device(), on.stream());
  } else {
    cuda::kv_attention_attend(work, on.device(), on.stream());
  }
  if (split) cuda::kv_attention_merge(work, on.stream());
  return call.out;
}

}  // namespace
}  // namespace resq

RESQ_CUDA_IMPL(m) { m.impl("kv_attention", TORCH_BOX(&resq::kv_attention)); }
