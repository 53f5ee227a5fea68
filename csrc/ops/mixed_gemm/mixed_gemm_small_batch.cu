#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "cuda/pdl.cuh"
#include "ops/mixed_gemm/mixed_gemm_pad_rows.h"
#include "ops/mixed_gemm/mixed_gemm_small_batch.cuh"

namespace resq::cuda {
namespace {

template <CudaLayout kLayout, int kRows, bool kPacked>
void launch_tile(const MixedGemmParams& p, const SplitK& k, void* workspace, Stream stream) {
  using C = small_batch::Config<kLayout, kRows, kPacked>;
  constexpr int kSharedBytes = 2 * C::kBufferBytes + 2 * C::kSumWords * int{sizeof(int32_t)};
  const auto kernel = mixed_gemm_small_batch_kernel<kLayout, kRows, kPacked>;
  if (kSharedBytes > 48 * 1024) {
    allow_shared_bytes("mixed_gemm", reinterpret_cast<const void*>(kernel), kSharedBytes);
  }
  const SplitPlanes planes = split_planes(p, workspace);
  const int64_t row_tiles = ceil_div(p.rows, kRows);
  const dim3 grid(static_cast<unsigned>(row_tiles * cuda_packed_blocks(p.n)),
                  static_cast<unsigned>(k.splits));
  launch_pdl(kernel, grid, small_batch::kThreads, kSharedBytes, stream, p, k, planes,
             static_cast<unsigned>(row_tiles));
  check_launch("mixed_gemm");
  if (k.splits > 1) mixed_gemm_add_splits(p, k, planes, stream);
}

template <CudaLayout kLayout, bool kPacked>
void launch(const MixedGemmParams& p, const SplitK& k, int tile_rows, void* workspace,
            Stream stream) {
  switch (tile_rows) {
    case 8: return launch_tile<kLayout, 8, kPacked>(p, k, workspace, stream);
    case 16: return launch_tile<kLayout, 16, kPacked>(p, k, workspace, stream);
    case 32: return launch_tile<kLayout, 32, kPacked>(p, k, workspace, stream);
    case 64: return launch_tile<kLayout, 64, kPacked>(p, k, workspace, stream);
  }
  throw std::runtime_error("mixed_gemm: tile_rows: expected 8, 16, 32 or 64, got " +
                           std::to_string(tile_rows));
}

}  // namespace

void mixed_gemm_small_batch(const MixedGemmParams& params, const MixedGemmChoice& choice,
                            CudaLayout layout, void* workspace, Stream stream) {
  const MixedGemmParams p =
      pad_rows(params, choice.splits, small_batch_row_units(), workspace, stream);
  const SplitK k{static_cast<int>(cuda_lo_steps(p.k_lo)), static_cast<int>(cuda_hi_steps(p.k_hi)),
                 choice.splits};
  if (layout == CudaLayout::kMma) {
    const auto run =
        p.q_lo_packed ? launch<CudaLayout::kMma, true> : launch<CudaLayout::kMma, false>;
    run(p, k, choice.tile_rows, workspace, stream);
  } else {
    const auto run =
        p.q_lo_packed ? launch<CudaLayout::kWgmma, true> : launch<CudaLayout::kWgmma, false>;
    run(p, k, choice.tile_rows, workspace, stream);
  }
}

}  // namespace resq::cuda
