// mixed_gemm for few rows, on every architecture from sm_80: the bytes of the weight decide the
// time, so they go straight from memory to registers, in the order in which the tensor cores take
// them as the A operand of mma.m16n8k32.s8. The activation rows are its eight columns.
//
// A block owns 64 output columns, kRows activation rows and a range of K steps. Its eight warps are
// four groups along K times two pairs of 16-column strips. For each chunk of K
//
//   fetch_activations   the rows' codes of the next chunk, memory -> registers
//   multiply            the weights at hand times the activations in shared memory
//   fetch_weights       into the registers just read, kDepth chunks ahead
//   store_activations   registers -> the other half of shared memory, decoded, as B fragments
//
// A nibble is used as 16 times its code: one AND, no sign extension. With packed activations the
// sums are 256 times the exact ones, and |sum| <= 256 * 8 * 8 * K = 2^14 K, as for containers
// (16 * 8 * 128 K) and the high part (128 * 128 K): 2^30 at K = 65536. Shifting back is exact.
#pragma once

#include <type_traits>

#include "cuda/copy_sm80.cuh"
#include "cuda/mma_sm80.cuh"
#include "cuda/pdl.cuh"
#include "ops/mixed_gemm/mixed_gemm_epilogue.cuh"
#include "ops/mixed_gemm/mixed_gemm_splits.cuh"

namespace resq::cuda::small_batch {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kGroups = 4;          // of warps, along K
constexpr int kStrips = 2;          // of a warp
constexpr int kSumStride = 64 + 4;  // words; = 4 modulo 16, so that fragments do not clash
constexpr int kStepVectors = kCudaStepBytes / sizeof(uint4);
constexpr int kPieceCodes = 8;  // of a row that a thread fetches at once

// kSteps: steps of a group in a chunk; kDepth: chunks of weights in flight. A lane has six or eight
// 16-byte loads on the way: 24 to 96 KB of an SM, where 4.3 TB/s x 0.8 us / 132 SMs need 26 KB.
// Two blocks of 64 rows on an SM would spill.
template <CudaLayout kLayoutOfWeight, int kRowsOfTile, bool kPackedActivations>
struct Config {
  static constexpr CudaLayout kLayout = kLayoutOfWeight;
  static constexpr bool kPacked = kPackedActivations;
  static constexpr int kRows = kRowsOfTile, kRowTiles = kRows / 8;
  static constexpr int kSteps = kRows <= 16 ? 2 : 1;
  static constexpr int kDepth = kRows <= 16 ? 2 : kRows <= 32 ? 3 : 4;
  static constexpr int kChunkSteps = kGroups * kSteps;
  static constexpr int kMinBlocks = kRows <= 8 ? 3 : kRows <= 32 ? 2 : 1;
  static constexpr int kBufferBytes = kChunkSteps * kCudaLoStepColumns * kRows;
  static constexpr int kSumWords = kRows * kSumStride;
};

// One part of K: what differs between low and high steps.
template <class C, bool kIsHigh>
struct Part {
  static constexpr bool kHigh = kIsHigh, kNibbles = !kHigh && C::kPacked;
  static constexpr bool kEvenOdd = !kHigh && C::kLayout == CudaLayout::kMma;
  static constexpr int kBits = kNibbles ? 4 : 8;
  static constexpr int kColumns = kHigh ? kCudaHiStepColumns : kCudaLoStepColumns;
  static constexpr int kPiecesPerRow = kColumns / kPieceCodes;  // and step
  static constexpr int kRowsPerUnit = 32 / kPiecesPerRow;       // a warp fetches a unit at once
  static constexpr int kWarpsPerStep = kWarps / C::kChunkSteps;
  static constexpr int kUnits = C::kRows / kRowsPerUnit / kWarpsPerStep;  // of a warp in a chunk
  static constexpr int kLaneBytes = kColumns / 4;  // of a B fragment: a row's codes of a lane
  static constexpr int kFragmentBytes = 32 * kLaneBytes;  // one step, eight rows

