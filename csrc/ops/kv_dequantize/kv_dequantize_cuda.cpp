#include "ops/kv_dequantize/kv_dequantize_cuda.h"

#include <tuple>

#include "ops/kv_dequantize/kv_dequantize_args.h"
#include "torch/cuda_call.h"

namespace resq {
namespace {

std::tuple<Tensor, Tensor> kv_dequantize(const Tensor& cache, const Tensor& block_table,
                                         const Tensor& seq_lens, int64_t max_tokens,
                                         int64_t head_dim, ScalarType dtype) {
  const char* op = "kv_dequantize";
  const cuda::Call on(op, cache);
  check_device(op, "block_table", block_table, cache);
  check_device(op, "seq_lens", seq_lens, cache);
  cuda::check_aligned(op, "cache", cache);
  const KvDequantizeCall call =
      kv_dequantize_call(cache, block_table, seq_lens, max_tokens, head_dim, dtype);
  cuda::kv_dequantize(call.params, on.stream());
  return {call.k, call.v};
}

}  // namespace
}  // namespace resq

RESQ_CUDA_IMPL(m) { m.impl("kv_dequantize", TORCH_BOX(&resq::kv_dequantize)); }
