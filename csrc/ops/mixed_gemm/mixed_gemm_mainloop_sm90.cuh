// The main loop of mixed_gemm on sm_90a: a producer thread fills a ring of stages, warpgroups
// multiply. A stage holds up to 128 columns of K of a tile: its tokens, int8, in the 128-byte
// swizzle of wgmma's B operand, and its weights in the order of wgmma's A registers.
//
// wgmma's 8-bit operands are the only ones for integers on sm_90, so 4-bit weights become bytes in
// registers: a packed byte holds two rows' codes, and one AND leaves 16 times the code of one of
// them. The low sums are therefore 16 x the sums of codes times codes. With a row's zero point
// taken off they are at most 16 * 255 * 8 * K < 2^31 for every K up to 65536, also with 8-bit
// activations.
#pragma once

#include "core/packed_weight_cuda.h"
#include "cuda/bulk_copy_sm90.cuh"
#include "cuda/wgmma_sm90.cuh"
#include "ops/mixed_gemm/mixed_gemm_sm90.h"

namespace resq::cuda {

inline constexpr int kStageColumns = 128;  // of K: a row of the swizzle
inline constexpr int kConsumers = 2;       // warpgroups that multiply, a block of weights each
inline constexpr int kConsumerWarps = 4 * kConsumers;
inline constexpr int kTileWeights = kConsumers * static_cast<int>(kCudaBlockRows);
static_assert(kTileWeights == kSm90TileWeights);
inline constexpr int kLoFactor = 16;  // in the low sums

// Makes the compiler forget what it has derived from a value, so that it does not keep that in
// registers across a loop: at 192 tokens the sums leave 48 of them.
__device__ inline void forget(uint32_t& value) { asm volatile("" : "+r"(value)); }

template <int kTokens>
struct alignas(128) Stage {  // at a multiple of 1024 bytes, for the swizzle
  uint8_t tokens[kTokens * kStageColumns];
  uint8_t weights[kTileWeights * kStageColumns];  // high codes fill it, low codes half of it
};

template <int kTokens, int kStages>
struct Ring {
  Stage<kTokens> stages[kStages];
  uint64_t full[kStages];   // the copies into the stage have arrived
  uint64_t empty[kStages];  // every warp that reads the stage, here and in the cluster, is done
};

// A stage and the parity of its current use; both sides walk the ring in the same order.
template <int kStages>
struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;

  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// K of one part in stages: `whole` of 128 columns, then perhaps one of 64.
struct PartStages {
  int whole;
  bool tail;
};
inline PartStages part_stages(int64_t k) {
  const int halves = static_cast<int>(cuda_packed_columns(k) / kCudaStepColumns);
  return {halves / 2, halves % 2 != 0};
}

// A block's place in its cluster: rank = token * weights + weight, and with whom it shares.
template <int kTokens>
struct ClusterPlace {
  static constexpr Sm90Cluster kCluster = sm90_cluster(kTokens);
  // Blocks that write into a block's stages: those of its row and of its column, itself once.
  static constexpr int kPeers = kCluster.tokens + kCluster.weights - 1;
  static_assert(kCluster.tokens <= 2 && kCluster.weights == 2);

  int rank;
  __device__ int token() const { return rank / kCluster.weights; }
  __device__ int weight() const { return rank % kCluster.weights; }
  // The blocks with the same tokens, or the same weights, by bits.
  __device__ uint16_t same_tokens() const { return 3 << token() * kCluster.weights; }
  __device__ uint16_t same_weights() const { return 1 << rank | 1 << peer(kCluster.weights); }
  __device__ int peer(int index) const {  // index < kPeers
    return index < kCluster.weights ? rank - weight() + index : rank ^ kCluster.weights;
  }
};

// What a block copies for a tile: of its two blocks of 64 weight rows both, or one if another block
// of the cluster has the same weights; one half of its tokens.
template <int kTokens>
struct TileSource {
  static constexpr int kBlocks = kConsumers / sm90_cluster(kTokens).tokens;
  const uint8_t* weights[kBlocks];
  int token;  // first of its half
};

// The producer's walk: one thread.
template <int kTokens, int kStages>
struct Producer {
  static constexpr int kHalf = kTokens / sm90_cluster(kTokens).weights;

  Ring<kTokens, kStages>& ring;
  ClusterPlace<kTokens> place;
  RingPosition<kStages> position;

  // One stage: `bytes` of each weight block from `offset` on, tokens from `column` on.
  __device__ void load(const TileSource<kTokens>& tile, const CUtensorMap* map, int column,
                       int64_t offset, uint32_t bytes) {
    Stage<kTokens>& stage = ring.stages[position.stage];
    uint64_t* full = &ring.full[position.stage];
    mbarrier_wait(&ring.empty[position.stage], position.parity ^ 1);
    mbarrier_arrive_expect(full, kTokens * kStageColumns + kConsumers * bytes);
    if constexpr (TileSource<kTokens>::kBlocks == 1) {
      bulk_copy_multicast(stage.weights + place.token() * bytes, tile.weights[0] + offset, bytes,
                          full, place.same_weights());
    } else {
      for (int c = 0; c < kConsumers; ++c) {
        bulk_copy(stage.weights + c * bytes, tile.weights[c] + offset, bytes, full);
      }
    }
    tensor_copy_multicast(stage.tokens + place.weight() * kHalf * kStageColumns, map, column,
                          tile.token, full, place.same_tokens());
    position.advance();
  }

