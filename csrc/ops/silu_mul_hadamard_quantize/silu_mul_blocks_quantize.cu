// silu_mul_hadamard_quantize in blocks, or without a transform: a block of columns is in the
// registers of a warp, and the threads of a row exchange only its ranges. Of few rows each is the
// work of a cluster: one multiprocessor would need 5 us for 14336 columns.
#include <algorithm>

#include "cuda/cluster.cuh"
#include "cuda/launch.h"
#include "cuda/pdl.cuh"
#include "cuda/row_hadamard.cuh"
#include "cuda/row_launch.cuh"
#include "ops/silu_mul_hadamard_quantize/products.cuh"

namespace resq::cuda {
namespace {

// Of a block at most, in which 128 registers hold eight runs a thread.
constexpr int kMostThreads = 512, kMostWarps = kMostThreads / 32;

// Blocks of threads that share a row, at most: larger clusters are not portable. Each gets as many
// runs as two warps a scheduler have, which overlap; a third one would wait for their issue slots.
constexpr int kMostParts = 8, kPartRuns = 256;

// The Hadamard transform, unscaled, of blocks of `block` columns of the warp's 256, eight in each
// lane: the additions of csrc/cpu/row_hadamard.h. Lanes that are not `low` keep their columns.
__device__ inline void transform_blocks(int block, bool low, float (&x)[8]) {
  if (block == 1) return;
  if (low) butterflies(x);
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    if (8 * distance >= block) break;
    // One instruction for the sum of a lower lane, the difference of an upper one, and x itself:
    // x * 0 + x, or NaN for infinity, which is quantized as NaN is.
    const int from = low ? lane ^ distance : lane;
    const float sign = !low ? 0.0f : (lane & distance) ? -1.0f : 1.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = __fmaf_rn(x[i], sign, __shfl_sync(~0u, x[i], from));
  }
}

// The products of a part of a row as they are quantized: runs [first, end), of which those from
// runs on are beyond the row. Whole warps, as all lanes compute together.
template <class T, bool kAligned>
struct PartProducts {
  using Fetched = typename Products<T, kAligned>::Fetched;

  Products<T, kAligned> products;
  int k_lo, block, runs, first, end;

  __device__ PartProducts(const SiluMulHadamardQuantizeParams& p, int64_t row, int part_runs)
      : products(p, row),
        k_lo(static_cast<int>(p.out.k_lo)),
        block(static_cast<int>(p.block)),
        runs((products.n + 7) / 8),
        first(static_cast<int>(cluster_rank()) * part_runs),
        end(min(first + part_runs, (runs + 31) / 32 * 32)) {}

  // This thread's runs are run(0), run(1), ...
  __device__ int run(int i) const { return first + static_cast<int>(threadIdx.x + i * blockDim.x); }
  __device__ Fetched fetch(int run) const { return run < end ? products.fetch(run) : Fetched{}; }
  // For all lanes of a warp together. Runs of both parts are only in rows without blocks.
  __device__ void values(const Fetched& fetched, int run, float (&x)[8]) const {
    const bool low = 8 * run < k_lo;
    products.values(fetched, low ? products.scale : 1.0f, x);
    transform_blocks(block, low, x);
  }
};

// The runs of a thread, first as they lie in memory, then their values: eight registers each.
template <class T, int kHeld>
class HeldRuns {
 public:
  __device__ explicit HeldRuns(const PartProducts<T, true>& products) : products_(products) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const auto fetched = products.fetch(products.run(i));
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        words_[i][w] = fetched.gate.words[w];
        words_[i][w + 4] = fetched.up.words[w];
      }
    }
    // The runs move through the registers and are back in the end: the code of several runs would
    // not be in the instruction cache when a row arrives.
#pragma unroll 1
    for (int i = 0; i < kHeld; ++i) {
      const int run = products.run(i);
      float x[8] = {};
      if (run < products.end) {
        typename PartProducts<T, true>::Fetched fetched;
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          fetched.gate.words[w] = words_[0][w];
          fetched.up.words[w] = words_[0][w + 4];
        }
        products.values(fetched, run, x);
      }
#pragma unroll
      for (int w = 0; w < 8; ++w) {
#pragma unroll
        for (int slot = 1; slot < kHeld; ++slot) words_[slot - 1][w] = words_[slot][w];
        words_[kHeld - 1][w] = __float_as_uint(x[w]);
      }
    }
  }

  template <class Use>
  __device__ void for_each(Use use) const {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int run = products_.run(i);
      if (run >= min(products_.end, products_.runs)) break;
      float x[8];
#pragma unroll
      for (int w = 0; w < 8; ++w) x[w] = __uint_as_float(words_[i][w]);
      use(run, x);
    }
  }

 private:
  const PartProducts<T, true>& products_;
  uint32_t words_[kHeld][8];
};

// Computed at every use.
template <class T, bool kAligned>
class ComputedRuns {
 public:
  __device__ explicit ComputedRuns(const PartProducts<T, kAligned>& products)
      : products_(products) {}

  template <class Use>
  __device__ void for_each(Use use) const {
#pragma unroll 1
    for (int run = products_.run(0); run < products_.end; run += blockDim.x) {
      float x[8];
      products_.values(products_.fetch(run), run, x);
      if (run < products_.runs) use(run, x);
    }
  }

