// decoder_layers: all decoder layers of a pass, by the operators of one layer after another.
//
// For every layer, with x and its residual h, first 0:
//   h = h + x
//   a = kv_attention(kv_append(mixed_gemm(rms_norm_quantize(h))))  over the layer's cache
//   h = h + mixed_gemm(mixed_quantize(a))
//   g = mixed_gemm(rms_norm_quantize(h))
//   x = mixed_gemm(silu_mul_hadamard_quantize(g))
// The bits are those of the operators called one by one. What is gained is the time between them:
// on a CPU a step of one token spends more of it in Python than in the kernels.
//
// `weights` has kDecoderLayerWeights entries a layer; one that a layer does not have is None.
#pragma once

#include <cstdint>

namespace resq {

// Of a linear, counted from its first entry.
inline constexpr int64_t kPackedWeight = 0, kWeightScale = 1, kWeightSum = 2, kBias = 3;
inline constexpr int64_t kLinearWeights = 4;

// Of a layer.
inline constexpr int64_t kInputNorm = 0;
inline constexpr int64_t kQkv = 1;
inline constexpr int64_t kKeyRotation = kQkv + kLinearWeights;
inline constexpr int64_t kOutput = kKeyRotation + 1;
inline constexpr int64_t kAttentionNorm = kOutput + kLinearWeights;
inline constexpr int64_t kGateUp = kAttentionNorm + 1;
inline constexpr int64_t kDown = kGateUp + kLinearWeights;
inline constexpr int64_t kDecoderLayerWeights = kDown + kLinearWeights;

// Rows that are quantized, in the order of `n_hi` and `clip`.
inline constexpr int64_t kHiddenRows = 0, kAttentionRows = 1, kIntermediateRows = 2;
inline constexpr int64_t kDecoderRows = 3;

}  // namespace resq
