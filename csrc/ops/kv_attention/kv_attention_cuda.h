// kv_attention on CUDA: one or two kernels, nothing read on the host. On sm_90 both may start
// before the previous kernel has finished (cuda/pdl.cuh).
//
//   attend   items (sequence, rows, split, kv head) found on the device            .cu, _sm90.cu
//   merge    the splits of a row in their order, where there are several           _merge.cu
//
// A row's result depends only on the tokens it sees and on their order, not on the batch, the
// neighbouring rows, the block table or the mode. Lengths, pages and query_starts that are out of
// range stop the kernel with a device error.
#pragma once

#include "cuda/launch.h"
#include "ops/kv_attention/kv_attention.h"

namespace resq::cuda::attention {

struct KvAttentionCuda {
  KvAttentionParams params;
  const int32_t* seq_lens;      // [sequences]
  const int32_t* query_starts;  // [sequences + 1]
  int64_t tokens, sequences, pages;

  float* states = nullptr;  // Workspace [tokens, n_q, splits, kv_cuda_state_floats]; null: a block
                            // takes all splits of its rows in turn, which gives the same bits

  RESQ_HOST_DEVICE int64_t splits() const {
    return ceil_div(params.max_pages * params.page_size, kSplitTokens);
  }
};

// head_dim weighted sums, the maximum and the sum of weights, and two unused.
constexpr RESQ_HOST_DEVICE int kv_cuda_state_floats(int head_dim) { return head_dim + 4; }

// Above this many bytes of states, blocks take all splits of their rows instead.
inline constexpr int64_t kKvMaxStateBytes = int64_t{64} << 20;

void attend(const KvAttentionCuda& call, const Device& device, Stream stream);
void attend_sm90(const KvAttentionCuda& call, const Device& device, Stream stream);
void merge(const KvAttentionCuda& call, Stream stream);

}  // namespace resq::cuda::attention
