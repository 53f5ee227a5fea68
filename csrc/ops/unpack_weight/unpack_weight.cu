// A thread writes one byte of the canonical codes: two low codes, or one high code.
#include <cuda_runtime.h>

#include "core/int4.h"
#include "ops/unpack_weight/unpack_weight.h"

namespace resq::cuda {
namespace {

constexpr int kThreads = 256;

template <CudaLayout kLayout>
__device__ int8_t lo_code(const uint8_t* block, int64_t n, int64_t k) {
  const NibblePlace place = cuda_lo_place(kLayout, n, k);
  return place.high ? unpack_int4_odd(block[place.byte]) : unpack_int4_even(block[place.byte]);
}

template <CudaLayout kLayout>
__global__ void __launch_bounds__(kThreads)
    unpack_weight_kernel(const __grid_constant__ UnpackWeightParams p) {
  const int64_t lo_bytes = p.k_lo / 2, row_bytes = lo_bytes + p.k_hi;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < p.n * row_bytes;
       i += stride) {
    const int64_t n = i / row_bytes, at = i % row_bytes, in_block = n % kCudaBlockN;
    const uint8_t* block = p.packed_weight + n / kCudaBlockN * cuda_block_bytes(p.k_lo, p.k_hi);
    if (at < lo_bytes) {
      p.codes_lo[n * lo_bytes + at] = pack_int4(lo_code<kLayout>(block, in_block, 2 * at),
                                                lo_code<kLayout>(block, in_block, 2 * at + 1));
    } else {
      const int64_t k = at - lo_bytes;
      p.codes_hi[n * p.k_hi + k] = static_cast<int8_t>(block[cuda_hi_byte(p.k_lo, in_block, k)]);
    }
  }
}

}  // namespace

void unpack_weight(const UnpackWeightParams& p, CudaLayout layout, Stream stream) {
  constexpr int64_t kMaxBlocks = 1 << 20;
  const int64_t bytes = p.n * (p.k_lo / 2 + p.k_hi);
  if (bytes == 0) return;
  const int64_t needed = ceil_div(bytes, kThreads);
  const auto grid = static_cast<unsigned>(needed < kMaxBlocks ? needed : kMaxBlocks);
  const auto kernel = layout == CudaLayout::kMma ? unpack_weight_kernel<CudaLayout::kMma>
                                                 : unpack_weight_kernel<CudaLayout::kWgmma>;
  launch_kernel("unpack_weight", kernel, {.x = grid, .threads = kThreads}, stream, p);
}

}  // namespace resq::cuda
