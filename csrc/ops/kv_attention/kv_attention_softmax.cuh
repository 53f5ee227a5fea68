// The running softmax of a warp over its tiles, and states that merge. Sums and products that the
// compiler could contract into one operation are written as explicit operations, so that a row has
// the same bits in every instance of the kernel.
#pragma once

#include "cuda/numbers.cuh"
#include "ops/kv_attention/kv_attention_cuda.h"
#include "ops/kv_attention/kv_attention_products.cuh"

namespace resq::cuda::attention {

__device__ inline float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// What scores and weights need from a token: 4 x = scale * (code - centre) + 4 * offset, with the
// scale as it is stored.
struct PartRange {
  float scale, offset;

  __device__ PartRange(uint32_t stored, int centre) {
    const float2 pair = __half22float2(reinterpret_cast<const __half2&>(stored));
    scale = pair.x;
    offset = fmaf(scale, static_cast<float>(centre) / kKvScaleFactor, pair.y);
  }
};
struct TokenRanges {
  PartRange k_low, k_high, v_low, v_high;

  __device__ explicit TokenRanges(const uint8_t* metadata)
      : TokenRanges(*reinterpret_cast<const uint4*>(metadata)) {}
  __device__ explicit TokenRanges(const uint4& stored)
      : k_low(stored.x, kKvCentreLow),
        k_high(stored.y, kKvCentreHigh),
        v_low(stored.z, kKvCentreLow),
        v_high(stored.w, kKvCentreHigh) {}
};

// A lane's two query rows 2 i and 2 i + 1 of eight. Scores are multiplier * (sums + sums of q x
// offset): both sums are 4 times too large, the multiplier is 4 times too small.
struct QueryColumns {
  float multiplier[2], sum_low[2], sum_high[2];
  int visible[2];  // tokens that the row sees
};

// A row keeps a maximum that is raised only by a score more than kMaxSlack above it, to that score.
// So p = 2^(score - kept) is at most 2^kMaxSlack, and 1 for the token that raised it last. With
// independent scores a warp raises 1.0 to 1.35 times in 16 tiles, nearly always at the first one;
// with kMaxSlack 0 it does so in 8 (4 rows) to 11 (8 rows). Whether a row is raised depends on the
// row alone, not on what else happens in the branch.
//
// Weights are p * v_scale as float16, scaled by the power of two that brings the largest v_scale
// seen into [kWeightTop / 2, kWeightTop):
//   largest weight    below 2^kMaxSlack * kWeightTop = 2^15, half of what float16 holds
//   sum of a row      at most 2^kMaxSlack a token, 2^18 in a split; of weights times codes, 2^15 x
//                     255 a token, 2^33: float32
//   smallest weight   with the largest v_scale a p from 2^-20 on has all bits of float16, and one
//                     from 2^-31 on still counts. The row's largest p is 1 or more and a centred
//                     code at most 8, so that what is lost below is 2^-18 of a step of V for 1024
//                     tokens together, whatever V's magnitude.
inline constexpr float kMaxSlack = 8.0f;
inline constexpr float kWeightTop = 128.0f;
static_assert(kMaxSlack == 8 && 256 * kWeightTop <= 0x1p15f);
inline constexpr float kWeightLeast = 0x1p-24f;  // the smallest stored scale that is not 0
inline constexpr float kWeightMost = 0x1p15f;    // the largest is below twice this

__device__ inline float weight_factor(float scale) {
  scale = fminf(fmaxf(scale, kWeightLeast), kWeightMost);  // NaN becomes the least
  const unsigned exponent = __float_as_uint(scale) >> 23;
  return __uint_as_float((254 - exponent) << 23) * (kWeightTop / 2);
}

// Eight query rows over the tiles of a warp. Each lane keeps its own sums over tokens until the
// end.
template <int kHeadDim>
struct RunningSoftmax {
  float max[2], sum[2], offset_low[2], offset_high[2];
  float factor_low[2], factor_high[2];  // weight_factor of the largest v_scale among visible tokens
  OutputSums<kHeadDim> out;

