// A thread gathers the 16 bytes of one lane of one fragment. Packing happens once, when a model is
// loaded: what matters is that every byte of the layout has exactly one writer.
#include <cuda_runtime.h>

#include "core/int4.h"
#include "ops/pack_weight/pack_weight.h"

namespace resq::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kPieceBytes = 16;
constexpr int64_t kPiecesPerStep = kCudaStepBytes / kPieceBytes;

// Codes outside the matrix are 0.
__device__ uint32_t lo_code(const PackWeightParams& p, int64_t n, int64_t k) {
  if (n >= p.n || k >= p.k_lo) return 0;
  const uint8_t pair = p.codes_lo[n * (p.k_lo / 2) + k / 2];
  return static_cast<uint32_t>(k % 2 ? unpack_int4_odd(pair) : unpack_int4_even(pair)) & 15;
}

__device__ uint32_t hi_code(const PackWeightParams& p, int64_t n, int64_t k) {
  if (n >= p.n || k >= p.k_hi) return 0;
  return static_cast<uint8_t>(p.codes_hi[n * p.k_hi + k]);
}

template <CudaLayout kLayout>
__device__ uint4 lo_piece(const PackWeightParams& p, int64_t n, int64_t k, int lane) {
  uint32_t words[4] = {};
#pragma unroll
  for (int nibble = 0; nibble < 32; ++nibble) {
    const FragmentCode at = cuda_lo_code(kLayout, lane, nibble);
    words[nibble / 8] |= lo_code(p, n + at.n, k + at.k) << (4 * (nibble % 8));
  }
  return {words[0], words[1], words[2], words[3]};
}

__device__ uint4 hi_piece(const PackWeightParams& p, int64_t n, int64_t k, int lane) {
  uint32_t words[4] = {};
#pragma unroll
  for (int byte = 0; byte < 16; ++byte) {
    const FragmentCode at = cuda_hi_code(lane, byte);
    words[byte / 4] |= hi_code(p, n + at.n, k + at.k) << (8 * (byte % 4));
  }
  return {words[0], words[1], words[2], words[3]};
}

template <CudaLayout kLayout>
__global__ void __launch_bounds__(kThreads)
    pack_weight_kernel(const __grid_constant__ PackWeightParams p) {
  const int64_t lo_steps = cuda_lo_steps(p.k_lo), steps = lo_steps + cuda_hi_steps(p.k_hi);
  const int64_t pieces = cuda_packed_blocks(p.n) * steps * kPiecesPerStep;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t piece = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; piece < pieces;
       piece += stride) {
    const int64_t block = piece / (steps * kPiecesPerStep);
    const int64_t step = piece / kPiecesPerStep % steps;
    const int strip = static_cast<int>(piece % kPiecesPerStep) / 32;
    const int lane = static_cast<int>(piece % 32);
    const int64_t n = block * kCudaBlockN + strip * kCudaStripN;
    reinterpret_cast<uint4*>(p.packed_weight)[piece] =
        step < lo_steps ? lo_piece<kLayout>(p, n, step * kCudaLoStepK, lane)
                        : hi_piece(p, n, (step - lo_steps) * kCudaHiStepK, lane);
  }
}

}  // namespace

void pack_weight(const PackWeightParams& p, CudaLayout layout, Stream stream) {
  constexpr int64_t kMaxBlocks = 1 << 20;
  const int64_t pieces = cuda_packed_weight_bytes(p.n, p.k_lo, p.k_hi) / kPieceBytes;
  if (pieces == 0) return;
  const int64_t needed = ceil_div(pieces, kThreads);
  const auto grid = static_cast<unsigned>(needed < kMaxBlocks ? needed : kMaxBlocks);
  const auto kernel = layout == CudaLayout::kMma ? pack_weight_kernel<CudaLayout::kMma>
                                                 : pack_weight_kernel<CudaLayout::kWgmma>;
  launch_kernel("pack_weight", kernel, {.x = grid, .threads = kThreads}, stream, p);
}

}  // namespace resq::cuda
