// Programmatic dependent launch (PDL): on sm_90 the blocks of a kernel may start before the
// previous kernel of the stream has finished, which hides most of the gap between the two. Where
// the stream does not ask for it (cuda/launch.h), launch_pdl is an ordinary launch; below sm_90
// pdl_wait and pdl_trigger compile to nothing.
//
// A kernel that launch_pdl starts calls pdl_wait in every thread of every block before it touches
// global memory that an earlier kernel may have read or written. As every kernel does so, all that
// lies before a kernel in the stream is complete behind its wait. Before it, it may prefetch.
//
// It calls pdl_trigger right behind the wait: when the next kernel starts, everything before its
// predecessor is then complete, and of two products the second takes no bandwidth from the first.
// The quantizers call it before the wait. With one block a row they keep few multiprocessors busy,
// and a product usually follows: it starts with the kernel before the quantizer (attention, the
// reduction of splits), and its weights come into the second-level cache during both.
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

// Asks for the 128-byte line of `p` in the second-level cache, where writes of other kernels become
// visible: not into registers, as a load before pdl_wait could return bytes that an earlier kernel
// has yet to write. Nothing below sm_90, where no kernel waits.
__device__ inline void prefetch_early([[maybe_unused]] const void* p) {
#if __CUDA_ARCH__ >= 900
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#endif
}

// Asks for `bytes` bytes from `p` on, on behalf of one thread; both are multiples of 16. The copy
// engine of the multiprocessor works through them, so that loads do not queue behind them.
__device__ inline void prefetch_early([[maybe_unused]] const void* p,
                                      [[maybe_unused]] uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes));
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
