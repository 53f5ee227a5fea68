// Float quotients without the branches of a division. Host code without CUDA headers; tested on the
// CPU.
#pragma once

#include <cmath>

#include "core/host_device.h"

namespace resq::cuda {

// x / d rounded once, for the device's approximation of 1 / d: the instructions of __fdiv_rn, which
// also tests the operands and makes a branch of every division.
RESQ_HOST_DEVICE inline float quotient(float x, float d, float reciprocal) {
  const float r = std::fma(reciprocal, std::fma(-d, reciprocal, 1.0f), reciprocal);
  const float q = x * r;
  return std::fma(r, std::fma(-d, q, x), q);
}

// Gates x for which quotient(x, 1 + e^-x) is right: the divisor is below 2^120, and the remainder
// is no subnormal number. Not 0, which loses its sign.
RESQ_HOST_DEVICE inline bool has_plain_quotient(float x) {
  return std::fabs(x) > 0x1p-96f && std::fabs(x) < 83.0f;
}

}  // namespace resq::cuda
