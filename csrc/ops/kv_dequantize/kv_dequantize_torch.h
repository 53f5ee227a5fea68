// kv_dequantize between torch and the kernels: checks, outputs, the operator of any device.
#pragma once

#include <tuple>

#include "ops/kv_dequantize/kv_dequantize.h"
#include "torch/kv_tensors.h"

namespace resq {

template <class Device>
std::tuple<Tensor, Tensor> kv_dequantize(const Tensor& cache, const Tensor& block_table,
                                         const Tensor& seq_lens, int64_t max_tokens,
                                         int64_t head_dim, ScalarType dtype) {
  const char* op = "kv_dequantize";
  const Device device(op, cache);
  if (head_dim != 64 && head_dim != 128) {
    fail(op, "head_dim", "64 or 128", std::to_string(head_dim));
  }
  if (max_tokens < 0) fail(op, "max_tokens", "0 or more", std::to_string(max_tokens));
  if (cache.dim() != 3) fail(op, "cache", "3 dimensions", describe(cache));
  const int64_t n_kv = cache.size(1);
  const int64_t page_size = check_cache(op, cache, n_kv, head_dim);
  check_tensor(op, "block_table", block_table, {ScalarType::Int}, {kAnySize, kAnySize});
  const int64_t sequences = block_table.size(0);
  check_tensor(op, "seq_lens", seq_lens, {ScalarType::Int}, {sequences});
  check_device(op, "block_table", block_table, cache);
  check_device(op, "seq_lens", seq_lens, cache);
  device.check_aligned("cache", cache);
  check_float_dtype(op, "dtype", dtype);
  const std::vector<int64_t> shape = {sequences, max_tokens, n_kv, head_dim};
  const Tensor k = allocate(cache, shape, dtype), v = allocate(cache, shape, dtype);
  run(device, KvDequantizeParams{.k = k.mutable_data_ptr(),
                                 .v = v.mutable_data_ptr(),
                                 .cache = cache.const_data_ptr<uint8_t>(),
                                 .block_table = block_table.const_data_ptr<int32_t>(),
                                 .seq_lens = seq_lens.const_data_ptr<int32_t>(),
                                 .type = float_type(op, "dtype", k),
                                 .sequences = sequences,
                                 .max_tokens = max_tokens,
                                 .n_kv = n_kv,
                                 .head_dim = head_dim,
                                 .page_size = page_size,
                                 .max_pages = block_table.size(1),
                                 .pages = cache.size(0),
                                 .tiles = ceil_div(max_tokens, kv_tile_tokens(head_dim))});
  return {k, v};
}

}  // namespace resq
