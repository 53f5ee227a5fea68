// mixed_gemm for many rows on sm_80, 86, 87 and 89, whose tensor cores multiply INT4.
//
// A block computes 128 output columns (two blocks of the packed weight, the A operand) x kRows
// activation rows (the B operand) in warps of 64 x 32. K is cut into units: 128 packed low columns,
// 64 low columns in containers, or 64 high columns; each is 64 bytes of an activation row. A ring
// of kStages units is filled by cp.async:
//
//   weights      the fragments as they lie in memory; a lane reads its 16 bytes with one LDS.128
//   activations  rows of 64 bytes, 16-byte chunks swizzled so that neither ldmatrix nor the 8-byte
//                loads of containers meet in a bank
//
// Both parts keep their own int32 sums, as the epilogue scales them apart: 128 registers, and
// the reason for warps of 64 x 32 (64 x 64 would need 256).
#pragma once

#include "cuda/copy_sm80.cuh"
#include "cuda/mma_sm80.cuh"
#include "ops/mixed_gemm/mixed_gemm_epilogue.cuh"
#include "ops/mixed_gemm/mixed_gemm_splits.cuh"

namespace resq::cuda::sm80 {

constexpr int kColumns = 128;                           // output columns of a block
constexpr int kWarpColumns = 64, kWarpRows = 32;        // of a warp
constexpr int kStrips = kWarpColumns / kCudaStripRows;  // fragments of A a step
constexpr int kRowTiles = kWarpRows / 8;                // fragments of B a step
constexpr int kUnitBytes = 64;                          // of an activation row
constexpr int kChunkBytes = 16, kChunks = kUnitBytes / kChunkBytes;
constexpr int kUnitSteps = 2;  // of the packed weight, at most
constexpr int kWeightBlocks = kColumns / kCudaBlockRows;
constexpr int kWeightBytes = kUnitSteps * kWeightBlocks * kCudaStepBytes;  // of a unit
constexpr int kTileStride = kColumns + 4;  // words; = 4 modulo 16: fragments do not meet in a bank
constexpr unsigned kRasterRows = 8;        // row tiles that neighbouring blocks share

template <int kRowsOfTile, bool kPackedActivations>
struct Config {
  static constexpr int kRows = kRowsOfTile;
  static constexpr bool kPacked = kPackedActivations;
  static constexpr int kLoSteps = kPacked ? 2 : 1;  // of the packed weight in a low unit
  static constexpr int kWarps = kRows / kWarpRows * (kColumns / kWarpColumns);
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kStages = kRows == 128 ? 5 : 4;
  static constexpr int kStageBytes = kWeightBytes + kRows * kUnitBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static constexpr int kMinBlocks = kRows == 128 ? 1 : 2;
  static_assert(kSharedBytes >= kRows * kTileStride * int{sizeof(float)}, "the output tile");
};

// Units of a call's K.
template <class C>
RESQ_HOST_DEVICE inline SplitK split_k(const MixedGemmParams& p, int splits) {
  return {static_cast<int>(ceil_div(cuda_lo_steps(p.k_lo), C::kLoSteps)),
          static_cast<int>(cuda_hi_steps(p.k_hi) / kUnitSteps), splits};
}

struct Place {
  int64_t row, column;  // first of the block's tile
  int warp_row, warp_column, lane;
};

using Accumulators = int32_t[kStrips][kRowTiles][4];

// Chunk c of a row of activations stands at chunk c ^ swizzle(row). Eight rows from an even one
// have the four keys twice, in both halves of the banks; so have rows 0 .. 3 for pairs of chunks.
__device__ __forceinline__ int swizzle(int row) { return (row & 2) | ((row >> 2) & 1); }

// Addresses of a thread's copies of one unit.
template <class C>
struct Loader {
  static constexpr int kRowsApart = C::kThreads / kChunks;  // of a thread's chunks
  static constexpr int kWeightCopies = kWeightBytes / kChunkBytes / C::kThreads;

  const MixedGemmParams& p;
  const Place& at;
  uint8_t* ring;
  int lo_units;

