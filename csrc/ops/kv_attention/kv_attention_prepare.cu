// q' = (q cos + rotate_half(q) sin) U[kv head] * scale * log2(e) of every row, as float16.
//
// A thread owns one dim of some rows, which share the reads of the rotation; a warp then scales a
// row by a power of two so that float16 holds it whatever its magnitude.
#include <cuda_runtime.h>

#include "cuda/mma_f16.cuh"
#include "cuda/numbers.cuh"
#include "ops/kv_attention/kv_attention_cuda.h"

namespace resq::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kRows = 4;  // of a thread

__device__ float warp_sum(float x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    x = __fadd_rn(x, __shfl_xor_sync(0xffffffff, x, distance));
  }
  return x;
}

// Writes one row, whose dims lane * kHeadDim / 32 + i the lanes hold.
template <int kHeadDim>
__device__ void store_query(const KvAttentionCuda& call, int64_t row, const float* x) {
  constexpr int kDims = kHeadDim / 32, kLow = KvLayout<kHeadDim>::kLowDims;
  const int lane = threadIdx.x % 32, first = lane * kDims;
  unsigned magnitude = 0;
#pragma unroll
  for (int i = 0; i < kDims; ++i) {
    magnitude = max(magnitude, __float_as_uint(x[first + i]) & 0x7fffffff);
  }
  magnitude = __reduce_max_sync(0xffffffff, magnitude);
  const bool finite = magnitude < 0x7f800000;
  // 2^e with the row's largest |x| in [2^e, 2^(e + 1)), inside what keeps 2^-e normal.
  const unsigned exponent = min(max(magnitude >> 23, 20u), 253u);
  const float inverse = __uint_as_float((254 - exponent) << 23);

  float sum = 0.0f;
  __half values[kDims];
#pragma unroll
  for (int i = 0; i < kDims; ++i) {
    const float scaled = finite ? __fmul_rn(x[first + i], inverse) : 0.0f;
    values[i] = __float2half_rn(scaled);
    sum = __fadd_rn(sum, __half2float(values[i]));
    if (first >= kLow) {
      const __half rest = __float2half_rn(__fsub_rn(scaled, __half2float(values[i])));
      sum = __fadd_rn(sum, __half2float(rest));
      call.residuals[row * (kHeadDim / 8) + first + i - kLow] = __half_as_ushort(rest);
    }
  }
  const float sum_low = warp_sum(first < kLow ? sum : 0.0f);
  const float sum_high = warp_sum(first < kLow ? 0.0f : sum);
#pragma unroll
  for (int i = 0; i < kDims; ++i) {
    call.values[row * kHeadDim + first + i] = __half_as_ushort(values[i]);
  }
  if (lane == 0) {
    const float multiplier = finite ? __uint_as_float(exponent << 23) : __int_as_float(0x7fc00000);
    call.rows[row] = {multiplier, sum_low, sum_high, 0.0f};
  }
}

template <int kHeadDim, class Rotation>
__global__ void __launch_bounds__(kThreads)
    kv_attention_prepare_kernel(const __grid_constant__ KvAttentionCuda call) {
  constexpr int kBlockRows = kThreads / kHeadDim * kRows;
  __shared__ alignas(16) float loaded[kHeadDim][kBlockRows];
  __shared__ alignas(16) float rotated[kBlockRows][kHeadDim];
  const KvAttentionParams& p = call.params;
  const int group = static_cast<int>(p.group()), rows = static_cast<int>(call.tokens) * group;
  const int first = blockIdx.x * kBlockRows;
  const int kv_head = blockIdx.y, thread = threadIdx.x;
  const int dim = thread % kHeadDim, first_row = thread / kHeadDim * kRows;
  // Index into [tokens, n_q] of the block's row `row`.
  const auto index = [&](int row) {
    const int token = (first + row) / group;
    return token * p.n_q + kv_head * group + (first + row - token * group);
  };

#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    float x = 0.0f;
    if (first + first_row + r < rows) {
      const int64_t at = index(first_row + r);
      const int64_t token = (first + first_row + r) / group;
      x = load_rope<kHeadDim>({p.q, p.type}, at * kHeadDim, p.cos, p.sin, token * kHeadDim, dim);
    }
    loaded[dim][first_row + r] = x;
  }
  __syncthreads();

  float sums[kRows] = {};
  if (p.rotation.data) {
    const auto* u = static_cast<const Rotation*>(p.rotation.data) + dim +
                    (p.shared_rotation ? 0 : kv_head * kHeadDim * kHeadDim);
#pragma unroll 16
    for (int d = 0; d < kHeadDim; ++d) {
      const float weight = number(u[d * kHeadDim]);
#pragma unroll
      for (int r = 0; r < kRows; ++r) sums[r] = fmaf(weight, loaded[d][first_row + r], sums[r]);
    }
  } else {
#pragma unroll
    for (int r = 0; r < kRows; ++r) sums[r] = loaded[dim][first_row + r];
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) rotated[first_row + r][dim] = __fmul_rn(sums[r], p.scale);
  __syncthreads();

  for (int row = thread / 32; row < kBlockRows && first + row < rows; row += kWarps) {
    store_query<kHeadDim>(call, index(row), rotated[row]);
  }
}

template <int kHeadDim>
void launch(const KvAttentionCuda& call, Stream stream) {
  const KvAttentionParams& p = call.params;
  constexpr int kBlockRows = kThreads / kHeadDim * kRows;
  const dim3 grid(static_cast<unsigned>(ceil_div(call.tokens * p.group(), kBlockRows)),
                  static_cast<unsigned>(p.n_kv));
  auto* kernel = kv_attention_prepare_kernel<kHeadDim, float>;
  if (p.rotation.type == FloatType::kFloat16) kernel = kv_attention_prepare_kernel<kHeadDim, Half>;
  if (p.rotation.type == FloatType::kBFloat16) {
    kernel = kv_attention_prepare_kernel<kHeadDim, BFloat16>;
  }
  kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(call);
}

}  // namespace

void kv_attention_prepare(const KvAttentionCuda& call, Stream stream) {
  call.params.head_dim == 128 ? launch<128>(call, stream) : launch<64>(call, stream);
  check_launch("kv_attention");
}

}  // namespace resq::cuda
