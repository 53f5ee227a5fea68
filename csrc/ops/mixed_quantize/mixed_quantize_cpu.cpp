#include <torch/csrc/stable/library.h>

#include "cpu/variants.h"
#include "ops/mixed_quantize/mixed_quantize_args.h"
#include "torch/cpu_call.h"

namespace resq {
namespace cpu {
RESQ_DECLARE_ROWS_KERNEL(mixed_quantize, MixedQuantizeParams)
}
namespace {

std::tuple<Tensor, Tensor, Tensor> mixed_quantize(const Tensor& x, int64_t n_hi, int64_t lo_bits,
                                                  std::optional<bool> packed, bool symmetric,
                                                  double clip) {
  const MixedQuantizeCall call =
      mixed_quantize_call(x, {n_hi, lo_bits, packed, symmetric, clip}, /*packed_default=*/false);
  const MixedQuantizeParams& p = call.params;
  const auto kernel = RESQ_ROWS_KERNEL(mixed_quantize);
  log_cpu_kernel("mixed_quantize");
  torch::stable::parallel_for(0, p.rows, rows_per_thread(p.out.k_lo + p.out.k_hi),
                              [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  return {call.out.q_lo, call.out.q_hi, call.out.params};
}

}  // namespace
}  // namespace resq

STABLE_TORCH_LIBRARY_IMPL(resq, CPU, m) {
  m.impl("mixed_quantize", TORCH_BOX(&resq::mixed_quantize));
}
