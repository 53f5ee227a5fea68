// A row's ranges -> (scale, zero), and chunks of columns -> codes: docs/formats.md section 2.
#pragma once

#include "core/quantize.h"
#include "cuda/row_block.cuh"
#include "cuda/scale.h"

namespace resq::cuda {

// value -> code of one part. code = clamp(rint(x / scale) + zero) is computed as
// rint(clamp(x / scale)) + zero, with the limits shifted by -zero. The limits are integers, so the
// codes are the same, and rint becomes the addition of 1.5 * 2^23, which leaves the integer in the
// low mantissa bits. F2I and FRND run at a quarter of the rate of additions; two of them per
// element would bound the kernel.
struct Coder {
  float inv_scale, lowest, highest;
  int zero;

  static constexpr float kMagic = 0x1.8p23f;

  // Returns the bits of kMagic plus the integer. A product that is NaN (rows that are not finite)
  // gives 0.
  __device__ uint32_t rounded(float x) const {
    const float code = fminf(fmaxf(__fmul_rn(x, inv_scale), lowest), highest);
    return __float_as_uint(__fadd_rn(code, kMagic));
  }

  // Codes of kBits bits, 32 / kBits in a word, the first one lowest. They are added as unsigned
  // numbers, code + 2^(kBits - 1), so that no borrow passes between them; the xor removes the
  // offset.
  template <int kBits, class Values>
  __device__ uint32_t word(const Values& x, int first) const {
    constexpr uint32_t kOnes = 0xffffffffu / ((1u << kBits) - 1), kHalf = 1u << (kBits - 1);
    uint32_t result = (zero + kHalf - 0x4b400000u) * kOnes;
#pragma unroll
    for (int i = 0; i < 32 / kBits; ++i) result += rounded(x[first + i]) << (kBits * i);
    return result ^ (kHalf * kOnes);
  }
};

struct PartCoding {
  float scale, zero;
  Coder coder;
};

// `columns` is the part's width: 0 gives scale 0. Without branches, so that the sequences of both
// parts overlap.
__device__ inline PartCoding part_coding(const Range& range, int columns, int bits, bool symmetric,
                                         float clip) {
  const ScaleZeroInverse q =
      row_scale(__fmul_rn(range.min, clip), __fmul_rn(range.max, clip), bits, symmetric,
                [](float scale) { return approximate_reciprocal(scale); });
  const bool finite = range.finite();
  const float zero = columns > 0 && finite ? q.zero : 0.0f;
  const float scale = finite ? q.scale : __int_as_float(0x7fc00000);
  const float half = bits == 4 ? 8.0f : 128.0f;
  // Codes of rows that are not finite are 0.
  const float lowest = finite ? -half - zero : 0.0f, highest = finite ? half - 1.0f - zero : 0.0f;
  return {columns > 0 ? scale : 0.0f,
          zero,
          {finite ? q.inverse : 0.0f, lowest, highest, static_cast<int>(zero)}};
}

// Where the codes of one row go.
struct RowCodes {
  int k_lo, k_hi;
  bool packed;
  uint8_t* q_lo;
  int8_t* q_hi;
  PartCoding lo, hi;

  // Codes both parts of row `row`. One thread of those that code it writes its parameters.
  __device__ RowCodes(const Range (&ranges)[2], const MixedRows& out, int64_t row,
                      bool writes_params = threadIdx.x == 0)
      : k_lo(static_cast<int>(out.k_lo)), k_hi(static_cast<int>(out.k_hi)), packed(out.packed) {
    lo = part_coding(ranges[0], k_lo, out.lo_bits, out.symmetric, out.clip);
    hi = part_coding(ranges[1], k_hi, 8, out.symmetric, 1.0f);
    q_lo = static_cast<uint8_t*>(out.q_lo) + row * (packed ? k_lo / 2 : k_lo);
    q_hi = out.q_hi + row * k_hi;
    if (writes_params) {
      reinterpret_cast<float4*>(out.params)[row] =
          make_float4(lo.scale, lo.zero, hi.scale, hi.zero);
    }
  }

