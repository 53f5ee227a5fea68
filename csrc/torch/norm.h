// What the operators of RMSNorm ask of their gain and eps.
#pragma once

#include "torch/tensor.h"

namespace resq {

// Checks the gain of a norm of x's rows, and eps; gives the gain's type, float32 without one.
inline FloatType checked_norm(const char* op, const std::optional<Tensor>& weight, double eps,
                              const Tensor& x, int64_t columns) {
  FloatType type = FloatType::kFloat32;
  if (weight) {
    type = float_type(op, "weight", *weight);
    if (weight->dim() != 1 || weight->size(0) != columns) {
      fail(op, "weight", "[" + std::to_string(columns) + "]", describe(*weight));
    }
    check_device(op, "weight", *weight, x);
  }
  if (!(eps >= 0.0)) fail(op, "eps", "0 or more", std::to_string(eps));
  return type;
}

}  // namespace resq
