// Attention of eight (or sixteen) query rows to splits of their tokens, straight from the codes:
// everything except the copies of pages into shared memory (TileRing), which the cp.async and the
// bulk-copy kernel each implement. kv_attention_products.cuh explains the index letters.
//
// Tokens are the rows of the tensor core's A operand and query rows the columns of B, so that a
// group of up to eight heads fills one tile. Warp w takes tiles w, w + 4, ... of a split; the four
// states merge in order at its end, so a row has the same bits in every instance. Blocks walk the
// list of items to its end, so the grid depends on nothing that the host would have to read.
#pragma once

#include <concepts>
#include <type_traits>

#include "ops/kv_attention/kv_attention_queries.cuh"
#include "ops/kv_attention/kv_attention_softmax.cuh"
#include "ops/kv_attention/kv_attention_work.cuh"

namespace resq::cuda::attention {

inline constexpr int kAttendWarps = 4;
inline constexpr int kAttendThreads = 32 * kAttendWarps;
inline constexpr int kTileRows = 8;
inline constexpr int kThreadsPerRow = kAttendThreads / kTileRows;
inline constexpr int kUnits = 4;  // even; the next is found while slow warps store the one before
inline constexpr int kFindingWarp = kAttendWarps - 1;  // looks up what the block does next

template <int kHeadDim>
inline constexpr int kTileTokens = KvLayout<kHeadDim>::kTileTokens;
template <int kHeadDim>
inline constexpr int kSplitTiles = kMostSplitTokens / kTileTokens<kHeadDim>;

// Blocks resident on a multiprocessor, as limited by registers.
constexpr int attend_blocks(int tiles) { return tiles == 1 ? 3 : 2; }

// State of a row as a warp stores it for the merge.
template <int kHeadDim>
struct WarpRow {
  float values[kHeadDim];
  float max, sum, unused[2];
};

// Where a tile of the split lies: the offset of its K words in the cache, and of its metadata from
// there.
struct TilePlace {
  int64_t keys;
  int metadata;
};

// Work of a block between two merges of its warps: an item, or one of its splits in turn.
struct KvUnit {
  KvItem item;  // `split` is the unit's
  int index;    // of the item
  int items;    // there are, as far as is known
  int first_token;
  int tiles;         // of the split, up to the last visible token; negative: the work is done
  bool first, last;  // of the item's units
};

// The split's tiles, of which warp `kFindingWarp` finds the places.
template <int kHeadDim>
__device__ inline void find_tiles(const KvAttentionCuda& call, const KvUnit& unit,
                                  TilePlace* places) {
  const KvAttentionParams& p = call.params;
  const int page_size = call.page_size.number;
#pragma unroll 1
  for (int tile = threadIdx.x % 32; tile < unit.tiles; tile += 32) {
    const int token = unit.first_token + tile * kTileTokens<kHeadDim>;
    const int before = call.page_size.divide(token);
    const int32_t page = p.block_table[unit.item.sequence * p.max_pages + before];
    if (page < 0 || page >= call.pages) __trap();
    const int position = token - before * page_size;
    const int64_t keys = kv_k_tile_byte<kHeadDim>(position);
    places[tile] = {
        (page * p.n_kv + unit.item.kv_head) * page_size * KvLayout<kHeadDim>::kTokenBytes + keys,
        static_cast<int>(kv_metadata_byte<kHeadDim>(page_size, position) - keys)};
  }
}

// A warp finds the unit behind `previous` (null: the block's first one), and the places of its
// tiles.
template <int kHeadDim, int kRows>
__device__ inline void find_unit(const KvAttentionCuda& call, const KvUnit* previous, KvUnit& to,
                                 TilePlace* places) {
  constexpr int kTokens = kTileTokens<kHeadDim>;
  const Divisor& group = call.group;
  KvUnit unit = {};
  unit.tiles = -1;
  unit.items = previous ? previous->items : kManyItems;
  int last = 0;  // tokens that the item's last row sees
  if (previous && !previous->last) {
    unit.item = previous->item;
    unit.index = previous->index;
    unit.item.split += 1;
    unit.first = false;
    unit.tiles = 0;
    last = unit.item.last_visible(group);
  } else {
    unit.index = previous ? previous->index : static_cast<int>(blockIdx.x - gridDim.x);
    unit.first = true;
    while (unit.tiles < 0) {
      unit.index += static_cast<int>(gridDim.x);
      if (unit.index >= unit.items) break;
      if (!find_item<kRows>(call, unit.index, unit.item, unit.items)) break;
      last = unit.item.last_visible(group);
      // Other items have no rows, or none that sees the split.
      const bool seen = unit.item.splits == 1 || unit.item.split * unit.item.split_tokens < last;
      if (unit.item.rows > 0 && seen) unit.tiles = 0;
    }
  }
  if (unit.tiles == 0) {
    unit.first_token = unit.item.split * unit.item.split_tokens;
    const int tokens = min(last - unit.first_token, unit.item.split_tokens);
    unit.tiles = (max(tokens, 0) + kTokens - 1) / kTokens;
    unit.last = unit.item.splits > 1 || unit.first_token + unit.item.split_tokens >= last;
  }
  if (threadIdx.x % 32 == 0) to = unit;
  find_tiles<kHeadDim>(call, unit, places);
}

// A tile in shared memory.
struct TileParts {
  const uint8_t *keys, *metadata, *values;
};

// Copies the tiles of units into shared memory, for all warps of a block or each warp for itself.
// In step s warp w takes tile kAttendWarps s + w. All threads call, for every unit,
//   start(which, tiles)  once shared.places[which] holds the unit's tiles
//   follow(tiles)  behind a barrier, once shared.places[1 - which] holds those of the unit behind
//                  it: their copies may begin as stages become free
//   wait(step)     the warp's tile of the step, complete and visible to its lanes; if the unit has
//                  no such tile, memory that must not be read
//   release(step)  after the lane's last read of that tile: it may be overwritten
//   finish()       after the last step: `shared.rows` may be written
// with step = 0, 1, ... in turn, and a barrier of the block between finish and the next start.
template <class Ring>
concept TileRing = requires(Ring ring, int number) {
  ring.start(number, number);
  ring.follow(number);
  { ring.wait(number) } -> std::same_as<TileParts>;
  ring.release(number);
  ring.finish();
};

// A lane's part of a tile in registers: everything it needs from shared memory.
template <int kHeadDim>
struct Tile {
  TileWords k, v;
  uint4 metadata[kTileTokens<kHeadDim> / 8];  // of token rows g, g + 8, ...

