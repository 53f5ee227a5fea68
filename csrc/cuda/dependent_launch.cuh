// Programmatic dependent launches of sm_90: a kernel's blocks may take their places while the
// kernel before it in the stream still ends, which hides most of the time between the two. Where
// the stream does not ask for them (cuda/launch.h), and on other architectures, the same calls are
// an ordinary launch and nothing.
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
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The kernel after may start as soon as every block of this one has come here.
__device__ inline void allow_kernel_after() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// kernel<<<grid, threads, shared_bytes, stream>>>(arguments...). The kernel before may be any: one
// that never calls allow_kernel_after allows it when it ends.
template <class... Parameters, class... Arguments>
inline void launch_dependent(void (*kernel)(Parameters...), dim3 grid, unsigned threads,
                             int shared_bytes, Stream stream, const Arguments&... arguments) {
  cudaLaunchAttribute dependent;
  dependent.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  dependent.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream.handle);
  config.attrs = &dependent;
  config.numAttrs = stream.dependent_launches ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace resq::cuda
