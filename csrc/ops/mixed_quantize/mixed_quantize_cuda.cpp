#include "ops/mixed_quantize/mixed_quantize_cuda.h"

#include "ops/mixed_quantize/mixed_quantize_args.h"
#include "torch/cuda_call.h"

namespace resq {
namespace {

std::tuple<Tensor, Tensor, Tensor> mixed_quantize(const Tensor& x, int64_t n_hi, int64_t lo_bits,
                                                  std::optional<bool> packed, bool symmetric,
                                                  double clip) {
  const cuda::Call on("mixed_quantize", x);
  const MixedQuantizeCall call = mixed_quantize_call(x, {n_hi, lo_bits, packed, symmetric, clip},
                                                     cuda::packs_activations(on.family()));
  cuda::check_row_count("mixed_quantize", "x", call.params.rows);
  if (call.params.rows > 0) cuda::mixed_quantize(call.params, on.stream());
  return {call.out.q_lo, call.out.q_hi, call.out.params};
}

}  // namespace
}  // namespace resq

RESQ_CUDA_IMPL(m) { m.impl("mixed_quantize", TORCH_BOX(&resq::mixed_quantize)); }
