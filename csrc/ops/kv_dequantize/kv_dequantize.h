// kv_dequantize: the keys and values stored in pages, as floats.
//
//   k, v[s, t] = scale * code + offset     t < seq_lens[s]; 0 for seq_lens[s] <= t < max_tokens
//
// The product of an 8-bit code and an 11-bit scale is exact in float32, so that the float32 value
// is the sum rounded once; float16 and bfloat16 round it again. Float16 saturates at 65504, which
// the top code can exceed by the rounding of the scale. Keys stay in the rotated basis.
#pragma once

#include "core/kv_page.h"
#include "cuda/launch.h"

namespace resq {

RESQ_HOST_DEVICE inline int64_t kv_tile_tokens(int64_t head_dim) {
  return head_dim == 128 ? KvLayout<128>::kTileTokens : KvLayout<64>::kTileTokens;
}

struct KvDequantizeParams {
  void* k;                     // [sequences, max_tokens, n_kv, head_dim] of `type`
  void* v;                     // the same
  const uint8_t* cache;        // [pages, n_kv, page_size * token_bytes]
  const int32_t* block_table;  // [sequences, max_pages]
  const int32_t* seq_lens;     // [sequences]
  FloatType type;
  int64_t sequences, max_tokens, n_kv, head_dim, page_size, max_pages, pages;
  int64_t tiles;  // of a sequence and head, those past its length too

  RESQ_HOST_DEVICE int64_t items() const { return sequences * tiles * n_kv; }
};

// One tile of K and of V; heads vary fastest. 2^31 items have outputs of 0.5 TB or more, so 32 bits
// are enough: a 64-bit division is a hundred instructions on a GPU.
struct KvDequantizeItem {
  uint32_t sequence, first_token, head;

  RESQ_HOST_DEVICE KvDequantizeItem(const KvDequantizeParams& p, uint32_t index) {
    const auto heads = static_cast<uint32_t>(p.n_kv), tiles = static_cast<uint32_t>(p.tiles);
    const uint32_t row = index / heads;
    head = index - row * heads;
    sequence = row / tiles;
    first_token = (row - sequence * tiles) * static_cast<uint32_t>(kv_tile_tokens(p.head_dim));
  }
};

namespace cuda {

// Device pointers; cache, k and v aligned to 16 bytes. A length or page that is out of range stops
// the kernel with a device error (lengths are not read on the host).
void kv_dequantize(const KvDequantizeParams& p, Stream stream);

}  // namespace cuda

}  // namespace resq
