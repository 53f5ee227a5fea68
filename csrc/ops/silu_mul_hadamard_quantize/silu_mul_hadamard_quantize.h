// silu_mul_hadamard_quantize: mixed_quantize(H(silu(gate) * up)) in one pass per row.
//   silu(g) = g / (1 + exp(-g)) and H the normalised Hadamard transform, both in float32.
#pragma once

#include "core/float16.h"
#include "core/hadamard.h"
#include "core/quantize.h"
#include "cuda/launch.h"

namespace resq {

struct SiluMulHadamardQuantizeParams {
  int64_t rows;
  const void* gate_up;  // [rows, 2 n] of type: gate, then up
  FloatType type;
  int64_t n;
  const HadamardPlan* plan;  // of size n; null: no transform
  float scale;               // of the product: 1 / sqrt(n), or 1 without a transform
  MixedRows out;
};

namespace cuda {

struct HadamardLayout;

// Device pointers, gate_up aligned to 16 bytes; 0 < rows < 2^31; a plan.
void silu_mul_hadamard_quantize(const SiluMulHadamardQuantizeParams& p,
                                const HadamardLayout& layout, const Device& device, Stream stream);

// Without a plan.
void silu_mul_quantize(const SiluMulHadamardQuantizeParams& p, Stream stream);

}  // namespace cuda

}  // namespace resq
