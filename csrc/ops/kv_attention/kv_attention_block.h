// A block of 64 tokens of K and V as the integer products read it, and the products. Included
// inside the namespace of an instruction set.
//
// The words of a tile stay packed: a word holds four or two registers of two 4-bit codes each. The
// products mask the codes out in registers, alongside the multiplications. Unpacking into a buffer
// first was bound by its stores (32 of 32 bytes a token) and filled the first-level cache.

template <int kHeadDim>
struct BlockLayout {
  static constexpr int kLow = KvLayout<kHeadDim>::kLowDims;
  // kFull words of four registers each, then one word of two, then registers that need no
  // unpacking: the 8-bit dims, and the last eight 4-bit dims of head dim 64.
  static constexpr int kFull = kHeadDim == 128 ? 3 : 1;
  static constexpr int kDirectLow = kHeadDim == 128 ? 0 : 1;
  static constexpr int kDirectHigh = kHeadDim == 128 ? 2 : 1;
  static constexpr int kLines = kFull + 1 + kDirectLow + kDirectHigh;
  // V: the words of a pair of tokens are 8 wide; the direct registers hold the last 16 dims.
  static constexpr int kPairWords = 8 * (kFull + 1) + 16;
};

template <int kHeadDim>
struct Block {
  using Layout = BlockLayout<kHeadDim>;
  // keys[i]: lane i of K's rows. A register holds two codes, of dims (2 j, 2 j + 1) of a token.
  int32_t keys[4][Layout::kLines][kKeyBlock];
  // Pairs of tokens. A register holds the codes of both tokens for one dim.
  int32_t values[kKeyBlock / 2][Layout::kPairWords];
  float metadata[8][kKeyBlock];  // (scale, offset) of K low, K high, V low, V high
};

using EightIVec = Vectors<8>::IVec;

#if defined(RESQ_ISA_AVX512VNNI)
#include "ops/kv_attention/block_words_avx512vnni.h"
#elif defined(RESQ_ISA_AVX2)
#include "ops/kv_attention/block_words_avx2.h"
#else
#include "ops/kv_attention/block_words_scalar.h"
#endif

// The functions below store registers of eight words instead of returning them: functions that
// return 32-byte vectors would have a different ABI on the portable instruction set.

// Bytes 2 `part` and 2 `part` + 1 of each word, as two 16-bit codes.
inline void store_bytes(int32_t* out, const EightIVec& words, int part) {
  const EightIVec pair = words >> (16 * part);
  store_bits(out, (pair & 0xff) | ((pair & 0xff00) << 8));
}

// Byte `at` of each word: its low and its high nibble, as two 16-bit codes.
inline void store_byte_nibbles(int32_t* out, const EightIVec& words, int at) {
  const EightIVec byte = words >> (8 * at);
  store_bits(out, (byte & 0x0f) | ((byte & 0xf0) << 12));
}

// Nibbles n of four words (from `first` on), then nibbles n + 1 of the same words.
inline void store_tail(int32_t* out, const EightIVec& words, int n, int first) {
  const EightIVec low = (words >> (4 * n)) & 0x000f000f;
  const EightIVec high = (words >> (4 * n + 4)) & 0x000f000f;
  store_bits(out, __builtin_shuffle(low, high, EightIVec{0, 1, 2, 3, 8, 9, 10, 11} + first));
}

// The words of lanes 4 g + i, g = 0..7, of a tile.
struct LaneWords {
  EightIVec at[9];
};
inline void load_lanes(const uint8_t* tile, LaneWords (&lanes)[4]) {
  EightIVec last[4];
  load_words(tile + kv_word_byte(8, 0), 16, last);
  for (int i = 0; i < 4; ++i) {
    load_words(tile + kv_word_byte(0, i), 64, lanes[i].at);
    load_words(tile + kv_word_byte(4, i), 64, lanes[i].at + 4);
    lanes[i].at[8] = last[i];
  }
}

