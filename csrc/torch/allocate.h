// Output and workspace tensors of the operators: torch's allocator of the device. Tests that run
// the CUDA operators under an emulator put another header of this name earlier in the include path
// (tests/cuda/emulated/).
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstddef>
#include <cstdint>
#include <vector>

namespace resq {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// What malloc asks the system for in any case (its threshold grows up to this), and which would
// come page by page: 50 MB of logits are written in 28 ms, in pages of 2 MB in 9 (two Zen 3 cores).
inline constexpr size_t kHugeBytes = size_t{32} << 20, kHugePage = size_t{2} << 20;

// Asks for pages of 2 MB where Linux leaves that to programs; no more than advice.
inline void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__)
  if (bytes < kHugeBytes) return;
  const size_t behind = reinterpret_cast<uintptr_t>(data) % kHugePage;
  const size_t skipped = behind == 0 ? 0 : kHugePage - behind;
  const size_t whole = (bytes - skipped) / kHugePage * kHugePage;
  madvise(static_cast<char*>(data) + skipped, whole, MADV_HUGEPAGE);
#endif
}

// Uninitialised, contiguous, on the device of `like`.
inline Tensor allocate(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  Tensor tensor = torch::stable::new_empty(like, sizes, dtype);
  if (tensor.is_cpu()) {
    const size_t bytes = static_cast<size_t>(tensor.numel()) * tensor.element_size();
    advise_huge_pages(tensor.mutable_data_ptr(), bytes);
  }
  return tensor;
}

}  // namespace resq
