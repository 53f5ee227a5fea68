// AVX-512 VNNI: vpdpbusd multiplies four unsigned weight codes by four signed activation codes and
// adds them to an int32 without saturation.
#include <immintrin.h>

#include <array>
#include <cstring>
#include <utility>
#include <vector>

#include "core/int4.h"
#include "cpu/float16.h"
#include "ops/mixed_gemm/mixed_gemm.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")

namespace resq::avx512vnni {

struct Simd {
  // 12 rows x 2 vectors of sums, 4 vectors of codes, the nibble mask and two words: 31 registers.
  static constexpr int kMaxTileRows = 12;
  using Sums = __m512i;
  using Codes = __m512i;

  static Sums zero() { return _mm512_setzero_si512(); }
  static void store(Sums sums, uint32_t* out) { _mm512_storeu_si512(out, sums); }
  static Codes load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static Codes low_nibbles(Codes codes) { return _mm512_and_si512(codes, _mm512_set1_epi8(15)); }
  static Codes high_nibbles(Codes codes) { return low_nibbles(_mm512_srli_epi16(codes, 4)); }
  static __m512i word(const int8_t* q) {
    int32_t bits;
    std::memcpy(&bits, q, sizeof(bits));
    return _mm512_set1_epi32(bits);
  }
  static Sums dot_lo(Sums sums, Codes w0, const int8_t* q0, Codes w1, const int8_t* q1) {
    return _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(sums, w0, word(q0)), w1, word(q1));
  }
  static Sums dot_hi(Sums sums, Codes w0, const int8_t* q0, Codes w1, const int8_t* q1) {
    return dot_lo(sums, w0, q0, w1, q1);
  }
  static void to_float16(const float* values, uint16_t* out) {
    // The masked form: g++ 12 warns about its own header in the plain one.
    const __m256i half =
        _mm512_maskz_cvtps_ph(0xffff, _mm512_loadu_ps(values), _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), half);
  }
};

#include "ops/mixed_gemm/mixed_gemm_body.h"

}  // namespace resq::avx512vnni

#pragma GCC pop_options
