// Which item a block works on, and where the states of its splits lie. Every warp finds the same
// from the lengths in device memory.
#pragma once

#include "ops/kv_attention/kv_attention_cuda.h"

namespace resq::cuda::attention {

// kRows rows (query, head) of one sequence, tier and kv head, and one split of its tokens (or all
// of them). Row r of the item is row first_row + r of the sequence: query / group, head % group.
struct KvItem {
  int sequence, kv_head, split, first_row, rows;
  int first_query;   // row of q of the sequence's first query
  int visible;       // tokens that its query 0 sees; may be negative
  int split_tokens;  // the same for all rows
  int splits;        // that are items of their own; 1: the item takes all of them
  int first_state;   // see row_state

  __device__ int query(const Divisor& group, int row) const {
    return group.divide(first_row + row);
  }
  __device__ int64_t token(const Divisor& group, int row) const {
    return first_query + query(group, row);
  }
  __device__ int head(const Divisor& group, int row) const {
    return kv_head * group.number + group.remainder(first_row + row);
  }
  __device__ int last_visible(const Divisor& group) const {
    return visible + query(group, rows - 1);
  }
};

// The queries of a sequence that are in a tier.
struct KvTier {
  int first, queries;
  int splits;  // of the last one; at least 1

  __device__ int states(int n_q) const { return splits > 1 ? queries * n_q * splits : 0; }
};

// Where the states of a row (query of the sequence, head) lie, one split after the other. Those of
// a tier lie behind those of the tiers and sequences before it. `first_state` is where the states
// of query 0 would lie if it were in the tier.
__device__ inline int row_state(const KvAttentionCuda& call, int first_state, int splits, int query,
                                int head) {
  return first_state + (query * call.group.number * call.kv_heads.number + head) * splits;
}

// Queries of sequence `i` from `begin` on, and its tokens. Rows of q after the last sequence form
// one more sequence, of length 0. Numbers that are out of range stop the kernel. load(pointer)
// reads them.
struct KvSequence {
  int begin, queries, length;

  __device__ KvSequence(int begin, int queries, int length)
      : begin(begin), queries(queries), length(length) {}
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

  // `whole`: it has no splits.
  __device__ KvTier tier(int number, bool whole) const {
    const auto end = [&](int t) {
      return t == kTiers - 1 ? queries : min(max(tier_tokens(t) - (length - queries), 0), queries);
    };
    const int first = number == 0 ? 0 : end(number - 1), past = end(number);
    const int split = tier_split(number);
    const int splits = whole ? 1 : max((length - queries + past + split - 1) / split, 1);
    return {first, past - first, splits};
  }

  // Whether its states alone are more than the workspace holds. The products are exact up to 2^24,
  // which is more.
  __device__ bool exceeds(const KvAttentionCuda& call) const {
    float states = 0.0f;
#pragma unroll
    for (int t = 0; t < kTiers; ++t) {
      const KvTier part = tier(t, false);
      const auto rows = static_cast<float>(part.queries * call.group.number * call.kv_heads.number);
      if (part.splits > 1) states += rows * static_cast<float>(part.splits);
    }
    return states > static_cast<float>(call.capacity);
  }
};

// Sums over the lanes up to and including this one; of states at most kMostStates.
inline constexpr int kMostStates = 1 << 30;
static_assert(kKvMaxStateBytes < kMostStates);
struct KvSums {
  int items, states;

  __device__ void scan() {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int items_before = __shfl_up_sync(kAllLanes, items, distance);
      const int states_before = __shfl_up_sync(kAllLanes, states, distance);
      if (lane < distance) continue;
      items += items_before;
      states = min(states + states_before, kMostStates);
    }
  }
};

// A sequence that a warp has found.
inline constexpr int kManyItems = 0x7fffffff;
struct KvPlace {
  int number;
  int begin, queries, length;
  int items_before, states_before;
  int items;    // of all sequences, or kManyItems if the warp has not looked at all of them
  bool whole;   // its states alone exceed the workspace: no splits
  bool beyond;  // with those before they do: blocks with the first split take all of them
};

