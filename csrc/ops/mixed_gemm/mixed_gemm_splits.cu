#include <cuda_runtime.h>

#include "cuda/pdl.cuh"
#include "ops/mixed_gemm/mixed_gemm_epilogue.cuh"
#include "ops/mixed_gemm/mixed_gemm_splits.cuh"

namespace resq::cuda {
namespace {

constexpr int kThreads = 128;

__device__ void add_group(const int32_t* plane, SumGroup& sum) {
  const SumGroup part = load_sums(plane);
#pragma unroll
  for (int j = 0; j < kOutputGroup; ++j) sum.sum[j] += part.sum[j];
}

// A thread adds eight columns of one row.
__global__ void __launch_bounds__(kThreads)
    mixed_gemm_add_splits_kernel(const __grid_constant__ MixedGemmParams p, const SplitK k,
                                 const SplitPlanes planes, unsigned blocks_per_row) {
  pdl_wait();
  pdl_trigger();
  const int64_t m = blockIdx.x / blocks_per_row;
  const int64_t n = (int64_t{blockIdx.x % blocks_per_row} * kThreads + threadIdx.x) * kOutputGroup;
  if (n >= p.n) return;
  SumGroup sum_lo = {}, sum_hi = {};
  for (int split = 0; split < k.splits; ++split) {
    if (k.has_lo(split)) add_group(planes.lo(split, m, n), sum_lo);
    if (k.has_hi(split)) add_group(planes.hi(split, m, n), sum_hi);
  }
  OutputColumn columns[kOutputGroup];
#pragma unroll
  for (int j = 0; j < kOutputGroup; ++j) columns[j] = load_output_column(p, n + j);
  const OutputTerms terms = output_terms(p);
  const OutputRow row = load_output_row(p, m);
  float y[kOutputGroup];
#pragma unroll
  for (int j = 0; j < kOutputGroup; ++j) {
    y[j] = output_value(sum_lo.sum[j], sum_hi.sum[j], row, columns[j], terms);
  }
  store_output_group(p, m, n, y);
}

}  // namespace

void mixed_gemm_add_splits(const MixedGemmParams& p, const SplitK& k, const SplitPlanes& planes,
                           Stream stream) {
  const int64_t blocks_per_row = ceil_div(p.n, kThreads * kOutputGroup);
  const auto grid = static_cast<unsigned>(blocks_per_row * p.rows);
  launch_pdl(mixed_gemm_add_splits_kernel, grid, kThreads, 0, stream, p, k, planes,
             static_cast<unsigned>(blocks_per_row));
  check_launch("mixed_gemm");
}

}  // namespace resq::cuda
