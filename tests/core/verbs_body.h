// Included inside the namespace of an instruction set, after its verbs (cpu/simd_*.h).
#pragma once

#include "cpu/row_silu.h"

using FloatMap = Vec (*)(Vec);

template <FloatMap map>
void map_floats(const float* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; i += Vec::kLanes) store(y + i, map(load(x + i)));
}

template <class T>
void narrow(const float* x, uint16_t* y, int64_t n) {
  for (int64_t i = 0; i < n; i += Vec::kLanes) store(reinterpret_cast<T*>(y) + i, load(x + i));
}

template <class T>
void widen(const uint16_t* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; i += Vec::kLanes)
    store(y + i, load(reinterpret_cast<const T*>(x) + i));
}

Verbs verbs() {
  return {.lanes = Vec::kLanes,
          .exp = map_floats<exp>,
          .silu = map_floats<silu>,
          .round = map_floats<round>,
          .to_float16 = narrow<Half>,
          .to_bfloat16 = narrow<BFloat16>,
          .from_float16 = widen<Half>,
          .from_bfloat16 = widen<BFloat16>};
}
