// Kernels that are being written. Weak: a file that defines one replaces it; the last one to land
// deletes this file.
#include <stdexcept>

#include "ops/mixed_gemm/mixed_gemm_cuda.h"

#define RESQ_PENDING(name) throw std::runtime_error("mixed_gemm: " name ": not built yet")

namespace resq::cuda {
[[gnu::weak]] void mixed_gemm_small_batch(const MixedGemmParams&, const MixedGemmChoice&,
                                          CudaLayout, void*, Stream) {
  RESQ_PENDING("small_batch");
}
[[gnu::weak]] void mixed_gemm_sm80(const MixedGemmParams&, const MixedGemmChoice&, void*, Stream) {
  RESQ_PENDING("sm80");
}
}  // namespace resq::cuda
