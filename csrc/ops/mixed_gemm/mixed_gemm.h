// mixed_gemm: y = activations (INT4 | INT8 codes per row) x weight (INT4 | INT8 codes per output
// row).
//
//   d_p[m, n] = sum_k q_p[m, k] w_p[n, k] - zero_p[m] wsum_p[n]          exact in int32, p = lo, hi
//   y[m, n] = ((float(d_lo) s_lo[m]) t_lo[n] + (float(d_hi) s_hi[m]) t_hi[n]) + bias[n]
//
// each float32 operation rounded on its own, in this order (docs/formats.md section 4), so that the
// result has the same bits for every batch size, thread count and instruction set.
#pragma once

#include <cstdint>

#include "core/float16.h"

namespace resq {

// Columns that a part may have. The kernels keep up to 16 times the integer sums of a part in 32
// bits: 16 * 255 * 8 * K < 2^31.
inline constexpr int64_t kMostPartColumns = 65536;

struct MixedGemmParams {
  int64_t m, n, k_lo, k_hi;      // rows of activations, rows of weights, what is summed over
  const void* q_lo;              // uint8 [m, k_lo / 2] packed codes, or int8 [m, k_lo]
  bool q_lo_packed;              // which of the two
  const int8_t* q_hi;            // [m, k_hi]
  const float* params;           // [m, 4]: scale_lo, zero_lo, scale_hi, zero_hi
  const uint8_t* packed_weight;  // in the device's layout (docs/formats.md section 3)
  const float* weight_scale;     // [n, 2]: t_lo, t_hi
  const int32_t* weight_sum;     // [n, 2]: wsum_lo, wsum_hi
  const void* bias;              // [n] of bias_type, or nullptr
  FloatType bias_type;
  void* out;  // [m, n] of out_type
  FloatType out_type;
};

// Zeros are integers of magnitude at most 255; the range check keeps the conversion defined for
// other values.
RESQ_HOST_DEVICE inline uint32_t exact_integer(float zero) {
  const bool fits = zero >= -0x1p30f && zero <= 0x1p30f;
  return fits ? static_cast<uint32_t>(static_cast<int32_t>(zero)) : 0u;
}

}  // namespace resq
