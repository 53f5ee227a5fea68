// Blocks that share a tile's K: how they cut it, and the int32 planes in which they leave their
// exact sums for mixed_gemm_add_splits. No atomics and nothing to clear, so that a captured graph
// replays it and the result has the bits of one block.
#pragma once

#include "cuda/launch.h"
#include "ops/mixed_gemm/mixed_gemm_config.h"
#include "ops/mixed_gemm/mixed_gemm_epilogue.cuh"

namespace resq::cuda {

// Units of K (a kernel's own: steps, stages), the low part's first. Split s of a tile does the
// units begin(s) .. begin(s + 1) - 1.
struct SplitK {
  int lo_units, hi_units, splits;

  // In 32 bits: units are at most 65536 / 32 a part, splits some tens.
  RESQ_HOST_DEVICE int begin(int s) const { return (lo_units + hi_units) * s / splits; }
  RESQ_HOST_DEVICE bool has_lo(int s) const {
    return begin(s) < lo_units && begin(s) < begin(s + 1);
  }
  RESQ_HOST_DEVICE bool has_hi(int s) const {
    return begin(s + 1) > lo_units && begin(s) < begin(s + 1);
  }
};

// Planes of int32 [rows, columns padded to blocks]. Split s writes its low sums to plane s and its
// high sums to plane s + 1: at most one split has both, so splits + 1 planes are enough.
struct SplitPlanes {
  int32_t* planes;
  int64_t rows, stride;

  __device__ int32_t* lo(int split, int64_t m, int64_t n) const {
    return planes + (split * rows + m) * stride + n;
  }
  __device__ int32_t* hi(int split, int64_t m, int64_t n) const { return lo(split + 1, m, n); }
};

// Sums of eight neighbouring columns, as two 16-byte accesses.
struct SumGroup {
  int32_t sum[kOutputGroup];
};

__device__ __forceinline__ SumGroup load_sums(const int32_t* from) {
  const int4 a = reinterpret_cast<const int4*>(from)[0], b = reinterpret_cast<const int4*>(from)[1];
  return {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
}
__device__ __forceinline__ void store_sums(int32_t* to, const SumGroup& v) {
  const int32_t* s = v.sum;
  reinterpret_cast<int4*>(to)[0] = {s[0], s[1], s[2], s[3]};
  reinterpret_cast<int4*>(to)[1] = {s[4], s[5], s[6], s[7]};
}

inline SplitPlanes split_planes(const MixedGemmParams& p, void* workspace) {
  return {static_cast<int32_t*>(workspace), p.rows, split_plane_columns(p.n)};
}

// Adds the planes and runs the epilogue: the second launch of a call with splits.
void mixed_gemm_add_splits(const MixedGemmParams& p, const SplitK& k, const SplitPlanes& planes,
                           Stream stream);

}  // namespace resq::cuda
