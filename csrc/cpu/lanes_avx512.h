// The AVX-512 vectors of cpu/lanes.h. Included inside the namespace of an instruction set.

inline constexpr int kLanes = 16;
using Floats = float __attribute__((vector_size(64)));
using Ints = int32_t __attribute__((vector_size(64)));

inline Floats load_halves(const uint16_t* in) {
  return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in)));
}
inline void store_halves(uint16_t* out, Floats x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                      _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
}

// sums + a.low b.low + a.high b.high per lane, 16-bit signed halves.
inline Ints dot_pairs(Ints sums, Ints a, Ints b) {
  return (Ints)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)a, (__m512i)b);
}

// a > b ? a : b, the second operand where either is NaN.
inline Floats maximum(Floats a, Floats b) { return (Floats)_mm512_max_ps((__m512)a, (__m512)b); }

// Half to even, for |x| < 2^22.
inline Ints round_to_int(Floats x) { return (Ints)_mm512_cvtps_epi32((__m512)x); }

#include "cpu/lanes.h"
