// The main loop of mixed_gemm for small M, on every architecture from sm_80.
//
//   M  rows of activations, the B operand    N  rows of the weight, the A operand    K  columns
//
// Reading the weight decides the time, so its bytes go straight from memory to registers, in the
// register order of the A operand of mma.m16n8k32.s8.
//
// A block owns a tile of kTileM x 64 of the output [M, N] and a range of K. One step of K is 64 low
// or 32 high columns; the eight warps are four along K, each with its own steps, times two along N,
// each with two fragments of 16 n. They work through K in stages of kStageSteps steps. In each
//
//   fetch_activations   codes of the next stage, memory -> registers
//   multiply            the weights in registers times the activations in shared memory
//   fetch_weights       into the registers that multiply has read, kDepth stages ahead
//   store_activations   registers -> the other half of shared memory, decoded, as B fragments
//
// A nibble is used as 16 times its code: one AND, no sign extension. With packed activations the
// sums are 256 times the exact ones, and |sum| <= 256 * 8 * 8 * K = 2^14 K, as for unpacked ones
// (16 * 8 * 128 K) and the high part (128 * 128 K): 2^30 at K = 65536. Shifting back is exact.
#pragma once

#include <type_traits>

#include "cuda/copy_sm80.cuh"
#include "cuda/mma_sm80.cuh"
#include "ops/mixed_gemm/mixed_gemm_tiles.h"

namespace resq::cuda::small_m {

constexpr int kTileN = 64;
constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kWarpsK = 4;             // warps along K
constexpr int kFragmentsN = 2;         // of A, in a warp and step
constexpr int kSumPitch = kTileN + 4;  // words; = 4 modulo 16: fragments have no bank conflicts
constexpr int kStepVectors = kCudaStepBytes / sizeof(uint4);
constexpr int kPieceCodes = 8;  // of a row that a lane fetches at once

// kSteps: steps of a warp in a stage; kDepth: stages of weights in flight. A lane has six or eight
// 16-byte loads in flight: 24 to 96 KB of an SM, where 4.3 TB/s x 0.8 us / 132 SMs need 26 KB.
template <CudaLayout kWeightLayout, int kTileRows, bool kPackedActivations>
struct Config {
  static constexpr MixedGemmTile kTile = tile_of(kSmallMTiles, kTileRows);
  static_assert(kTile.n == kTileN && kTileN == kCudaBlockN);
  static constexpr int kTileM = kTile.m, kMinBlocks = kTile.min_blocks;
  static constexpr CudaLayout kLayout = kWeightLayout;
  static constexpr bool kPacked = kPackedActivations;
  static constexpr int kFragmentsM = kTileM / 8;  // of B, in a step
  static constexpr int kSteps = kTileM <= 16 ? 2 : 1;
  static constexpr int kDepth = kTileM <= 16 ? 2 : kTileM <= 32 ? 3 : 4;
  static constexpr int kStageSteps = kWarpsK * kSteps;
  static constexpr int kBufferBytes = kStageSteps * kCudaLoStepK * kTileM;
  static constexpr int kSumWords = kTileM * kSumPitch;
  static constexpr int kSharedBytes = 2 * kBufferBytes + 2 * kSumWords * int{sizeof(int32_t)};
};

// One part of K: what differs between low and high steps.
template <class C, bool kIsHigh>
struct Part {
  static constexpr bool kHigh = kIsHigh, kNibbles = !kHigh && C::kPacked;
  static constexpr bool kEvenOdd = !kHigh && C::kLayout == CudaLayout::kMma;
  static constexpr int kBits = kNibbles ? 4 : 8;
  static constexpr KTile kTileK = k_tile_columns(MixedGemmKernel::kSmallM, C::kPacked);
  static constexpr int kStepK = kHigh ? kTileK.hi : kTileK.lo;  // columns
  static constexpr int kPiecesPerRow = kStepK / kPieceCodes;    // and step
  static constexpr int kFetchM = 32 / kPiecesPerRow;            // rows that a warp fetches at once
  static constexpr int kWarpsPerStep = kWarps / C::kStageSteps;
  static constexpr int kFetches = C::kTileM / kFetchM / kWarpsPerStep;  // of a warp in a stage
  static constexpr int kLaneBytes = kStepK / 4;           // of a B fragment: codes of a lane's row
  static constexpr int kFragmentBytes = 32 * kLaneBytes;  // of B: one step, eight rows

