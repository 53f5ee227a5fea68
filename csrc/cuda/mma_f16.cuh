// float16 tensor-core MMAs with float32 accumulators, and the instruction that prepares their
// operands here: one function per PTX instruction. Lane 4 g + i of a warp holds
//
//   A [16, 16]  registers 0..3: row g (g + 8 in registers 1 and 3); columns 2 i and 2 i + 1 (plus 8
//               in registers 2 and 3)
//   B [16, 8]   registers 0, 1: rows 2 i and 2 i + 1 (plus 8 in register 1); column g
//   C [16, 8]   numbers 0..3: row g (g + 8 in numbers 2 and 3); columns 2 i and 2 i + 1 in turn
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

namespace resq::cuda {

// c += a b.
__device__ inline void mma_16816(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same with columns 0..7 of A and rows 0..7 of B only.
__device__ inline void mma_1688(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(b));
}

// Lane 4 g + i holds elements (g, 2 i) and (g, 2 i + 1) of an 8 x 8 matrix; returns (2 i, g) and
// (2 i + 1, g).
__device__ inline uint32_t transpose_8x8(uint32_t pair) {
  uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
  return transposed;
}

__device__ inline uint32_t half_pair(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

__device__ inline uint32_t subtract_halves(uint32_t a, uint32_t b) {
  const __half2 difference =
      __hsub2(reinterpret_cast<const __half2&>(a), reinterpret_cast<const __half2&>(b));
  return reinterpret_cast<const uint32_t&>(difference);
}

}  // namespace resq::cuda
