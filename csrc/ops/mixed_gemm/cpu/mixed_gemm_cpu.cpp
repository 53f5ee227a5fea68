#include "ops/mixed_gemm/cpu/plan.h"
#include "ops/mixed_gemm/mixed_gemm_torch.h"
#include "torch/cpu_device.h"

#define RESQ_ISA_BODY "ops/mixed_gemm/cpu/body.h"
#include "cpu/foreach_isa.h"

namespace resq {

void run(const Cpu& device, const MixedGemmParams& p) {
  const MixedGemmTasks tasks{p, mixed_gemm_plan(p.m, p.n, p.k_lo, p.k_hi, cpu::current_isa())};
  auto kernel = RESQ_ISA_CHOOSE(run_tasks);
#if defined(__x86_64__)
  if (tasks.plan.amx) kernel = cpu::amx::mixed_gemm_tasks;
#endif
  device.log(tasks.plan.amx ? cpu::Isa::kAmx : cpu::vector_isa());
  // A piece first unpacks the activations of its panel: with more than a tile of them, 10 % of a
  // prompt's time (SmolLM2, 32 to 512 tokens).
  const int64_t pieces = tasks.plan.panel_m > tasks.plan.tile_m ? cpu::kWhole : cpu::kPieces;
  parallel_for(
      tasks.plan.tasks(), tasks.plan.grain,
      [&](int64_t begin, int64_t end) { kernel(tasks, begin, end); }, pieces);
}

}  // namespace resq

RESQ_IMPL(CPU, m) { m.impl("mixed_gemm", TORCH_BOX(&resq::mixed_gemm<resq::Cpu>)); }