// Loads one K tile into columns `at` .. of the block.
template <int kHeadDim>
inline void load_key_tile(const uint8_t* tile, int64_t at, Block<kHeadDim>* block) {
  using Layout = BlockLayout<kHeadDim>;
  constexpr int kFull = Layout::kFull;
  LaneWords lanes[4];
  load_lanes(tile, lanes);
  for (int i = 0; i < 4; ++i) {
    const EightIVec* word = lanes[i].at;
    for (int group = 0; group < KvLayout<kHeadDim>::kTileTokens / 16; ++group) {
      for (int half = 0; half < 2; ++half) {
        const auto line = [&](int n) { return &block->keys[i][n][at + 16 * group + 8 * half]; };
        for (int j = 0; j < kFull; ++j) store_bits(line(j), word[3 * group + kFull * half + j]);
        store_bits(line(kFull), word[3 * group + 2 * kFull] >> (8 * half));
        if constexpr (kHeadDim == 128) {
          store_bytes(line(kFull + 1), word[7 + half], 0);
          store_bytes(line(kFull + 2), word[7 + half], 1);
        } else {
          store_byte_nibbles(line(kFull + 1), word[6], 2 * group + half);
          store_bytes(line(kFull + 2), word[7 + group], half);
        }
      }
    }
  }
}

// Loads one V tile into the pairs from token `at` on.
template <int kHeadDim>
inline void load_value_tile(const uint8_t* tile, int64_t at, Block<kHeadDim>* block) {
  using Layout = BlockLayout<kHeadDim>;
  constexpr int kFull = Layout::kFull, kDirect = 8 * (kFull + 1);
  LaneWords lanes[4];
  load_lanes(tile, lanes);
  for (int i = 0; i < 4; ++i) {
    const EightIVec* word = lanes[i].at;
    for (int group = 0; group < KvLayout<kHeadDim>::kTileTokens / 16; ++group) {
      for (int half = 0; half < 2; ++half) {
        int32_t* out = block->values[at / 2 + 8 * group + 4 * half + i];
        for (int j = 0; j < kFull; ++j) store_bits(out + 8 * j, word[3 * group + kFull * half + j]);
        store_bits(out + 8 * kFull, word[3 * group + 2 * kFull] >> (8 * half));
        if constexpr (kHeadDim == 128) {
          store_bytes(out + kDirect, word[7 + half], 0);
          store_bytes(out + kDirect + 8, word[7 + half], 1);
        } else {
          // Lanes g < 4 of word 6 belong to tokens 0..15 and g >= 4 to tokens 16..31.
          store_tail(out + kDirect, word[6], 2 * half, 4 * group);
          store_bytes(out + kDirect + 8, word[7 + group], half);
        }
      }
    }
  }
}

// The order in which key_products visits the pairs of dims: entry n is the pair (2 j, 2 j + 1).
template <int kHeadDim>
struct PairOrder {
  uint8_t pair[kHeadDim / 2] = {};

  constexpr PairOrder() {
    using Layout = BlockLayout<kHeadDim>;
    int n = 0;
    const auto add = [&](int block, int part, int i) {
      pair[n++] = static_cast<uint8_t>(8 * block + 4 * part + i);
    };
    for (int i = 0; i < 4; ++i) {
      for (int half_block = 0; half_block < 4 * Layout::kFull + 2; ++half_block) {
        add(half_block / 2, half_block % 2, i);
      }
      if (Layout::kDirectLow) add(3, 0, i);
    }
    for (int i = 0; i < 4; ++i) {
      for (int part = 2 - Layout::kDirectHigh; part < 2; ++part) add(kHeadDim / 16 - 1, part, i);
    }
  }
};
template <int kHeadDim>
inline constexpr PairOrder<kHeadDim> kPairOrder{};

// For every row r: sums[r] += its pair at x times the pairs of all columns.
template <int kRows, int kVectors>
inline void multiply(IVec (&sums)[kRows][kVectors], const int16_t* x, int64_t stride,
                     const IVec (&codes)[kVectors]) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const IVec pair = set1(load_bits<int32_t>(x + r * stride));
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sums[r][v] = dot_pairs(sums[r][v], pair, codes[v]);
  }
}

template <int kVectors>
inline void load_codes(const int32_t* line, IVec (&codes)[kVectors]) {
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) codes[v] = load_bits<IVec>(line + v * kLanes);
}

template <int kRows, int kVectors>
inline void store_sums(const IVec (&sums)[kRows][kVectors], int32_t* out, int64_t stride) {
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) store_bits(out + r * stride + v * kLanes, sums[r][v]);
  }
}

// kCount registers of a line of packed words, against as many pairs from `x` on.
template <int kCount, int kRows, int kVectors>
inline void multiply_nibbles(IVec (&sums)[kRows][kVectors], const int16_t* x, int64_t stride,
                             const int32_t* line) {
#pragma GCC unroll 4
  for (int n = 0; n < kCount; ++n) {
    IVec codes[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      codes[v] = (load_bits<IVec>(line + v * kLanes) >> (4 * n)) & 0x000f000f;
    }
    multiply(sums, x + 2 * n, stride, codes);
  }
}

