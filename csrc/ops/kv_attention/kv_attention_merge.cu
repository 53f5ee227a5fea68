// The merging kernel of every architecture; sm_90 has a sibling that starts early.
#include <cuda_runtime.h>

#include "ops/kv_attention/kv_attention_merge.cuh"

namespace resq::cuda {
namespace {

template <int kHeadDim>
__global__ void __launch_bounds__(kHeadDim)
    kv_attention_merge_kernel(const __grid_constant__ KvAttentionCuda call) {
  merge_row<kHeadDim>(call, [] {});
}

}  // namespace

void kv_attention_merge(const KvAttentionCuda& call, Stream stream) {
  const auto rows = static_cast<unsigned>(call.tokens * call.params.n_q);
  const auto launched = static_cast<cudaStream_t>(stream.handle);
  if (call.params.head_dim == 128) {
    kv_attention_merge_kernel<128><<<rows, 128, 0, launched>>>(call);
  } else {
    kv_attention_merge_kernel<64><<<rows, 64, 0, launched>>>(call);
  }
  check_launch("kv_attention");
}

}  // namespace resq::cuda
