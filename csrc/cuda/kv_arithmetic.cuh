// The arithmetic of kv_range (core/kv_page.h) in instructions of a device, without branches.
#pragma once

#include "core/kv_page.h"
#include "cuda/numbers.cuh"
#include "cuda/quotient.h"

namespace resq::cuda {

struct DeviceKvArithmetic {
  __device__ static Half half(float value) { return {__half_as_ushort(__float2half_rn(value))}; }
  __device__ static float value(Half half) { return number(half); }
  // No width needs a slow path: levels are integers, so the remainder is a multiple of the last
  // place of the quotient, and exact.
  __device__ static float share(float width, int levels) {
    return levels == kKvLowLevels ? quotient(width, kKvLowLevels, 1.0f / kKvLowLevels)
                                  : quotient(width, kKvHighLevels, 1.0f / kKvHighLevels);
  }
  __device__ static float inverse(float scale) {
    return quotient(1.0f, scale, approximate_reciprocal(scale));
  }
};

}  // namespace resq::cuda
