// The operations of cpu/simd.h on sixteen lanes of AVX-512. Included inside the namespace of an
// instruction set, in a region of its target.

inline constexpr int kLanes = 16;
using Vec = Vectors<kLanes>::Vec;
using IVec = Vectors<kLanes>::IVec;

inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }

inline Vec round(Vec x) {
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline IVec round_to_int(Vec x) { return (IVec)_mm512_cvtps_epi32(x); }

inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec load(const Half* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Vec load(const BFloat16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
inline void store(Half* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void store(BFloat16* p, Vec x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i lsb = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i bias = _mm512_add_epi32(lsb, _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i words = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(words));
}
inline void store(int8_t* p, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x)));
}

inline IVec dot_pairs(IVec sums, IVec a, IVec b) {
  return (IVec)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)a, (__m512i)b);
}

// partner + self, and partner - self in the lanes whose bit is set in kOdd.
template <int kOdd>
inline Vec hadamard_stage(Vec partner, Vec self) {
  return _mm512_mask_sub_ps(partner + self, kOdd, partner, self);
}
inline Vec hadamard_lanes(Vec x, int64_t width) {
  if (width >= 2) x = hadamard_stage<0xaaaa>(_mm512_permute_ps(x, 0xb1), x);
  if (width >= 4) x = hadamard_stage<0xcccc>(_mm512_permute_ps(x, 0x4e), x);
  if (width >= 8) x = hadamard_stage<0xf0f0>(_mm512_shuffle_f32x4(x, x, 0xb1), x);
  if (width >= 16) x = hadamard_stage<0xff00>(_mm512_shuffle_f32x4(x, x, 0x4e), x);
  return x;
}

#include "cpu/simd.h"
