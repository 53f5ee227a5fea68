// kv_attention on CUDA: workspace, and which kernels run.
#include "ops/kv_attention/kv_attention_cuda.h"

#include "ops/kv_attention/kv_attention_torch.h"
#include "torch/cuda_device.h"
#include "torch/forced_kernel.h"

namespace resq {
namespace {

// How many splits of a row an item takes: one, with a workspace for their states, or all of them.
// kSomeRows is for tests: a workspace that holds the states of about half the rows, so that the
// last sequences have no splits.
constexpr const char *kOneSplit = "splits=1", *kWholeRow = "splits=whole",
                     *kSomeRows = "splits=some";

std::string chosen_splits(const ForcedKernel& forced) {
  if (!forced) return kOneSplit;
  if (forced.choice != kOneSplit && forced.choice != kWholeRow && forced.choice != kSomeRows) {
    fail("kv_attention", forced.by, std::string(kOneSplit) + ", " + kSomeRows + " or " + kWholeRow,
         forced.choice);
  }
  return forced.choice;
}

}  // namespace

void run(const Cuda& on, const KvAttentionParams& p, const KvAttentionBatch& batch) {
  namespace attention = cuda::attention;
  if (batch.tokens * p.n_q == 0) return;
  attention::KvAttentionCuda work{.params = p,
                                  .seq_lens = batch.seq_lens,
                                  .query_starts = batch.query_starts,
                                  .tokens = batch.tokens,
                                  .sequences = batch.sequences,
                                  .pages = batch.pages};
  const ForcedKernel forced = forced_kernel("kv_attention");
  const std::string splits = chosen_splits(forced);
  const bool split = work.most_splits() > 1 && splits != kWholeRow;
  work.capacity = split ? attention::kv_state_capacity(work) : 0;
  if (splits == kSomeRows) work.capacity /= 2;
  const Tensor states = on.scratch(
      int64_t{work.capacity} * attention::kv_cuda_state_floats(p.head_dim), ScalarType::Float);
  work.states = split ? states.mutable_data_ptr<float>() : nullptr;

  const cuda::Stream stream =
      on.stream(logs_kernels() ? ", " + splits + (forced ? " (forced)" : "") : "");
  if (on.family() == cuda::Family::kSm90) {
    attention::attend_sm90(work, on.device(), stream);
  } else {
    attention::attend(work, on.device(), stream);
  }
  if (split) attention::merge(work, stream);
}

}  // namespace resq

RESQ_CUDA_IMPL(m) { m.impl("kv_attention", TORCH_BOX(&resq::kv_attention<resq::Cuda>)); }