  __device__ void read(const TileParts& parts, int lane) {
    k = TileWords(parts.keys, lane);
    v = TileWords(parts.values, lane);
    const auto* stored = reinterpret_cast<const uint4*>(parts.metadata) + lane / 4;
#pragma unroll
    for (int row = 0; row < kTileTokens<kHeadDim> / 8; ++row) metadata[row] = stored[8 * row];
  }
};

// A warp's registers of its item, and its steps.
template <int kHeadDim, int kTiles>
struct AttendWarp {
  QueryOperand<kHeadDim> queries[kTiles];
  QueryColumns columns[kTiles];
  int lane, g, i;

  static constexpr int kGroups = kTileTokens<kHeadDim> / 16;
  struct TileScores {
    ScoreSums groups[kGroups][kTiles];
  };

  // From the item's rows in shared memory.
  __device__ void read(const KvAttentionCuda& call, const KvItem& item,
                       const QueryRows<kHeadDim, kTiles * kTileRows>& rows) {
    lane = threadIdx.x % 32, g = lane / 4, i = lane % 4;
    const Divisor& group = call.group;
    const int last = item.rows - 1;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      // Rows past the last one repeat its numbers.
      const int row = min(n * kTileRows + g, last);
#pragma unroll
      for (int r = 0; r < kHeadDim / 8; ++r) queries[n].values[r] = rows.values[row][4 * r + i];
#pragma unroll
      for (int r = 0; r < kHeadDim / 64; ++r) {
        queries[n].residuals[r] = rows.residuals[row][4 * r + i];
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int column = n * kTileRows + 2 * i + h;
        const QueryNumbers numbers = rows.numbers[min(column, last)];
        columns[n].multiplier[h] = numbers.multiplier * (1.0f / kKvScaleFactor);
        columns[n].sum_low[h] = numbers.sum_low * kKvScaleFactor;
        columns[n].sum_high[h] = numbers.sum_high * kKvScaleFactor;
        columns[n].visible[h] = item.visible + item.query(group, min(column, last));
      }
    }
  }

  // Scores of 16 tokens of a tile, without their ranges.
  template <int kGroup>
  __device__ void score_group(const Tile<kHeadDim>& tile, TileScores& scores) const {
    key_products<kHeadDim, kGroup>(tile.k, queries, scores.groups[kGroup]);
  }
  __device__ void score_tile(const Tile<kHeadDim>& tile, TileScores& scores) const {
    score_group<0>(tile, scores);
    if constexpr (kGroups == 2) score_group<1>(tile, scores);
  }

