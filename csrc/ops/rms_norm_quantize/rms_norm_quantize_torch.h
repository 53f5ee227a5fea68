// rms_norm_quantize between torch and the kernels: checks, outputs, the operator of any device.
#pragma once

#include <tuple>

#include "ops/rms_norm_quantize/rms_norm_quantize.h"
#include "torch/norm.h"
#include "torch/tensor.h"

namespace resq {

// A call whose arguments are checked, and the contiguous rows that it reads.
struct RmsNormQuantizeCall {
  Tensor x, residual, weight;
  MixedOutput out;
  Tensor new_residual;
  RmsNormQuantizeParams params;
};

template <class Device>
RmsNormQuantizeCall prepare_rms_norm_quantize(const Device& device, const Tensor& x,
                                              const std::optional<Tensor>& residual,
                                              const std::optional<Tensor>& weight, double eps,
                                              const MixedOptions& options) {
  const char* op = "rms_norm_quantize";
  const FloatType x_type = float_type(op, "x", x);
  const int64_t columns = last_dimension(op, "x", x), rows = row_count(x);
  if (residual &&
      (sizes_of(*residual) != sizes_of(x) || residual->scalar_type() != x.scalar_type())) {
    fail(op, "residual", "x's dtype and shape, " + describe(x), describe(*residual));
  }
  if (residual) check_device(op, "residual", *residual, x);
  const FloatType weight_type = checked_norm(op, weight, eps, x, columns);
  check_mixed_options(op, columns, options);
  check_rows(op, "x", x);

  const Tensor x_rows = contiguous_rows(x);
  const Tensor residual_rows = residual ? contiguous_rows(*residual) : x_rows;
  const Tensor weight_row = weight ? contiguous_rows(*weight) : x_rows;
  const MixedOutput out = make_mixed_output(x, columns, options, device.packs_activations());
  // An operator may not return its input: without a residual the caller takes x itself.
  const std::vector<int64_t> sum_sizes = residual ? sizes_of(x) : std::vector<int64_t>{0};
  const Tensor new_residual = allocate(x, sum_sizes, x.scalar_type());
  const RmsNormQuantizeParams params{
      .rows = rows,
      .x = x_rows.const_data_ptr(),
      .residual = residual ? residual_rows.const_data_ptr() : nullptr,
      .new_residual = new_residual.mutable_data_ptr(),
      .x_type = x_type,
      .weight = weight ? weight_row.const_data_ptr() : nullptr,
      .weight_type = weight_type,
      .eps = static_cast<float>(eps),
      .out = out.rows};
  return {x_rows, residual_rows, weight_row, out, new_residual, params};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> rms_norm_quantize(
    const Tensor& x, const std::optional<Tensor>& residual, const std::optional<Tensor>& weight,
    double eps, int64_t n_hi, int64_t lo_bits, std::optional<bool> packed, bool symmetric,
    double clip) {
  const Device device("rms_norm_quantize", x);
  const RmsNormQuantizeCall call = prepare_rms_norm_quantize(
      device, x, residual, weight, eps, {n_hi, lo_bits, packed, symmetric, clip});
  run(device, call.params);
  return {call.out.q_lo, call.out.q_hi, call.out.params, call.new_residual};
}

}  // namespace resq
