// unpack_weight: the CPU layout of docs/formats.md section 3.2 -> canonical codes, one block of 32
// of N at a time; the exact inverse of pack_weight.
#pragma once

#include <algorithm>

#include "core/int4.h"
#include "core/packed_weight.h"
#include "core/packed_weight_cuda.h"
#include "cuda/launch.h"

namespace resq {

struct UnpackWeightParams {
  int64_t n, k_lo, k_hi;
  const uint8_t* packed_weight;  // [packed_weight_bytes(n, k_lo, k_hi)]
  uint8_t* codes_lo;             // [n, k_lo / 2], two signed 4-bit codes a byte, even column low
  int8_t* codes_hi;              // [n, k_hi]
};

inline void unpack_weight_block(const UnpackWeightParams& p, int64_t block) {
  const int64_t first_n = block * kPackedBlockN;
  const int64_t count_n = std::min(kPackedBlockN, p.n - first_n);
  const uint8_t* packed = p.packed_weight + block * packed_block_bytes(p.k_lo, p.k_hi);
  for (int64_t n = 0; n < count_n; ++n) {
    for (int64_t k = 0; k < p.k_lo; k += 2) {
      const uint8_t* bytes = packed + packed_lo_byte(n, k);
      const int shift = packed_lo_is_high_nibble(k) ? 4 : 0;
      const auto even = static_cast<int8_t>(((bytes[0] >> shift) & 15) - kPackedOffsetLo);
      const auto odd = static_cast<int8_t>(((bytes[1] >> shift) & 15) - kPackedOffsetLo);
      p.codes_lo[((first_n + n) * p.k_lo + k) / 2] = pack_int4(even, odd);
    }
    for (int64_t k = 0; k < p.k_hi; ++k) {
      const int stored = packed[packed_hi_byte(p.k_lo, n, k)];
      p.codes_hi[(first_n + n) * p.k_hi + k] = static_cast<int8_t>(stored - kPackedOffsetHi);
    }
  }
}

namespace cuda {

// Unpacks a layout of docs/formats.md section 3.3. Device pointers; packed_weight has
// cuda_packed_weight_bytes(n, k_lo, k_hi).
void unpack_weight(const UnpackWeightParams& p, CudaLayout layout, Stream stream);

}  // namespace cuda

}  // namespace resq
