// rms_norm: y = x / sqrt(mean(x^2) + eps) * weight, computed in float32 and rounded once to x's
// type. The sum of squares has one order on all devices (cpu/row_norm.h), so they agree on every
// bit.
#pragma once

#include "core/float16.h"
#include "cuda/launch.h"

namespace resq {

struct RmsNormParams {
  int64_t rows, columns;
  const void* x;  // [rows, columns] of type
  void* y;        // [rows, columns] of type
  FloatType type;
  const void* weight;  // [columns] of weight_type; null: ones
  FloatType weight_type;
  float eps;
};

namespace cuda {

// Device pointers; 0 < rows < 2^31.
void rms_norm(const RmsNormParams& p, Stream stream);

}  // namespace cuda

}  // namespace resq
