// The epilogue of mixed_gemm on sm_90a. wgmma leaves a thread two weight rows (output columns) and
// pairs of tokens (output rows), so a warpgroup's 64 columns are transposed in shared memory, some
// tokens at a time, and written 128 bytes or more of a row together.
#pragma once

#include "cuda/mbarrier_sm90.cuh"
#include "ops/mixed_gemm/mixed_gemm_epilogue.cuh"
#include "ops/mixed_gemm/mixed_gemm_mainloop_sm90.cuh"

namespace resq::cuda {

inline constexpr int kBlockColumns = static_cast<int>(kCudaBlockRows);  // outputs of a warpgroup

template <class Out>
struct Transpose {
  static constexpr int kPiece = 16 / sizeof(Out);  // outputs that a thread stores at once
  static constexpr int kTokens = sizeof(Out) == 2 ? 32 : 16;  // of a turn
  // One piece of padding: eight rows' pieces fall into different banks.
  static constexpr int kPitch = kBlockColumns + kPiece;
  alignas(16) Out values[kTokens * kPitch];
};

// What a warpgroup's epilogue needs of its tile, fetched while it multiplies.
struct alignas(16) ColumnScales {
  float lo, hi;
  uint32_t sum_lo, sum_hi;
};
template <int kTokens, class Out>
struct EpilogueShared {
  Transpose<Out> transpose[2];  // in turns, so that one barrier a turn is enough
  float4 rows[kTokens];         // params, then OutputRow
  ColumnScales columns[kBlockColumns];
  float bias[kBlockColumns];
  int token, column;  // first of the tile and warpgroup
};

template <int kBytes>
__device__ inline void copy_or_zero(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)),
               "l"(global), "n"(kBytes), "r"(valid ? kBytes : 0)
               : "memory");
}

// Two 8 x 8 matrices of 16-bit values, transposed; lane l < 16 names row l % 8 of matrix l / 8.
__device__ inline void store_transposed(void* row, uint32_t first, uint32_t second) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(shared_address(row)),
      "r"(first), "r"(second)
      : "memory");
}

template <class Out>
__device__ inline uint32_t packed_pair(float first, float second) {
  alignas(4) Out pair[2];
  store_rounded(pair, first);
  store_rounded(pair + 1, second);
  return *reinterpret_cast<const uint32_t*>(pair);
}

template <int kTokens, class Out>
struct Epilogue {
  using Turn = Transpose<Out>;
  static constexpr int kTurns = kTokens / Turn::kTokens;

  const MixedGemmParams& p;
  EpilogueShared<kTokens, Out> (&all)[kConsumers];  // of the warpgroups
  uint32_t thread;                                  // among the consumers

  __device__ EpilogueShared<kTokens, Out>& own() const { return all[thread / 128]; }
  __device__ void sync() const { named_barrier_sync(1 + thread / 128, 128); }

  // Begins to fetch scales, zeros and weight sums; rows and columns outside are zero.
  __device__ void fetch(int token, int column) {
    const uint32_t member = thread % 128;
    EpilogueShared<kTokens, Out>& shared = own();
    if (member == 0) {
      shared.token = token;
      shared.column = column;
    }
    for (uint32_t t = member; t < kTokens; t += 128) {
      const bool valid = token + static_cast<int>(t) < p.rows;
      copy_or_zero<16>(&shared.rows[t], p.params + (valid ? 4 * int64_t{token + t} : 0), valid);
    }
    if (member < kBlockColumns) {
      const bool valid = column + static_cast<int>(member) < p.n;
      const int64_t at = valid ? 2 * int64_t{column + member} : 0;
      copy_or_zero<8>(&shared.columns[member].lo, p.weight_scale + at, valid);
      copy_or_zero<8>(&shared.columns[member].sum_lo, p.weight_sum + at, valid);
      shared.bias[member] = p.bias != nullptr && valid ? load_bias(p, column + member) : -0.0f;
    }
  }

  // Each thread finishes what it fetched itself; then all may read it. A part or bias that is
  // absent becomes -0, which changes no value that it is added to, -0 included; without any part
  // the output starts from +0. The low weight sums get the factor of the low sums of products and
  // the low scales lose it: powers of two change no rounding of scales from 2^-122 on, and the
  // quantizer's are at least 2^-60.
  __device__ void finish_fetch() {
    asm volatile("cp.async.wait_all;" ::: "memory");
    const bool lo = p.k_lo > 0, hi = p.k_hi > 0;
    const uint32_t member = thread % 128;
    EpilogueShared<kTokens, Out>& shared = own();
#pragma unroll 1
    for (uint32_t t = member; t < kTokens; t += 128) {
      const float4 v = shared.rows[t];
      shared.rows[t] = {lo ? v.x / kLoFactor : 0.0f, hi ? v.z : 0.0f,
                        __uint_as_float(exact_integer(v.y)), __uint_as_float(exact_integer(v.w))};
    }
    if (member < kBlockColumns) {
      ColumnScales& c = shared.columns[member];
      if (!lo) c.lo = hi ? -0.0f : 0.0f;
      c.sum_lo = lo ? c.sum_lo * kLoFactor : 0;
      if (!hi) c.hi = -0.0f;
      if (!hi) c.sum_hi = 0;
    }
    sync();
  }

