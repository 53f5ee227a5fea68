// kv_dequantize on CUDA. Defined in kv_dequantize.cu.
#pragma once

#include "cuda/launch.h"
#include "ops/kv_dequantize/kv_dequantize.h"

namespace resq::cuda {

// Params with device pointers; cache, k and v aligned to 16 bytes. A length or page that does not
// fit stops the kernel with a device error (lengths are not read on the host).
void kv_dequantize(const KvDequantizeParams& p, Stream stream);

}  // namespace resq::cuda
