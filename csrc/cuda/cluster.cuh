// Thread-block clusters: blocks that run at once and write into each other's shared memory. Below
// sm_90 every block is a cluster of its own, and nobody may launch another one.
#pragma once

#include <cstdint>

namespace resq::cuda {

// Blocks of this cluster, and the number of this block among them.
__device__ inline unsigned cluster_blocks() {
#if __CUDA_ARCH__ >= 900
  unsigned blocks;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
  return blocks;
#else
  return 1;
#endif
}
__device__ inline unsigned cluster_rank() {
#if __CUDA_ARCH__ >= 900
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}

// A barrier of all threads of the cluster: what was written before the arrival, into other blocks'
// shared memory too, is visible behind the wait. cluster_arrive_relaxed promises only that this
// block runs, and saves the fence.
__device__ inline void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive;" ::: "memory");
#endif
}
__device__ inline void cluster_arrive_relaxed() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed;");
#endif
}
__device__ inline void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait;" ::: "memory");
#endif
}

// *shared = value in block `rank` of the cluster.
__device__ inline void store_to_block([[maybe_unused]] int4* shared, [[maybe_unused]] int4 value,
                                      [[maybe_unused]] unsigned rank) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "st.shared::cluster.v4.b32 [remote], {%2, %3, %4, %5};\n"
      "}" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
      "r"(rank), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
      : "memory");
#endif
}

// What the blocks of the cluster have stored at `shared` of this one, behind a barrier: a load that
// may follow stores of other blocks. Zeros where nothing is `present`, without a branch.
__device__ inline int4 load_stored([[maybe_unused]] const int4* shared,
                                   [[maybe_unused]] bool present = true) {
  int4 value = {};
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %5, 0;\n"
      "@p ld.relaxed.cluster.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n"
      "}"
      : "+r"(value.x), "+r"(value.y), "+r"(value.z), "+r"(value.w)
      : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))), "r"(static_cast<int>(present))
      : "memory");
#endif
  return value;
}

}  // namespace resq::cuda
