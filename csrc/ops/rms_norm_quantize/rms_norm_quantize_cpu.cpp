#include <torch/csrc/stable/library.h>

#include "ops/rms_norm_quantize/rms_norm_quantize_args.h"
#include "torch/cpu_call.h"

#define RESQ_ISA_BODY "ops/rms_norm_quantize/rms_norm_quantize_body.h"
#include "cpu/foreach_isa.h"

namespace resq {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> rms_norm_quantize(
    const Tensor& x, const std::optional<Tensor>& residual, const std::optional<Tensor>& weight,
    double eps, int64_t n_hi, int64_t lo_bits, std::optional<bool> packed, bool symmetric,
    double clip) {
  const RmsNormQuantizeCall call =
      rms_norm_quantize_call(x, residual, weight, eps, {n_hi, lo_bits, packed, symmetric, clip},
                             /*packed_default=*/false);
  const RmsNormQuantizeParams& p = call.params;
  const auto kernel = RESQ_ISA_CHOOSE(rms_norm_quantize_rows);
  log_cpu_kernel("rms_norm_quantize");
  torch::stable::parallel_for(0, p.rows, rows_per_thread(p.out.k_lo + p.out.k_hi),
                              [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  return {call.out.q_lo, call.out.q_hi, call.out.params, call.new_residual};
}

}  // namespace
}  // namespace resq

STABLE_TORCH_LIBRARY_IMPL(resq, CPU, m) {
  m.impl("rms_norm_quantize", TORCH_BOX(&resq::rms_norm_quantize));
}
