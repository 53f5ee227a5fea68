#include "ops/rms_norm_quantize/rms_norm_quantize_torch.h"
#include "torch/cpu_device.h"

#define RESQ_ISA_BODY "ops/rms_norm_quantize/rms_norm_quantize_body.h"
#include "cpu/foreach_isa.h"

namespace resq {

void run(const Cpu& device, const RmsNormQuantizeParams& p) {
  device.for_rows(p.rows, p.out.k_lo + p.out.k_hi, RESQ_ISA_CHOOSE(rms_norm_quantize_rows), p);
}

}  // namespace resq

RESQ_IMPL(CPU, m) { m.impl("rms_norm_quantize", TORCH_BOX(&resq::rms_norm_quantize<resq::Cpu>)); }
