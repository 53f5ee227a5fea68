// mixed_quantize: per row, the first k_lo columns to 4 (or 8) bits, the last k_hi to 8 bits.
//   x ~ scale * (code - zero) per row and part; rounding rules: docs/formats.md section 2.
#pragma once

#include "core/float16.h"
#include "core/quantize.h"
#include "cuda/launch.h"

namespace resq {

struct MixedQuantizeParams {
  int64_t rows;
  const void* x;  // [rows, k_lo + k_hi] of x_type
  FloatType x_type;
  MixedRows out;
};

namespace cuda {

// Device pointers; 0 < rows < 2^31.
void mixed_quantize(const MixedQuantizeParams& p, Stream stream);

}  // namespace cuda

}  // namespace resq
