// The epilogue of mixed_gemm on sm_90a. wgmma leaves each thread two n and pairs of neighbouring m,
// so the outputs of a warpgroup, kTileM x 64 (N), are transposed in shared memory, kTurnM rows at a
// time, and written 128 bytes or more of a row together.
#pragma once

#include "cuda/mbarrier_sm90.cuh"
#include "ops/mixed_gemm/epilogue.cuh"
#include "ops/mixed_gemm/sm90/exchange.cuh"
#include "ops/mixed_gemm/sm90/mainloop.cuh"

namespace resq::cuda::sm90 {

template <class Out>
struct Transpose {
  static constexpr int kPieceN = 16 / sizeof(Out);  // outputs that a thread stores at once
  static constexpr int kTurnM = sizeof(Out) == 2 ? 32 : 16;
  // One piece of padding: eight rows' pieces fall into different banks.
  static constexpr int kPitch = kWarpgroupN + kPieceN;
  alignas(16) Out values[kTurnM * kPitch];
};

// What a warpgroup's epilogue needs for its tile, fetched during the main loop.
struct alignas(16) ScalesOfN {
  float lo, hi;
  uint32_t sum_lo, sum_hi;
};
template <int kTileM, class Out>
struct EpilogueShared {
  Transpose<Out> transpose[2];  // used alternately, so that one barrier per turn is enough
  float4 of_m[kTileM];          // MixedGemmParams::params, then TermsOfM
  ScalesOfN of_n[kWarpgroupN];
  float bias[kWarpgroupN];
  int m, n;  // first of the tile and warpgroup
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

template <int kTileM, class Out>
struct Epilogue {
  using Turn = Transpose<Out>;
  static constexpr int kTurns = kTileM / Turn::kTurnM;

  const MixedGemmParams& p;
  EpilogueShared<kTileM, Out> (&all)[kConsumers];  // of the warpgroups
  uint32_t thread;                                 // among the consumers

  __device__ EpilogueShared<kTileM, Out>& own() const { return all[thread / 128]; }
  __device__ void sync() const { named_barrier_sync(1 + thread / 128, 128); }

  // Starts the copies of scales, zeros and weight sums; what lies outside the matrix is zero.
  __device__ void fetch(int m, int n) {
    const uint32_t member = thread % 128;
    EpilogueShared<kTileM, Out>& shared = own();
    if (member == 0) {
      shared.m = m;
      shared.n = n;
    }
    for (uint32_t i = member; i < kTileM; i += 128) {
      const bool valid = m + static_cast<int>(i) < p.m;
      copy_or_zero<16>(&shared.of_m[i], p.params + (valid ? 4 * int64_t{m + i} : 0), valid);
    }
    if (member < kWarpgroupN) {
      const bool valid = n + static_cast<int>(member) < p.n;
      const int64_t at = valid ? 2 * int64_t{n + member} : 0;
      copy_or_zero<8>(&shared.of_n[member].lo, p.weight_scale + at, valid);
      copy_or_zero<8>(&shared.of_n[member].sum_lo, p.weight_sum + at, valid);
      shared.bias[member] = p.bias != nullptr && valid ? load_bias(p, n + member) : -0.0f;
    }
  }

  // Each thread converts what it fetched itself; after the barrier all may read it. An absent part
  // or bias becomes -0, which leaves every value that it is added to as it is, -0 included; without
  // any part the output starts from +0. The low weight sums are multiplied by the factor of the low
  // sums of products and the low scales divided by it: powers of two change no rounding of scales
  // of at least 2^-122, and the quantizer's are at least 2^-60.
  __device__ void finish_fetch() {
    asm volatile("cp.async.wait_all;" ::: "memory");
    const bool lo = p.k_lo > 0, hi = p.k_hi > 0;
    const uint32_t member = thread % 128;
    EpilogueShared<kTileM, Out>& shared = own();
#pragma unroll 1
    for (uint32_t i = member; i < kTileM; i += 128) {
      const float4 v = shared.of_m[i];
      shared.of_m[i] = {lo ? v.x / kLoFactor : 0.0f, hi ? v.z : 0.0f,
                        __uint_as_float(exact_integer(v.y)), __uint_as_float(exact_integer(v.w))};
    }
    if (member < kWarpgroupN) {
      ScalesOfN& c = shared.of_n[member];
      if (!lo) c.lo = hi ? -0.0f : 0.0f;
      c.sum_lo = lo ? c.sum_lo * kLoFactor : 0;
      if (!hi) c.hi = -0.0f;
      if (!hi) c.sum_hi = 0;
    }
    sync();
  }

  __device__ TermsOfN terms_of_n(uint32_t at) const {
    const ScalesOfN c = own().of_n[at];
    return {c.lo, c.hi, own().bias[at], c.sum_lo, c.sum_hi};
  }

  static __device__ float output(uint32_t sum_lo, uint32_t sum_hi, const TermsOfM& of_m,
                                 const TermsOfN& of_n) {
    const float lo = output_lo(static_cast<int32_t>(sum_lo), of_m, of_n);
    const float both = __fadd_rn(lo, output_hi(static_cast<int32_t>(sum_hi), of_m, of_n));
    return __fadd_rn(both, of_n.bias);
  }

