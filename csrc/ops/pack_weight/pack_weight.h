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

// Packs `bytes` of a row's codes into `words` words of one n, which are kPackedBlockN words apart;
// zeros follow the end of the row.
template <class Word>
void pack_row(const void* codes, int64_t bytes, int64_t words, uint8_t* out, const Word& word) {
  const auto* from = static_cast<const uint8_t*>(codes);
  const auto store = [&](int64_t i, uint32_t stored) {
    stored = word(stored);
    std::memcpy(out + i * kPackedWordBytes * kPackedBlockN, &stored, sizeof stored);
  };
  const int64_t whole = bytes / kPackedWordBytes;
  for (int64_t i = 0; i < whole; ++i) {
    uint32_t next;
    std::memcpy(&next, from + i * kPackedWordBytes, sizeof next);
    store(i, next);
  }
  uint32_t last = 0;
  if (const int64_t left = bytes % kPackedWordBytes) {
    std::memcpy(&last, from + whole * kPackedWordBytes, static_cast<size_t>(left));
  }
  for (int64_t i = whole; i < words; ++i, last = 0) store(i, last);
}

inline void pack_weight_block(const PackWeightParams& p, int64_t block) {
  uint8_t* out = p.packed_weight + block * packed_block_bytes(p.k_lo, p.k_hi);
  for (int64_t n = 0; n < kPackedBlockN; ++n) {
    const int64_t row = block * kPackedBlockN + n;
    const bool inside = row < p.n;  // the block's other rows are zeros
    const int64_t bytes_lo = inside ? p.k_lo / 2 : 0, bytes_hi = inside ? p.k_hi : 0;
    pack_row(p.codes_lo + row * bytes_lo, bytes_lo, packed_k(p.k_lo) / kPackedGroupK,
             out + packed_lo_byte(n, 0), packed_lo_word);
    pack_row(p.codes_hi + row * bytes_hi, bytes_hi, packed_k(p.k_hi) / kPackedWordBytes,
             out + packed_hi_byte(p.k_lo, n, 0), packed_hi_word);
  }
}

namespace cuda {

// Packs into a layout of docs/formats.md section 3.3. Device pointers; packed_weight has
// cuda_packed_weight_bytes(n, k_lo, k_hi), aligned to 16 bytes.
void pack_weight(const PackWeightParams& p, CudaLayout layout, Stream stream);

}  // namespace cuda

}  // namespace resq
