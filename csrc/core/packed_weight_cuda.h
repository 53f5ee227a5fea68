// Bytes of a packed weight on CUDA (docs/formats.md section 3.3): sizes, and the place of each
// code. N counts rows of the weight, K what is summed over (k_lo, k_hi: of each part).
//
// The weight is the A operand of the tensor cores, stored in the order of its registers: a warp
// reads a fragment with one 16-byte load per lane, 512 contiguous bytes. Codes keep their sign
// (two's complement); padding of N and K holds code 0.
#pragma once

#include "core/host_device.h"

namespace resq {

// The low codes of a lane are stored in one of two orders.
//   kMma:   registers of mma.m16n8k64.s4 (sm_80, 86, 89, and the portable kernel elsewhere).
//   kWgmma: two steps of the 8-bit A operand of wgmma.m64nNk32 (sm_90a); a byte holds n = g in its
//           high nibble and n = g + 8 in its low one, so that one AND gives four codes times 16.
// High codes are the same in both: registers of mma.m16n8k32.s8, which are those of wgmma.
enum class CudaLayout { kMma, kWgmma };

inline constexpr int64_t kCudaBlockN = 64;          // of a block: one warpgroup of wgmma
inline constexpr int64_t kCudaStripN = 16;          // of a fragment: one warp
inline constexpr int64_t kCudaStepK = 64;           // both parts are padded to a multiple of this
inline constexpr int64_t kCudaLoStepK = 64;         // of a fragment of low codes
inline constexpr int64_t kCudaHiStepK = 32;         // of a fragment of high codes
inline constexpr int64_t kCudaFragmentBytes = 512;  // 32 lanes x 16 bytes
inline constexpr int64_t kCudaStepBytes = 4 * kCudaFragmentBytes;  // the four strips of a block

RESQ_HOST_DEVICE constexpr int64_t cuda_packed_k(int64_t k) { return align_up(k, kCudaStepK); }
RESQ_HOST_DEVICE constexpr int64_t cuda_packed_blocks(int64_t n) {
  return ceil_div(n, kCudaBlockN);
}
// Steps of a part: a step is one fragment for each of the four strips of a block.
RESQ_HOST_DEVICE constexpr int64_t cuda_lo_steps(int64_t k_lo) {
  return cuda_packed_k(k_lo) / kCudaLoStepK;
}
RESQ_HOST_DEVICE constexpr int64_t cuda_hi_steps(int64_t k_hi) {
  return cuda_packed_k(k_hi) / kCudaHiStepK;
}
// A block: its low steps, then its high steps.
RESQ_HOST_DEVICE constexpr int64_t cuda_block_lo_bytes(int64_t k_lo) {
  return cuda_lo_steps(k_lo) * kCudaStepBytes;
}
RESQ_HOST_DEVICE constexpr int64_t cuda_block_bytes(int64_t k_lo, int64_t k_hi) {
  return cuda_block_lo_bytes(k_lo) + cuda_hi_steps(k_hi) * kCudaStepBytes;
}
RESQ_HOST_DEVICE constexpr int64_t cuda_packed_weight_bytes(int64_t n, int64_t k_lo, int64_t k_hi) {
  return cuda_packed_blocks(n) * cuda_block_bytes(k_lo, k_hi);
}

struct NibblePlace {
  int64_t byte;
  bool high;  // in the byte's high nibble
};

// Inside a block (n in 0..63): where low code (n, k) is.
RESQ_HOST_DEVICE constexpr NibblePlace cuda_lo_place(CudaLayout layout, int64_t n, int64_t k) {
  const int64_t strip = n / kCudaStripN, n_in = n % kCudaStripN;
  const int64_t step = k / kCudaLoStepK, k_in = k % kCudaLoStepK;
  const int64_t fragment = step * kCudaStepBytes + strip * kCudaFragmentBytes;
  if (layout == CudaLayout::kMma) {
    const int64_t lane = 4 * (n_in % 8) + k_in % 32 / 8, word = n_in / 8 + 2 * (k_in / 32);
    const int64_t nibble = k_in % 8;
    return {fragment + 16 * lane + 4 * word + nibble / 2, nibble % 2 == 1};
  }
  const int64_t half_k = k_in % 32;
  const int64_t lane = 4 * (n_in % 8) + half_k % 16 / 4, word = 2 * (k_in / 32) + half_k / 16;
  return {fragment + 16 * lane + 4 * word + half_k % 4, n_in < 8};
}

// Inside a block: the byte of high code (n, k).
RESQ_HOST_DEVICE constexpr int64_t cuda_hi_byte(int64_t k_lo, int64_t n, int64_t k) {
  const int64_t strip = n / kCudaStripN, n_in = n % kCudaStripN;
  const int64_t step = k / kCudaHiStepK, k_in = k % kCudaHiStepK;
  const int64_t lane = 4 * (n_in % 8) + k_in % 16 / 4, word = n_in / 8 + 2 * (k_in / 16);
  return cuda_block_lo_bytes(k_lo) + step * kCudaStepBytes + strip * kCudaFragmentBytes +
         16 * lane + 4 * word + k_in % 4;
}

// The inverse, inside a fragment: the code in a nibble (0..31) or byte (0..15) of a lane's 16
// bytes.
struct FragmentCode {
  int64_t n, k;  // 0..15, and 0..63 (low) or 0..31 (high)
};

RESQ_HOST_DEVICE constexpr FragmentCode cuda_lo_code(CudaLayout layout, int64_t lane,
                                                     int64_t nibble) {
  const int64_t word = nibble / 8;
  if (layout == CudaLayout::kMma) {
    return {lane / 4 + 8 * (word % 2), 32 * (word / 2) + 8 * (lane % 4) + nibble % 8};
  }
  return {lane / 4 + (nibble % 2 == 1 ? 0 : 8), 16 * word + 4 * (lane % 4) + nibble % 8 / 2};
}

RESQ_HOST_DEVICE constexpr FragmentCode cuda_hi_code(int64_t lane, int64_t byte) {
  const int64_t word = byte / 4;
  return {lane / 4 + 8 * (word % 2), 16 * (word / 2) + 4 * (lane % 4) + byte % 4};
}

}  // namespace resq
