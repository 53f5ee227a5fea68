// The attention kernel of sm_90: bulk copies of pages into a ring that the block's warps share.
//
// A page of 64 tokens is one run of the cache (10 KB at head dim 128), which one instruction of one
// thread copies; other pages come in three runs per tile. A warp reads its tile into registers,
// arrives at the stage's barrier, and computes. A step later one warp of the four, each in turn,
// refills the stage: by then the others have read it too, so that it seldom waits. (The last
// reader, found by an atomic with a fence, refilled it at once, and the fence cost every warp 90
// cycles a step.) Behind the last tiles of a unit the ring goes on with those of the next one.
#include <cuda_runtime.h>

#include "cuda/bulk_copy_sm90.cuh"
#include "cuda/pdl.cuh"
#include "ops/kv_attention/kv_attention_attend.cuh"

namespace resq::cuda::attention {
namespace {

constexpr int kStages = 5;       // three blocks of five stages and their rows take 213 of 228 KB
constexpr int kPageTokens = 64;  // of the pages that are copied whole

// The tiles of a step, one a warp, laid out as pages of kPageTokens.
template <int kHeadDim>
struct Stage {
  static constexpr int kPageTiles = kPageTokens / kTileTokens<kHeadDim>;
  static constexpr int kPages = kAttendWarps / kPageTiles;
  static constexpr int kMetadataBytes = kTileTokens<kHeadDim> * kKvMetadataBytes;
  static constexpr int kTileBytes = 2 * kKvTileBytes + kMetadataBytes;
  static constexpr int kPageBytes = kPageTiles * kTileBytes;

  alignas(128) uint8_t pages[kPages][kPageBytes];

  // Offsets of a step's tile.
  static __device__ int keys(int tile) {
    return tile / kPageTiles * kPageBytes + tile % kPageTiles * kKvTileBytes;
  }
  static __device__ int metadata(int tile) {
    return tile / kPageTiles * kPageBytes + kPageTiles * kKvTileBytes +
           tile % kPageTiles * kMetadataBytes;
  }
  static __device__ int values(int tile) {
    return keys(tile) + kPageTiles * (kKvTileBytes + kMetadataBytes);
  }
};

template <int kHeadDim, int kTiles>
struct Shared {
  Stage<kHeadDim> ring[kStages];
  WarpRow<kHeadDim> rows[kAttendWarps][kTiles * kTileRows];
  QueryRows<kHeadDim, kTiles * kTileRows> queries;
  TilePlace places[2][kSplitTiles<kHeadDim>];
  KvUnit units[kUnits];
  uint64_t full[kStages];
  uint64_t empty[kStages];  // all warps have read the stage
};

template <int kHeadDim, int kTiles>
class Ring {
 public:
  using S = Stage<kHeadDim>;

  __device__ Ring(const KvAttentionCuda& call, Shared<kHeadDim, kTiles>& shared)
      : call_(call), shared_(shared) {
    if (threadIdx.x == 0) {
      for (int i = 0; i < kStages; ++i) {
        mbarrier_init(&shared.full[i], 1);
        mbarrier_init(&shared.empty[i], kAttendWarps);
      }
      mbarrier_init_fence();
    }
    __syncthreads();
  }

  // The copies of the first unit begin here, those of the others have.
  __device__ void start(int which, int tiles) {
    which_ = which;
    tiles_ = tiles;
    if (ahead_ > 0) return;
    ahead_ = min(steps(tiles), kStages);
    fetch_all(0, ahead_);
  }

  // Every warp has read all steps of the unit before: the stages behind the `ahead_` copies that
  // have begun are free.
  __device__ void follow(int tiles) {
    next_tiles_ = max(tiles, 0);
    fetch_all(ahead_, kStages);
    // Once this unit is done, as each step but the first refills the stage of the step before.
    ahead_ = min(steps(next_tiles_), kStages - min(steps(tiles_), 1));
  }

  __device__ TileParts wait(int) {
    mbarrier_wait(&shared_.full[stage_], parity_);
    const uint8_t* pages = shared_.ring[stage_].pages[0];
    const int warp = threadIdx.x / 32;
    return {pages + S::keys(warp), pages + S::metadata(warp), pages + S::values(warp)};
  }

  __device__ void release(int step) {
    __syncwarp();  // all lanes have read
    if (threadIdx.x % 32 == 0) {
      mbarrier_arrive(&shared_.empty[stage_]);
      if (step > 0 && step % kAttendWarps == threadIdx.x / 32) {
        const int before = stage_ == 0 ? kStages - 1 : stage_ - 1;
        mbarrier_wait(&shared_.empty[before], parity_ ^ (stage_ == 0));
        fetch(step - 1 + kStages, before);
      }
    }
    stage_ = next(stage_);
    parity_ ^= stage_ == 0;
  }

