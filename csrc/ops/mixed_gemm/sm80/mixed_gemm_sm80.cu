// mixed_gemm for many rows on sm_80, 86, 87 and 89: INT4 and INT8 mma.sync over a cp.async ring.
#include <cuda_runtime.h>

#include "ops/mixed_gemm/mixed_gemm_cuda.h"
#include "ops/mixed_gemm/sm80/epilogue.cuh"
#include "ops/mixed_gemm/sm80/mainloop.cuh"

namespace resq::cuda::sm80 {
namespace {

// Orders the blocks so that those that run at once share activations and weights in the L2 cache.
template <class C>
__device__ __forceinline__ Place place_of_block(const MixedGemmParams& p) {
  const auto m_tiles = static_cast<unsigned>(ceil_div(p.m, C::kTileM));
  const auto n_tiles = static_cast<unsigned>(ceil_div(p.n, kTileN));
  const unsigned per_group = kRasterM * n_tiles, group = blockIdx.x / per_group;
  const unsigned first = group * kRasterM, size = min(kRasterM, m_tiles - first);
  const unsigned index = blockIdx.x % per_group;
  const int warp = threadIdx.x / 32;
  return {.m = int64_t{first + index % size} * C::kTileM,
          .n = int64_t{index / size} * kTileN,
          .warp_m = warp / 2,
          .warp_n = warp % 2,
          .lane = static_cast<int>(threadIdx.x % 32)};
}

// Block (tile, split).
template <int kTileM, bool kPacked>
__global__ void __launch_bounds__(Config<kTileM, kPacked>::kThreads,
                                  Config<kTileM, kPacked>::kMinBlocks)
    mixed_gemm_sm80_kernel(const __grid_constant__ MixedGemmParams p, const SplitK split_k,
                           const Partials partials) {
  using C = Config<kTileM, kPacked>;
  extern __shared__ __align__(128) uint8_t shared[];
  const Place at = place_of_block<C>(p);
  const int split = blockIdx.y, begin = split_k.begin(split), end = split_k.begin(split + 1);
  const Loader<C> loader{p, at, shared, split_k.lo_tiles};
  Accumulators lo = {}, hi = {};

  // Every iteration commits a group, empty or not, so that the number in flight is the same.
  const auto fetch = [&](int k_tile) {
    if (k_tile < end) loader.load(k_tile, (k_tile - begin) % C::kStages);
    commit_copies();
  };
  const auto next_stage = [&](int k_tile) {
    wait_copies<C::kStages - 2>();
    __syncthreads();  // all have this tile's bytes; none still reads those that fetch overwrites
    fetch(k_tile + C::kStages - 1);
    return shared + (k_tile - begin) % C::kStages * C::kStageBytes;
  };

#pragma unroll
  for (int i = 0; i < C::kStages - 1; ++i) fetch(begin + i);
  int k_tile = begin;
  for (; k_tile < min(end, split_k.lo_tiles); ++k_tile) {
    const uint8_t* stage = next_stage(k_tile);
    if constexpr (kPacked) {
      multiply_step<true>(lo, stage, 0, at);
      multiply_step<true>(lo, stage, 1, at);
    } else {
      multiply_unpacked(lo, stage, at);
    }
  }
  for (; k_tile < end; ++k_tile) {
    const uint8_t* stage = next_stage(k_tile);
    multiply_step<false>(hi, stage, 0, at);
    multiply_step<false>(hi, stage, 1, at);
  }
  wait_copies<0>();
  __syncthreads();
  if (split_k.splits > 1) {
    write_partials<C>(p, split_k, partials, split, shared, at, lo, hi);
  } else {
    write_output<C>(p, shared, at, lo, hi);
  }
}

template <int kTileM, bool kPacked>
void launch(const MixedGemmParams& p, const SplitK& split_k, void* workspace, Stream stream) {
  using C = Config<kTileM, kPacked>;
  const auto kernel = mixed_gemm_sm80_kernel<kTileM, kPacked>;
  const Partials partials = partials_in(workspace, p);
  const Grid grid{.x = static_cast<unsigned>(ceil_div(p.m, kTileM) * ceil_div(p.n, kTileN)),
                  .y = static_cast<unsigned>(split_k.splits),
                  .threads = C::kThreads,
                  .shared_bytes = C::kSharedBytes};
  launch_kernel("mixed_gemm", kernel, grid, stream, p, split_k, partials);
  if (split_k.splits > 1) reduce_split_k(p, split_k, partials, stream);
}

}  // namespace
}  // namespace resq::cuda::sm80

namespace resq::cuda {

void mixed_gemm_sm80(const MixedGemmParams& params, const MixedGemmChoice& choice, void* workspace,
                     Stream stream) {
  const MixedGemmParams p = readable_rows(params, choice.rows, workspace, stream);
  with_tile<kSm80Tiles>(choice.tile, [&]<int kTileM>() {
    const auto run = p.q_lo_packed ? sm80::launch<kTileM, true> : sm80::launch<kTileM, false>;
    run(p, choice.split_k, workspace, stream);
  });
}

}  // namespace resq::cuda
