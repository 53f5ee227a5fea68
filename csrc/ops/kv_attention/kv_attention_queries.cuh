// Query rows of an item as tensor-core operands: float16 values times a power of two per row, so
// that float16 holds a row of any magnitude, and residuals, which are what float16 loses of the
// high dims.
#pragma once

#include "cuda/numbers.cuh"
#include "ops/kv_attention/kv_attention_products.cuh"
#include "ops/kv_attention/kv_attention_work.cuh"

namespace resq::cuda::attention {

// Numbers of a row: q * scale = multiplier * (values + residuals), and the sums of
// values + residuals by part.
struct QueryNumbers {
  float multiplier, sum_low, sum_high, unused;
};

// Rows in shared memory. Their pitch is 4 modulo 32 words, so that the rows g of a warp's lanes are
// in different banks.
template <int kHeadDim, int kRows>
struct QueryRows {
  uint32_t values[kRows][kHeadDim / 2 + 4];  // pairs of float16
  uint32_t residuals[kRows][kHeadDim / 16];  // of the high dims
  QueryNumbers numbers[kRows];
};

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    x = __fadd_rn(x, __shfl_xor_sync(0xffffffff, x, distance));
  }
  return x;
}

// A warp computes row `row` from the query at `from`; each lane has dims lane * kHeadDim / 32 + i.
template <int kHeadDim, int kRows>
__device__ inline void make_query(const KvAttentionCuda& call, int64_t from, int row,
                                  QueryRows<kHeadDim, kRows>& to) {
  constexpr int kDims = kHeadDim / 32, kLow = KvLayout<kHeadDim>::kLowDims;
  const int lane = threadIdx.x % 32, first = lane * kDims;
  float x[kDims];
  load_numbers(call.params.q, from + first, x);
  unsigned magnitude = 0;
#pragma unroll
  for (int i = 0; i < kDims; ++i) {
    x[i] = __fmul_rn(x[i], call.params.scale);
    magnitude = max(magnitude, __float_as_uint(x[i]) & 0x7fffffff);
  }
  magnitude = __reduce_max_sync(0xffffffff, magnitude);
  const bool finite = magnitude < 0x7f800000;
  // 2^e with the row's largest |x| in [2^e, 2^(e + 1)), clamped so that 2^-e stays normal.
  const unsigned exponent = min(max(magnitude >> 23, 20u), 253u);
  const float inverse = __uint_as_float((254 - exponent) << 23);

  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kDims; i += 2) {
    const float scaled[2] = {finite ? __fmul_rn(x[i], inverse) : 0.0f,
                             finite ? __fmul_rn(x[i + 1], inverse) : 0.0f};
    const uint32_t pair = half_pair(scaled[0], scaled[1]);
    const float2 kept = __half22float2(reinterpret_cast<const __half2&>(pair));
    to.values[row][(first + i) / 2] = pair;
    if (first < kLow) {
      sum = __fadd_rn(__fadd_rn(sum, kept.x), kept.y);
    } else {
      const uint32_t rest = half_pair(__fsub_rn(scaled[0], kept.x), __fsub_rn(scaled[1], kept.y));
      const float2 lost = __half22float2(reinterpret_cast<const __half2&>(rest));
      to.residuals[row][(first - kLow + i) / 2] = rest;
      sum = __fadd_rn(__fadd_rn(__fadd_rn(__fadd_rn(sum, kept.x), lost.x), kept.y), lost.y);
    }
  }
  const float sum_low = warp_sum(first < kLow ? sum : 0.0f);
  const float sum_high = warp_sum(first < kLow ? 0.0f : sum);
  if (lane == 0) {
    const float multiplier = finite ? __uint_as_float(exponent << 23) : __int_as_float(0x7fc00000);
    to.numbers[row] = {multiplier, sum_low, sum_high, 0.0f};
  }
}

// All rows of an item, by all warps of the block.
template <int kHeadDim, int kRows>
__device__ inline void make_queries(const KvAttentionCuda& call, const KvItem& item,
                                    QueryRows<kHeadDim, kRows>& to) {
  const Divisor& group = call.group;
  const int warps = blockDim.x / 32;
#pragma unroll 1
  for (int row = threadIdx.x / 32; row < item.rows; row += warps) {
    const int64_t from =
        item.token(group, row) * call.params.q_stride + item.head(group, row) * kHeadDim;
    make_query<kHeadDim>(call, from, row, to);
  }
}

}  // namespace resq::cuda::attention
