#include <cuda_runtime.h>

#include "cuda/pdl.cuh"
#include "ops/mixed_gemm/epilogue.cuh"
#include "ops/mixed_gemm/split_k.cuh"

namespace resq::cuda {
namespace {

constexpr int kThreads = 128;

__device__ void add_group(const int32_t* partial, SumGroup& sum) {
  const SumGroup part = load_sums(partial);
#pragma unroll
  for (int j = 0; j < kGroupN; ++j) sum.sum[j] += part.sum[j];
}

// A thread finishes eight neighbouring outputs of a row.
__global__ void __launch_bounds__(kThreads)
    mixed_gemm_reduce_split_k_kernel(const __grid_constant__ MixedGemmParams p,
                                     const SplitK split_k, const Partials partials,
                                     unsigned blocks_per_row) {
  const int64_t m = blockIdx.x / blocks_per_row;
  const int64_t n = (int64_t{blockIdx.x % blocks_per_row} * kThreads + threadIdx.x) * kGroupN;
  prefetch_terms_of_n(p, n);
  pdl_wait();
  pdl_trigger();
  if (n >= p.n) return;
  SumGroup sum_lo = {}, sum_hi = {};
  for (int split = 0; split < split_k.splits; ++split) {
    if (split_k.has_lo(split)) add_group(partials.lo(split, m, n), sum_lo);
    if (split_k.has_hi(split)) add_group(partials.hi(split, m, n), sum_hi);
  }
  TermsOfN of_n[kGroupN];
#pragma unroll
  for (int j = 0; j < kGroupN; ++j) of_n[j] = load_terms_of_n(p, n + j);
  const PresentTerms terms = present_terms(p);
  const TermsOfM of_m = load_terms_of_m(p, m);
  float y[kGroupN];
#pragma unroll
  for (int j = 0; j < kGroupN; ++j) {
    y[j] = output_value(sum_lo.sum[j], sum_hi.sum[j], of_m, of_n[j], terms);
  }
  store_group(p, m, n, y);
}

}  // namespace

void reduce_split_k(const MixedGemmParams& p, const SplitK& split_k, const Partials& partials,
                    Stream stream) {
  const int64_t blocks_per_row = ceil_div(p.n, kThreads * kGroupN);
  const auto grid = static_cast<unsigned>(blocks_per_row * p.m);
  launch_pdl("mixed_gemm", mixed_gemm_reduce_split_k_kernel, {.x = grid, .threads = kThreads},
             stream, p, split_k, partials, static_cast<unsigned>(blocks_per_row));
}

}  // namespace resq::cuda
