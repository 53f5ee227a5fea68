// The merging kernel of sm_90: its blocks read the lengths while the attention kernel ends.
#include <cuda_runtime.h>

#include "cuda/dependent_launch.cuh"
#include "ops/kv_attention/kv_attention_merge.cuh"

namespace resq::cuda {
namespace {

template <int kHeadDim>
__global__ void __launch_bounds__(kHeadDim)
    kv_attention_merge_sm90_kernel(const __grid_constant__ KvAttentionCuda call) {
  merge_row<kHeadDim>(call, [] { wait_for_kernel_before(); });
}

}  // namespace

void kv_attention_merge_sm90(const KvAttentionCuda& call, Stream stream) {
  const auto rows = static_cast<unsigned>(call.tokens * call.params.n_q);
  if (call.params.head_dim == 128) {
    launch_dependent(kv_attention_merge_sm90_kernel<128>, rows, 128, 0, stream, call);
  } else {
    launch_dependent(kv_attention_merge_sm90_kernel<64>, rows, 64, 0, stream, call);
  }
  check_launch("kv_attention");
}

}  // namespace resq::cuda
