// Integer quotients as products with an inverse that the host computes: a division by a number that
// is not constant takes 40 instructions. Host code without CUDA headers; tested on the CPU.
#pragma once

#include "core/host_device.h"

namespace resq::cuda {

// quotient_by(a, inverse(b)) is a / b for 0 <= a < 2^16 and b from 2 to 2^16 - 1 or a power of two:
// a * inverse(b) exceeds 2^32 a / b by less than a < 2^32 / b, which is the distance to the next
// quotient.
constexpr uint32_t inverse(int b) { return static_cast<uint32_t>(ceil_div(int64_t{1} << 32, b)); }
RESQ_HOST_DEVICE constexpr int quotient_by(int a, uint32_t inverse) {
  return static_cast<int>(uint64_t{static_cast<uint32_t>(a)} * inverse >> 32);
}

// The same for a and b below 2^32: the high half of a * inverse64(b) is a / b.
constexpr uint64_t inverse64(uint32_t b) { return ~uint64_t{0} / b + 1; }

// The same for 0 <= a < 2^31 and b from 1 to 2^31 - 1, with two products of 32 bits: 2^63 / b
// rounded up makes the quotient larger by less than 1 / b.
struct Divisor {
  int number;
  uint32_t low, high;

  constexpr explicit Divisor(int64_t b)
      : number(static_cast<int>(b)),
        low(static_cast<uint32_t>(inverse(b))),
        high(static_cast<uint32_t>(inverse(b) >> 32)) {}

  RESQ_HOST_DEVICE constexpr int divide(int a) const {
    const uint64_t twice = 2 * static_cast<uint64_t>(a);
    return static_cast<int>((twice * high + (twice * low >> 32)) >> 32);
  }
  RESQ_HOST_DEVICE constexpr int remainder(int a) const { return a - divide(a) * number; }

 private:
  static constexpr uint64_t inverse(int64_t b) { return ((uint64_t{1} << 63) - 1) / b + 1; }
};

}  // namespace resq::cuda
