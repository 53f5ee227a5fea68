// Numbers of any of the three float types: loaded from memory as float32, and stored back; their
// bits in the order of integers, and their reciprocals.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/with_type.h"

namespace resq::cuda {

__device__ inline float number(float x) { return x; }
__device__ inline float number(Half x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ inline float number(BFloat16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }

// The reciprocal within a unit in the last place.
__device__ inline float approximate_reciprocal(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// Maps the bits of floats to integers of the same order, with a positive NaN above infinity. Its
// own inverse. With it redux.sync, which takes integers only, replaces five shuffles and five
// comparisons.
__device__ inline int ordered_bits(int bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }

// kCount numbers as they lie in memory. Loading and converting are apart, so that a thread can have
// loads of several types in flight: with_type waits for each one inside its branch.
template <int kCount>
struct NumberBits {
  FloatType type;
  uint32_t words[kCount];  // 16-bit numbers: two in each word

  // A selection, not a branch for each number.
  __device__ float operator[](int i) const {
    const uint32_t pair = words[i / 2] >> (i % 2 * 16);
    const uint32_t bits = type == FloatType::kFloat32 ? words[i] : pair << 16;
    return type == FloatType::kFloat16 ? number(Half{static_cast<uint16_t>(pair)})
                                       : __uint_as_float(bits);
  }
};

__device__ inline const void* number_address(FloatArray numbers, int64_t index) {
  const int bytes = numbers.type == FloatType::kFloat32 ? 4 : 2;
  return static_cast<const char*>(numbers.data) + index * bytes;
}

// Numbers from `index` on in one access; the address is a multiple of their size.
template <int kCount>
__device__ inline NumberBits<kCount> load_bits(FloatArray numbers, int64_t index) {
  NumberBits<kCount> result = {numbers.type, {}};
  if (numbers.type == FloatType::kFloat32) {
    struct alignas(4 * kCount) Words {
      uint32_t of[kCount];
    };
    const Words words =
        *reinterpret_cast<const Words*>(static_cast<const uint32_t*>(numbers.data) + index);
#pragma unroll
    for (int i = 0; i < kCount; ++i) result.words[i] = words.of[i];
  } else if constexpr (kCount == 1) {
    result.words[0] = static_cast<const uint16_t*>(numbers.data)[index];
  } else {
    struct alignas(2 * kCount) Words {
      uint32_t of[kCount / 2];
    };
    const Words words =
        *reinterpret_cast<const Words*>(static_cast<const uint16_t*>(numbers.data) + index);
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) result.words[i] = words.of[i];
  }
  return result;
}

// Stores one number, rounded to nearest even.
__device__ inline void store_number(void* numbers, FloatType type, int64_t index, float value) {
  switch (type) {
    case FloatType::kFloat32: static_cast<float*>(numbers)[index] = value; break;
    case FloatType::kFloat16: static_cast<__half*>(numbers)[index] = __float2half_rn(value); break;
    case FloatType::kBFloat16: static_cast<BFloat16*>(numbers)[index] = to_bfloat16(value); break;
  }
}

// Loads kCount numbers from `index` on in one access; the address is a multiple of their size.
template <int kCount>
__device__ inline void load_numbers(FloatArray numbers, int64_t index, float (&out)[kCount]) {
  with_type(numbers.type, [&](auto t) {
    using T = decltype(t);
    struct alignas(kCount * sizeof(T)) Several {
      T values[kCount];
    };
    const Several several =
        *reinterpret_cast<const Several*>(static_cast<const T*>(numbers.data) + index);
#pragma unroll
    for (int i = 0; i < kCount; ++i) out[i] = number(several.values[i]);
  });
}

}  // namespace resq::cuda
