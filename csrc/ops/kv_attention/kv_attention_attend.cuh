// Attention of eight (or sixteen) query rows to splits of 1024 tokens, straight from the codes:
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

template <int kHeadDim>
inline constexpr int kTileTokens = KvLayout<kHeadDim>::kTileTokens;
template <int kHeadDim>
inline constexpr int kSplitTiles = kSplitTokens / kTileTokens<kHeadDim>;

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

// Fills `places` for the split's tiles below `tiles`.
template <int kHeadDim>
__device__ inline void find_tiles(const KvAttentionCuda& call, const KvItem& item, int split,
                                  int tiles, TilePlace* places) {
  const KvAttentionParams& p = call.params;
  const int tile = threadIdx.x, page_size = static_cast<int>(p.page_size);
  if (tile >= tiles) return;
  const int token = split * kSplitTokens + tile * kTileTokens<kHeadDim>;
  const int32_t page = p.block_table[item.sequence * p.max_pages + token / page_size];
  if (page < 0 || page >= call.pages) __trap();
  const int position = token % page_size;
  const int64_t keys = kv_k_tile_byte<kHeadDim>(position);
  places[tile] = {
      (page * p.n_kv + item.kv_head) * page_size * KvLayout<kHeadDim>::kTokenBytes + keys,
      static_cast<int>(kv_metadata_byte<kHeadDim>(page_size, position) - keys)};
}

// A tile in shared memory.
struct TileParts {
  const uint8_t *keys, *metadata, *values;
};

