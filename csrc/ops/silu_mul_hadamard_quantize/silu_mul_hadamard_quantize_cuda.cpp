#include "ops/silu_mul_hadamard_quantize/silu_mul_hadamard_quantize_cuda.h"

#include "ops/silu_mul_hadamard_quantize/silu_mul_hadamard_quantize_args.h"
#include "torch/cuda_call.h"

namespace resq {
namespace {

std::tuple<Tensor, Tensor, Tensor> silu_mul_hadamard_quantize(const Tensor& gate_up, bool hadamard,
                                                              int64_t n_hi, int64_t lo_bits,
                                                              std::optional<bool> packed,
                                                              bool symmetric, double clip) {
  const char* op = "silu_mul_hadamard_quantize";
  const cuda::Call on(op, gate_up);
  const SiluMulHadamardQuantizeCall call = silu_mul_hadamard_quantize_call(
      cuda::aligned_rows(gate_up), hadamard, {n_hi, lo_bits, packed, symmetric, clip},
      cuda::packs_activations(on.family()));
  const SiluMulHadamardQuantizeParams& p = call.params;
  cuda::check_row_count(op, "gate_up", p.rows);
  if (p.plan) {
    const cuda::HadamardLayout& layout =
        cuda::checked_hadamard_layout(op, "gate_up", *p.plan, on.device().shared_bytes);
    if (layout.split && n_hi % 8 != 0) {
      fail(op, "n_hi",
           "a multiple of 8 where a row is as long as " + std::to_string(p.n) + " on this device",
           std::to_string(n_hi));
    }
    if (p.rows > 0) cuda::silu_mul_hadamard_quantize(p, layout, on.device(), on.stream());
  } else if (p.rows > 0) {
    cuda::silu_mul_quantize(p, on.stream());
  }
  return {call.out.q_lo, call.out.q_hi, call.out.params};
}

}  // namespace
}  // namespace resq

RESQ_CUDA_IMPL(m) {
  m.impl("silu_mul_hadamard_quantize", TORCH_BOX(&resq::silu_mul_hadamard_quantize));
}
