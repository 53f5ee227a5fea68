#include "ops/unpack_weight/unpack_weight_torch.h"
#include "torch/cpu_device.h"

namespace resq {

void run(const Cpu& device, const UnpackWeightParams& p) {
  device.log(cpu::Isa::kScalar);
  parallel_for(packed_blocks(p.n), 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) unpack_weight_block(p, block);
  });
}

}  // namespace resq

RESQ_IMPL(CPU, m) { m.impl("unpack_weight", TORCH_BOX(&resq::unpack_weight<resq::Cpu>)); }
