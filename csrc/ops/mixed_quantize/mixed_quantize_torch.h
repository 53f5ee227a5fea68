// mixed_quantize between torch and the kernels: checks, outputs, the operator of any device.
#pragma once

#include <tuple>

#include "ops/mixed_quantize/mixed_quantize.h"
#include "torch/tensor.h"

namespace resq {

template <class Device>
std::tuple<Tensor, Tensor, Tensor> mixed_quantize(const Tensor& x, int64_t n_hi, int64_t lo_bits,
                                                  std::optional<bool> packed, bool symmetric,
                                                  double clip) {
  const char* op = "mixed_quantize";
  const Device device(op, x);
  const MixedOptions options{n_hi, lo_bits, packed, symmetric, clip};
  const FloatType x_type = float_type(op, "x", x);
  const int64_t columns = last_dimension(op, "x", x), rows = row_count(x);
  check_mixed_options(op, columns, options);
  check_rows(op, "x", x);
  const Tensor x_rows = contiguous_rows(x);
  const MixedOutput out = make_mixed_output(x, columns, options, device.packs_activations());
  run(device, MixedQuantizeParams{rows, x_rows.const_data_ptr(), x_type, out.rows});
  return {out.q_lo, out.q_hi, out.params};
}

}  // namespace resq