  // All stages of one part, whose weights begin at `offset` in a block.
  __device__ void load_part(const TileSource<kTokens>& tile, const CUtensorMap* map,
                            PartStages part, int64_t offset, uint32_t stage_bytes) {
    int column = 0;
    for (int s = 0; s < part.whole; ++s, column += kStageColumns, offset += stage_bytes) {
      load(tile, map, column, offset, stage_bytes);
    }
    if (part.tail) load(tile, map, column, offset, stage_bytes / 2);
  }
};

inline constexpr uint32_t kLoStageBytes = kCudaBlockRows * kStageColumns / 2;  // of one block
inline constexpr uint32_t kHiStageBytes = kCudaBlockRows * kStageColumns;

// A consumer warpgroup's walk. Up to one k32 step is in flight while the registers of the next are
// made, across stages too; a stage is given back when the second step of the next is issued.
template <int kTokens, int kStages>
struct Consumer {
  Ring<kTokens, kStages>& ring;
  ClusterPlace<kTokens> place;
  uint32_t thread;  // among the consumers
  RingPosition<kStages> position;
  int unreleased = -1;    // the stage that wgmmas in flight may still read
  uint32_t a[2][4] = {};  // A's registers of even and odd steps

  // To all blocks that write into this one's stages. By every warp on its own: the end of its
  // wgmmas says nothing of the other warps' loads of weights.
  __device__ void release() {
    const uint32_t lane = thread % 32;
    if (unreleased >= 0 && lane < place.kPeers) {
      mbarrier_arrive_cluster(&ring.empty[unreleased], place.peer(lane));
    }
  }

  __device__ void multiply(uint32_t (&sums)[kTokens / 2], const uint32_t (&step)[4], uint64_t b) {
    wgmma_fence_sums(sums);
    wgmma_arrive();
    wgmma<kTokens>(sums, step, b);
    wgmma_commit();
  }

  // Steps of a stage of low codes. 16 bytes of weights are two steps.
  template <int kSteps>
  __device__ void multiply_lo(uint32_t (&sums)[kTokens / 2]) {
    const Stage<kTokens>& stage = ring.stages[position.stage];
    const uint64_t b = wgmma_descriptor(stage.tokens);
    mbarrier_wait(&ring.full[position.stage], position.parity);
    const uint4* weights = reinterpret_cast<const uint4*>(stage.weights) +
                           thread / 128 * (kSteps * kLoStageBytes / 4 / 16) + thread % 128;
    uint4 packed[kSteps / 2];
#pragma unroll
    for (int i = 0; i < kSteps / 2; ++i) packed[i] = weights[i * 128];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const uint4 v = packed[step / 2];
      const uint32_t first = step % 2 == 0 ? v.x : v.z, second = step % 2 == 0 ? v.y : v.w;
      wgmma_wait<1>();
      if (step == 1) release();
      uint32_t (&registers)[4] = a[step % 2];
      registers[0] = first & 0xf0f0f0f0;
      registers[1] = (first << 4) & 0xf0f0f0f0;
      registers[2] = second & 0xf0f0f0f0;
      registers[3] = (second << 4) & 0xf0f0f0f0;
      multiply(sums, registers, b + 2 * step);
    }
    unreleased = position.stage;
    position.advance();
  }

  // Steps of a stage of high codes. 16 bytes of weights are the registers of one step.
  template <int kSteps>
  __device__ void multiply_hi(uint32_t (&sums)[kTokens / 2]) {
    const Stage<kTokens>& stage = ring.stages[position.stage];
    const uint64_t b = wgmma_descriptor(stage.tokens);
    mbarrier_wait(&ring.full[position.stage], position.parity);
    const uint4* weights = reinterpret_cast<const uint4*>(stage.weights) +
                           thread / 128 * (kSteps * kHiStageBytes / 4 / 16) + thread % 128;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      wgmma_wait<1>();
      if (step == 1) release();
      const uint4 v = weights[step * 128];
      uint32_t (&registers)[4] = a[step % 2];
      registers[0] = v.x;
      registers[1] = v.y;
      registers[2] = v.z;
      registers[3] = v.w;
      multiply(sums, registers, b + 2 * step);
    }
    unreleased = position.stage;
    position.advance();
  }

  // One tile: sums of codes times codes, the low ones times kLoFactor.
  __device__ void multiply_tile(PartStages lo, PartStages hi, uint32_t (&sums_lo)[kTokens / 2],
                                uint32_t (&sums_hi)[kTokens / 2]) {
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) sums_lo[i] = 0;
#pragma unroll 1
    for (int s = 0; s < lo.whole; ++s) multiply_lo<4>(sums_lo);
    if (lo.tail) multiply_lo<2>(sums_lo);
    wgmma_wait<0>();
    wgmma_fence_sums(sums_lo);

#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) sums_hi[i] = 0;
#pragma unroll 1
    for (int s = 0; s < hi.whole; ++s) multiply_hi<4>(sums_hi);
    if (hi.tail) multiply_hi<2>(sums_hi);

    wgmma_wait<0>();
    wgmma_fence_sums(sums_lo);
    wgmma_fence_sums(sums_hi);
    release();
    unreleased = -1;
  }
};

}  // namespace resq::cuda
