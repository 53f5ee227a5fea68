// Bytes of a packed weight on the CPU (docs/formats.md section 3.2): sizes, and the place of each
// code.
#pragma once

#include "core/host_device.h"

namespace resq {

// Rows of a block and columns of a group. 32 rows x 4 codes are two 64-byte vectors, which feed the
// two column registers of a prefill tile; 8 columns are what one byte of nibbles spans.
inline constexpr int64_t kPackedBlockRows = 32;
inline constexpr int64_t kPackedGroupColumns = 8;
inline constexpr int64_t kPackedWordBytes = 4;  // codes of one row that stand side by side

// Stored codes are unsigned: code + 8 in a nibble, code + 128 in a byte.
inline constexpr int kPackedOffsetLo = 8;
inline constexpr int kPackedOffsetHi = 128;

RESQ_HOST_DEVICE constexpr int64_t packed_columns(int64_t k) {
  return align_up(k, kPackedGroupColumns);
}

RESQ_HOST_DEVICE constexpr int64_t packed_blocks(int64_t n) {
  return ceil_div(n, kPackedBlockRows);
}

// Bytes of the low part of a block, which come first, and of a whole block.
RESQ_HOST_DEVICE constexpr int64_t packed_block_lo_bytes(int64_t k_lo) {
  return packed_columns(k_lo) / 2 * kPackedBlockRows;
}
RESQ_HOST_DEVICE constexpr int64_t packed_block_bytes(int64_t k_lo, int64_t k_hi) {
  return packed_block_lo_bytes(k_lo) + packed_columns(k_hi) * kPackedBlockRows;
}

RESQ_HOST_DEVICE constexpr int64_t packed_weight_bytes(int64_t n, int64_t k_lo, int64_t k_hi) {
  return packed_blocks(n) * packed_block_bytes(k_lo, k_hi);
}

// Inside a block: the byte of low column `column` of row `row`. Columns 8 g + j (low nibble) and
// 8 g + 4 + j (high nibble) share a byte, j = 0..3.
RESQ_HOST_DEVICE constexpr int64_t packed_lo_byte(int64_t row, int64_t column) {
  return column / kPackedGroupColumns * kPackedWordBytes * kPackedBlockRows +
         row * kPackedWordBytes + column % kPackedWordBytes;
}
RESQ_HOST_DEVICE constexpr bool packed_lo_is_high_nibble(int64_t column) {
  return column % kPackedGroupColumns >= kPackedWordBytes;
}

// Inside a block: the byte of high column `column` of row `row`.
RESQ_HOST_DEVICE constexpr int64_t packed_hi_byte(int64_t k_lo, int64_t row, int64_t column) {
  return packed_block_lo_bytes(k_lo) +
         column / kPackedWordBytes * kPackedWordBytes * kPackedBlockRows + row * kPackedWordBytes +
         column % kPackedWordBytes;
}

}  // namespace resq
