// Packed activation rows as int8 rows of a multiple of 16 bytes in the workspace: wgmma and tensor
// maps know no nibbles. Rows of bytes that are not such a multiple go through pad_byte_rows.
#pragma once

#include "cuda/pdl.cuh"
#include "ops/mixed_gemm/mixed_gemm_sm90.h"

namespace resq::cuda {

inline constexpr int kRowsThreads = 256;

// Eight packed codes, the even column in the low nibble -> eight signed bytes.
__device__ inline uint2 unpack_codes(uint32_t packed) {
  const uint32_t even = packed & 0x0f0f0f0f, odd = (packed >> 4) & 0x0f0f0f0f;
  const uint32_t low = __byte_perm(even, odd, 0x5140), high = __byte_perm(even, odd, 0x7362);
  constexpr uint32_t kSign = 0x08080808;
  return {__vsub4(low ^ kSign, kSign), __vsub4(high ^ kSign, kSign)};
}

// `source` has source_bytes of packed codes a row. One thread writes 16 columns; what lies beyond a
// row becomes zero. Rows that start anywhere are read by bytes.
__global__ void __launch_bounds__(kRowsThreads)
    mixed_gemm_unpack_rows_kernel(const uint8_t* source, int64_t source_bytes, uint8_t* out,
                                  int64_t stride, unsigned blocks_per_row) {
  pdl_wait();
  pdl_trigger();
  const int64_t row = blockIdx.x / blocks_per_row;
  const int64_t first = int64_t{blockIdx.x % blocks_per_row} * kRowsThreads + threadIdx.x;
  if (first * kSm90RowBytes >= stride) return;
  constexpr int kBytes = 8;  // of the source
  const uint8_t* bytes = source + row * source_bytes;
  uint32_t words[kBytes / 4] = {};
  if (source_bytes % kBytes == 0) {  // pieces are whole and aligned
    const uint2 both = reinterpret_cast<const uint2*>(bytes)[first];
    words[0] = both.x;
    words[1] = both.y;
  } else {
#pragma unroll
    for (int i = 0; i < kBytes; ++i) {
      const int64_t at = first * kBytes + i;
      const uint32_t byte = at < source_bytes ? bytes[at] : 0;
      words[i / 4] |= byte << (8 * (i % 4));
    }
  }
  const uint2 low = unpack_codes(words[0]), high = unpack_codes(words[1]);
  reinterpret_cast<uint4*>(out + row * stride)[first] = {low.x, low.y, high.x, high.y};
}

}  // namespace resq::cuda
