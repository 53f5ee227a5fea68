// silu_mul_hadamard_quantize: mixed_quantize(H(silu(gate) * up)) in one pass per row.
//   silu(g) = g / (1 + exp(-g)) and H the normalised Hadamard transform, both in float32: of the
//   whole row, or of every `block` columns of the low part alone, which leaves the high part as it
//   is.
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
  const HadamardPlan* plan;  // of the whole row; null: none, or in blocks
  int64_t block;             // columns of a block, a power of two; 1 with a plan or no transform
  float scale;               // of products that are transformed: 1 / sqrt(size of the transform)
  MixedRows out;
};

// Blocks of a warp: eight columns a lane. A power of two without a Paley factor.
inline constexpr int64_t kLeastHadamardBlock = 8, kMostHadamardBlock = 256;

namespace cuda {

struct HadamardLayout;

// Device pointers, gate_up aligned to 16 bytes; 0 < rows < 2^31; a plan.
void silu_mul_hadamard_quantize(const SiluMulHadamardQuantizeParams& p,
                                const HadamardLayout& layout, const Device& device, Stream stream);

// Without a plan: in blocks, or no transform.
void silu_mul_blocks_quantize(const SiluMulHadamardQuantizeParams& p, const Device& device,
                              Stream stream);

}  // namespace cuda

}  // namespace resq
