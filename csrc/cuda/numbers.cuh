// Numbers of any of the three float types: loaded from memory as float32, and stored back; their
// bits in the order of integers, and their reciprocals.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "core/float16.h"

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

template <class T>
struct NumberType {
  using Type = T;
};

// f(NumberType<T>()) for the type T that `type` names.
template <class F>
__device__ inline auto with_number_type(FloatType type, F f) {
  switch (type) {
    case FloatType::kFloat32: return f(NumberType<float>());
    case FloatType::kFloat16: return f(NumberType<Half>());
    default: return f(NumberType<BFloat16>());
  }
}

__device__ inline float load_number(FloatArray numbers, int64_t index) {
  return with_number_type(numbers.type, [&]<class T>(NumberType<T>) {
    return number(static_cast<const T*>(numbers.data)[index]);
  });
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
  with_number_type(numbers.type, [&]<class T>(NumberType<T>) {
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
