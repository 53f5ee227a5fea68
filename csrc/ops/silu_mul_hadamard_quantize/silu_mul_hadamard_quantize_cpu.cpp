#include "ops/silu_mul_hadamard_quantize/silu_mul_hadamard_quantize_torch.h"
#include "torch/cpu_device.h"

#define RESQ_ISA_BODY "ops/silu_mul_hadamard_quantize/silu_mul_hadamard_quantize_body.h"
#include "cpu/foreach_isa.h"

namespace resq {

void run(const Cpu& device, const SiluMulHadamardQuantizeParams& p) {
  device.for_rows(p.rows, p.n, RESQ_ISA_CHOOSE(silu_mul_hadamard_quantize_rows), p);
}

}  // namespace resq

RESQ_IMPL(CPU, m) {
  m.impl("silu_mul_hadamard_quantize", TORCH_BOX(&resq::silu_mul_hadamard_quantize<resq::Cpu>));
}
