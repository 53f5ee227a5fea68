#include <cuda_runtime.h>

#include "cuda/pdl.cuh"
#include "ops/mixed_gemm/mixed_gemm_pad_rows.h"

namespace resq::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWords = 4;  // that a thread writes, 16 bytes

// from [rows, bytes] -> to [rows, padded], a multiple of 16.
__global__ void __launch_bounds__(kThreads)
    mixed_gemm_pad_rows_kernel(const uint8_t* from, uint8_t* to, int64_t bytes, int64_t padded,
                               unsigned blocks_per_row) {
  pdl_wait();
  pdl_trigger();
  const int64_t row = blockIdx.x / blocks_per_row;
  const int64_t first = (int64_t{blockIdx.x % blocks_per_row} * kThreads + threadIdx.x) * 16;
  if (first >= padded) return;
  uint32_t words[kWords] = {};
#pragma unroll
  for (int b = 0; b < 16; ++b) {
    if (first + b < bytes) {
      words[b / 4] |= static_cast<uint32_t>(from[row * bytes + first + b]) << (8 * (b % 4));
    }
  }
  *reinterpret_cast<uint4*>(to + row * padded + first) = {words[0], words[1], words[2], words[3]};
}

}  // namespace

void pad_byte_rows(const void* from, uint8_t* to, int64_t rows, int64_t bytes, int64_t padded,
                   Stream stream) {
  const int64_t blocks_per_row = ceil_div(padded, kThreads * 16);
  const auto grid = static_cast<unsigned>(blocks_per_row * rows);
  launch_pdl(mixed_gemm_pad_rows_kernel, grid, kThreads, 0, stream,
             static_cast<const uint8_t*>(from), to, bytes, padded,
             static_cast<unsigned>(blocks_per_row));
  check_launch("mixed_gemm");
}

MixedGemmParams pad_rows(const MixedGemmParams& p, int splits, const RowUnits& units,
                         void* workspace, Stream stream) {
  const MixedGemmShape shape{p.rows, p.n, p.k_lo, p.k_hi, p.q_lo_packed};
  auto* lo = static_cast<uint8_t*>(workspace) + split_bytes(shape, splits);
  uint8_t* hi = lo + padded_lo_bytes(shape, units);
  MixedGemmParams padded = p;
  if (p.k_lo % units.lo) {
    padded.k_lo = cuda_packed_columns(p.k_lo);
    padded.q_lo = lo;
    const int64_t codes_per_byte = p.q_lo_packed ? 2 : 1;
    pad_byte_rows(p.q_lo, lo, p.rows, p.k_lo / codes_per_byte, padded.k_lo / codes_per_byte,
                  stream);
  }
  if (p.k_hi % units.hi) {
    padded.k_hi = cuda_packed_columns(p.k_hi);
    padded.q_hi = reinterpret_cast<const int8_t*>(hi);
    pad_byte_rows(p.q_hi, hi, p.rows, p.k_hi, padded.k_hi, stream);
  }
  return padded;
}

}  // namespace resq::cuda
