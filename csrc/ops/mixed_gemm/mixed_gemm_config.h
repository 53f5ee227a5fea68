// Which CUDA kernel a mixed_gemm runs, with which tile: a pure host function, tested on the CPU.
#pragma once

#include <algorithm>

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

inline MixedGemmChoice small_batch_choice(const MixedGemmShape& s, int sms) {
  const int64_t rows = std::min<int64_t>(align_up(s.rows, 8), kSmallBatchRows);
  const int64_t tile_rows = rows <= 8 ? 8 : rows <= 16 ? 16 : rows <= 32 ? 32 : 64;
  const int64_t tiles = ceil_div(s.rows, tile_rows) * cuda_packed_blocks(s.n);
  // A block should keep at least eight steps of K for its warps.
  const int64_t most = std::max<int64_t>((cuda_lo_steps(s.k_lo) + cuda_hi_steps(s.k_hi)) / 8, 1);
  const int64_t splits = std::clamp<int64_t>(sms / tiles, 1, std::min<int64_t>(most, 16));
  return {MixedGemmKernel::kSmallBatch, static_cast<int>(tile_rows),
          static_cast<int>(kCudaBlockRows), static_cast<int>(splits),
          workspace_bytes(s, splits, small_batch_row_units())};
}

// The tile with the least time by the model of mixed_gemm_sm90.h.
inline MixedGemmChoice sm90_choice(const MixedGemmShape& s, int sms) {
  const Sm90Tile* best = nullptr;
  for (const Sm90Tile& tile : kSm90Tiles) {
    const auto time = [&](const Sm90Tile& t) {
      return sm90_time(t, s.rows, s.n, s.k_lo + s.k_hi, sms);
    };
    if (best == nullptr || time(tile) < time(*best)) best = &tile;
  }
  const int64_t workspace = sm90_rows(s.rows, s.k_lo, s.packed, s.k_hi).workspace_bytes;
  return {MixedGemmKernel::kSm90, best->tokens, kSm90TileWeights, 1, workspace};
}

inline MixedGemmChoice mixed_gemm_choice(const MixedGemmShape& s, Family family, int sms) {
  if (family == Family::kPortable || s.rows <= kSmallBatchRows) return small_batch_choice(s, sms);
  if (family == Family::kSm80) return {MixedGemmKernel::kSm80, 128, 128, 1, 0};
  return sm90_choice(s, sms);
}

}  // namespace resq::cuda
