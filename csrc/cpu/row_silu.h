// silu(gate) * up in float32.
// Included inside the namespace of an instruction set, after its verbs (cpu/simd_*.h).
#pragma once

// e^x with a relative error below 2e-7 (two roundings of the result and the polynomial's 1.4e-8),
// 0 and infinity beyond float's range, NaN for NaN. x = n ln 2 + r, |r| <= ln 2 / 2: n * kLn2High
// is exact (kLn2High has 10 bits), e^r is a Taylor polynomial with a minimax correction, and 2^n
// is applied in two halves so that neither overflows.
inline Vec exp(Vec x) {
  const Vec kLog2E = set1(1.44269504f);
  const Vec kLn2High = set1(0.693359375f), kLn2Low = set1(-2.12194440e-4f);
  x = min(set1(128.0f), max(set1(-128.0f), x));
  const Vec n = round(x * kLog2E);
  const Vec r = (x - n * kLn2High) - n * kLn2Low;
  Vec p = set1(1.9875691500e-4f);
  p = p * r + set1(1.3981999507e-3f);
  p = p * r + set1(8.3334519073e-3f);
  p = p * r + set1(4.1665795894e-2f);
  p = p * r + set1(1.6666665459e-1f);
  p = p * r + set1(5.0000001201e-1f);
  p = (p * (r * r) + r) + set1(1.0f);
  const Vec half = round(n * set1(0.5f));
  return (p * exp2_int(half)) * exp2_int(n - half);
}

inline Vec silu(Vec x) { return x / (set1(1.0f) + exp(set1(0.0f) - x)); }
