// A row's range -> (scale, zero, 1 / scale) without the branches of the compiler's divisions. Host
// code without CUDA headers; tested on the CPU.
#pragma once

#include <cmath>

#include "core/quantize.h"
#include "cuda/quotient.h"

namespace resq::cuda {

struct ScaleZeroInverse {
  float scale, zero, inverse;
};

// asymmetric_scale or symmetric_scale (core/quantize.h) of min <= 0 <= max, 4 or 8 bits, and
// 1 / scale: the same bits. `approximate` gives the device's approximation of 1 / x.
//
// Of x / levels the reciprocal is a constant, so two fma round the quotient once, for every x whose
// quotient is above kMinScale.
template <class Approximate>
RESQ_HOST_DEVICE inline ScaleZeroInverse row_scale(float min, float max, int bits, bool symmetric,
                                                   Approximate approximate) {
  const bool four = bits == 4, zeros = min == 0.0f && max == 0.0f;
  const float levels = four ? (symmetric ? 7.0f : 15.0f) : (symmetric ? 127.0f : 255.0f);
  const float per_level =
      four ? (symmetric ? 1.0f / 7.0f : 1.0f / 15.0f) : (symmetric ? 1.0f / 127.0f : 1.0f / 255.0f);
  const float lowest = zeros ? -1.0f : min;
  float span = symmetric ? (-min > max ? -min : max) : (zeros ? 1.0f : max) - lowest;
  span = symmetric && zeros ? levels : span;
  const float near = span * per_level;
  float scale = std::fma(per_level, std::fma(-levels, near, span), near);
  scale = scale > kMinScale ? scale : kMinScale;
  const float inverse = quotient(1.0f, scale, approximate(scale));
  const bool infinite = !(span < INFINITY);  // of two finite numbers
  const float inverse_or_0 = infinite ? 0.0f : inverse;
  const float zero = std::rint(-lowest * inverse_or_0) - (four ? 8.0f : 128.0f);
  return {infinite ? span : scale, symmetric ? 0.0f : zero, inverse_or_0};
}

}  // namespace resq::cuda
