// silu(gate) * up in float32.
// Included inside the namespace of an instruction set.

// e^x with a relative error below 1.3e-7; 0 below -86.9, infinity above 88.7; NaN for NaN.
// x = n ln 2 + r with |r| <= ln 2 / 2, where n * kLn2High is exact (355 / 512).
// e^r = 1 + r + r^2 q(r), with q the minimax polynomial of degree 4 of that form (relative error
// 3.8e-9). No fused multiply-adds: the portable variant must give the same bits.
inline Vec exp(Vec x) {
  constexpr float kLog2E = 1.442695f, kLn2High = 0.693359375f, kLn2Low = -2.1219444e-4f;
  x = min(set1(89.0f), max(set1(-87.5f), x));
  const Vec n = round(x * kLog2E);
  const Vec r = (x - n * kLn2High) - n * kLn2Low;
  Vec q = set1(0x1.6a23c0p-10f);
  q = q * r + 0x1.123a20p-7f;
  q = q * r + 0x1.5558f4p-5f;
  q = q * r + 0x1.555492p-3f;
  q = q * r + 0x1.fffffcp-2f;
  const Vec p = (q * (r * r) + r) + 1.0f;
  // 2 * 2^(n - 1), because 2^128 is not a float but e^88.7 is. The 1 is subtracted in float,
  // because NaN converts to the lowest integer.
  return (p + p) * exp2_int(round_to_int(n - 1.0f));
}

// x / (1 + e^-x), relative error below 2.5e-7; -0 where e^-x is infinite.
inline Vec silu(Vec x) { return x / (1.0f + exp(0.0f - x)); }
