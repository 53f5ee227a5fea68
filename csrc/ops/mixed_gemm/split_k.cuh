// Split-K: each block of an output tile writes the exact sums of its part of K to the workspace,
// and a second launch adds them. There are no atomics and nothing to clear, so that a captured
// graph can be replayed, and the result has the same bits as that of a single block.
#pragma once

#include "ops/mixed_gemm/epilogue.cuh"
#include "ops/mixed_gemm/mixed_gemm_tiles.h"

namespace resq::cuda {

// int32 [splits + 1, M, partials_stride]. Split s writes its low sums to array s and its high sums
// to array s + 1: at most one split has both.
struct Partials {
  int32_t* sums;
  int64_t m_rows, stride;

  __device__ int32_t* lo(int split, int64_t m, int64_t n) const {
    return sums + (split * m_rows + m) * stride + n;
  }
  __device__ int32_t* hi(int split, int64_t m, int64_t n) const { return lo(split + 1, m, n); }
};

// Sums of eight neighbouring outputs of a row, as two 16-byte accesses.
struct SumGroup {
  int32_t sum[kGroupN];
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

inline Partials partials_in(void* workspace, const MixedGemmParams& p) {
  return {static_cast<int32_t*>(workspace), p.m, partials_stride(p.n)};
}

// Adds the partial sums and runs the epilogue.
void reduce_split_k(const MixedGemmParams& p, const SplitK& split_k, const Partials& partials,
                    Stream stream);

}  // namespace resq::cuda
