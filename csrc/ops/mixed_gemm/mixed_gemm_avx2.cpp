// AVX2: pmaddubsw for 4-bit codes, widening to 16 bits for 8-bit codes.
#include <immintrin.h>

#include <array>
#include <cstring>
#include <utility>
#include <vector>

#include "core/int4.h"
#include "cpu/float16.h"
#include "ops/mixed_gemm/mixed_gemm.h"

#pragma GCC push_options
#pragma GCC target("avx2,f16c")

namespace resq::avx2 {

struct Simd {
  static constexpr int kMaxTileRows = 2;
  struct Sums {
    __m256i at[2];
  };
  struct Codes {
    __m256i at[2];
  };

  static Sums zero() { return {{_mm256_setzero_si256(), _mm256_setzero_si256()}}; }
  static void store(Sums sums, uint32_t* out) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), sums.at[0]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 8), sums.at[1]);
  }
  static Codes load(const uint8_t* p) {
    const auto* vectors = reinterpret_cast<const __m256i*>(p);
    return {{_mm256_loadu_si256(vectors), _mm256_loadu_si256(vectors + 1)}};
  }
  static Codes low_nibbles(Codes c) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {{_mm256_and_si256(c.at[0], mask), _mm256_and_si256(c.at[1], mask)}};
  }
  static Codes high_nibbles(Codes c) {
    return low_nibbles({{_mm256_srli_epi16(c.at[0], 4), _mm256_srli_epi16(c.at[1], 4)}});
  }
  static __m256i word(const int8_t* q) {
    int32_t bits;
    std::memcpy(&bits, q, sizeof(bits));
    return _mm256_set1_epi32(bits);
  }

  // pmaddubsw saturates at 16 bits: a pair is at most 2 x 15 x 128 = 3840 in magnitude, the sum of
  // two pairs 7680, so neither it nor the 16-bit sum can overflow, with 8-bit activations too.
  static Sums dot_lo(Sums sums, Codes w0, const int8_t* q0, Codes w1, const int8_t* q1) {
    const __m256i x0 = word(q0), x1 = word(q1), ones = _mm256_set1_epi16(1);
    for (int i = 0; i < 2; ++i) {
      const __m256i pairs =
          _mm256_add_epi16(_mm256_maddubs_epi16(w0.at[i], x0), _mm256_maddubs_epi16(w1.at[i], x1));
      sums.at[i] = _mm256_add_epi32(sums.at[i], _mm256_madd_epi16(pairs, ones));
    }
    return sums;
  }

  // With codes up to 255 a pair reaches 65280: even and odd columns are multiplied apart, as 16-bit
  // numbers with 32-bit results.
  static Sums dot_hi(Sums sums, Codes w0, const int8_t* q0, Codes w1, const int8_t* q1) {
    for (int i = 0; i < 2; ++i) {
      sums.at[i] = add_wide(add_wide(sums.at[i], w0.at[i], word(q0)), w1.at[i], word(q1));
    }
    return sums;
  }
  static __m256i add_wide(__m256i sums, __m256i w, __m256i q) {
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(w, _mm256_set1_epi16(0xff)),
                                           _mm256_srai_epi16(_mm256_slli_epi16(q, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(w, 8), _mm256_srai_epi16(q, 8));
    return _mm256_add_epi32(sums, _mm256_add_epi32(even, odd));
  }

  static void to_float16(const float* values, uint16_t* out) {
    for (int i = 0; i < 16; i += 8) {
      const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(values + i), _MM_FROUND_TO_NEAREST_INT);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), half);
    }
  }
};

#include "ops/mixed_gemm/mixed_gemm_body.h"

}  // namespace resq::avx2

#pragma GCC pop_options
