// The attention kernel of every architecture: each warp copies its own tiles, 16 bytes per lane,
// into its own ring and waits for no other warp until the end of the split. sm_90 has a kernel of
// its own that copies pages (kv_attention_sm90.cu).
#include <cuda_runtime.h>

#include "cuda/copy_sm80.cuh"
#include "ops/kv_attention/kv_attention_attend.cuh"

namespace resq::cuda::attention {
namespace {

constexpr int kStages = 4;  // 40 KB in flight per block: three blocks cover 1 us of 33 bytes/ns

// A tile's K words, metadata and V words, one after the other.
template <int kHeadDim>
struct Stage {
  static constexpr int kMetadata = kKvTileBytes;
  static constexpr int kValues = kMetadata + kTileTokens<kHeadDim> * kKvMetadataBytes;
  static constexpr int kBytes = kValues + kKvTileBytes;
};

template <int kHeadDim, int kTiles>
struct Shared {
  union {
    uint8_t ring[kAttendWarps][kStages][Stage<kHeadDim>::kBytes];
    WarpRow<kHeadDim> rows[kAttendWarps][kTiles * kTileRows];
  };
  QueryRows<kHeadDim, kTiles * kTileRows> queries;
  TilePlace places[2][kSplitTiles<kHeadDim>];
  KvUnit units[kUnits];
};

// A warp's ring.
template <int kHeadDim, int kTiles>
class Ring {
 public:
  __device__ Ring(const KvAttentionCuda& call, Shared<kHeadDim, kTiles>& shared)
      : call_(call),
        shared_(shared),
        stages_(shared.ring[threadIdx.x / 32]),
        warp_(threadIdx.x / 32) {}

  __device__ void start(int which, int tiles) {
    __syncthreads();  // all warps have merged the rows, which the ring overwrites
    which_ = which;
    tiles_ = tiles;
#pragma unroll
    for (int step = 0; step < kStages - 1; ++step) fetch(step);
  }

  __device__ void follow(int) {}

  __device__ TileParts wait(int step) {
    wait_copies<kStages - 2>();
    __syncwarp();  // all lanes have read the stage that fetch overwrites
    fetch(step + kStages - 1);
    const uint8_t* stage = stages_[step % kStages];
    return {stage, stage + Stage<kHeadDim>::kMetadata, stage + Stage<kHeadDim>::kValues};
  }

  __device__ void release(int) {}

  __device__ void finish() {
    wait_copies<0>();
    __syncthreads();  // before rows overwrite the ring
  }

 private:
  // Starts the copies of the warp's tile; every lane commits a group, even if there is no tile.
  __device__ void fetch(int step) {
    using S = Stage<kHeadDim>;
    const int tile = warp_ + step * kAttendWarps;
    if (tile < tiles_) {
      const TilePlace place = shared_.places[which_][tile];
      const int lane_byte = threadIdx.x % 32 * 16;
      uint8_t* stage = stages_[step % kStages];
      const uint8_t* keys = call_.params.cache + place.keys + lane_byte;
      // Offsets of the sources of metadata and V words from where they would be if they followed
      // the K words as they do in the stage.
      const int metadata = place.metadata - S::kMetadata;
      const int values =
          static_cast<int>(kv_v_tile_byte<kHeadDim>(call_.params.page_size, 0)) - S::kValues;
#pragma unroll
      for (int first = 0; first < S::kBytes; first += 512) {
        const int byte = first + lane_byte;
        const int moved = byte < S::kMetadata ? 0 : byte < S::kValues ? metadata : values;
        if (byte < S::kBytes) copy_async_16(stage + byte, keys + first + moved);
      }
    }
    commit_copies();
  }

  const KvAttentionCuda& call_;
  const Shared<kHeadDim, kTiles>& shared_;
  uint8_t (*stages_)[Stage<kHeadDim>::kBytes];
  int warp_, which_ = 0, tiles_ = 0;
};

template <int kHeadDim, int kTiles>
__global__ void __launch_bounds__(kAttendThreads, attend_blocks(kTiles))
    kv_attention_kernel(const __grid_constant__ KvAttentionCuda call) {
  __shared__ alignas(16) Shared<kHeadDim, kTiles> shared;
  attend_items<kHeadDim, kTiles>(call, shared, Ring<kHeadDim, kTiles>(call, shared));
}

}  // namespace

void attend(const KvAttentionCuda& call, const Device& device, Stream stream) {
  launch_attend(call, device, [&](auto head_dim, auto tiles, unsigned blocks) {
    launch_kernel("kv_attention", kv_attention_kernel<head_dim, tiles>,
                  {.x = blocks, .threads = kAttendThreads}, stream, call);
  });
}

}  // namespace resq::cuda::attention
