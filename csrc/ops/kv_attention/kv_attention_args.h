// Tensors of kv_attention -> checked KvAttentionParams; the output is allocated here.
#pragma once

#include <cmath>

#include "ops/kv_attention/kv_attention.h"
#include "torch/kv_tensors.h"

namespace resq {

struct KvAttentionCall {
  KvAttentionParams params;
  RopeRotation rope;
  Tensor out;
};

inline KvAttentionCall kv_attention_call(
    const Tensor& q, const Tensor& cache, const Tensor& block_table, const Tensor& seq_lens,
    const Tensor& query_starts, double scale, const std::optional<Tensor>& cos,
    const std::optional<Tensor>& sin, const std::optional<Tensor>& key_rotation,
    std::optional<ScalarType> out_dtype, std::optional<int64_t> high_dims, RopeForm form) {
  const char* op = "kv_attention";
  check_token_heads(op, "q", q, float_dtypes(), {kAnySize, kAnySize, kAnySize});
  check_head_dim(op, "q", q);
  const int64_t tokens = q.size(0), n_q = q.size(1), head_dim = q.size(2);
  if (cache.dim() != 3) fail(op, "cache", "3 dimensions", describe(cache));
  const int64_t n_kv = cache.size(1);
  if (n_kv == 0 || n_q % n_kv != 0) {
    fail(op, "q", "heads that are a multiple of the cache's " + std::to_string(n_kv), describe(q));
  }
  const int64_t page_size = check_cache(op, cache, n_kv, head_dim);
  check_tensor(op, "block_table", block_table, {ScalarType::Int}, {kAnySize, kAnySize});
  const int64_t sequences = block_table.size(0);
  check_tensor(op, "seq_lens", seq_lens, {ScalarType::Int}, {sequences});
  check_tensor(op, "query_starts", query_starts, {ScalarType::Int}, {sequences + 1});
  RopeRotation rope(op, cos, sin, key_rotation, tokens, n_kv, head_dim, form);
  const ScalarType out_type = out_dtype.value_or(q.scalar_type());
  check_float_dtype(op, "out_dtype", out_type);
  if (high_dims && (*high_dims < 0 || *high_dims > head_dim)) {
    fail(op, "high_dims", "0 to " + std::to_string(head_dim), std::to_string(*high_dims));
  }
  const std::vector<int64_t> heads_apart = {tokens, n_q, head_dim},
                             joined = {tokens, n_q * head_dim};
  Tensor out = allocate(q, high_dims ? joined : heads_apart, out_type);
  const double log2_e = 1.4426950408889634;
  const KvAttentionParams params{.q = q.const_data_ptr(),
                                 .out = out.mutable_data_ptr(),
                                 .cache = cache.const_data_ptr<uint8_t>(),
                                 .block_table = block_table.const_data_ptr<int32_t>(),
                                 .cos = RopeRotation::array(op, rope.cos),
                                 .sin = RopeRotation::array(op, rope.sin),
                                 .rotation = RopeRotation::array(op, rope.rotation),
                                 .q_type = float_type(op, "q", q),
                                 .out_type = float_type(op, "out_dtype", out),
                                 .q_stride = token_stride(q),
                                 .n_q = n_q,
                                 .n_kv = n_kv,
                                 .head_dim = head_dim,
                                 .page_size = page_size,
                                 .max_pages = block_table.size(1),
                                 .scale = static_cast<float>(scale * log2_e),
                                 .shared_rotation = rope.shared_rotation(),
                                 .high_dims = high_dims.value_or(0)};
  return {params, rope, out};
}

// The lengths, read on the host (CPU tensors only).
struct KvAttentionLengths {
  int64_t sequences;
  const int32_t* seq_lens;
  const int32_t* query_starts;
};

// query_starts ascends from 0 to at most the rows of q; every length fits its row of the block
// table, and every page that it uses exists.
inline KvAttentionLengths kv_attention_lengths(const KvAttentionCall& call,
                                               const Tensor& block_table, const Tensor& seq_lens,
                                               const Tensor& query_starts, int64_t pages) {
  const char* op = "kv_attention";
  const KvAttentionParams& p = call.params;
  const KvAttentionLengths lengths{block_table.size(0), seq_lens.const_data_ptr<int32_t>(),
                                   query_starts.const_data_ptr<int32_t>()};
  const auto refuse = [op](const char* argument, const std::string& expected, int64_t got,
                           const char* of, int64_t index) {
    std::ostringstream text;
    text << got << " for " << of << " " << index;
    fail(op, argument, expected, text.str());
  };
  const int64_t tokens = call.out.size(0), room = p.max_pages * p.page_size;
  if (lengths.query_starts[0] != 0)
    refuse("query_starts", "0", lengths.query_starts[0], "sequence", 0);
  for (int64_t s = 0; s < lengths.sequences; ++s) {
    const int64_t end = lengths.query_starts[s + 1], length = lengths.seq_lens[s];
    if (end < lengths.query_starts[s] || end > tokens) {
      refuse(
          "query_starts",
          "values that do not descend and are at most " + std::to_string(tokens) + " (rows of q)",
          end, "the end of sequence", s);
    }
    if (length < 0 || length > room) {
      refuse("seq_lens",
             "0 to " + std::to_string(room) + " tokens (block_table's pages x page size)", length,
             "sequence", s);
    }
    for (int64_t i = 0; i < ceil_div(length, p.page_size); ++i) {
      const int32_t page = p.block_table[s * p.max_pages + i];
      if (page < 0 || page >= pages) {
        refuse("block_table", "pages from 0 to " + std::to_string(pages - 1), page,
               "a page of sequence", s);
      }
    }
  }
  return lengths;
}

}  // namespace resq
