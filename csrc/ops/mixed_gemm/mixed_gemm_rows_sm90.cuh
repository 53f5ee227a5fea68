// Activation rows that a tensor map cannot describe, written into the workspace as int8 rows of a
// multiple of 16 bytes: packed nibbles become a byte each, other rows are moved.
#pragma once

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

// `source` has source_bytes a row: packed codes (kPacked) or bytes. One thread writes 16 columns;
// what lies beyond a row becomes zero. Rows that start anywhere are read by bytes.
template <bool kPacked>
__global__ void __launch_bounds__(kRowsThreads)
    expand_rows(const uint8_t* source, int64_t source_bytes, uint8_t* out, int64_t stride,
                int64_t pieces) {
  const int64_t piece = int64_t{blockIdx.x} * kRowsThreads + threadIdx.x;
  if (piece >= pieces) return;
  const int64_t row_pieces = stride / kSm90RowBytes;
  const int64_t row = piece / row_pieces, first = piece % row_pieces;
  constexpr int kBytes = kPacked ? 8 : 16;  // of the source
  const uint8_t* bytes = source + row * source_bytes;
  uint32_t words[kBytes / 4] = {};
  if (kPacked && source_bytes % kBytes == 0) {  // pieces are whole and aligned
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
  uint4 codes;
  if constexpr (kPacked) {
    const uint2 low = unpack_codes(words[0]), high = unpack_codes(words[1]);
    codes = {low.x, low.y, high.x, high.y};
  } else {
    codes = {words[0], words[1], words[2], words[3]};
  }
  reinterpret_cast<uint4*>(out + row * stride)[first] = codes;
}

}  // namespace resq::cuda
