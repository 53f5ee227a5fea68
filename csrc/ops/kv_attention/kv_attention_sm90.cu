// The attention kernel of sm_90: bulk copies of pages into a ring that the block's warps share.
//
// A page of 64 tokens is one run of the cache (10 KB at head dim 128), which one instruction of one
// thread copies; other pages come in three runs per tile. No warp waits for an empty stage: a warp
// reads its tile into registers before it computes, and the last of the four warps to read a stage
// starts the copies that refill it.
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
  TilePlace places[kSplitTiles<kHeadDim>];
  uint64_t full[kStages];
  uint32_t readers[kStages];  // warps that have read the stage
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
        shared.readers[i] = 0;
      }
      mbarrier_init_fence();
    }
    __syncthreads();
  }

  // All stages are empty: every warp has read every step of the previous splits.
  __device__ void start(int tiles) {
    tiles_ = tiles;
    if (threadIdx.x > 0) return;
    int stage = stage_;
#pragma unroll 1
    for (int step = 0; step < kStages; ++step) {
      fetch(step, stage);
      stage = next(stage);
    }
  }

  __device__ TileParts wait(int) {
    mbarrier_wait(&shared_.full[stage_], parity_);
    const uint8_t* pages = shared_.ring[stage_].pages[0];
    const int warp = threadIdx.x / 32;
    return {pages + S::keys(warp), pages + S::metadata(warp), pages + S::values(warp)};
  }

  __device__ void release(int step) {
    __syncwarp();  // all lanes have read
    if (threadIdx.x % 32 == 0 && last_reader()) fetch(step + kStages, stage_);
    stage_ = next(stage_);
    parity_ ^= stage_ == 0;
  }

  __device__ void finish() {}

 private:
  static __device__ int next(int stage) { return stage == kStages - 1 ? 0 : stage + 1; }

  // Counts the warp as a reader of the stage; true for the last one only. Acquire, because what the
  // other warps have read is overwritten next.
  __device__ bool last_reader() {
    uint32_t before;
    asm volatile("atom.acq_rel.cta.shared::cta.inc.u32 %0, [%1], %2;"
                 : "=r"(before)
                 : "r"(shared_address(&shared_.readers[stage_])), "n"(kAttendWarps - 1)
                 : "memory");
    return before == kAttendWarps - 1;
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

  // One thread starts the copies of a step, if there is one.
  __device__ void fetch(int step, int stage) {
    const TilePlace* places = shared_.places + step * kAttendWarps;
    const int count = min(tiles_ - step * kAttendWarps, kAttendWarps);
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
  int tiles_ = 0, stage_ = 0, parity_ = 0;
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