  __device__ OutputColumn output_column(uint32_t at) const {
    const ColumnScales c = own().columns[at];
    return {c.lo, c.hi, own().bias[at], c.sum_lo, c.sum_hi};
  }

  static __device__ float output(uint32_t sum_lo, uint32_t sum_hi, const OutputRow& r,
                                 const OutputColumn& c) {
    const float lo = output_lo(static_cast<int32_t>(sum_lo), r, c);
    const float both = __fadd_rn(lo, output_hi(static_cast<int32_t>(sum_hi), r, c));
    return __fadd_rn(both, c.bias);
  }

  // The outputs of one turn's tokens into shared memory, token-major.
  template <int kTurn>
  __device__ void transpose(const uint32_t (&sums_lo)[kTokens / 2],
                            const uint32_t (&sums_hi)[kTokens / 2], const OutputColumn (&c)[2],
                            Turn& turn) const {
    const uint32_t lane = thread % 32, warp_column = thread % 128 / 32 * 16;
#pragma unroll
    for (int group = 0; group < Turn::kTokens / 8; ++group) {  // of eight tokens
      const int first = kTurn * Turn::kTokens + 8 * group;
      float y[2][2];  // [column g or g + 8][token]
#pragma unroll
      for (int l = 0; l < 2; ++l) {
        const float4 v = own().rows[first + 2 * (lane % 4) + l];
        const OutputRow r{v.x, v.y, __float_as_uint(v.z), __float_as_uint(v.w)};
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int at = first / 2 + 2 * h + l;
          y[h][l] = output(sums_lo[at], sums_hi[at], r, c[h]);
        }
      }
      Out* values = turn.values + 8 * group * Turn::kPitch + warp_column;
      if constexpr (sizeof(Out) == 2) {
        store_transposed(values + lane % 8 * Turn::kPitch + lane / 8 % 2 * 8,
                         packed_pair<Out>(y[0][0], y[0][1]), packed_pair<Out>(y[1][0], y[1][1]));
      } else {
        Out* at = values + 2 * (lane % 4) * Turn::kPitch + lane / 4;
        at[0] = y[0][0];
        at[8] = y[1][0];
        at[Turn::kPitch] = y[0][1];
        at[Turn::kPitch + 8] = y[1][1];
      }
    }
  }

  // From shared memory to the output: a piece of 16 bytes per thread and pass.
  __device__ void store(const Turn& turn, int first_token, int column) const {
    constexpr int kRowPieces = kBlockColumns / Turn::kPiece;
    constexpr int kPassTokens = 128 / kRowPieces;
    const int rows = static_cast<int>(p.rows), columns = static_cast<int>(p.n);
    const uint32_t member = thread % 128;
    const int n = column + static_cast<int>(member % kRowPieces) * Turn::kPiece;
    const bool whole = columns % Turn::kPiece == 0;  // then pieces are, and their address aligned
#pragma unroll
    for (int pass = 0; pass < Turn::kTokens / kPassTokens; ++pass) {
      const uint32_t t = member / kRowPieces + pass * kPassTokens;
      const int m = first_token + static_cast<int>(t);
      if (m >= rows || n >= columns) continue;
      const Out* values = turn.values + t * Turn::kPitch + member % kRowPieces * Turn::kPiece;
      Out* out = static_cast<Out*>(p.out) + int64_t{m} * columns + n;
      if (whole) {
        *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(values);
      } else {
#pragma unroll 1
        for (int i = 0; i < min(Turn::kPiece, columns - n); ++i) out[i] = values[i];
      }
    }
  }

  __device__ void write(const uint32_t (&sums_lo)[kTokens / 2],
                        const uint32_t (&sums_hi)[kTokens / 2]) {
    forget(thread);  // or the epilogue's addresses are computed before the main loop
    finish_fetch();
    const int token = own().token, column = own().column;
    const uint32_t row = thread % 128 / 32 * 16 + thread % 32 / 4;
    const OutputColumn c[2] = {output_column(row), output_column(row + 8)};
    [&]<int... kTurn>(std::integer_sequence<int, kTurn...>) {
      (
          [&] {
            Turn& turn = own().transpose[kTurn % 2];
            transpose<kTurn>(sums_lo, sums_hi, c, turn);
            sync();
            store(turn, token + kTurn * Turn::kTokens, column);
          }(),
          ...);
    }(std::make_integer_sequence<int, kTurns>());
    // The next tile's fetch overwrites what every thread has read before the last sync.
  }
};

}  // namespace resq::cuda
