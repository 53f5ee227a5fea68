// float16 and bfloat16 <-> float32 in integer arithmetic: round to nearest even, subnormals kept,
// the bits that F16C and torch give. The portable kernels convert with it; tests prove it against
// all 65,536 inputs.
#pragma once

#include <bit>

#include "core/host_device.h"

namespace resq {

enum class FloatType { kFloat32, kFloat16, kBFloat16 };

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// Numbers of any of the types; `data` is null for an optional argument that is not given.
struct FloatArray {
  const void* data;
  FloatType type;

  const float* floats() const { return static_cast<const float*>(data); }  // kFloat32
};

RESQ_HOST_DEVICE inline float to_float(float value) { return value; }

RESQ_HOST_DEVICE inline float to_float(BFloat16 value) {
  return std::bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}

RESQ_HOST_DEVICE inline float to_float(Half value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
  const uint32_t magnitude = value.bits & 0x7fff;
  if (magnitude < 0x0400) {  // zero or subnormal: a multiple of 2^-24
    const float absolute = static_cast<float>(magnitude) * 0x1p-24f;
    return std::bit_cast<float>(std::bit_cast<uint32_t>(absolute) | sign);
  }
  if (magnitude < 0x7c00) {
    return std::bit_cast<float>(((magnitude << 13) + ((127u - 15u) << 23)) | sign);
  }
  const uint32_t quiet = magnitude > 0x7c00 ? 0x00400000 : 0;
  return std::bit_cast<float>(sign | 0x7f800000 | ((magnitude & 0x03ff) << 13) | quiet);
}

RESQ_HOST_DEVICE inline BFloat16 to_bfloat16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

RESQ_HOST_DEVICE inline Half to_half(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000;
  uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude >= 0x47800000) {  // 65536 and above, infinity, NaN
    const uint32_t nan = magnitude > 0x7f800000 ? 0x0200 | ((magnitude >> 13) & 0x03ff) : 0;
    return {static_cast<uint16_t>(sign | 0x7c00 | nan)};
  }
  if (magnitude < 0x38800000) {  // below 2^-14: one addition to 0.5 (ulp 2^-24) rounds it
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000))};
  }
  magnitude += 0x0fff + ((magnitude >> 13) & 1) - ((127u - 15u) << 23);
  return {static_cast<uint16_t>(sign | (magnitude >> 13))};
}

}  // namespace resq
