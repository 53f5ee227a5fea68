// The operations of cpu/simd.h on eight lanes of AVX2. Included inside the namespace of an
// instruction set, in a region of its target.

inline constexpr int kLanes = 8;
using Vec = Vectors<kLanes>::Vec;
using IVec = Vectors<kLanes>::IVec;

inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }

inline Vec round(Vec x) {
  return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline IVec round_to_int(Vec x) { return (IVec)_mm256_cvtps_epi32(x); }

inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline Vec load(const Half* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Vec load(const BFloat16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
inline void store(Half* p, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void store(BFloat16* p, Vec x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i lsb = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i bias = _mm256_add_epi32(lsb, _mm256_set1_epi32(0x7fff));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i words = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
  _mm_storeu_si128(
      reinterpret_cast<__m128i*>(p),
      _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
inline void store(int8_t* p, Vec x) {
  const __m256i ints = _mm256_cvtps_epi32(x);
  const __m128i words =
      _mm_packs_epi32(_mm256_castsi256_si128(ints), _mm256_extracti128_si256(ints, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}

inline IVec dot_pairs(IVec sums, IVec a, IVec b) {
  return (IVec)_mm256_add_epi32((__m256i)sums, _mm256_madd_epi16((__m256i)a, (__m256i)b));
}

// partner + self, and partner - self in the lanes whose bit is set in kOdd.
template <int kOdd>
inline Vec hadamard_stage(Vec partner, Vec self) {
  return _mm256_blend_ps(partner + self, partner - self, kOdd);
}
inline Vec hadamard_lanes(Vec x, int64_t width) {
  if (width >= 2) x = hadamard_stage<0xaa>(_mm256_permute_ps(x, 0xb1), x);
  if (width >= 4) x = hadamard_stage<0xcc>(_mm256_permute_ps(x, 0x4e), x);
  if (width >= 8) x = hadamard_stage<0xf0>(_mm256_permute2f128_ps(x, x, 1), x);
  return x;
}

#include "cpu/simd.h"
