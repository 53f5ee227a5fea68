// pack_weight on CUDA: canonical codes -> a layout of docs/formats.md section 3.3. Defined in
// pack_weight.cu.
#pragma once

#include "core/packed_weight_cuda.h"
#include "cuda/launch.h"
#include "ops/pack_weight/pack_weight.h"

namespace resq::cuda {

// Params with device pointers; packed_weight has cuda_packed_weight_bytes(n, k_lo, k_hi), aligned
// to 16 bytes.
void pack_weight(const PackWeightParams& p, CudaLayout layout, Stream stream);

}  // namespace resq::cuda
