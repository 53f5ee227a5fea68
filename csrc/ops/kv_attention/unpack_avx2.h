// Unpacking of tiles with 256-bit vectors, for kv_attention_body.h on AVX2 and AVX-512. A vector
// holds one word of the eight lanes 4 g + i, g = 0..7: eight rows of the A operand. 512-bit stores
// brought nothing (Zen 4: 15.8 and 15.8 ns a token): the 64 stores of 32 bytes a token are the
// limit.

inline __m256i load_pair(const uint8_t* low, const uint8_t* high) {
  return _mm256_inserti128_si256(
      _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(low))),
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(high)), 1);
}

// words[n][g] = word n of the 16 bytes at rows + g * stride.
inline void load_words(const uint8_t* rows, int stride, __m256i* words) {
  const __m256i row0 = load_pair(rows, rows + 4 * stride);
  const __m256i row1 = load_pair(rows + stride, rows + 5 * stride);
  const __m256i row2 = load_pair(rows + 2 * stride, rows + 6 * stride);
  const __m256i row3 = load_pair(rows + 3 * stride, rows + 7 * stride);
  const __m256i low01 = _mm256_unpacklo_epi32(row0, row1);
  const __m256i low23 = _mm256_unpacklo_epi32(row2, row3);
  const __m256i high01 = _mm256_unpackhi_epi32(row0, row1);
  const __m256i high23 = _mm256_unpackhi_epi32(row2, row3);
  words[0] = _mm256_unpacklo_epi64(low01, low23);
  words[1] = _mm256_unpackhi_epi64(low01, low23);
  words[2] = _mm256_unpacklo_epi64(high01, high23);
  words[3] = _mm256_unpackhi_epi64(high01, high23);
}

// Nibbles n and n + 4 of each word, as two 16-bit codes.
template <int n>
inline __m256i nibbles(__m256i words) {
  return _mm256_and_si256(_mm256_srli_epi32(words, 4 * n), _mm256_set1_epi32(0x000f000f));
}

// Bytes 2 `part` and 2 `part` + 1 of each word, as two 16-bit codes.
template <int part>
inline __m256i bytes(__m256i words) {
  constexpr int b = 2 * part;
  const __m128i order = _mm_setr_epi8(b, -1, b + 1, -1, b + 4, -1, b + 5, -1, b + 8, -1, b + 9, -1,
                                      b + 12, -1, b + 13, -1);
  return _mm256_shuffle_epi8(words, _mm256_broadcastsi128_si256(order));
}

// Byte `at` of each word: its low and its high nibble, as two 16-bit codes.
template <int at>
inline __m256i byte_nibbles(__m256i words) {
  const __m256i byte = _mm256_srli_epi32(words, 8 * at);
  return _mm256_or_si256(
      _mm256_and_si256(byte, _mm256_set1_epi32(0x0000000f)),
      _mm256_slli_epi32(_mm256_and_si256(byte, _mm256_set1_epi32(0x000000f0)), 12));
}

inline void store_codes(int32_t* out, __m256i codes) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), codes);
}

// Head dim 64, V, dims 48..55: lanes g < 4 belong to tokens 0..15 and g >= 4 to tokens 16..31.
// Nibbles n and n + 1 of word 6 are dims 48 + g % 4 and 52 + g % 4 of one pair of tokens.
template <int n>
inline void store_tail(int32_t* first, int32_t* second, __m256i words) {
  const __m256i low = nibbles<n>(words), high = nibbles<n + 1>(words);
  store_codes(first, _mm256_permute2x128_si256(low, high, 0x20));
  store_codes(second, _mm256_permute2x128_si256(low, high, 0x31));
}

// The two 8 x 8 halves of 16 x 16 block `block`, its word's nibbles n and n + 1, to their places.
template <int n, class Place>
inline void emit(__m256i words, int half, int block, const Place& place) {
  store_codes(place(half, block, 0), nibbles<n>(words));
  store_codes(place(half, block, 1), nibbles<n + 1>(words));
}

