#include <torch/csrc/stable/library.h>

#include "ops/silu_mul_hadamard_quantize/silu_mul_hadamard_quantize.h"
#include "torch/hadamard_plan.h"
#include "torch/mixed_rows.h"

namespace resq {
namespace {

std::tuple<Tensor, Tensor, Tensor> silu_mul_hadamard_quantize(const Tensor& gate_up, bool hadamard,
                                                              int64_t n_hi, int64_t lo_bits,
                                                              std::optional<bool> packed,
                                                              bool symmetric, double clip) {
  const char* op = "silu_mul_hadamard_quantize";
  const MixedOptions options{n_hi, lo_bits, packed, symmetric, clip};
  const FloatType type = float_type(op, "gate_up", gate_up);
  const int64_t columns = last_dimension(op, "gate_up", gate_up);
  if (columns % 2 != 0) {
    fail(op, "gate_up", "an even last dimension (gate, then up)", describe(gate_up));
  }
  const int64_t n = columns / 2;
  const HadamardPlan* plan = hadamard ? checked_hadamard_plan(op, "gate_up", n) : nullptr;
  check_mixed_options(op, n, options);
  const Tensor rows = torch::stable::contiguous(gate_up);
  const MixedOutput out = make_mixed_output(gate_up, n, options, /*packed_default=*/false);
  const SiluMulHadamardQuantizeParams params{rows.const_data_ptr(), type, n, plan, out.rows};
  const auto kernel = RESQ_ROWS_KERNEL(silu_mul_hadamard_quantize);
  torch::stable::parallel_for(0, row_count(gate_up), rows_per_thread(n),
                              [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
  return {out.q_lo, out.q_hi, out.params};
}

}  // namespace
}  // namespace resq

STABLE_TORCH_LIBRARY_IMPL(resq, CPU, m) {
  m.impl("silu_mul_hadamard_quantize", TORCH_BOX(&resq::silu_mul_hadamard_quantize));
}
