// unpack_weight: the CPU layout of docs/formats.md section 3.2 -> canonical codes, one block of 32
// of N at a time; the exact inverse of pack_weight.
#pragma once

#include <algorithm>
#include <cstring>

#include "core/packed_weight.h"
#include "core/packed_weight_cuda.h"
#include "cuda/launch.h"

namespace resq {

struct UnpackWeightParams {
  int64_t n, k_lo, k_hi;
  const uint8_t* packed_weight;  // [packed_weight_bytes(n, k_lo, k_hi)]
  uint8_t* codes_lo;             // [n, k_lo / 2], two signed 4-bit codes a byte, even column low
  int8_t* codes_hi;              // [n, k_hi]
};

// Four bytes into a row that has `left` bytes from there on.
inline void store_word(void* to, uint32_t word, int64_t left) {
  if (left >= kPackedWordBytes) {
    std::memcpy(to, &word, kPackedWordBytes);
  } else {
    std::memcpy(to, &word, static_cast<size_t>(left));
  }
}

inline void unpack_weight_block(const UnpackWeightParams& p, int64_t block) {
  const int64_t first_n = block * kPackedBlockN;
  const int64_t count_n = std::min(kPackedBlockN, p.n - first_n);
  const uint8_t* packed = p.packed_weight + block * packed_block_bytes(p.k_lo, p.k_hi);
  const auto load = [](const uint8_t* from) {
    uint32_t word;
    std::memcpy(&word, from, sizeof word);
    return word;
  };
  for (int64_t n = 0; n < count_n; ++n) {
    uint8_t* lo = p.codes_lo + (first_n + n) * p.k_lo / 2;
    int8_t* hi = p.codes_hi + (first_n + n) * p.k_hi;
    for (int64_t k = 0; k < p.k_lo; k += kPackedGroupK) {
      const uint32_t nibbles = unpacked_lo_word(load(packed + packed_lo_byte(n, k)));
      store_word(lo + k / 2, nibbles, (p.k_lo - k) / 2);
    }
    for (int64_t k = 0; k < p.k_hi; k += kPackedWordBytes) {
      const uint32_t codes = packed_hi_word(load(packed + packed_hi_byte(p.k_lo, n, k)));
      store_word(hi + k, codes, p.k_hi - k);
    }
  }
}

namespace cuda {

// Unpacks a layout of docs/formats.md section 3.3. Device pointers; packed_weight has
// cuda_packed_weight_bytes(n, k_lo, k_hi).
void unpack_weight(const UnpackWeightParams& p, CudaLayout layout, Stream stream);

}  // namespace cuda

}  // namespace resq
