// Words of a tile for kv_attention_block.h on AVX2.

#include "ops/kv_attention/transpose_avx2.h"

// Nibbles n of kLanes words.
template <int n>
inline IVec load_nibbles(const int32_t* words) {
  return (load_bits<IVec>(words) >> (4 * n)) & 0x000f000f;
}
