// Rate of 8-bit wgmma: the ceiling that mixed_gemm on sm_90a is measured against. Two warpgroups a
// block multiply registers by shared memory and touch nothing else. Built by RESQ_CUDA_BENCHMARKS=1
// (docs/cuda.md).
#include <cuda_runtime.h>

#include <cstdint>

namespace {

constexpr int kTokens = 128, kDepth = 32, kRows = 64;  // of one wgmma
constexpr int kUnroll = 8;                             // wgmmas between two waits
constexpr int kThreads = 256;                          // two warpgroups

__device__ __forceinline__ void wgmma(int (&d)[64], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
      "}, {%64, %65, %66, %67}, %68, 1;"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]), "+r"(d[4]), "+r"(d[5]), "+r"(d[6]),
        "+r"(d[7]), "+r"(d[8]), "+r"(d[9]), "+r"(d[10]), "+r"(d[11]), "+r"(d[12]), "+r"(d[13]),
        "+r"(d[14]), "+r"(d[15]), "+r"(d[16]), "+r"(d[17]), "+r"(d[18]), "+r"(d[19]), "+r"(d[20]),
        "+r"(d[21]), "+r"(d[22]), "+r"(d[23]), "+r"(d[24]), "+r"(d[25]), "+r"(d[26]), "+r"(d[27]),
        "+r"(d[28]), "+r"(d[29]), "+r"(d[30]), "+r"(d[31]), "+r"(d[32]), "+r"(d[33]), "+r"(d[34]),
        "+r"(d[35]), "+r"(d[36]), "+r"(d[37]), "+r"(d[38]), "+r"(d[39]), "+r"(d[40]), "+r"(d[41]),
        "+r"(d[42]), "+r"(d[43]), "+r"(d[44]), "+r"(d[45]), "+r"(d[46]), "+r"(d[47]), "+r"(d[48]),
        "+r"(d[49]), "+r"(d[50]), "+r"(d[51]), "+r"(d[52]), "+r"(d[53]), "+r"(d[54]), "+r"(d[55]),
        "+r"(d[56]), "+r"(d[57]), "+r"(d[58]), "+r"(d[59]), "+r"(d[60]), "+r"(d[61]), "+r"(d[62]),
        "+r"(d[63])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

__global__ void __launch_bounds__(kThreads, 1)
    int8_ceiling(const uint4* codes, int* out, int steps) {
  extern __shared__ __align__(1024) uint4 tokens[];  // kTokens rows of 128 bytes, any content
  constexpr int kVectors = kTokens * 128 / sizeof(uint4);
  for (int i = threadIdx.x; i < kVectors; i += kThreads) tokens[i] = codes[i];
  asm volatile("fence.proxy.async;" ::: "memory");
  __syncthreads();
  // Descriptor: 128-byte swizzle, rows of 128 bytes in groups of eight (1024 bytes).
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(tokens));
  const uint64_t base =
      (uint64_t{address & 0x3ffff} >> 4) | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
  const uint4 v = codes[threadIdx.x];
  const uint32_t a[4] = {v.x, v.y, v.z, v.w};
  int d[64] = {};
  for (int step = 0; step < steps; ++step) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) wgmma(d, a, base + u % 4 * (kDepth >> 4));
    asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
  }
  int sum = 0;
#pragma unroll
  for (int i = 0; i < 64; ++i) sum += d[i];
  out[blockIdx.x * kThreads + threadIdx.x] = sum;
}

}  // namespace

#pragma GCC visibility push(default)

// Launches `blocks` blocks; returns the multiply-adds of the launch times two, or a negative error.
// codes: at least 16384 random bytes; out: blocks * 256 ints.
extern "C" double int8_ceiling_launch(const void* codes, void* out, int blocks, int steps,
                                      void* stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kTokens * 128;
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(
      &config, int8_ceiling, static_cast<const uint4*>(codes), static_cast<int*>(out), steps);
  if (error != cudaSuccess) return -static_cast<double>(error);
  return 2.0 * blocks * (kThreads / 128) * steps * kUnroll * kRows * kTokens * kDepth;
}

#pragma GCC visibility pop
