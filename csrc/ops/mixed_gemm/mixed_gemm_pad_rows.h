// Activation rows for kernels that read them with aligned loads. Defined in mixed_gemm_pad_rows.cu.
#pragma once

#include "ops/mixed_gemm/mixed_gemm_config.h"

namespace resq::cuda {

// Copies rows of `bytes` bytes to rows of `padded` bytes, a multiple of 16, filled up with zeros.
void pad_byte_rows(const void* from, uint8_t* to, int64_t rows, int64_t bytes, int64_t padded,
                   Stream stream);

// `p` with rows of whole units: parts that are not are copied to the workspace, behind the planes
// of `splits`, with zeros up to a whole step of the weight.
MixedGemmParams pad_rows(const MixedGemmParams& p, int splits, const RowUnits& units,
                         void* workspace, Stream stream);

}  // namespace resq::cuda