  template <int kGroup>
  __device__ void attend_group(const Tile<kHeadDim>& tile, const TileScores& scores, int token,
                               bool masked, RunningSoftmax<kHeadDim> (&softmax)[kTiles]) const {
    const TokenRanges ranges[2] = {TokenRanges(tile.metadata[2 * kGroup]),
                                   TokenRanges(tile.metadata[2 * kGroup + 1])};
    WeightOperand weights[kTiles];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const int first = token + 16 * kGroup + g;
      const ScoreSums& sums = scores.groups[kGroup][n];
      weights[n] = masked ? softmax[n].template add<true>(sums, ranges, columns[n], first)
                          : softmax[n].template add<false>(sums, ranges, columns[n], first);
    }
    value_products<kHeadDim, kGroup>(tile.v, weights, softmax);
  }

  // `masked`: some row may not see all of the tile.
  __device__ void attend_tile(const Tile<kHeadDim>& tile, const TileScores& scores, int token,
                              bool masked, RunningSoftmax<kHeadDim> (&softmax)[kTiles]) const {
    attend_group<0>(tile, scores, token, masked, softmax);
    if constexpr (kGroups == 2) attend_group<1>(tile, scores, token, masked, softmax);
  }

  // Stores the warp's state of every row in shared memory.
  __device__ void leave(RunningSoftmax<kHeadDim>& softmax, WarpRow<kHeadDim>* rows) const {
    softmax.finish();
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int h = c % 2, half = c / 2;
      WarpRow<kHeadDim>& row = rows[2 * i + h];
      constexpr int kWhole = KvLayout<kHeadDim>::kLowDims / 16;
      const auto& blocks = softmax.out.blocks;
#pragma unroll
      for (int b = 0; b < kWhole; ++b) {
        row.values[16 * b + 8 * half + g] = softmax.low_value(blocks[b][c], h);
      }
      if constexpr (kHeadDim == 128) {
        row.values[112 + 8 * half + g] = softmax.high_value(blocks[7][c], h);
      } else {
        const float other = __shfl_xor_sync(kAllLanes, blocks[4][c], 16);
        if (g < 4) row.values[48 + 4 * half + g] = softmax.low_value(blocks[3][c] + other, h);
        if (half == 0) row.values[56 + g] = softmax.high_value(blocks[5][c], h);
      }
      if (g == 0 && half == 0) {
        row.max = softmax.max[h];
        row.sum = softmax.sum[h];
      }
    }
  }
};

// A thread's dims of one row, for each tile of eight rows.
template <int kHeadDim>
using ThreadState = RowState<kHeadDim / kThreadsPerRow>;

// The states of a unit's rows: the sums of the warps' states, in order, under their common maximum.
template <int kHeadDim, int kTiles, class Shared>
__device__ inline void merge_warps(const Shared& shared, ThreadState<kHeadDim> (&states)[kTiles]) {
  constexpr int kDims = kHeadDim / kThreadsPerRow;
  const int dim = threadIdx.x % kThreadsPerRow * kDims;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const int row = n * kTileRows + threadIdx.x / kThreadsPerRow;
    ThreadState<kHeadDim>& state = states[n];
    state = {};
#pragma unroll
    for (int w = 0; w < kAttendWarps; ++w) state.max = fmaxf(state.max, shared.rows[w][row].max);
#pragma unroll
    for (int w = 0; w < kAttendWarps; ++w) {
      const WarpRow<kHeadDim>& part = shared.rows[w][row];
      // A warp that has seen no token has only zeros, and no maximum.
      const float factor =
          part.sum == 0.0f ? 0.0f : exp2_approximate(__fsub_rn(part.max, state.max));
      state.sum = __fmaf_rn(part.sum, factor, state.sum);
#pragma unroll
      for (int d = 0; d < kDims; ++d) {
        state.values[d] = __fmaf_rn(part.values[dim + d], factor, state.values[d]);
      }
    }
  }
}

template <int kHeadDim>
__device__ inline void store_state(const ThreadState<kHeadDim>& state, float* to) {
  constexpr int kDims = kHeadDim / kThreadsPerRow;
  const int part = threadIdx.x % kThreadsPerRow;
#pragma unroll
  for (int d = 0; d < kDims; d += 4) {
    *reinterpret_cast<float4*>(to + part * kDims + d) =
        make_float4(state.values[d], state.values[d + 1], state.values[d + 2], state.values[d + 3]);
  }
  if (part == 0) *reinterpret_cast<float2*>(to + kHeadDim) = {state.max, state.sum};
}

// Writes an item's states, or its result if its block has taken all splits.
template <int kHeadDim, int kTiles>
__device__ inline void store_item(const KvAttentionCuda& call, const KvItem& item,
                                  const ThreadState<kHeadDim> (&total)[kTiles]) {
  const KvAttentionParams& p = call.params;
  const Divisor& group = call.group;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const int row = n * kTileRows + threadIdx.x / kThreadsPerRow;
    if (row >= item.rows) continue;
    if (item.splits > 1) {
      const int first_state = row_state(call, item.first_state, item.splits, item.query(group, row),
                                        item.head(group, row));
      store_state<kHeadDim>(total[n], call.states + int64_t{first_state + item.split} *
                                                        kv_cuda_state_floats(kHeadDim));
    } else {
      const int dim = threadIdx.x % kThreadsPerRow * (kHeadDim / kThreadsPerRow);
      store_row(total[n], p, {p, item.token(group, row), item.head(group, row)}, dim);
    }
  }
}

