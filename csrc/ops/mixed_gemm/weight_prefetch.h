// The weights that a block of small_m asks for in the second-level cache (L2) while it waits for
// the previous kernel: pure functions, tested on the CPU.
#pragma once

#include <algorithm>

#include "ops/mixed_gemm/mixed_gemm_tiles.h"

namespace resq::cuda {

// One instruction asks for less than 1 MB: ptxas keeps 16 bits of the size, which counts 16 bytes.
inline constexpr int64_t kMostPrefetchedBytes = (1 << 20) - kCudaStepBytes;

// The most steps of K that a block may ask for, so that the blocks that wait at the same time ask
// for at most `percent` of L2: more would evict what the first of them has asked for. `blocks`: of
// the grid; `slots`: blocks that the device holds.
constexpr int prefetched_steps(int64_t blocks, int64_t slots, int64_t l2_bytes, int percent) {
  const int64_t share = l2_bytes * percent / 100 / std::min(blocks, slots);
  return static_cast<int>(std::min(share, kMostPrefetchedBytes) / kCudaStepBytes);
}

// Bytes of 64 packed rows of the weight.
struct ByteSpan {
  uint32_t first, bytes;
};

// What split `split` reads of them, its first `most_steps` steps: high steps follow the low ones.
RESQ_HOST_DEVICE inline ByteSpan prefetched_span(const SplitK& split_k, int split, int most_steps) {
  const int begin = split_k.begin(split), steps = split_k.begin(split + 1) - begin;
  return {static_cast<uint32_t>(begin * kCudaStepBytes),
          static_cast<uint32_t>((steps < most_steps ? steps : most_steps) * kCudaStepBytes)};
}

}  // namespace resq::cuda
