// search_scale: the symmetric scale of every row whose codes have the smallest 2.4-norm error.
//
//   amax = max_k |w_k|, half = 2^(bits - 1), range_j = 1 - j / 100 for j in 0 .. 79
//   error_j = range_j^2.4 sum_k |q - c|^2.4,  q = w_k / amax (half - 1) / range_j,
//                                             c = clamp(round(q), -half, half - 1)
//   scale = amax range_j / (half - 1) of the j with the smallest error; of equal ones the first
//
// An error beyond the largest code only grows as the range shrinks, so the search ends where these
// alone exceed the best error. In float32 without fused multiply-adds, in 16 interleaved partial
// sums: every device gives the same bits. A row of zeros has scale 1, one with a NaN or an infinity
// NaN.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/float16.h"
#include "core/host_device.h"
#include "cuda/launch.h"

namespace resq {

inline constexpr int kClipSteps = 80;
inline constexpr int kClipSums = 16;

// |q - c|^2.4 = (x y^2)^2 of x = (q - c)^2 and y = x^(-1/5). y begins with the bits
// kRootBits - bits(x) / 5, within 3.3 %, and each of kRootSteps steps y (6 - x y^5) / 5 of Newton's
// method makes 3 e^2 of an error e. What is left of the power's is rounding, 1e-6.
inline constexpr float kRootBits = 1277920000.0f;
inline constexpr int kRootSteps = 3;

// A row whose largest weight is smaller keeps its whole range: its reciprocal may be no float.
inline constexpr float kClipSmallest = 0x1p-126f;

// Taken off the errors beyond the largest code before they end a search: rounding of the sums.
inline constexpr float kClipSlack = 1.0f - 1e-5f;

// What depends on the bits and the step alone.
struct ClipGrid {
  float half;                // 2^(bits - 1)
  float range[kClipSteps];   // range_j
  float levels[kClipSteps];  // (half - 1) / range_j
  float power[kClipSteps];   // range_j^2.4

  explicit ClipGrid(int bits) : half(static_cast<float>(1 << (bits - 1))) {
    for (int j = 0; j < kClipSteps; ++j) {
      const double r = 1.0 - 0.01 * j;
      range[j] = static_cast<float>(r);
      levels[j] = static_cast<float>((half - 1.0) / r);
      power[j] = static_cast<float>(std::pow(r, 2.4));
    }
  }
};

struct SearchScaleParams {
  int64_t rows, columns;  // columns > 0
  const void* weight;     // [rows, columns] of type
  float* scale;           // [rows]
  FloatType type;
  ClipGrid grid;
};

// The best step of a row so far.
struct ClipSearch {
  float error = INFINITY;
  int step = 0;

  // Takes the sums of step j, of all columns and of those beyond the largest code; false where no
  // later step can be better.
  RESQ_HOST_DEVICE bool add(const ClipGrid& grid, int j, float all, float beyond) {
    const float found = all * grid.power[j];
    if (found < error) {
      error = found;
      step = j;
    }
    return !(beyond * grid.power[j] * kClipSlack > error);
  }

  RESQ_HOST_DEVICE float scale(const ClipGrid& grid, float amax) const {
    return amax == 0.0f ? 1.0f : amax * grid.range[step] / (grid.half - 1.0f);
  }
};

namespace cuda {

// Device pointers; 0 < rows < 2^31.
void search_scale(const SearchScaleParams& p, Stream stream);

}  // namespace cuda

}  // namespace resq
