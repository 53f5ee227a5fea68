#include "ops/decoder_layers/decoder_layers_torch.h"
#include "torch/cuda_device.h"

namespace resq {

// Each beside its operator.
void run(const Cuda&, const RmsNormQuantizeParams&);
void run(const Cuda&, const MixedGemmParams&);
void run(const Cuda&, const KvAppendParams&);
void run(const Cuda&, const KvAttentionParams&, const KvAttentionBatch&);
void run(const Cuda&, const MixedQuantizeParams&);
void run(const Cuda&, const SiluMulHadamardQuantizeParams&);

}  // namespace resq

RESQ_CUDA_IMPL(m) { m.impl("decoder_layers", TORCH_BOX(&resq::decoder_layers<resq::Cuda>)); }
