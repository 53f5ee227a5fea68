// silu_mul_hadamard_quantize: a block computes a row of products, transforms it in shared memory
// and quantizes it: gate_up is read once and only codes are written. docs/notes/0011.
#include "cuda/hadamard_block.cuh"
#include "cuda/row_quantize.cuh"
#include "cuda/silu.cuh"
#include "ops/silu_mul_hadamard_quantize/silu_mul_hadamard_quantize.h"

namespace resq::cuda {
namespace {

// Eight products of a row from column `column` on, 0 beyond the row.
__device__ inline void load_products(const SiluMulHadamardQuantizeParams& p, int64_t row,
                                     int column, bool aligned, float (&x)[8]) {
  const int n = static_cast<int>(p.n);
  const bool inside = column < n;
  const int64_t gate_at = inside ? row * 2 * n + column : 0;
  const int count = inside ? n - column : 0;
  float gate[8], up[8];
  load_eight(p.gate_up, p.type, gate_at, count, inside && aligned, gate);
  load_eight(p.gate_up, p.type, gate_at + (inside ? n : 0), count, inside && aligned, up);
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = __fmul_rn(__fmul_rn(silu(gate[i]), up[i]), p.scale);
}

// Quantizes the row whose runs for_each(use) passes to use(run, values). kAlways: both parts
// consist of whole runs.
template <bool kAlways, int kWarps, class ForEach>
__device__ inline void quantize_runs(const MixedRows& out, int64_t row, ForEach for_each,
                                     RangeExchange<kWarps>& exchange) {
  const int k_lo = static_cast<int>(out.k_lo);
  const bool aligned = kAlways || (k_lo % 8 == 0 && out.k_hi % 8 == 0);
  Range ranges[2];
  for_each([&](int run, const float (&y)[8]) {
    if (aligned) {
      add_to_ranges<true>(ranges, k_lo, 8 * run, y);
    } else {
      add_to_ranges<false>(ranges, k_lo, 8 * run, y);
    }
  });
  reduce_ranges(ranges, exchange);
  const RowCodes codes(ranges, out, row);
  for_each([&](int run, const float (&y)[8]) {
    if (aligned) {
      codes.template store<true>(8 * run, y);
    } else {
      codes.template store<false>(8 * run, y);
    }
  });
}

template <bool kSplit, bool kTensor>
__global__ void __launch_bounds__(kHadamardThreads, kSplit || kTensor ? 1 : 2)
    silu_mul_hadamard_quantize_kernel(const __grid_constant__ SiluMulHadamardQuantizeParams p,
                                      const __grid_constant__ HadamardLayout h) {
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ RangeExchange<kHadamardWarps> exchange;
  const auto quantize = [&](unsigned row) {
    const TransformedRow<kSplit, kTensor> result(shared, h, [&](int run, float (&x)[8]) {
      load_products(p, row, 8 * run, p.n % 8 == 0, x);
    });
    quantize_runs<kSplit>(p.out, row, [&](auto use) { result.for_each(use); }, exchange);
  };
  if constexpr (kTensor) prepare_transform(shared, h);
  pdl_wait();
  pdl_trigger();
  if constexpr (kTensor) {
    for (unsigned row = blockIdx.x; row < p.rows; row += gridDim.x) quantize(row);
  } else {
    quantize(blockIdx.x);
  }
}

// Without a transform the products are computed twice rather than kept.
__global__ void __launch_bounds__(kHadamardThreads)
    silu_mul_quantize_kernel(const __grid_constant__ SiluMulHadamardQuantizeParams p,
                             bool aligned) {
  __shared__ RangeExchange<kHadamardWarps> exchange;
  pdl_wait();
  pdl_trigger();
  quantize_runs<false>(
      p.out, blockIdx.x,
      [&](auto use) {
        for (int run = threadIdx.x; 8 * run < p.n; run += kHadamardThreads) {
          float x[8];
          load_products(p, blockIdx.x, 8 * run, aligned, x);
          use(run, x);
        }
      },
      exchange);
}

}  // namespace

void silu_mul_hadamard_quantize(const SiluMulHadamardQuantizeParams& p,
                                const HadamardLayout& layout, const Device& device, Stream stream) {
  const bool tensor = layout.tensor_factors > 0;
  const auto kernel = layout.split ? (tensor ? silu_mul_hadamard_quantize_kernel<true, true>
                                             : silu_mul_hadamard_quantize_kernel<true, false>)
                                   : (tensor ? silu_mul_hadamard_quantize_kernel<false, true>
                                             : silu_mul_hadamard_quantize_kernel<false, false>);
  launch_hadamard("silu_mul_hadamard_quantize", kernel, layout, p.rows, device, stream, p, layout);
}

void silu_mul_quantize(const SiluMulHadamardQuantizeParams& p, Stream stream) {
  launch_pdl("silu_mul_hadamard_quantize", silu_mul_quantize_kernel,
             {.x = static_cast<unsigned>(p.rows), .threads = kHadamardThreads}, stream, p,
             p.n % 8 == 0);
}

}  // namespace resq::cuda
