// The Hadamard transform of one row of floats in shared memory, unscaled, by a block of 256
// threads. The power of two and the factors 12, 20, 28, 44 add in the order of
// csrc/cpu/row_hadamard.h and give the CPU's bits; other Paley factors run on the tensor cores
// (row_paley_mma.cuh).
#pragma once

#include "cuda/hadamard_layout.h"
#include "cuda/row_paley_mma.cuh"

namespace resq::cuda {

// Stages 1, 2, ... below kCount of x[0], x[1], ...
template <int kCount>
__device__ inline void butterflies(float (&x)[kCount], int below = kCount) {
#pragma unroll
  for (int half = 1; half < kCount; half *= 2) {
    if (half >= below) break;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i & half) continue;
      const float sum = __fadd_rn(x[i], x[i + half]);
      x[i + half] = __fsub_rn(x[i], x[i + half]);
      x[i] = sum;
    }
  }
}

// The stages inside a run of kCount floats, and the stages across two or four runs, by shuffles.
// The thread's lane is the run's number modulo 32.
template <int kCount>
__device__ inline void start_run(const HadamardLayout& h, float (&x)[kCount]) {
  butterflies(x, h.power);
  const int runs = h.power / kCount;  // in a Sylvester block
  if (runs != 2 && runs != 4) return;
#pragma unroll
  for (int distance = 1; distance <= 2; distance *= 2) {
    if (distance >= runs) break;
    const bool upper = threadIdx.x & distance;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float other = __shfl_xor_sync(~0u, x[i], distance);
      x[i] = upper ? __fsub_rn(other, x[i]) : __fadd_rn(x[i], other);
    }
  }
}

template <int kCount>
__device__ inline void store_column(float* column, int step, const float (&y)[kCount]) {
  step = forgotten(step);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    *column = y[i];
    column += step;
  }
}

// Stages stride, 2 stride, ... of blocks of kRadix * stride floats, of a stride that is a power of
// two.
template <int kRadix>
__device__ inline void sylvester_pass(float* row, const HadamardLayout& h, int stride_bits) {
  const int stride = 1 << stride_bits;
  const int step = h.place(stride);
#pragma unroll 1
  for (int q = threadIdx.x; q < h.n / kRadix; q += kHadamardThreads) {
    float* column = row + h.column(q, kRadix, stride, 1u << (32 - stride_bits));
    float x[kRadix];
#pragma unroll
    for (int i = 0; i < kRadix; ++i) x[i] = column[i * step];
    butterflies(x);
    store_column(column, step, x);
  }
  __syncthreads();
}

__device__ inline void sylvester_pass(float* row, const HadamardLayout& h, int stride_bits,
                                      int bits) {
  switch (bits) {
    case 3: return sylvester_pass<8>(row, h, stride_bits);
    case 4: return sylvester_pass<16>(row, h, stride_bits);
    default: return sylvester_pass<32>(row, h, stride_bits);
  }
}

// y = S x of a construction I for the columns of a thread. For each group of four inputs it
// computes eight sums, of which every row adds or subtracts one: 12 additions per group instead of
// 4 per row.
template <int kOrder>
__device__ inline void paley_pass(float* row, const HadamardLayout& h, int factor) {
  constexpr PaleyGroups<kOrder> kSigns = paley_groups<kOrder>();
  static_assert(kSigns.kStreams == 1);
  const int stride = h.stride[factor], step = h.place(stride);
#pragma unroll 1
  for (int q = threadIdx.x; q < h.n / kOrder; q += kHadamardThreads) {
    float* column = row + h.column(q, kOrder, stride, h.stride_inverse[factor]);
    float y[kOrder], x[4];
    const float* from = column;
    const auto load_group = [&] {
#pragma unroll
      for (int i = 0; i < 4; ++i, from += step) x[i] = *from;
    };
    load_group();
#pragma unroll
    for (int g = 0; g < kSigns.kGroups; ++g) {
      const float a = x[0], b = x[1], c = x[2], d = x[3];
      if (g + 1 < kSigns.kGroups) load_group();
      asm volatile("" ::: "memory");  // load one group ahead: all would fill the registers
      const float first[2] = {__fadd_rn(a, b), __fsub_rn(a, b)};
      const float second[2] = {__fadd_rn(c, d), __fsub_rn(c, d)};
      float sums[2][2][2];  // [b's sign against a's][d's against c's][c's against a's]
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        sums[e / 2][e % 2][0] = __fadd_rn(first[e / 2], second[e % 2]);
        sums[e / 2][e % 2][1] = __fsub_rn(first[e / 2], second[e % 2]);
      }
#pragma unroll
      for (int i = 0; i < kOrder; ++i) {
        const int e = kSigns.entry[g][i];
        const int na = e & 1, nb = e >> 1 & 1, nc = e >> 2 & 1, nd = e >> 3;
        const float sum = sums[na ^ nb][nc ^ nd][na ^ nc];
        const float term = na ? -sum : sum;
        y[i] = g == 0 ? term : __fadd_rn(y[i], term);
      }
    }
    store_column(column, step, y);
  }
  __syncthreads();
}

// Call before the first row of a block. The barrier that starts the row's stages orders the writes.
__device__ inline void prepare_transform(unsigned char* shared, const HadamardLayout& h) {
  for (int i = 0; i < h.factors; ++i) {
    if (!paley_in_thread(h.order[i])) build_positions(shared + h.row_bytes, h.tensor[i]);
  }
  __syncthreads();
  for (int i = 0; i < h.factors; ++i) {
    if (!paley_in_thread(h.order[i])) build_signs(shared + h.row_bytes, h.tensor[i]);
  }
}

// All stages after start_run. Starts with a barrier and ends with one. kTensor: with factors for
// the tensor cores. In the same instance their code would cost the other rows the second block per
// multiprocessor.
template <bool kTensor>
__device__ inline void finish_transform(unsigned char* shared, const HadamardLayout& h) {
  float* row = reinterpret_cast<float*>(shared);
  __syncthreads();
  const int run_bits = h.split ? 2 : 3;
  int left = __ffs(h.power) - 1 - run_bits;
  for (int stride_bits = run_bits; pass_bits(left) > 0;) {
    const int bits = pass_bits(left);
    sylvester_pass(row, h, stride_bits, bits);
    stride_bits += bits;
    left -= bits;
  }
  for (int i = 0; i < h.factors; ++i) {
    switch (h.order[i]) {
      case 12: paley_pass<12>(row, h, i); break;
      case 20: paley_pass<20>(row, h, i); break;
      case 28: paley_pass<28>(row, h, i); break;
      case 44: paley_pass<44>(row, h, i); break;
      default:
        if constexpr (kTensor) {
          paley_mma_pass(row, shared + h.row_bytes, h, i);
        }
        break;
    }
  }
}

}  // namespace resq::cuda