  const uint8_t* rows;  // codes
  int k;                // a multiple of 8
};

// A low fragment times the B fragment of 64 columns: two MMAs of 32 columns. In kMma a word is
// eight columns of a row: even ones (low nibbles), then odd ones. In kWgmma it is four columns of
// rows g (high nibbles) and g + 8.
template <CudaLayout kLayout>
__device__ __forceinline__ void multiply_lo(int32_t (&d)[4], const uint4& w, const uint4& b) {
  const uint32_t low[4] = {low_nibbles_x16(w.x), low_nibbles_x16(w.y), low_nibbles_x16(w.z),
                           low_nibbles_x16(w.w)};
  const uint32_t high[4] = {high_nibbles_x16(w.x), high_nibbles_x16(w.y), high_nibbles_x16(w.z),
                            high_nibbles_x16(w.w)};
  if constexpr (kLayout == CudaLayout::kMma) {
    mma_s8(d, {low[0], low[1], high[0], high[1]}, b.x, b.y);
    mma_s8(d, {low[2], low[3], high[2], high[3]}, b.z, b.w);
  } else {
    mma_s8(d, {high[0], low[0], high[1], low[1]}, b.x, b.y);
    mma_s8(d, {high[2], low[2], high[3], low[3]}, b.z, b.w);
  }
}

// The codes of one lane of a B fragment for one MMA, 32 columns: eight neighbours if the layout
// splits them into even and odd ones, else four and, 16 columns on, four. `from` is at the first,
// `left` columns before the end of the row; codes past it are zero. No __ldg: the kernel before may
// write the codes while this one runs already (pdl.cuh).
template <class P>
__device__ __forceinline__ uint2 fetch_piece(const uint8_t* from, int left) {
  using Half = std::conditional_t<P::kNibbles, uint16_t, uint32_t>;
  using Whole = std::conditional_t<P::kNibbles, uint32_t, uint2>;
  if constexpr (P::kEvenOdd) {
    const Whole v = left > 0 ? *reinterpret_cast<const Whole*>(from) : Whole{};
    if constexpr (P::kNibbles) {
      return {v, 0};
    } else {
      return v;
    }
  } else {
    constexpr int kApart = 16 * P::kBits / 8;
    const uint32_t x = left > 0 ? *reinterpret_cast<const Half*>(from) : Half{0};
    const uint32_t y = left > 16 ? *reinterpret_cast<const Half*>(from + kApart) : Half{0};
    if constexpr (P::kNibbles) {
      return {x | y << 16, 0};
    } else {
      return {x, y};
    }
  }
}

// A piece as the two words of the MMA's B operand; nibbles as 16 times their codes.
template <class P>
__device__ __forceinline__ uint2 decode_piece(const uint2& piece) {
  if constexpr (P::kNibbles) {
    const uint32_t even = low_nibbles_x16(piece.x), odd = high_nibbles_x16(piece.x);
    if constexpr (P::kEvenOdd) return {even, odd};
    return {__byte_perm(even, odd, 0x5140), __byte_perm(even, odd, 0x7362)};
  } else if constexpr (P::kEvenOdd) {
    return {__byte_perm(piece.x, piece.y, 0x6420), __byte_perm(piece.x, piece.y, 0x7531)};
  } else {
    return piece;
  }
}

// What a thread is and where its block works.
struct Place {
  int warp, lane, group, strips;  // first of the warp's strips
  int64_t row;                    // first activation row of the tile
  int rows;                       // of the tile
};

// Steps first .. last - 1 of one part; adds the exact sums to `sums` [kRows][kSumStride].
template <class C, class P>
__device__ __forceinline__ void run_part(const P& part, const uint8_t* weight, int first, int last,
                                         const Place& at, uint8_t* buffers, int32_t* sums) {
  constexpr int kDepth = C::kDepth, kSteps = C::kSteps;
  const int chunks = (last - first + C::kChunkSteps - 1) / C::kChunkSteps;
  uint4 weights[kDepth][kSteps][kStrips];
  uint2 pieces[P::kUnits];
  int32_t acc[kStrips][C::kRowTiles][4] = {};

  const auto step_of = [&](int chunk, int s) {
    return first + chunk * C::kChunkSteps + at.group * kSteps + s;
  };
  const auto* next_weights =
      reinterpret_cast<const uint4*>(weight + int64_t{step_of(0, 0)} * kCudaStepBytes +
                                     at.strips * kCudaFragmentBytes) +
      at.lane;
  const auto fetch_weights = [&](int chunk, uint4(&to)[kSteps][kStrips]) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      if (step_of(chunk, s) >= last) continue;
#pragma unroll
      for (int strip = 0; strip < kStrips; ++strip) {
        to[s][strip] = load_streaming(next_weights + (s * kStepVectors + strip * 32));
      }
    }
    next_weights += C::kChunkSteps * kStepVectors;
  };

  // A warp fetches kUnits times one step of some rows, a lane a piece: whole sectors of the rows.
  const int step = at.warp % C::kChunkSteps, piece = at.lane % P::kPiecesPerRow;
  const int row = at.warp / C::kChunkSteps * P::kRowsPerUnit + at.lane / P::kPiecesPerRow;
  constexpr int kRowsApart = P::kWarpsPerStep * P::kRowsPerUnit;  // of a lane's pieces
  const auto row_bytes = static_cast<uint32_t>(part.k * P::kBits / 8);
  int column = (first + step) * P::kColumns + piece / 4 * 32 + piece % 4 * (P::kEvenOdd ? 8 : 4);
  const uint8_t* next_codes = part.rows + (at.row + row) * row_bytes + column * P::kBits / 8;
  const auto fetch_activations = [&] {
#pragma unroll
    for (int u = 0; u < P::kUnits; ++u) {
      const uint8_t* from = next_codes + static_cast<uint32_t>(u * kRowsApart) * row_bytes;
      pieces[u] = fetch_piece<P>(from, row + u * kRowsApart < at.rows ? part.k - column : 0);
    }
    column += C::kChunkSteps * P::kColumns;
    next_codes += C::kChunkSteps * P::kColumns * P::kBits / 8;
  };
  const auto store_activations = [&](uint8_t* buffer) {
    uint8_t* fragments = buffer + step * C::kRowTiles * P::kFragmentBytes + 8 * (piece / 4);
#pragma unroll
    for (int u = 0; u < P::kUnits; ++u) {
      const int to = row + u * kRowsApart, lane = 4 * (to % 8) + piece % 4;
      *reinterpret_cast<uint2*>(fragments + to / 8 * P::kFragmentBytes + lane * P::kLaneBytes) =
          decode_piece<P>(pieces[u]);
    }
  };
  const auto multiply = [&](int chunk, const uint8_t* buffer, const uint4(&from)[kSteps][kStrips]) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      if (step_of(chunk, s) >= last) continue;
      const uint8_t* fragments = buffer +
                                 (at.group * kSteps + s) * C::kRowTiles * P::kFragmentBytes +
                                 at.lane * P::kLaneBytes;
