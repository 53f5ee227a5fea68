#include "ops/mixed_quantize/mixed_quantize_torch.h"
#include "torch/cpu_device.h"

#define RESQ_ISA_BODY "ops/mixed_quantize/mixed_quantize_body.h"
#include "cpu/foreach_isa.h"

namespace resq {

void run(const Cpu& device, const MixedQuantizeParams& p) {
  device.for_rows(p.rows, p.out.k_lo + p.out.k_hi, RESQ_ISA_CHOOSE(mixed_quantize_rows), p);
}

}  // namespace resq

RESQ_IMPL(CPU, m) { m.impl("mixed_quantize", TORCH_BOX(&resq::mixed_quantize<resq::Cpu>)); }
