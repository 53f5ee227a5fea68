#include "ops/hadamard/hadamard_torch.h"
#include "torch/cpu_device.h"

#define RESQ_ISA_BODY "ops/hadamard/hadamard_body.h"
#include "cpu/foreach_isa.h"

namespace resq {

void run(const Cpu& device, const HadamardParams& p) {
  device.for_rows(p.rows, p.plan->n, RESQ_ISA_CHOOSE(hadamard_rows), p);
}

}  // namespace resq

RESQ_IMPL(CPU, m) { m.impl("hadamard", TORCH_BOX(&resq::hadamard<resq::Cpu>)); }
