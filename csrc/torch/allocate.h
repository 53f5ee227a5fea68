// Output and workspace tensors of the operators: torch's allocator of the device.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "torch/check.h"

#ifdef RESQ_EMULATED
#include <cuda_runtime_api.h>
#endif

namespace resq {

// Uninitialised, contiguous, on the device of `like`.
inline Tensor allocate(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
#ifdef RESQ_EMULATED
  // Kernels run on the CPU, and memory of the emulated cudaMalloc has checked bounds. It is filled
  // with a pattern that no kernel may leave behind.
  int64_t bytes = torch::stable::new_empty(like, {1}, dtype).element_size();
  std::vector<int64_t> strides(sizes.size());
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = i + 1 < sizes.size() ? strides[i + 1] * sizes[i + 1] : 1;
  }
  for (int64_t size : sizes) bytes *= size;
  if (bytes > 0) {
    void* data = nullptr;
    if (cudaMalloc(&data, bytes) != cudaSuccess) throw std::runtime_error("allocate: cudaMalloc");
    cudaMemset(data, 0xa5, bytes);
    return torch::stable::from_blob(data, sizes, strides, like.device(), dtype,
                                    [](void* memory) { cudaFree(memory); });
  }
#endif
  return torch::stable::new_empty(like, sizes, dtype);
}

// The tensor itself if it is contiguous, or a copy in allocated memory.
inline Tensor contiguous_rows(const Tensor& tensor) {
  if (tensor.is_contiguous()) return tensor;
  Tensor copy = allocate(tensor, sizes_of(tensor), tensor.scalar_type());
  torch::stable::copy_(copy, tensor);
  return copy;
}

}  // namespace resq
