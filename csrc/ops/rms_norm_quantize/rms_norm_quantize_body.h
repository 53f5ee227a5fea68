// The one CPU body of rms_norm_quantize.
// Included inside the namespace of an instruction set.

#include "cpu/row_quantize.h"

// Sum of squares in 1024 interleaved partial sums; runs of 256 of them are folded in half eight
// times, then the four runs are added in pairs. These are the same additions on every instruction
// set, and the same as on CUDA in a block of four warps, each thread of which holds every 128th run
// of eight columns. The padding of x up to a multiple of kLanes must be 0.
inline float sum_of_squares(const float* x, int64_t k) {
  constexpr int kPartial = 1024, kRun = 256;
  float partial[kPartial];
  for (int64_t i = 0; i < kPartial; i += kLanes) {
    const Vec v = i < k ? load(x + i) : Vec{};
    store(partial + i, v * v);
  }
  for (int64_t i = kPartial; i < k; i += kLanes) {
    const Vec v = load(x + i);
    store(partial + i % kPartial, load(partial + i % kPartial) + v * v);
  }
  for (float* run = partial; run < partial + kPartial; run += kRun) {
    for (int half = kRun / 2; half > 0; half /= 2) {
      for (int j = 0; j < half; ++j) run[j] += run[j + half];
    }
  }
  return (partial[0] + partial[kRun]) + (partial[2 * kRun] + partial[3 * kRun]);
}

// floats = x + residual, rounded to T, which is also what new_residual gets.
template <class T>
inline void load_sum(const T* x, const T* residual, T* new_residual, int64_t k, float* floats) {
  for (int64_t i = 0; i < k; i += kLanes) {
    const Vec sum = load_up_to(x + i, k - i) + load_up_to(residual + i, k - i);
    store_up_to(new_residual + i, sum, k - i);
    store(floats + i, load_up_to(new_residual + i, k - i));
  }
}

template <class W>
inline void normalize(float* floats, int64_t k, float inverse_rms, const W* weight) {
  for (int64_t i = 0; i < k; i += kLanes) {
    Vec y = load(floats + i) * inverse_rms;
    if (weight) y = y * load_up_to(weight + i, k - i);
    store(floats + i, y);
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
    const float mean = sum_of_squares(floats, k) / static_cast<float>(k);
    const float inverse_rms = 1.0f / std::sqrt(mean + params.eps);
    switch (params.weight_type) {
      case FloatType::kFloat32:
        normalize(floats, k, inverse_rms, static_cast<const float*>(params.weight));
        break;
      case FloatType::kFloat16:
        normalize(floats, k, inverse_rms, static_cast<const Half*>(params.weight));
        break;
      case FloatType::kBFloat16:
        normalize(floats, k, inverse_rms, static_cast<const BFloat16*>(params.weight));
        break;
    }
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
