// pack_weight: canonical codes -> the CPU layout of docs/formats.md section 3.2, one block of 32
// rows at a time. Rows and columns of padding hold code 0.
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
  const int64_t first = block * kPackedBlockRows;
  uint8_t* out = p.packed_weight + block * packed_block_bytes(p.k_lo, p.k_hi);
  for (int64_t column = 0; column < packed_columns(p.k_lo); column += 2) {
    const bool high_nibble = packed_lo_is_high_nibble(column);
    for (int64_t row = 0; row < kPackedBlockRows; ++row) {
      const bool inside = first + row < p.n && column < p.k_lo;
      const uint8_t pair = inside ? p.codes_lo[((first + row) * p.k_lo + column) / 2] : uint8_t{0};
      const int even = unpack_int4_even(pair) + kPackedOffsetLo;
      const int odd = unpack_int4_odd(pair) + kPackedOffsetLo;
      uint8_t* bytes = out + packed_lo_byte(row, column);
      // Columns ascend, so the low nibbles of a group set a byte before the high ones join it.
      bytes[0] = static_cast<uint8_t>(high_nibble ? bytes[0] | even << 4 : even);
      bytes[1] = static_cast<uint8_t>(high_nibble ? bytes[1] | odd << 4 : odd);
    }
  }
  for (int64_t column = 0; column < packed_columns(p.k_hi); ++column) {
    for (int64_t row = 0; row < kPackedBlockRows; ++row) {
      const bool inside = first + row < p.n && column < p.k_hi;
      const int code = inside ? p.codes_hi[(first + row) * p.k_hi + column] : 0;
      out[packed_hi_byte(p.k_lo, row, column)] = static_cast<uint8_t>(code + kPackedOffsetHi);
    }
  }
}

namespace cuda {

// Packs into a layout of docs/formats.md section 3.3. Device pointers; packed_weight has
// cuda_packed_weight_bytes(n, k_lo, k_hi), aligned to 16 bytes.
void pack_weight(const PackWeightParams& p, CudaLayout layout, Stream stream);

}  // namespace cuda

}  // namespace resq
