#include <torch/csrc/stable/library.h>

#include <tuple>

#include "ops/unpack_weight/unpack_weight_args.h"
#include "torch/cpu_call.h"

namespace resq {
namespace {

std::tuple<Tensor, Tensor> unpack_weight(const Tensor& packed_weight, int64_t n, int64_t k_lo,
                                         int64_t k_hi) {
  const UnpackWeightCall call =
      unpack_weight_call(packed_weight, n, k_lo, k_hi, packed_weight_bytes);
  log_cpu_kernel("unpack_weight", cpu::Isa::kScalar);
  torch::stable::parallel_for(0, packed_blocks(n), 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) unpack_weight_block(call.params, block);
  });
  return {call.codes_lo, call.codes_hi};
}

}  // namespace
}  // namespace resq

STABLE_TORCH_LIBRARY_IMPL(resq, CPU, m) {
  m.impl("unpack_weight", TORCH_BOX(&resq::unpack_weight));
}
