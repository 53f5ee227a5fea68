// Programmatic dependent launch (PDL): on sm_90 the blocks of a kernel may start before the
// previous kernel of the stream has finished, which hides most of the gap between the two. Where
// the stream does not ask for it (cuda/launch.h), launch_pdl is an ordinary launch; below sm_90
// pdl_wait and pdl_trigger compile to nothing.
//
// A kernel that launch_pdl starts calls pdl_wait in every thread of every block before it touches
// global memory that an earlier kernel may have read or written, and pdl_trigger only after that:
// when the next kernel starts, everything before its predecessor is then complete.
#pragma once

#include "cuda/launch.h"

namespace resq::cuda {

// Returns once the previous kernel has finished and its writes are visible.
__device__ inline void pdl_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel start once every block of this one has called this.
__device__ inline void pdl_trigger() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// A launch (cuda/launch.h) that may overlap the previous kernel, which may be any: one that never
// calls pdl_trigger triggers when it finishes.
template <class Kernel, class... Arguments>
inline void launch_pdl(const char* op, Kernel* kernel, const Grid& grid, Stream stream,
                       const Arguments&... arguments) {
  enqueue(op, kernel, grid, stream, arguments...);
}

}  // namespace resq::cuda
