// kv_attention on CUDA: one or two kernels, nothing read on the host. On sm_90 both may start
// before the previous kernel has finished (cuda/pdl.cuh).
//
//   attend   items (sequence, rows, split, kv head) found on the device            .cu, _sm90.cu
//   merge    the splits of a row in their order, where there may be several        _merge.cu
//
// A row's result depends only on the tokens it sees and on their order, not on the batch, the
// neighbouring rows, the block table or the mode. Neither do the items depend on the block table:
// the states of a sequence lie behind those of the sequences before it, as many as its length asks
// for, so that a table wider than the lengths costs nothing. A sequence whose states would lie
// beyond the workspace has no splits: a block takes all tokens of its rows in turn, which gives the
// same bits. Lengths, pages and query_starts that are out of range stop the kernel with a device
// error.
#pragma once

#include <algorithm>

#include "cuda/inverse.h"
#include "cuda/launch.h"
#include "ops/kv_attention/kv_attention.h"

namespace resq::cuda::attention {

// Tokens of a split, by how many the row sees: a row that sees few has short splits, so that more
// blocks share it. As it depends on nothing else, a row has the same bits in every batch. Tiers are
// numbered from the short ones on; the times are predictions (docs/notes/0055).
inline constexpr int kTiers = 3;
constexpr RESQ_HOST_DEVICE int tier_tokens(int tier) {  // that a row sees at most
  return tier == 0 ? 2048 : tier == 1 ? 16384 : 0x7fffffff;
}
constexpr RESQ_HOST_DEVICE int tier_split(int tier) { return 256 << tier; }
inline constexpr int kMostSplitTokens = tier_split(kTiers - 1);

constexpr RESQ_HOST_DEVICE int tier_of(int64_t visible) {
  return visible <= tier_tokens(0) ? 0 : visible <= tier_tokens(1) ? 1 : 2;
}
// Of a row that sees `visible` tokens, which may be negative.
constexpr RESQ_HOST_DEVICE int split_count(int64_t visible) {
  const int tier = tier_of(visible);
  return visible > 0 ? static_cast<int>((visible + tier_split(tier) - 1) >> (8 + tier)) : 0;
}

inline constexpr unsigned kAllLanes = 0xffffffff;  // of a warp

struct KvAttentionCuda {
  KvAttentionParams params;
  const int32_t* seq_lens;      // [sequences]
  const int32_t* query_starts;  // [sequences + 1]
  int64_t tokens, sequences, pages;
  Divisor group{params.group()}, kv_heads{params.n_kv}, page_size{params.page_size};

  float* states = nullptr;  // Workspace [capacity, kv_cuda_state_floats]
  int capacity = 0;         // states

  // Splits that a row can have, by the room of the block table.
  RESQ_HOST_DEVICE int64_t most_splits() const {
    const int64_t room = params.max_pages * params.page_size;
    int64_t most = split_count(room);
    for (int tier = 0; tier + 1 < kTiers; ++tier) {
      const int64_t splits = split_count(tier_tokens(tier));
      if (tier_tokens(tier) < room && splits > most) most = splits;
    }
    return most;
  }
};

// head_dim weighted sums, the maximum and the sum of weights, and two unused.
constexpr RESQ_HOST_DEVICE int kv_cuda_state_floats(int head_dim) { return head_dim + 4; }

inline constexpr int64_t kKvMaxStateBytes = int64_t{128} << 20;
inline constexpr int64_t kKvAmpleStateBytes = int64_t{16} << 20;

// States that a call has a workspace for: as many as the block table allows for, but at most
// kKvAmpleStateBytes, or what the tokens of the whole cache need where that is more (with one query
// a sequence and no page in two of them), and at most kKvMaxStateBytes. The tokens of a full H200
// (3.1 million of Llama-3-8B) need 52 MB in long sequences, 104 in sequences of 16k.
inline int kv_state_capacity(const KvAttentionCuda& call) {
  const KvAttentionParams& p = call.params;
  const int64_t bytes = kv_cuda_state_floats(static_cast<int>(p.head_dim)) * int64_t{sizeof(float)};
  const int64_t table = call.tokens * p.n_q * call.most_splits();
  const int64_t cache = (call.pages * p.page_size / tier_split(0) + call.sequences) * p.n_q;
  const int64_t ample = std::max(cache, kKvAmpleStateBytes / bytes);
  return static_cast<int>(std::min({table, ample, kKvMaxStateBytes / bytes}));
}

void attend(const KvAttentionCuda& call, const Device& device, Stream stream);
void attend_sm90(const KvAttentionCuda& call, const Device& device, Stream stream);
void merge(const KvAttentionCuda& call, Stream stream);

}  // namespace resq::cuda::attention
