// The AVX2 vectors of cpu/lanes.h. Included inside the namespace of an instruction set.

inline constexpr int kLanes = 8;
using Floats = float __attribute__((vector_size(32)));
using Ints = int32_t __attribute__((vector_size(32)));

inline Floats load_halves(const uint16_t* in) {
  return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in)));
}
inline void store_halves(uint16_t* out, Floats x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out),
                   _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
}

// sums + a.low b.low + a.high b.high per lane, 16-bit signed halves, modulo 2^32: columns of tokens
// that nobody sees hold anything.
inline Ints dot_pairs(Ints sums, Ints a, Ints b) {
  return (Ints)_mm256_add_epi32((__m256i)sums, _mm256_madd_epi16((__m256i)a, (__m256i)b));
}

// a > b ? a : b, the second operand where either is NaN.
inline Floats maximum(Floats a, Floats b) { return (Floats)_mm256_max_ps((__m256)a, (__m256)b); }

// Half to even, for |x| < 2^22.
inline Ints round_to_int(Floats x) { return (Ints)_mm256_cvtps_epi32((__m256)x); }

#include "cpu/lanes.h"