#pragma unroll
      for (int tile = 0; tile < C::kRowTiles; ++tile) {
        const uint8_t* b = fragments + tile * P::kFragmentBytes;
        if constexpr (P::kHigh) {
          const uint2 v = *reinterpret_cast<const uint2*>(b);
#pragma unroll
          for (int strip = 0; strip < kStrips; ++strip) {
            const uint4& w = from[s][strip];
            mma_s8(acc[strip][tile], {w.x, w.y, w.z, w.w}, v.x, v.y);
          }
        } else {
          const uint4 v = *reinterpret_cast<const uint4*>(b);
#pragma unroll
          for (int strip = 0; strip < kStrips; ++strip) {
            multiply_lo<C::kLayout>(acc[strip][tile], from[s][strip], v);
          }
        }
      }
    }
  };
  // Accumulator r: column 16 strip + g + 8 (r / 2), row 8 tile + 2 i + r % 2, lane = 4 g + i.
  const auto add_sums = [&] {
    const int shift = P::kHigh ? 0 : P::kNibbles ? 8 : 4;
#pragma unroll
    for (int tile = 0; tile < C::kRowTiles; ++tile) {
#pragma unroll
      for (int strip = 0; strip < kStrips; ++strip) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int column = 16 * (at.strips + strip) + at.lane / 4 + 8 * (r / 2);
          const int row = 8 * tile + 2 * (at.lane % 4) + r % 2;
          atomicAdd(sums + row * kSumStride + column, acc[strip][tile][r] >> shift);
        }
      }
    }
  };

#pragma unroll
  for (int d = 0; d < kDepth; ++d) fetch_weights(d, weights[d]);
  fetch_activations();
  store_activations(buffers);
  __syncthreads();
  for (int base = 0; base < chunks; base += kDepth) {
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      const int chunk = base + d;
      if (chunk >= chunks) break;
      fetch_activations();
      multiply(chunk, buffers + chunk % 2 * C::kBufferBytes, weights[d]);
      fetch_weights(chunk + kDepth, weights[d]);
      store_activations(buffers + (chunk + 1) % 2 * C::kBufferBytes);
      __syncthreads();
    }
  }
  add_sums();
}

