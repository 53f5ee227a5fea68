// silu in float32 by the formula of csrc/cpu/row_silu.h, whose bits it gives: every operation is
// rounded on its own.
#pragma once

#include "cuda/chunk.cuh"
#include "cuda/numbers.cuh"
#include "cuda/quotient.h"

namespace resq::cuda {

// e^x; see csrc/cpu/row_silu.h for the constants and the error bound. NaN for NaN.
__device__ inline float exp_rounded(float x) {
  constexpr float kMagic = 0x1.8p23f;  // its sum with |n| < 2^22 is n in the low mantissa bits
  x = x < -87.5f ? -87.5f : x;
  x = x > 89.0f ? 89.0f : x;
  const float shifted = __fadd_rn(__fmul_rn(x, 1.442695f), kMagic);
  const float n = __fsub_rn(shifted, kMagic);
  const float r = __fsub_rn(__fsub_rn(x, __fmul_rn(n, 0.693359375f)), __fmul_rn(n, -2.1219444e-4f));
  float q = 0x1.6a23c0p-10f;
  q = __fadd_rn(__fmul_rn(q, r), 0x1.123a20p-7f);
  q = __fadd_rn(__fmul_rn(q, r), 0x1.5558f4p-5f);
  q = __fadd_rn(__fmul_rn(q, r), 0x1.555492p-3f);
  q = __fadd_rn(__fmul_rn(q, r), 0x1.fffffcp-2f);
  const float p = __fadd_rn(__fadd_rn(__fmul_rn(q, __fmul_rn(r, r)), r), 1.0f);
  // 2 * 2^(n - 1), because 2^128 is not a float but e^88.7 is.
  const int exponent = __float_as_int(shifted) - __float_as_int(kMagic) + 126;
  return __fmul_rn(__fadd_rn(p, p), __int_as_float(exponent << 23));
}

// silu of eight gates together. Divided by __fdiv_rn they would be computed one after the other,
// 190 cycles each: every division is a branch.
__device__ inline void silu(const float (&x)[8], float (&y)[8]) {
  float divisor[8];
  bool plain = true;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    divisor[i] = __fadd_rn(1.0f, exp_rounded(__fsub_rn(0.0f, x[i])));
    y[i] = quotient(x[i], divisor[i], approximate_reciprocal(divisor[i]));
    plain &= has_plain_quotient(x[i]);
  }
  if (plain) return;
#pragma unroll
  for (int i = 0; i < 8; ++i) y[i] = __fdiv_rn(x[i], divisor[i]);
}

}  // namespace resq::cuda
