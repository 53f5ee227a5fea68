// kv_attention: causal GQA attention over the pages of the 4-bit KV cache.
//
//   q' = q * scale * log2(e), q in the basis of the keys (kv_append)     float32
//   q' ~ s_p * integer, 16 bits, per row and part p (low and high dims)
//   score[t] = sum over p of k_scale_p[t] * s_p * (integers . codes) + k_offset_p[t] * sum(q'_p)
//   out = sum_t softmax(score)[t] V[t], in blocks of 64 tokens: per block the products
//         exp2(score - max) * v_scale_p become 16-bit integers, multiplied exactly by V's codes.
//
// Integer dot products do not depend on the order, and the float32 steps have a fixed one: blocks
// of kKeyBlock tokens merge in order inside splits of kSplitTokens, and splits merge in order. A
// query's result has the same bits for every batch, chunking of the prompt, page size, thread count
// and instruction set.
#pragma once

#include "core/kv_page.h"

namespace resq {

inline constexpr int kKeyBlock = 64;
inline constexpr int kSplitTokens = 1024;
inline constexpr int kTaskRows = 64;  // rows (query, head) that share the unpacking of a block

struct KvAttentionParams {
  FloatArray q;                // [tokens, n_q, head_dim], tokens q_stride apart
  void* out;                   // [tokens, n_q * head_dim] of `out_type`, as KvOutputRow says
  const uint8_t* cache;        // [pages, n_kv, page_size * token_bytes]
  const int32_t* block_table;  // [sequences, max_pages]
  FloatType out_type;
  int64_t q_stride;
  int64_t n_q, n_kv, head_dim, page_size, max_pages;
  float scale;          // of the scores, times log2(e)
  int64_t head_dim_hi;  // per head, stored after all heads' low dims; 0: head after head

  RESQ_HOST_DEVICE int64_t group() const { return n_q / n_kv; }
};

// The sequences of a call. Lengths and pages are on the device of q.
struct KvAttentionBatch {
  const int32_t* seq_lens;      // [sequences]
  const int32_t* query_starts;  // [sequences + 1]
  int64_t tokens;               // rows of q
  int64_t sequences;
  int64_t pages;  // of the cache
};

// Where the result of a head goes: the column order that o_proj reads (docs/formats.md section 6).
struct KvOutputRow {
  int64_t low, high;  // in `out`: a low dim is at low + dim, a high one at high + dim
  int64_t low_dims;

  RESQ_HOST_DEVICE KvOutputRow(const KvAttentionParams& p, int64_t token, int64_t head)
      : low_dims(p.head_dim - p.head_dim_hi) {
    const int64_t first = token * p.n_q * p.head_dim;
    low = first + head * low_dims;
    high = first + p.n_q * low_dims + head * p.head_dim_hi - low_dims;
  }
  RESQ_HOST_DEVICE int64_t index(int64_t dim) const { return (dim < low_dims ? low : high) + dim; }
};

// Some queries of one sequence with the heads of one group. Row r is query r / group, head
// r % group; query i sees the first `visible + i` tokens (none if that is not positive).
struct KvAttentionTask {
  int64_t sequence, kv_head;
  int64_t first_query, queries;  // rows of q
  int64_t visible;

  int64_t last_visible() const { return visible + queries - 1; }
  int64_t splits() const { return last_visible() > 0 ? ceil_div(last_visible(), kSplitTokens) : 0; }
};

// The running softmax of a row: head_dim weighted sums, then the maximum and the sum of weights.
constexpr int64_t kv_state_floats(int64_t head_dim) { return head_dim + 16; }

// Floats of scratch for a task of `rows` rows: at most head_dim + 8 for every token of a block; per
// row two states, the query's integers, and its scales and sums (4).
constexpr int64_t kv_workspace_floats(int64_t head_dim, int64_t rows) {
  return kKeyBlock * (head_dim + 8) + rows * (2 * kv_state_floats(head_dim) + head_dim / 2 + 4);
}

}  // namespace resq
