// hadamard: y = scale * H x / sqrt(n) of the last dimension, computed in float32.
#pragma once

#include "core/float16.h"
#include "core/hadamard.h"
#include "cuda/launch.h"

namespace resq {

struct HadamardParams {
  int64_t rows;
  const void* x;  // [rows, n] of type
  void* y;        // [rows, n] of type
  FloatType type;
  const HadamardPlan* plan;
  float scale;  // the argument times 1 / sqrt(n)
};

namespace cuda {

struct HadamardLayout;

// Device pointers, x and y aligned to 16 bytes; 0 < rows < 2^31.
void hadamard(const HadamardParams& p, const HadamardLayout& layout, const Device& device,
              Stream stream);

}  // namespace cuda

}  // namespace resq