  // store<true> where kPacked is `packed`.
  template <bool kPacked, class Values>
  __device__ void store_aligned(int column, const Values& x) const {
    const bool low = column < k_lo;
    if (kPacked && low) {
      *reinterpret_cast<uint32_t*>(q_lo + column / 2) = lo.coder.word<4>(x, 0);
      return;
    }
    const Coder coder = low ? lo.coder : hi.coder;
    uint8_t* to = (low ? q_lo : reinterpret_cast<uint8_t*>(q_hi) - k_lo) + column;
    *reinterpret_cast<uint2*>(to) = make_uint2(coder.word<8>(x, 0), coder.word<8>(x, 4));
  }

  // The codes of columns [column, column + 8). kAligned: all in one part, words at aligned places.
  template <bool kAligned, class Values>
  __device__ void store(int column, const Values& x) const {
    if constexpr (kAligned) {
      if (packed && column < k_lo) {
        store_aligned<true>(column, x);
      } else {
        store_aligned<false>(column, x);
      }
    } else {
      const uint32_t nibbles = lo.coder.word<4>(x, 0);
#pragma unroll
      for (int i = 0; i < kChunkColumns; ++i) {
        const bool low = column + i < k_lo;
        if (column + i >= k_lo + k_hi) break;
        const Coder coder = low ? lo.coder : hi.coder;
        const uint32_t code = coder.rounded(x[i]) + coder.zero - 0x4b400000u;
        if (!low) {
          q_hi[column + i - k_lo] = static_cast<int8_t>(code);
        } else if (!packed) {
          q_lo[column + i] = static_cast<uint8_t>(code);
        } else if (i % 2 == 0) {
          q_lo[(column + i) / 2] = static_cast<uint8_t>(nibbles >> (4 * i));
        }
      }
    }
  }
};

// Stores the codes of this thread's chunks of columns of T, which are values(slot, chunk).
template <class T, int kHeld, bool kAligned, class Values>
__device__ inline void store_chunks(const RowCodes& codes, int chunks, Values values) {
  const auto store_all = [&](auto store) {
    for_each_chunk<kHeld, full_chunks<T>(kHeld)>(
        chunks, [&](int slot, int chunk) { store(chunk * kChunkColumns, values(slot, chunk)); });
  };
  if constexpr (!kAligned) {
    store_all([&](int column, const auto& x) { codes.store<false>(column, x); });
  } else if (codes.packed) {  // asked for once: between branches nothing overlaps
    store_all([&](int column, const auto& x) { codes.store_aligned<true>(column, x); });
  } else {
    store_all([&](int column, const auto& x) { codes.store_aligned<false>(column, x); });
  }
}

// Adds columns [column, column + 8) of a row to the ranges of its parts; `columns` is the row's
// width, and what lies beyond it is 0. kAligned: all in one part.
template <bool kAligned, class Values>
__device__ inline void add_to_ranges(Range (&ranges)[2], int k_lo, int column, const Values& x) {
  if constexpr (kAligned) {
    Range range;
#pragma unroll
    for (int i = 0; i < kChunkColumns; ++i) range.add(x[i]);
    if (column < k_lo) {
      ranges[0].merge(range);
    } else {
      ranges[1].merge(range);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kChunkColumns; ++i) {
      if (column + i < k_lo) {
        ranges[0].add(x[i]);
      } else {
        ranges[1].add(x[i]);
      }
    }
  }
}

// The ranges of a row's parts, of chunks as they lie in memory: 16-bit numbers two at a time.
template <class T, bool kAligned>
class ChunkRanges {
 public:
  __device__ void add(int k_lo, int column, const Chunk<T>& x) {
    add_to_ranges<kAligned>(ranges_, k_lo, column, x);
  }
  __device__ void get(Range (&ranges)[2]) const {
    ranges[0] = ranges_[0];
    ranges[1] = ranges_[1];
  }

 private:
  Range ranges_[2];
};
template <class T>
  requires(sizeof(T) == 2)
class ChunkRanges<T, true> {
 public:
  __device__ void add(int k_lo, int column, const Chunk<T>& x) {
    const auto range = PairRange<T>::of(x.words);
    if (column < k_lo) {
      lo_.merge(range);
    } else {
      hi_.merge(range);
    }
  }
  __device__ void get(Range (&ranges)[2]) const {
    ranges[0] = lo_.range();
    ranges[1] = hi_.range();
  }

 private:
  PairRange<T> lo_, hi_;
};

}  // namespace resq::cuda
