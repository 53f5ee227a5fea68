// mixed_gemm on CUDA: workspace, and which kernel runs.
#include "ops/mixed_gemm/mixed_gemm_cuda.h"

#include "ops/mixed_gemm/mixed_gemm_torch.h"
#include "torch/cuda_device.h"

namespace resq {
namespace {

// Which kernel a call of this shape runs on a device, with its tile and splits.
std::string mixed_gemm_kernel(int64_t rows, int64_t n, int64_t k_lo, int64_t k_hi, bool packed,
                              int64_t device) {
  const cuda::Device on = cuda::device(static_cast<int>(device));
  const cuda::MixedGemmChoice choice =
      cuda::mixed_gemm_choice({rows, n, k_lo, k_hi, packed}, cuda::current_family(on), on.sms);
  return describe(choice);
}

}  // namespace

void run(const Cuda& on, const MixedGemmParams& p) {
  if (p.m == 0 || p.n == 0) return;
  const cuda::MixedGemmChoice choice = cuda::mixed_gemm_choice(
      {p.m, p.n, p.k_lo, p.k_hi, p.q_lo_packed}, on.family(), on.device().sms);
  const Tensor workspace = on.scratch(choice.workspace_bytes, ScalarType::Byte);
  const cuda::Stream stream = on.stream(logs_kernels() ? ", " + describe(choice) : "");
  void* scratch = choice.workspace_bytes ? workspace.mutable_data_ptr() : nullptr;
  switch (choice.kernel) {
    case cuda::MixedGemmKernel::kSmallM:
      cuda::mixed_gemm_small_m(p, choice, on.weight_layout(), scratch, stream);
      break;
    case cuda::MixedGemmKernel::kSm80: cuda::mixed_gemm_sm80(p, choice, scratch, stream); break;
    case cuda::MixedGemmKernel::kSm90:
      cuda::mixed_gemm_sm90(p, choice, scratch, on.device(), stream);
      break;
  }
}

}  // namespace resq

RESQ_CUDA_IMPL(m) { m.impl("mixed_gemm", TORCH_BOX(&resq::mixed_gemm<resq::Cuda>)); }

RESQ_IMPL_EXPANDED(RESQ_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("mixed_gemm_kernel", TORCH_BOX(&resq::mixed_gemm_kernel));
}
