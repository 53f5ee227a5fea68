// q' = (q cos + rotate_half(q) sin) U[kv head] in float32, where the caller has not rotated q.
// A thread owns one dim of some rows, which share the reads of the rotation.
#include <cuda_runtime.h>

#include "cuda/numbers.cuh"
#include "cuda/rotate_rows.cuh"
#include "ops/kv_attention/kv_attention_cuda.h"

namespace resq::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kRows = 4;  // of a thread

template <int kHeadDim, class Rotation>
__global__ void __launch_bounds__(kThreads)
    kv_attention_prepare_kernel(const __grid_constant__ KvAttentionCuda call, float* out) {
  constexpr int kBlockRows = kThreads / kHeadDim * kRows;
  __shared__ alignas(16) float loaded[kHeadDim][kBlockRows];
  const KvAttentionParams& p = call.params;
  const int group = static_cast<int>(p.group()), rows = static_cast<int>(call.tokens) * group;
  const int first = blockIdx.x * kBlockRows;
  const int kv_head = blockIdx.y, thread = threadIdx.x;
  const int dim = thread % kHeadDim, first_row = thread / kHeadDim * kRows;
  const auto token = [&](int row) { return (first + row) / group; };
  const auto head = [&](int row) { return kv_head * group + (first + row) % group; };

#pragma unroll
  for (int r = first_row; r < first_row + kRows; ++r) {
    float x = 0.0f;
    if (first + r < rows) {
      x = load_rope<kHeadDim>({p.q, p.q_type}, token(r) * p.q_stride + head(r) * kHeadDim, p.cos,
                              p.sin, int64_t{token(r)} * kHeadDim, dim);
    }
    loaded[dim][r] = x;
  }
  __syncthreads();

  float sums[kRows];
  const auto fused = [](float a, float b, float sum) { return fmaf(a, b, sum); };
  rotate_rows<Rotation>(p.rotation, p.shared_rotation ? 0 : kv_head, loaded, first_row, dim, fused,
                        sums);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int row = first_row + r;
    if (first + row < rows) out[(token(row) * p.n_q + head(row)) * kHeadDim + dim] = sums[r];
  }
}

template <int kHeadDim>
void launch(const KvAttentionCuda& call, float* out, Stream stream) {
  const KvAttentionParams& p = call.params;
  constexpr int kBlockRows = kThreads / kHeadDim * kRows;
  const dim3 grid(static_cast<unsigned>(ceil_div(call.tokens * p.group(), kBlockRows)),
                  static_cast<unsigned>(p.n_kv));
  auto* kernel = kv_attention_prepare_kernel<kHeadDim, float>;
  if (p.rotation.type == FloatType::kFloat16) kernel = kv_attention_prepare_kernel<kHeadDim, Half>;
  if (p.rotation.type == FloatType::kBFloat16) {
    kernel = kv_attention_prepare_kernel<kHeadDim, BFloat16>;
  }
  kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream.handle)>>>(call, out);
}

}  // namespace

void kv_attention_prepare(const KvAttentionCuda& call, float* out, Stream stream) {
  call.params.head_dim == 128 ? launch<128>(call, out, stream) : launch<64>(call, out, stream);
  check_launch("kv_attention");
}

}  // namespace resq::cuda
