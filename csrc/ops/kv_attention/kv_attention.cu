// Attention of eight (or sixteen) query rows to a split of 1024 tokens, straight from the codes.
//
// Tokens are the rows of the tensor core's A operand and query rows the columns of B, so that a
// group of up to eight heads fills one tile. Warp w takes tiles w, w + 4, ... through a ring of its
// own in shared memory and never waits for another warp until the split's end, where the four
// states merge in order. Blocks walk the list of items until it ends: the grid depends on nothing
// that the host would have to read.
#include <cuda_runtime.h>

#include "cuda/copy_sm80.cuh"
#include "cuda/numbers.cuh"
#include "ops/kv_attention/kv_attention_softmax.cuh"
#include "ops/kv_attention/kv_attention_work.cuh"

namespace resq::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kStages = 4;  // 40 KB a block in flight: three blocks cover 1 us of 33 bytes/ns
constexpr int kTileRows = 8;
constexpr int kThreadsPerRow = kThreads / kTileRows;

// A tile's K words, metadata and V words, one after the other.
template <int kHeadDim>
struct Stage {
  static constexpr int kTokens = KvLayout<kHeadDim>::kTileTokens;
  static constexpr int kMetadata = kKvTileBytes;
  static constexpr int kValues = kMetadata + kTokens * kKvMetadataBytes;
  static constexpr int kBytes = kValues + kKvTileBytes;
};

// State of a row as warps leave it for the merge.
template <int kHeadDim>
struct WarpRow {
  float values[kHeadDim];
  float max, sum, unused[2];
};

// Where the tiles of the split lie: K words in the cache, and metadata from there.
struct TilePlace {
  int64_t keys;
  int metadata;
};

template <int kHeadDim, int kTiles>
struct Shared {
  static constexpr int kSplitTiles = kSplitTokens / Stage<kHeadDim>::kTokens;
  union {
    uint8_t ring[kWarps][kStages][Stage<kHeadDim>::kBytes];
    WarpRow<kHeadDim> rows[kWarps][kTiles * kTileRows];
  };
  TilePlace places[kSplitTiles];
};

// Fills `places` for the split's tiles below `tiles`.
template <int kHeadDim>
__device__ void find_tiles(const KvAttentionCuda& call, const KvItem& item, int split, int tiles,
                           TilePlace* places) {
  const KvAttentionParams& p = call.params;
  const int tile = threadIdx.x, page_size = static_cast<int>(p.page_size);
  if (tile >= tiles) return;
  const int token = split * kSplitTokens + tile * Stage<kHeadDim>::kTokens;
  const int32_t page = p.block_table[item.sequence * p.max_pages + token / page_size];
  if (page < 0 || page >= call.pages) __trap();
  const int position = token % page_size;
  const int64_t keys = kv_k_tile_byte<kHeadDim>(position);
  places[tile] = {
      (page * p.n_kv + item.kv_head) * page_size * KvLayout<kHeadDim>::kTokenBytes + keys,
      static_cast<int>(kv_metadata_byte<kHeadDim>(page_size, position) - keys)};
}

// Starts the copies of one tile; every lane commits a group, also where there is no tile.
template <int kHeadDim>
__device__ void fetch_tile(const KvAttentionCuda& call, const TilePlace* place, uint8_t* stage) {
  using S = Stage<kHeadDim>;
  if (place) {
    const int lane_byte = threadIdx.x % 32 * 16;
    const uint8_t* keys = call.params.cache + place->keys + lane_byte;
    // From where a byte of the stage would be if all came after the K words.
    const int metadata = place->metadata - S::kMetadata;
    const int values =
        static_cast<int>(kv_v_tile_byte<kHeadDim>(call.params.page_size, 0)) - S::kValues;
#pragma unroll
    for (int first = 0; first < S::kBytes; first += 512) {
      const int byte = first + lane_byte;
      const int moved = byte < S::kMetadata ? 0 : byte < S::kValues ? metadata : values;
      if (byte < S::kBytes) copy_async_16(stage + byte, keys + first + moved);
    }
  }
  commit_copies();
}

// What a warp keeps of its item, and its steps.
template <int kHeadDim, int kTiles>
struct Warp {
  QueryOperand<kHeadDim> queries[kTiles];
  QueryColumns columns[kTiles];
  int lane, g, i;

