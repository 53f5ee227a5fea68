// silu_mul_hadamard_quantize between torch and the kernels: checks, outputs, the operator of any
// device.
#pragma once

#include <cmath>
#include <tuple>

#include "ops/silu_mul_hadamard_quantize/silu_mul_hadamard_quantize.h"
#include "torch/tensor.h"

namespace resq {

// The plan of a transform of the whole row of n; null if there is none, or one in blocks.
inline const HadamardPlan* checked_transform(const char* op, const char* rows, int64_t n,
                                             int64_t n_hi, bool hadamard, int64_t hadamard_block) {
  const char* argument = "hadamard_block";
  if (hadamard_block == 0) return hadamard ? checked_hadamard_plan(op, rows, n) : nullptr;
  if (!hadamard) fail(op, argument, "0 without hadamard", std::to_string(hadamard_block));
  const bool power = (hadamard_block & (hadamard_block - 1)) == 0;
  if (!power || hadamard_block < kLeastHadamardBlock || hadamard_block > kMostHadamardBlock) {
    fail(op, argument, "0 (the whole row) or a power of two from 8 to 256",
         std::to_string(hadamard_block));
  }
  if ((n - n_hi) % hadamard_block != 0) {
    fail(op, argument, "a divisor of the " + std::to_string(n - n_hi) + " low columns",
         std::to_string(hadamard_block));
  }
  return nullptr;
}

// A call whose arguments are checked, and the rows that it reads.
struct SiluMulHadamardQuantizeCall {
  Tensor gate_up;
  MixedOutput out;
  SiluMulHadamardQuantizeParams params;
};

template <class Device>
SiluMulHadamardQuantizeCall prepare_silu_mul_hadamard_quantize(const Device& device,
                                                               const Tensor& gate_up, bool hadamard,
                                                               const MixedOptions& options,
                                                               int64_t hadamard_block) {
  const char* op = "silu_mul_hadamard_quantize";
  const FloatType type = float_type(op, "gate_up", gate_up);
  const int64_t columns = last_dimension(op, "gate_up", gate_up), rows = row_count(gate_up);
  if (columns % 2 != 0) {
    fail(op, "gate_up", "an even last dimension (gate, then up)", describe(gate_up));
  }
  const int64_t n = columns / 2;
  check_mixed_options(op, n, options);
  const HadamardPlan* plan =
      checked_transform(op, "gate_up", n, options.n_hi, hadamard, hadamard_block);
  const int64_t block = hadamard_block > 0 ? hadamard_block : 1;
  check_rows(op, "gate_up", gate_up);
  const Tensor input = device.aligned(contiguous_rows(gate_up));
  const MixedOutput out = make_mixed_output(gate_up, n, options, device.packs_activations());
  const SiluMulHadamardQuantizeParams params{
      .rows = rows,
      .gate_up = input.const_data_ptr(),
      .type = type,
      .n = n,
      .plan = plan,
      .block = block,
      .scale = 1.0f / std::sqrt(static_cast<float>(plan ? n : block)),
      .out = out.rows};
  return {input, out, params};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> silu_mul_hadamard_quantize(const Tensor& gate_up, bool hadamard,
                                                              int64_t n_hi, int64_t lo_bits,
                                                              std::optional<bool> packed,
                                                              bool symmetric, double clip,
                                                              int64_t hadamard_block) {
  const Device device("silu_mul_hadamard_quantize", gate_up);
  const SiluMulHadamardQuantizeCall call = prepare_silu_mul_hadamard_quantize(
      device, gate_up, hadamard, {n_hi, lo_bits, packed, symmetric, clip}, hadamard_block);
  run(device, call.params);
  return {call.out.q_lo, call.out.q_hi, call.out.params};
}

}  // namespace resq
