// The one CPU body of search_scale.
// Included inside the namespace of an instruction set.

#include "cpu/row_quantize.h"

struct ClipErrors {
  float all, beyond;
};

// |t|^2.4, 0 of 0.
inline Vec power_2_4(Vec t) {
  const Vec x = t * t, fifth = x * 0.2f;
  const Vec bits = __builtin_convertvector(__builtin_bit_cast(IVec, x), Vec);
  Vec y = __builtin_bit_cast(Vec, __builtin_convertvector(kRootBits - bits * 0.2f, IVec));
  for (int step = 0; step < kRootSteps; ++step) {
    const Vec square = y * y;
    y = y * (1.2f - fifth * square * square * y);
  }
  const Vec root = x * (y * y);
  return root * root;
}

// The sum of kClipSums partial sums, folded in half.
inline float fold_sums(const Vec* sums) {
  float partial[kClipSums];
  for (int v = 0; v < kClipSums / kLanes; ++v) store(partial + v * kLanes, sums[v]);
  for (int width = kClipSums / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) partial[i] += partial[i + width];
  }
  return partial[0];
}

// Of weights over their largest, a multiple of kClipSums of them.
inline ClipErrors clip_errors(const float* row, int64_t count, float levels, float half) {
  constexpr int kVecs = kClipSums / kLanes;
  const Vec lowest = set1(-half), highest = set1(half - 1.0f);
  Vec all[kVecs] = {}, beyond[kVecs] = {};
  for (int64_t i = 0; i < count; i += kClipSums) {
    for (int v = 0; v < kVecs; ++v) {
      const Vec q = load(row + i + v * kLanes) * levels, rounded = round(q);
      const Vec code = min(highest, max(lowest, rounded));
      const Vec error = power_2_4(q - code);
      all[v] = all[v] + error;
      beyond[v] = beyond[v] + (rounded != code ? error : Vec{});
    }
  }
  return {fold_sums(all), fold_sums(beyond)};
}

void search_scale_rows(const SearchScaleParams& p, int64_t begin, int64_t end) {
  const int64_t padded = align_up(p.columns, kClipSums);
  float* row = thread_row_buffer().floats(padded);
  for (int64_t i = begin; i < end; ++i) {
    std::fill(row + p.columns, row + padded, 0.0f);
    load_row(p.weight, p.type, i * p.columns, p.columns, row);
    const Range range = row_range(row, p.columns);
    const float amax = range.finite ? std::max(-range.min, range.max) : NAN;
    ClipSearch search;
    if (amax >= kClipSmallest) {
      const float inverse = 1.0f / amax;
      for (int64_t k = 0; k < padded; k += kLanes) store(row + k, load(row + k) * inverse);
      for (int j = 0; j < kClipSteps; ++j) {
        const ClipErrors errors = clip_errors(row, padded, p.grid.levels[j], p.grid.half);
        if (!search.add(p.grid, j, errors.all, errors.beyond)) break;
      }
    }
    p.scale[i] = search.scale(p.grid, amax);
  }
}
