// Products of the codes of one tile on the tensor cores: keys with queries, values with weights.
//
// A tile's words are already in the order of A operands (core/kv_page.h). A nibble ORed into the
// bits of 1024 (or 64, for the upper nibbles of a byte) is that number plus the code in float16,
// and one subtraction leaves code - 8 exactly. The codes are centred because tensor cores truncate
// while they add: a common bias in the sum over thousands of values would cost more than V's
// quantization error.
//
// Index letters in the kernels (registers as in cuda/mma_f16.cuh). Tokens of K, or dims of V, are
// rows of A and C; query rows, that is (query, head), are columns of B and C.
//
//   g, i   lane = 4 g + i: the lane holds rows g and g + 8 of A and C, column g of B, and columns
//          2 i and 2 i + 1 of C
//   c      number 0..3 of C: row g + 8 half, column 2 i + h, with half = c / 2 and h = c % 2
//   n      of kTiles tiles of eight query rows each
//   b      block of 16 dims of the output, a C of its own
//   r      register of an operand; w: word of a lane's part of a tile
#pragma once

#include "core/kv_page.h"
#include "cuda/mma_f16.cuh"

namespace resq::cuda::attention {

inline constexpr int kKvCentreLow = 8;     // subtracted from 4-bit codes
inline constexpr int kKvCentreHigh = 128;  // and from 8-bit codes

// (bits & mask) | number in one instruction; written with operators it compiles to two.
__device__ inline uint32_t place_codes(uint32_t bits, uint32_t mask, uint32_t number) {
  uint32_t placed;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(placed) : "r"(bits), "r"(mask), "r"(number));
  return placed;
}

// Unpacks a word into four registers: nibbles (0, 4), (1, 5), (2, 6), (3, 7), minus 8.
__device__ inline void unpack_nibbles(uint32_t word, uint32_t (&out)[4]) {
  const uint32_t next = word >> 8;
  out[0] = subtract_halves(place_codes(word, 0x000f000f, 0x64006400), 0x64086408);
  out[1] = subtract_halves(place_codes(word, 0x00f000f0, 0x54005400), 0x54805480);
  out[2] = subtract_halves(place_codes(next, 0x000f000f, 0x64006400), 0x64086408);
  out[3] = subtract_halves(place_codes(next, 0x00f000f0, 0x54005400), 0x54805480);
}

// Unpacks a word of 8-bit codes into two registers: bytes (0, 1) and (2, 3), minus 128.
__device__ inline void unpack_bytes(uint32_t word, uint32_t& first, uint32_t& second) {
  first = subtract_halves(__byte_perm(word, 0x64646464, 0x4140), 0x64806480);
  second = subtract_halves(__byte_perm(word, 0x64646464, 0x4342), 0x64806480);
}

// Unpacks the two nibbles of a byte into a register, minus 8.
__device__ inline uint32_t unpack_byte_of_nibbles(uint32_t word, int byte) {
  const uint32_t twice = __byte_perm(word, 0, byte | 0x40 | byte << 8 | 0x4000);
  return subtract_halves(place_codes(twice, 0x00f0000f, 0x54006400), 0x54806408);
}

// A lane's words of a K or V tile.
struct TileWords {
  uint32_t w[9];

  TileWords() = default;
  __device__ TileWords(const uint8_t* tile, int lane) {
    const uint4 first = *reinterpret_cast<const uint4*>(tile + kv_word_byte(0, lane));
    const uint4 second = *reinterpret_cast<const uint4*>(tile + kv_word_byte(4, lane));
    w[0] = first.x, w[1] = first.y, w[2] = first.z, w[3] = first.w;
    w[4] = second.x, w[5] = second.y, w[6] = second.z, w[7] = second.w;
    w[8] = *reinterpret_cast<const uint32_t*>(tile + kv_word_byte(8, lane));
  }
};

// B operands of eight query rows: register r holds dims 8 r + 2 i and + 1 of row g.
template <int kHeadDim>
struct QueryOperand {
  uint32_t values[kHeadDim / 8];
  uint32_t residuals[kHeadDim / 64];  // of the high dims
};

// Sums over the low and the high dims, for 16 tokens (rows) and eight query rows (columns).
struct ScoreSums {
  float low[4] = {}, high[4] = {};
};

// Multiplies 16-token group `kGroup` of a K tile by kTiles times eight query rows.
template <int kHeadDim, int kGroup, int kTiles>
__device__ inline void key_products(const TileWords& k, const QueryOperand<kHeadDim> (&q)[kTiles],
                                    ScoreSums (&sums)[kTiles]) {
  constexpr int kPairs =
      kHeadDim == 128 ? 3 : 1;  // of 16-dim blocks whose words hold one token row
  constexpr int kFirst = 3 * kGroup, kLast = kFirst + 2 * kPairs;
  const auto multiply = [&](uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, int block) {
    const uint32_t a[4] = {a0, a1, a2, a3};
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      mma_16816(sums[n].low, a, q[n].values[2 * block], q[n].values[2 * block + 1]);
    }
  };
  uint32_t upper[4], lower[4];  // token rows g and g + 8
