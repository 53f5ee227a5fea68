#include "ops/hadamard/hadamard_cuda.h"

#include "ops/hadamard/hadamard_args.h"
#include "torch/cuda_call.h"

namespace resq {
namespace {

Tensor hadamard(const Tensor& x, double scale) {
  const char* op = "hadamard";
  const cuda::Call on(op, x);
  const HadamardCall call = hadamard_call(cuda::aligned_rows(x), scale);
  const HadamardParams& p = call.params;
  const cuda::HadamardLayout& layout =
      cuda::checked_hadamard_layout(op, "x", *p.plan, on.device().shared_bytes);
  cuda::check_row_count(op, "x", p.rows);
  if (p.rows > 0) cuda::hadamard(p, layout, on.device(), on.stream());
  return call.y;
}

}  // namespace
}  // namespace resq

RESQ_CUDA_IMPL(m) { m.impl("hadamard", TORCH_BOX(&resq::hadamard)); }
