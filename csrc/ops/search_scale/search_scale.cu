// A warp per row. Its halves look at two neighbouring steps at once, so that their sixteen lanes
// have the partial sums of a CPU's; the row comes from the first cache after the first pass.
#include <cuda_runtime.h>

#include "cuda/row_block.cuh"
#include "ops/search_scale/search_scale.h"

namespace resq::cuda {
namespace {

constexpr int kWarps = 8;
static_assert(kClipSums == 16 && kClipSteps % 2 == 0, "a half of a warp for each of two steps");

// power_2_4 of search_scale_body.h.
__device__ float power_2_4(float t) {
  const float x = __fmul_rn(t, t), fifth = __fmul_rn(x, 0.2f);
  const float bits = static_cast<float>(__float_as_int(x));
  float y = __int_as_float(__float2int_rz(__fsub_rn(kRootBits, __fmul_rn(bits, 0.2f))));
#pragma unroll
  for (int step = 0; step < kRootSteps; ++step) {
    const float square = __fmul_rn(y, y);
    const float fifths = __fmul_rn(__fmul_rn(__fmul_rn(fifth, square), square), y);
    y = __fmul_rn(y, __fsub_rn(1.2f, fifths));
  }
  const float root = __fmul_rn(x, __fmul_rn(y, y));
  return __fmul_rn(root, root);
}

__device__ float fold_half_warp(float sum) {
#pragma unroll
  for (int distance = kClipSums / 2; distance > 0; distance /= 2) {
    sum = __fadd_rn(sum, __shfl_xor_sync(~0u, sum, distance));
  }
  return sum;
}

// The largest absolute value of a row, NaN if any number is no finite one.
template <class T>
__device__ float largest(const T* row, int columns) {
  Range ranges[2];  // of one part: the second stays empty
  for (int k = threadIdx.x % 32; k < columns; k += 32) ranges[0].add(number(row[k]));
  set_ranges(ranges, reduce_warp(ordered_ranges(ranges)));
  return ranges[0].finite() ? fmaxf(-ranges[0].min, ranges[0].max) : NAN;
}

template <class T>
__global__ void __launch_bounds__(kWarps * 32)
    search_scale_kernel(const __grid_constant__ SearchScaleParams p) {
  const int64_t index = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (index >= p.rows) return;
  const int columns = static_cast<int>(p.columns);
  const int lane = threadIdx.x % 32, half_warp = lane / kClipSums;
  const T* row = static_cast<const T*>(p.weight) + index * columns;
  const float amax = largest(row, columns), lowest = -p.grid.half, highest = p.grid.half - 1.0f;
  ClipSearch search;
  if (amax >= kClipSmallest) {
    const float inverse = 1.0f / amax;
    for (int j = 0; j < kClipSteps; j += 2) {
      const float levels = p.grid.levels[j + half_warp];
      float all = 0.0f, beyond = 0.0f;
      for (int k = lane % kClipSums; k < columns; k += kClipSums) {
        const float q = __fmul_rn(__fmul_rn(number(row[k]), inverse), levels);
        const float rounded = rintf(q), code = fminf(highest, fmaxf(lowest, rounded));
        const float error = power_2_4(__fsub_rn(q, code));
        all = __fadd_rn(all, error);
        if (rounded != code) beyond = __fadd_rn(beyond, error);
      }
      all = fold_half_warp(all);
      beyond = fold_half_warp(beyond);
      bool goes_on = true;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float its_all = __shfl_sync(~0u, all, half * kClipSums);
        const float its_beyond = __shfl_sync(~0u, beyond, half * kClipSums);
        goes_on = goes_on && search.add(p.grid, j + half, its_all, its_beyond);
      }
      if (!goes_on) break;
    }
  }
  if (lane == 0) p.scale[index] = search.scale(p.grid, amax);
}

}  // namespace

void search_scale(const SearchScaleParams& p, Stream stream) {
  with_type(p.type, [&](auto t) {
    launch_kernel("search_scale", search_scale_kernel<decltype(t)>,
                  {.x = static_cast<unsigned>(ceil_div(p.rows, kWarps)), .threads = kWarps * 32},
                  stream, p);
  });
}

}  // namespace resq::cuda
