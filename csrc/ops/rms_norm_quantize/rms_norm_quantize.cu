// rms_norm_quantize: a block reads a row (and the residual) once, keeps it in registers, and writes
// the sum and the codes. Bit for bit what the CPU computes. docs/notes/0010.
#include "cuda/pdl.cuh"
#include "cuda/row_launch.cuh"
#include "cuda/row_quantize.cuh"
#include "ops/rms_norm_quantize/rms_norm_quantize.h"

namespace resq::cuda {
namespace {

struct Exchange {
  SumExchange sum;
  RangeExchange<kRowWarps> ranges;
};

// y *= weight[column .. column + 8).
template <bool kAligned, class W>
__device__ inline void multiply(float (&y)[kChunkColumns], const void* weight, int column, int k) {
  const Chunk<W> w = load_chunk<kAligned>(static_cast<const W*>(weight) + column, k - column);
#pragma unroll
  for (int i = 0; i < kChunkColumns; ++i) y[i] = __fmul_rn(y[i], w[i]);
}

struct Normalized {
  float y[kChunkColumns];
  __device__ float operator[](int i) const { return y[i]; }
};

// h * inverse_rms, times the weight if there is one.
template <bool kAligned, class T>
__device__ inline Normalized normalize(const Chunk<T>& h, float inverse_rms,
                                       const RmsNormQuantizeParams& p, int column, int k) {
  Normalized result;
#pragma unroll
  for (int i = 0; i < kChunkColumns; ++i) result.y[i] = __fmul_rn(h[i], inverse_rms);
  if (p.weight == nullptr) return result;
  switch (p.weight_type) {
    case FloatType::kFloat32: multiply<kAligned, float>(result.y, p.weight, column, k); break;
    case FloatType::kFloat16: multiply<kAligned, Half>(result.y, p.weight, column, k); break;
    case FloatType::kBFloat16: multiply<kAligned, BFloat16>(result.y, p.weight, column, k); break;
  }
  return result;
}

template <class T, int kHeld, bool kAligned>
__global__ void __launch_bounds__(kRowThreads) rms_norm_quantize_kernel(RmsNormQuantizeParams p) {
  __shared__ Exchange exchange;
  const int k_lo = static_cast<int>(p.out.k_lo), k = k_lo + static_cast<int>(p.out.k_hi);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * k;
  const T* x = static_cast<const T*>(p.x) + first;
  const T* residual = static_cast<const T*>(p.residual) + first;
  T* new_residual = static_cast<T*>(p.new_residual) + first;
  const int chunks = (k + kChunkColumns - 1) / kChunkColumns;
  pdl_wait();
  pdl_trigger();

  const auto read_from = [&](const T* from) {
    return [=](int chunk) {
      return load_chunk<kAligned>(from + chunk * kChunkColumns, k - chunk * kChunkColumns);
    };
  };
  const auto read_x = read_from(x), read_residual = read_from(residual);
  // After the first pass; a thread reads back what it has written itself.
  const auto read_sum = read_from(p.residual ? new_residual : x);

  // All loads before the first store: nothing tells the compiler that the rows do not overlap.
  HeldChunks<T, kHeld> row, other;
  for_each_chunk<kHeld>(chunks, [&](int slot, int chunk) { row.load(slot, chunk, read_x); });
  if (p.residual) {
    for_each_chunk<kHeld>(chunks,
                          [&](int slot, int chunk) { other.load(slot, chunk, read_residual); });
    for_each_chunk<kHeld>(chunks, [&](int slot, int chunk) {
      Chunk<T> sum = row.get(slot, chunk, read_x);
      const Chunk<T>& b = other.get(slot, chunk, read_residual);
#pragma unroll
      for (int i = 0; i < kChunkColumns; i += 2) {
        sum.set(i, __fadd_rn(sum[i], b[i]), __fadd_rn(sum[i + 1], b[i + 1]));
      }
      row.set(slot, sum);
      store_chunk<kAligned>(new_residual + chunk * kChunkColumns, sum, k - chunk * kChunkColumns);
    });
  }

  // Without a weight the extremes of y are those of h times inverse_rms: one reduction is enough.
  const bool weighted = p.weight != nullptr;
  SquareSums squares;
  Range ranges[2];
  for_each_chunk<kHeld>(chunks, [&](int slot, int chunk) {
    const Chunk<T>& h = row.get(slot, chunk, read_sum);
#pragma unroll
    for (int i = 0; i < kChunkColumns; ++i) squares.add(i, h[i]);
    if (!weighted) add_to_ranges<kAligned>(ranges, k_lo, chunk * kChunkColumns, h);
  });
  share_sum(squares, exchange.sum);
  if (weighted) {
    __syncthreads();
  } else {
    reduce_ranges(ranges, exchange.ranges);
  }
  const float mean = __fdiv_rn(shared_sum(exchange.sum), static_cast<float>(k));
  const float inverse_rms = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, p.eps)));

  const auto y = [&](int slot, int chunk) {
    return normalize<kAligned>(row.get(slot, chunk, read_sum), inverse_rms, p,
                               chunk * kChunkColumns, k);
  };
  if (weighted) {
    for_each_chunk<kHeld>(chunks, [&](int slot, int chunk) {
      add_to_ranges<kAligned>(ranges, k_lo, chunk * kChunkColumns, y(slot, chunk));
    });
    reduce_ranges(ranges, exchange.ranges);
  } else {
    for (Range& range : ranges) {
      range = {__fmul_rn(range.min, inverse_rms), __fmul_rn(range.max, inverse_rms)};
    }
  }

  const RowCodes codes(ranges, p.out, blockIdx.x);
  for_each_chunk<kHeld>(chunks, [&](int slot, int chunk) {
    codes.store<kAligned>(chunk * kChunkColumns, y(slot, chunk));
  });
}

}  // namespace

void rms_norm_quantize(const RmsNormQuantizeParams& p, Stream stream) {
  launch_row_kernel(
      p.x_type, p.out, {p.x, p.residual, p.new_residual, p.weight},
      [&](auto t, auto held, auto aligned) {
        const auto kernel =
            rms_norm_quantize_kernel<decltype(t), decltype(held)::value, decltype(aligned)::value>;
        launch_pdl("rms_norm_quantize", kernel,
                   {.x = static_cast<unsigned>(p.rows), .threads = kRowThreads}, stream, p);
      });
}

}  // namespace resq::cuda
