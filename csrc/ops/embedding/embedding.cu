// One block per row. 32 neighbouring columns of a row occupy 64 bytes of the layout, so that a
// warp's loads are two sectors; its stores are contiguous.
#include <cuda_runtime.h>

#include "core/int4.h"
#include "cuda/numbers.cuh"
#include "ops/embedding/embedding.h"

namespace resq::cuda {
namespace {

constexpr int kThreads = 256;

template <CudaLayout kLayout>
__global__ void __launch_bounds__(kThreads)
    embedding_kernel(const __grid_constant__ EmbeddingParams p) {
  const int64_t id = p.ids[blockIdx.x];
  if (id < 0 || id >= p.n) __trap();
  const int64_t n = id % kCudaBlockN;
  const uint8_t* block = p.packed_weight + id / kCudaBlockN * cuda_block_bytes(p.k_lo, p.k_hi);
  const float scale_lo = p.weight_scale[2 * id], scale_hi = p.weight_scale[2 * id + 1];
  for (int64_t k = threadIdx.x; k < p.columns(); k += kThreads) {
    float value;
    if (k < p.k_lo) {
      const NibblePlace place = cuda_lo_place(kLayout, n, k);
      const uint8_t pair = block[place.byte];
      value = scale_lo *
              static_cast<float>(place.high ? unpack_int4_odd(pair) : unpack_int4_even(pair));
    } else {
      const uint8_t code = block[cuda_hi_byte(p.k_lo, n, k - p.k_lo)];
      value = scale_hi * static_cast<float>(static_cast<int8_t>(code));
    }
    store_number(p.y, p.type, blockIdx.x * p.columns() + k, value);
  }
}

}  // namespace

void embedding(const EmbeddingParams& p, CudaLayout layout, Stream stream) {
  if (p.count == 0 || p.columns() == 0) return;
  const auto kernel = layout == CudaLayout::kMma ? embedding_kernel<CudaLayout::kMma>
                                                 : embedding_kernel<CudaLayout::kWgmma>;
  launch_kernel("embedding", kernel, {.x = static_cast<unsigned>(p.count), .threads = kThreads},
                stream, p);
}

}  // namespace resq::cuda