#pragma unroll
  for (int pair = 0; pair < kPairs; ++pair) {
    unpack_nibbles(k.w[kFirst + pair], upper);
    unpack_nibbles(k.w[kFirst + kPairs + pair], lower);
    multiply(upper[0], lower[0], upper[1], lower[1], 2 * pair);
    multiply(upper[2], lower[2], upper[3], lower[3], 2 * pair + 1);
  }
  unpack_nibbles(k.w[kLast], upper);
  multiply(upper[0], upper[2], upper[1], upper[3], 2 * kPairs);

  uint32_t a[4];
  if constexpr (kHeadDim == 128) {
    unpack_bytes(k.w[7], a[0], a[2]);
    unpack_bytes(k.w[8], a[1], a[3]);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      mma_16816(sums[n].high, a, q[n].values[14], q[n].values[15]);
      mma_16816(sums[n].high, a, q[n].residuals[0], q[n].residuals[1]);
    }
  } else {
    a[0] = unpack_byte_of_nibbles(k.w[6], 2 * kGroup);
    a[1] = unpack_byte_of_nibbles(k.w[6], 2 * kGroup + 1);
    unpack_bytes(k.w[7 + kGroup], a[2], a[3]);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      mma_1688(sums[n].low, a[0], a[1], q[n].values[6]);
      mma_1688(sums[n].high, a[2], a[3], q[n].values[7]);
      mma_1688(sums[n].high, a[2], a[3], q[n].residuals[0]);
    }
  }
}

// B operands of the weights of 16 tokens for eight query rows. The high dims have 8-bit codes, so
// what float16 loses of their weights is a second operand.
struct WeightOperand {
  uint32_t low[2], high[2], high_residuals[2];
};

// Sums for dims (rows) and eight query rows (columns). Head dim 128: block b holds dims 16 b on.
// Head dim 64: blocks 0..2 the same; dims 48 + g % 4 and 52 + g % 4 are the sum of rows g < 4 of
// block 3 and rows g >= 4 of block 4 (the rest of both has no meaning); block 5 is the high dims,
// rows 0..7.
template <int kHeadDim>
struct OutputSums {
  static constexpr int kBlocks = kHeadDim == 128 ? 8 : 6;
  float blocks[kBlocks][4] = {};

  __device__ void scale(const float (&low)[2], const float (&high)[2]) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int c = 0; c < 4; ++c) blocks[b][c] *= b == kBlocks - 1 ? high[c % 2] : low[c % 2];
    }
  }
};

// Multiplies 16-token group `kGroup` of a V tile by the weights of kTiles times eight query rows,
// into softmax[n].out.
template <int kHeadDim, int kGroup, class Softmax, int kTiles>
__device__ inline void value_products(const TileWords& v, const WeightOperand (&p)[kTiles],
                                      Softmax (&softmax)[kTiles]) {
  constexpr int kPairs = kHeadDim == 128 ? 3 : 1;
  constexpr int kFirst = 3 * kGroup, kLast = kFirst + 2 * kPairs;
  const auto multiply = [&](uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, int block) {
    const uint32_t a[4] = {a0, a1, a2, a3};
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      mma_16816(softmax[n].out.blocks[block], a, p[n].low[0], p[n].low[1]);
    }
  };
  uint32_t early[4], late[4];  // tokens 0..7 and 8..15
#pragma unroll
  for (int pair = 0; pair < kPairs; ++pair) {
    unpack_nibbles(v.w[kFirst + pair], early);
    unpack_nibbles(v.w[kFirst + kPairs + pair], late);
    multiply(early[0], early[1], late[0], late[1], 2 * pair);
    multiply(early[2], early[3], late[2], late[3], 2 * pair + 1);
  }
  unpack_nibbles(v.w[kLast], early);
  multiply(early[0], early[1], early[2], early[3], 2 * kPairs);

  uint32_t a[4] = {};
  if constexpr (kHeadDim == 128) {
    unpack_bytes(v.w[7], a[0], a[1]);
    unpack_bytes(v.w[8], a[2], a[3]);
  } else {
    unpack_nibbles(v.w[6], early);
    multiply(early[0], early[1], early[2], early[3], 3 + kGroup);
    unpack_bytes(v.w[7 + kGroup], a[0], a[2]);
  }
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    float (&sums)[4] = softmax[n].out.blocks[OutputSums<kHeadDim>::kBlocks - 1];
    mma_16816(sums, a, p[n].high[0], p[n].high[1]);
    mma_16816(sums, a, p[n].high_residuals[0], p[n].high_residuals[1]);
  }
}

}  // namespace resq::cuda::attention
