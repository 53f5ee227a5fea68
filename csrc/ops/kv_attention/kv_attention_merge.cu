// Merges the splits of every row in their order: one block a row, one thread a dim. On sm_90 the
// blocks look up the sequence lengths while the attention kernel finishes (cuda/pdl.cuh).
#include <cuda_runtime.h>

#include "cuda/pdl.cuh"
#include "ops/kv_attention/kv_attention_softmax.cuh"
#include "ops/kv_attention/kv_attention_work.cuh"

namespace resq::cuda::attention {
namespace {

constexpr int kAhead = 8;  // splits whose loads are in flight at once

// Tokens that the query in row `token` of q sees. The lengths are read before pdl_wait: what wrote
// them was complete before the attention kernel let this one start, but nothing promises that this
// multiprocessor's first-level cache has forgotten those of the previous step. __ldcg reads them
// from the second level, which has them.
__device__ inline int visible_tokens(const KvAttentionCuda& call, int token) {
  const int lane = threadIdx.x % 32;
  for (int64_t base = 0; base <= call.sequences; base += 32) {
    const KvSequence s(call, base + lane, [](const int32_t* number) { return __ldcg(number); });
    const bool holds = token >= s.begin && token < s.begin + s.queries;
    const unsigned holders = __ballot_sync(kAllLanes, holds);
    if (holders == 0) continue;
    const int visible = s.length - s.queries + 1 + token - s.begin;
    return __shfl_sync(kAllLanes, visible, __ffs(holders) - 1);
  }
  return 0;
}

// Before pdl_wait nothing is read that the attention kernel writes, and nothing through the
// first-level cache.
template <int kHeadDim>
__global__ void __launch_bounds__(kHeadDim)
    kv_attention_merge_kernel(const __grid_constant__ KvAttentionCuda call) {
  constexpr int kFloats = kv_cuda_state_floats(kHeadDim);
  const int64_t row = blockIdx.x, most = call.splits();
  const auto heads = static_cast<unsigned>(call.params.n_q);
  const unsigned token = blockIdx.x / heads, head = blockIdx.x % heads;
  const int visible = visible_tokens(call, static_cast<int>(token));
  const int splits = (max(visible, 0) + kSplitTokens - 1) / kSplitTokens;
  pdl_wait();
  const float* states = call.states + row * most * kFloats;
  RowState<1> total;
  for (int first = 0; first < splits; first += kAhead) {
    RowState<1> parts[kAhead];
#pragma unroll
    for (int s = 0; s < kAhead; ++s) {
      if (first + s >= splits) continue;
      const float* state = states + (first + s) * kFloats;
      parts[s].values[0] = state[threadIdx.x];
      const float2 numbers = *reinterpret_cast<const float2*>(state + kHeadDim);
      parts[s].max = numbers.x;
      parts[s].sum = numbers.y;
    }
#pragma unroll
    for (int s = 0; s < kAhead; ++s) total.merge(parts[s]);
  }
  store_row(total, call.params, {call.params, token, head}, static_cast<int>(threadIdx.x));
}

}  // namespace

void merge(const KvAttentionCuda& call, Stream stream) {
  const auto rows = static_cast<unsigned>(call.tokens * call.params.n_q);
  const auto kernel =
      call.params.head_dim == 128 ? kv_attention_merge_kernel<128> : kv_attention_merge_kernel<64>;
  const auto threads = static_cast<unsigned>(call.params.head_dim);
  launch_pdl("kv_attention", kernel, {.x = rows, .threads = threads}, stream, call);
}

}  // namespace resq::cuda::attention
