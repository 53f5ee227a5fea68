// mixed_gemm on CUDA: workspace, and which kernel runs.
#include "ops/mixed_gemm/mixed_gemm_cuda.h"

#include "ops/mixed_gemm/mixed_gemm_choice.h"
#include "ops/mixed_gemm/mixed_gemm_legal.h"
#include "ops/mixed_gemm/mixed_gemm_torch.h"
#include "torch/cuda_device.h"
#include "torch/forced_kernel.h"

namespace resq {
namespace {

constexpr const char* kOp = "mixed_gemm";

// The forced choice, which must be legal, or the one that should take the least time.
cuda::MixedGemmChoice current_choice(const cuda::MixedGemmShape& s, cuda::Family family,
                                     const cuda::Device& device, const ForcedKernel& forced) {
  if (!forced) return mixed_gemm_choice(s, family, device.sms, mixed_gemm_tuning(device));
  if (const auto choice = legal_choice(forced.choice, s, family)) return *choice;
  std::ostringstream expected;
  expected << describe_legal(s, family) << " (" << s.m << " rows x " << s.n << " x (" << s.k_lo
           << " | " << s.k_hi << ") columns on " << family_name(family) << ")";
  fail(kOp, forced.by, expected.str(), forced.choice);
}

// Which kernel a call of this shape runs on a device, with its tile and splits.
std::string mixed_gemm_kernel(int64_t rows, int64_t n, int64_t k_lo, int64_t k_hi, bool packed,
                              int64_t device) {
  const cuda::Device& on = cuda::device(static_cast<int>(device));
  return describe(current_choice({rows, n, k_lo, k_hi, packed}, cuda::current_family(on), on,
                                 forced_kernel(kOp)));
}

// What mixed_gemm_kernel might return.
std::vector<std::string> mixed_gemm_choices(int64_t rows, int64_t n, int64_t k_lo, int64_t k_hi,
                                            bool packed, int64_t device) {
  const cuda::Device& on = cuda::device(static_cast<int>(device));
  std::vector<std::string> names;
  for (const auto& choice :
       cuda::legal_choices({rows, n, k_lo, k_hi, packed}, cuda::current_family(on))) {
    names.push_back(describe(choice));
  }
  return names;
}

}  // namespace

void run(const Cuda& on, const MixedGemmParams& p) {
  if (p.m == 0 || p.n == 0) return;
  const ForcedKernel forced = forced_kernel(kOp);
  const cuda::MixedGemmChoice choice =
      current_choice({p.m, p.n, p.k_lo, p.k_hi, p.q_lo_packed}, on.family(), on.device(), forced);
  const Tensor workspace = on.scratch(choice.workspace_bytes, ScalarType::Byte);
  const std::string name =
      logs_kernels() ? ", " + describe(choice) + (forced ? " (forced)" : "") : "";
  const cuda::Stream stream = on.stream(name);
  void* scratch = choice.workspace_bytes ? workspace.mutable_data_ptr() : nullptr;
  switch (choice.kernel) {
    case cuda::MixedGemmKernel::kSmallM:
      cuda::mixed_gemm_small_m(p, choice, on.weight_layout(), scratch, on.device(), stream);
      break;
    case cuda::MixedGemmKernel::kSm80: cuda::mixed_gemm_sm80(p, choice, scratch, stream); break;
    case cuda::MixedGemmKernel::kSm90:
      cuda::mixed_gemm_sm90(p, choice, scratch, on.device(), stream);
      break;
  }
}

}  // namespace resq

RESQ_CUDA_IMPL(m) { m.impl("mixed_gemm", TORCH_BOX(&resq::mixed_gemm<resq::Cuda>)); }

RESQ_IMPL(CompositeExplicitAutograd, m) {
  m.impl("mixed_gemm_kernel", TORCH_BOX(&resq::mixed_gemm_kernel));
  m.impl("mixed_gemm_choices", TORCH_BOX(&resq::mixed_gemm_choices));
}
