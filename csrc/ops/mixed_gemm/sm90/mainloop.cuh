// The main loop of mixed_gemm on sm_90a: a producer thread fills a ring of stages, warpgroups
// multiply.
//
//   M  rows of activations, the B operand    N  rows of the weight, the A operand    K  columns
//
// A stage holds a K tile of up to 128 columns: kTileM rows of activations, int8, in the 128-byte
// swizzle of wgmma's B operand, and kTileN = 128 rows of the weight in the order of wgmma's A
// registers.
//
// 8-bit operands are wgmma's only integer operands on sm_90, so 4-bit weights become bytes in
// registers: a packed byte holds the codes of two n, and one AND leaves 16 times the code of one of
// them. The low sums are therefore 16 x the sums of codes times codes. With a row's zero point
// subtracted they are at most 16 * 255 * 8 * K < 2^31 for every K up to 65536, also with 8-bit
// activations.
#pragma once

#include "cuda/bulk_copy_sm90.cuh"
#include "cuda/wgmma_sm90.cuh"
#include "ops/mixed_gemm/mixed_gemm_tiles.h"

namespace resq::cuda::sm90 {

inline constexpr int kTileK = k_tile_columns(MixedGemmKernel::kSm90, false).lo;
static_assert(kTileK == kSwizzleBytes);
inline constexpr int kConsumers = 2;  // warpgroups that multiply, a block of the weight each
inline constexpr int kConsumerWarps = 4 * kConsumers;
inline constexpr int kWarpgroupN = static_cast<int>(kCudaBlockN);
inline constexpr int kTileN = kConsumers * kWarpgroupN;
inline constexpr int kLoFactor = 16;  // in the low sums

template <int kTileM>
inline constexpr MixedGemmTile kTile = tile_of(kSm90Tiles, kTileM);

inline constexpr int kMostClusterSplits =
    std::max_element(std::begin(kSm90Tiles), std::end(kSm90Tiles),
                     [](const auto& a, const auto& b) { return a.most_splits < b.most_splits; })
        ->most_splits;

// Makes a value opaque to the compiler, so that it does not keep what it derived from the value in
// registers across a loop: at 192 rows of activations the sums leave 48 of them.
__device__ inline void keep_opaque(uint32_t& value) { asm volatile("" : "+r"(value)); }
// Nor computes it anew in each round of a loop.
__device__ inline void keep_opaque(const uint8_t*& pointer) { asm volatile("" : "+l"(pointer)); }

template <int kTileM>
struct alignas(128) Stage {  // at a multiple of 1024 bytes, for the swizzle
  uint8_t activations[kTileM * kTileK];
  uint8_t weights[kTileN * kTileK];  // high codes fill it, low codes half of it
};

template <int kTileM, int kStages>
struct Ring {
  Stage<kTileM> stages[kStages];
  uint64_t full[kStages];   // the copies into the stage have arrived
  uint64_t empty[kStages];  // every warp that reads the stage, here and in the cluster, is done
};

// A stage and the parity of its current use; producer and consumers walk the ring in the same
// order.
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

// What a block multiplies of one part, in K tiles: `whole` of 128 columns from K tile `first` on,
// then perhaps one of 64.
struct KTiles {
  int first, whole;
  bool tail;
};
// Those of a part of `k` columns that lie in begin .. end - 1.
inline KTiles k_tiles(int64_t k, int begin, int end) {
  const int halves = static_cast<int>(cuda_packed_k(k) / kCudaStepK), tiles = (halves + 1) / 2;
  const int first = std::clamp(begin, 0, tiles), last = std::clamp(end, 0, tiles);
  const bool tail = halves % 2 != 0 && first < last && last == tiles;
  return {first, last - first - tail, tail};
}

inline constexpr uint32_t kLoStageBytes = kWarpgroupN * kTileK / 2;  // of one weight block
inline constexpr uint32_t kHiStageBytes = kWarpgroupN * kTileK;

// Bytes of one weight block that a block of threads reads of a part.
__device__ inline uint32_t part_bytes(KTiles part, uint32_t stage_bytes) {
  return part.whole * stage_bytes + part.tail * (stage_bytes / 2);
}

// A block's place in its cluster of kM x kN neighbouring tiles, and the blocks it shares operands
// with: rank = m * kN + n. Where blocks share K, kM is 1 and there are kN tiles for every split:
// rank = split * kN + n.
template <int kRows, int kAlongM, int kAlongN, bool kSharesK>
struct ClusterPlace {
  static constexpr int kTileM = kRows;
  static constexpr bool kSplitK = kSharesK;
  static constexpr int kM = kAlongM, kN = kAlongN;
  static constexpr int kBlocks = kM * kN;  // that take the same columns of K
  // Blocks that write into a block's stages: those of its m and those of its n, itself counted
  // once.
  static constexpr int kPeers = kM + kN - 1;
  static_assert((kM == 1 || (kM == 2 && kN == 2 && !kSplitK)) && kTile<kTileM>.n == kTileN);
  static_assert(kTileM / kN % 8 == 0, "a copy has whole groups of the swizzle");

