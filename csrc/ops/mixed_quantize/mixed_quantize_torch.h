// mixed_quantize between torch and the kernels: checks, outputs, the operator of any device.
#pragma once

#include <tuple>

#include "ops/mixed_quantize/mixed_quantize.h"
#include "torch/tensor.h"

namespace resq {

// A call whose arguments are checked, and the contiguous rows that it reads.
struct MixedQuantizeCall {
  Tensor x;
  MixedOutput out;
  MixedQuantizeParams params;
};

template <class Device>
MixedQuantizeCall prepare_mixed_quantize(const Device& device, const Tensor& x,
                                         const MixedOptions& options) {
  const char* op = "mixed_quantize";
  const FloatType x_type = float_type(op, "x", x);
  const int64_t columns = last_dimension(op, "x", x), rows = row_count(x);
  check_mixed_options(op, columns, options);
  check_rows(op, "x", x);
  const Tensor x_rows = contiguous_rows(x);
  const MixedOutput out = make_mixed_output(x, columns, options, device.packs_activations());
  return {x_rows, out, MixedQuantizeParams{rows, x_rows.const_data_ptr(), x_type, out.rows}};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> mixed_quantize(const Tensor& x, int64_t n_hi, int64_t lo_bits,
                                                  std::optional<bool> packed, bool symmetric,
                                                  double clip) {
  const Device device("mixed_quantize", x);
  const MixedQuantizeCall call =
      prepare_mixed_quantize(device, x, {n_hi, lo_bits, packed, symmetric, clip});
  run(device, call.params);
  return {call.out.q_lo, call.out.q_hi, call.out.params};
}

}  // namespace resq
