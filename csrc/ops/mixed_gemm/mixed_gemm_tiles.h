// What the CUDA kernels of mixed_gemm can be launched as: kernels, tiles, splits of K, and the
// workspace that each needs. Pure functions, tested on the CPU. In all CUDA code of mixed_gemm
//
//   M  rows of activations (tokens) = rows of the output
//   N  rows of the weight (output features) = columns of the output
//   K  columns of both: K_lo in INT4, then K_hi in INT8
//
// Tensor cores take the weight as their A operand, so an instruction's own M is our N.
#pragma once

#include <algorithm>
#include <iterator>
#include <stdexcept>
#include <string>
#include <utility>

#include "cuda/arch.h"
#include "ops/mixed_gemm/activation_rows.h"

namespace resq::cuda {

enum class MixedGemmKernel { kSmallM, kSm80, kSm90 };

// What the choice depends on.
struct MixedGemmShape {
  int64_t m, n, k_lo, k_hi;
  bool packed;  // INT4 activations two a byte, else one
};

inline constexpr int kMaxSplits = 16;

struct MixedGemmTile {
  int m, n;                          // of the output, for one block
  int min_blocks;                    // that a multiprocessor holds: __launch_bounds__
  int cluster_m = 1, cluster_n = 1;  // neighbouring tiles that the blocks of a cluster work on
  int row_n = 1;                     // the same along N where M has one tile only
  int most_splits = kMaxSplits;      // blocks that may share K
};

// All tiles there are: the kernels are compiled for these, and a choice is one of them.
// small_m: a second block of 64 rows on a multiprocessor would spill registers.
// sm90: the blocks of a cluster share what they read, see mixed_gemm_time.h. Blocks that share K
// are in one cluster too; at 192 rows their sums leave no room for it.
inline constexpr MixedGemmTile kSmallMTiles[] = {{8, 64, 3}, {16, 64, 2}, {32, 64, 2}, {64, 64, 1}};
inline constexpr MixedGemmTile kSm80Tiles[] = {{64, 128, 2}, {128, 128, 1}};
inline constexpr MixedGemmTile kSm90Tiles[] = {{32, 128, 1, 2, 2, 4, 4},
                                               {64, 128, 1, 2, 2, 4, 4},
                                               {128, 128, 1, 1, 4, 4, 4},
                                               {192, 128, 1, 1, 2, 2, 1}};

// The tile of `tiles` with `m` rows.
template <size_t kCount>
constexpr MixedGemmTile tile_of(const MixedGemmTile (&tiles)[kCount], int m) {
  return *std::find_if(tiles, tiles + kCount, [&](const MixedGemmTile& t) { return t.m == m; });
}

// run.operator()<m>() for the one tile of kTiles that was chosen; throws if it is none of them.
template <const auto& kTiles, class Run>
void with_tile(const MixedGemmTile& chosen, const Run& run) {
  const bool ran = [&]<size_t... kIndex>(std::index_sequence<kIndex...>) {
    return ((kTiles[kIndex].m == chosen.m && (run.template operator()<kTiles[kIndex].m>(), true)) ||
            ...);
  }(std::make_index_sequence<std::size(kTiles)>());
  if (!ran) {
    throw std::logic_error("mixed_gemm: tile: expected an M that is compiled, got " +
                           std::to_string(chosen.m));
  }
}

// The smallest piece of K that a kernel takes at once, in columns of each part.
struct KTile {
  int lo, hi;
};
inline constexpr int kSm90KTile = 128;
constexpr KTile k_tile_columns(MixedGemmKernel kernel, bool packed) {
  switch (kernel) {
    case MixedGemmKernel::kSmallM: return {kCudaLoStepK, kCudaHiStepK};
    case MixedGemmKernel::kSm80: return {packed ? 128 : 64, 64};  // 64 bytes of a row
    default: return {kSm90KTile, kSm90KTile};
  }
}

// sm80 copies 16 bytes at a time, and tensor maps of sm90 have rows of a multiple of 16 bytes. Only
// hidden size 896 (784 | 112 on sm_80) needs copies for its length.
constexpr RowAlignment row_alignment(MixedGemmKernel kernel, bool packed) {
  constexpr int kStep = kCudaStepK;
  switch (kernel) {
    case MixedGemmKernel::kSmallM: return {.lo = 8, .hi = 8, .copy = kStep, .int8 = false};
    case MixedGemmKernel::kSm80:
      return {.lo = packed ? 32 : 16, .hi = 16, .copy = kStep, .int8 = false};
    default: return {.lo = 16, .hi = 16, .copy = 16, .int8 = true};
  }
}

// How the blocks of one output tile share K: split s takes the K tiles begin(s) ..
// begin(s + 1) - 1, those of the low part first.
struct SplitK {
  int lo_tiles, hi_tiles, splits;