// Copies the tiles of a split into shared memory, for all warps of a block or each warp for itself.
// In step s warp w takes tile kAttendWarps s + w. All threads call
//   start(tiles)   once `shared.places` holds the split's tiles; the first copies begin
//   wait(step)     the warp's tile of the step, complete and visible to its lanes; if the split has
//                  no such tile, memory that must not be read
//   release(step)  after the lane's last read of that tile: it may be overwritten
//   finish()       after the last step: no copy is in flight, and `shared.rows` may be written
// with step = 0, 1, ... in turn, and a barrier of the block between finish and the next start.
template <class Ring>
concept TileRing = requires(Ring ring, int number) {
  ring.start(number);
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

  // From the item's rows in shared memory.
  __device__ void read(const KvAttentionCuda& call, const KvItem& item,
                       const QueryRows<kHeadDim, kTiles * kTileRows>& rows) {
    lane = threadIdx.x % 32, g = lane / 4, i = lane % 4;
    const int group = static_cast<int>(call.params.group()), last = item.rows - 1;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      // Rows past the last one are masked, and repeat its numbers.
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
        columns[n].visible[h] = column <= last ? item.visible + item.query(group, column) : 0;
      }
    }
  }

  // 16 tokens of a tile.
  template <int kGroup>
  __device__ void attend_group(const Tile<kHeadDim>& tile, int token,
                               RunningSoftmax<kHeadDim> (&softmax)[kTiles]) const {
    ScoreSums sums[kTiles];
    key_products<kHeadDim, kGroup>(tile.k, queries, sums);
    const TokenRanges ranges[2] = {TokenRanges(tile.metadata[2 * kGroup]),
                                   TokenRanges(tile.metadata[2 * kGroup + 1])};
    WeightOperand weights[kTiles];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      weights[n] = softmax[n].add(sums[n], ranges, columns[n], token + 16 * kGroup + g);
    }
    value_products<kHeadDim, kGroup>(tile.v, weights, softmax);
  }

  __device__ void attend_tile(const Tile<kHeadDim>& tile, int token,
                              RunningSoftmax<kHeadDim> (&softmax)[kTiles]) const {
    attend_group<0>(tile, token, softmax);
    if constexpr (kTileTokens<kHeadDim> == 32) attend_group<1>(tile, token, softmax);
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

// Starts the copies of a split's tiles, up to the last visible token; returns their number.
template <int kHeadDim, class Shared, TileRing Ring>
__device__ inline int start_split(const KvAttentionCuda& call, const KvItem& item, int split,
                                  Shared& shared, Ring& ring) {
  constexpr int kTokens = kTileTokens<kHeadDim>;
  const int last = item.last_visible(static_cast<int>(call.params.group()));
  const int tiles = (min(last - split * kSplitTokens, kSplitTokens) + kTokens - 1) / kTokens;
  find_tiles<kHeadDim>(call, item, split, tiles, shared.places);
  __syncthreads();
  ring.start(tiles);
  return tiles;
}

// Processes a split after start_split; sets `states` to the thread's part of its states.
template <int kHeadDim, int kTiles, class Shared, TileRing Ring>
__device__ inline void attend_split(int first_token, int tiles,
                                    const AttendWarp<kHeadDim, kTiles>& self, Shared& shared,
                                    Ring& ring, ThreadState<kHeadDim> (&states)[kTiles]) {
  constexpr int kTokens = kTileTokens<kHeadDim>;
  const int warp = threadIdx.x / 32;
  RunningSoftmax<kHeadDim> softmax[kTiles];
  for (int step = 0; step * kAttendWarps < tiles; ++step) {
    const int index = step * kAttendWarps + warp;
    const TileParts parts = ring.wait(step);
    Tile<kHeadDim> tile;
    if (index < tiles) tile.read(parts, self.lane);
    ring.release(step);
    if (index < tiles) self.attend_tile(tile, first_token + index * kTokens, softmax);
  }
  ring.finish();

#pragma unroll
  for (int n = 0; n < kTiles; ++n) self.leave(softmax[n], shared.rows[warp] + n * kTileRows);
  __syncthreads();
  const int dim = threadIdx.x % kThreadsPerRow * (kHeadDim / kThreadsPerRow);
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    states[n] = {};
    for (int w = 0; w < kAttendWarps; ++w) {
      const auto& row = shared.rows[w][n * kTileRows + threadIdx.x / kThreadsPerRow];
      ThreadState<kHeadDim> part;
      part.max = row.max;
      part.sum = row.sum;
#pragma unroll
      for (int d = 0; d < kHeadDim / kThreadsPerRow; ++d) part.values[d] = row.values[dim + d];
      states[n].merge(part);
    }
  }
  __syncthreads();  // before shared.places and shared.rows are written again
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

// The work of a block: `shared` holds queries, places and rows.
template <int kHeadDim, int kTiles, class Shared, TileRing Ring>
__device__ inline void attend_items(const KvAttentionCuda& call, Shared& shared, Ring ring) {
  const KvAttentionParams& p = call.params;
  const int group = static_cast<int>(p.group());
  KvItem item;
  for (int index = blockIdx.x; find_item<kTiles * kTileRows>(call, index, item);
       index += gridDim.x) {
    const int splits = (max(item.last_visible(group), 0) + kSplitTokens - 1) / kSplitTokens;
    if (call.states && item.split >= splits) continue;  // no row sees this split
    const int first = call.states ? item.split : 0, end = call.states ? first + 1 : splits;

    AttendWarp<kHeadDim, kTiles> self;
    ThreadState<kHeadDim> total[kTiles];
    for (int split = first; split < end; ++split) {
      const int tiles = start_split<kHeadDim>(call, item, split, shared, ring);
      if (split == first) {  // while the first tiles are in flight
        make_queries(call, item, shared.queries);
        __syncthreads();
        self.read(call, item, shared.queries);
      }
      ThreadState<kHeadDim> states[kTiles];
      attend_split(split * kSplitTokens, tiles, self, shared, ring, states);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        if (call.states) {
          total[n] = states[n];
        } else {
          total[n].merge(states[n]);
        }
      }
    }

#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const int row = n * kTileRows + threadIdx.x / kThreadsPerRow;
      if (row >= item.rows) continue;
      const int64_t token = item.token(group, row), head = item.head(group, row);
      const int64_t index = token * p.n_q + head;
      if (call.states) {
        store_state<kHeadDim>(total[n], call.states + (index * call.splits() + item.split) *
                                                          kv_cuda_state_floats(kHeadDim));
      } else {
        const int dim = threadIdx.x % kThreadsPerRow * (kHeadDim / kThreadsPerRow);
        store_row(total[n], p, {p, token, head}, dim);
      }
    }
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
    const int64_t items = groups * p.n_kv * (call.states ? call.splits() : 1);
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
