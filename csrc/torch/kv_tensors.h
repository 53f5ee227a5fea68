// Checks of the tensors that the operators of the KV cache share: heads of tokens, the cache.
#pragma once

#include "core/kv_page.h"
#include "torch/tensor.h"

namespace resq {

inline void check_head_dim(const char* op, const char* argument, const Tensor& x) {
  if (x.size(2) != 64 && x.size(2) != 128) {
    fail(op, argument, "a head dimension (the last) of 64 or 128", describe(x));
  }
}

// [tokens, heads, head_dim] with any token stride, as in a slice of the output that q, k and v
// share; each token's heads are contiguous.
inline void check_token_heads(const char* op, const char* argument, const Tensor& x,
                              std::initializer_list<ScalarType> dtypes,
                              const std::vector<int64_t>& sizes) {
  const auto runs = [&](int64_t dim, int64_t step) {
    return x.size(dim) <= 1 || x.stride(dim) == step;
  };
  const bool apart = x.dim() == 3 && runs(2, 1) && runs(1, x.size(2)) &&
                     (x.size(0) <= 1 || x.stride(0) >= x.size(1) * x.size(2));
  check_tensor(op, argument, x, dtypes, sizes, apart, "with contiguous heads");
}

// Where the tokens and queries of each sequence are; returns the number of sequences.
inline int64_t check_sequences(const char* op, const Tensor& block_table, const Tensor& seq_lens,
                               const Tensor& query_starts) {
  check_tensor(op, "block_table", block_table, {ScalarType::Int}, {kAnySize, kAnySize});
  const int64_t sequences = block_table.size(0);
  check_count(op, "block_table", "sequences", sequences);
  check_tensor(op, "seq_lens", seq_lens, {ScalarType::Int}, {sequences});
  check_tensor(op, "query_starts", query_starts, {ScalarType::Int}, {sequences + 1});
  return sequences;
}

// Kernels number the heads of all tokens in 32 bits.
inline void check_heads(const char* op, const char* argument, const Tensor& x) {
  check_count(op, argument, "tokens x heads", x.size(0) * x.size(1));
}

// Distance from one token to the next, in numbers.
inline int64_t token_stride(const Tensor& x) {
  return x.size(0) > 1 ? x.stride(0) : x.size(1) * x.size(2);
}

// uint8 [pages, n_kv, page_size * token_bytes]; returns page_size.
inline int64_t check_cache(const char* op, const Tensor& cache, int64_t n_kv, int64_t head_dim) {
  check_tensor(op, "cache", cache, {ScalarType::Byte}, {kAnySize, n_kv, kAnySize});
  const int64_t token_bytes =
      head_dim == 128 ? KvLayout<128>::kTokenBytes : KvLayout<64>::kTokenBytes;
  const int64_t tile = head_dim == 128 ? KvLayout<128>::kTileTokens : KvLayout<64>::kTileTokens;
  if (cache.size(2) == 0 || cache.size(2) % (tile * token_bytes) != 0) {
    std::ostringstream expected;
    expected << "pages of a multiple of " << tile << " tokens of " << token_bytes << " bytes";
    fail(op, "cache", expected.str(), describe(cache));
  }
  check_count(op, "cache", "bytes of a head's page", cache.size(2));
  return cache.size(2) / token_bytes;
}

}  // namespace resq
