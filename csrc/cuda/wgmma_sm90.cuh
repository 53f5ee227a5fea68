// wgmma.m64nNk32 on signed bytes: A (64 rows x 32 columns) from registers, B (N rows x 32 columns,
// K-major) from shared memory, sums in int32. Thread t of the warpgroup's warp w holds
//   A:    registers 0..3 = rows 16 w + t/4 and + 8 at columns 4 (t % 4), then the same two at + 16;
//   sums: register 4 j + 2 h + l = row 16 w + t/4 + 8 h, B's row 8 j + 2 (t % 4) + l.
#pragma once

#include <cute/arch/mma_sm90_gmma.hpp>
#include <utility>

#include "cuda/mbarrier_sm90.cuh"

namespace resq::cuda {

template <int kN>
struct WgmmaAtom;
template <>
struct WgmmaAtom<32> {
  using Type = cute::SM90::GMMA::MMA_64x32x32_S32S8S8_RS_TN;
};
template <>
struct WgmmaAtom<64> {
  using Type = cute::SM90::GMMA::MMA_64x64x32_S32S8S8_RS_TN;
};
template <>
struct WgmmaAtom<128> {
  using Type = cute::SM90::GMMA::MMA_64x128x32_S32S8S8_RS_TN;
};
template <>
struct WgmmaAtom<192> {
  using Type = cute::SM90::GMMA::MMA_64x192x32_S32S8S8_RS_TN;
};

inline constexpr int kSwizzleBytes = 128;  // a row of B in shared memory

// B's descriptor: 128-byte swizzle, groups of 8 rows of 128 bytes. The tile starts at a multiple of
// 1024 bytes; the next 32 columns are at descriptor + 2.
__device__ inline uint64_t wgmma_descriptor(const void* tile) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kGroupStride = uint64_t{8 * kSwizzleBytes / 16} << 32;
  return kSwizzle128 | kGroupStride | (uint64_t{1} << 16) | ((shared_address(tile) & 0x3ffff) >> 4);
}

// Keeps the compiler from moving accesses to `sums` across this point.
template <int kCount>
__device__ inline void wgmma_fence_sums(uint32_t (&sums)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(sums[i])::"memory");
}

// sums += A B, asynchronously: A's registers and the sums belong to it until wgmma_wait.
template <int kN>
__device__ inline void wgmma(uint32_t (&sums)[kN / 2], const uint32_t (&a)[4], uint64_t b) {
  [&]<size_t... kIndex>(std::index_sequence<kIndex...>) {
    WgmmaAtom<kN>::Type::fma(a[0], a[1], a[2], a[3], b, sums[kIndex]...,
                             cute::SM90::GMMA::ScaleOut::One);
  }(std::make_index_sequence<kN / 2>());
}

__device__ inline void wgmma_arrive() { cute::warpgroup_arrive(); }
__device__ inline void wgmma_commit() { cute::warpgroup_commit_batch(); }

// Waits until at most kPending committed groups are unfinished.
template <int kPending>
__device__ inline void wgmma_wait() {
  cute::warpgroup_wait<kPending>();
}

}  // namespace resq::cuda
