// embedding on CUDA: rows of a layout of docs/formats.md section 3.3. Defined in embedding.cu.
#pragma once

#include "core/packed_weight_cuda.h"
#include "cuda/launch.h"
#include "ops/embedding/embedding.h"

namespace resq::cuda {

// Params with device pointers; an id that is none stops the kernel.
void embedding(const EmbeddingParams& p, CudaLayout layout, Stream stream);

}  // namespace resq::cuda
