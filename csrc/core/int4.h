// Signed 4-bit codes: two a byte, even index in the low nibble. The only owner of nibble order.
#pragma once

#include "core/host_device.h"

namespace resq {

// The signed value of the low four bits of `nibble`: 0..7 stay, 8..15 become -8..-1.
RESQ_HOST_DEVICE constexpr int8_t sign_extend4(uint8_t nibble) {
  return static_cast<int8_t>(((nibble & 15) ^ 8) - 8);
}

RESQ_HOST_DEVICE constexpr uint8_t pack_int4(int8_t even, int8_t odd) {
  return static_cast<uint8_t>((even & 15) | ((odd & 15) << 4));
}

RESQ_HOST_DEVICE constexpr int8_t unpack_int4_even(uint8_t byte) { return sign_extend4(byte); }
RESQ_HOST_DEVICE constexpr int8_t unpack_int4_odd(uint8_t byte) { return sign_extend4(byte >> 4); }

}  // namespace resq
