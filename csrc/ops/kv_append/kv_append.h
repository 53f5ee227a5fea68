// kv_append: RoPE and rotation of k, quantization of k and v per token and head, write into pages.
//
//   k' = (k cos + rotate_half(k) sin) U[head]        float32, sums over d in order
//   per row of k' and of v: offset, scale, codes     kv_range, kv_code of core/kv_page.h
//   q' = (q cos + rotate_half(q) sin) U[kv head]     float32, what kv_attention takes
//
// The same row gives the same bytes whatever the batch, the thread count and the instruction set.
#pragma once

#include "core/kv_page.h"
#include "cuda/launch.h"

namespace resq {

struct KvAppendParams {
  const void* k;                // [tokens, n_kv, head_dim] of `type`
  const void* v;                // [tokens, n_kv, head_dim] of `type`
  const void* q;                // [tokens, n_q, head_dim] of `type`; not read if n_q is 0
  float* rotated_q;             // [tokens, n_q, head_dim]
  FloatArray cos;               // [tokens, head_dim] or null; float32 on CPUs
  FloatArray sin;               // the same
  FloatArray rotation;          // [1 or n_kv, head_dim, head_dim] or null; float32 on CPUs
  const int64_t* slot_mapping;  // [tokens], page * page_size + position or negative
  uint8_t* cache;               // [pages, n_kv, page_size * token_bytes]
  FloatType type;
  int64_t tokens, n_kv, n_q, head_dim, page_size;
  int64_t k_stride, v_stride, q_stride;  // from one token to the next, in numbers
  int64_t slots;                         // of the cache: pages * page_size
  bool shared_rotation;                  // one rotation for all heads
  bool uniform;                          // hi_bits = 4: one 4-bit range per row
};

// A row is one head of one token; rows of a group share a rotation, and the result does not depend
// on their order.
struct KvAppendGroups {
  int64_t groups, heads, rows;  // heads and rows of each group

  // Of k and v with all_heads = n_kv, of q with n_q.
  KvAppendGroups(const KvAppendParams& p, int64_t all_heads)
      : groups(p.shared_rotation ? 1 : p.n_kv),
        heads(p.shared_rotation ? all_heads : all_heads / p.n_kv),
        rows(p.tokens * heads) {}

  int64_t token(int64_t row) const { return row / heads; }
  int64_t head(int64_t group, int64_t row) const { return group * heads + row % heads; }
};

namespace cuda {

// Device pointers; k, v and the cache aligned to 16 bytes. A slot beyond the cache stops the kernel
// with a device error (slots are not read on the host).
void kv_append(const KvAppendParams& p, const Device& device, Stream stream);

}  // namespace cuda

}  // namespace resq
