// Eight consecutive columns of a row: what a thread of the row kernels loads, holds and stores.
// With 16-bit numbers one 16-byte access.
//
// Device code of the quantizers rounds every product and sum on its own (docs/formats.md section
// 4). nvcc contracts a product and a sum wherever it sees both, so the code uses __fmul_rn and
// __fadd_rn, which it never contracts.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "core/float16.h"

namespace resq::cuda {

inline constexpr int kChunkColumns = 8;

template <class T>
struct Chunk;

template <>
struct Chunk<float> {
  uint32_t words[8];

  __device__ float operator[](int i) const { return __uint_as_float(words[i]); }
  __device__ void set(int i, float even, float odd) {
    words[i] = __float_as_uint(even);
    words[i + 1] = __float_as_uint(odd);
  }
};

template <>
struct Chunk<Half> {
  uint32_t words[4];

  __device__ float operator[](int i) const {
    return __half2float(__ushort_as_half(static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16))));
  }
  __device__ void set(int i, float even, float odd) {
    const __half2 pair = __floats2half2_rn(even, odd);
    words[i / 2] = reinterpret_cast<const uint32_t&>(pair);
  }
};

template <>
struct Chunk<BFloat16> {
  uint32_t words[4];

  __device__ float operator[](int i) const {
    return __uint_as_float(i % 2 == 0 ? words[i / 2] << 16 : words[i / 2] & 0xffff0000u);
  }
  __device__ void set(int i, float even, float odd) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(even, odd);
    words[i / 2] = reinterpret_cast<const uint32_t&>(pair);
  }
};

// The bits of one number inside a chunk, for rows whose chunks are not aligned.
template <class T>
__device__ inline uint32_t element_bits(const T* p) {
  if constexpr (sizeof(T) == 4) {
    return *reinterpret_cast<const uint32_t*>(p);
  } else {
    return *reinterpret_cast<const uint16_t*>(p);
  }
}

// Columns [0, count) of `from`, the rest 0. kAligned: `from` is aligned to 16 bytes, count is 8.
template <bool kAligned, class T>
__device__ inline Chunk<T> load_chunk(const T* from, int count) {
  Chunk<T> chunk;
  constexpr int kWords = sizeof(chunk.words) / 4, kPerWord = kChunkColumns / kWords;
  if constexpr (kAligned) {
#pragma unroll
    for (int w = 0; w < kWords; w += 4) {
      const uint4 quad = *reinterpret_cast<const uint4*>(from + w * kPerWord);
      chunk.words[w] = quad.x;
      chunk.words[w + 1] = quad.y;
      chunk.words[w + 2] = quad.z;
      chunk.words[w + 3] = quad.w;
    }
  } else {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      chunk.words[w] = 0;
#pragma unroll
      for (int i = 0; i < kPerWord; ++i) {
        const int column = w * kPerWord + i;
        if (column < count) chunk.words[w] |= element_bits(from + column) << (i * 16);
      }
    }
  }
  return chunk;
}

template <bool kAligned, class T>
__device__ inline void store_chunk(T* to, const Chunk<T>& chunk, int count) {
  constexpr int kWords = sizeof(chunk.words) / 4, kPerWord = kChunkColumns / kWords;
  if constexpr (kAligned) {
#pragma unroll
    for (int w = 0; w < kWords; w += 4) {
      *reinterpret_cast<uint4*>(to + w * kPerWord) =
          make_uint4(chunk.words[w], chunk.words[w + 1], chunk.words[w + 2], chunk.words[w + 3]);
    }
  } else {
#pragma unroll
    for (int column = 0; column < kChunkColumns; ++column) {
      if (column >= count) break;
      const uint32_t word = chunk.words[column / kPerWord];
      if constexpr (kPerWord == 1) {
        *reinterpret_cast<uint32_t*>(to + column) = word;
      } else {
        *reinterpret_cast<uint16_t*>(to + column) =
            static_cast<uint16_t>(word >> (column % 2 * 16));
      }
    }
  }
}

}  // namespace resq::cuda
