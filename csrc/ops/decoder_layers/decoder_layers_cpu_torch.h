// The CPU's operators of a decoder layer.
#pragma once

#include "ops/decoder_layers/decoder_layers_torch.h"
#include "torch/cpu_device.h"

namespace resq {

// Each beside its operator.
void run(const Cpu&, const RmsNormQuantizeParams&);
void run(const Cpu&, const MixedGemmParams&);
void run(const Cpu&, const KvAppendParams&);
void run(const Cpu&, const KvAttentionParams&, const KvAttentionBatch&);
void run(const Cpu&, const MixedQuantizeParams&);
void run(const Cpu&, const SiluMulHadamardQuantizeParams&);

}  // namespace resq
