// The running softmax of a warp over its tiles, and states that merge. Sums and products that could
// become one operation are written as the operations they are: a row has the same bits in every
// instance of the kernel.
#pragma once

#include "ops/kv_attention/kv_attention_products.cuh"

namespace resq::cuda {

inline constexpr unsigned kAllLanes = 0xffffffff;

__device__ inline float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// What scores and weights need of a token: x = scale * (code - centre) + offset.
struct PartRange {
  float scale, offset;

  __device__ PartRange(uint32_t stored, int centre) {
    const float2 pair = __half22float2(reinterpret_cast<const __half2&>(stored));
    scale = pair.x * (1.0f / kKvScaleFactor);
    offset = fmaf(scale, static_cast<float>(centre), pair.y);
  }
  // Biased exponent, kept where weights times 2^-exponent fit float16; NaN counts as large.
  __device__ unsigned exponent() const { return min(__float_as_uint(scale) >> 23, 142u); }
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

// A lane's two query rows 2 i and 2 i + 1 of eight.
struct QueryColumns {
  float multiplier[2], sum_low[2], sum_high[2];
  int visible[2];  // tokens that the row sees
};

// Weights are p * v_scale as float16 times 2^kWeightBits over the largest v_scale's power of two:
// the smallest that counts, p = 2^-24, is then far above float16's subnormals.
inline constexpr unsigned kWeightBits = 12;
inline constexpr unsigned kLeastExponent = 100;  // below that of the smallest stored scale / 4

// Eight query rows over the tiles of a warp. Sums over tokens are kept by lane until the end.
template <int kHeadDim>
struct RunningSoftmax {
  float max[2], sum[2], offset_low[2], offset_high[2];
  unsigned exponent_low[2], exponent_high[2];  // of the largest v_scale among visible tokens
  OutputSums<kHeadDim> out;

  __device__ RunningSoftmax() {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      max[h] = -INFINITY;
      sum[h] = offset_low[h] = offset_high[h] = 0.0f;
      exponent_low[h] = exponent_high[h] = kLeastExponent;
    }
  }

  // Scores of 16 tokens, of which this lane has `first_token` (ranges[0]) and the one 8 later, to
  // the weights' operand.
  __device__ WeightOperand add(const ScoreSums& sums, const TokenRanges (&ranges)[2],
                               const QueryColumns& q, int first_token) {
    float scores[4];
    bool visible[4], grows = false;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int h = c % 2;
      const TokenRanges& r = ranges[c / 2];
      float score = sums.low[c] * r.k_low.scale;
      score = fmaf(q.sum_low[h], r.k_low.offset, score);
      score = fmaf(sums.high[c], r.k_high.scale, score);
      score = fmaf(q.sum_high[h], r.k_high.offset, score);
      scores[c] = __fmul_rn(score, q.multiplier[h]);
      visible[c] = first_token + c / 2 * 8 < q.visible[h];
      grows |=
          visible[c] && (scores[c] > max[h] || ranges[c / 2].v_low.exponent() > exponent_low[h] ||
                         ranges[c / 2].v_high.exponent() > exponent_high[h]);
    }
    // Rare after the first tiles, and without effect on rows whose extremes stay.
    if (__any_sync(kAllLanes, grows)) raise(scores, visible, ranges);

    float low[4], high[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int h = c % 2;
      const TokenRanges& r = ranges[c / 2];
      const float p = exp2_approximate(__fsub_rn(scores[c], max[h]));
      // Selected, not multiplied by 0: what a token that is not seen holds may be NaN.
      sum[h] = visible[c] ? __fadd_rn(sum[h], p) : sum[h];
      offset_low[h] = visible[c] ? fmaf(p, r.v_low.offset, offset_low[h]) : offset_low[h];
      offset_high[h] = visible[c] ? fmaf(p, r.v_high.offset, offset_high[h]) : offset_high[h];
      low[c] = visible[c] ? p * (r.v_low.scale * weight_factor(exponent_low[h])) : 0.0f;
      high[c] = visible[c] ? p * (r.v_high.scale * weight_factor(exponent_high[h])) : 0.0f;
    }
    return {
        {transpose_8x8(half_pair(low[0], low[1])), transpose_8x8(half_pair(low[2], low[3]))},
        {transpose_8x8(half_pair(high[0], high[1])), transpose_8x8(half_pair(high[2], high[3]))}};
  }

  // Sums over the lanes.
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

  // A number of `out`, in row h's column, as the weighted sum of values.
  __device__ float low_value(float codes, int h) const {
    return fmaf(codes, __uint_as_float((exponent_low[h] - kWeightBits) << 23), offset_low[h]);
  }
  __device__ float high_value(float codes, int h) const {
    return fmaf(codes, __uint_as_float((exponent_high[h] - kWeightBits) << 23), offset_high[h]);
  }

 private:
  // 2^(kWeightBits + 127 - exponent).
  static __device__ float weight_factor(unsigned exponent) {
    return __uint_as_float((254 + kWeightBits - exponent) << 23);
  }

  __device__ void raise(const float (&scores)[4], const bool (&visible)[4],
                        const TokenRanges (&ranges)[2]) {
    float scale_low[2], scale_high[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = max[h];
      unsigned low = exponent_low[h], high = exponent_high[h];
#pragma unroll
      for (int c = h; c < 4; c += 2) {
        if (!visible[c]) continue;
        top = fmaxf(top, scores[c]);
        low = ::max(low, ranges[c / 2].v_low.exponent());
        high = ::max(high, ranges[c / 2].v_high.exponent());
      }
#pragma unroll
      for (int distance = 4; distance < 32; distance *= 2) {
        top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, distance));
        low = ::max(low, __shfl_xor_sync(kAllLanes, low, distance));
        high = ::max(high, __shfl_xor_sync(kAllLanes, high, distance));
      }
      const float factor = top == max[h] ? 1.0f : exp2_approximate(__fsub_rn(max[h], top));
      scale_low[h] = factor * __uint_as_float((127 + exponent_low[h] - low) << 23);
      scale_high[h] = factor * __uint_as_float((127 + exponent_high[h] - high) << 23);
      sum[h] *= factor;
      offset_low[h] *= factor;
      offset_high[h] *= factor;
      max[h] = top;
      exponent_low[h] = low;
      exponent_high[h] = high;
    }
    out.scale(scale_low, scale_high);
  }
};

// Some dims of a row's weighted sum, with the maximum and the sum of its weights. A sum of 0 says
// that no token has been seen (the largest weight of those that have is 1).
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

// Writes a row's dims; zeros if it has seen no token.
template <int kCount>
__device__ inline void store_row(const RowState<kCount>& state, FloatType type, void* out,
                                 int64_t index) {
  const float inverse = state.sum == 0.0f ? 0.0f : __fdiv_rn(1.0f, state.sum);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float value = __fmul_rn(state.values[i], inverse);
    switch (type) {
      case FloatType::kFloat32: static_cast<float*>(out)[index + i] = value; break;
      case FloatType::kFloat16:
        static_cast<__half*>(out)[index + i] = __float2half_rn(value);
        break;
      case FloatType::kBFloat16: static_cast<BFloat16*>(out)[index + i] = to_bfloat16(value); break;
    }
  }
}

}  // namespace resq::cuda
