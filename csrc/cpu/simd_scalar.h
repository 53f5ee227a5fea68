// The operations of cpu/simd.h on four lanes, portable: SSE2 on x86-64, NEON on aarch64. Included
// inside the namespace of an instruction set.

inline constexpr int kLanes = 4;
using Vec = Vectors<kLanes>::Vec;
using IVec = Vectors<kLanes>::IVec;
using Words = uint32_t __attribute__((vector_size(kLanes * 4)));
using Shorts = uint16_t __attribute__((vector_size(kLanes * 2)));

inline Vec min(Vec a, Vec b) { return a < b ? a : b; }
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }

// kRoundMagic rounds below 2^22. Larger values are clamped to 2^22, which changes no caller's
// result: codes and exponents end far below.
inline Vec round(Vec x) {
  const Vec limit = Vec{} + 0x1p22f;
  x = min(limit, max(-limit, x));
  return (x + kRoundMagic) - kRoundMagic;
}
inline IVec round_to_int(Vec x) {
  return __builtin_bit_cast(IVec, x + kRoundMagic) - std::bit_cast<int32_t>(kRoundMagic);
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
  Shorts bits;
  std::memcpy(&bits, p, sizeof(bits));
  return __builtin_bit_cast(Vec, __builtin_convertvector(bits, Words) << 16);
}
inline void store(float* p, Vec x) { std::memcpy(p, &x, sizeof(x)); }
inline void store(Half* p, Vec x) {
  for (int i = 0; i < kLanes; ++i) p[i] = to_half(x[i]);
}
inline void store(BFloat16* p, Vec x) {
  const auto bits = __builtin_bit_cast(Words, x);
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Words nan = Words{} + 0x7fc0;
  const Shorts out =
      __builtin_convertvector((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded, Shorts);
  std::memcpy(p, &out, sizeof(out));
}
inline void store(int8_t* p, Vec x) {
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<int8_t>(x[i]);
}

inline IVec dot_pairs(IVec sums, IVec a, IVec b) {
  const IVec low = ((a << 16) >> 16) * ((b << 16) >> 16), high = (a >> 16) * (b >> 16);
  return (IVec)((Words)sums + (Words)low + (Words)high);
}

// partner + self, and partner - self in the second lane of each pair.
inline Vec hadamard_lanes(Vec x, int64_t width) {
  if (width >= 2) {
    const Vec partner = __builtin_shuffle(x, IVec{1, 0, 3, 2});
    x = __builtin_shuffle(partner + x, partner - x, IVec{0, 5, 2, 7});
  }
  if (width >= 4) {
    const Vec partner = __builtin_shuffle(x, IVec{2, 3, 0, 1});
    x = __builtin_shuffle(partner + x, partner - x, IVec{0, 1, 6, 7});
  }
  return x;
}

#include "cpu/simd.h"
