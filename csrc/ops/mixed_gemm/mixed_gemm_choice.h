// Which CUDA kernel a mixed_gemm runs, with which tile, split of K and workspace: pure host
// functions, tested on the CPU. In all CUDA code of mixed_gemm
//
//   M  rows of activations (tokens) = rows of the output
//   N  rows of the weight (output features) = columns of the output
//   K  columns of both: K_lo in INT4, then K_hi in INT8
//
// Tensor cores take the weight as their A operand, so an instruction's own M is our N.
#pragma once

#include <algorithm>
#include <cmath>
#include <iterator>
#include <stdexcept>
#include <string>
#include <utility>

#include "cuda/arch.h"
#include "ops/mixed_gemm/activation_rows.h"
#include "ops/mixed_gemm/mixed_gemm_tuning.h"

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
  int most_splits = kMaxSplits;      // blocks that may share K
};

// All tiles there are: the kernels are compiled for these, and a choice is one of them.
// small_m: a second block of 64 rows on a multiprocessor would spill registers.
// sm90: the blocks of a cluster share what they read, see sm90_clocks. Blocks that share K are in
// one cluster too, of 1 x cluster_n x splits blocks; at 192 rows their sums leave no room for it.
inline constexpr MixedGemmTile kSmallMTiles[] = {{8, 64, 3}, {16, 64, 2}, {32, 64, 2}, {64, 64, 1}};
inline constexpr MixedGemmTile kSm80Tiles[] = {{64, 128, 2}, {128, 128, 1}};
inline constexpr MixedGemmTile kSm90Tiles[] = {
    {32, 128, 1, 2, 2, 4}, {64, 128, 1, 2, 2, 4}, {128, 128, 1, 1, 2, 4}, {192, 128, 1, 1, 2, 1}};

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
  const ActivationRows rows = activation_rows(s.m, s.k_lo, s.k_hi, s.packed,
                                              row_alignment(kernel, s.packed), partials);
  return {kernel, tile, split_k(s, kernel, splits), rows, rows.end};
}

constexpr int64_t tiles_of(const MixedGemmShape& s, const MixedGemmTile& tile) {
  return ceil_div(s.m, tile.m) * ceil_div(s.n, tile.n);
}

// See MixedGemmTuning.
struct SplitCosts {
  double fill, second_launch, least_k_tiles;
};

// The split of K that should take the least time. Time is counted in K tiles of `tile_bytes`: waves
// of blocks, of which the last may be thin (a block alone on its multiprocessor has all of it); the
// filling of the pipeline; with splits, writing and reading the partial sums, and the second
// launch.
inline int best_splits(const MixedGemmShape& s, MixedGemmKernel kernel, const MixedGemmTile& tile,
                       int64_t tile_bytes, int sms, const SplitCosts& costs) {
  const int64_t tiles = tiles_of(s, tile), slots = int64_t{sms} * tile.min_blocks;
  const SplitK whole = split_k(s, kernel, 1);
  const int k_tiles = whole.lo_tiles + whole.hi_tiles;
  const auto time = [&](int splits) {
    const int64_t blocks = tiles * splits, thin = blocks % slots;
    const double last = thin ? std::max<double>(thin, sms) / slots : 0;
    const double waves = blocks / slots + last;
    const double partials = 2.0 * partials_bytes(s, splits) / (slots * tile_bytes);
    return waves * ceil_div(k_tiles, splits) + costs.fill +
           (splits > 1 ? partials + costs.second_launch : 0);
  };
  const int most = std::min(tile.most_splits, static_cast<int>(k_tiles / costs.least_k_tiles));
  int best = 1;
  for (int splits = 2; splits <= most; ++splits) {
    if (time(splits) < time(best)) best = splits;
  }
  return best;
}

inline MixedGemmChoice small_m_choice(const MixedGemmShape& s, int sms, const MixedGemmTuning& t) {
  constexpr MixedGemmKernel kKernel = MixedGemmKernel::kSmallM;
  const MixedGemmTile* tile = std::begin(kSmallMTiles);
  while (tile->m < s.m && tile + 1 != std::end(kSmallMTiles) &&
         (tile + 1)->m <= t.small_m_largest_tile) {
    ++tile;
  }
  const SplitCosts costs{t.small_m_fill, t.small_m_second_launch, t.small_m_least_k_tiles};
  return make_choice(s, kKernel, *tile, best_splits(s, kKernel, *tile, kCudaStepBytes, sms, costs));
}

// 128 x 128 reads the least; 64 x 128, two blocks to a multiprocessor, fills a small grid better.
inline MixedGemmChoice sm80_choice(const MixedGemmShape& s, int sms, const MixedGemmTuning& t) {
  constexpr MixedGemmKernel kKernel = MixedGemmKernel::kSm80;
  constexpr MixedGemmTile kSmall = tile_of(kSm80Tiles, 64), kLarge = tile_of(kSm80Tiles, 128);
  constexpr int64_t kTileBytes = (kSmall.m + kSmall.n) * 64;  // 64 bytes of every row of both
  if (tiles_of(s, kLarge) >= sms * t.sm80_large_tiles) return make_choice(s, kKernel, kLarge, 1);
  const SplitCosts costs{t.sm80_fill, t.sm80_second_launch, t.sm80_least_k_tiles};
  return make_choice(s, kKernel, kSmall, best_splits(s, kKernel, kSmall, kTileBytes, sms, costs));
}