// lo[r][token], hi[r][token] = q[r] . codes of the low and of the high dims, for kVectors vectors
// of tokens from `column` on. q holds 16-bit integers in the order of kPairOrder.
template <int kHeadDim, int kRows, int kVectors>
inline void key_tile_products(const int16_t* q, const Block<kHeadDim>& block, int column,
                              int32_t* lo, int32_t* hi) {
  using Layout = BlockLayout<kHeadDim>;
  IVec sums[kRows][kVectors] = {}, codes[kVectors];
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < Layout::kFull; ++j, q += 8) {
      multiply_nibbles<4>(sums, q, kHeadDim, &block.keys[i][j][column]);
    }
    multiply_nibbles<2>(sums, q, kHeadDim, &block.keys[i][Layout::kFull][column]);
    q += 4;
    if constexpr (Layout::kDirectLow > 0) {
      load_codes(&block.keys[i][Layout::kFull + 1][column], codes);
      multiply(sums, q, kHeadDim, codes);
      q += 2;
    }
  }
  store_sums(sums, lo + column, kKeyBlock);
  IVec high[kRows][kVectors] = {};
  for (int i = 0; i < 4; ++i) {
    for (int part = 0; part < Layout::kDirectHigh; ++part, q += 2) {
      load_codes(&block.keys[i][Layout::kLines - Layout::kDirectHigh + part][column], codes);
      multiply(high, q, kHeadDim, codes);
    }
  }
  store_sums(high, hi + column, kKeyBlock);
}

template <int kHeadDim, int kRows>
inline void key_products(const int16_t* q, const Block<kHeadDim>& block, int32_t* lo, int32_t* hi) {
  constexpr int kVectors = kLanes == 16 ? 4 : 2;  // as many as fit in registers next to the sums
  for (int column = 0; column < kKeyBlock; column += kVectors * kLanes) {
    key_tile_products<kHeadDim, kRows, kVectors>(q, block, column, lo, hi);
  }
}

// Codes of dims [kLanes v, kLanes (v + 1)) for the pair of tokens whose words are `words`.
template <int kHeadDim, int v>
inline IVec value_codes(const int32_t* words) {
  constexpr int kFull = BlockLayout<kHeadDim>::kFull;
  constexpr int kOctet = v * kLanes / 8, kWord = kOctet / 4 < kFull ? kOctet / 4 : kFull;
  constexpr int kNibble = kOctet - 4 * kWord;
  if constexpr (kOctet >= 4 * kFull + 2) {
    return load_bits<IVec>(words + 8 * (kFull + 1) + v * kLanes - 8 * (4 * kFull + 2));
  } else {
    return load_nibbles<kNibble>(words + 8 * kWord + v * kLanes % 8);
  }
}

// out[r][dim] = sum over tokens of weights[r] . codes, for the dims of vectors
// [kFirst, kFirst + kVectors).
template <int kHeadDim, int kRows, int kFirst, int... kVector>
inline void value_tile_products(const int16_t* weights, int64_t stride,
                                const Block<kHeadDim>& block, int32_t* out, int64_t out_stride,
                                std::integer_sequence<int, kVector...>) {
  IVec sums[kRows][sizeof...(kVector)] = {};
  for (int pair = 0; pair < kKeyBlock / 2; ++pair) {
    const IVec codes[] = {value_codes<kHeadDim, kFirst + kVector>(block.values[pair])...};
    multiply(sums, weights + 2 * pair, stride, codes);
  }
  store_sums(sums, out, out_stride);
}

// The same for vectors [kFirst, kEnd), a few at a time.
template <int kHeadDim, int kRows, int kFirst, int kEnd>
inline void value_products(const int16_t* weights, int64_t stride, const Block<kHeadDim>& block,
                           int32_t* out, int64_t out_stride) {
  constexpr int kMost = kLanes == 16 ? 4 : 2;
  constexpr int kVectors = kEnd - kFirst < kMost ? kEnd - kFirst : kMost;
  if constexpr (kVectors > 0) {
    value_tile_products<kHeadDim, kRows, kFirst>(weights, stride, block, out, out_stride,
                                                 std::make_integer_sequence<int, kVectors>());
    value_products<kHeadDim, kRows, kFirst + kVectors, kEnd>(weights, stride, block,
                                                             out + kVectors * kLanes, out_stride);
  }
}
