// Quotients without the branches of a division. Host code without CUDA headers; tested on the CPU.
#pragma once

#include <cmath>

#include "core/float16.h"

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

// 2^64 / b, rounded up. For a and b below 2^32 the high half of a * inverse64(b) is a / b: the
// product exceeds 2^64 a / b by at most a < 2^64 / b, which is the distance to the next quotient.
constexpr uint64_t inverse64(uint32_t b) { return ~uint64_t{0} / b + 1; }

}  // namespace resq::cuda
