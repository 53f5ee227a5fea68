// The CUDA launcher of rms_norm_quantize.
#pragma once

#include "cuda/launch.h"
#include "ops/rms_norm_quantize/rms_norm_quantize.h"

namespace resq::cuda {

// Device pointers; 0 < rows < 2^31.
void rms_norm_quantize(const RmsNormQuantizeParams& p, Stream stream);

}  // namespace resq::cuda
