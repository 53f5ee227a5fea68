// Merges the splits of every row in their order: one block a row, one thread a dim. On sm_90 the
// blocks look up the sequence lengths while the attention kernel finishes (cuda/pdl.cuh).
#include <cuda_runtime.h>

#include "cuda/pdl.cuh"
#include "ops/kv_attention/kv_attention_softmax.cuh"
#include "ops/kv_attention/kv_attention_work.cuh"

namespace resq::cuda::attention {
namespace {

constexpr int kAhead = 16;  // splits whose loads are in flight at once

// state.merge(part) for all parts in turn, with the same bits. The maxima after each part do not
// depend on the sums, so that the powers of two wait for nothing but them.
__device__ inline void merge_in_order(RowState<1>& state, const RowState<1> (&parts)[kAhead]) {
  float before[kAhead], after[kAhead];
#pragma unroll
  for (int s = 0; s < kAhead; ++s) {
    const float common = fmaxf(state.max, parts[s].max);
    const bool none = parts[s].sum == 0.0f;
    before[s] = none ? 1.0f : exp2_approximate(__fsub_rn(state.max, common));
    after[s] = none ? 0.0f : exp2_approximate(__fsub_rn(parts[s].max, common));
    state.max = common;
  }
#pragma unroll
  for (int s = 0; s < kAhead; ++s) {
    state.sum = __fmaf_rn(state.sum, before[s], __fmul_rn(parts[s].sum, after[s]));
    state.values[0] =
        __fmaf_rn(state.values[0], before[s], __fmul_rn(parts[s].values[0], after[s]));
  }
}

// A row of q: what its merge needs to know.
struct KvRow {
  int query, visible;  // number within its sequence, tokens that it sees
  int splits;          // of its tier; 1: attention has written its result
  int first_state;     // see row_state
};

// The lengths are read before pdl_wait: what wrote them was complete before the attention kernel
// let this one start, but nothing promises that this multiprocessor's first-level cache has
// forgotten those of the previous step. __ldcg reads them from the second level, which has them.
__device__ inline KvRow find_row(const KvAttentionCuda& call, int token) {
  KvPlace place;
  const bool found = find_sequence<8>(
      call, [](const int32_t* number) { return __ldcg(number); },
      [&](const KvSequence& s, int) { return token >= s.begin && token < s.begin + s.queries; },
      place);
  if (!found || place.beyond) return {0, 0, 1, 0};
  const KvSequence s(place.begin, place.queries, place.length);
  KvRow row = {token - s.begin, s.length - s.queries + 1 + token - s.begin, 1, place.states_before};
  bool past = false;
#pragma unroll
  for (int t = 0; t < kTiers; ++t) {
    const KvTier part = s.tier(t, place.whole);
    if (past) continue;
    past = row.query < part.first + part.queries;
    const int n_q = call.group.number * call.kv_heads.number;
    if (past) row.splits = part.splits;
    row.first_state += past ? -part.first * n_q * part.splits : part.states(n_q);
  }
  return row;
}

// Before pdl_wait nothing is read that the attention kernel writes, and nothing through the
// first-level cache.
template <int kHeadDim>
__global__ void __launch_bounds__(kHeadDim)
    kv_attention_merge_kernel(const __grid_constant__ KvAttentionCuda call) {
  constexpr int kFloats = kv_cuda_state_floats(kHeadDim);
  const auto heads = static_cast<unsigned>(call.params.n_q);
  const unsigned token = blockIdx.x / heads, head = blockIdx.x % heads;
  const KvRow row = find_row(call, static_cast<int>(token));
  pdl_wait();
  if (row.splits == 1) return;
  const int splits = split_count(row.visible);
  const int first_state =
      row_state(call, row.first_state, row.splits, row.query, static_cast<int>(head));
  const float* states = call.states + int64_t{first_state} * kFloats;
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
    merge_in_order(total, parts);
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