 private:
  const PartProducts<T, kAligned>& products_;
};

struct PartsExchange {
  int4 warps[kMostParts * kMostWarps];  // of all parts of the row
};

// Gives every thread the ranges of the row. If it has several parts, their threads have arrived at
// the cluster's barrier: before that a block may not have started, and have no shared memory.
__device__ inline void reduce_parts(Range (&ranges)[2], PartsExchange& exchange) {
  const int lane = threadIdx.x % 32, warps = static_cast<int>(blockDim.x / 32);
  const int parts = static_cast<int>(cluster_blocks());
  const int4 mine = reduce_warp(ordered_ranges(ranges));
  int4& place = exchange.warps[cluster_rank() * warps + threadIdx.x / 32];
  int4 all = {};
  if (parts > 1) {
    cluster_wait();
    if (lane < parts) store_to_block(&place, mine, lane);
    cluster_arrive();
    cluster_wait();
#pragma unroll 1
    for (int i = lane; i < parts * warps; i += 32) {
      all = merged_ranges(all, load_stored(&exchange.warps[i]));
    }
  } else {
    if (lane == 0) place = mine;
    __syncthreads();
    if (lane < warps) all = exchange.warps[lane];
  }
  set_ranges(ranges, reduce_warp(all));
}

// part_runs: of a block, a multiple of 32. The blocks of a cluster share a row. kHeld: the runs
// that a thread holds at most; longer rows, rows of runs that are not aligned, and all of float32,
// in which models are only compared, are computed twice (0).
template <class T, int kHeld>
__global__ void __launch_bounds__(kMostThreads, 1)
    silu_mul_blocks_quantize_kernel(const __grid_constant__ SiluMulHadamardQuantizeParams p,
                                    const int part_runs) {
  __shared__ PartsExchange exchange;
  const unsigned parts = cluster_blocks();  // a power of two
  const int64_t row = blockIdx.x >> (__ffs(parts) - 1);
  if (parts > 1) cluster_arrive_relaxed();
  pdl_trigger();
  pdl_wait();
  const auto quantize = [&]<bool kAlways>(const auto& values) {
    quantize_runs<kAlways>(
        p.out, row, [&](auto use) { values.for_each(use); },
        [&](Range(&ranges)[2]) { reduce_parts(ranges, exchange); },
        cluster_rank() == 0 && threadIdx.x == 0);
  };
  if constexpr (kHeld > 0) {
    const PartProducts<T, true> products(p, row, part_runs);
    quantize.template operator()<true>(HeldRuns<T, kHeld>(products));
  } else if (p.n % 8 == 0) {
    const PartProducts<T, true> products(p, row, part_runs);
    quantize.template operator()<false>(ComputedRuns<T, true>(products));
  } else {
    const PartProducts<T, false> products(p, row, part_runs);
    quantize.template operator()<false>(ComputedRuns<T, false>(products));
  }
}

// A power of two, so that each part of a row gets a multiprocessor.
int parts_of(int64_t rows, int runs, const Device& device) {
  int parts = 1;
  while (parts < kMostParts && runs > parts * kPartRuns && 2 * parts * rows <= device.sms) {
    parts *= 2;
  }
  return parts;
}

// Of a block. What a thread does once, the ranges and scales, takes as many instructions as a run:
// up to four runs a thread are faster with half as many threads (8192 columns in one block: 5,819
// cycles instead of 6,728), but not two runs (4096: 3,758 and 3,276).
int threads_of(int part_runs) {
  constexpr int kHalf = kMostThreads / 2;
  if (part_runs > kMostThreads && part_runs <= 4 * kHalf) return kHalf;
  return std::min(kMostThreads, part_runs);
}

}  // namespace

void silu_mul_blocks_quantize(const SiluMulHadamardQuantizeParams& p, const Device& device,
                              Stream stream) {
  const int runs = static_cast<int>(align_up(std::max(p.n, int64_t{1}), 256) / 8);  // whole warps
  const bool clusters = current_family(device) == Family::kSm90 && kernels_wait(stream.device);
  const int parts = clusters ? parts_of(p.rows, runs, device) : 1;
  const int part_runs = static_cast<int>(align_up(ceil_div(runs, parts), 32));
  const int threads = threads_of(part_runs);
  const auto launch = [&](auto* kernel) {
    launch_pdl("silu_mul_hadamard_quantize", kernel,
               {.x = static_cast<unsigned>(p.rows * parts),
                .threads = static_cast<unsigned>(threads),
                .cluster = static_cast<unsigned>(parts)},
               stream, p, part_runs);
  };
  const int64_t held = ceil_div(part_runs, threads);
  with_type(p.type, [&](auto number) {
    using T = decltype(number);
    if constexpr (sizeof(T) == 2) {
      if (chunks_aligned(p.out, {p.gate_up})) {
        if (held == 1) return launch(silu_mul_blocks_quantize_kernel<T, 1>);
        if (held <= 4) return launch(silu_mul_blocks_quantize_kernel<T, 4>);
        if (held <= 8) return launch(silu_mul_blocks_quantize_kernel<T, 8>);
      }
    }
    launch(silu_mul_blocks_quantize_kernel<T, 0>);
  });
}

}  // namespace resq::cuda
