// Range -> (scale, zero), value -> code, code -> value: the rounding rules of docs/formats.md.
// Every operation is one correctly rounded float32 operation, so all devices agree bit for bit.
#pragma once

#include <cmath>

#include "core/host_device.h"

namespace resq {

// Smallest scale: keeps 1/scale and every product of the epilogue finite and normal.
inline constexpr float kMinScale = 0x1p-60f;

struct ScaleZero {
  float scale;
  float zero;  // integer-valued
};

// Asymmetric: the range is widened to contain 0, a row of zeros gets [-1, 1]. Codes are signed, in
// [-2^(bits-1), 2^(bits-1) - 1]; x ~ scale * (code - zero). `min` and `max` are the row's extremes,
// in the low part already multiplied by the clip factor.
RESQ_HOST_DEVICE inline ScaleZero asymmetric_scale(float min, float max, int bits) {
  min = min < 0.0f ? min : 0.0f;
  max = max > 0.0f ? max : 0.0f;
  if (min == 0.0f && max == 0.0f) {
    min = -1.0f;
    max = 1.0f;
  }
  const float levels = static_cast<float>((1 << bits) - 1);
  float scale = (max - min) / levels;
  scale = scale > kMinScale ? scale : kMinScale;
  const float half = static_cast<float>(1 << (bits - 1));
  return {scale, rintf(-min * (1.0f / scale)) - half};
}

// Symmetric: zero = 0, scale = max(|min|, |max|) / (2^(bits-1) - 1); a row of zeros gets 1.
RESQ_HOST_DEVICE inline ScaleZero symmetric_scale(float min, float max, int bits) {
  const float amax = -min > max ? -min : max;
  if (!(amax > 0.0f)) return {1.0f, 0.0f};
  const float scale = amax / static_cast<float>((1 << (bits - 1)) - 1);
  return {scale > kMinScale ? scale : kMinScale, 0.0f};
}

// round(x * inv_scale) + zero, clamped: half to even, then the integer zero, then the clamp.
RESQ_HOST_DEVICE inline int8_t quantize_code(float x, float inv_scale, float zero, int bits) {
  const float half = static_cast<float>(1 << (bits - 1));
  const float code = rintf(x * inv_scale) + zero;
  return static_cast<int8_t>(code < -half ? -half : (code > half - 1.0f ? half - 1.0f : code));
}

// Where the rows of a MixedTensor are written, and how: a member of every quantizing op's params.
struct MixedRows {
  void* q_lo;      // packed: uint8 [rows, k_lo / 2], else int8 [rows, k_lo]
  int8_t* q_hi;    // [rows, k_hi]
  float* params;   // [rows, 4] = (scale_lo, zero_lo, scale_hi, zero_hi)
  int64_t k_lo;    // columns of the low part; even if packed
  int64_t k_hi;    // columns of the high part
  int lo_bits;     // 4 or 8
  bool packed;     // two 4-bit codes a byte
  bool symmetric;  // zero = 0
  float clip;      // factor on the low part's range, in (0, 1]
};

}  // namespace resq