  const uint8_t* activations;  // codes [m][k]
  int k;                       // a multiple of 8
};

// A low fragment times the B fragment of 64 columns of K: two MMAs of 32. In kMma a word is eight
// columns of one n: even ones (low nibbles), then odd ones. In kWgmma it is four columns of n = g
// (high nibbles) and g + 8.
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
// splits them into even and odd ones, else four, and four more 16 columns on. `from` points at the
// first, which is `left` columns before the end of the row; codes past the end are zero. No __ldg:
// the previous kernel may still be writing the codes when this one starts (cuda/pdl.cuh).
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

// Where a thread and its block work.
struct Place {
  int warp, lane, warp_k;
  int fragment_n;  // first of the warp's fragments along N
  int64_t m;       // first of the tile
  int m_count;     // rows of the tile inside the matrix
};

// Steps begin .. end - 1 of one part; adds the exact sums to `sums` [kTileM][kSumPitch].
template <class C, class P>
__device__ __forceinline__ void multiply_part(const P& part, const uint8_t* weight, int begin,
                                              int end, const Place& at, uint8_t* buffers,
                                              int32_t* sums) {
  constexpr int kDepth = C::kDepth, kSteps = C::kSteps;
  const int stages = (end - begin + C::kStageSteps - 1) / C::kStageSteps;
  uint4 weights[kDepth][kSteps][kFragmentsN];
  uint2 pieces[P::kFetches];
  int32_t acc[kFragmentsN][C::kFragmentsM][4] = {};

  const auto step_of = [&](int stage, int s) {
    return begin + stage * C::kStageSteps + at.warp_k * kSteps + s;
  };
  const auto* next_weights =
      reinterpret_cast<const uint4*>(weight + int64_t{step_of(0, 0)} * kCudaStepBytes +
                                     at.fragment_n * kCudaFragmentBytes) +
      at.lane;
  const auto fetch_weights = [&](int stage, uint4(&to)[kSteps][kFragmentsN]) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      if (step_of(stage, s) >= end) continue;
#pragma unroll
      for (int fn = 0; fn < kFragmentsN; ++fn) {
        to[s][fn] = load_streaming(next_weights + (s * kStepVectors + fn * 32));
      }
    }
    next_weights += C::kStageSteps * kStepVectors;
  };

  // kFetches times, a warp fetches one step of kFetchM rows, one piece per lane: whole sectors of
  // rows.
  const int step = at.warp % C::kStageSteps, piece = at.lane % P::kPiecesPerRow;
  const int m = at.warp / C::kStageSteps * P::kFetchM + at.lane / P::kPiecesPerRow;
  constexpr int kApartM = P::kWarpsPerStep * P::kFetchM;  // from a lane's piece to its next
  const auto row_bytes = static_cast<uint32_t>(part.k * P::kBits / 8);
  int k = (begin + step) * P::kStepK + piece / 4 * 32 + piece % 4 * (P::kEvenOdd ? 8 : 4);
  const uint8_t* next_codes = part.activations + (at.m + m) * row_bytes + k * P::kBits / 8;
  const auto fetch_activations = [&] {
#pragma unroll
    for (int i = 0; i < P::kFetches; ++i) {
      const uint8_t* from = next_codes + static_cast<uint32_t>(i * kApartM) * row_bytes;
      pieces[i] = fetch_piece<P>(from, m + i * kApartM < at.m_count ? part.k - k : 0);
    }
    k += C::kStageSteps * P::kStepK;
    next_codes += C::kStageSteps * P::kStepK * P::kBits / 8;
  };
  const auto store_activations = [&](uint8_t* buffer) {
    uint8_t* fragments = buffer + step * C::kFragmentsM * P::kFragmentBytes + 8 * (piece / 4);
#pragma unroll
    for (int i = 0; i < P::kFetches; ++i) {
      const int to = m + i * kApartM, lane = 4 * (to % 8) + piece % 4;
      *reinterpret_cast<uint2*>(fragments + to / 8 * P::kFragmentBytes + lane * P::kLaneBytes) =
          decode_piece<P>(pieces[i]);
    }
  };
  const auto multiply = [&](int stage, const uint8_t* buffer,
                            const uint4(&from)[kSteps][kFragmentsN]) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      if (step_of(stage, s) >= end) continue;
      const uint8_t* fragments = buffer +
                                 (at.warp_k * kSteps + s) * C::kFragmentsM * P::kFragmentBytes +
                                 at.lane * P::kLaneBytes;
#pragma unroll
      for (int fm = 0; fm < C::kFragmentsM; ++fm) {
        const uint8_t* b = fragments + fm * P::kFragmentBytes;
        if constexpr (P::kHigh) {
          const uint2 v = *reinterpret_cast<const uint2*>(b);
#pragma unroll
          for (int fn = 0; fn < kFragmentsN; ++fn) {
            const uint4& w = from[s][fn];
            mma_s8(acc[fn][fm], {w.x, w.y, w.z, w.w}, v.x, v.y);
          }
        } else {
          const uint4 v = *reinterpret_cast<const uint4*>(b);
#pragma unroll
          for (int fn = 0; fn < kFragmentsN; ++fn) {
            multiply_lo<C::kLayout>(acc[fn][fm], from[s][fn], v);
          }
        }
      }
    }
  };
  // Accumulator r: n = 16 fn + g + 8 (r / 2), m = 8 fm + 2 i + r % 2, with lane = 4 g + i.
  const auto add_sums = [&] {
    const int shift = P::kHigh ? 0 : P::kNibbles ? 8 : 4;
#pragma unroll
    for (int fm = 0; fm < C::kFragmentsM; ++fm) {
#pragma unroll
      for (int fn = 0; fn < kFragmentsN; ++fn) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int n = 16 * (at.fragment_n + fn) + at.lane / 4 + 8 * (r / 2);
          const int m = 8 * fm + 2 * (at.lane % 4) + r % 2;
          atomicAdd(sums + m * kSumPitch + n, acc[fn][fm][r] >> shift);
        }
      }
    }
  };

#pragma unroll
  for (int d = 0; d < kDepth; ++d) fetch_weights(d, weights[d]);
  fetch_activations();
  store_activations(buffers);
  __syncthreads();
  for (int base = 0; base < stages; base += kDepth) {
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      const int stage = base + d;
      if (stage >= stages) break;
      fetch_activations();
      multiply(stage, buffers + stage % 2 * C::kBufferBytes, weights[d]);
      fetch_weights(stage + kDepth, weights[d]);
      store_activations(buffers + (stage + 1) % 2 * C::kBufferBytes);
      __syncthreads();
    }
  }
  add_sums();
}

}  // namespace resq::cuda::small_m
