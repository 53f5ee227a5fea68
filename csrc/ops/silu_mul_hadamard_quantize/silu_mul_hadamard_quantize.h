// silu_mul_hadamard_quantize: mixed_quantize(H(silu(gate) * up)) in one pass per row.
//   silu(g) = g / (1 + exp(-g)) and H the normalised Hadamard transform, both in float32.
#pragma once

#include "core/float16.h"
#include "core/hadamard.h"
#include "core/quantize.h"
#include "cpu/variants.h"

namespace resq {

struct SiluMulHadamardQuantizeParams {
  const void* gate_up;  // [rows, 2 n] of type: gate, then up
  FloatType type;
  int64_t n;
  const HadamardPlan* plan;  // of size n; null: no transform
  MixedRows out;
};

namespace cpu {
RESQ_DECLARE_ROWS_KERNEL(silu_mul_hadamard_quantize, SiluMulHadamardQuantizeParams)
}

}  // namespace resq
