#include <torch/csrc/stable/library.h>

#include "ops/mixed_quantize/mixed_quantize_args.h"
#include "torch/cpu_call.h"

#define RESQ_ISA_BODY "ops/mixed_quantize/mixed_quantize_body.h"
#include "cpu/foreach_isa.h"

namespace resq {
namespace {

std::tuple<Tensor, Tensor, Tensor> mixed_quantize(const Tensor& x, int64_t n_hi, int64_t lo_bits,
                                                  std::optional<bool> packed, bool symmetric,
                                                  double clip) {
  const MixedQuantizeCall call =
      mixed_quantize_call(x, {n_hi, lo_bits, packed, symmetric, clip}, /*packed_default=*/false);
  const MixedQuantizeParams& p = call.params;
  const auto kernel = RESQ_ISA_CHOOSE(mixed_quantize_rows);
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
