// Which CUDA kernel a mixed_gemm runs, with which tile: a pure host function, tested on the CPU.
#pragma once

#include <algorithm>

#include "ops/mixed_gemm/mixed_gemm_cuda.h"

namespace resq::cuda {

// What the choice depends on.
struct MixedGemmShape {
  int64_t rows, n, k_lo, k_hi;
  bool packed;  // low activations as nibbles
};

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
          splits > 1 ? splits * 2 * s.rows * s.n * int64_t{sizeof(int32_t)} : 0};
}

inline MixedGemmChoice mixed_gemm_choice(const MixedGemmShape& s, Family family, int sms) {
  if (family == Family::kPortable || s.rows <= kSmallBatchRows) return small_batch_choice(s, sms);
  if (family == Family::kSm80) return {MixedGemmKernel::kSm80, 128, 128, 1, 0};
  return {MixedGemmKernel::kSm90, 128, 128, 1, 0};
}

}  // namespace resq::cuda
