// Included inside the namespace of an instruction set.

#include "cpu/row_silu.h"

using FloatMap = Vec (*)(Vec);

template <FloatMap map>
void map_floats(const float* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) store(y + i, map(load(x + i)));
}

using FloatPairMap = Vec (*)(Vec, Vec);

template <FloatPairMap map>
void map_pairs(const float* a, const float* b, float* y, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) store(y + i, map(load(a + i), load(b + i)));
}

template <class T>
void narrow(const float* x, uint16_t* y, int64_t n) {
  store_row(x, n, reinterpret_cast<T*>(y));
}
template <class T>
void widen(const uint16_t* x, float* y, int64_t n) {
  load_row(reinterpret_cast<const T*>(x), n, y);
}

void to_int8(const float* x, int8_t* y, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) store(y + i, load(x + i));
}
void round_to_ints(const float* x, int32_t* y, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) store_bits(y + i, round_to_int(load(x + i)));
}
void exp2_ints(const int32_t* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) store(y + i, exp2_int(load_bits<IVec>(x + i)));
}
void add_dot_pairs(const int32_t* a, const int32_t* b, int32_t* sums, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const IVec sum = load_bits<IVec>(sums + i);
    store_bits(sums + i, dot_pairs(sum, load_bits<IVec>(a + i), load_bits<IVec>(b + i)));
  }
}

SimdOps simd_ops() {
  return {.lanes = kLanes,
          .exp = map_floats<exp>,
          .silu = map_floats<silu>,
          .round = map_floats<round>,
          .min = map_pairs<min>,
          .max = map_pairs<max>,
          .to_float16 = narrow<Half>,
          .to_bfloat16 = narrow<BFloat16>,
          .from_float16 = widen<Half>,
          .from_bfloat16 = widen<BFloat16>,
          .to_int8 = to_int8,
          .round_to_int = round_to_ints,
          .exp2_int = exp2_ints,
          .dot_pairs = add_dot_pairs};
}
