// In place of csrc/torch/cuda_stream.h for the emulator: tensors on the CPU, on the device that the
// test has chosen (tests/cuda/emulated/runtime.cpp).
#pragma once

#include "torch/allocate.h"

#define RESQ_CUDA_KEY CPU

extern "C" int emulated_device();

namespace resq::cuda {

inline int device_index(const Tensor&) { return emulated_device(); }
inline void* current_stream(int) { return nullptr; }
struct DeviceGuard {
  explicit DeviceGuard(int) {}
};

}  // namespace resq::cuda
