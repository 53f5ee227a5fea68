// rms_norm_quantize: h = x + residual rounded to x's type, and
//   mixed_quantize(h / sqrt(mean(h^2) + eps) * weight), statistics and product in float32.
// The sum of squares has one order on all devices (cpu/row_norm.h), so they agree on
// every bit.
#pragma once

#include "core/float16.h"
#include "core/quantize.h"
#include "cuda/launch.h"

namespace resq {

struct RmsNormQuantizeParams {
  int64_t rows;
  const void* x;         // [rows, k] of x_type
  const void* residual;  // [rows, k] of x_type; null: none
  void* new_residual;    // [rows, k] of x_type; written only if there is a residual
  FloatType x_type;
  const void* weight;  // [k] of weight_type; null: ones
  FloatType weight_type;
  float eps;
  MixedRows out;
};

namespace cuda {

// Device pointers; 0 < rows < 2^31.
void rms_norm_quantize(const RmsNormQuantizeParams& p, Stream stream);

}  // namespace cuda

}  // namespace resq