  __device__ RunningSoftmax() {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      max[h] = -INFINITY;
      sum[h] = offset_low[h] = offset_high[h] = 0.0f;
      factor_low[h] = factor_high[h] = weight_factor(0.0f);
    }
  }

  // Turns the scores of 16 tokens into the weights' operand. This lane has token `first_token`
  // (ranges[0]) and the token 8 later (ranges[1]). Without kMasked all rows see all of them, and
  // the bits are the same.
  template <bool kMasked>
  __device__ WeightOperand add(const ScoreSums& sums, const TokenRanges (&ranges)[2],
                               const QueryColumns& q, int first_token) {
    float scores[4], low[4], high[4], above[4];  // above the kept maximum
    bool visible[4], grows = false;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int h = c % 2;
      const TokenRanges& r = ranges[c / 2];
      float score = __fmul_rn(sums.low[c], r.k_low.scale);
      score = fmaf(q.sum_low[h], r.k_low.offset, score);
      score = fmaf(sums.high[c], r.k_high.scale, score);
      scores[c] = fmaf(q.sum_high[h], r.k_high.offset, score);
      above[c] = __fmaf_rn(scores[c], q.multiplier[h], -max[h]);
      low[c] = __fmul_rn(r.v_low.scale, factor_low[h]);
      high[c] = __fmul_rn(r.v_high.scale, factor_high[h]);
      visible[c] = !kMasked || first_token + c / 2 * 8 < q.visible[h];
      grows |= visible[c] & ((above[c] > kMaxSlack) | (fmaxf(low[c], high[c]) >= kWeightTop));
    }
    if (__any_sync(kAllLanes, grows)) {
      raise(scores, above, visible, ranges, q);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        above[c] = __fmaf_rn(scores[c], q.multiplier[c % 2], -max[c % 2]);
        low[c] = __fmul_rn(ranges[c / 2].v_low.scale, factor_low[c % 2]);
        high[c] = __fmul_rn(ranges[c / 2].v_high.scale, factor_high[c % 2]);
      }
    }

