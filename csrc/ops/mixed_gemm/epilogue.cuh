// The epilogue that every CUDA kernel of mixed_gemm shares: exact int32 sums -> one output value,
// in the order of docs/formats.md section 4, and the predicated stores. m is a row of activations
// and of the output, n a row of the weight and column of the output.
//
// The intrinsics round every operation on its own, whatever -fmad says.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/pdl.cuh"
#include "ops/mixed_gemm/mixed_gemm.h"

namespace resq::cuda {

// Which terms of the formula exist. A part without columns is skipped, not added as zero: -0 stays.
struct PresentTerms {
  bool lo, hi, bias;
};

// The terms of m. Integers are modulo 2^32; the exact d fits in int32.
struct TermsOfM {
  float scale_lo, scale_hi;
  uint32_t zero_lo, zero_hi;
};

// The terms of n.
struct TermsOfN {
  float scale_lo, scale_hi, bias;
  uint32_t sum_lo, sum_hi;
};

__device__ __forceinline__ PresentTerms present_terms(const MixedGemmParams& p) {
  return {p.k_lo > 0, p.k_hi > 0, p.bias != nullptr};
}

// Outside the matrix all terms are zero, so that a tile needs no bounds checks of its own.
__device__ __forceinline__ TermsOfM load_terms_of_m(const MixedGemmParams& p, int64_t m) {
  if (m >= p.m) return {};
  const float4 v = reinterpret_cast<const float4*>(p.params)[m];
  return {v.x, v.z, exact_integer(v.y), exact_integer(v.w)};
}

__device__ __forceinline__ float load_bias(const MixedGemmParams& p, int64_t n) {
  if (p.bias == nullptr) return 0.0f;
  switch (p.bias_type) {
    case FloatType::kFloat16: return __half2float(static_cast<const __half*>(p.bias)[n]);
    case FloatType::kBFloat16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(p.bias)[n]);
    default: return static_cast<const float*>(p.bias)[n];
  }
}

__device__ __forceinline__ TermsOfN load_terms_of_n(const MixedGemmParams& p, int64_t n) {
  if (n >= p.n) return {};
  const float2 scale = __ldg(reinterpret_cast<const float2*>(p.weight_scale) + n);
  const int2 sum = __ldg(reinterpret_cast<const int2*>(p.weight_sum) + n);
  return {scale.x, scale.y, load_bias(p, n), static_cast<uint32_t>(sum.x),
          static_cast<uint32_t>(sum.y)};
}

// Asks for the terms of n .. n + 7 before pdl_wait. The weights of a layer have passed through the
// second-level cache since they were read last.
__device__ __forceinline__ void prefetch_terms_of_n(const MixedGemmParams& p, int64_t n) {
  if (n >= p.n) return;
  prefetch_early(reinterpret_cast<const float2*>(p.weight_scale) + n);
  prefetch_early(reinterpret_cast<const int2*>(p.weight_sum) + n);
  if (p.bias == nullptr) return;
  const int bytes = p.bias_type == FloatType::kFloat32 ? 4 : 2;
  prefetch_early(static_cast<const uint8_t*>(p.bias) + n * bytes);
}

// (float(sum - zero wsum) s) t of one part; s is of m, t of n.
__device__ __forceinline__ float output_part(int32_t sum, uint32_t zero, uint32_t weight_sum,
                                             float scale_m, float scale_n) {
  const uint32_t d = static_cast<uint32_t>(sum) - zero * weight_sum;
  return __fmul_rn(__fmul_rn(__int2float_rn(static_cast<int32_t>(d)), scale_m), scale_n);
}

__device__ __forceinline__ float output_lo(int32_t sum, const TermsOfM& of_m,
                                           const TermsOfN& of_n) {
  return output_part(sum, of_m.zero_lo, of_n.sum_lo, of_m.scale_lo, of_n.scale_lo);
}
__device__ __forceinline__ float output_hi(int32_t sum, const TermsOfM& of_m,
                                           const TermsOfN& of_n) {
  return output_part(sum, of_m.zero_hi, of_n.sum_hi, of_m.scale_hi, of_n.scale_hi);
}

// The output in float32 from the finished parts; a part that is not present is not used.
__device__ __forceinline__ float output_of_parts(float lo, float hi, float bias,
                                                 const PresentTerms& terms) {
  float y = terms.lo ? lo : 0.0f;
  if (terms.hi) y = terms.lo ? __fadd_rn(y, hi) : hi;
  return terms.bias ? __fadd_rn(y, bias) : y;
}

// The output in float32 from the exact sums of codes times codes.
__device__ __forceinline__ float output_value(int32_t sum_lo, int32_t sum_hi, const TermsOfM& of_m,
                                              const TermsOfN& of_n, const PresentTerms& terms) {
  return output_of_parts(output_lo(sum_lo, of_m, of_n), output_hi(sum_hi, of_m, of_n), of_n.bias,
                         terms);
}

__device__ __forceinline__ void store_rounded(float* out, float y) { *out = y; }
__device__ __forceinline__ void store_rounded(__half* out, float y) { *out = __float2half_rn(y); }
__device__ __forceinline__ void store_rounded(__nv_bfloat16* out, float y) {
  *out = __float2bfloat16_rn(y);
}

inline constexpr int kGroupN = 8;  // outputs of a row that a thread stores: 16 bytes of 16-bit ones

// Stores y[0..7] at (m, n..n + 7), n a multiple of 8; what lies outside the matrix is skipped.
template <class T>
__device__ __forceinline__ void store_group(T* out, const MixedGemmParams& p, int64_t m, int64_t n,
                                            const float (&y)[kGroupN]) {
  T* to = out + m * p.n + n;
  if (p.n % kGroupN == 0) {  // then every group is whole and its address a multiple of 16
    if (n >= p.n) return;
    alignas(16) T rounded[kGroupN];
#pragma unroll
    for (int j = 0; j < kGroupN; ++j) store_rounded(rounded + j, y[j]);
    constexpr int kVectors = kGroupN * sizeof(T) / sizeof(uint4);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      reinterpret_cast<uint4*>(to)[v] = reinterpret_cast<const uint4*>(rounded)[v];
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < kGroupN; ++j) {
    if (n + j < p.n) store_rounded(to + j, y[j]);
  }
}

__device__ __forceinline__ void store_group(const MixedGemmParams& p, int64_t m, int64_t n,
                                            const float (&y)[kGroupN]) {
  switch (p.out_type) {
    case FloatType::kFloat16: return store_group(static_cast<__half*>(p.out), p, m, n, y);
    case FloatType::kBFloat16: return store_group(static_cast<__nv_bfloat16*>(p.out), p, m, n, y);
    default: return store_group(static_cast<float*>(p.out), p, m, n, y);
  }
}

}  // namespace resq::cuda
