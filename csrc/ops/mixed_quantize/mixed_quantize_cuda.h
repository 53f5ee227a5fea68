// The CUDA launcher of mixed_quantize.
#pragma once

#include "cuda/launch.h"
#include "ops/mixed_quantize/mixed_quantize.h"

namespace resq::cuda {

// Device pointers; 0 < rows < 2^31.
void mixed_quantize(const MixedQuantizeParams& p, Stream stream);

}  // namespace resq::cuda
