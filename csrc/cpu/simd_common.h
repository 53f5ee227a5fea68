// Definitions that all instruction sets share and that must not be compiled for one of them. If two
// files compiled an inline function of one name for different targets, the linker would merge the
// copies, and a machine without AVX-512 could run the AVX-512 one. So this comes before
// `#pragma GCC target`, and everything after that pragma is in the instruction set's namespace.
#pragma once

#if defined(__x86_64__)
// g++ 12 warns about the `undefined` operands inside its own AVX-512 intrinsics.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "core/float16.h"
#include "core/hadamard.h"
#include "core/host_device.h"
#include "core/int4.h"
#include "core/quantize.h"
#include "cpu/isa.h"
#include "cpu/row_buffer.h"

namespace resq::cpu {

// x + kRoundMagic rounds |x| < 2^22 half to even and leaves the integer in the low mantissa bits.
inline constexpr float kRoundMagic = 0x1.8p23f;

constexpr int64_t float_bytes(FloatType type) { return type == FloatType::kFloat32 ? 4 : 2; }

// GNU vectors of kWidth numbers, a power of two: a register, or a narrower or wider part of a row.
template <int kWidth>
struct Vectors {
  typedef float Vec __attribute__((vector_size(kWidth * sizeof(float))));
  typedef int32_t IVec __attribute__((vector_size(kWidth * sizeof(int32_t))));
};

}  // namespace resq::cpu
