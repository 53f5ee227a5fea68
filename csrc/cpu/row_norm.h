// RMSNorm of one float32 row.
// Included inside the namespace of an instruction set.

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

template <class W>
inline void scale_row(float* floats, int64_t k, float inverse_rms, const W* weight) {
  for (int64_t i = 0; i < k; i += kLanes) {
    Vec y = load(floats + i) * inverse_rms;
    if (weight) y = y * load_up_to(weight + i, k - i);
    store(floats + i, y);
  }
}

// floats = floats / sqrt(mean(floats^2) + eps) * weight, in place; a null weight is ones. The
// padding up to a multiple of kLanes must be 0.
inline void normalize_row(float* floats, int64_t k, float eps, const void* weight,
                          FloatType weight_type) {
  const float mean = sum_of_squares(floats, k) / static_cast<float>(k);
  const float inverse_rms = 1.0f / std::sqrt(mean + eps);
  switch (weight_type) {
    case FloatType::kFloat32:
      return scale_row(floats, k, inverse_rms, static_cast<const float*>(weight));
    case FloatType::kFloat16:
      return scale_row(floats, k, inverse_rms, static_cast<const Half*>(weight));
    case FloatType::kBFloat16:
      return scale_row(floats, k, inverse_rms, static_cast<const BFloat16*>(weight));
  }
}
