// A Paley factor of any order on the tensor cores. The signs of S are the A operand in bf16, which
// holds them exactly; the row is the B operand as a sum of three bf16 numbers, which hold all 24
// bits of a float: products are exact, and sums are as good as the tensor core's float32.
#pragma once

#include "cuda/chunk.cuh"
#include "cuda/hadamard_layout.h"

namespace resq::cuda {

inline constexpr int kMmaTiles = 8;  // of 16 rows that a warp holds: 32 registers

// Returns x, opaque to the compiler. Without it the compiler keeps the address of each of a
// column's loads in a register, for the stores.
__device__ inline int forgotten(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

__device__ inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// [q] positions, for build_signs.
__device__ inline void build_positions(unsigned char* tables, const TensorFactor& factor) {
  uint16_t* positions = reinterpret_cast<uint16_t*>(tables + factor.position_at);
  for (int a = threadIdx.x; a < factor.signs.q; a += kHadamardThreads) {
    positions[a] = static_cast<uint16_t>(factor.signs.position(a));
  }
}

// [tiles, tiles, 32 lanes] bytes: the signs of a lane's A fragment; bit r is the first number of
// register r and bit 4 + r the second. Padded columns are multiplied by zeros, and padded rows are
// not written.
__device__ inline void build_signs(unsigned char* tables, const TensorFactor& factor) {
  const PaleySigns& signs = factor.signs;
  const uint16_t* positions = reinterpret_cast<const uint16_t*>(tables + factor.position_at);
  const int last = signs.position(signs.q - 1);
  const auto subtracts = [&](int i, int j) {
    if (i == j || i == 0 || i >= signs.rows || j >= signs.rows) return 0u;
    if (j == 0) return signs.streams == 1 ? 1u : 0u;
    const int index = positions[i - 1] - positions[j - 1] + last;
    return signs.negative[index / 32] >> (index % 32) & 1;
  };
#pragma unroll 1
  for (int at = threadIdx.x; at < factor.tiles * factor.tiles * 32; at += kHadamardThreads) {
    const int lane = at % 32, tile = at / 32;
    const int i = tile / factor.tiles * 16 + lane / 4, j = tile % factor.tiles * 16 + lane % 4 * 2;
    uint32_t bits = 0;
    for (int r = 0; r < 4; ++r) {
      const int row = i + r % 2 * 8, column = j + r / 2 * 8;
      bits |= subtracts(row, column) << r | subtracts(row, column + 1) << (4 + r);
    }
    tables[factor.bits_at + at] = static_cast<unsigned char>(bits);
  }
}

__device__ inline void expand_signs(uint32_t bits, uint32_t (&a)[4]) {
  const uint32_t both = (bits & 0x0f) | (bits & 0xf0) << 12;
#pragma unroll
  for (int r = 0; r < 4; ++r) a[r] = (both << (15 - r) & 0x80008000u) ^ 0x3f803f80u;
}

// x = b[0] + b[1] + b[2] exactly: the leading 8 bits, the leading 8 bits of the remainder, and the
// rest. Truncated, not rounded, so that the largest floats stay finite.
__device__ inline void split_pair(float even, float odd, uint32_t (&b)[3]) {
#pragma unroll
  for (int t = 0; t < 3; ++t) {
    const uint32_t low = __float_as_uint(even) & 0xffff0000u;
    const uint32_t high = __float_as_uint(odd) & 0xffff0000u;
    b[t] = low >> 16 | high;
    even = __fsub_rn(even, __uint_as_float(low));
    odd = __fsub_rn(odd, __uint_as_float(high));
  }
}

// Transforms all columns of the axis. A warp multiplies up to eight row tiles by eight columns of
// one stream. The block works on as many column tiles at once as its warps cover, and overwrites
// them when all of them have been read. Ends with a barrier.
__device__ inline void paley_mma_pass(float* row, const unsigned char* tables,
                                      const HadamardLayout& h, int index) {
  const TensorFactor& factor = h.tensor[index];
  const int streams = factor.signs.streams, rows = factor.signs.rows, tiles = factor.tiles;
  const int stride = h.stride[index], step = h.place(stride);
  const int columns = h.n / factor.signs.order;
  int groups = 1;  // of row tiles
  while (groups * kMmaTiles < tiles) groups *= 2;
  const int group_tiles = (tiles + groups - 1) / groups, together = groups * streams;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int stream = warp % streams, first_tile = warp % together / streams * group_tiles;
  const int held = min(group_tiles, tiles - first_tile);

  const auto start = [&](int q) {
    return h.column(q, factor.signs.order, stride, h.stride_inverse[index]);
  };
  // Input k of a column: x_k, or x_2k + x_2k+1 and x_2k - x_2k+1 for the two streams.
  const auto input = [&](int column, int k) {
    if (streams == 1) return row[column + k * step];
    const float a = row[column + 2 * k * step], b = row[column + (2 * k + 1) * step];
    return stream == 0 ? __fadd_rn(a, b) : __fsub_rn(a, b);
  };

  const int at_once = kHadamardWarps / together;
#pragma unroll 1
  for (int first = 0; first * 8 < columns; first += at_once) {
    const int column_tile = (first + warp / together) * 8;
    float sums[kMmaTiles][4] = {};
    int out[2];  // the columns of the accumulators; -1: none
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int q = column_tile + lane % 4 * 2 + c;
      out[c] = q < columns ? start(q) : -1;
    }
    if (column_tile < columns) {
      if (streams == 2) {  // y_2i = .. - 2 x_2i+1, y_2i+1 = .. - 2 x_2i
#pragma unroll
        for (int t = 0; t < kMmaTiles; ++t) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int i = (first_tile + t) * 16 + lane / 4 + e / 2 * 8;
            if (t < held && i < rows && out[e % 2] >= 0) {
              sums[t][e] = __fmul_rn(-2.0f, row[out[e % 2] + (2 * i + 1 - stream) * step]);
            }
          }
        }
      }
      const int q = column_tile + lane / 4;
      const int column = q < columns ? start(q) : -1;
#pragma unroll 1
      for (int k_tile = 0; k_tile < tiles; ++k_tile) {
        uint32_t b[2][3];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int k = k_tile * 16 + half * 8 + lane % 4 * 2;
          const float even = column >= 0 && k < rows ? input(column, k) : 0.0f;
          const float odd = column >= 0 && k + 1 < rows ? input(column, k + 1) : 0.0f;
          split_pair(even, odd, b[half]);
        }
        const unsigned char* bits = tables + factor.bits_at + k_tile * 32 + lane;
#pragma unroll
        for (int t = 0; t < kMmaTiles; ++t) {
          if (t >= held) break;
          uint32_t a[4];
          expand_signs(bits[(first_tile + t) * tiles * 32], a);
#pragma unroll
          for (int term = 2; term >= 0; --term) {
            const uint32_t pair[2] = {b[0][term], b[1][term]};
            mma_bf16(sums[t], a, pair);
          }
        }
      }
    }
    __syncthreads();
    const int written_step = forgotten(step);
#pragma unroll
    for (int t = 0; t < kMmaTiles; ++t) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int i = (first_tile + t) * 16 + lane / 4 + e / 2 * 8;
        if (t < held && i < rows && out[e % 2] >= 0) {
          row[out[e % 2] + (i * streams + stream) * written_step] = sums[t][e];
        }
      }
    }
  }
  __syncthreads();
}

}  // namespace resq::cuda
