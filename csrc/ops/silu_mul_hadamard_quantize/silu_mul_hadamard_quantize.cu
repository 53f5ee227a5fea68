// silu_mul_hadamard_quantize: a block computes a row of products, transforms it in shared memory
// and quantizes it: gate_up is read once and only codes are written. docs/notes/0011.
#include "cuda/hadamard_block.cuh"
#include "cuda/with_type.h"
#include "ops/silu_mul_hadamard_quantize/products.cuh"

namespace resq::cuda {
namespace {

template <class T, bool kSplit, bool kTensor>
__global__ void __launch_bounds__(kHadamardThreads, kSplit || kTensor ? 1 : 2)
    silu_mul_hadamard_quantize_kernel(const __grid_constant__ SiluMulHadamardQuantizeParams p,
                                      const __grid_constant__ HadamardLayout h) {
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ RangeExchange<kHadamardWarps> exchange;
  const auto quantize = [&](unsigned row) {
    TransformedRow<kSplit, kTensor> result(shared, h);
    if (kSplit || p.n % 8 == 0) {
      result.load(Products<T, true>(p, row));
    } else {
      result.load(Products<T, false>(p, row));
    }
    result.transform();
    quantize_runs<kSplit>(
        p.out, row, [&](auto use) { result.for_each(use); },
        [&](Range(&ranges)[2]) { reduce_ranges(ranges, exchange); }, threadIdx.x == 0);
  };
  if constexpr (kTensor) prepare_transform(shared, h);
  pdl_trigger();
  pdl_wait();
  if constexpr (kTensor) {
    for (unsigned row = blockIdx.x; row < p.rows; row += gridDim.x) quantize(row);
  } else {
    quantize(blockIdx.x);
  }
}

}  // namespace

void silu_mul_hadamard_quantize(const SiluMulHadamardQuantizeParams& p,
                                const HadamardLayout& layout, const Device& device, Stream stream) {
  with_type(p.type, [&](auto number) {
    using T = decltype(number);
    // The instances with tensor cores take any row, but lose the second block per multiprocessor.
    // float32, in which models are only compared, has no others.
    constexpr bool kTensor = sizeof(T) == 4;
    const bool tensor = layout.tensor_factors > 0;
    const auto kernel = layout.split
                            ? (tensor ? silu_mul_hadamard_quantize_kernel<T, true, true>
                                      : silu_mul_hadamard_quantize_kernel<T, true, kTensor>)
                            : (tensor ? silu_mul_hadamard_quantize_kernel<T, false, true>
                                      : silu_mul_hadamard_quantize_kernel<T, false, kTensor>);
    launch_hadamard("silu_mul_hadamard_quantize", kernel, layout, p.rows, device, stream, p,
                    layout);
  });
}

}  // namespace resq::cuda