  int rank;
  __device__ int split() const { return kSplitK ? rank / kN : 0; }
  __device__ int m() const { return kM == 1 ? 0 : rank / kN; }
  __device__ int n() const { return rank % kN; }
  // Bit masks of the blocks of the cluster with the same m, that is the same activations, and with
  // the same n, that is the same weights.
  __device__ uint16_t same_m() const { return ((1 << kN) - 1) << rank / kN * kN; }
  __device__ uint16_t same_n() const { return 1 << rank | 1 << peer(kN); }
  __device__ int peer(int index) const {  // index < kPeers
    return index < kN ? rank - n() + index : rank ^ kN;
  }
};

// What a block copies for its tile: one of kN parts of the activation rows, since its neighbours
// along N copy the others, and both of its two blocks of 64 weight rows, or one of them if it has a
// neighbour along M.
template <class Place>
struct TileSource {
  static constexpr int kWeightBlocks = kConsumers / Place::kM;
  static constexpr int kPartM = Place::kTileM / Place::kN;
  const uint8_t* weights[kWeightBlocks];
  int m;  // first of the part
};

// The producer: one thread.
template <class Place, int kStages>
struct Producer {
  static constexpr int kTileM = Place::kTileM;
  static constexpr int kPartM = TileSource<Place>::kPartM;

  Ring<kTileM, kStages>& ring;
  Place place;
  RingPosition<kStages> position;

  // One stage: activations from column `k` on, `bytes` of each weight block from `offset` on.
  __device__ void load(const TileSource<Place>& tile, const CUtensorMap* map, int k, int64_t offset,
                       uint32_t bytes) {
    Stage<kTileM>& stage = ring.stages[position.stage];
    uint64_t* full = &ring.full[position.stage];
    mbarrier_wait(&ring.empty[position.stage], position.parity ^ 1);
    mbarrier_arrive_expect(full, kTileM * kTileK + kConsumers * bytes);
    if constexpr (TileSource<Place>::kWeightBlocks == 1) {
      bulk_copy_multicast(stage.weights + place.m() * bytes, tile.weights[0] + offset, bytes, full,
                          place.same_n());
    } else {
      for (int c = 0; c < kConsumers; ++c) {
        bulk_copy(stage.weights + c * bytes, tile.weights[c] + offset, bytes, full);
      }
    }
    tensor_copy_multicast(stage.activations + place.n() * kPartM * kTileK, map, k, tile.m, full,
                          place.same_m());
    position.advance();
  }

  // The K tiles of one part, whose weights begin at `offset` in a block.
  __device__ void load_part(const TileSource<Place>& tile, const CUtensorMap* map, KTiles part,
                            int64_t offset, uint32_t stage_bytes) {
    int k = part.first * kTileK;
    offset += part.first * stage_bytes;
    for (int s = 0; s < part.whole; ++s, k += kTileK, offset += stage_bytes) {
      load(tile, map, k, offset, stage_bytes);
    }
    if (part.tail) load(tile, map, k, offset, stage_bytes / 2);
  }
};

// A consumer warpgroup. The wgmma of one step of 32 columns is in flight while the registers of the
// next step are prepared, across stages too. A stage is released when the second step of the next
// one is issued.
template <class Place, int kStages>
struct Consumer {
  static constexpr int kTileM = Place::kTileM;

  Ring<kTileM, kStages>& ring;
  Place place;
  uint32_t thread;  // among the consumers
  RingPosition<kStages> position;
  int unreleased = -1;    // the stage that wgmmas in flight may still read
  uint32_t a[2][4] = {};  // A's registers of even and odd steps

  // Signals all blocks that write into this one's stages. Every warp signals for itself: the end of
  // its wgmmas does not mean that other warps have loaded their weights.
  __device__ void release() {
    const uint32_t lane = thread % 32;
    if (unreleased >= 0 && lane < place.kPeers) {
      mbarrier_arrive_cluster(&ring.empty[unreleased], place.peer(lane));
    }
  }

  __device__ void multiply(uint32_t (&sums)[kTileM / 2], const uint32_t (&step)[4], uint64_t b) {
    wgmma_fence_sums(sums);
    wgmma_arrive();
    wgmma<kTileM>(sums, step, b);
    wgmma_commit();
  }

  // Steps of a stage of low codes. 16 bytes of weights are two steps.
  template <int kSteps>
  __device__ void multiply_lo(uint32_t (&sums)[kTileM / 2]) {
    const Stage<kTileM>& stage = ring.stages[position.stage];
    const uint64_t b = wgmma_descriptor(stage.activations);
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
  __device__ void multiply_hi(uint32_t (&sums)[kTileM / 2]) {
    const Stage<kTileM>& stage = ring.stages[position.stage];
    const uint64_t b = wgmma_descriptor(stage.activations);
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
  __device__ void multiply_tile(KTiles lo, KTiles hi, uint32_t (&sums_lo)[kTileM / 2],
                                uint32_t (&sums_hi)[kTileM / 2]) {
#pragma unroll
    for (int i = 0; i < kTileM / 2; ++i) sums_lo[i] = 0;
#pragma unroll 1
    for (int s = 0; s < lo.whole; ++s) multiply_lo<4>(sums_lo);
    if (lo.tail) multiply_lo<2>(sums_lo);
    wgmma_wait<0>();
    wgmma_fence_sums(sums_lo);

#pragma unroll
    for (int i = 0; i < kTileM / 2; ++i) sums_hi[i] = 0;
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

}  // namespace resq::cuda::sm90
