// CUDA as the Device of an operator (ops/<op>/<op>_torch.h): device, stream and alignment of a
// call.
#pragma once

#include <string>

#include "core/packed_weight_cuda.h"
#include "cuda/launch.h"
#include "torch/cuda_stream.h"
#include "torch/environment.h"
#include "torch/log_kernel.h"
#include "torch/registration.h"
#include "torch/tensor.h"

// RESQ_CUDA_IMPL(m) { m.impl("op", TORCH_BOX(&resq::op<resq::Cuda>)); } registers CUDA kernels.
#define RESQ_CUDA_IMPL(m) RESQ_IMPL(RESQ_CUDA_KEY, m)

namespace resq {

class Cuda {
 public:
  // Keeps the tensor's device current for the lifetime of this object. Construct it before the
  // outputs.
  Cuda(const char* op, const Tensor& tensor)
      : op_(op),
        like_(tensor),
        index_(cuda::device_index(tensor)),
        guard_(index_),
        device_(cuda::device(index_)),
        family_(cuda::current_family(device_)) {
    cuda::bind_context(index_);
  }

  const cuda::Device& device() const { return device_; }
  cuda::Family family() const { return family_; }
  bool packs_activations() const { return cuda::packs_activations(family_); }
  CudaLayout weight_layout() const { return cuda::weight_layout(family_); }
  int64_t packed_weight_bytes(int64_t n, int64_t k_lo, int64_t k_hi) const {
    return cuda_packed_weight_bytes(n, k_lo, k_hi);
  }

  // The stream to launch on. `kernel`: the kernel's name in the log, where the op has several.
  cuda::Stream stream(const std::string& kernel = "") const {
    if (logs_kernels()) {
      log_kernel(op_, std::string("cuda ") + cuda::family_name(family_) + kernel + carveout());
    }
    const bool pdl = family_ == cuda::Family::kSm90 && wants_pdl() && cuda::kernels_wait(index_);
    return {cuda::current_stream(index_), index_, pdl};
  }

  // A stream keeps operators together.
  template <class Body>
  void with_team(const Body& body) const {
    body();
  }

  // A workspace for the call.
  Tensor scratch(int64_t count, ScalarType dtype) const { return allocate(like_, {count}, dtype); }

  // Kernels read with 16-byte loads. torch's allocations are aligned to 512; slices may not be.
  void check_aligned(const Argument& argument, const Tensor& tensor) const {
    if (tensor.numel() == 0 || past_alignment(tensor) == 0) return;
    fail(op_, argument, "memory aligned to 16 bytes (clone() a slice that is not)",
         "an address " + std::to_string(past_alignment(tensor)) + " bytes past");
  }

  // The same for every token of a tensor with a token stride (kv_tensors.h).
  void check_aligned_tokens(const Argument& argument, const Tensor& tensor) const {
    check_aligned(argument, tensor);
    const int64_t bytes = tensor.size(0) > 1 ? tensor.stride(0) * tensor.element_size() : 0;
    if (bytes % 16 != 0) {
      fail(op_, argument, "tokens a multiple of 16 bytes apart", std::to_string(bytes) + " bytes");
    }
  }

  // No conversion, which would be a launch: the kernels read any float type.
  Tensor as_float32(const Tensor& tensor) const { return tensor; }

  // The tensor itself, or a copy if it is contiguous at an address that is not aligned.
  Tensor aligned(const Tensor& tensor) const {
    if (past_alignment(tensor) == 0) return tensor;
    Tensor copy = allocate(tensor, sizes_of(tensor), tensor.scalar_type());
    torch::stable::copy_(copy, tensor);
    return copy;
  }

  // RESQ_DEPENDENT_LAUNCHES=0: every kernel starts only after the previous one has ended, on sm_90
  // too.
  static bool wants_pdl() {
    static const bool wanted = environment_switch("RESQ_DEPENDENT_LAUNCHES", true);
    return wanted;
  }

 private:
  // For the log.
  static std::string carveout() {
    const int percent = cuda::current_carveout();
    if (percent == cuda::kDriversCarveout) return "";
    return ", carveout " + std::to_string(percent) + " %";
  }

  static int64_t past_alignment(const Tensor& tensor) {
    return static_cast<int64_t>(reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16);
  }

  const char* op_;
  Tensor like_;
  int index_;
  cuda::DeviceGuard guard_;
  const cuda::Device& device_;
  cuda::Family family_;
};

}  // namespace resq
