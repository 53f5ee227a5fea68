// kv_attention between torch and the kernels: checks, output, the operator of any device.
#pragma once

#include <cmath>

#include "ops/kv_attention/kv_attention.h"
#include "torch/kv_tensors.h"

namespace resq {

// A call whose arguments are checked.
struct KvAttentionCall {
  Tensor out;
  KvAttentionParams params;
  KvAttentionBatch batch;
};

template <class Device>
KvAttentionCall prepare_kv_attention(const Device& device, const Tensor& q, const Tensor& cache,
                                     const Tensor& block_table, const Tensor& seq_lens,
                                     const Tensor& query_starts, double scale,
                                     std::optional<ScalarType> out_dtype,
                                     std::optional<int64_t> head_dim_hi) {
  const char* op = "kv_attention";
  check_token_heads(op, "q", q, float_dtypes(), {kAnySize, kAnySize, kAnySize});
  check_head_dim(op, "q", q);
  check_heads(op, "q", q);
  const int64_t tokens = q.size(0), n_q = q.size(1), head_dim = q.size(2);
  if (cache.dim() != 3) fail(op, "cache", "3 dimensions", describe(cache));
  const int64_t n_kv = cache.size(1);
  if (n_kv == 0 || n_q % n_kv != 0) {
    fail(op, "q", "heads that are a multiple of the cache's " + std::to_string(n_kv), describe(q));
  }
  const int64_t page_size = check_cache(op, cache, n_kv, head_dim);
  const int64_t sequences = check_sequences(op, block_table, seq_lens, query_starts);
  check_device(op, "cache", cache, q);
  check_device(op, "block_table", block_table, q);
  check_device(op, "seq_lens", seq_lens, q);
  check_device(op, "query_starts", query_starts, q);
  device.check_aligned_tokens("q", q);
  device.check_aligned("cache", cache);
  const ScalarType out_type = out_dtype.value_or(q.scalar_type());
  check_float_dtype(op, "out_dtype", out_type);
  if (head_dim_hi && (*head_dim_hi < 0 || *head_dim_hi > head_dim)) {
    fail(op, "head_dim_hi", "0 to " + std::to_string(head_dim), std::to_string(*head_dim_hi));
  }
  const std::vector<int64_t> heads_apart = {tokens, n_q, head_dim},
                             joined = {tokens, n_q * head_dim};
  const Tensor out = allocate(q, head_dim_hi ? joined : heads_apart, out_type);
  const double log2_e = 1.4426950408889634;
  const KvAttentionParams params{.q = {q.const_data_ptr(), float_type(op, "q", q)},
                                 .out = out.mutable_data_ptr(),
                                 .cache = cache.const_data_ptr<uint8_t>(),
                                 .block_table = block_table.const_data_ptr<int32_t>(),
                                 .out_type = float_type(op, "out_dtype", out),
                                 .q_stride = token_stride(q),
                                 .n_q = n_q,
                                 .n_kv = n_kv,
                                 .head_dim = head_dim,
                                 .page_size = page_size,
                                 .max_pages = block_table.size(1),
                                 .scale = static_cast<float>(scale * log2_e),
                                 .head_dim_hi = head_dim_hi.value_or(0)};
  const KvAttentionBatch batch{.seq_lens = seq_lens.const_data_ptr<int32_t>(),
                               .query_starts = query_starts.const_data_ptr<int32_t>(),
                               .tokens = tokens,
                               .sequences = sequences,
                               .pages = cache.size(0)};
  return {out, params, batch};
}

template <class Device>
Tensor kv_attention(const Tensor& q, const Tensor& cache, const Tensor& block_table,
                    const Tensor& seq_lens, const Tensor& query_starts, double scale,
                    std::optional<ScalarType> out_dtype, std::optional<int64_t> head_dim_hi) {
  const Device device("kv_attention", q);
  const KvAttentionCall call = prepare_kv_attention(device, q, cache, block_table, seq_lens,
                                                    query_starts, scale, out_dtype, head_dim_hi);
  run(device, call.params, call.batch);
  return call.out;
}

}  // namespace resq
