// The one CPU body of hadamard.
// Included inside the namespace of an instruction set.

#include "cpu/row_hadamard.h"

template <class T>
void transform_rows(const HadamardParams& params, int64_t begin, int64_t end) {
  const HadamardPlan& plan = *params.plan;
  const int64_t n = plan.n, padded = align_up(n, kLanes);
  float* floats = thread_row_buffer().floats(padded + hadamard_scratch(plan));
  const Vec scale = set1(params.scale);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(params.x) + row * n;
    T* y = static_cast<T*>(params.y) + row * n;
    load_row(x, n, floats);
    transform_row(floats, plan, floats + padded);
    for (int64_t i = 0; i < n; i += kLanes) {
      store_up_to(y + i, load(floats + i) * scale, n - i);
    }
  }
}

void hadamard_rows(const HadamardParams& params, int64_t begin, int64_t end) {
  switch (params.type) {
    case FloatType::kFloat32: return transform_rows<float>(params, begin, end);
    case FloatType::kFloat16: return transform_rows<Half>(params, begin, end);
    case FloatType::kBFloat16: return transform_rows<BFloat16>(params, begin, end);
  }
}
