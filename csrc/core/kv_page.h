// Bytes of a page of the 4-bit KV cache (docs/formats.md section 5): where each code lies inside a
// tile, and how the range of a row part becomes a stored (scale, offset) pair and codes.
//
// A tile is nine 32-bit words for each of 32 lanes, in the order in which mma.m16n8k16 wants its A
// operand: (word & 0x000f000f), (word & 0x00f000f0) and both again after a shift by 8 are four
// registers. A = K with tokens as rows, A = V^T with dims as rows. No byte holds two tokens, so
// that appending a token writes bytes and never reads any.
#pragma once

#include <cmath>

#include "core/float16.h"
#include "core/host_device.h"

namespace resq {

inline constexpr int kKvTileBytes = 1152;      // 9 words x 32 lanes x 4 bytes
inline constexpr int kKvMetadataBytes = 16;    // four float16 pairs: K low, K high, V low, V high
inline constexpr int kKvLowLevels = 15;        // largest 4-bit code
inline constexpr int kKvHighLevels = 255;      // largest 8-bit code
inline constexpr float kKvLargest = 65504.0f;  // largest float16; larger values saturate

// Stored scale / scale. 4 is the largest power of two with which a 4-bit row of any finite values
// keeps a finite scale, (2 x 65504 / 15) x 4 < 65504; it moves the float16 subnormals, in which an
// 8-bit scale loses bits, from ranges below 0.016 to ranges below 0.004.
inline constexpr float kKvScaleFactor = 4.0f;

// The sizes that follow from the head dimension.
template <int kHeadDim>
struct KvLayout {
  static_assert(kHeadDim == 64 || kHeadDim == 128);
  static constexpr int kLowDims = kHeadDim / 8 * 7;
  static constexpr int kHighDims = kHeadDim / 8;
  static constexpr int kTileTokens = 2048 / kHeadDim;
  static constexpr int kRowBytes = kKvTileBytes / kTileTokens;  // of K or of V, per token
  static constexpr int kTokenBytes = 2 * kRowBytes + kKvMetadataBytes;
};

// Offsets inside a (page, head) chunk: K tiles, then metadata, then V tiles.
template <int kHeadDim>
RESQ_HOST_DEVICE constexpr int64_t kv_k_tile_byte(int64_t token) {
  return token / KvLayout<kHeadDim>::kTileTokens * kKvTileBytes;
}
template <int kHeadDim>
RESQ_HOST_DEVICE constexpr int64_t kv_metadata_byte(int64_t page_size, int64_t token) {
  return page_size * KvLayout<kHeadDim>::kRowBytes + token * kKvMetadataBytes;
}
template <int kHeadDim>
RESQ_HOST_DEVICE constexpr int64_t kv_v_tile_byte(int64_t page_size, int64_t token) {
  return kv_metadata_byte<kHeadDim>(page_size, page_size) + kv_k_tile_byte<kHeadDim>(token);
}

// Words 0-3 of all lanes, then words 4-7, then word 8: a lane reads 16 + 16 + 4 bytes.
RESQ_HOST_DEVICE constexpr int kv_word_byte(int word, int lane) {
  return word < 8 ? word / 4 * 512 + lane * 16 + word % 4 * 4 : 1024 + lane * 4;
}

// The place of a code inside its tile: a whole byte, or the nibble at bit `shift` of it.
struct KvPlace {
  int byte;
  int shift;
  bool wide;
};

RESQ_HOST_DEVICE constexpr KvPlace kv_nibble(int word, int lane, int nibble) {
  return {kv_word_byte(word, lane) + nibble / 2, nibble % 2 * 4, false};
}

// The place of a 4-bit code in the 16 x 16 block `block` (of low dims) of 16-token group `group`.
// `half` selects the half of the 16 tokens, `part` the half of the 16 dims, `odd` is the parity
// along the contraction: nibbles n and n + 4 of a word are the two halves of register n.
template <int kHeadDim>
RESQ_HOST_DEVICE constexpr KvPlace kv_low_place(int group, int half, int block, int part, int odd,
                                                int lane) {
  constexpr int kFullWords = kHeadDim == 128 ? 3 : 1;  // per half; the last block's word is shared
  const int first = group * 3;
  if (block < 2 * kFullWords) {
    return kv_nibble(first + half * kFullWords + block / 2, lane, block % 2 * 2 + part + 4 * odd);
  }
  return kv_nibble(first + 2 * kFullWords, lane, 2 * half + part + 4 * odd);
}

// The place of dim `dim` of token `token` (both inside the tile) in a K tile.
template <int kHeadDim>
RESQ_HOST_DEVICE constexpr KvPlace kv_k_place(int token, int dim) {
  constexpr int kLow = KvLayout<kHeadDim>::kLowDims;
  const int group = token / 16, half = token / 8 % 2, odd = dim % 2;
  const int lane = token % 8 * 4 + dim % 8 / 2;
  if (dim >= kLow) {
    if (kHeadDim == 128) return {kv_word_byte(7 + half, lane) + dim % 16 / 8 * 2 + odd, 0, true};
    return {kv_word_byte(7 + group, lane) + 2 * half + odd, 0, true};
  }
  if (dim < kLow / 16 * 16) {
    return kv_low_place<kHeadDim>(group, half, dim / 16, dim % 16 / 8, odd, lane);
  }
  // Head dim 64: dims 48..55 are one m16n8k8 step, whose register has two codes of a token.
  return {kv_word_byte(6, lane) + 2 * group + half, 4 * odd, false};
}

// The place of dim `dim` of token `token` (both inside the tile) in a V tile.
template <int kHeadDim>
RESQ_HOST_DEVICE constexpr KvPlace kv_v_place(int token, int dim) {
  constexpr int kLow = KvLayout<kHeadDim>::kLowDims;
  const int group = token / 16, half = token / 8 % 2, odd = token % 2;
  const int lane = dim % 8 * 4 + token % 8 / 2;
  if (dim >= kLow) {
    if (kHeadDim == 128) return {kv_word_byte(7 + half, lane) + dim % 16 / 8 * 2 + odd, 0, true};
    return {kv_word_byte(7 + group, lane) + 2 * half + odd, 0, true};
  }
  if (dim < kLow / 16 * 16) {
    return kv_low_place<kHeadDim>(group, half, dim / 16, dim % 16 / 8, odd, lane);
  }
  // Head dim 64: dims 48..55 fill a whole m16 operand in which rows g and g + 8 are dims 48 + g % 4
  // and 52 + g % 4, of tokens 0..15 for g < 4 and 16..31 otherwise: two codes of a token a byte.
  const int row_lane = (dim % 4 + 4 * group) * 4 + token % 8 / 2;
  return kv_nibble(6, row_lane, 2 * half + dim % 8 / 4 + 4 * odd);
}

// What kv_range computes with. A device has instructions of its own (cuda/kv_arithmetic.cuh).
struct KvArithmetic {
  static Half half(float value) { return to_half(value); }
  static float value(Half half) { return to_float(half); }
  static float share(float width, int levels) { return width / static_cast<float>(levels); }
  static float inverse(float scale) { return 1.0f / scale; }
};

// Largest float16 <= value and smallest float16 >= value, for finite |value| <= 65504.
template <class Arithmetic = KvArithmetic>
RESQ_HOST_DEVICE inline Half half_below(float value) {
  Half half = Arithmetic::half(value);
  if (Arithmetic::value(half) > value) {
    // One step down: away from zero for a negative number, towards it for a positive one.
    half.bits = static_cast<uint16_t>(half.bits & 0x8000 ? half.bits + 1 : half.bits - 1);
  }
  return half;
}
template <class Arithmetic = KvArithmetic>
RESQ_HOST_DEVICE inline Half half_above(float value) {
  Half half = half_below<Arithmetic>(-value);
  half.bits ^= 0x8000;
  return half;
}

// A row part's stored pair, and what its codes are computed with: x ~ scale * code + offset.
struct KvRange {
  Half stored_scale;  // kKvScaleFactor * scale
  Half stored_offset;
  float offset;
  float inv_scale;  // 0 where scale is 0
};

inline constexpr KvRange kKvNanRange = {{0x7e00}, {0x7e00}, 0.0f, 0.0f};

// `min` and `max` are the part's extremes, both finite. The offset is rounded down and the scale
// up, so that the codes cover every value of the part: 2 |x - (scale * code + offset)| <= scale for
// every |x| <= 65504, however large the part's mean is relative to its range. Values beyond 65504
// saturate.
template <class Arithmetic = KvArithmetic>
RESQ_HOST_DEVICE inline KvRange kv_range(float min, float max, int levels) {
  min = min < -kKvLargest ? -kKvLargest : min > kKvLargest ? kKvLargest : min;
  max = max < -kKvLargest ? -kKvLargest : max > kKvLargest ? kKvLargest : max;
  KvRange range;
  // Adding 0 turns -0 into 0: which of the two is the extreme of a row of zeros depends on the
  // order of the reduction.
  range.stored_offset = half_below<Arithmetic>(min + 0.0f);
  range.offset = Arithmetic::value(range.stored_offset);
  range.stored_scale =
      half_above<Arithmetic>(Arithmetic::share(max + 0.0f - range.offset, levels) * kKvScaleFactor);
  const float scale = Arithmetic::value(range.stored_scale) / kKvScaleFactor;
  range.inv_scale = scale > 0.0f ? Arithmetic::inverse(scale) : 0.0f;
  return range;
}

// round((x - offset) / scale), half to even, clamped to [0, levels]; 0 for NaN.
RESQ_HOST_DEVICE inline uint8_t kv_code(float x, const KvRange& range, int levels) {
  const float code = std::fmax((x - range.offset) * range.inv_scale, 0.0f);
  // The sum with 1.5 x 2^23 is rounded to an integer, which its low mantissa bits then hold.
  const float rounded = std::fmin(code, static_cast<float>(levels)) + 0x1.8p23f;
  return static_cast<uint8_t>(std::bit_cast<uint32_t>(rounded));
}

}  // namespace resq
