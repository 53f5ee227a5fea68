// The verbs over four floats in GNU vector arithmetic: SSE2 on x86-64, NEON on aarch64.
#pragma once

#include "cpu/simd_common.h"

namespace resq::cpu::scalar {

struct Vec {
  static constexpr int kLanes = 4;
  using Floats = float __attribute__((vector_size(16)));
  using Ints = int32_t __attribute__((vector_size(16)));
  Floats v;
};

inline Vec set1(float x) { return {Vec::Floats{x, x, x, x}}; }
inline Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
inline Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
inline Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }

// a < b ? a : b: the second operand if either is NaN, as on x86.
inline Vec min(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }
inline Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }

// Half to even. Adding 1.5 * 2^23 rounds below 2^22; larger values are clamped there, which the
// callers cannot see: codes and exponents end far below.
inline Vec round(Vec a) {
  const Vec limit = set1(0x1p22f), magic = set1(0x1.8p23f);
  a = min(limit, max(set1(-0x1p22f), a));
  return (a + magic) - magic;
}

// 2^n of integers n in [-126, 127]; 0 at n = -127.
inline Vec exp2_int(Vec n) {
  const Vec::Ints exponent = (__builtin_convertvector(n.v, Vec::Ints) + 127) << 23;
  return {std::bit_cast<Vec::Floats>(exponent)};
}

inline Vec load(const float* p) {
  Vec a;
  std::memcpy(&a.v, p, sizeof(a.v));
  return a;
}
inline Vec load(const Half* p) {
  return {Vec::Floats{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}};
}
inline Vec load(const BFloat16* p) {
  return {Vec::Floats{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}};
}
inline void store(float* p, Vec a) { std::memcpy(p, &a.v, sizeof(a.v)); }
inline void store(Half* p, Vec a) {
  for (int i = 0; i < Vec::kLanes; ++i) p[i] = to_half(a.v[i]);
}
inline void store(BFloat16* p, Vec a) {
  for (int i = 0; i < Vec::kLanes; ++i) p[i] = to_bfloat16(a.v[i]);
}

// Integers in [-128, 127] as bytes.
inline void store(int8_t* p, Vec a) {
  for (int i = 0; i < Vec::kLanes; ++i) p[i] = static_cast<int8_t>(a.v[i]);
}

// The stages h = 1, 2, ... below min(width, kLanes) of a Hadamard transform, inside the register.
inline Vec hadamard_lanes(Vec a, int64_t width) {
  const Vec::Floats b = a.v;
  if (width >= 2) a.v = Vec::Floats{b[0] + b[1], b[0] - b[1], b[2] + b[3], b[2] - b[3]};
  const Vec::Floats c = a.v;
  if (width >= 4) a.v = Vec::Floats{c[0] + c[2], c[1] + c[3], c[0] - c[2], c[1] - c[3]};
  return a;
}

}  // namespace resq::cpu::scalar
