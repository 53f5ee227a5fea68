// mixed_gemm for small M on every architecture, and for any M on those without a kernel of their
// own: INT8 mma.sync, weights streamed into registers.
#include <cuda_runtime.h>

#include "cuda/pdl.cuh"
#include "ops/mixed_gemm/epilogue.cuh"
#include "ops/mixed_gemm/mixed_gemm_cuda.h"
#include "ops/mixed_gemm/small_m/mainloop.cuh"
#include "ops/mixed_gemm/split_k.cuh"
#include "ops/mixed_gemm/weight_prefetch.h"

namespace resq::cuda::small_m {
namespace {

// Each thread writes eight outputs of a row, or this split's partial sums of them.
template <class C>
__device__ __forceinline__ void write_tile(const MixedGemmParams& p, const SplitK& split_k,
                                           const Partials& partials, int split, int64_t tile_n,
                                           const Place& at, const int32_t* sums_lo,
                                           const int32_t* sums_hi) {
  constexpr int kGroups = kTileN / kGroupN;
  const PresentTerms terms = present_terms(p);
  for (int i = threadIdx.x; i < C::kTileM * kGroups; i += kThreads) {
    const int row = i / kGroups, group = i % kGroups * kGroupN;
    if (row >= at.m_count) return;
    const int64_t m = at.m + row, n = tile_n + group;
    const SumGroup lo = load_sums(sums_lo + row * kSumPitch + group);
    const SumGroup hi = load_sums(sums_hi + row * kSumPitch + group);
    if (split_k.splits > 1) {
      if (split_k.has_lo(split)) store_sums(partials.lo(split, m, n), lo);
      if (split_k.has_hi(split)) store_sums(partials.hi(split, m, n), hi);
      continue;
    }
    const TermsOfM of_m = load_terms_of_m(p, m);
    float y[kGroupN];
#pragma unroll
    for (int j = 0; j < kGroupN; ++j) {
      y[j] = output_value(lo.sum[j], hi.sum[j], of_m, load_terms_of_n(p, n + j), terms);
    }
    store_group(p, m, n, y);
  }
}

// Block (tile, split); tiles of the same weight rows are neighbours, so that they share the
// weight's bytes.
template <CudaLayout kLayout, int kTileM, bool kPacked>
__global__ void __launch_bounds__(kThreads, Config<kLayout, kTileM, kPacked>::kMinBlocks)
    mixed_gemm_small_m_kernel(const __grid_constant__ MixedGemmParams p, const SplitK split_k,
                              const Partials partials, unsigned m_tiles, int prefetched_steps) {
  using C = Config<kLayout, kTileM, kPacked>;
  extern __shared__ __align__(16) uint8_t shared[];
  uint8_t* buffers = shared;
  auto* sums_lo = reinterpret_cast<int32_t*>(shared + 2 * C::kBufferBytes);
  int32_t* sums_hi = sums_lo + C::kSumWords;

  const unsigned weight_block = blockIdx.x / m_tiles, m_tile = blockIdx.x % m_tiles;
  const int split = blockIdx.y, begin = split_k.begin(split), end = split_k.begin(split + 1);
  const int warp = threadIdx.x / 32;
  const Place at{
      .warp = warp,
      .lane = static_cast<int>(threadIdx.x % 32),
      .warp_k = warp / 2,
      .fragment_n = warp % 2 * kFragmentsN,
      .m = int64_t{m_tile} * C::kTileM,
      .m_count = static_cast<int>(min(p.m - int64_t{m_tile} * C::kTileM, int64_t{C::kTileM}))};
  const uint8_t* weight =
      p.packed_weight + int64_t{weight_block} * cuda_block_bytes(p.k_lo, p.k_hi);

  // Only the family of this layout has launches that overlap.
  if constexpr (kLayout == CudaLayout::kWgmma) {
    const ByteSpan ahead = prefetched_span(split_k, split, prefetched_steps);
    if (threadIdx.x == 0 && ahead.bytes > 0) prefetch_early(weight + ahead.first, ahead.bytes);
    if (split_k.splits == 1 && threadIdx.x < kTileN / kGroupN) {
      prefetch_terms_of_n(p, int64_t{weight_block} * kTileN + threadIdx.x * kGroupN);
    }
  }
  pdl_wait();
  pdl_trigger();
  // The high part starts with empty registers, so its first weights are prefetched into the
  // second-level cache.
  const uint8_t* weight_hi = weight + cuda_block_lo_bytes(p.k_lo);
  if (split_k.has_lo(split) && split_k.has_hi(split)) {
    const int first = min(end - split_k.lo_tiles, C::kDepth * C::kStageSteps);
    for (int i = threadIdx.x * 128; i < first * kCudaStepBytes; i += kThreads * 128) {
      prefetch_line(weight_hi + i);
    }
  }

  for (int i = threadIdx.x; i < 2 * C::kSumWords; i += kThreads) sums_lo[i] = 0;
  if (split_k.has_lo(split)) {
    const Part<C, false> part{static_cast<const uint8_t*>(p.q_lo), static_cast<int>(p.k_lo)};
    multiply_part<C>(part, weight, begin, min(end, split_k.lo_tiles), at, buffers, sums_lo);
  }
  if (split_k.has_hi(split)) {
    const Part<C, true> part{reinterpret_cast<const uint8_t*>(p.q_hi), static_cast<int>(p.k_hi)};
    multiply_part<C>(part, weight_hi, max(begin - split_k.lo_tiles, 0), end - split_k.lo_tiles, at,
                     buffers, sums_hi);
  }
  __syncthreads();
  write_tile<C>(p, split_k, partials, split, int64_t{weight_block} * kTileN, at, sums_lo, sums_hi);
}

template <CudaLayout kLayout, int kTileM, bool kPacked>
void launch(const MixedGemmParams& p, const SplitK& split_k, void* workspace, const Device& device,
            Stream stream) {
  using C = Config<kLayout, kTileM, kPacked>;
  const auto kernel = mixed_gemm_small_m_kernel<kLayout, kTileM, kPacked>;
  const Partials partials = partials_in(workspace, p);
  const int64_t m_tiles = ceil_div(p.m, kTileM);
  const Grid grid{.x = static_cast<unsigned>(m_tiles * cuda_packed_blocks(p.n)),
                  .y = static_cast<unsigned>(split_k.splits),
                  .threads = kThreads,
                  .shared_bytes = C::kSharedBytes};
  const int steps = prefetched_steps(int64_t{grid.x} * grid.y, int64_t{device.sms} * C::kMinBlocks,
                                     device.l2_bytes, current_prefetch());
  launch_pdl("mixed_gemm", kernel, grid, stream, p, split_k, partials,
             static_cast<unsigned>(m_tiles), steps);
  if (split_k.splits > 1) reduce_split_k(p, split_k, partials, stream);
}

template <CudaLayout kLayout, int kTileM>
void launch(const MixedGemmParams& p, const SplitK& split_k, void* workspace, const Device& device,
            Stream stream) {
  const auto run = p.q_lo_packed ? launch<kLayout, kTileM, true> : launch<kLayout, kTileM, false>;
  run(p, split_k, workspace, device, stream);
}

}  // namespace
}  // namespace resq::cuda::small_m

namespace resq::cuda {

void mixed_gemm_small_m(const MixedGemmParams& params, const MixedGemmChoice& choice,
                        CudaLayout layout, void* workspace, const Device& device, Stream stream) {
  const MixedGemmParams p = readable_rows(params, choice.rows, workspace, stream);
  with_tile<kSmallMTiles>(choice.tile, [&]<int kTileM>() {
    const auto run = layout == CudaLayout::kMma ? small_m::launch<CudaLayout::kMma, kTileM>
                                                : small_m::launch<CudaLayout::kWgmma, kTileM>;
    run(p, choice.split_k, workspace, device, stream);
  });
}

}  // namespace resq::cuda
