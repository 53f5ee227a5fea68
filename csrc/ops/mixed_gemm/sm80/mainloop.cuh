// The main loop of mixed_gemm on sm_80, 86, 87 and 89, whose tensor cores multiply INT4.
//
//   M  rows of activations, the B operand    N  rows of the weight, the A operand    K  columns
//
// A block computes a tile of kTileM x 128 (two blocks of the packed weight) of the output [M, N],
// in warps of 32 x 64. K is processed in tiles of 64 bytes of an activation row: 128 packed low
// codes, 64 unpacked ones, or 64 high codes. cp.async fills a ring of kStages tiles:
//
//   weights      the fragments as they are in memory; a lane reads its 16 bytes with one LDS.128
//   activations  [m][64 bytes], 16-byte chunks swizzled so that neither ldmatrix nor the 8-byte
//                loads of unpacked codes have bank conflicts
//
// Each part has its own int32 sums, because the epilogue scales them separately. They take 128
// registers, which is the reason for warps of 32 x 64 (64 x 64 would need 256).
#pragma once

#include "cuda/copy_sm80.cuh"
#include "cuda/mma_sm80.cuh"
#include "ops/mixed_gemm/mixed_gemm_tiles.h"

namespace resq::cuda::sm80 {

constexpr int kTileN = 128;
constexpr int kTileKBytes = 64;  // of an activation row
constexpr int kWarpM = 32, kWarpN = 64;
constexpr int kFragmentsM = kWarpM / 8;            // of B, in a warp and step
constexpr int kFragmentsN = kWarpN / kCudaStripN;  // of A
constexpr int kChunkBytes = 16, kChunks = kTileKBytes / kChunkBytes;
constexpr int kTileSteps = 2;  // steps of the packed weight in a K tile, at most
constexpr int kWeightBlocks = kTileN / kCudaBlockN;
constexpr int kWeightBytes = kTileSteps * kWeightBlocks * kCudaStepBytes;  // of a K tile
constexpr unsigned kRasterM = 8;  // tiles along M that neighbouring blocks share

template <int kTileRows, bool kPackedActivations>
struct Config {
  static constexpr MixedGemmTile kTile = tile_of(kSm80Tiles, kTileRows);
  static_assert(kTile.n == kTileN);
  static constexpr int kTileM = kTile.m, kMinBlocks = kTile.min_blocks;
  static constexpr bool kPacked = kPackedActivations;
  static constexpr KTile kTileK = k_tile_columns(MixedGemmKernel::kSm80, kPacked);
  static constexpr int kLoSteps = kTileK.lo / kCudaLoStepK;  // in a low K tile
  static_assert(kTileK.hi == kTileSteps * kCudaHiStepK && kTileK.hi == kTileKBytes);
  static constexpr int kWarps = kTileM / kWarpM * (kTileN / kWarpN);
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kStages = kTileM == 128 ? 5 : 4;
  static constexpr int kStageBytes = kWeightBytes + kTileM * kTileKBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;
};

// Where a thread works: first m and n of its block's tile, its warp's place in it.
struct Place {
  int64_t m, n;
  int warp_m, warp_n, lane;
};

using Accumulators = int32_t[kFragmentsN][kFragmentsM][4];

// Chunk c of row m of the activations is stored at chunk c ^ swizzle(m). Eight consecutive rows
// from an even one have each of the four keys twice, once in either half of the banks; so have rows
// 0 .. 3 for pairs of chunks.
__device__ __forceinline__ int swizzle(int m) { return (m & 2) | ((m >> 2) & 1); }

// Addresses of a thread's copies of one K tile.
template <class C>
struct Loader {
  static constexpr int kRowsApart = C::kThreads / kChunks;  // of a thread's chunks
  static constexpr int kWeightCopies = kWeightBytes / kChunkBytes / C::kThreads;

  const MixedGemmParams& p;
  const Place& at;
  uint8_t* ring;
  int lo_tiles;

  __device__ __forceinline__ void load(int k_tile, int stage) const {
    uint8_t* to = ring + stage * C::kStageBytes;
    if (k_tile < lo_tiles) {
      const int steps = static_cast<int>(cuda_lo_steps(p.k_lo)) - k_tile * C::kLoSteps;
      load_weights(to, int64_t{k_tile} * C::kLoSteps * kCudaStepBytes, min(steps, C::kLoSteps));
      load_activations(to + kWeightBytes, static_cast<const uint8_t*>(p.q_lo),
                       static_cast<int>(p.k_lo / (C::kPacked ? 2 : 1)), k_tile);
    } else {
      const int hi_tile = k_tile - lo_tiles;
      load_weights(to, cuda_block_lo_bytes(p.k_lo) + int64_t{hi_tile} * kTileSteps * kCudaStepBytes,
                   kTileSteps);
      load_activations(to + kWeightBytes, reinterpret_cast<const uint8_t*>(p.q_hi),
                       static_cast<int>(p.k_hi), hi_tile);
    }
  }