  __device__ __forceinline__ void load(int unit, int stage) const {
    uint8_t* to = ring + stage * C::kStageBytes;
    if (unit < lo_units) {
      const int steps = static_cast<int>(cuda_lo_steps(p.k_lo)) - unit * C::kLoSteps;
      load_weights(to, int64_t{unit} * C::kLoSteps * kCudaStepBytes, min(steps, C::kLoSteps));
      load_rows(to + kWeightBytes, static_cast<const uint8_t*>(p.q_lo),
                static_cast<int>(p.k_lo / (C::kPacked ? 2 : 1)), unit);
    } else {
      const int hi_unit = unit - lo_units;
      load_weights(to, cuda_block_lo_bytes(p.k_lo) + int64_t{hi_unit} * kUnitSteps * kCudaStepBytes,
                   kUnitSteps);
      load_rows(to + kWeightBytes, reinterpret_cast<const uint8_t*>(p.q_hi),
                static_cast<int>(p.k_hi), hi_unit);
    }
  }

  // [step][weight block][strip][lane][16]; steps and blocks outside the weight are zero.
  __device__ __forceinline__ void load_weights(uint8_t* to, int64_t offset, int steps) const {
    const int64_t block = at.column / kCudaBlockRows;
    const int64_t blocks = cuda_packed_blocks(p.n) - block;
    const int64_t block_bytes = cuda_block_bytes(p.k_lo, p.k_hi);
    const uint8_t* from = p.packed_weight + block * block_bytes + offset;
#pragma unroll
    for (int i = 0; i < kWeightCopies; ++i) {
      const int byte = (i * C::kThreads + threadIdx.x) * kChunkBytes;
      const int step = byte / (kWeightBlocks * kCudaStepBytes);
      const int b = byte / kCudaStepBytes % kWeightBlocks;
      const bool inside = step < steps && b < blocks;
      const uint8_t* source =
          from + b * block_bytes + step * kCudaStepBytes + byte % kCudaStepBytes;
      copy_async_16(to + byte, inside ? source : p.packed_weight, inside);
    }
  }

  // [row][chunk]; rows and columns outside are zero. row_bytes is a multiple of 16.
  __device__ __forceinline__ void load_rows(uint8_t* to, const uint8_t* from, int row_bytes,
                                            int unit) const {
    const int chunk = threadIdx.x % kChunks, byte = unit * kUnitBytes + chunk * kChunkBytes;
#pragma unroll
    for (int i = 0; i < C::kRows / kRowsApart; ++i) {
      const int row = i * kRowsApart + threadIdx.x / kChunks;
      const bool inside = byte < row_bytes && at.row + row < p.rows;
      copy_async_16(to + row * kUnitBytes + (chunk ^ swizzle(row)) * kChunkBytes,
                    inside ? from + (at.row + row) * row_bytes + byte : from, inside);
    }
  }
};

// The A fragments of one step.
__device__ __forceinline__ void load_weight_fragments(uint4 (&a)[kStrips], const uint8_t* stage,
                                                      int step, const Place& at) {
  const uint8_t* block =
      stage + (step * kWeightBlocks + at.warp_column) * kCudaStepBytes + at.lane * 16;
#pragma unroll
  for (int s = 0; s < kStrips; ++s) {
    a[s] = *reinterpret_cast<const uint4*>(block + s * kCudaFragmentBytes);
  }
}

// One step of 32 bytes of a row: 64 packed low columns or 32 high ones.
template <bool kInt4>
__device__ __forceinline__ void multiply_step(Accumulators& acc, const uint8_t* stage, int step,
                                              const Place& at) {
  uint4 a[kStrips];
  uint32_t b[kRowTiles / 2][4];  // two row tiles: both registers of the first, then the second
  load_weight_fragments(a, stage, step, at);
#pragma unroll
  for (int pair = 0; pair < kRowTiles / 2; ++pair) {
    const int row = at.warp_row * kWarpRows + (2 * pair + at.lane / 16) * 8 + at.lane % 8;
    const int chunk = 2 * step + at.lane / 8 % 2;
    load_matrices(b[pair], stage + kWeightBytes + row * kUnitBytes +
                               (chunk ^ swizzle(at.lane % 8)) * kChunkBytes);
  }
#pragma unroll
  for (int s = 0; s < kStrips; ++s) {
    const uint32_t words[4] = {a[s].x, a[s].y, a[s].z, a[s].w};
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) {
      const uint32_t (&pair)[4] = b[tile / 2];
      if constexpr (kInt4) {
        mma_s4(acc[s][tile], words, pair[tile % 2 * 2], pair[tile % 2 * 2 + 1]);
      } else {
        mma_s8(acc[s][tile], words, pair[tile % 2 * 2], pair[tile % 2 * 2 + 1]);
      }
    }
  }
}

