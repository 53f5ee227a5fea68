// A block of four warps works on one row: which thread holds which chunk, and the reductions over a
// row.
#pragma once

#include "cuda/chunk.cuh"
#include "cuda/numbers.cuh"

namespace resq::cuda {

// 128 threads: eight rows of 4096 columns and more per multiprocessor keep 64 KB of loads in
// flight. The order of sum_of_squares follows from this number, so it is the same number for every
// row length.
inline constexpr int kRowThreads = 128;
inline constexpr int kRowWarps = kRowThreads / 32;

// The instances of a row kernel, by the chunks that a thread holds at most (cuda/row_launch.cuh):
// in 64 registers, rows up to 16384 columns of 16-bit numbers. Longer rows, and rows whose chunks
// are not aligned, are read from memory in every pass (kHeld = 0).
template <class T>
inline constexpr int kHeldCounts[] = {1, 2, 3, 4, 6, 8, 16};
// Models run in 16 bits unless one is compared with another in float32.
template <>
inline constexpr int kHeldCounts<float>[] = {4, 8};

// The first chunks of a thread, which every thread of the block has: with fewer, a smaller instance
// would run.
template <class T>
constexpr int full_chunks(int held) {
  int full = 0;
  for (int count : kHeldCounts<T>) {
    if (count < held) full = count;
  }
  return full;
}

// f(slot, chunk) for the chunks of this thread, `slot` a constant below kHeld. The first kAlways
// are not asked for: without branches the compiler mixes the instructions of several chunks.
template <int kHeld, int kAlways, class F>
__device__ inline void for_each_chunk(int chunks, F f) {
  if constexpr (kHeld > 0) {
#pragma unroll
    for (int slot = 0; slot < kHeld; ++slot) {
      const int chunk = static_cast<int>(threadIdx.x) + slot * kRowThreads;
      if (slot < kAlways || chunk < chunks) f(slot, chunk);
    }
  } else {
    for (int chunk = threadIdx.x; chunk < chunks; chunk += kRowThreads) f(0, chunk);
  }
}

// for_each_chunk for an `f` to which chunks of zeros make no difference: it gets those too that
// this thread does not have, which HeldChunks::load has made 0. The first pass over a row must be
// one of these, or the compiler moves a load to its use behind the branch and waits for it alone.
template <int kHeld, class F>
__device__ inline void for_each_chunk_or_zeros(int chunks, F f) {
  for_each_chunk<kHeld, kHeld>(chunks, f);
}

// The chunks of this thread: in registers once set, or read again at every use.
template <class T, int kHeld>
class HeldChunks {
 public:
  // All of them; 0 where the row has no chunk.
  template <class Read>
  __device__ void load(int chunks, Read read) {
#pragma unroll
    for (int slot = 0; slot < kHeld; ++slot) chunks_[slot] = {};
    for_each_chunk<kHeld, full_chunks<T>(kHeld)>(
        chunks, [&](int slot, int chunk) { chunks_[slot] = read(chunk); });
  }
  __device__ void set(int slot, const Chunk<T>& chunk) { chunks_[slot] = chunk; }
  template <class Read>
  __device__ const Chunk<T>& get(int slot, int, Read) const {
    return chunks_[slot];
  }

 private:
  Chunk<T> chunks_[kHeld];
};
template <class T>
class HeldChunks<T, 0> {
 public:
  template <class Read>
  __device__ void load(int, Read) {}
  __device__ void set(int, const Chunk<T>&) {}
  template <class Read>
  __device__ Chunk<T> get(int, int chunk, Read read) const {
    return read(chunk);
  }
};

// NaN if either is.
__device__ inline float min_nan(float a, float b) {
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}
__device__ inline float max_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

// The extremes of a part of a row, widened to contain 0; max is NaN if any number was.
struct Range {
  float min = 0.0f, max = 0.0f;