  // [step][weight block][fragment][lane][16]; steps and blocks outside the weight are zero.
  __device__ __forceinline__ void load_weights(uint8_t* to, int64_t offset, int steps) const {
    const int64_t block = at.n / kCudaBlockN;
    const int64_t blocks = cuda_packed_blocks(p.n) - block;
    const int64_t block_bytes = cuda_block_bytes(p.k_lo, p.k_hi);
    const uint8_t* from = p.packed_weight + block * block_bytes + offset;
#pragma unroll
    for (int i = 0; i < kWeightCopies; ++i) {
      const int byte = (i * C::kThreads + threadIdx.x) * kChunkBytes;
      const int step = byte / (kWeightBlocks * kCudaStepBytes);
      const int b = byte / kCudaStepBytes % kWeightBlocks;
      const bool inside = step < steps && b < blocks;
      const uint8_t* source =
          from + b * block_bytes + step * kCudaStepBytes + byte % kCudaStepBytes;
      copy_async_16(to + byte, inside ? source : p.packed_weight, inside);
    }
  }

  // [m][chunk]; what lies outside the matrix is zero. row_bytes is a multiple of 16.
  __device__ __forceinline__ void load_activations(uint8_t* to, const uint8_t* from, int row_bytes,
                                                   int k_tile) const {
    const int chunk = threadIdx.x % kChunks, byte = k_tile * kTileKBytes + chunk * kChunkBytes;
#pragma unroll
    for (int i = 0; i < C::kTileM / kRowsApart; ++i) {
      const int m = i * kRowsApart + threadIdx.x / kChunks;
      const bool inside = byte < row_bytes && at.m + m < p.m;
      copy_async_16(to + m * kTileKBytes + (chunk ^ swizzle(m)) * kChunkBytes,
                    inside ? from + (at.m + m) * row_bytes + byte : from, inside);
    }
  }
};

// The A fragments of one step.
__device__ __forceinline__ void load_weight_fragments(uint4 (&a)[kFragmentsN], const uint8_t* stage,
                                                      int step, const Place& at) {
  const uint8_t* block = stage + (step * kWeightBlocks + at.warp_n) * kCudaStepBytes + at.lane * 16;
#pragma unroll
  for (int fn = 0; fn < kFragmentsN; ++fn) {
    a[fn] = *reinterpret_cast<const uint4*>(block + fn * kCudaFragmentBytes);
  }
}

// One step of 32 bytes of a row: 64 packed low codes or 32 high ones.
template <bool kInt4>
__device__ __forceinline__ void multiply_step(Accumulators& acc, const uint8_t* stage, int step,
                                              const Place& at) {
  uint4 a[kFragmentsN];
  uint32_t b[kFragmentsM / 2][4];  // two fragments: both registers of the first, then the second
  load_weight_fragments(a, stage, step, at);
#pragma unroll
  for (int pair = 0; pair < kFragmentsM / 2; ++pair) {
    const int m = at.warp_m * kWarpM + (2 * pair + at.lane / 16) * 8 + at.lane % 8;
    const int chunk = 2 * step + at.lane / 8 % 2;
    load_matrices(b[pair], stage + kWeightBytes + m * kTileKBytes +
                               (chunk ^ swizzle(at.lane % 8)) * kChunkBytes);
  }
#pragma unroll
  for (int fn = 0; fn < kFragmentsN; ++fn) {
    const uint32_t words[4] = {a[fn].x, a[fn].y, a[fn].z, a[fn].w};
#pragma unroll
    for (int fm = 0; fm < kFragmentsM; ++fm) {
      const uint32_t (&pair)[4] = b[fm / 2];
      if constexpr (kInt4) {
        mma_s4(acc[fn][fm], words, pair[fm % 2 * 2], pair[fm % 2 * 2 + 1]);
      } else {
        mma_s8(acc[fn][fm], words, pair[fm % 2 * 2], pair[fm % 2 * 2 + 1]);
      }
    }
  }
}

// A K tile of 64 unpacked low codes: the weight's nibbles become bytes, 16 times the codes, even
// columns before odd ones; the activations' bytes are put in the same order.
__device__ __forceinline__ void multiply_unpacked(Accumulators& acc, const uint8_t* stage,
                                                  const Place& at) {
  uint4 a[kFragmentsN];
  load_weight_fragments(a, stage, 0, at);
  const int g = at.lane / 4, i = at.lane % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {  // 32 columns
    uint32_t even[kFragmentsM], odd[kFragmentsM];
#pragma unroll
    for (int fm = 0; fm < kFragmentsM; ++fm) {
      const int m = at.warp_m * kWarpM + fm * 8 + g;
      const uint2 codes = *reinterpret_cast<const uint2*>(
          stage + kWeightBytes + m * kTileKBytes + ((2 * half + i / 2) ^ swizzle(g)) * kChunkBytes +
          i % 2 * 8);
      even[fm] = __byte_perm(codes.x, codes.y, 0x6420);
      odd[fm] = __byte_perm(codes.x, codes.y, 0x7531);
    }
#pragma unroll
    for (int fn = 0; fn < kFragmentsN; ++fn) {
      const uint32_t n_g = half ? a[fn].z : a[fn].x, n_g8 = half ? a[fn].w : a[fn].y;
      const uint32_t words[4] = {low_nibbles_x16(n_g), low_nibbles_x16(n_g8), high_nibbles_x16(n_g),
                                 high_nibbles_x16(n_g8)};
#pragma unroll
      for (int fm = 0; fm < kFragmentsM; ++fm) mma_s8(acc[fn][fm], words, even[fm], odd[fm]);
    }
  }
}

}  // namespace resq::cuda::sm80
