#include "ops/rms_norm_quantize/rms_norm_quantize_cuda.h"

#include "ops/rms_norm_quantize/rms_norm_quantize_args.h"
#include "torch/cuda_call.h"

namespace resq {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> rms_norm_quantize(
    const Tensor& x, const std::optional<Tensor>& residual, const std::optional<Tensor>& weight,
    double eps, int64_t n_hi, int64_t lo_bits, std::optional<bool> packed, bool symmetric,
    double clip) {
  const cuda::Call on("rms_norm_quantize", x);
  const RmsNormQuantizeCall call =
      rms_norm_quantize_call(x, residual, weight, eps, {n_hi, lo_bits, packed, symmetric, clip},
                             cuda::packs_activations(on.family()));
  cuda::check_row_count("rms_norm_quantize", "x", call.params.rows);
  if (call.params.rows > 0) cuda::rms_norm_quantize(call.params, on.stream());
  return {call.out.q_lo, call.out.q_hi, call.out.params, call.new_residual};
}

}  // namespace
}  // namespace resq

RESQ_CUDA_IMPL(m) { m.impl("rms_norm_quantize", TORCH_BOX(&resq::rms_norm_quantize)); }
