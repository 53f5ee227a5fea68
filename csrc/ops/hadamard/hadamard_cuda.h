// The CUDA launcher of hadamard.
#pragma once

#include "cuda/hadamard_layout.h"
#include "cuda/launch.h"
#include "ops/hadamard/hadamard.h"

namespace resq::cuda {

// Device pointers, x and y aligned to 16 bytes; 0 < rows < 2^31.
void hadamard(const HadamardParams& p, const HadamardLayout& layout, const Device& device,
              Stream stream);

}  // namespace resq::cuda
