// Tensor-core multiplications of sm_80 and the loads that feed them. D = A B + D with A [16, k]
// codes in a lane's four registers, B [k, 8] in two, D [16, 8] int32 in four: with lane = 4 g + i,
// d[r] is row g + 8 (r / 2), column 2 i + r % 2.
#pragma once

#include <cstdint>

namespace resq::cuda {

// k = 32, 8-bit codes.
__device__ __forceinline__ void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                       uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// k = 64, 4-bit codes. Only on sm_80, 86, 87 and 89: elsewhere it compiles to a slow call.
__device__ __forceinline__ void mma_s4(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                       uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 16-byte matrices; lane l gives the address of row l % 8 of matrix l / 8, and gets bytes
// 4 i .. 4 i + 3 of row g of each.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* shared) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address));
}

// Eight 4-bit codes, two a byte, as 16 times the codes in signed bytes: of the low nibbles, and of
// the high ones. One AND each (and a shift), where sign extension takes nine instructions.
__device__ __forceinline__ uint32_t low_nibbles_x16(uint32_t v) { return (v << 4) & 0xf0f0f0f0; }
__device__ __forceinline__ uint32_t high_nibbles_x16(uint32_t v) { return v & 0xf0f0f0f0; }

}  // namespace resq::cuda
