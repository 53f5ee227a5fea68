// The one CPU body of rms_norm_quantize.
// Included inside the namespace of an instruction set.

#include "cpu/row_norm.h"
#include "cpu/row_quantize.h"

// floats = x + residual, rounded to T, which is also what new_residual gets.
template <class T>
inline void load_sum(const T* x, const T* residual, T* new_residual, int64_t k, float* floats) {
  for (int64_t i = 0; i < k; i += kLanes) {
    const Vec sum = load_up_to(x + i, k - i) + load_up_to(residual + i, k - i);
    store_up_to(new_residual + i, sum, k - i);
    store(floats + i, load_up_to(new_residual + i, k - i));
  }
}

template <class T>
void normalize_rows(const RmsNormQuantizeParams& params, int64_t begin, int64_t end) {
  const int64_t k = params.out.k_lo + params.out.k_hi;
  float* floats = thread_row_buffer().floats(align_up(k, kLanes));
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(params.x) + row * k;
    if (params.residual) {
      load_sum(x, static_cast<const T*>(params.residual) + row * k,
               static_cast<T*>(params.new_residual) + row * k, k, floats);
    } else {
      load_row(x, k, floats);
    }
    normalize_row(floats, k, params.eps, params.weight, params.weight_type);
    quantize_row(floats, params.out, row);
  }
}

void rms_norm_quantize_rows(const RmsNormQuantizeParams& params, int64_t begin, int64_t end) {
  switch (params.x_type) {
    case FloatType::kFloat32: return normalize_rows<float>(params, begin, end);
    case FloatType::kFloat16: return normalize_rows<Half>(params, begin, end);
    case FloatType::kBFloat16: return normalize_rows<BFloat16>(params, begin, end);
  }
}