  __device__ void add(float x) {
    min = min_nan(min, x);
    max = max_nan(max, x);
  }
  __device__ void merge(const Range& other) {
    min = min_nan(min, other.min);
    max = max_nan(max, other.max);
  }
  __device__ bool finite() const { return min > -INFINITY && max < INFINITY; }
};

// The two numbers of either word.
__device__ inline uint32_t min_nan(BFloat16, uint32_t a, uint32_t b) {
  uint32_t result;
  asm("min.NaN.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}
__device__ inline uint32_t max_nan(BFloat16, uint32_t a, uint32_t b) {
  uint32_t result;
  asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}
__device__ inline uint32_t min_nan(Half, uint32_t a, uint32_t b) {
  uint32_t result;
  asm("min.NaN.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}
__device__ inline uint32_t max_nan(Half, uint32_t a, uint32_t b) {
  uint32_t result;
  asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}

// Range of 16-bit numbers, two of them in a word: an instruction replaces two comparisons and
// two conversions.
template <class T>
struct PairRange {
  uint32_t min = 0, max = 0;

  // Of eight numbers alone: 0 comes in where the range is merged.
  __device__ static PairRange of(const uint32_t (&words)[4]) {
    return {min_nan(T{}, min_nan(T{}, words[0], words[1]), min_nan(T{}, words[2], words[3])),
            max_nan(T{}, max_nan(T{}, words[0], words[1]), max_nan(T{}, words[2], words[3]))};
  }
  __device__ void merge(const PairRange& other) {
    min = min_nan(T{}, min, other.min);
    max = max_nan(T{}, max, other.max);
  }
  __device__ Range range() const {
    const Chunk<T> both{min, max};
    return {min_nan(both[0], both[1]), max_nan(both[2], both[3])};
  }
};

// Min and max of the low part, of the high part, as ordered bits. Zeros are the ranges of nothing.
__device__ inline int4 ordered_ranges(const Range (&ranges)[2]) {
  const auto ordered = [](float x) { return ordered_bits(__float_as_int(x)); };
  return make_int4(ordered(ranges[0].min), ordered(ranges[0].max), ordered(ranges[1].min),
                   ordered(ranges[1].max));
}
__device__ inline void set_ranges(Range (&ranges)[2], int4 bits) {
  const auto number = [](int ordered) { return __int_as_float(ordered_bits(ordered)); };
  ranges[0] = {number(bits.x), number(bits.y)};
  ranges[1] = {number(bits.z), number(bits.w)};
}
__device__ inline int4 merged_ranges(int4 a, int4 b) {
  return make_int4(min(a.x, b.x), max(a.y, b.y), min(a.z, b.z), max(a.w, b.w));
}
__device__ inline int4 reduce_warp(int4 bits) {
  return make_int4(__reduce_min_sync(~0u, bits.x), __reduce_max_sync(~0u, bits.y),
                   __reduce_min_sync(~0u, bits.z), __reduce_max_sync(~0u, bits.w));
}

template <int kWarps>
struct RangeExchange {
  int4 warps[kWarps];
};

// Gives every thread the block's ranges of both parts. `shared` may be overwritten after the next
// barrier.
template <int kWarps>
__device__ inline void reduce_ranges(Range (&ranges)[2], RangeExchange<kWarps>& shared) {
  const int4 mine = reduce_warp(ordered_ranges(ranges));
  if (threadIdx.x % 32 == 0) shared.warps[threadIdx.x / 32] = mine;
  __syncthreads();
  int4 all = shared.warps[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) all = merged_ranges(all, shared.warps[warp]);
  set_ranges(ranges, all);
}

// Sum of squares in the order of cpu/row_norm.h, so that both devices give the
// same bits: 1024 interleaved partial sums, one for each of the eight columns of a thread.
struct SquareSums {
  float partial[kChunkColumns] = {};

  __device__ void add(int i, float x) { partial[i] = __fadd_rn(partial[i], __fmul_rn(x, x)); }

  // Folds the warp's 256 partial sums in half eight times. In the first three folds either half of
  // the lanes keeps half of the columns: 12 shuffles, not 8 x 5.
  __device__ float fold_warp() {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int kept = kChunkColumns / 2; kept > 0; kept /= 2) {
      const int distance = 4 * kept;
      const bool upper = lane & distance;
#pragma unroll
      for (int i = 0; i < kept; ++i) {
        const float mine = upper ? partial[i + kept] : partial[i];
        const float sent = upper ? partial[i] : partial[i + kept];
        partial[i] = __fadd_rn(mine, __shfl_xor_sync(~0u, sent, distance));
      }
    }
    float sum = partial[0];
#pragma unroll
    for (int distance : {2, 1, 16, 8, 4}) {
      sum = __fadd_rn(sum, __shfl_xor_sync(~0u, sum, distance));
    }
    return sum;
  }
};

static_assert(kRowThreads * kChunkColumns == 1024 && kRowWarps == 4, "the order of the sum");

struct SumExchange {
  float warps[kRowWarps];
};

// The caller puts a barrier between share_sum and shared_sum, and may exchange more across it.
__device__ inline void share_sum(SquareSums& sums, SumExchange& shared) {
  const float sum = sums.fold_warp();
  if (threadIdx.x % 32 == 0) shared.warps[threadIdx.x / 32] = sum;
}
__device__ inline float shared_sum(const SumExchange& shared) {
  return __fadd_rn(__fadd_rn(shared.warps[0], shared.warps[1]),
                   __fadd_rn(shared.warps[2], shared.warps[3]));
}

}  // namespace resq::cuda