// Eight columns of one row for each thread: the output, or this split's planes.
template <class C>
__device__ __forceinline__ void write_tile(const MixedGemmParams& p, const SplitK& k,
                                           const SplitPlanes& planes, int split, int64_t column,
                                           const Place& at, const int32_t* sums_lo,
                                           const int32_t* sums_hi) {
  const OutputTerms terms = output_terms(p);
  for (int i = threadIdx.x; i < C::kRows * 8; i += kThreads) {
    const int row = i / 8, group = i % 8 * kOutputGroup;
    if (row >= at.rows) return;
    const int64_t m = at.row + row, n = column + group;
    const SumGroup lo = load_sums(sums_lo + row * kSumStride + group);
    const SumGroup hi = load_sums(sums_hi + row * kSumStride + group);
    if (k.splits > 1) {
      if (k.has_lo(split)) store_sums(planes.lo(split, m, n), lo);
      if (k.has_hi(split)) store_sums(planes.hi(split, m, n), hi);
      continue;
    }
    const OutputRow output_row = load_output_row(p, m);
    float y[kOutputGroup];
#pragma unroll
    for (int j = 0; j < kOutputGroup; ++j) {
      y[j] = output_value(lo.sum[j], hi.sum[j], output_row, load_output_column(p, n + j), terms);
    }
    store_output_group(p, m, n, y);
  }
}

}  // namespace resq::cuda::small_batch

namespace resq::cuda {

// Block (tile, split); tiles of the same weight rows are neighbours, so that they share its bytes.
template <CudaLayout kLayout, int kRows, bool kPacked>
__global__ void __launch_bounds__(small_batch::kThreads,
                                  small_batch::Config<kLayout, kRows, kPacked>::kMinBlocks)
    mixed_gemm_small_batch_kernel(const __grid_constant__ MixedGemmParams p, const SplitK k,
                                  const SplitPlanes planes, unsigned row_tiles) {
  using namespace small_batch;
  using C = Config<kLayout, kRows, kPacked>;
  extern __shared__ __align__(16) uint8_t shared[];
  uint8_t* buffers = shared;
  auto* sums_lo = reinterpret_cast<int32_t*>(shared + 2 * C::kBufferBytes);
  int32_t* sums_hi = sums_lo + C::kSumWords;

  const unsigned block = blockIdx.x / row_tiles, tile = blockIdx.x % row_tiles;
  const int split = blockIdx.y, first = k.begin(split), last = k.begin(split + 1);
  const int warp = threadIdx.x / 32;
  const Place at{
      .warp = warp,
      .lane = static_cast<int>(threadIdx.x % 32),
      .group = warp / 2,
      .strips = warp % 2 * kStrips,
      .row = int64_t{tile} * C::kRows,
      .rows = static_cast<int>(min(p.rows - int64_t{tile} * C::kRows, int64_t{C::kRows}))};
  const uint8_t* weight = p.packed_weight + int64_t{block} * cuda_block_bytes(p.k_lo, p.k_hi);

  const uint8_t* weight_hi = weight + cuda_block_lo_bytes(p.k_lo);
  const auto prefetch = [&](const uint8_t* from, int steps) {
    const int ahead = min(steps, C::kDepth * C::kChunkSteps) * static_cast<int>(kCudaStepBytes);
    for (int i = threadIdx.x * 128; i < ahead; i += kThreads * 128) prefetch_line(from + i);
  };
  // Weights are on their way while the kernel before still makes the activations: into the
  // second-level cache, because a register could hold what that kernel has yet to write.
  if constexpr (kLayout == CudaLayout::kWgmma) {
    prefetch(weight + int64_t{first} * kCudaStepBytes, last - first);
  }
  pdl_wait();
  pdl_trigger();
  // The high part starts with empty registers: its first weights wait in the second-level cache.
  if (k.has_lo(split) && k.has_hi(split)) prefetch(weight_hi, last - k.lo_units);

  for (int i = threadIdx.x; i < 2 * C::kSumWords; i += kThreads) sums_lo[i] = 0;
  if (k.has_lo(split)) {
    const Part<C, false> part{static_cast<const uint8_t*>(p.q_lo), static_cast<int>(p.k_lo)};
    run_part<C>(part, weight, first, min(last, k.lo_units), at, buffers, sums_lo);
  }
  if (k.has_hi(split)) {
    const Part<C, true> part{reinterpret_cast<const uint8_t*>(p.q_hi), static_cast<int>(p.k_hi)};
    run_part<C>(part, weight_hi, max(first - k.lo_units, 0), last - k.lo_units, at, buffers,
                sums_hi);
  }
  __syncthreads();
  write_tile<C>(p, k, planes, split, int64_t{block} * kCudaBlockRows, at, sums_lo, sums_hi);
}

}  // namespace resq::cuda
