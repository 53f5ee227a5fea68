// Bytes of a packed weight on the CPU (docs/formats.md section 3.2): sizes, and the place of each
// code. N counts rows of the weight, K what is summed over (k_lo, k_hi: of each part).
#pragma once

#include "core/host_device.h"

namespace resq {

// N of a block and K of a group. 32 of N x 4 codes are two 64-byte vectors, which feed the two
// registers along N of a prefill tile; 8 of K are what one byte of nibbles spans.
inline constexpr int64_t kPackedBlockN = 32;
inline constexpr int64_t kPackedGroupK = 8;
inline constexpr int64_t kPackedWordBytes = 4;  // adjacent codes of one n

// Stored codes are unsigned: code + 8 in a nibble, code + 128 in a byte.
inline constexpr int kPackedOffsetLo = 8;
inline constexpr int kPackedOffsetHi = 128;

RESQ_HOST_DEVICE constexpr int64_t packed_k(int64_t k) { return align_up(k, kPackedGroupK); }

RESQ_HOST_DEVICE constexpr int64_t packed_blocks(int64_t n) { return ceil_div(n, kPackedBlockN); }

// Bytes of the low part of a block, which come first, and of a whole block.
RESQ_HOST_DEVICE constexpr int64_t packed_block_lo_bytes(int64_t k_lo) {
  return packed_k(k_lo) / 2 * kPackedBlockN;
}
RESQ_HOST_DEVICE constexpr int64_t packed_block_bytes(int64_t k_lo, int64_t k_hi) {
  return packed_block_lo_bytes(k_lo) + packed_k(k_hi) * kPackedBlockN;
}

RESQ_HOST_DEVICE constexpr int64_t packed_weight_bytes(int64_t n, int64_t k_lo, int64_t k_hi) {
  return packed_blocks(n) * packed_block_bytes(k_lo, k_hi);
}

// Inside a block (n in 0..31): the byte of low code (n, k). Of eight neighbours in K, the first
// four are low nibbles and the last four the high nibbles of the same bytes.
RESQ_HOST_DEVICE constexpr int64_t packed_lo_byte(int64_t n, int64_t k) {
  return k / kPackedGroupK * kPackedWordBytes * kPackedBlockN + n * kPackedWordBytes +
         k % kPackedWordBytes;
}
RESQ_HOST_DEVICE constexpr bool packed_lo_is_high_nibble(int64_t k) {
  return k % kPackedGroupK >= kPackedWordBytes;
}

// The four bytes of the group's eight low codes of one n, from their canonical nibbles in order
// (two's complement), and back. Signs of nibbles flip instead of adding the offset.
RESQ_HOST_DEVICE constexpr uint32_t packed_lo_word(uint32_t nibbles) {
  uint32_t halves[2] = {nibbles & 0xffff, nibbles >> 16};
  for (uint32_t& half : halves) {
    half = (half | half << 8) & 0x00ff00ff;
    half = (half | half << 4) & 0x0f0f0f0f;
  }
  return (halves[0] | halves[1] << 4) ^ 0x88888888;
}
RESQ_HOST_DEVICE constexpr uint32_t unpacked_lo_word(uint32_t word) {
  word ^= 0x88888888;
  uint32_t halves[2] = {word & 0x0f0f0f0f, word >> 4 & 0x0f0f0f0f};
  for (uint32_t& half : halves) {
    half = (half | half >> 4) & 0x00ff00ff;
    half = (half | half >> 8) & 0xffff;
  }
  return halves[0] | halves[1] << 16;
}

// The same for four high codes; its own inverse.
RESQ_HOST_DEVICE constexpr uint32_t packed_hi_word(uint32_t codes) { return codes ^ 0x80808080; }

// Inside a block: the byte of high code (n, k).
RESQ_HOST_DEVICE constexpr int64_t packed_hi_byte(int64_t k_lo, int64_t n, int64_t k) {
  return packed_block_lo_bytes(k_lo) + k / kPackedWordBytes * kPackedWordBytes * kPackedBlockN +
         n * kPackedWordBytes + k % kPackedWordBytes;
}

}  // namespace resq