  __device__ void finish() {}

 private:
  static __device__ int steps(int tiles) { return (tiles + kAttendWarps - 1) / kAttendWarps; }
  static __device__ int next(int stage) { return stage == kStages - 1 ? 0 : stage + 1; }

  // One thread starts the copies of steps [first, end) of this unit and the next.
  __device__ void fetch_all(int first, int end) {
    if (threadIdx.x > 0) return;
    int stage = stage_ + first;
#pragma unroll 1
    for (int step = first; step < end; ++step, ++stage) {
      if (stage >= kStages) stage -= kStages;
      fetch(step, stage);
    }
  }

  // In a decode step only one item of eight rows reads these bytes, and the states should stay in
  // the second-level cache instead. With more rows, every sixteen read them again.
  static __device__ void copy(uint8_t* to, const uint8_t* from, uint32_t bytes, uint64_t* full) {
    if constexpr (kTiles == 1) {
      bulk_copy_streaming(to, from, bytes, full);
    } else {
      bulk_copy(to, from, bytes, full);
    }
  }

  // One thread starts the copies of a step, if there is one. Steps behind this unit's are the
  // next one's.
  __device__ void fetch(int step, int stage) {
    int which = which_, tiles = tiles_;
    if (step >= steps(tiles_)) {
      step -= steps(tiles_);
      which ^= 1;
      tiles = next_tiles_;
    }
    const TilePlace* places = &shared_.places[which][step * kAttendWarps];
    const int count = min(tiles - step * kAttendWarps, kAttendWarps);
    if (count <= 0) return;
    uint8_t* to = shared_.ring[stage].pages[0];
    uint64_t* full = &shared_.full[stage];
    const uint8_t* cache = call_.params.cache;
    if (call_.params.page_size == kPageTokens) {
      // The rest of the last page is copied, but not read.
      const int pages = (count + S::kPageTiles - 1) / S::kPageTiles;
      mbarrier_arrive_expect(full, pages * S::kPageBytes);
#pragma unroll 1
      for (int i = 0; i < pages; ++i) {
        copy(to + i * S::kPageBytes, cache + places[i * S::kPageTiles].keys, S::kPageBytes, full);
      }
      return;
    }
    mbarrier_arrive_expect(full, count * S::kTileBytes);
    const int64_t values = kv_v_tile_byte<kHeadDim>(call_.params.page_size, 0);
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      const TilePlace place = places[i];
      const uint8_t* keys = cache + place.keys;
      copy(to + S::keys(i), keys, kKvTileBytes, full);
      copy(to + S::metadata(i), keys + place.metadata, S::kMetadataBytes, full);
      copy(to + S::values(i), keys + values, kKvTileBytes, full);
    }
  }

  const KvAttentionCuda& call_;
  Shared<kHeadDim, kTiles>& shared_;
  int which_ = 0, tiles_ = 0, next_tiles_ = 0;
  int ahead_ = 0;  // steps of the unit whose copies have begun before it starts
  int stage_ = 0, parity_ = 0;
};

template <int kHeadDim, int kTiles>
__global__ void __launch_bounds__(kAttendThreads, attend_blocks(kTiles))
    kv_attention_sm90_kernel(const __grid_constant__ KvAttentionCuda call) {
  extern __shared__ __align__(128) uint8_t memory[];
  auto& shared = *reinterpret_cast<Shared<kHeadDim, kTiles>*>(memory);
  const Ring<kHeadDim, kTiles> ring(call, shared);
  pdl_wait();
  pdl_trigger();  // the blocks of the merge may start as those of this kernel finish
  attend_items<kHeadDim, kTiles>(call, shared, ring);
}

}  // namespace

void attend_sm90(const KvAttentionCuda& call, const Device& device, Stream stream) {
  launch_attend(call, device, [&](auto head_dim, auto tiles, unsigned blocks) {
    const auto kernel = kv_attention_sm90_kernel<head_dim, tiles>;
    constexpr int kShared = sizeof(Shared<head_dim, tiles>);
    static_assert(attend_blocks(tiles) * (kShared + 1024) <= 228 * 1024);
    launch_pdl("kv_attention", kernel,
               {.x = blocks, .threads = kAttendThreads, .shared_bytes = kShared}, stream, call);
  });
}

}  // namespace resq::cuda::attention
