// What every CUDA launcher shares: the device it launches on, and launch errors as sentences. Host
// code without CUDA or torch headers, so that both sides may include it.
#pragma once

#include <cstdint>

namespace resq::cuda {

using Stream = void*;  // a cudaStream_t

struct Device {
  int major, minor;  // compute capability
  int sms;           // multiprocessors
  int shared_bytes;  // that a block may opt in to
};

// Properties of a device, read once.
const Device& device(int index);

// Throws std::runtime_error "op: launch: expected ..., got <CUDA's words>" after a failed call.
void check_launch(const char* op);

// Lets `kernel` use `bytes` of dynamic shared memory (needed above 48 KB).
void allow_shared_bytes(const char* op, const void* kernel, int64_t bytes);

}  // namespace resq::cuda
