#include "ops/gptq_block/gptq_block_torch.h"
#include "torch/cpu_device.h"

#define RESQ_ISA_BODY "ops/gptq_block/gptq_block_body.h"
#include "cpu/foreach_isa.h"

namespace resq {

void run(const Cpu& device, const GptqBlockParams& p) {
  // A row adds half of the block's columns to each of them.
  const int64_t work = p.columns * (p.columns + 8) / 2;
  device.for_rows(p.rows, work, RESQ_ISA_CHOOSE(gptq_block_rows), p);
}

}  // namespace resq

RESQ_IMPL(CPU, m) { m.impl("gptq_block", TORCH_BOX(&resq::gptq_block<resq::Cpu>)); }
