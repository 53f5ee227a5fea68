#include "ops/search_scale/search_scale_torch.h"
#include "torch/cpu_device.h"

#define RESQ_ISA_BODY "ops/search_scale/search_scale_body.h"
#include "cpu/foreach_isa.h"

namespace resq {

void run(const Cpu& device, const SearchScaleParams& p) {
  // About half of the steps are looked at.
  device.for_rows(p.rows, p.columns * (kClipSteps / 2), RESQ_ISA_CHOOSE(search_scale_rows), p);
}

}  // namespace resq

RESQ_IMPL(CPU, m) { m.impl("search_scale", TORCH_BOX(&resq::search_scale<resq::Cpu>)); }
