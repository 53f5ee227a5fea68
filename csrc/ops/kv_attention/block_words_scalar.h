// Words of a tile, portable, for kv_attention_block.h.

// words[n][g] = word n of the 16 bytes at rows + g * stride.
inline void load_words(const uint8_t* rows, int stride, EightIVec* words) {
  for (int g = 0; g < 8; ++g) {
    for (int n = 0; n < 4; ++n) words[n][g] = load_bits<int32_t>(rows + g * stride + 4 * n);
  }
}

// The 8 float16 numbers of each of 8 tokens -> out[number * kKeyBlock + token].
inline void load_metadata(const uint8_t* metadata, float* out) {
  for (int token = 0; token < 8; ++token) {
    for (int field = 0; field < 8; ++field) {
      const auto bits = load_bits<uint16_t>(metadata + token * kKvMetadataBytes + 2 * field);
      out[field * kKeyBlock + token] = to_float(Half{bits});
    }
  }
}

// Nibbles n of kLanes words.
template <int n>
inline IVec load_nibbles(const int32_t* words) {
  return (load_bits<IVec>(words) >> (4 * n)) & 0x000f000f;
}
