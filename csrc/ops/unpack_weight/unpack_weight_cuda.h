// unpack_weight on CUDA: a layout of docs/formats.md section 3.3 -> canonical codes. Defined in
// unpack_weight.cu.
#pragma once

#include "core/packed_weight_cuda.h"
#include "cuda/launch.h"
#include "ops/unpack_weight/unpack_weight.h"

namespace resq::cuda {

// Params with device pointers; packed_weight has cuda_packed_weight_bytes(n, k_lo, k_hi).
void unpack_weight(const UnpackWeightParams& p, CudaLayout layout, Stream stream);

}  // namespace resq::cuda