  __device__ Warp(const KvAttentionCuda& call, const KvItem& item) {
    lane = threadIdx.x % 32, g = lane / 4, i = lane % 4;
    const int group = static_cast<int>(call.params.group());
    const auto index = [&](int row) {
      return (int64_t{item.first_query} + item.query(group, row)) * call.params.n_q +
             item.kv_head * group + (item.first_row + row) % group;
    };
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      // Rows that do not exist see nothing, and repeat the last one's numbers.
      const int64_t row = index(min(n * kTileRows + g, item.rows - 1));
      const auto* values = reinterpret_cast<const uint32_t*>(call.values + row * kHeadDim) + i;
      const auto* residuals =
          reinterpret_cast<const uint32_t*>(call.residuals + row * (kHeadDim / 8)) + i;
#pragma unroll
      for (int r = 0; r < kHeadDim / 8; ++r) queries[n].values[r] = values[4 * r];
#pragma unroll
      for (int r = 0; r < kHeadDim / 64; ++r) queries[n].residuals[r] = residuals[4 * r];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int column = n * kTileRows + 2 * i + h;
        const int clamped = min(column, item.rows - 1);
        const float4 numbers = *reinterpret_cast<const float4*>(call.rows + index(clamped));
        columns[n].multiplier[h] = numbers.x * (1.0f / kKvScaleFactor);
        columns[n].sum_low[h] = numbers.y * kKvScaleFactor;
        columns[n].sum_high[h] = numbers.z * kKvScaleFactor;
        columns[n].visible[h] = column < item.rows ? item.visible + item.query(group, column) : 0;
      }
    }
  }

  // 16 tokens of a tile.
  template <int kGroup>
  __device__ void attend_group(const uint8_t* stage, int token, const TileWords& k,
                               const TileWords& v,
                               RunningSoftmax<kHeadDim> (&softmax)[kTiles]) const {
    ScoreSums sums[kTiles];
    key_products<kHeadDim, kGroup>(k, queries, sums);
    const int row = 16 * kGroup + g;
    const uint8_t* metadata = stage + Stage<kHeadDim>::kMetadata + row * kKvMetadataBytes;
    const TokenRanges ranges[2] = {TokenRanges(metadata),
                                   TokenRanges(metadata + 8 * kKvMetadataBytes)};
    WeightOperand weights[kTiles];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      weights[n] = softmax[n].add(sums[n], ranges, columns[n], token + row);
    }
    value_products<kHeadDim, kGroup>(v, weights, softmax);
  }

  __device__ void attend_tile(const uint8_t* stage, int token,
                              RunningSoftmax<kHeadDim> (&softmax)[kTiles]) const {
    const TileWords k(stage, lane), v(stage + Stage<kHeadDim>::kValues, lane);
    attend_group<0>(stage, token, k, v, softmax);
    if constexpr (Stage<kHeadDim>::kTokens == 32) attend_group<1>(stage, token, k, v, softmax);
  }

  // The warp's state of every row into shared memory.
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

// A thread's dims of one row per tile of eight.
template <int kHeadDim>
using ThreadState = RowState<kHeadDim / kThreadsPerRow>;

// One split of an item, up to its last visible token; every thread answers its part of the states.
template <int kHeadDim, int kTiles>
__device__ void attend_split(const KvAttentionCuda& call, const KvItem& item, int split,
                             const Warp<kHeadDim, kTiles>& self, Shared<kHeadDim, kTiles>& shared,
                             ThreadState<kHeadDim> (&states)[kTiles]) {
  constexpr int kTokens = Stage<kHeadDim>::kTokens;
  const int warp = threadIdx.x / 32, first_token = split * kSplitTokens;
  const int last = item.last_visible(static_cast<int>(call.params.group()));
  const int tiles = (min(last - first_token, kSplitTokens) + kTokens - 1) / kTokens;

  find_tiles<kHeadDim>(call, item, split, tiles, shared.places);
  __syncthreads();
  const auto fetch = [&](int step) {
    const int tile = warp + step * kWarps;
    fetch_tile<kHeadDim>(call, tile < tiles ? shared.places + tile : nullptr,
                         shared.ring[warp][step % kStages]);
  };
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) fetch(step);
  RunningSoftmax<kHeadDim> softmax[kTiles];
  for (int step = 0; warp + step * kWarps < tiles; ++step) {
    wait_copies<kStages - 2>();
    __syncwarp();  // and all lanes have read the stage that is filled next
    fetch(step + kStages - 1);
    self.attend_tile(shared.ring[warp][step % kStages],
                     first_token + (warp + step * kWarps) * kTokens, softmax);
  }
  wait_copies<0>();

  __syncthreads();
