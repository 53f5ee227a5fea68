// The transposition of tiles and of metadata for kv_attention_block.h in 256-bit registers.

inline __m256i load_pair(const uint8_t* low, const uint8_t* high) {
  return _mm256_inserti128_si256(
      _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(low))),
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(high)), 1);
}

// words[n][g] = word n of the 16 bytes at rows + g * stride.
inline void load_words(const uint8_t* rows, int stride, EightIVec* words) {
  const __m256i row0 = load_pair(rows, rows + 4 * stride);
  const __m256i row1 = load_pair(rows + stride, rows + 5 * stride);
  const __m256i row2 = load_pair(rows + 2 * stride, rows + 6 * stride);
  const __m256i row3 = load_pair(rows + 3 * stride, rows + 7 * stride);
  const __m256i low01 = _mm256_unpacklo_epi32(row0, row1);
  const __m256i low23 = _mm256_unpacklo_epi32(row2, row3);
  const __m256i high01 = _mm256_unpackhi_epi32(row0, row1);
  const __m256i high23 = _mm256_unpackhi_epi32(row2, row3);
  words[0] = (EightIVec)_mm256_unpacklo_epi64(low01, low23);
  words[1] = (EightIVec)_mm256_unpackhi_epi64(low01, low23);
  words[2] = (EightIVec)_mm256_unpacklo_epi64(high01, high23);
  words[3] = (EightIVec)_mm256_unpackhi_epi64(high01, high23);
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