// Finds the first sequence for which `holds(sequence, items up to its end)`. A warp looks at 32
// sequences at once.
template <int kRows, class Load, class Holds>
__device__ inline bool find_sequence(const KvAttentionCuda& call, Load load, Holds holds,
                                     KvPlace& place) {
  const int lane = threadIdx.x % 32;
  const int group = call.group.number, n_kv = call.kv_heads.number, n_q = group * n_kv;
  KvSums before = {0, 0};
  for (int64_t base = 0; base <= call.sequences; base += 32) {
    const KvSequence s(call, base + lane, load);
    const bool whole = s.exceeds(call);
    KvSums own = {0, 0};
#pragma unroll
    for (int t = 0; t < kTiers; ++t) {
      const KvTier part = s.tier(t, whole);
      own.items += (part.queries * group + kRows - 1) / kRows * part.splits * n_kv;
      own.states += part.states(n_q);
    }
    KvSums end = own;
    end.scan();
    end.items += before.items;
    end.states = min(end.states + before.states, kMostStates);
    const unsigned holders = __ballot_sync(kAllLanes, holds(s, end.items));
    const int holder = holders == 0 ? 31 : __ffs(holders) - 1;
    const auto of_holder = [&](int value) { return __shfl_sync(kAllLanes, value, holder); };
    const int items = __shfl_sync(kAllLanes, end.items, 31);
    before = {of_holder(end.items), of_holder(end.states)};
    if (holders == 0) continue;
    place.items = base + 32 > call.sequences ? items : kManyItems;
    place.number = static_cast<int>(base) + holder;
    place.begin = of_holder(s.begin);
    place.queries = of_holder(s.queries);
    place.length = of_holder(s.length);
    place.items_before = before.items - of_holder(own.items);
    place.states_before = before.states - of_holder(own.states);
    place.whole = of_holder(whole);
    place.beyond = before.states > call.capacity;
    return true;
  }
  return false;
}

// Finds item number `index`, and as much as is known of the number of items; false if there are
// fewer. Items of a sequence: kv head fastest, then split, then rows, then tier. Where the states
// lie beyond the workspace an item of split 0 takes all splits, and the others have no rows.
template <int kRows>
__device__ inline bool find_item(const KvAttentionCuda& call, int index, KvItem& item, int& items) {
  const int group = call.group.number, n_kv = call.kv_heads.number, n_q = group * n_kv;
  KvPlace place;
  const bool found = find_sequence<kRows>(
      call, [](const int32_t* number) { return *number; },
      [&](const KvSequence&, int past) { return index < past; }, place);
  if (!found) return false;
  items = place.items;
  index -= place.items_before;
  const KvSequence s(place.begin, place.queries, place.length);
  int first_state = place.states_before;
#pragma unroll
  for (int t = 0; t < kTiers; ++t) {
    const KvTier part = s.tier(t, place.whole);
    const int tile_items = n_kv * part.splits;
    const int items = (part.queries * group + kRows - 1) / kRows * tile_items;
    if (index >= items) {
      index -= items;
      first_state += part.states(n_q);
      continue;
    }
    // In a decode step there is one tile of rows, and nothing to divide.
    const int of_head = call.kv_heads.divide(index);
    const int row_tile = of_head < part.splits ? 0 : of_head / part.splits;
    const int row = row_tile * kRows;
    item.sequence = place.number;
    item.kv_head = index - of_head * n_kv;
    item.split = of_head - row_tile * part.splits;
    item.first_row = part.first * group + row;
    item.rows = min(kRows, part.queries * group - row);
    item.first_query = s.begin;
    item.visible = s.length - s.queries + 1;
    item.split_tokens = tier_split(t);
    item.splits = place.beyond ? 1 : part.splits;
    item.first_state = first_state - part.first * n_q * part.splits;
    if (place.beyond && item.split > 0) item.rows = 0;
    return true;
  }
  return false;
}

}  // namespace resq::cuda::attention
