// Which item a block works on. All threads find the same item from the lengths in device memory.
#pragma once

#include "ops/kv_attention/kv_attention_cuda.h"

namespace resq::cuda::attention {

// kRows rows (query, head) of one sequence and kv head, and one split of its tokens (or all of
// them). Row r of the item is row first_row + r of the sequence: query / group, head % group.
struct KvItem {
  int sequence, kv_head, split, first_row, rows;
  int first_query;  // row of q of the sequence's first query
  int visible;      // tokens that its query 0 sees; may be negative

  __device__ int query(int group, int row) const { return (first_row + row) / group; }
  __device__ int64_t token(int group, int row) const { return first_query + query(group, row); }
  __device__ int head(int group, int row) const {
    return kv_head * group + (first_row + row) % group;
  }
  __device__ int last_visible(int group) const { return visible + query(group, rows - 1); }
};

// Queries of sequence `i` from `begin` on, and its tokens. Rows of q after the last sequence form
// one more sequence, of length 0. Numbers that are out of range stop the kernel. load(pointer)
// reads them.
struct KvSequence {
  int begin, queries, length;

  template <class Load>
  __device__ KvSequence(const KvAttentionCuda& call, int64_t i, Load load)
      : begin(0), queries(0), length(0) {
    if (i > call.sequences) return;
    begin = load(call.query_starts + i);
    const bool real = i < call.sequences;
    queries = (real ? load(call.query_starts + i + 1) : static_cast<int>(call.tokens)) - begin;
    length = real ? load(call.seq_lens + i) : 0;
    const bool fits = queries >= 0 && begin + queries <= call.tokens && (i > 0 || begin == 0) &&
                      length >= 0 && length <= call.params.max_pages * call.params.page_size;
    if (!fits) __trap();
  }
};

// Finds item number `index`; false if there are fewer items. Items of a sequence: kv head fastest,
// then split, then rows. A warp counts the items of 32 sequences at once.
template <int kRows>
__device__ inline bool find_item(const KvAttentionCuda& call, int index, KvItem& item) {
  constexpr unsigned kAll = 0xffffffff;
  const int lane = threadIdx.x % 32;
  const int group = static_cast<int>(call.params.group()),
            n_kv = static_cast<int>(call.params.n_kv);
  for (int64_t base = 0; base <= call.sequences; base += 32) {
    const KvSequence s(call, base + lane, [](const int32_t* number) { return *number; });
    const int splits = call.states ? (s.length + kSplitTokens - 1) / kSplitTokens : 1;
    const int count = (s.queries * group + kRows - 1) / kRows * splits * n_kv;
    int end = count;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int before = __shfl_up_sync(kAll, end, distance);
      if (lane >= distance) end += before;
    }
    const unsigned holders = __ballot_sync(kAll, index < end);
    if (holders == 0) {
      index -= __shfl_sync(kAll, end, 31);
      continue;
    }
    const int holder = __ffs(holders) - 1;
    const auto of_holder = [&](int value) { return __shfl_sync(kAll, value, holder); };
    index -= of_holder(end - count);
    const int queries = of_holder(s.queries), tile_items = n_kv * of_holder(splits);
    item.sequence = static_cast<int>(base) + holder;
    item.kv_head = index % n_kv;
    item.split = index % tile_items / n_kv;
    item.first_row = index / tile_items * kRows;
    item.rows = min(kRows, queries * group - item.first_row);
    item.first_query = of_holder(s.begin);
    item.visible = of_holder(s.length) - queries + 1;
    return true;
  }
  return false;
}

}  // namespace resq::cuda::attention
