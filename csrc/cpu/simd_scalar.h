// The operations of cpu/simd.h on four lanes, portable: SSE2 on x86-64, NEON on aarch64. Included
// inside the namespace of an instruction set.

inline constexpr int kLanes = 4;
using Vec = Vectors<kLanes>::Vec;
using IVec = Vectors<kLanes>::IVec;

inline Vec min(Vec a, Vec b) { return a < b ? a : b; }
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }

// Adding 1.5 * 2^23 rounds below 2^22; larger values are clamped there, which the callers cannot
// see: codes and exponents end far below.
inline Vec round(Vec x) {
  const Vec limit = Vec{} + 0x1p22f;
  x = min(limit, max(-limit, x));
  return (x + 0x1.8p23f) - 0x1.8p23f;
}
inline IVec round_to_int(Vec x) {
  return __builtin_bit_cast(IVec, x + 0x1.8p23f) - std::bit_cast<int32_t>(0x1.8p23f);
}

inline Vec load(const float* p) {
  Vec x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
inline Vec load(const Half* p) {
  return Vec{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}
inline Vec load(const BFloat16* p) {
  return Vec{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}
inline void store(float* p, Vec x) { std::memcpy(p, &x, sizeof(x)); }
inline void store(Half* p, Vec x) {
  for (int i = 0; i < kLanes; ++i) p[i] = to_half(x[i]);
}
inline void store(BFloat16* p, Vec x) {
  for (int i = 0; i < kLanes; ++i) p[i] = to_bfloat16(x[i]);
}
inline void store(int8_t* p, Vec x) {
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<int8_t>(x[i]);
}

inline IVec dot_pairs(IVec sums, IVec a, IVec b) {
  using Unsigned = uint32_t __attribute__((vector_size(sizeof(IVec))));
  const IVec low = ((a << 16) >> 16) * ((b << 16) >> 16), high = (a >> 16) * (b >> 16);
  return (IVec)((Unsigned)sums + (Unsigned)low + (Unsigned)high);
}

inline Vec hadamard_lanes(Vec x, int64_t width) {
  const Vec a = x;
  if (width >= 2) x = Vec{a[0] + a[1], a[0] - a[1], a[2] + a[3], a[2] - a[3]};
  const Vec b = x;
  if (width >= 4) x = Vec{b[0] + b[2], b[1] + b[3], b[0] - b[2], b[1] - b[3]};
  return x;
}

#include "cpu/simd.h"
