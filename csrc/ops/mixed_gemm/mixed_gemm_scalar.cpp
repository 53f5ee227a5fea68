// Portable C++: what a machine without AVX2 runs, and the plainest statement of the two dots.
#include <array>
#include <cstring>
#include <utility>
#include <vector>

#include "core/int4.h"
#include "cpu/float16.h"
#include "ops/mixed_gemm/mixed_gemm.h"

namespace resq::scalar {

struct Simd {
  static constexpr int kMaxTileRows = 2;
  struct Sums {
    uint32_t at[16];
  };
  struct Codes {
    uint8_t at[64];
  };

  static Sums zero() { return {}; }
  static void store(const Sums& sums, uint32_t* out) { std::memcpy(out, sums.at, sizeof(sums)); }
  static Codes load(const uint8_t* p) {
    Codes codes;
    std::memcpy(codes.at, p, sizeof(codes));
    return codes;
  }
  static Codes low_nibbles(Codes codes) {
    for (auto& byte : codes.at) byte &= 15;
    return codes;
  }
  static Codes high_nibbles(Codes codes) {
    for (auto& byte : codes.at) byte >>= 4;
    return codes;
  }
  static Sums dot_lo(Sums sums, const Codes& w0, const int8_t* q0, const Codes& w1,
                     const int8_t* q1) {
    for (int n = 0; n < 16; ++n) {
      for (int j = 0; j < 4; ++j) {
        sums.at[n] += static_cast<uint32_t>(w0.at[4 * n + j] * q0[j] + w1.at[4 * n + j] * q1[j]);
      }
    }
    return sums;
  }
  static Sums dot_hi(Sums sums, const Codes& w0, const int8_t* q0, const Codes& w1,
                     const int8_t* q1) {
    return dot_lo(sums, w0, q0, w1, q1);
  }
  static void to_float16(const float* values, uint16_t* out) {
    for (int i = 0; i < 16; ++i) out[i] = cpu::float16_from_float(values[i]);
  }
};

#include "ops/mixed_gemm/mixed_gemm_body.h"

}  // namespace resq::scalar
