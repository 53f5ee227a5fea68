// What every CUDA launcher shares: the device it launches on, the launch, and errors as sentences.
// Host code without CUDA or torch headers, so that both sides may include it.
#pragma once

#include <cstdint>
#include <string>

#include "cuda/arch.h"

namespace resq::cuda {

struct Device {
  int major, minor;  // compute capability
  int sms;           // multiprocessors
  int shared_bytes;  // that a block may opt in to
  int memory_bits;   // width of the memory bus
  int l2_bytes;      // of the second-level cache
};

// Properties of a device, asked for once; throws if the driver is older than the CUDA runtime in
// this library.
const Device& device(int index);

// Makes the primary context of the current device `index` current on the calling thread, once per
// thread. Driver calls (cuda/tensor_map.h) need one, and a thread that has done no CUDA work has
// none: torch's guard does nothing where the device already is the thread's.
void bind_context(int index);

// Whether the kernels outside *_sm90.cu hold pdl_wait (cuda/pdl.cuh) as they run on the current
// device `index`: not if they run from PTX for an older architecture, because the library was built
// without sm_90 or CUDA_FORCE_PTX_JIT is set.
bool kernels_wait(int index);

const char* family_name(Family family);

// The family that a device runs: its own, or the one that the environment variable RESQ_CUDA_ARCH
// forces (sm80, sm90, portable), which throws where the device cannot run it.
Family select_family(const std::string& forced, int major, int minor);
Family current_family(const Device& device);

// The integer from 0 to 100 that `text` is, the value of the environment variable `name`;
// `otherwise` where that is empty.
int select_percent(const std::string& name, const std::string& text, int otherwise);

// The share of a multiprocessor's L1 that every kernel asks to have as shared memory, in percent:
// the environment variable RESQ_CUDA_CARVEOUT, or what the driver chooses for each kernel.
inline constexpr int kDriversCarveout = -1;
int current_carveout();

// The share of L2 that the blocks of a product may fill with weights while they wait for the
// previous kernel, in percent: the environment variable RESQ_CUDA_PREFETCH, or half. L2 has two
// halves, and a line that the other half's multiprocessors read may take a place in both [not
// measured].
inline constexpr int kPrefetchPercent = 50;
int current_prefetch();

struct Stream {
  void* handle;      // a cudaStream_t
  int device;        // of the stream, and current
  bool pdl = false;  // whether launch_pdl (cuda/pdl.cuh) lets kernels overlap
};

struct Grid {
  unsigned x, y = 1;     // blocks
  unsigned threads;      // of a block
  int shared_bytes = 0;  // of dynamic shared memory
  unsigned cluster = 1;  // blocks of a cluster, along x
};

// Launches a kernel (launch_kernel is the typed form). What launches it is also what prepares it,
// at its first launch on a device: dynamic shared memory up to the device's limit, and the
// carveout. Throws "op: launch: expected ..., got <CUDA's words>" if this launch fails; an error
// that another call has left behind is neither reported nor taken away.
void enqueue(const char* op, const void* kernel, const Grid& grid, Stream stream, void** arguments);

// Clusters of grid.cluster blocks that run at once on the current device, asked for once per
// kernel and size of its clusters.
int resident_clusters(const char* op, const void* kernel, const Grid& grid, int device);

// kernel<<<grid>>>(arguments...). With `stream.pdl` the kernel may start before the previous one
// has finished: launch_pdl (cuda/pdl.cuh) says which kernels may, the others are launched with
// launch_kernel.
template <class... Parameters, class... Arguments>
inline void enqueue(const char* op, void (*kernel)(Parameters...), const Grid& grid, Stream stream,
                    const Arguments&... arguments) {
  [&](Parameters... values) {
    void* pointers[] = {&values...};
    enqueue(op, reinterpret_cast<const void*>(kernel), grid, stream, pointers);
  }(arguments...);
}

template <class Kernel, class... Arguments>
inline void launch_kernel(const char* op, Kernel* kernel, const Grid& grid, Stream stream,
                          const Arguments&... arguments) {
  stream.pdl = false;
  enqueue(op, kernel, grid, stream, arguments...);
}

}  // namespace resq::cuda
