#include <torch/csrc/stable/library.h>

#include "ops/hadamard/hadamard_args.h"
#include "torch/cpu_call.h"

#define RESQ_ISA_BODY "ops/hadamard/hadamard_body.h"
#include "cpu/foreach_isa.h"

namespace resq {
namespace {

Tensor hadamard(const Tensor& x, double scale) {
  const HadamardCall call = hadamard_call(x, scale);
  const HadamardParams& p = call.params;
  const auto kernel = RESQ_ISA_CHOOSE(hadamard_rows);
  log_cpu_kernel("hadamard");
  torch::stable::parallel_for(0, p.rows, rows_per_thread(p.plan->n),
                              [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  return call.y;
}

}  // namespace
}  // namespace resq

STABLE_TORCH_LIBRARY_IMPL(resq, CPU, m) { m.impl("hadamard", TORCH_BOX(&resq::hadamard)); }
