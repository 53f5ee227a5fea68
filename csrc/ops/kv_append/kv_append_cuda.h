// kv_append on CUDA. Defined in kv_append.cu.
#pragma once

#include "cuda/launch.h"
#include "ops/kv_append/kv_append.h"

namespace resq::cuda {

// Params with device pointers; k, v and the cache aligned to 16 bytes. A slot beyond the cache
// stops the kernel with a device error (lengths are not read on the host).
void kv_append(const KvAppendParams& p, const Device& device, Stream stream);

}  // namespace resq::cuda
