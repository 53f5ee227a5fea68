// Tensors of silu_mul_hadamard_quantize -> checked SiluMulHadamardQuantizeParams; the outputs are
// allocated here.
#pragma once

#include <cmath>

#include "ops/silu_mul_hadamard_quantize/silu_mul_hadamard_quantize.h"
#include "torch/hadamard_plan.h"
#include "torch/mixed_rows.h"

namespace resq {

struct SiluMulHadamardQuantizeCall {
  SiluMulHadamardQuantizeParams params;
  MixedOutput out;
  Tensor gate_up;  // contiguous; params point into it
};

inline SiluMulHadamardQuantizeCall silu_mul_hadamard_quantize_call(const Tensor& gate_up,
                                                                   bool hadamard,
                                                                   const MixedOptions& options,
                                                                   bool packed_default) {
  const char* op = "silu_mul_hadamard_quantize";
  const FloatType type = float_type(op, "gate_up", gate_up);
  const int64_t columns = last_dimension(op, "gate_up", gate_up);
  if (columns % 2 != 0) {
    fail(op, "gate_up", "an even last dimension (gate, then up)", describe(gate_up));
  }
  const int64_t n = columns / 2;
  const HadamardPlan* plan = hadamard ? checked_hadamard_plan(op, "gate_up", n) : nullptr;
  check_mixed_options(op, n, options);
  const Tensor rows = contiguous_rows(gate_up);
  const MixedOutput out = make_mixed_output(gate_up, n, options, packed_default);
  return {{.rows = row_count(gate_up),
           .gate_up = rows.const_data_ptr(),
           .type = type,
           .n = n,
           .plan = plan,
           .scale = plan ? 1.0f / std::sqrt(static_cast<float>(n)) : 1.0f,
           .out = out.rows},
          out,
          rows};
}

}  // namespace resq
