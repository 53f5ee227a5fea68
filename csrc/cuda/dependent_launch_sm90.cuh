// Programmatic dependent launches of sm_90: a kernel's blocks may take their places while the
// kernel before it in the stream still ends, which hides most of the time between the two.
//
// A kernel launched so calls wait_for_kernel_before in every thread of every block before it reads
// or writes global memory that any kernel before it has touched. allow_kernel_after comes behind
// that call: what starts after it then finds complete all that came before its own predecessor.
#pragma once

#include <cuda_runtime.h>

#include "cuda/launch.h"

namespace resq::cuda {

// Until all blocks of the kernel before have ended and what they wrote is visible.
__device__ inline void wait_for_kernel_before() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

// The kernel after may start as soon as every block of this one has come here.
__device__ inline void allow_kernel_after() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// The kernel before may be any: one that never calls allow_kernel_after allows it when it ends.
template <class Parameter>
inline void launch_dependent(void (*kernel)(Parameter), unsigned blocks, unsigned threads,
                             int shared_bytes, Stream stream, const Parameter& parameter) {
  cudaLaunchAttribute dependent;
  dependent.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  dependent.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &dependent;
  config.numAttrs = 1;
  cudaLaunchKernelEx(&config, kernel, parameter);
}

}  // namespace resq::cuda
