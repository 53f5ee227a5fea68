// The one CPU body of rms_norm.
// Included inside the namespace of an instruction set.

#include "cpu/row_norm.h"

template <class T>
void norm_rows(const RmsNormParams& params, int64_t begin, int64_t end) {
  const int64_t k = params.columns;
  float* floats = thread_row_buffer().floats(align_up(k, kLanes));
  for (int64_t row = begin; row < end; ++row) {
    load_row(static_cast<const T*>(params.x) + row * k, k, floats);
    normalize_row(floats, k, params.eps, params.weight, params.weight_type);
    T* y = static_cast<T*>(params.y) + row * k;
    for (int64_t i = 0; i < k; i += kLanes) store_up_to(y + i, load(floats + i), k - i);
  }
}

void rms_norm_rows(const RmsNormParams& params, int64_t begin, int64_t end) {
  switch (params.type) {
    case FloatType::kFloat32: return norm_rows<float>(params, begin, end);
    case FloatType::kFloat16: return norm_rows<Half>(params, begin, end);
    case FloatType::kBFloat16: return norm_rows<BFloat16>(params, begin, end);
  }
}
