// The CUDA launchers of silu_mul_hadamard_quantize.
#pragma once

#include "cuda/hadamard_layout.h"
#include "cuda/launch.h"
#include "ops/silu_mul_hadamard_quantize/silu_mul_hadamard_quantize.h"

namespace resq::cuda {

// Device pointers, gate_up aligned to 16 bytes; 0 < rows < 2^31; a plan.
void silu_mul_hadamard_quantize(const SiluMulHadamardQuantizeParams& p,
                                const HadamardLayout& layout, const Device& device, Stream stream);

// Without a plan.
void silu_mul_quantize(const SiluMulHadamardQuantizeParams& p, Stream stream);

}  // namespace resq::cuda