#pragma unroll
  for (int n = 0; n < kTiles; ++n) self.leave(softmax[n], shared.rows[warp] + n * kTileRows);
  __syncthreads();
  const int dim = threadIdx.x % kThreadsPerRow * (kHeadDim / kThreadsPerRow);
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    states[n] = {};
    for (int w = 0; w < kWarps; ++w) {
      const auto& row = shared.rows[w][n * kTileRows + threadIdx.x / kThreadsPerRow];
      ThreadState<kHeadDim> part;
      part.max = row.max;
      part.sum = row.sum;
#pragma unroll
      for (int d = 0; d < kHeadDim / kThreadsPerRow; ++d) part.values[d] = row.values[dim + d];
      states[n].merge(part);
    }
  }
  __syncthreads();  // before the ring is filled again
}

template <int kHeadDim>
__device__ void store_state(const ThreadState<kHeadDim>& state, float* to) {
  constexpr int kDims = kHeadDim / kThreadsPerRow;
  const int part = threadIdx.x % kThreadsPerRow;
#pragma unroll
  for (int d = 0; d < kDims; d += 4) {
    *reinterpret_cast<float4*>(to + part * kDims + d) =
        make_float4(state.values[d], state.values[d + 1], state.values[d + 2], state.values[d + 3]);
  }
  if (part == 0) *reinterpret_cast<float2*>(to + kHeadDim) = {state.max, state.sum};
}

template <int kHeadDim, int kTiles>
__global__ void __launch_bounds__(kThreads, kTiles == 1 ? 3 : 2)
    kv_attention_kernel(const __grid_constant__ KvAttentionCuda call) {
  __shared__ alignas(16) Shared<kHeadDim, kTiles> shared;
  const KvAttentionParams& p = call.params;
  const int group = static_cast<int>(p.group());
  KvItem item;
  for (int index = blockIdx.x; find_item<kTiles * kTileRows>(call, index, item);
       index += gridDim.x) {
    const int splits = (max(item.last_visible(group), 0) + kSplitTokens - 1) / kSplitTokens;
    if (call.states && item.split >= splits) continue;  // the rows see none of it
    const Warp<kHeadDim, kTiles> self(call, item);

    ThreadState<kHeadDim> total[kTiles];
    for (int split = call.states ? item.split : 0; split < splits; ++split) {
      ThreadState<kHeadDim> states[kTiles];
      attend_split<kHeadDim, kTiles>(call, item, split, self, shared, states);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        if (call.states) {
          total[n] = states[n];
        } else {
          total[n].merge(states[n]);
        }
      }
      if (call.states) break;
    }

#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const int row = n * kTileRows + threadIdx.x / kThreadsPerRow;
      if (row >= item.rows) continue;
      const int64_t index = (int64_t{item.first_query} + item.query(group, row)) * p.n_q +
                            item.kv_head * group + (item.first_row + row) % group;
      if (call.states) {
        store_state<kHeadDim>(total[n], call.states + (index * call.splits() + item.split) *
                                                          kv_cuda_state_floats(kHeadDim));
      } else {
        const int dim = threadIdx.x % kThreadsPerRow * (kHeadDim / kThreadsPerRow);
        store_row(total[n], p.type, p.out, index * kHeadDim + dim);
      }
    }
  }
}

template <int kHeadDim, int kTiles>
void launch(const KvAttentionCuda& call, const Device& device, Stream stream) {
  const KvAttentionParams& p = call.params;
  // At most as many items as there can be, at most as many blocks as run at once.
  const int64_t tiles = call.tokens * p.group() / (kTiles * kTileRows) + call.sequences + 1;
  const int64_t items = tiles * p.n_kv * (call.states ? call.splits() : 1);
  const int64_t resident = int64_t{device.sms} * (kTiles == 1 ? 3 : 2);
  const auto grid = static_cast<unsigned>(items < resident ? items : resident);
  kv_attention_kernel<kHeadDim, kTiles>
      <<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(call);
}

}  // namespace

void kv_attention_attend(const KvAttentionCuda& call, const Device& device, Stream stream) {
  const KvAttentionParams& p = call.params;
  // More than eight rows a sequence on average: sixteen share the unpacking. The bits are the same.
  const bool many = call.tokens * p.group() > kTileRows * call.sequences;
  if (p.head_dim == 128) {
    many ? launch<128, 2>(call, device, stream) : launch<128, 1>(call, device, stream);
  } else {
    many ? launch<64, 2>(call, device, stream) : launch<64, 1>(call, device, stream);
  }
  check_launch("kv_attention");
}

}  // namespace resq::cuda
