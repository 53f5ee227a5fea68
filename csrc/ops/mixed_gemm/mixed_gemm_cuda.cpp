#include "ops/mixed_gemm/mixed_gemm_cuda.h"

#include "ops/mixed_gemm/mixed_gemm_args.h"
#include "torch/cuda_call.h"

namespace resq {
namespace {

Tensor mixed_gemm(const Tensor& q_lo, const Tensor& q_hi, const Tensor& params,
                  const Tensor& packed_weight, const Tensor& weight_scale, const Tensor& weight_sum,
                  const std::optional<Tensor>& bias, ScalarType out_dtype) {
  const char* op = "mixed_gemm";
  const cuda::Call on(op, q_lo);
  const MixedGemmCall call =
      mixed_gemm_call(q_lo, q_hi, params, packed_weight, weight_scale, weight_sum, bias, out_dtype);
  const MixedGemmParams& p = call.params;
  check_packed_bytes(p, packed_weight, cuda_packed_weight_bytes(p.n, p.k_lo, p.k_hi));
  cuda::check_aligned(op, "q_lo", q_lo);
  cuda::check_aligned(op, "q_hi", q_hi);
  cuda::check_aligned(op, "params", params);
  cuda::check_aligned(op, "packed_weight", packed_weight);
  cuda::check_aligned(op, "weight_scale", weight_scale);
  cuda::check_aligned(op, "weight_sum", weight_sum);
  if (p.rows == 0 || p.n == 0) return call.out;

  const cuda::MixedGemmChoice choice = cuda::mixed_gemm_choice(
      {p.rows, p.n, p.k_lo, p.k_hi, p.q_lo_packed}, on.family(), on.device().sms);
  const Tensor workspace = allocate(q_lo, {choice.workspace_bytes}, ScalarType::Byte);
  const cuda::Stream stream = on.stream(logs_kernels() ? ", " + describe(choice) : "");
  void* scratch = choice.workspace_bytes ? workspace.mutable_data_ptr() : nullptr;
  switch (choice.kernel) {
    case cuda::MixedGemmKernel::kSmallM: {
      const CudaLayout layout = cuda::weight_layout(on.family());
      cuda::mixed_gemm_small_m(p, choice, layout, scratch, stream);
      break;
    }
    case cuda::MixedGemmKernel::kSm80: cuda::mixed_gemm_sm80(p, choice, scratch, stream); break;
    case cuda::MixedGemmKernel::kSm90:
      cuda::mixed_gemm_sm90(p, choice, scratch, on.device(), stream);
      break;
  }
  return call.out;
}

// Which kernel a call of this shape runs on a device, with its tile and splits.
std::string mixed_gemm_kernel(int64_t rows, int64_t n, int64_t k_lo, int64_t k_hi, bool packed,
                              int64_t device) {
  const cuda::Device on = cuda::device(static_cast<int>(device));
  const cuda::MixedGemmChoice choice =
      cuda::mixed_gemm_choice({rows, n, k_lo, k_hi, packed}, cuda::current_family(on), on.sms);
  return describe(choice);
}

}  // namespace
}  // namespace resq

RESQ_CUDA_IMPL(m) { m.impl("mixed_gemm", TORCH_BOX(&resq::mixed_gemm)); }

RESQ_IMPL_EXPANDED(RESQ_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("mixed_gemm_kernel", TORCH_BOX(&resq::mixed_gemm_kernel));
}