  // In 32 bits: there are at most 65536 / 32 tiles a part, and kMaxSplits splits.
  RESQ_HOST_DEVICE int begin(int s) const { return (lo_tiles + hi_tiles) * s / splits; }
  RESQ_HOST_DEVICE bool has_lo(int s) const {
    return begin(s) < lo_tiles && begin(s) < begin(s + 1);
  }
  RESQ_HOST_DEVICE bool has_hi(int s) const {
    return begin(s + 1) > lo_tiles && begin(s) < begin(s + 1);
  }
};

inline SplitK split_k(const MixedGemmShape& s, MixedGemmKernel kernel, int splits) {
  const KTile tile = k_tile_columns(kernel, s.packed);
  return {static_cast<int>(ceil_div(cuda_packed_k(s.k_lo), tile.lo)),
          static_cast<int>(ceil_div(cuda_packed_k(s.k_hi), tile.hi)), splits};
}

// Partial sums of splits (split_k.cuh): splits + 1 int32 arrays [M, partials_stride], as at most
// one split works on both parts.
RESQ_HOST_DEVICE constexpr int64_t partials_stride(int64_t n) { return align_up(n, kCudaBlockN); }
constexpr int64_t partials_bytes(const MixedGemmShape& s, int64_t splits) {
  return splits > 1 ? (splits + 1) * s.m * partials_stride(s.n) * int64_t{sizeof(int32_t)} : 0;
}

struct MixedGemmChoice {
  MixedGemmKernel kernel;
  MixedGemmTile tile;
  SplitK split_k;
  ActivationRows rows;
  int64_t workspace_bytes;  // partial sums, then copied rows; uninitialised
};

// "small_m 8x64 splits=2": the kernel, its tile M x N, and the blocks that share a tile.
inline std::string describe(const MixedGemmChoice& choice) {
  constexpr const char* kNames[] = {"small_m", "sm80", "sm90"};
  return std::string(kNames[static_cast<int>(choice.kernel)]) + " " +
         std::to_string(choice.tile.m) + "x" + std::to_string(choice.tile.n) +
         " splits=" + std::to_string(choice.split_k.splits);
}

inline MixedGemmChoice make_choice(const MixedGemmShape& s, MixedGemmKernel kernel,
                                   const MixedGemmTile& tile, int splits) {
  // The blocks of sm90 add their sums in shared memory.
  const int64_t partials = kernel == MixedGemmKernel::kSm90 ? 0 : partials_bytes(s, splits);
  const ActivationRows rows =
      activation_rows(s.m, s.k_lo, s.k_hi, s.packed, row_alignment(kernel, s.packed), partials);
  return {kernel, tile, split_k(s, kernel, splits), rows, rows.end};
}

// The neighbouring tiles of a cluster, and its blocks: one of each for kernels without clusters.
struct MixedGemmCluster {
  int m, n, blocks;
};
inline constexpr int kSplitClusterN = 2;  // of sm90, where blocks share K
constexpr MixedGemmCluster cluster_of(const MixedGemmShape& s, MixedGemmKernel kernel,
                                      const MixedGemmTile& tile, int splits) {
  if (kernel != MixedGemmKernel::kSm90) return {1, 1, 1};
  if (splits > 1) return {1, kSplitClusterN, kSplitClusterN * splits};
  if (s.m <= tile.m) return {1, tile.row_n, tile.row_n};
  return {tile.cluster_m, tile.cluster_n, tile.cluster_m * tile.cluster_n};
}

}  // namespace resq::cuda
