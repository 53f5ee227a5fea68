// Words of a tile for kv_attention_block.h on AVX-512: the transposition of AVX2 (512-bit loads and
// stores gained nothing on Zen 4), and nibbles that fill a register of 16 lanes.

#include "ops/kv_attention/transpose_avx2.h"

// Nibbles n of 8 words in the low half, n + 1 of the same words in the high half.
template <int n>
inline IVec load_nibbles(const int32_t* words) {
  const __m512i twice =
      _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(words)));
  const __m512i shifts =
      _mm512_inserti64x4(_mm512_set1_epi32(4 * n), _mm256_set1_epi32(4 * n + 4), 1);
  return (IVec)_mm512_and_si512(_mm512_srlv_epi32(twice, shifts), _mm512_set1_epi32(0x000f000f));
}