// 64 low columns in containers: the weight's nibbles become bytes, 16 times the codes, even columns
// before odd ones; so do the activations' bytes.
__device__ __forceinline__ void multiply_containers(Accumulators& acc, const uint8_t* stage,
                                                    const Place& at) {
  uint4 a[kStrips];
  load_weight_fragments(a, stage, 0, at);
  const int g = at.lane / 4, i = at.lane % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {  // 32 columns
    uint32_t even[kRowTiles], odd[kRowTiles];
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) {
      const int row = at.warp_row * kWarpRows + tile * 8 + g;
      const uint2 codes = *reinterpret_cast<const uint2*>(
          stage + kWeightBytes + row * kUnitBytes +
          ((2 * half + i / 2) ^ swizzle(g)) * kChunkBytes + i % 2 * 8);
      even[tile] = __byte_perm(codes.x, codes.y, 0x6420);
      odd[tile] = __byte_perm(codes.x, codes.y, 0x7531);
    }
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
      const uint32_t row_g = half ? a[s].z : a[s].x, row_g8 = half ? a[s].w : a[s].y;
      const uint32_t words[4] = {low_nibbles_x16(row_g), low_nibbles_x16(row_g8),
                                 high_nibbles_x16(row_g), high_nibbles_x16(row_g8)};
#pragma unroll
      for (int tile = 0; tile < kRowTiles; ++tile) {
        mma_s8(acc[s][tile], words, even[tile], odd[tile]);
      }
    }
  }
}

// Puts `value(strip, tile, r)` of every accumulator at its row and column of the shared tile.
template <class Value>
__device__ __forceinline__ void stage_tile(uint8_t* shared, const Place& at, const Value& value) {
  auto* tile = reinterpret_cast<uint32_t*>(shared);
#pragma unroll
  for (int s = 0; s < kStrips; ++s) {
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int row = at.warp_row * kWarpRows + 8 * t + 2 * (at.lane % 4) + r % 2;
        const int column = at.warp_column * kWarpColumns + 16 * s + at.lane / 4 + 8 * (r / 2);
        tile[row * kTileStride + column] = value(s, t, r);
      }
    }
  }
}

// Calls write(row of the matrix, column, shared words) for groups of eight columns of the tile.
template <class C, class Write>
__device__ __forceinline__ void write_groups(const MixedGemmParams& p, const uint8_t* shared,
                                             const Place& at, const Write& write) {
  constexpr int kGroups = kColumns / kOutputGroup;
  for (int i = threadIdx.x; i < C::kRows * kGroups; i += C::kThreads) {
    const int row = i / kGroups, column = i % kGroups * kOutputGroup;
    if (at.row + row >= p.rows || at.column + column >= p.n) continue;
    write(at.row + row, at.column + column,
          reinterpret_cast<const int32_t*>(shared) + row * kTileStride + column);
  }
}

template <class C>
__device__ __forceinline__ void write_output(const MixedGemmParams& p, uint8_t* shared,
                                             const Place& at, const Accumulators& lo,
                                             const Accumulators& hi) {
  const OutputTerms terms = output_terms(p);
  OutputRow rows[kRowTiles][2];
#pragma unroll
  for (int t = 0; t < kRowTiles; ++t) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = at.warp_row * kWarpRows + 8 * t + 2 * (at.lane % 4) + r;
      rows[t][r] = load_output_row(p, at.row + row);
    }
  }
  OutputColumn columns[kStrips][2];
#pragma unroll
  for (int s = 0; s < kStrips; ++s) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int column = at.warp_column * kWarpColumns + 16 * s + at.lane / 4 + 8 * r;
      columns[s][r] = load_output_column(p, at.column + column);
    }
  }
  constexpr int kShift = C::kPacked ? 0 : 4;
  stage_tile(shared, at, [&](int s, int t, int r) {
    return __float_as_uint(
        output_value(lo[s][t][r] >> kShift, hi[s][t][r], rows[t][r % 2], columns[s][r / 2], terms));
  });
  __syncthreads();
  write_groups<C>(p, shared, at, [&](int64_t m, int64_t n, const int32_t* from) {
    const SumGroup group = load_sums(from);
    float y[kOutputGroup];
#pragma unroll
    for (int j = 0; j < kOutputGroup; ++j) y[j] = __int_as_float(group.sum[j]);
    store_output_group(p, m, n, y);
  });
}

