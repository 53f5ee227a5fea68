// Which family of kernels a compute capability runs: a pure function, tested on the CPU.
#pragma once

#include "core/packed_weight_cuda.h"

namespace resq::cuda {

// kPortable: 8-bit tensor cores through mma.sync, for architectures newer than those below.
// kSm80: sm_80, 86, 87, 89, with INT4 tensor cores. kSm90: sm_90, with wgmma and without INT4.
enum class Family { kUnsupported, kPortable, kSm80, kSm90 };

constexpr Family family(int major, int minor) {
  if (major < 8) return Family::kUnsupported;
  if (major == 8) return Family::kSm80;
  if (major == 9) return minor == 0 ? Family::kSm90 : Family::kPortable;
  return Family::kPortable;
}

constexpr CudaLayout weight_layout(Family family) {
  return family == Family::kSm90 ? CudaLayout::kWgmma : CudaLayout::kMma;
}

// What the quantizing ops write if `packed` is not given: the form that mixed_gemm reads fastest.
constexpr bool packs_activations(Family family) { return family == Family::kSm80; }

}  // namespace resq::cuda
