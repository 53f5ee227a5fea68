// How long a choice of mixed_gemm should take, and what limits it: pure functions, tested on the
// CPU. Nothing here is measured but through the constants of mixed_gemm_tuning.h.
#pragma once

#include <algorithm>

#include "ops/mixed_gemm/mixed_gemm_tiles.h"
#include "ops/mixed_gemm/mixed_gemm_tuning.h"

namespace resq::cuda {

enum class MixedGemmLimit {
  kLatency,      // half of the time and more is start, epilogue, exchange or a second launch
  kWaves,        // multiprocessors are idle a fifth of the time, for want of blocks
  kMemory,       // reading the weight
  kSecondLevel,  // reading tiles from L2
  kShared,       // moving them through shared memory
  kTensorCores,
};
constexpr const char* limit_name(MixedGemmLimit limit) {
  constexpr const char* kNames[] = {"latency", "waves",         "memory",
                                    "L2",      "shared memory", "tensor cores"};
  return kNames[static_cast<int>(limit)];
}

struct MixedGemmTime {
  double clocks;
  MixedGemmLimit limit;
};

// Clocks of a multiprocessor for one output tile over all of K, by what it is spent on.
struct TileClocks {
  double memory, second_level, shared, tensor_cores;

  double load() const { return std::max({memory, second_level, shared}); }
  double all() const { return std::max(load(), tensor_cores); }
  // What takes most; tensor cores if they are within a tenth of it, as they decide the clock.
  MixedGemmLimit limit() const {
    if (1.1 * tensor_cores >= load()) return MixedGemmLimit::kTensorCores;
    if (memory >= load()) return MixedGemmLimit::kMemory;
    return second_level >= shared ? MixedGemmLimit::kSecondLevel : MixedGemmLimit::kShared;
  }
};

// memory        the weight comes from memory once, for all tiles along M
// second level  what each block reads, divided by the blocks of a cluster that share it
// shared        sm90: both are written, the weights read once and the activations by two warpgroups
// tensor cores  INT4 at twice the rate of INT8 where sm80 multiplies packed activations
inline TileClocks tile_clocks(const MixedGemmShape& s, MixedGemmKernel kernel,
                              const MixedGemmTile& tile, int splits, const MixedGemmTuning& t) {
  const bool packed = s.packed && kernel != MixedGemmKernel::kSm90;
  const double k_lo = s.k_lo, k_hi = s.k_hi;
  const double weights = tile.n * (k_lo / 2 + k_hi);
  const double activations = tile.m * (packed ? k_lo / 2 + k_hi : k_lo + k_hi);
  const MixedGemmCluster cluster = cluster_of(s, kernel, tile, splits);
  const bool int4 = packed && kernel == MixedGemmKernel::kSm80;
  const double products = tile.m * tile.n * (int4 ? k_lo / 2 + k_hi : k_lo + k_hi);
  TileClocks clocks{};
  clocks.memory = weights / ceil_div(s.m, tile.m) / t.memory_bytes;
  clocks.second_level = (weights / cluster.m + activations / cluster.n) / t.l2_bytes;
  if (kernel == MixedGemmKernel::kSm90) {
    clocks.shared = (2 * weights + 3 * activations) / t.shared_bytes;
    clocks.tensor_cores = products / t.wgmma_products;
  } else {
    clocks.tensor_cores = products / (t.mma_products * t.mma_share);
  }
  return clocks;
}

// Clusters of sm_90 that run at once: each in one part of the chip, of 16 or 18 multiprocessors (an
// H100 or H200 with 132 has six and two of them) [not measured].
constexpr int clusters_at_once(int blocks, int sms) {
  const int parts = sms / 16, large = std::min(sms % 16 / 2, parts);
  const int left = sms - 16 * parts - 2 * large;
  return std::max((parts - large) * (16 / blocks) + large * (18 / blocks) + left / blocks, 1);
}

// The share of K that the slowest split takes.
inline double slowest_share(const SplitK& split) {
  const int k_tiles = split.lo_tiles + split.hi_tiles;
  return k_tiles == 0 ? 1 : static_cast<double>(ceil_div(k_tiles, split.splits)) / k_tiles;
}

inline MixedGemmTime limited(double clocks, double steady, double waves, double blocks_over_slots,
                             const TileClocks& tile) {
  if (steady < clocks / 2) return {clocks, MixedGemmLimit::kLatency};
  if (waves > 1.25 * blocks_over_slots) return {clocks, MixedGemmLimit::kWaves};
  return {clocks, tile.limit()};
}

// small_m and sm80: several blocks a multiprocessor hide what one of them waits for. The last wave
// may be thin: a block alone on its multiprocessor has all of it. Splits write and read their sums,
// and a second launch adds them.
inline MixedGemmTime blocks_time(const MixedGemmShape& s, MixedGemmKernel kernel,
                                 const MixedGemmTile& tile, int splits, int sms,
                                 const MixedGemmTuning& t) {
  const TileClocks clocks = tile_clocks(s, kernel, tile, splits, t);
  const int64_t blocks = ceil_div(s.m, tile.m) * ceil_div(s.n, tile.n) * splits;
  const int64_t slots = int64_t{sms} * tile.min_blocks, thin = blocks % slots;
  const double waves =
      blocks / slots + (thin ? std::max<double>(thin, sms) / static_cast<double>(slots) : 0);
  const double steady =
      waves * tile.min_blocks * clocks.all() * slowest_share(split_k(s, kernel, splits));
  double fixed = t.small_m_start;
  if (kernel == MixedGemmKernel::kSm80) fixed = t.start + t.epilogue_of_row * tile.m;
  if (splits > 1) fixed += t.second_launch + 2.0 * partials_bytes(s, splits) / (sms * t.l2_bytes);
  return limited(fixed + steady, steady, waves, static_cast<double>(blocks) / slots, clocks);
}

// sm90: persistent clusters, one block a multiprocessor, so that the last wave counts in full. What
// the next tile reads first arrives during the epilogue of a tile. Blocks that share K send each
// other their sums, and finish a part of the rows each.
inline MixedGemmTime clusters_time(const MixedGemmShape& s, const MixedGemmTile& tile, int splits,
                                   int sms, const MixedGemmTuning& t) {
  constexpr MixedGemmKernel kKernel = MixedGemmKernel::kSm90;
  TileClocks clocks = tile_clocks(s, kKernel, tile, splits, t);
  const MixedGemmCluster cluster = cluster_of(s, kKernel, tile, splits);
  const int64_t tiles = ceil_div(s.m, tile.m * cluster.m) * ceil_div(s.n, tile.n * cluster.n);
  const int64_t at_once = clusters_at_once(cluster.blocks, sms), waves = ceil_div(tiles, at_once);
  double finish = t.epilogue_of_row * tile.m / splits;
  if (splits > 1) {
    const double sent = 4.0 * tile.m * tile.n * (splits - 1) / splits;
    finish += t.sm90_exchange + sent / t.sm90_exchange_bytes;
  }
  const double share = slowest_share(split_k(s, kKernel, splits));
  const double load = std::max(clocks.second_level, clocks.shared) * share;
  const double multiply = clocks.tensor_cores * share;
  const double turn = std::max(load, multiply + finish);
  const double tiles_clocks = (waves - 1) * turn + std::max(load, multiply);
  // Memory is the chip's: few multiprocessors may take all of it.
  const double memory = clocks.memory * ceil_div(s.m, tile.m) * ceil_div(s.n, tile.n) / sms;
  const double steady = std::max(tiles_clocks, memory);
  clocks.memory = memory > tiles_clocks ? clocks.all() : 0;
  const double filled = memory > tiles_clocks ? waves : static_cast<double>(tiles) / at_once;
  return limited(t.start + steady + finish, steady, waves, filled, clocks);
}

inline MixedGemmTime mixed_gemm_time(const MixedGemmShape& s, MixedGemmKernel kernel,
                                     const MixedGemmTile& tile, int splits, int sms,
                                     const MixedGemmTuning& t) {
  if (kernel == MixedGemmKernel::kSm90) return clusters_time(s, tile, splits, sms, t);
  return blocks_time(s, kernel, tile, splits, sms, t);
}

}  // namespace resq::cuda
