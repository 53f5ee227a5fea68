// The CUDA kernels of mixed_gemm, one folder each; mixed_gemm_choice.h chooses among them.
#pragma once

#include "ops/mixed_gemm/mixed_gemm_tiles.h"

namespace resq::cuda {

// Launchers: params as MixedGemmParams says with device pointers, 16-byte aligned, M > 0 and N > 0;
// K_lo or K_hi may be 0. `workspace` has choice.workspace_bytes. Defined in .cu files.
void mixed_gemm_small_m(const MixedGemmParams& p, const MixedGemmChoice& choice, CudaLayout layout,
                        void* workspace, const Device& device, Stream stream);
void mixed_gemm_sm80(const MixedGemmParams& p, const MixedGemmChoice& choice, void* workspace,
                     Stream stream);
void mixed_gemm_sm90(const MixedGemmParams& p, const MixedGemmChoice& choice, void* workspace,
                     const Device& device, Stream stream);

}  // namespace resq::cuda
