#include <cuda_runtime.h>

#include "core/host_device.h"
#include "cuda/pdl.cuh"
#include "ops/mixed_gemm/activation_rows.h"

namespace resq::cuda {
namespace {

constexpr int kPadThreads = 128, kUnpackThreads = 256;
constexpr int kThreadBytes = 16;  // that a thread writes
constexpr int kWords = kThreadBytes / 4;

// from [M, bytes] -> to [M, padded], padded with zeros; `padded` is a multiple of 16.
__global__ void __launch_bounds__(kPadThreads)
    mixed_gemm_pad_rows_kernel(const uint8_t* from, uint8_t* to, int64_t bytes, int64_t padded,
                               unsigned blocks_per_row) {
  pdl_wait();
  pdl_trigger();
  const int64_t m = blockIdx.x / blocks_per_row;
  const int64_t first =
      (int64_t{blockIdx.x % blocks_per_row} * kPadThreads + threadIdx.x) * kThreadBytes;
  if (first >= padded) return;
  uint32_t words[kWords] = {};
#pragma unroll
  for (int b = 0; b < kThreadBytes; ++b) {
    if (first + b < bytes) {
      words[b / 4] |= static_cast<uint32_t>(from[m * bytes + first + b]) << (8 * (b % 4));
    }
  }
  *reinterpret_cast<uint4*>(to + m * padded + first) = {words[0], words[1], words[2], words[3]};
}

// Eight packed codes, the even column in the low nibble -> eight signed bytes.
__device__ inline uint2 unpack_codes(uint32_t packed) {
  const uint32_t even = packed & 0x0f0f0f0f, odd = (packed >> 4) & 0x0f0f0f0f;
  const uint32_t low = __byte_perm(even, odd, 0x5140), high = __byte_perm(even, odd, 0x7362);
  constexpr uint32_t kSign = 0x08080808;
  return {__vsub4(low ^ kSign, kSign), __vsub4(high ^ kSign, kSign)};
}

// source [M, source_bytes] of packed codes -> out int8 [M, stride], padded with zeros; `stride` is
// a multiple of 16. Rows of a multiple of 8 bytes are read 8 bytes at a time, others byte by byte.
__global__ void __launch_bounds__(kUnpackThreads)
    mixed_gemm_unpack_rows_kernel(const uint8_t* source, int64_t source_bytes, uint8_t* out,
                                  int64_t stride, unsigned blocks_per_row) {
  pdl_wait();
  pdl_trigger();
  const int64_t m = blockIdx.x / blocks_per_row;
  const int64_t first = int64_t{blockIdx.x % blocks_per_row} * kUnpackThreads + threadIdx.x;
  if (first * kThreadBytes >= stride) return;
  constexpr int kBytes = kThreadBytes / 2;  // of the source
  const uint8_t* bytes = source + m * source_bytes;
  uint32_t words[kBytes / 4] = {};
  if (source_bytes % kBytes == 0) {
    const uint2 both = reinterpret_cast<const uint2*>(bytes)[first];
    words[0] = both.x;
    words[1] = both.y;
  } else {
#pragma unroll
    for (int i = 0; i < kBytes; ++i) {
      const int64_t at = first * kBytes + i;
      const uint32_t byte = at < source_bytes ? bytes[at] : 0;
      words[i / 4] |= byte << (8 * (i % 4));
    }
  }
  const uint2 low = unpack_codes(words[0]), high = unpack_codes(words[1]);
  reinterpret_cast<uint4*>(out + m * stride)[first] = {low.x, low.y, high.x, high.y};
}

void pad_rows(const void* from, void* to, int64_t m, int64_t bytes, int64_t padded, Stream stream) {
  const int64_t blocks_per_row = ceil_div(padded, kPadThreads * kThreadBytes);
  const auto grid = static_cast<unsigned>(blocks_per_row * m);
  launch_pdl("mixed_gemm", mixed_gemm_pad_rows_kernel, {.x = grid, .threads = kPadThreads}, stream,
             static_cast<const uint8_t*>(from), static_cast<uint8_t*>(to), bytes, padded,
             static_cast<unsigned>(blocks_per_row));
}

void unpack_rows(const void* from, void* to, int64_t m, int64_t bytes, int64_t stride,
                 Stream stream) {
  const int64_t blocks_per_row = ceil_div(stride, kUnpackThreads * kThreadBytes);
  const auto grid = static_cast<unsigned>(blocks_per_row * m);
  launch_pdl("mixed_gemm", mixed_gemm_unpack_rows_kernel, {.x = grid, .threads = kUnpackThreads},
             stream, static_cast<const uint8_t*>(from), bytes, static_cast<uint8_t*>(to), stride,
             static_cast<unsigned>(blocks_per_row));
}

}  // namespace

MixedGemmParams readable_rows(const MixedGemmParams& p, const ActivationRows& rows, void* workspace,
                              Stream stream) {
  auto* space = static_cast<uint8_t*>(workspace);
  MixedGemmParams readable = p;
  readable.k_lo = rows.lo.k;
  readable.k_hi = rows.hi.k;
  if (rows.lo.copied) {
    uint8_t* copy = space + rows.lo.offset;
    const int64_t from_bytes = p.k_lo / (p.q_lo_packed ? 2 : 1);
    if (rows.unpacks_lo) {
      unpack_rows(p.q_lo, copy, p.m, from_bytes, rows.lo.k, stream);
    } else {
      pad_rows(p.q_lo, copy, p.m, from_bytes, rows.lo.k / (p.q_lo_packed ? 2 : 1), stream);
    }
    readable.q_lo = copy;
    readable.q_lo_packed = p.q_lo_packed && !rows.unpacks_lo;
  }
  if (rows.hi.copied) {
    uint8_t* copy = space + rows.hi.offset;
    pad_rows(p.q_hi, copy, p.m, p.k_hi, rows.hi.k, stream);
    readable.q_hi = reinterpret_cast<const int8_t*>(copy);
  }
  return readable;
}

}  // namespace resq::cuda
