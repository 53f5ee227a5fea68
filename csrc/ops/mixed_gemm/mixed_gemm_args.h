// Tensors of mixed_gemm -> checked MixedGemmParams; the output is allocated here. The packed
// weight's size is checked by the device that owns the layout.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

#include "ops/mixed_gemm/mixed_gemm.h"
#include "torch/check.h"

namespace resq {

inline FloatType float_type(ScalarType dtype) {
  if (dtype == ScalarType::Float) return FloatType::kFloat32;
  return dtype == ScalarType::Half ? FloatType::kFloat16 : FloatType::kBFloat16;
}

struct MixedGemmCall {
  MixedGemmParams params;
  Tensor out;
};

inline MixedGemmCall mixed_gemm_call(const Tensor& q_lo, const Tensor& q_hi, const Tensor& params,
                                     const Tensor& packed_weight, const Tensor& weight_scale,
                                     const Tensor& weight_sum, const std::optional<Tensor>& bias,
                                     ScalarType out_dtype) {
  const char* op = "mixed_gemm";
  const auto floats = {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16};
  if (q_lo.dim() == 0) fail(op, "q_lo", "at least one dimension", describe(q_lo));
  const int64_t last = q_lo.dim() - 1;
  std::vector<int64_t> sizes(q_lo.sizes().begin(), q_lo.sizes().end());
  check_tensor(op, "q_lo", q_lo, {ScalarType::Byte, ScalarType::Char}, sizes);
  const bool packed = q_lo.scalar_type() == ScalarType::Byte;
  const int64_t k_lo = q_lo.size(last) * (packed ? 2 : 1);
  if (k_lo % 2 != 0) fail(op, "q_lo", "an even number of columns", describe(q_lo));
  sizes[last] = kAnySize;
  check_tensor(op, "q_hi", q_hi, {ScalarType::Char}, sizes);
  const int64_t k_hi = q_hi.size(last);
  sizes[last] = 4;
  check_tensor(op, "params", params, {ScalarType::Float}, sizes);
  check_tensor(op, "weight_scale", weight_scale, {ScalarType::Float}, {kAnySize, 2});
  const int64_t n = weight_scale.size(0);
  check_tensor(op, "weight_sum", weight_sum, {ScalarType::Int}, {n, 2});
  check_tensor(op, "packed_weight", packed_weight, {ScalarType::Byte}, {kAnySize});
  if (bias) check_tensor(op, "bias", *bias, floats, {n});
  bool float_out = false;
  for (ScalarType dtype : floats) float_out |= out_dtype == dtype;
  if (!float_out) fail(op, "out_dtype", "float32 or float16 or bfloat16", dtype_name(out_dtype));
  for (const Tensor* tensor : {&q_hi, &params, &packed_weight, &weight_scale, &weight_sum}) {
    check_device(op, "every tensor", *tensor, q_lo);
  }
  if (bias) check_device(op, "bias", *bias, q_lo);

  int64_t rows = 1;
  for (int64_t i = 0; i < last; ++i) rows *= sizes[i];
  sizes[last] = n;
  Tensor out = torch::stable::new_empty(q_lo, sizes, out_dtype);
  return {{.rows = rows,
           .n = n,
           .k_lo = k_lo,
           .k_hi = k_hi,
           .q_lo = q_lo.const_data_ptr(),
           .q_lo_packed = packed,
           .q_hi = q_hi.const_data_ptr<int8_t>(),
           .params = params.const_data_ptr<float>(),
           .packed_weight = packed_weight.const_data_ptr<uint8_t>(),
           .weight_scale = weight_scale.const_data_ptr<float>(),
           .weight_sum = weight_sum.const_data_ptr<int32_t>(),
           .bias = bias ? bias->const_data_ptr() : nullptr,
           .bias_type = bias ? float_type(bias->scalar_type()) : FloatType::kFloat32,
           .out = out.mutable_data_ptr(),
           .out_type = float_type(out_dtype)},
          out};
}

}  // namespace resq
