// silu_mul_hadamard_quantize: a block computes a row of products, transforms it in shared memory
// and quantizes it: gate_up is read once and only codes are written. docs/notes/0011.
#include "cuda/hadamard_block.cuh"
#include "cuda/row_quantize.cuh"
#include "cuda/silu.cuh"
#include "cuda/with_type.h"
#include "ops/silu_mul_hadamard_quantize/silu_mul_hadamard_quantize.h"

namespace resq::cuda {
namespace {

// The products of a row in runs of eight columns, 0 beyond the row. kAligned: n % 8 is 0.
template <class T, bool kAligned>
struct Products {
  struct Fetched {
    Chunk<T> gate, up;
  };
  // 32 registers. Rows that are not aligned, which no model has, are not worth the code.
  static constexpr int kAhead = !kAligned ? 1 : sizeof(T) == 2 ? 4 : 2;

  const T* gate;  // `up` follows
  int n;
  float scale;

  __device__ Products(const SiluMulHadamardQuantizeParams& p, int64_t row)
      : gate(static_cast<const T*>(p.gate_up) + row * 2 * p.n),
        n(static_cast<int>(p.n)),
        scale(p.scale) {}

  __device__ Fetched fetch(int run) const {
    const int column = 8 * run;
    if (column >= n) return {};
    return {load_chunk<kAligned>(gate + column, n - column),
            load_chunk<kAligned>(gate + n + column, n - column)};
  }

  __device__ void values(const Fetched& fetched, float (&x)[8]) const {
    float gates[8], activated[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) gates[i] = fetched.gate[i];
    silu(gates, activated);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = __fmul_rn(__fmul_rn(activated[i], fetched.up[i]), scale);
  }
};

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
    quantize_runs<kSplit>(p.out, row, [&](auto use) { result.for_each(use); }, exchange);
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

// Without a transform the products are computed twice rather than kept.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kHadamardThreads)
    silu_mul_quantize_kernel(const __grid_constant__ SiluMulHadamardQuantizeParams p) {
  __shared__ RangeExchange<kHadamardWarps> exchange;
  pdl_trigger();
  pdl_wait();
  const Products<T, kAligned> products(p, blockIdx.x);
  quantize_runs<false>(
      p.out, blockIdx.x,
      [&](auto use) {
        for (int run = threadIdx.x; 8 * run < p.n; run += kHadamardThreads) {
          float x[8];
          products.values(products.fetch(run), x);
          use(run, x);
        }
      },
      exchange);
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

void silu_mul_quantize(const SiluMulHadamardQuantizeParams& p, Stream stream) {
  with_type(p.type, [&](auto number) {
    using T = decltype(number);
    launch_pdl(
        "silu_mul_hadamard_quantize",
        p.n % 8 == 0 ? silu_mul_quantize_kernel<T, true> : silu_mul_quantize_kernel<T, false>,
        {.x = static_cast<unsigned>(p.rows), .threads = kHadamardThreads}, stream, p);
  });
}

}  // namespace resq::cuda
