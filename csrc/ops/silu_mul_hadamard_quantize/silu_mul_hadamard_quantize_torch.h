// silu_mul_hadamard_quantize between torch and the kernels: checks, outputs, the operator of any
// device.
#pragma once

#include <cmath>
#include <tuple>

#include "ops/silu_mul_hadamard_quantize/silu_mul_hadamard_quantize.h"
#include "torch/tensor.h"

namespace resq {

template <class Device>
std::tuple<Tensor, Tensor, Tensor> silu_mul_hadamard_quantize(const Tensor& gate_up, bool hadamard,
                                                              int64_t n_hi, int64_t lo_bits,
                                                              std::optional<bool> packed,
                                                              bool symmetric, double clip) {
  const char* op = "silu_mul_hadamard_quantize";
  const Device device(op, gate_up);
  const MixedOptions options{n_hi, lo_bits, packed, symmetric, clip};
  const FloatType type = float_type(op, "gate_up", gate_up);
  const int64_t columns = last_dimension(op, "gate_up", gate_up), rows = row_count(gate_up);
  if (columns % 2 != 0) {
    fail(op, "gate_up", "an even last dimension (gate, then up)", describe(gate_up));
  }
  const int64_t n = columns / 2;
  const HadamardPlan* plan = hadamard ? checked_hadamard_plan(op, "gate_up", n) : nullptr;
  check_mixed_options(op, n, options);
  check_rows(op, "gate_up", gate_up);
  const Tensor input = device.aligned(contiguous_rows(gate_up));
  const MixedOutput out = make_mixed_output(gate_up, n, options, device.packs_activations());
  run(device,
      SiluMulHadamardQuantizeParams{.rows = rows,
                                    .gate_up = input.const_data_ptr(),
                                    .type = type,
                                    .n = n,
                                    .plan = plan,
                                    .scale = plan ? 1.0f / std::sqrt(static_cast<float>(n)) : 1.0f,
                                    .out = out.rows});
  return {out.q_lo, out.q_hi, out.params};
}

}  // namespace resq
