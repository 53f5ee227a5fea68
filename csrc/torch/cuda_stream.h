// torch's device and stream of a CUDA tensor. Tests that run the CUDA operators under an emulator
// put another header of this name earlier in the include path (tests/cuda/emulated/).
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "torch/allocate.h"

#define RESQ_CUDA_KEY CUDA  // what the operators are registered for

namespace resq::cuda {

inline int device_index(const Tensor& tensor) { return tensor.get_device_index(); }
inline void* current_stream(int index) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
  return stream;
}
using torch::stable::accelerator::DeviceGuard;

}  // namespace resq::cuda
