// The one CPU body of hadamard.
// Included inside the namespace of an instruction set, after its verbs (cpu/simd_*.h).
#pragma once

#include "cpu/row_access.h"
#include "cpu/row_hadamard.h"

template <class T>
void hadamard_rows(const HadamardParams& params, int64_t begin, int64_t end) {
  const HadamardPlan& plan = *params.plan;
  const int64_t n = plan.n, padded = align_up(n, Vec::kLanes);
  float* floats = thread_row_buffer().floats(padded + hadamard_scratch(plan));
  const Vec scale = set1(params.scale);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(params.x) + row * n;
    T* y = static_cast<T*>(params.y) + row * n;
    for (int64_t i = 0; i < n; i += Vec::kLanes) store(floats + i, load_up_to(x + i, n - i));
    transform_row(floats, plan, floats + padded);
    for (int64_t i = 0; i < n; i += Vec::kLanes) {
      store_up_to(y + i, load(floats + i) * scale, n - i);
    }
  }
}

void hadamard(const HadamardParams& params, int64_t begin, int64_t end) {
  switch (params.type) {
    case FloatType::kFloat32: return hadamard_rows<float>(params, begin, end);
    case FloatType::kFloat16: return hadamard_rows<Half>(params, begin, end);
    case FloatType::kBFloat16: return hadamard_rows<BFloat16>(params, begin, end);
  }
}
