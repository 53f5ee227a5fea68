// Output and workspace tensors of the operators: torch's allocator of the device. Tests that run
// the CUDA operators under an emulator put another header of this name earlier in the include path
// (tests/cuda/emulated/).
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <vector>

namespace resq {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Uninitialised, contiguous, on the device of `like`.
inline Tensor allocate(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

}  // namespace resq
