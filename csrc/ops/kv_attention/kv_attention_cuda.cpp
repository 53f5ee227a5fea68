// kv_attention on CUDA: workspace, and which kernels run.
#include "ops/kv_attention/kv_attention_cuda.h"

#include "ops/kv_attention/kv_attention_torch.h"
#include "torch/cuda_device.h"

namespace resq {

void run(const Cuda& on, const KvAttentionParams& p, const KvAttentionBatch& batch) {
  namespace attention = cuda::attention;
  if (batch.tokens * p.n_q == 0) return;
  attention::KvAttentionCuda work{.params = p,
                                  .seq_lens = batch.seq_lens,
                                  .query_starts = batch.query_starts,
                                  .tokens = batch.tokens,
                                  .sequences = batch.sequences,
                                  .pages = batch.pages};
  const int64_t rows = work.tokens * p.n_q;
  const int64_t state_bytes =
      rows * work.splits() * attention::kv_cuda_state_floats(p.head_dim) * int64_t{sizeof(float)};
  const bool split = work.splits() > 1 && state_bytes <= attention::kKvMaxStateBytes;
  const Tensor states = on.scratch(split ? state_bytes / 4 : 0, ScalarType::Float);
  work.states = split ? states.mutable_data_ptr<float>() : nullptr;

  if (on.family() == cuda::Family::kSm90) {
    attention::attend_sm90(work, on.device(), on.stream());
  } else {
    attention::attend(work, on.device(), on.stream());
  }
  if (split) attention::merge(work, on.stream());
}

}  // namespace resq

RESQ_CUDA_IMPL(m) { m.impl("kv_attention", TORCH_BOX(&resq::kv_attention<resq::Cuda>)); }