template <class C>
__device__ __forceinline__ void write_planes(const MixedGemmParams& p, const SplitK& k,
                                             const SplitPlanes& planes, int split, uint8_t* shared,
                                             const Place& at, const Accumulators& lo,
                                             const Accumulators& hi) {
  if (k.has_lo(split)) {
    constexpr int kShift = C::kPacked ? 0 : 4;
    stage_tile(shared, at, [&](int s, int t, int r) { return lo[s][t][r] >> kShift; });
    __syncthreads();
    write_groups<C>(p, shared, at, [&](int64_t m, int64_t n, const int32_t* from) {
      store_sums(planes.lo(split, m, n), load_sums(from));
    });
    __syncthreads();
  }
  if (k.has_hi(split)) {
    stage_tile(shared, at, [&](int s, int t, int r) { return hi[s][t][r]; });
    __syncthreads();
    write_groups<C>(p, shared, at, [&](int64_t m, int64_t n, const int32_t* from) {
      store_sums(planes.hi(split, m, n), load_sums(from));
    });
  }
}

// Tiles in an order in which the blocks that run at once share rows and columns in the L2 cache.
template <class C>
__device__ __forceinline__ Place place_of_block(const MixedGemmParams& p) {
  const auto row_tiles = static_cast<unsigned>(ceil_div(p.rows, C::kRows));
  const auto column_tiles = static_cast<unsigned>(ceil_div(p.n, kColumns));
  const unsigned per_group = kRasterRows * column_tiles, group = blockIdx.x / per_group;
  const unsigned first = group * kRasterRows, size = min(kRasterRows, row_tiles - first);
  const unsigned index = blockIdx.x % per_group;
  const int warp = threadIdx.x / 32;
  return {.row = int64_t{first + index % size} * C::kRows,
          .column = int64_t{index / size} * kColumns,
          .warp_row = warp / 2,
          .warp_column = warp % 2,
          .lane = static_cast<int>(threadIdx.x % 32)};
}

}  // namespace resq::cuda::sm80

namespace resq::cuda {

// Block (tile, split).
template <int kRows, bool kPacked>
__global__ void __launch_bounds__(sm80::Config<kRows, kPacked>::kThreads,
                                  sm80::Config<kRows, kPacked>::kMinBlocks)
    mixed_gemm_sm80_kernel(const __grid_constant__ MixedGemmParams p, const SplitK k,
                           const SplitPlanes planes) {
  using namespace sm80;
  using C = Config<kRows, kPacked>;
  extern __shared__ __align__(128) uint8_t shared[];
  const Place at = place_of_block<C>(p);
  const int split = blockIdx.y, first = k.begin(split), last = k.begin(split + 1);
  const Loader<C> loader{p, at, shared, k.lo_units};
  Accumulators lo = {}, hi = {};

  // Every iteration commits a group, empty or not, so that the number on the way is the same.
  const auto fetch = [&](int unit) {
    if (unit < last) loader.load(unit, (unit - first) % C::kStages);
    commit_copies();
  };
  const auto next_stage = [&](int unit) {
    wait_copies<C::kStages - 2>();
    __syncthreads();  // all have the unit's bytes, and none reads those that fetch overwrites
    fetch(unit + C::kStages - 1);
    return shared + (unit - first) % C::kStages * C::kStageBytes;
  };

#pragma unroll
  for (int i = 0; i < C::kStages - 1; ++i) fetch(first + i);
  int unit = first;
  for (; unit < min(last, k.lo_units); ++unit) {
    const uint8_t* stage = next_stage(unit);
    if constexpr (kPacked) {
      multiply_step<true>(lo, stage, 0, at);
      multiply_step<true>(lo, stage, 1, at);
    } else {
      multiply_containers(lo, stage, at);
    }
  }
  for (; unit < last; ++unit) {
    const uint8_t* stage = next_stage(unit);
    multiply_step<false>(hi, stage, 0, at);
    multiply_step<false>(hi, stage, 1, at);
  }
  wait_copies<0>();
  __syncthreads();
  if (k.splits > 1) {
    write_planes<C>(p, k, planes, split, shared, at, lo, hi);
  } else {
    write_output<C>(p, shared, at, lo, hi);
  }
}

}  // namespace resq::cuda
