// mixed_gemm on sm_90a: D = W X^T by wgmma, weights from registers, tokens from shared memory.
//
// Persistent blocks of three warpgroups walk over tiles of 128 weight rows x kTokens tokens: one
// warpgroup has a thread that copies, two multiply 64 weight rows each. Both parts' sums stay exact
// in registers until the epilogue, as the numerics contract asks. The copying thread runs ahead
// into the next tile during the epilogue. The blocks of a cluster share tokens, and weights if
// tiles are small.
#pragma once

#include "cuda/pdl.cuh"
#include "ops/mixed_gemm/mixed_gemm_epilogue_sm90.cuh"
#include "ops/mixed_gemm/mixed_gemm_mainloop_sm90.cuh"

#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "mixed_gemm_sm90 needs wgmma: compile it for sm_90a"
#endif

namespace resq::cuda {

inline constexpr int kSm90Threads = 128 * (1 + kConsumers);
inline constexpr int kSm90SharedBytes = 227 * 1024;

// Registers of a thread after the split: 128 x 24 + 256 x 240 = 384 x 168, what the block starts
// with.
inline constexpr int kProducerRegisters = 24;
inline constexpr int kConsumerRegisters = 240;

template <int kTokens, class Out>
struct SharedPlan {
  using Epilogues = EpilogueShared<kTokens, Out>[kConsumers];
  static constexpr int kLeft = kSm90SharedBytes - static_cast<int>(sizeof(Epilogues));
  static constexpr int kStages = kLeft / static_cast<int>(sizeof(Stage<kTokens>) + 32);
  static_assert(sizeof(Stage<kTokens>) % 1024 == 0);

  Ring<kTokens, kStages> ring;
  Epilogues epilogues;
};

// The kernel's argument. What the host can compute is computed there: the copying thread has 24
// registers.
struct Sm90Launch {
  MixedGemmParams p;
  CUtensorMap lo, hi;  // of the activation rows
  PartStages lo_stages, hi_stages;
  int64_t block_bytes, block_lo_bytes;  // of 64 packed weight rows
  int last_block;
  int token_tiles, weight_tiles, tiles;  // of a cluster
};

// Order of the tiles: groups of token tiles that stay in L2, inside a group the tokens change
// first, so that blocks that run together read few weights from memory and each of them once.
inline constexpr int kTokenTilesOfGroup = 16;

struct Tile {
  int token, weight_block;  // first token, first block of 64 weight rows
};
template <int kTokens>
__device__ inline Tile tile_at(const Sm90Launch& launch, int index, ClusterPlace<kTokens> place) {
  constexpr Sm90Cluster kCluster = sm90_cluster(kTokens);
  const int group_tiles = kTokenTilesOfGroup * launch.weight_tiles;
  const int first = index / group_tiles * kTokenTilesOfGroup;
  const int tokens = min(kTokenTilesOfGroup, launch.token_tiles - first);
  const int inside = index % group_tiles;
  const int token = first + inside % tokens, weight = inside / tokens;
  return {(token * kCluster.tokens + place.token()) * kTokens,
          (weight * kCluster.weights + place.weight()) * kConsumers};
}

template <int kTokens, class Out>
__global__ void __launch_bounds__(kSm90Threads, 1)
    mixed_gemm_sm90_kernel(const __grid_constant__ Sm90Launch launch) {
  using Plan = SharedPlan<kTokens, Out>;
  constexpr int kStages = Plan::kStages;
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  Plan& shared = *reinterpret_cast<Plan*>(shared_bytes);
  const MixedGemmParams& p = launch.p;
  // Through a shuffle, so that the compiler knows it to be the same in a warp.
  const uint32_t warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
  using Place = ClusterPlace<kTokens>;
  constexpr int kClusterBlocks = Place::kCluster.blocks();
  const Place place{static_cast<int>(blockIdx.x) % kClusterBlocks};
  const int first_tile = static_cast<int>(blockIdx.x) / kClusterBlocks;
  const int clusters = static_cast<int>(gridDim.x) / kClusterBlocks;
  const PartStages lo = launch.lo_stages, hi = launch.hi_stages;

  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(&shared.ring.full[i], 1);
      mbarrier_init(&shared.ring.empty[i], Place::kPeers * kConsumerWarps);
    }
    mbarrier_init_fence();
  }
  cluster_sync();
  pdl_wait();
  pdl_trigger();

  if (warpgroup == 0) {
    warpgroup_registers_decrease<kProducerRegisters>();
    if (threadIdx.x == 0) {
      if (p.k_lo > 0) prefetch_tensor_map(&launch.lo);
      if (p.k_hi > 0) prefetch_tensor_map(&launch.hi);
      Producer<kTokens, kStages> producer{shared.ring, place, {}};
      for (int t = first_tile; t < launch.tiles; t += clusters) {
        const Tile tile = tile_at(launch, t, place);
        using Source = TileSource<kTokens>;
        Source source{{}, tile.token + place.weight() * producer.kHalf};
        for (int c = 0; c < Source::kBlocks; ++c) {  // the last block again instead of none
          const int block = tile.weight_block + (Source::kBlocks == 1 ? place.token() : c);
          source.weights[c] = p.packed_weight + min(block, launch.last_block) * launch.block_bytes;
        }
        producer.load_part(source, &launch.lo, lo, 0, kLoStageBytes);
        producer.load_part(source, &launch.hi, hi, launch.block_lo_bytes, kHiStageBytes);
      }
    }
    __syncwarp();
  } else {
    warpgroup_registers_increase<kConsumerRegisters>();
    Consumer<kTokens, kStages> consumer{shared.ring, place, threadIdx.x - 128, {}};
    for (int t = first_tile; t < launch.tiles; t += clusters) {
      const Tile tile = tile_at(launch, t, place);
      forget(consumer.thread);
      Epilogue<kTokens, Out> epilogue{p, shared.epilogues, consumer.thread};
      uint32_t sums_lo[kTokens / 2], sums_hi[kTokens / 2];
      epilogue.fetch(tile.token, (tile.weight_block + consumer.thread / 128) * kBlockColumns);
      consumer.multiply_tile(lo, hi, sums_lo, sums_hi);
      epilogue.write(sums_lo, sums_hi);
    }
  }
  // A block's shared memory must outlive what its cluster still writes and signals there.
  cluster_sync();
}

}  // namespace resq::cuda
