#include "ops/decoder_layers/decoder_layers_cpu_torch.h"

RESQ_IMPL(CPU, m) { m.impl("decoder_layers", TORCH_BOX(&resq::decoder_layers<resq::Cpu>)); }
