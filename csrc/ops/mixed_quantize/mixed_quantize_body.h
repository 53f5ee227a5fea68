// The one CPU body of mixed_quantize.
// Included inside the namespace of an instruction set.

#include "cpu/row_quantize.h"

template <class T>
void quantize_rows(const MixedQuantizeParams& params, int64_t begin, int64_t end) {
  const int64_t k = params.out.k_lo + params.out.k_hi;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(params.x) + row * k;
    if constexpr (std::is_same_v<T, float>) {
      quantize_row(x, params.out, row);
    } else {
      float* floats = thread_row_buffer().floats(align_up(k, kLanes));
      load_row(x, k, floats);
      quantize_row(floats, params.out, row);
    }
  }
}

void mixed_quantize_rows(const MixedQuantizeParams& params, int64_t begin, int64_t end) {
  switch (params.x_type) {
    case FloatType::kFloat32: return quantize_rows<float>(params, begin, end);
    case FloatType::kFloat16: return quantize_rows<Half>(params, begin, end);
    case FloatType::kBFloat16: return quantize_rows<BFloat16>(params, begin, end);
  }
}
