// AVX2: pmaddubsw for 4-bit codes, widening to 16 bits for 8-bit codes.

inline constexpr int kTileM = mixed_gemm_tile_m(Isa::kAvx2);
inline constexpr int64_t kPrefetchBytes = 0;

template <int kM>
class Tile {
 public:
  Tile() {
    for (auto& row : sums_) {
      for (auto& sum : row) sum = _mm256_setzero_si256();
    }
  }

  template <bool kHigh>
  void add_group(const uint8_t* weight, const int8_t* words) {
    for (int v = 0; v < 4; ++v) {
      const uint8_t* bytes = weight + 32 * v;
      for (int m = 0; m < kM; ++m) {
        const __m256i q0 = word(words + m * kPackedWordBytes);
        const __m256i q1 = word(words + (kM + m) * kPackedWordBytes);
        __m256i& sum = sums_[m][v];
        if constexpr (kHigh) {
          sum = add_wide(add_wide(sum, load(bytes), q0), load(bytes + 128), q1);
        } else {
          sum = add_nibbles(sum, load(bytes), q0, q1);
        }
      }
    }
  }

  void store(uint32_t* out) const { std::memcpy(out, sums_, sizeof(sums_)); }

 private:
  static __m256i load(const uint8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static __m256i word(const int8_t* q) {
    int32_t bits;
    std::memcpy(&bits, q, sizeof(bits));
    return _mm256_set1_epi32(bits);
  }

  // pmaddubsw saturates at 16 bits: a pair is at most 2 x 15 x 128 = 3840 in magnitude, the sum of
  // two pairs 7680, so neither it nor the 16-bit sum can overflow, with 8-bit activations too.
  static __m256i add_nibbles(__m256i sum, __m256i w, __m256i q0, __m256i q1) {
    const __m256i nibble = _mm256_set1_epi8(15);
    const __m256i low = _mm256_maddubs_epi16(_mm256_and_si256(w, nibble), q0);
    const __m256i high =
        _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(w, 4), nibble), q1);
    const __m256i pairs = _mm256_add_epi16(low, high);
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }

  // With codes up to 255 a pair reaches 65280: even and odd columns are multiplied separately, as
  // 16-bit numbers with 32-bit results.
  static __m256i add_wide(__m256i sum, __m256i w, __m256i q) {
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(w, _mm256_set1_epi16(0xff)),
                                           _mm256_srai_epi16(_mm256_slli_epi16(q, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(w, 8), _mm256_srai_epi16(q, 8));
    return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
  }

  __m256i sums_[kM][4];  // 8 output columns each
};
