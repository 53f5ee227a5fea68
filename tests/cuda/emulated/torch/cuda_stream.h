// In place of csrc/torch/cuda_stream.h for the emulator: one device, tensors on the CPU.
#pragma once

#include "torch/allocate.h"

#define RESQ_CUDA_KEY CPU

namespace resq::cuda {

inline int device_index(const Tensor&) { return 0; }
inline void* current_stream(int) { return nullptr; }
struct DeviceGuard {
  explicit DeviceGuard(int) {}
};

}  // namespace resq::cuda