  // Writes the outputs of the eight rows from `first` of the tile on to eight rows of shared
  // memory, [m][n]. The four sums of a part: [n = g or g + 8][m].
  __device__ void transpose_group(const uint32_t* sums_lo, const uint32_t* sums_hi, int first,
                                  const TermsOfN (&of_n)[2], Out* rows) const {
    const uint32_t lane = thread % 32, warp_n = thread % 128 / 32 * 16;
    float y[2][2];
#pragma unroll
    for (int l = 0; l < 2; ++l) {
      const float4 v = own().of_m[first + 2 * (lane % 4) + l];
      const TermsOfM of_m{v.x, v.y, __float_as_uint(v.z), __float_as_uint(v.w)};
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        y[h][l] = output(sums_lo[2 * h + l], sums_hi[2 * h + l], of_m, of_n[h]);
      }
    }
    Out* values = rows + warp_n;
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

  // Writes the outputs of one turn to shared memory.
  template <int kTurn>
  __device__ void transpose(const uint32_t (&sums_lo)[kTileM / 2],
                            const uint32_t (&sums_hi)[kTileM / 2], const TermsOfN (&of_n)[2],
                            Turn& turn) const {
#pragma unroll
    for (int group = 0; group < Turn::kTurnM / 8; ++group) {
      const int first = kTurn * Turn::kTurnM + 8 * group;
      transpose_group(sums_lo + first / 2, sums_hi + first / 2, first, of_n,
                      turn.values + 8 * group * Turn::kPitch);
    }
  }

  // Copies `groups` groups of eight rows from shared memory to the output: the first to row
  // first_m, each of the others `stride` groups behind the one before. A thread copies a piece of
  // 16 bytes in each pass.
  __device__ void store(const Turn& turn, int first_m, int first_n, int groups, int stride) const {
    constexpr int kRowPieces = kWarpgroupN / Turn::kPieceN;
    constexpr int kPassM = 128 / kRowPieces;
    const int m_end = static_cast<int>(p.m), n_end = static_cast<int>(p.n);
    const uint32_t member = thread % 128;
    const int n = first_n + static_cast<int>(member % kRowPieces) * Turn::kPieceN;
    const bool whole = n_end % Turn::kPieceN == 0;  // then all pieces are whole and aligned
#pragma unroll
    for (int pass = 0; pass < Turn::kTurnM / kPassM; ++pass) {
      const uint32_t i = member / kRowPieces + pass * kPassM;
      const int group = static_cast<int>(i / 8);
      const int m = first_m + static_cast<int>(i) + 8 * group * (stride - 1);
      if (group >= groups || m >= m_end || n >= n_end) continue;
      const Out* values = turn.values + i * Turn::kPitch + member % kRowPieces * Turn::kPieceN;
      Out* out = static_cast<Out*>(p.out) + int64_t{m} * n_end + n;
      if (whole) {
        *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(values);
      } else {
#pragma unroll 1
        for (int j = 0; j < min(Turn::kPieceN, n_end - n); ++j) out[j] = values[j];
      }
    }
  }

  __device__ void write(const uint32_t (&sums_lo)[kTileM / 2],
                        const uint32_t (&sums_hi)[kTileM / 2]) {
    keep_opaque(thread);  // or the compiler computes the epilogue's addresses before the main loop
    finish_fetch();
    const int m = own().m, n = own().n;
    const uint32_t g = thread % 128 / 32 * 16 + thread % 32 / 4;
    const TermsOfN of_n[2] = {terms_of_n(g), terms_of_n(g + 8)};
    [&]<int... kTurn>(std::integer_sequence<int, kTurn...>) {
      (
          [&] {
            Turn& turn = own().transpose[kTurn % 2];
            transpose<kTurn>(sums_lo, sums_hi, of_n, turn);
            sync();
            store(turn, m + kTurn * Turn::kTurnM, n, Turn::kTurnM / 8, 1);
          }(),
          ...);
    }(std::make_integer_sequence<int, kTurns>());
    // No barrier here: the next tile's fetch overwrites only what every thread has read before the
    // last sync.
  }

  // The same for the share of the rows that this split finishes.
  template <class Place>
  __device__ void write_share(const SplitSums<Place>& split_sums) {
    finish_fetch();
    const int m = own().m, n = own().n;
    const uint32_t g = thread % 128 / 32 * 16 + thread % 32 / 4;
    const TermsOfN of_n[2] = {terms_of_n(g), terms_of_n(g + 8)};
    const int splits = split_sums.k.splits, split = split_sums.place.split();
    constexpr int kTurnGroups = Turn::kTurnM / 8;
    split_sums.wait();
    int index = 0;  // of the split's groups
#pragma unroll 1
    for (int turn = 0, first = split; first < kTileM / 8; ++turn, first += kTurnGroups * splits) {
      Turn& shared = own().transpose[turn % 2];
      int groups = 0;
#pragma unroll 1
      for (int group = first; groups < kTurnGroups && group < kTileM / 8; group += splits) {
        const GroupSums sums = split_sums.sums(index++);
        transpose_group(sums.lo, sums.hi, 8 * group, of_n,
                        shared.values + 8 * groups * Turn::kPitch);
        ++groups;
      }
      sync();
      store(shared, m + 8 * first, n, groups, splits);
    }
    split_sums.release();
  }
};

}  // namespace resq::cuda::sm90
