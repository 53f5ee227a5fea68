// The verbs over sixteen floats. Included inside
// `#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")`.
#pragma once

#include "cpu/simd_common.h"

namespace resq::cpu::avx512vnni {

struct Vec {
  static constexpr int kLanes = 16;
  __m512 v;
};

inline Vec set1(float x) { return {_mm512_set1_ps(x)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }

// The second operand if either is NaN.
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }

// Half to even.
inline Vec round(Vec a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}

// 2^n of integers n in [-126, 127]; 0 at n = -127.
inline Vec exp2_int(Vec n) {
  const __m512i biased = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(biased, 23))};
}

inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load(const Half* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline Vec load(const BFloat16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline void store(Half* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void store(BFloat16* p, Vec a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i lsb = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i bias = _mm512_add_epi32(lsb, _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i words = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(words));
}

// Integers in [-128, 127] as bytes.
inline void store(int8_t* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v)));
}

// partner + self, and partner - self in the lanes whose bit is set in kOdd.
template <int kOdd>
inline __m512 hadamard_stage(__m512 partner, __m512 self) {
  return _mm512_mask_sub_ps(_mm512_add_ps(partner, self), kOdd, partner, self);
}

// The stages h = 1, 2, ... below min(width, kLanes) of a Hadamard transform, inside the register.
inline Vec hadamard_lanes(Vec a, int64_t width) {
  if (width >= 2) a.v = hadamard_stage<0xaaaa>(_mm512_permute_ps(a.v, 0xb1), a.v);
  if (width >= 4) a.v = hadamard_stage<0xcccc>(_mm512_permute_ps(a.v, 0x4e), a.v);
  if (width >= 8) a.v = hadamard_stage<0xf0f0>(_mm512_shuffle_f32x4(a.v, a.v, 0xb1), a.v);
  if (width >= 16) a.v = hadamard_stage<0xff00>(_mm512_shuffle_f32x4(a.v, a.v, 0x4e), a.v);
  return a;
}

}  // namespace resq::cpu::avx512vnni
