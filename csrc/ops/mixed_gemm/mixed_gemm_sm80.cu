#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "ops/mixed_gemm/mixed_gemm_pad_rows.h"
#include "ops/mixed_gemm/mixed_gemm_sm80.cuh"

namespace resq::cuda {
namespace {

template <int kRows, bool kPacked>
void launch_tile(const MixedGemmParams& p, int splits, void* workspace, Stream stream) {
  using C = sm80::Config<kRows, kPacked>;
  const auto kernel = mixed_gemm_sm80_kernel<kRows, kPacked>;
  allow_shared_bytes("mixed_gemm", reinterpret_cast<const void*>(kernel), C::kSharedBytes);
  const SplitK k = sm80::split_k<C>(p, splits);
  const SplitPlanes planes = split_planes(p, workspace);
  const dim3 grid(static_cast<unsigned>(ceil_div(p.rows, kRows) * ceil_div(p.n, sm80::kColumns)),
                  static_cast<unsigned>(splits));
  kernel<<<grid, C::kThreads, C::kSharedBytes, static_cast<cudaStream_t>(stream.handle)>>>(p, k,
                                                                                           planes);
  check_launch("mixed_gemm");
  if (splits > 1) mixed_gemm_add_splits(p, k, planes, stream);
}

template <bool kPacked>
void launch(const MixedGemmParams& p, const MixedGemmChoice& choice, void* workspace,
            Stream stream) {
  switch (choice.tile_rows) {
    case 64: return launch_tile<64, kPacked>(p, choice.splits, workspace, stream);
    case 128: return launch_tile<128, kPacked>(p, choice.splits, workspace, stream);
  }
  throw std::runtime_error("mixed_gemm: tile_rows: expected 64 or 128, got " +
                           std::to_string(choice.tile_rows));
}

}  // namespace

void mixed_gemm_sm80(const MixedGemmParams& params, const MixedGemmChoice& choice, void* workspace,
                     Stream stream) {
  const MixedGemmParams p =
      pad_rows(params, choice.splits, sm80_row_units(params.q_lo_packed), workspace, stream);
  const auto run = p.q_lo_packed ? launch<true> : launch<false>;
  run(p, choice, workspace, stream);
}

}  // namespace resq::cuda
