// The CUDA kernels of mixed_gemm, and which of them a call runs: a pure function of shape and
// device (mixed_gemm_choice), tested on the CPU.
#pragma once

#include "cuda/arch.h"
#include "cuda/launch.h"
#include "ops/mixed_gemm/mixed_gemm.h"

namespace resq::cuda {

enum class MixedGemmKernel { kSmallBatch, kSm80, kSm90 };

struct MixedGemmChoice {
  MixedGemmKernel kernel;
  int tile_rows;            // activation rows of a block's tile (the MMA's N)
  int tile_columns;         // output columns, weight rows, of a block's tile (the MMA's M)
  int splits;               // blocks that share a tile's K; their int32 sums are added exactly
  int64_t workspace_bytes;  // scratch the launch needs, uninitialised
};

// Launchers: params as MixedGemmParams says with device pointers, 16-byte aligned, rows > 0 and
// n > 0; k_lo or k_hi may be 0. `workspace` has choice.workspace_bytes. Defined in .cu files.
void mixed_gemm_small_batch(const MixedGemmParams& p, const MixedGemmChoice& choice,
                            CudaLayout layout, void* workspace, Stream stream);
void mixed_gemm_sm80(const MixedGemmParams& p, const MixedGemmChoice& choice, void* workspace,
                     Stream stream);
void mixed_gemm_sm90(const MixedGemmParams& p, const MixedGemmChoice& choice, void* workspace,
                     const Device& device, Stream stream);

}  // namespace resq::cuda