// The work of a block: `shared` holds units, places, queries and rows. While a unit is computed
// the ring already asks for the tiles of the next one, so that memory is busy while warps merge.
template <int kHeadDim, int kTiles, class Shared, TileRing Ring>
__device__ inline void attend_items(const KvAttentionCuda& call, Shared& shared, Ring ring) {
  constexpr int kTokens = kTileTokens<kHeadDim>, kRows = kTiles * kTileRows;
  const int warp = threadIdx.x / 32;
  const bool finds = warp == kFindingWarp;
  if (finds) find_unit<kHeadDim, kRows>(call, nullptr, shared.units[0], shared.places[0]);
  __syncthreads();
  ThreadState<kHeadDim> total[kTiles];
#pragma unroll 1
  for (int now = 0; shared.units[now].tiles >= 0; now = (now + 1) % kUnits) {
    const KvUnit& unit = shared.units[now];
    KvUnit& next = shared.units[(now + 1) % kUnits];
    ring.start(now % 2, unit.tiles);
    if (unit.first) make_queries(call, unit.item, shared.queries);
    if (finds) find_unit<kHeadDim, kRows>(call, &unit, next, shared.places[(now + 1) % 2]);
    __syncthreads();
    ring.follow(next.tiles);

    AttendWarp<kHeadDim, kTiles> self;
    self.read(call, unit.item, shared.queries);
    RunningSoftmax<kHeadDim> softmax[kTiles];
    const int tiles = unit.tiles;
    // The first ones, which all rows see whole.
    const int plain_tiles =
        (unit.item.visible + unit.item.query(call.group, 0) - unit.first_token) / kTokens;
    for (int step = 0; step * kAttendWarps < tiles; ++step) {
      const int index = step * kAttendWarps + warp;
      const TileParts parts = ring.wait(step);
      Tile<kHeadDim> tile;
      typename AttendWarp<kHeadDim, kTiles>::TileScores scores;
      if (index < tiles) {
        tile.read(parts, self.lane);
        self.score_tile(tile, scores);
      }
      ring.release(step);  // behind the first products, so that it does not wait for the reads
      if (index >= tiles) continue;
      const int token = unit.first_token + index * kTokens;
      // A second instance of `add` costs more registers than sixteen rows leave.
      const bool masked = kTiles > 1 || index >= plain_tiles;
      self.attend_tile(tile, scores, token, masked, softmax);
    }
    ring.finish();
#pragma unroll
    for (int n = 0; n < kTiles; ++n) self.leave(softmax[n], shared.rows[warp] + n * kTileRows);
    __syncthreads();

    ThreadState<kHeadDim> states[kTiles];
    merge_warps<kHeadDim>(shared, states);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      if (unit.first) {
        total[n] = states[n];
      } else {
        total[n].merge(states[n]);
      }
    }
    if (unit.last) store_item<kHeadDim>(call, unit.item, total);
  }
}

// launch(head_dim, tiles, blocks) with std::integral_constants: the instance of a kernel that takes
// kTileRows x tiles rows an item, and its grid.
template <class Launch>
inline void launch_attend(const KvAttentionCuda& call, const Device& device, Launch launch) {
  const KvAttentionParams& p = call.params;
  const auto with_tiles = [&](auto head_dim, auto tiles) {
    // As many blocks as there can be items, and at most as many as are resident at once.
    const int64_t groups = call.tokens * p.group() / (tiles * kTileRows) + call.sequences + 1;
    const int64_t items = groups * p.n_kv * (call.states ? call.most_splits() : 1);
    const int64_t resident = int64_t{device.sms} * attend_blocks(tiles);
    launch(head_dim, tiles, static_cast<unsigned>(items < resident ? items : resident));
  };
  const auto with_head_dim = [&](auto head_dim) {
    // With more than eight rows per sequence on average, sixteen share the unpacking. The bits are
    // the same.
    const bool many = call.tokens * p.group() > kTileRows * call.sequences;
    many ? with_tiles(head_dim, std::integral_constant<int, 2>())
         : with_tiles(head_dim, std::integral_constant<int, 1>());
  };
  p.head_dim == 128 ? with_head_dim(std::integral_constant<int, 128>())
                    : with_head_dim(std::integral_constant<int, 64>());
}

}  // namespace resq::cuda::attention
