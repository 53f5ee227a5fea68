#include "torch/cuda_call.h"

static std::string cuda_family(int64_t device) {
  return resq::cuda::family_name(
      resq::cuda::current_family(resq::cuda::device(static_cast<int>(device))));
}

RESQ_IMPL_EXPANDED(RESQ_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("cuda_family", TORCH_BOX(&cuda_family));
}
