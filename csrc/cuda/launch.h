// What every CUDA launcher shares: the device it launches on, and launch errors as sentences. Host
// code without CUDA or torch headers, so that both sides may include it.
#pragma once

#include <cstdint>
#include <string>

#include "cuda/arch.h"

namespace resq::cuda {

struct Stream {
  void* handle;      // a cudaStream_t
  bool pdl = false;  // whether launch_pdl (cuda/pdl.cuh) lets kernels overlap
};

struct Device {
  int major, minor;  // compute capability
  int sms;           // multiprocessors
  int shared_bytes;  // that a block may opt in to
  int memory_bits;   // width of the memory bus
};

// Properties of a device; throws if the driver is older than the CUDA runtime in this library.
Device device(int index);

const char* family_name(Family family);

// The family that a device runs: its own, or the one that the environment variable RESQ_CUDA_ARCH
// forces (sm80, sm90, portable), which throws where the device cannot run it.
Family select_family(const std::string& forced, int major, int minor);
Family current_family(const Device& device);

// Throws std::runtime_error "op: launch: expected ..., got <CUDA's words>" after a failed call.
void check_launch(const char* op);

// Lets `kernel` use `bytes` of dynamic shared memory (needed above 48 KB).
void allow_shared_bytes(const char* op, const void* kernel, int64_t bytes);

}  // namespace resq::cuda