// What K and V tiles share: all but the last 8 of the low dims of head dim 64. place(group, half,
// block, part) is the destination of the 8 words of lanes 4 g + i.
template <int kHeadDim, class Place>
inline void unpack_common(const uint8_t* tile, int i, const __m256i* last, const Place& place,
                          __m256i* word6) {
  __m256i word[9];
  load_words(tile + 16 * i, 64, word);
  load_words(tile + 512 + 16 * i, 64, word + 4);
  word[8] = last[i];
  if constexpr (kHeadDim == 128) {
    const auto at = [&](int half, int block, int part) { return place(0, half, block, part); };
    for (int half = 0; half < 2; ++half) {
      for (int j = 0; j < 3; ++j) {
        emit<0>(word[3 * half + j], half, 2 * j, at);
        emit<2>(word[3 * half + j], half, 2 * j + 1, at);
      }
      store_codes(at(half, 7, 0), bytes<0>(word[7 + half]));
      store_codes(at(half, 7, 1), bytes<1>(word[7 + half]));
    }
    emit<0>(word[6], 0, 6, at);
    emit<2>(word[6], 1, 6, at);
  } else {
    for (int group = 0; group < 2; ++group) {
      const auto at = [&](int half, int block, int part) {
        return place(group, half, block, part);
      };
      for (int half = 0; half < 2; ++half) {
        emit<0>(word[3 * group + half], half, 0, at);
        emit<2>(word[3 * group + half], half, 1, at);
      }
      emit<0>(word[3 * group + 2], 0, 2, at);
      emit<2>(word[3 * group + 2], 1, 2, at);
      // The 8 high dims are the second part of block 3.
      store_codes(at(0, 3, 1), bytes<0>(word[7 + group]));
      store_codes(at(1, 3, 1), bytes<1>(word[7 + group]));
    }
  }
  *word6 = word[6];
}

// keys[j * kKeyBlock + token] = codes of dims 2 j and 2 j + 1.
template <int kHeadDim>
inline void unpack_keys(const uint8_t* tile, int32_t* keys) {
  __m256i last[4], word6;
  load_words(tile + 1024, 16, last);
  for (int i = 0; i < 4; ++i) {
    const auto place = [=](int group, int half, int block, int part) {
      return keys + (8 * block + 4 * part + i) * kKeyBlock + 16 * group + 8 * half;
    };
    unpack_common<kHeadDim>(tile, i, last, place, &word6);
    if constexpr (kHeadDim == 64) {
      store_codes(place(0, 0, 3, 0), byte_nibbles<0>(word6));
      store_codes(place(0, 1, 3, 0), byte_nibbles<1>(word6));
      store_codes(place(1, 0, 3, 0), byte_nibbles<2>(word6));
      store_codes(place(1, 1, 3, 0), byte_nibbles<3>(word6));
    }
  }
}

// values[j * kHeadDim + dim] = codes of tokens 2 j and 2 j + 1.
template <int kHeadDim>
inline void unpack_values(const uint8_t* tile, int32_t* values) {
  __m256i last[4], word6;
  load_words(tile + 1024, 16, last);
  for (int i = 0; i < 4; ++i) {
    const auto place = [=](int group, int half, int block, int part) {
      return values + (8 * group + 4 * half + i) * kHeadDim + 16 * block + 8 * part;
    };
    unpack_common<kHeadDim>(tile, i, last, place, &word6);
    if constexpr (kHeadDim == 64) {
      store_tail<0>(place(0, 0, 3, 0), place(1, 0, 3, 0), word6);
      store_tail<2>(place(0, 1, 3, 0), place(1, 1, 3, 0), word6);
    }
  }
}

// The 8 float16 numbers of each of 8 tokens -> out[number * kKeyBlock + token].
inline void load_metadata(const uint8_t* metadata, float* out) {
  __m256 row[8], a[8], b[8];
  for (int t = 0; t < 8; ++t) {
    row[t] = _mm256_cvtph_ps(
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(metadata + t * kKvMetadataBytes)));
  }
  for (int t = 0; t < 8; t += 2) {
    a[t] = _mm256_unpacklo_ps(row[t], row[t + 1]);
    a[t + 1] = _mm256_unpackhi_ps(row[t], row[t + 1]);
  }
  for (int t = 0; t < 8; t += 4) {
    b[t] = _mm256_shuffle_ps(a[t], a[t + 2], 0x44);
    b[t + 1] = _mm256_shuffle_ps(a[t], a[t + 2], 0xee);
    b[t + 2] = _mm256_shuffle_ps(a[t + 1], a[t + 3], 0x44);
    b[t + 3] = _mm256_shuffle_ps(a[t + 1], a[t + 3], 0xee);
  }
  for (int n = 0; n < 4; ++n) {
    _mm256_storeu_ps(out + n * kKeyBlock, _mm256_permute2f128_ps(b[n], b[n + 4], 0x20));
    _mm256_storeu_ps(out + (n + 4) * kKeyBlock, _mm256_permute2f128_ps(b[n], b[n + 4], 0x31));
  }
}
