// Registers the CUDA operators, and passes their parameters to the launchers. Operators with a plan
// or a workspace of their own do that in <op>_cuda.cpp: mixed_gemm and kv_attention.
#include "cuda/hadamard_layout.h"
#include "ops/embedding/embedding_torch.h"
#include "ops/gptq_block/gptq_block_torch.h"
#include "ops/hadamard/hadamard_torch.h"
#include "ops/kv_append/kv_append_torch.h"
#include "ops/kv_dequantize/kv_dequantize_torch.h"
#include "ops/mixed_quantize/mixed_quantize_torch.h"
#include "ops/pack_weight/pack_weight_torch.h"
#include "ops/rms_norm/rms_norm_torch.h"
#include "ops/rms_norm_quantize/rms_norm_quantize_torch.h"
#include "ops/search_scale/search_scale_torch.h"
#include "ops/silu_mul_hadamard_quantize/silu_mul_hadamard_quantize_torch.h"
#include "ops/unpack_weight/unpack_weight_torch.h"
#include "torch/cuda_device.h"
#include "torch/forced_kernel.h"

namespace resq {

void run(const Cuda& on, const MixedQuantizeParams& p) {
  if (p.rows > 0) cuda::mixed_quantize(p, on.stream());
}

void run(const Cuda& on, const RmsNormQuantizeParams& p) {
  if (p.rows > 0) cuda::rms_norm_quantize(p, on.stream());
}

void run(const Cuda& on, const RmsNormParams& p) {
  if (p.rows > 0) cuda::rms_norm(p, on.stream());
}

void run(const Cuda& on, const HadamardParams& p) {
  const cuda::HadamardLayout& layout =
      cuda::checked_hadamard_layout("hadamard", "x", *p.plan, on.device().shared_bytes);
  if (p.rows > 0) cuda::hadamard(p, layout, on.device(), on.stream());
}

void run(const Cuda& on, const SiluMulHadamardQuantizeParams& p) {
  if (!p.plan) {
    if (p.rows > 0) cuda::silu_mul_blocks_quantize(p, on.device(), on.stream());
    return;
  }
  const char* op = "silu_mul_hadamard_quantize";
  const cuda::HadamardLayout& layout =
      cuda::checked_hadamard_layout(op, "gate_up", *p.plan, on.device().shared_bytes);
  if (layout.split && p.out.k_hi % 8 != 0) {
    fail(op, "n_hi",
         "a multiple of 8 where a row is as long as " + std::to_string(p.n) + " on this device",
         std::to_string(p.out.k_hi));
  }
  if (p.rows > 0) cuda::silu_mul_hadamard_quantize(p, layout, on.device(), on.stream());
}

void run(const Cuda& on, const GptqBlockParams& p) {
  if (p.rows > 0 && p.columns > 0) cuda::gptq_block(p, on.stream());
}

void run(const Cuda& on, const SearchScaleParams& p) {
  if (p.rows > 0) cuda::search_scale(p, on.stream());
}

void run(const Cuda& on, const PackWeightParams& p) {
  cuda::pack_weight(p, on.weight_layout(), on.stream());
}

void run(const Cuda& on, const UnpackWeightParams& p) {
  cuda::unpack_weight(p, on.weight_layout(), on.stream());
}

void run(const Cuda& on, const EmbeddingParams& p) {
  cuda::embedding(p, on.weight_layout(), on.stream());
}

void run(const Cuda& on, const KvAppendParams& p) { cuda::kv_append(p, on.device(), on.stream()); }

void run(const Cuda& on, const KvDequantizeParams& p) { cuda::kv_dequantize(p, on.stream()); }

namespace {

std::string cuda_family(int64_t device) {
  return cuda::family_name(cuda::current_family(cuda::device(static_cast<int>(device))));
}

// Whether kernels may overlap on a device (cuda/pdl.cuh), and if not, why.
std::string cuda_pdl(int64_t device) {
  const int index = static_cast<int>(device);
  if (cuda::current_family(cuda::device(index)) != cuda::Family::kSm90) {
    return "off: only the family sm90 has them";
  }
  if (!Cuda::wants_pdl()) return "off: RESQ_DEPENDENT_LAUNCHES=0";
  const cuda::DeviceGuard guard(index);
  cuda::bind_context(index);
  if (cuda::kernels_wait(index)) return "on";
  return "off: kernels run from PTX of compute_80 (RESQ_CUDA_ARCHS without 90, or "
         "CUDA_FORCE_PTX_JIT)";
}

// Compute capability (two numbers), multiprocessors, bits of the memory bus.
std::vector<int64_t> cuda_device(int64_t index) {
  const cuda::Device& device = cuda::device(static_cast<int>(index));
  return {device.major, device.minor, device.sms, device.memory_bits};
}

}  // namespace
}  // namespace resq

RESQ_CUDA_IMPL(m) {
  using resq::Cuda;
  m.impl("mixed_quantize", TORCH_BOX(&resq::mixed_quantize<Cuda>));
  m.impl("rms_norm", TORCH_BOX(&resq::rms_norm<Cuda>));
  m.impl("rms_norm_quantize", TORCH_BOX(&resq::rms_norm_quantize<Cuda>));
  m.impl("silu_mul_hadamard_quantize", TORCH_BOX(&resq::silu_mul_hadamard_quantize<Cuda>));
  m.impl("hadamard", TORCH_BOX(&resq::hadamard<Cuda>));
  m.impl("gptq_block", TORCH_BOX(&resq::gptq_block<Cuda>));
  m.impl("search_scale", TORCH_BOX(&resq::search_scale<Cuda>));
  m.impl("pack_weight", TORCH_BOX(&resq::pack_weight<Cuda>));
  m.impl("unpack_weight", TORCH_BOX(&resq::unpack_weight<Cuda>));
  m.impl("embedding", TORCH_BOX(&resq::embedding<Cuda>));
  m.impl("kv_append", TORCH_BOX(&resq::kv_append<Cuda>));
  m.impl("kv_dequantize", TORCH_BOX(&resq::kv_dequantize<Cuda>));
}

RESQ_IMPL(CompositeExplicitAutograd, m) {
  m.impl("cuda_family", TORCH_BOX(&resq::cuda_family));
  m.impl("cuda_pdl", TORCH_BOX(&resq::cuda_pdl));
  m.impl("cuda_device", TORCH_BOX(&resq::cuda_device));
  m.impl("force_kernel", TORCH_BOX(&resq::force_kernel));
}
