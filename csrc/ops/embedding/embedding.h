// embedding: rows of a packed weight as floats, for a model whose embedding is quantized.
//
//   y[i, k] = scale_p[ids[i]] * code[ids[i], k]      p = the part of column k
//
// One float32 product, which float16 and bfloat16 round once more.
#pragma once

#include "core/float16.h"
#include "core/packed_weight_cuda.h"
#include "cuda/launch.h"

namespace resq {

struct EmbeddingParams {
  void* y;                       // [count, k_lo + k_hi] of `type`
  const int64_t* ids;            // [count], each 0 to n - 1
  const uint8_t* packed_weight;  // [n, k_lo + k_hi] in the layout of the device
  const float* weight_scale;     // [n, 2]
  FloatType type;
  int64_t count, n, k_lo, k_hi;

  RESQ_HOST_DEVICE int64_t columns() const { return k_lo + k_hi; }
};

namespace cuda {

// Rows of a layout of docs/formats.md section 3.3. Device pointers. An id that is out of range
// stops the kernel.
void embedding(const EmbeddingParams& p, CudaLayout layout, Stream stream);

}  // namespace cuda

}  // namespace resq
