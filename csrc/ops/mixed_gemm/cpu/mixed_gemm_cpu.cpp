#include <torch/csrc/stable/library.h>

#include "ops/mixed_gemm/cpu/plan.h"
#include "ops/mixed_gemm/mixed_gemm_args.h"
#include "torch/cpu_call.h"

#define RESQ_ISA_BODY "ops/mixed_gemm/cpu/body.h"
#include "cpu/foreach_isa.h"

namespace resq {
namespace {

Tensor mixed_gemm(const Tensor& q_lo, const Tensor& q_hi, const Tensor& params,
                  const Tensor& packed_weight, const Tensor& weight_scale, const Tensor& weight_sum,
                  const std::optional<Tensor>& bias, ScalarType out_dtype) {
  MixedGemmCall call =
      mixed_gemm_call(q_lo, q_hi, params, packed_weight, weight_scale, weight_sum, bias, out_dtype);
  const MixedGemmParams& p = call.params;
  check_packed_bytes(p, packed_weight, packed_weight_bytes(p.n, p.k_lo, p.k_hi));
  const MixedGemmTasks tasks{p, mixed_gemm_plan(p.rows, p.n, p.k_lo, p.k_hi, cpu::current_isa())};
  auto kernel = RESQ_ISA_CHOOSE(run_tasks);
#if defined(__x86_64__)
  if (tasks.plan.amx) kernel = cpu::amx::mixed_gemm_tasks;
#endif
  log_cpu_kernel("mixed_gemm", tasks.plan.amx ? cpu::Isa::kAmx : cpu::vector_isa());
  torch::stable::parallel_for(0, tasks.plan.tasks(), tasks.plan.grain,
                              [&](int64_t begin, int64_t end) { kernel(tasks, begin, end); });
  return call.out;
}

}  // namespace
}  // namespace resq

STABLE_TORCH_LIBRARY_IMPL(resq, CPU, m) { m.impl("mixed_gemm", TORCH_BOX(&resq::mixed_gemm)); }
