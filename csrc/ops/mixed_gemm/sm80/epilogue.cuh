// The epilogue of mixed_gemm on sm_80: a tile of outputs, or of partial sums, goes through shared
// memory, so that a thread writes eight neighbours of a row at once.
#pragma once

#include "ops/mixed_gemm/epilogue.cuh"
#include "ops/mixed_gemm/sm80/mainloop.cuh"
#include "ops/mixed_gemm/split_k.cuh"

namespace resq::cuda::sm80 {

constexpr int kPitch = kTileN + 4;  // words; = 4 modulo 16: fragments have no bank conflicts

// The position in the tile of register r of a thread's accumulator [fn][fm].
__device__ __forceinline__ int tile_m(const Place& at, int fm, int r) {
  return at.warp_m * kWarpM + 8 * fm + 2 * (at.lane % 4) + r % 2;
}
__device__ __forceinline__ int tile_n(const Place& at, int fn, int r) {
  return at.warp_n * kWarpN + 16 * fn + at.lane / 4 + 8 * (r / 2);
}

// Writes value(fn, fm, r) of every accumulator to its place in the tile.
template <class Value>
__device__ __forceinline__ void stage_tile(uint8_t* shared, const Place& at, const Value& value) {
  auto* tile = reinterpret_cast<uint32_t*>(shared);
#pragma unroll
  for (int fn = 0; fn < kFragmentsN; ++fn) {
#pragma unroll
    for (int fm = 0; fm < kFragmentsM; ++fm) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        tile[tile_m(at, fm, r) * kPitch + tile_n(at, fn, r)] = value(fn, fm, r);
      }
    }
  }
}

// Calls write(m, n, shared words) for groups of eight of a row of the tile.
template <class C, class Write>
__device__ __forceinline__ void write_groups(const MixedGemmParams& p, const uint8_t* shared,
                                             const Place& at, const Write& write) {
  static_assert(C::kSharedBytes >= C::kTileM * kPitch * int{sizeof(float)}, "the tile");
  constexpr int kGroups = kTileN / kGroupN;
  for (int i = threadIdx.x; i < C::kTileM * kGroups; i += C::kThreads) {
    const int m = i / kGroups, n = i % kGroups * kGroupN;
    if (at.m + m >= p.m || at.n + n >= p.n) continue;
    write(at.m + m, at.n + n, reinterpret_cast<const int32_t*>(shared) + m * kPitch + n);
  }
}

template <class C>
__device__ __forceinline__ void write_output(const MixedGemmParams& p, uint8_t* shared,
                                             const Place& at, const Accumulators& lo,
                                             const Accumulators& hi) {
  const PresentTerms terms = present_terms(p);
  TermsOfM of_m[kFragmentsM][2];
#pragma unroll
  for (int fm = 0; fm < kFragmentsM; ++fm) {
#pragma unroll
    for (int r = 0; r < 2; ++r) of_m[fm][r] = load_terms_of_m(p, at.m + tile_m(at, fm, r));
  }
  TermsOfN of_n[kFragmentsN][2];
#pragma unroll
  for (int fn = 0; fn < kFragmentsN; ++fn) {
#pragma unroll
    for (int h = 0; h < 2; ++h) of_n[fn][h] = load_terms_of_n(p, at.n + tile_n(at, fn, 2 * h));
  }
  constexpr int kShift = C::kPacked ? 0 : 4;
  stage_tile(shared, at, [&](int fn, int fm, int r) {
    return __float_as_uint(output_value(lo[fn][fm][r] >> kShift, hi[fn][fm][r], of_m[fm][r % 2],
                                        of_n[fn][r / 2], terms));
  });
  __syncthreads();
  write_groups<C>(p, shared, at, [&](int64_t m, int64_t n, const int32_t* from) {
    const SumGroup group = load_sums(from);
    float y[kGroupN];
#pragma unroll
    for (int j = 0; j < kGroupN; ++j) y[j] = __int_as_float(group.sum[j]);
    store_group(p, m, n, y);
  });
}

template <class C>
__device__ __forceinline__ void write_partials(const MixedGemmParams& p, const SplitK& split_k,
                                               const Partials& partials, int split, uint8_t* shared,
                                               const Place& at, const Accumulators& lo,
                                               const Accumulators& hi) {
  if (split_k.has_lo(split)) {
    constexpr int kShift = C::kPacked ? 0 : 4;
    stage_tile(shared, at, [&](int fn, int fm, int r) { return lo[fn][fm][r] >> kShift; });
    __syncthreads();
    write_groups<C>(p, shared, at, [&](int64_t m, int64_t n, const int32_t* from) {
      store_sums(partials.lo(split, m, n), load_sums(from));
    });
    __syncthreads();
  }
  if (split_k.has_hi(split)) {
    stage_tile(shared, at, [&](int fn, int fm, int r) { return hi[fn][fm][r]; });
    __syncthreads();
    write_groups<C>(p, shared, at, [&](int64_t m, int64_t n, const int32_t* from) {
      store_sums(partials.hi(split, m, n), load_sums(from));
    });
  }
}

}  // namespace resq::cuda::sm80
