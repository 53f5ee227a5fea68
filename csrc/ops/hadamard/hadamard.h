// hadamard: y = scale * H x / sqrt(n) of the last dimension, computed in float32.
#pragma once

#include "core/float16.h"
#include "core/hadamard.h"
#include "cpu/variants.h"

namespace resq {

struct HadamardParams {
  const void* x;  // [rows, n] of type
  void* y;        // [rows, n] of type
  FloatType type;
  const HadamardPlan* plan;
  float scale;  // the argument times 1 / sqrt(n)
};

namespace cpu {
RESQ_DECLARE_ROWS_KERNEL(hadamard, HadamardParams)
}

}  // namespace resq