#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int h = c % 2;
      const TokenRanges& r = ranges[c / 2];
      const float p = exp2_approximate(above[c]);
      // Selected, not multiplied by 0: a masked token may hold NaN.
      sum[h] = visible[c] ? __fadd_rn(sum[h], p) : sum[h];
      offset_low[h] = visible[c] ? fmaf(p, r.v_low.offset, offset_low[h]) : offset_low[h];
      offset_high[h] = visible[c] ? fmaf(p, r.v_high.offset, offset_high[h]) : offset_high[h];
      low[c] = visible[c] ? __fmul_rn(p, low[c]) : 0.0f;
      high[c] = visible[c] ? __fmul_rn(p, high[c]) : 0.0f;
    }
    WeightOperand weights;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float* pair = high + 2 * half;
      const uint32_t rounded = half_pair(pair[0], pair[1]);
      const float2 kept = __half22float2(reinterpret_cast<const __half2&>(rounded));
      weights.low[half] = transpose_8x8(half_pair(low[2 * half], low[2 * half + 1]));
      weights.high[half] = transpose_8x8(rounded);
      weights.high_residuals[half] =
          transpose_8x8(half_pair(__fsub_rn(pair[0], kept.x), __fsub_rn(pair[1], kept.y)));
    }
    return weights;
  }

  // Reduces the sums over the lanes.
  __device__ void finish() {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int distance = 4; distance < 32; distance *= 2) {
        sum[h] += __shfl_xor_sync(kAllLanes, sum[h], distance);
        offset_low[h] += __shfl_xor_sync(kAllLanes, offset_low[h], distance);
        offset_high[h] += __shfl_xor_sync(kAllLanes, offset_high[h], distance);
      }
    }
  }

  // Converts a number of `out`, in row h's column, to the weighted sum of values.
  __device__ float low_value(float codes, int h) const {
    return fmaf(codes, value_scale(factor_low[h]), offset_low[h]);
  }
  __device__ float high_value(float codes, int h) const {
    return fmaf(codes, value_scale(factor_high[h]), offset_high[h]);
  }

 private:
  // 1 / (4 * factor), exact: a power of two.
  static __device__ float value_scale(float factor) {
    return __uint_as_float((254u << 23) - __float_as_uint(factor)) * (1.0f / kKvScaleFactor);
  }

  // a / b of two powers of two, exact.
  static __device__ float ratio(float a, float b) {
    return __uint_as_float((127u << 23) + __float_as_uint(a) - __float_as_uint(b));
  }

  // Leaves rows alone for which none of these tokens is a reason to raise. `scores` are without the
  // multiplier. A row's largest score is above the kept maximum by more than kMaxSlack if any is.
  __device__ void raise(const float (&scores)[4], const float (&above)[4], const bool (&visible)[4],
                        const TokenRanges (&ranges)[2], const QueryColumns& q) {
    float scale_low[2], scale_high[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = -INFINITY, low = kWeightLeast, high = kWeightLeast;
#pragma unroll
      for (int c = h; c < 4; c += 2) {
        if (!visible[c]) continue;
        if (above[c] > kMaxSlack) top = fmaxf(top, __fmul_rn(scores[c], q.multiplier[h]));
        low = fmaxf(low, ranges[c / 2].v_low.scale);
        high = fmaxf(high, ranges[c / 2].v_high.scale);
      }
#pragma unroll
      for (int distance = 4; distance < 32; distance *= 2) {
        top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, distance));
        low = fmaxf(low, __shfl_xor_sync(kAllLanes, low, distance));
        high = fmaxf(high, __shfl_xor_sync(kAllLanes, high, distance));
      }
      low = fminf(weight_factor(low), factor_low[h]);
      high = fminf(weight_factor(high), factor_high[h]);
      const bool raised = top > -INFINITY;
      if (!raised) top = max[h];
      const float factor = raised ? exp2_approximate(__fsub_rn(max[h], top)) : 1.0f;
      scale_low[h] = __fmul_rn(factor, ratio(low, factor_low[h]));
      scale_high[h] = __fmul_rn(factor, ratio(high, factor_high[h]));
      sum[h] = __fmul_rn(sum[h], factor);
      offset_low[h] = __fmul_rn(offset_low[h], factor);
      offset_high[h] = __fmul_rn(offset_high[h], factor);
      max[h] = top;
      factor_low[h] = low;
      factor_high[h] = high;
    }
    out.scale(scale_low, scale_high);
  }
};

// Some dims of a row's weighted sum, with the maximum and the sum of its weights. A sum of 0 means
// that the row has seen no token (of those seen, the largest weight is 1).
template <int kCount>
struct RowState {
  float max = -INFINITY, sum = 0.0f, values[kCount] = {};

  __device__ void merge(const RowState& other) {
    if (other.sum == 0.0f) return;
    const float common = fmaxf(max, other.max);
    const float before = exp2_approximate(__fsub_rn(max, common));
    const float after = exp2_approximate(__fsub_rn(other.max, common));
    sum = __fmaf_rn(sum, before, __fmul_rn(other.sum, after));
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      values[i] = __fmaf_rn(values[i], before, __fmul_rn(other.values[i], after));
    }
    max = common;
  }
};

// Writes a row's dims from `dim` on; zeros if it has seen no token.
template <int kCount>
__device__ inline void store_row(const RowState<kCount>& state, const KvAttentionParams& p,
                                 const KvOutputRow& to, int dim) {
  const float inverse = state.sum == 0.0f ? 0.0f : __fdiv_rn(1.0f, state.sum);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float value = __fmul_rn(state.values[i], inverse);
    store_number(p.out, p.out_type, to.index(dim + i), value);
  }
}

}  // namespace resq::cuda::attention
