// pack_weight: canonical codes -> the CPU layout of docs/formats.md section 3.2, one block of 32
// of N at a time. Padding of N and K holds code 0.
#pragma once

#include "core/int4.h"
#include "core/packed_weight.h"
#include "core/packed_weight_cuda.h"
#include "cuda/launch.h"

namespace resq {

struct PackWeightParams {
  int64_t n, k_lo, k_hi;
  const uint8_t* codes_lo;  // [n, k_lo / 2], two signed 4-bit codes a byte, even column low
  const int8_t* codes_hi;   // [n, k_hi]
  uint8_t* packed_weight;   // [packed_weight_bytes(n, k_lo, k_hi)]
};

inline void pack_weight_block(const PackWeightParams& p, int64_t block) {
  const int64_t first_n = block * kPackedBlockN;
  uint8_t* out = p.packed_weight + block * packed_block_bytes(p.k_lo, p.k_hi);
  for (int64_t k = 0; k < packed_k(p.k_lo); k += 2) {
    const bool high_nibble = packed_lo_is_high_nibble(k);
    for (int64_t n = 0; n < kPackedBlockN; ++n) {
      const bool inside = first_n + n < p.n && k < p.k_lo;
      const uint8_t pair = inside ? p.codes_lo[((first_n + n) * p.k_lo + k) / 2] : uint8_t{0};
      const int even = unpack_int4_even(pair) + kPackedOffsetLo;
      const int odd = unpack_int4_odd(pair) + kPackedOffsetLo;
      uint8_t* bytes = out + packed_lo_byte(n, k);
      // K ascends, so the low nibbles of a group set a byte before the high ones join it.
      bytes[0] = static_cast<uint8_t>(high_nibble ? bytes[0] | even << 4 : even);
      bytes[1] = static_cast<uint8_t>(high_nibble ? bytes[1] | odd << 4 : odd);
    }
  }
  for (int64_t k = 0; k < packed_k(p.k_hi); ++k) {
    for (int64_t n = 0; n < kPackedBlockN; ++n) {
      const bool inside = first_n + n < p.n && k < p.k_hi;
      const int code = inside ? p.codes_hi[(first_n + n) * p.k_hi + k] : 0;
      out[packed_hi_byte(p.k_lo, n, k)] = static_cast<uint8_t>(code + kPackedOffsetHi);
    }
  }
}

namespace cuda {

// Packs into a layout of docs/formats.md section 3.3. Device pointers; packed_weight has
// cuda_packed_weight_bytes(n, k_lo, k_hi), aligned to 16 bytes.
void pack_weight(const PackWeightParams& p, CudaLayout layout, Stream stream);

}  // namespace cuda

}  // namespace resq
