// Tensors of rms_norm_quantize -> checked RmsNormQuantizeParams; the outputs are allocated here.
#pragma once

#include "ops/rms_norm_quantize/rms_norm_quantize.h"
#include "torch/mixed_rows.h"

namespace resq {

struct RmsNormQuantizeCall {
  RmsNormQuantizeParams params;
  MixedOutput out;
  Tensor new_residual;
  Tensor x, residual, weight;  // contiguous; params point into them
};

inline bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t i = 0; i < a.dim(); ++i) {
    if (a.size(i) != b.size(i)) return false;
  }
  return true;
}

inline RmsNormQuantizeCall rms_norm_quantize_call(const Tensor& x,
                                                  const std::optional<Tensor>& residual,
                                                  const std::optional<Tensor>& weight, double eps,
                                                  const MixedOptions& options,
                                                  bool packed_default) {
  const char* op = "rms_norm_quantize";
  const FloatType x_type = float_type(op, "x", x);
  const int64_t columns = last_dimension(op, "x", x);
  if (residual && (!same_shape(*residual, x) || residual->scalar_type() != x.scalar_type())) {
    fail(op, "residual", "x's dtype and shape, " + describe(x), describe(*residual));
  }
  if (residual) check_device(op, "residual", *residual, x);
  FloatType weight_type = FloatType::kFloat32;
  if (weight) {
    weight_type = float_type(op, "weight", *weight);
    if (weight->dim() != 1 || weight->size(0) != columns) {
      fail(op, "weight", "[" + std::to_string(columns) + "]", describe(*weight));
    }
    check_device(op, "weight", *weight, x);
  }
  if (!(eps >= 0.0)) fail(op, "eps", "0 or more", std::to_string(eps));
  check_mixed_options(op, columns, options);

  const Tensor x_rows = contiguous_rows(x);
  const Tensor residual_rows = residual ? contiguous_rows(*residual) : x_rows;
  const Tensor weight_row = weight ? contiguous_rows(*weight) : x_rows;
  const MixedOutput out = make_mixed_output(x, columns, options, packed_default);
  // An operator may not return its input: without a residual the caller takes x itself.
  const std::vector<int64_t> sum_sizes = residual ? with_last(x, columns) : std::vector<int64_t>{0};
  const Tensor new_residual = allocate(x, sum_sizes, x.scalar_type());
  return {{.rows = row_count(x),
           .x = x_rows.const_data_ptr(),
           .residual = residual ? residual_rows.const_data_ptr() : nullptr,
           .new_residual = new_residual.mutable_data_ptr(),
           .x_type = x_type,
           .weight = weight ? weight_row.const_data_ptr() : nullptr,
           .weight_type = weight_type,
           .eps = static_cast<float>(eps),
           .out = out.rows},
          out,
          new_residual,
          x_rows,
          residual_rows,
          weight_row};
}

}  // namespace resq
