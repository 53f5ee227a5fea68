// What the kernels of silu_mul_hadamard_quantize share: the products of a row, and their codes.
#pragma once

#include "cuda/row_quantize.cuh"
#include "cuda/silu.cuh"
#include "ops/silu_mul_hadamard_quantize/silu_mul_hadamard_quantize.h"

namespace resq::cuda {

// The products of a row in runs of eight columns, 0 beyond the row. kAligned: n % 8 is 0.
template <class T, bool kAligned>
struct Products {
  struct Fetched {
    Chunk<T> gate, up;
  };
  // 32 registers. Rows that are not aligned, which no model has, are not worth the code.
  static constexpr int kAhead = !kAligned ? 1 : sizeof(T) == 2 ? 4 : 2;

  const T* gate;  // `up` follows
  int n;
  float scale;

  __device__ Products(const SiluMulHadamardQuantizeParams& p, int64_t row)
      : gate(static_cast<const T*>(p.gate_up) + row * 2 * p.n),
        n(static_cast<int>(p.n)),
        scale(p.scale) {}

  __device__ Fetched fetch(int run) const {
    const int column = 8 * run;
    if (column >= n) return {};
    return {load_chunk<kAligned>(gate + column, n - column),
            load_chunk<kAligned>(gate + n + column, n - column)};
  }

  __device__ void values(const Fetched& fetched, float (&x)[8]) const { values(fetched, scale, x); }
  __device__ static void values(const Fetched& fetched, float scale, float (&x)[8]) {
    float gates[8], activated[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) gates[i] = fetched.gate[i];
    silu(gates, activated);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = __fmul_rn(__fmul_rn(activated[i], fetched.up[i]), scale);
  }
};

// Quantizes the row whose runs for_each(use) passes to use(run, values). reduce(ranges) makes a
// thread's ranges those of the row. kAlways: both parts consist of whole runs.
template <bool kAlways, class ForEach, class Reduce>
__device__ inline void quantize_runs(const MixedRows& out, int64_t row, ForEach for_each,
                                     Reduce reduce, bool writes_params) {
  const int k_lo = static_cast<int>(out.k_lo);
  const bool aligned = kAlways || (k_lo % 8 == 0 && out.k_hi % 8 == 0);
  Range ranges[2];
  for_each([&](int run, const float (&y)[8]) {
    if (aligned) {
      add_to_ranges<true>(ranges, k_lo, 8 * run, y);
    } else {
      add_to_ranges<false>(ranges, k_lo, 8 * run, y);
    }
  });
  reduce(ranges);
  const RowCodes codes(ranges, out, row, writes_params);
  for_each([&](int run, const float (&y)[8]) {
    if (aligned) {
      codes.template store<true>(8 * run, y);
    } else {
      codes.template store<false>(8 * run, y);
    }
  });
}

}  // namespace resq::cuda
