// The portable vectors of cpu/lanes.h. Included inside the namespace of an instruction set.

inline constexpr int kLanes = 4;
using Floats = float __attribute__((vector_size(16)));
using Ints = int32_t __attribute__((vector_size(16)));
using Unsigned = uint32_t __attribute__((vector_size(16)));

inline Floats load_halves(const uint16_t* in) {
  return Floats{to_float(Half{in[0]}), to_float(Half{in[1]}), to_float(Half{in[2]}),
                to_float(Half{in[3]})};
}
inline void store_halves(uint16_t* out, Floats x) {
  for (int j = 0; j < kLanes; ++j) out[j] = to_half(x[j]).bits;
}

// sums + a.low b.low + a.high b.high per lane, 16-bit signed halves, modulo 2^32: columns of tokens
// that nobody sees hold anything.
inline Ints dot_pairs(Ints sums, Ints a, Ints b) {
  const Ints low = ((a << 16) >> 16) * ((b << 16) >> 16), high = (a >> 16) * (b >> 16);
  return (Ints)((Unsigned)sums + (Unsigned)low + (Unsigned)high);
}

// a > b ? a : b, the second operand where either is NaN.
inline Floats maximum(Floats a, Floats b) { return a > b ? a : b; }

// Half to even, for |x| < 2^22.
inline Ints round_to_int(Floats x) {
  return __builtin_bit_cast(Ints, x + 0x1.8p23f) - std::bit_cast<int32_t>(0x1.8p23f);
}

#include "cpu/lanes.h"