// The neighbouring tiles of one cluster of sm90, and its blocks.
struct Sm90Cluster {
  int m, n, blocks;
};
constexpr Sm90Cluster sm90_cluster(const MixedGemmTile& tile, int splits) {
  const int m = splits > 1 ? 1 : tile.cluster_m;
  return {m, tile.cluster_n, m * tile.cluster_n * splits};
}

// Clocks that a block of sm90 takes: per column of K, for what it reads and for its products, and
// at the end of a tile.
struct Sm90Clocks {
  double load, multiply, finish;
};

//   load      the larger of two: second level, half a byte a weight and a byte a code of the
//             activations, each divided by the blocks that share it; shared memory, the same bytes
//             written, the weights read once and the activations by two warpgroups
//   multiply  tensor cores
//   finish    the epilogue, and the sums that blocks which share K send each other
inline Sm90Clocks sm90_clocks(const MixedGemmTile& tile, int splits, const MixedGemmTuning& t) {
  const Sm90Cluster cluster = sm90_cluster(tile, splits);
  const double weights = tile.n / 2, activations = tile.m;
  const double second_level = weights / cluster.m + activations / cluster.n;
  const double shared = 2 * weights + 3 * activations;
  double finish = t.sm90_epilogue_of_row * tile.m / splits;
  if (splits > 1) {
    const double sent = 4.0 * tile.m * tile.n * (splits - 1) / splits;
    finish += t.sm90_exchange + sent / t.sm90_exchange_bytes;
  }
  return {std::max(second_level / t.sm90_l2_bytes, shared / t.sm90_shared_bytes),
          tile.m / t.sm90_rows, finish};
}

// Clusters that run at once: each in one part of the chip, of 16 or 18 multiprocessors (an H100 or
// H200 with 132 has six and two of them) [not measured].
constexpr int sm90_clusters(int blocks, int sms) {
  const int parts = sms / 16, large = std::min(sms % 16 / 2, parts);
  const int left = sms - 16 * parts - 2 * large;
  return std::max((parts - large) * (16 / blocks) + large * (18 / blocks) + left / blocks, 1);
}

// Clocks of the whole product. The last wave counts in full (wave quantization). During the
// epilogue of a tile, what the next one reads first arrives.
inline double sm90_time(const MixedGemmShape& s, const MixedGemmTile& tile, int splits, int sms,
                        const MixedGemmTuning& t) {
  const Sm90Cluster cluster = sm90_cluster(tile, splits);
  const Sm90Clocks clocks = sm90_clocks(tile, splits, t);
  const int64_t tiles = ceil_div(s.m, tile.m * cluster.m) * ceil_div(s.n, tile.n * cluster.n);
  const int64_t waves = ceil_div(tiles, sm90_clusters(cluster.blocks, sms));
  const SplitK split = split_k(s, MixedGemmKernel::kSm90, splits);
  const double columns = splits == 1 ? s.k_lo + s.k_hi
                                     : kSm90KTile * ceil_div(split.lo_tiles + split.hi_tiles, splits);
  const double load = clocks.load * columns, multiply = clocks.multiply * columns;
  const double turn = std::max(load, multiply + clocks.finish);
  return t.sm90_start + (waves - 1) * turn + std::max(load, multiply) + clocks.finish;
}

inline MixedGemmChoice sm90_choice(const MixedGemmShape& s, int sms, const MixedGemmTuning& t) {
  const SplitK whole = split_k(s, MixedGemmKernel::kSm90, 1);
  const int k_tiles = whole.lo_tiles + whole.hi_tiles;
  const MixedGemmTile* best = nullptr;
  int best_splits = 1;
  double least = 0;
  for (const MixedGemmTile& tile : kSm90Tiles) {
    for (int splits = 1; splits <= std::clamp(k_tiles, 1, tile.most_splits); ++splits) {
      const double time = sm90_time(s, tile, splits, sms, t);
      if (best != nullptr && time >= least) continue;
      best = &tile;
      best_splits = splits;
      least = time;
    }
  }
  return make_choice(s, MixedGemmKernel::kSm90, *best, best_splits);
}

inline MixedGemmChoice mixed_gemm_choice(const MixedGemmShape& s, Family family, int sms,
                                         const MixedGemmTuning& tuning) {
  if (family == Family::kPortable || s.m <= tuning.small_m_up_to) {
    return small_m_choice(s, sms, tuning);
  }
  if (family == Family::kSm80) return sm80_choice(s, sms, tuning);
  return sm90_choice(s, sms, tuning);
}

}  // namespace resq::cuda
