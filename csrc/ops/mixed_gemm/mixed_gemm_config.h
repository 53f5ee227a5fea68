// Which CUDA kernel a mixed_gemm runs, with which tile: a pure host function, tested on the CPU.
#pragma once

#include <algorithm>
#include <iterator>

#include "ops/mixed_gemm/mixed_gemm_cuda.h"
#include "ops/mixed_gemm/mixed_gemm_sm90.h"

namespace resq::cuda {

// What the choice depends on.
struct MixedGemmShape {
  int64_t rows, n, k_lo, k_hi;
  bool packed;  // low activations as nibbles
};

// Blocks that share K leave int32 planes of this many columns (mixed_gemm_splits.cuh): splits + 1
// of them, as at most one split works on both parts.
RESQ_HOST_DEVICE constexpr int64_t split_plane_columns(int64_t n) {
  return align_up(n, kCudaBlockRows);
}
constexpr int64_t split_bytes(const MixedGemmShape& s, int64_t splits) {
  return splits > 1 ? (splits + 1) * s.rows * split_plane_columns(s.n) * int64_t{4} : 0;
}

// Activation rows whose columns are no multiple of these cannot be read with a kernel's aligned
// loads; they are copied into the workspace, padded with zeros (mixed_gemm_pad_rows.cu). Every
// model's sizes but those of 896 columns (784 | 112, in the sm_80 kernel) are.
struct RowUnits {
  int64_t lo, hi;
};
constexpr RowUnits small_batch_row_units() { return {8, 8}; }
constexpr RowUnits sm80_row_units(bool packed) { return {packed ? 32 : 16, 16}; }  // 16 bytes

constexpr int64_t padded_lo_bytes(const MixedGemmShape& s, const RowUnits& units) {
  return s.k_lo % units.lo ? s.rows * cuda_packed_columns(s.k_lo) / (s.packed ? 2 : 1) : 0;
}
constexpr int64_t padded_hi_bytes(const MixedGemmShape& s, const RowUnits& units) {
  return s.k_hi % units.hi ? s.rows * cuda_packed_columns(s.k_hi) : 0;
}

// The workspace: planes of splits, padded low rows, padded high rows.
constexpr int64_t workspace_bytes(const MixedGemmShape& s, int64_t splits, const RowUnits& units) {
  return split_bytes(s, splits) + padded_lo_bytes(s, units) + padded_hi_bytes(s, units);
}

// Up to here the weights' bytes decide the time, and reading them straight into registers is best.
inline constexpr int64_t kSmallBatchRows = 64;

inline constexpr int64_t kMaxSplits = 16;

// The splits of K that should take the least time, if `per_sm` blocks run at once on each of `sms`
// multiprocessors and a tile takes `units` of `unit_bytes`. In units: waves of blocks, of which the
// last may be thin (a block alone on its multiprocessor has all of it); four units to fill the
// pipeline; with splits, writing and reading the planes, and eight units for the second launch.
inline int64_t best_splits(const MixedGemmShape& s, int64_t tiles, int64_t sms, int64_t per_sm,
                           int64_t units, int64_t unit_bytes) {
  constexpr double kStart = 4, kSecondLaunch = 8;
  const int64_t slots = sms * per_sm;
  const auto time = [&](int64_t splits) {
    const int64_t blocks = tiles * splits, thin = blocks % slots;
    const double last = thin ? std::max<double>(thin, sms) / slots : 0;
    const double waves = blocks / slots + last;
    const double planes = 2.0 * split_bytes(s, splits) / (slots * unit_bytes);
    return waves * ceil_div(units, splits) + kStart + (splits > 1 ? planes + kSecondLaunch : 0);
  };
  int64_t best = 1;
  for (int64_t splits = 2; splits <= std::min(kMaxSplits, units / 8); ++splits) {
    if (time(splits) < time(best)) best = splits;
  }
  return best;
}

// Blocks of a tile's height that fit on a multiprocessor (registers; mixed_gemm_small_batch.cuh).
constexpr int64_t small_batch_blocks(int64_t tile_rows) {
  return tile_rows <= 8 ? 3 : tile_rows <= 32 ? 2 : 1;
}

inline MixedGemmChoice small_batch_choice(const MixedGemmShape& s, int sms) {
  const int64_t tile_rows = s.rows <= 8 ? 8 : s.rows <= 16 ? 16 : s.rows <= 32 ? 32 : 64;
  const int64_t tiles = ceil_div(s.rows, tile_rows) * cuda_packed_blocks(s.n);
  const int64_t splits = best_splits(s, tiles, sms, small_batch_blocks(tile_rows),
                                     cuda_lo_steps(s.k_lo) + cuda_hi_steps(s.k_hi), kCudaStepBytes);
  return {MixedGemmKernel::kSmallBatch, static_cast<int>(tile_rows),
          static_cast<int>(kCudaBlockRows), static_cast<int>(splits),
          workspace_bytes(s, splits, small_batch_row_units())};
}

// The tile with the least time by the model of mixed_gemm_sm90.h.
inline MixedGemmChoice sm90_choice(const MixedGemmShape& s, int sms) {
  const auto faster = [&](const Sm90Tile& a, const Sm90Tile& b) {
    const int64_t k = s.k_lo + s.k_hi;
    return sm90_time(a, s.rows, s.n, k, sms) < sm90_time(b, s.rows, s.n, k, sms);
  };
  const Sm90Tile& tile = *std::min_element(std::begin(kSm90Tiles), std::end(kSm90Tiles), faster);
  const int64_t workspace = sm90_rows(s.rows, s.k_lo, s.packed, s.k_hi).workspace_bytes;
  return {MixedGemmKernel::kSm90, tile.tokens, kSm90TileWeights, 1, workspace};
}

// Tiles of 128 x 128 read the least; of 64 rows, two to a multiprocessor, fill a small grid better.
inline MixedGemmChoice sm80_choice(const MixedGemmShape& s, int sms) {
  constexpr int64_t kTileColumns = 128;
  const int64_t large = ceil_div(s.rows, 128) * ceil_div(s.n, kTileColumns);
  const int64_t tile_rows = large < sms ? 64 : 128;
  const int64_t tiles = ceil_div(s.rows, tile_rows) * ceil_div(s.n, kTileColumns);
  const int64_t units = (s.packed ? ceil_div(cuda_lo_steps(s.k_lo), 2) : cuda_lo_steps(s.k_lo)) +
                        cuda_hi_steps(s.k_hi) / 2;
  const int64_t splits = large < sms ? best_splits(s, tiles, sms, 2, units, 6 * kCudaStepBytes) : 1;
  return {MixedGemmKernel::kSm80, static_cast<int>(tile_rows), static_cast<int>(kTileColumns),
          static_cast<int>(splits), workspace_bytes(s, splits, sm80_row_units(s.packed))};
}

inline MixedGemmChoice mixed_gemm_choice(const MixedGemmShape& s, Family family, int sms) {
  if (family == Family::kPortable || s.rows <= kSmallBatchRows) return small_batch_choice(s, sms);
  if (family == Family::kSm80) return sm80_choice(s, sms);
  return sm90_choice(s, sms);
}

}  // namespace resq::cuda
