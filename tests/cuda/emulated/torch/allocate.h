// In place of csrc/torch/allocate.h for the emulator. Kernels run on the CPU, and memory of the
// emulated cudaMalloc has checked bounds. It is filled with a pattern that no kernel may leave
// behind.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <stdexcept>
#include <vector>

namespace resq {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Tensor allocate(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  int64_t bytes = torch::stable::new_empty(like, {1}, dtype).element_size();
  std::vector<int64_t> strides(sizes.size());
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = i + 1 < sizes.size() ? strides[i + 1] * sizes[i + 1] : 1;
  }
  for (int64_t size : sizes) bytes *= size;
  if (bytes == 0) return torch::stable::new_empty(like, sizes, dtype);
  void* data = nullptr;
  if (cudaMalloc(&data, bytes) != cudaSuccess) throw std::runtime_error("allocate: cudaMalloc");
  cudaMemset(data, 0xa5, bytes);
  return torch::stable::from_blob(data, sizes, strides, like.device(), dtype,
                                  [](void* memory) { cudaFree(memory); });
}

}  // namespace resq
