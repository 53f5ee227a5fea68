#include "ops/rms_norm/rms_norm_torch.h"
#include "torch/cpu_device.h"

#define RESQ_ISA_BODY "ops/rms_norm/rms_norm_body.h"
#include "cpu/foreach_isa.h"

namespace resq {

void run(const Cpu& device, const RmsNormParams& p) {
  device.for_rows(p.rows, p.columns, RESQ_ISA_CHOOSE(rms_norm_rows), p);
}

}  // namespace resq

RESQ_IMPL(CPU, m) { m.impl("rms_norm", TORCH_BOX(&resq::rms_norm<resq::Cpu>)); }
