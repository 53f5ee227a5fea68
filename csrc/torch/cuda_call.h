// The torch side of every CUDA operator: its registration, and the device, stream and alignment of
// a call.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <string>

#include "cuda/launch.h"
#include "torch/allocate.h"
#include "torch/log_kernel.h"

#ifndef RESQ_EMULATED
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#endif

// RESQ_CUDA_IMPL(m) { m.impl("op", TORCH_BOX(&resq::op)); } registers the CUDA kernels of
// torch.ops.resq. Tests compile the same file for an emulator (RESQ_EMULATED), where it registers
// CPU kernels of another namespace (RESQ_NAMESPACE, see schema.cpp).
#define RESQ_IMPL_EXPANDED(ns, key, m) STABLE_TORCH_LIBRARY_IMPL(ns, key, m)
#ifdef RESQ_EMULATED
#define RESQ_CUDA_IMPL(m) RESQ_IMPL_EXPANDED(RESQ_NAMESPACE, CPU, m)
#else
#define RESQ_NAMESPACE resq
#define RESQ_CUDA_IMPL(m) RESQ_IMPL_EXPANDED(RESQ_NAMESPACE, CUDA, m)
#endif

namespace resq::cuda {

#ifdef RESQ_EMULATED
inline int device_index(const Tensor&) { return 0; }
inline void* current_stream(int) { return nullptr; }
struct DeviceGuard {
  explicit DeviceGuard(int) {}
};
#else
inline int device_index(const Tensor& tensor) { return tensor.get_device_index(); }
inline void* current_stream(int index) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
  return stream;
}
using torch::stable::accelerator::DeviceGuard;
#endif

// RESQ_DEPENDENT_LAUNCHES=0: every kernel starts after the end of the one before, on sm_90 too.
inline bool dependent_launches() {
  static const bool wanted = environment_switch("RESQ_DEPENDENT_LAUNCHES", true);
  return wanted;
}

// Makes the tensor's device current for as long as it lives. Make it before the outputs.
class Call {
 public:
  Call(const char* op, const Tensor& tensor)
      : op_(op),
        index_(device_index(tensor)),
        guard_(index_),
        device_(::resq::cuda::device(index_)),
        family_(current_family(device_)) {}

  const Device& device() const { return device_; }
  Family family() const { return family_; }

  // To launch on; `kernel` names the one of several in the log.
  Stream stream(const std::string& kernel = "") const {
    if (logs_kernels()) log_kernel(op_, std::string("cuda ") + family_name(family_) + kernel);
    return {current_stream(index_), family_ == Family::kSm90 && dependent_launches()};
  }

 private:
  const char* op_;
  int index_;
  DeviceGuard guard_;
  Device device_;
  Family family_;
};

// Kernels read with 16-byte loads. torch's allocations are aligned to 512; slices may not be.
inline void check_aligned(const char* op, const char* argument, const Tensor& tensor) {
  const auto address = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  if (tensor.numel() == 0 || address % 16 == 0) return;
  fail(op, argument, "memory aligned to 16 bytes (clone() a slice that is not)",
       "an address " + std::to_string(address % 16) + " bytes past");
}

// The same of every token of a tensor whose tokens lie apart (kv_tensors.h).
inline void check_aligned_tokens(const char* op, const char* argument, const Tensor& tensor) {
  check_aligned(op, argument, tensor);
  const int64_t bytes = tensor.size(0) > 1 ? tensor.stride(0) * tensor.element_size() : 0;
  if (bytes % 16 != 0) {
    fail(op, argument, "tokens a multiple of 16 bytes apart", std::to_string(bytes) + " bytes");
  }
}

// The tensor itself, or a contiguous copy if it is contiguous at an address that is not aligned.
inline Tensor aligned_rows(const Tensor& tensor) {
  if (reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0) return tensor;
  Tensor copy = allocate(tensor, sizes_of(tensor), tensor.scalar_type());
  torch::stable::copy_(copy, tensor);
  return copy;
}

// Kernels that give every row a block.
inline void check_row_count(const char* op, const char* argument, int64_t rows) {
  if (rows > INT32_MAX) fail(op, argument, "fewer than 2^31 rows", std::to_string(rows));
}

}  // namespace resq::cuda
