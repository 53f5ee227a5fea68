// mixed_gemm between torch and the kernels: checks, output, the operator of any device.
#pragma once

#include "ops/mixed_gemm/mixed_gemm.h"
#include "torch/tensor.h"

namespace resq {

// `bytes` is what the device's layout needs for p's shape.
inline void check_packed_bytes(const MixedGemmParams& p, const Tensor& packed_weight,
                               int64_t bytes) {
  if (packed_weight.size(0) == bytes) return;
  std::ostringstream expected, got;
  expected << bytes << " bytes for " << p.n << " rows (weight_scale) x (" << p.k_lo << " | "
           << p.k_hi << ") columns (q_lo | q_hi)";
  got << packed_weight.size(0) << " bytes";
  fail("mixed_gemm", "packed_weight", expected.str(), got.str());
}

inline void check_part_columns(const char* argument, int64_t columns) {
  if (columns <= kMostPartColumns) return;
  fail("mixed_gemm", argument,
       "at most " + std::to_string(kMostPartColumns) + " columns (sums are exact in 32 bits)",
       std::to_string(columns));
}

// A call whose arguments are checked.
struct MixedGemmCall {
  Tensor out;
  MixedGemmParams params;
};

template <class Device>
MixedGemmCall prepare_mixed_gemm(const Device& device, const Tensor& q_lo, const Tensor& q_hi,
                                 const Tensor& params, const Tensor& packed_weight,
                                 const Tensor& weight_scale, const Tensor& weight_sum,
                                 const std::optional<Tensor>& bias, ScalarType out_dtype) {
  const char* op = "mixed_gemm";
  const int64_t lo_bytes = last_dimension(op, "q_lo", q_lo);
  check_tensor(op, "q_lo", q_lo, {ScalarType::Byte, ScalarType::Char}, with_last(q_lo, lo_bytes));
  const bool packed = q_lo.scalar_type() == ScalarType::Byte;
  const int64_t k_lo = lo_bytes * (packed ? 2 : 1);
  if (k_lo % 2 != 0) fail(op, "q_lo", "an even number of columns", describe(q_lo));
  check_count(op, "q_lo", "rows", row_count(q_lo));
  check_part_columns("q_lo", k_lo);
  check_tensor(op, "q_hi", q_hi, {ScalarType::Char}, with_last(q_lo, kAnySize));
  const int64_t k_hi = last_dimension(op, "q_hi", q_hi);
  check_part_columns("q_hi", k_hi);
  check_tensor(op, "params", params, {ScalarType::Float}, with_last(q_lo, 4));
  check_tensor(op, "packed_weight", packed_weight, {ScalarType::Byte}, {kAnySize});
  check_tensor(op, "weight_scale", weight_scale, {ScalarType::Float}, {kAnySize, 2});
  const int64_t n = weight_scale.size(0);
  check_count(op, "weight_scale", "rows", n);
  check_tensor(op, "weight_sum", weight_sum, {ScalarType::Int}, {n, 2});
  if (bias) {
    check_tensor(op, "bias", *bias, float_dtypes(), {n});
    check_device(op, "bias", *bias, q_lo);
  }
  const struct {
    const char* name;
    const Tensor& tensor;
  } operands[] = {{"q_lo", q_lo},
                  {"q_hi", q_hi},
                  {"params", params},
                  {"packed_weight", packed_weight},
                  {"weight_scale", weight_scale},
                  {"weight_sum", weight_sum}};
  for (const auto& [name, tensor] : operands) check_device(op, name, tensor, q_lo);
  check_float_dtype(op, "out_dtype", out_dtype);

  const Tensor out = allocate(q_lo, with_last(q_lo, n), out_dtype);
  const MixedGemmParams p{.m = row_count(q_lo),
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
                          .bias_type = bias ? float_type(op, "bias", *bias) : FloatType::kFloat32,
                          .out = out.mutable_data_ptr(),
                          .out_type = float_type(op, "out", out)};
  check_packed_bytes(p, packed_weight, device.packed_weight_bytes(n, k_lo, k_hi));
  for (const auto& [name, tensor] : operands) device.check_aligned(name, tensor);
  return {out, p};
}

template <class Device>
Tensor mixed_gemm(const Tensor& q_lo, const Tensor& q_hi, const Tensor& params,
                  const Tensor& packed_weight, const Tensor& weight_scale, const Tensor& weight_sum,
                  const std::optional<Tensor>& bias, ScalarType out_dtype) {
  const Device device("mixed_gemm", q_lo);
  const MixedGemmCall call = prepare_mixed_gemm(device, q_lo, q_hi, params, packed_weight,
                                                weight_scale, weight_sum, bias, out_dtype);
  run(device, call.params);
  return call.out;
}

}  // namespace resq
