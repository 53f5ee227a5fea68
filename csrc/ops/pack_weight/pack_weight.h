// pack_weight: canonical codes -> the CPU layout of docs/formats.md section 3.2, one block of 32
// of N at a time. Padding of N and K holds code 0.
#pragma once

#include <cstring>

#include "core/packed_weight.h"
#include "core/packed_weight_cuda.h"
#include "cuda/launch.h"

namespace resq {

struct PackWeightParams {
  int64_t n, k_lo, k_hi;
  const uint8_t* codes_lo;  // [n, k_lo / 2], two signed 4-bit codes a byte, even column low
  const int8_t* codes_hi;   // [n, k_hi]
  uint8_t* packed_weight;   // [packed_weight_bytes(n, k_lo, k_hi)]
};

// The next four bytes of a row that has `left` bytes from there on; zeros behind its end.
inline uint32_t load_word(const void* from, int64_t left) {
  uint32_t word = 0;
  if (left >= kPackedWordBytes) {
    std::memcpy(&word, from, kPackedWordBytes);
  } else if (left > 0) {
    std::memcpy(&word, from, static_cast<size_t>(left));
  }
  return word;
}

inline void pack_weight_block(const PackWeightParams& p, int64_t block) {
  const int64_t first_n = block * kPackedBlockN;
  uint8_t* out = p.packed_weight + block * packed_block_bytes(p.k_lo, p.k_hi);
  const auto store = [](uint8_t* to, uint32_t word) { std::memcpy(to, &word, sizeof word); };
  for (int64_t n = 0; n < kPackedBlockN; ++n) {
    const bool inside = first_n + n < p.n;
    const uint8_t* lo = inside ? p.codes_lo + (first_n + n) * p.k_lo / 2 : nullptr;
    const int8_t* hi = inside ? p.codes_hi + (first_n + n) * p.k_hi : nullptr;
    for (int64_t k = 0; k < packed_k(p.k_lo); k += kPackedGroupK) {
      const uint32_t nibbles = inside ? load_word(lo + k / 2, (p.k_lo - k) / 2) : 0;
      store(out + packed_lo_byte(n, k), packed_lo_word(nibbles));
    }
    for (int64_t k = 0; k < packed_k(p.k_hi); k += kPackedWordBytes) {
      const uint32_t codes = inside ? load_word(hi + k, p.k_hi - k) : 0;
      store(out + packed_hi_byte(p.k_lo, n, k), packed_hi_word(codes));
    }
  }
}

namespace cuda {

// Packs into a layout of docs/formats.md section 3.3. Device pointers; packed_weight has
// cuda_packed_weight_bytes(n, k_lo, k_hi), aligned to 16 bytes.
void pack_weight(const PackWeightParams& p, CudaLayout layout, Stream stream);

}  // namespace cuda

}  // namespace resq
