#include <torch/csrc/stable/library.h>

#include "ops/silu_mul_hadamard_quantize/silu_mul_hadamard_quantize_args.h"
#include "torch/cpu_call.h"

#define RESQ_ISA_BODY "ops/silu_mul_hadamard_quantize/silu_mul_hadamard_quantize_body.h"
#include "cpu/foreach_isa.h"

namespace resq {
namespace {

std::tuple<Tensor, Tensor, Tensor> silu_mul_hadamard_quantize(const Tensor& gate_up, bool hadamard,
                                                              int64_t n_hi, int64_t lo_bits,
                                                              std::optional<bool> packed,
                                                              bool symmetric, double clip) {
  const SiluMulHadamardQuantizeCall call = silu_mul_hadamard_quantize_call(
      gate_up, hadamard, {n_hi, lo_bits, packed, symmetric, clip}, /*packed_default=*/false);
  const SiluMulHadamardQuantizeParams& p = call.params;
  const auto kernel = RESQ_ISA_CHOOSE(silu_mul_hadamard_quantize_rows);
  log_cpu_kernel("silu_mul_hadamard_quantize");
  torch::stable::parallel_for(0, p.rows, rows_per_thread(p.n),
                              [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  return {call.out.q_lo, call.out.q_hi, call.out.params};
}

}  // namespace
}  // namespace resq

STABLE_TORCH_LIBRARY_IMPL(resq, CPU, m) {
  m.impl("silu_mul_hadamard_quantize", TORCH_BOX(&resq::silu_mul_hadamard_quantize));
}
