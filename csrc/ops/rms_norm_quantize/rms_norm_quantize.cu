// rms_norm_quantize: a block reads a row (and the residual) once, keeps it in registers, and writes
// the sum and the codes. Bit for bit what the CPU computes. docs/notes/0010.
#include <type_traits>

#include "cuda/pdl.cuh"
#include "cuda/row_launch.cuh"
#include "cuda/row_norm.cuh"
#include "cuda/row_quantize.cuh"
#include "ops/rms_norm_quantize/rms_norm_quantize.h"

namespace resq::cuda {
namespace {

struct Exchange {
  SumExchange sum;
  RangeExchange<kRowWarps> ranges;
};

struct Normalized {
  float y[kChunkColumns];
  __device__ float operator[](int i) const { return y[i]; }
};

template <class T, class W, int kHeld, bool kAligned>
__global__ void __launch_bounds__(kRowThreads) rms_norm_quantize_kernel(RmsNormQuantizeParams p) {
  __shared__ Exchange exchange;
  const int k_lo = static_cast<int>(p.out.k_lo), k = k_lo + static_cast<int>(p.out.k_hi);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * k;
  const T* x = static_cast<const T*>(p.x) + first;
  const T* residual = static_cast<const T*>(p.residual) + first;
  T* new_residual = static_cast<T*>(p.new_residual) + first;
  const int chunks = (k + kChunkColumns - 1) / kChunkColumns;
  pdl_trigger();
  pdl_wait();

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
  NormWeights<W, kHeld, kAligned> weights(p.weight, p.weight_type, k);
  if (p.residual) other.load(chunks, read_residual);
  row.load(chunks, read_x);
  weights.load(chunks);
  if (p.residual) {
    for_each_chunk_or_zeros<kHeld>(chunks, [&](int slot, int chunk) {
      Chunk<T> sum = row.get(slot, chunk, read_x);
      const Chunk<T>& b = other.get(slot, chunk, read_residual);
#pragma unroll
      for (int i = 0; i < kChunkColumns; i += 2) {
        sum.set(i, __fadd_rn(sum[i], b[i]), __fadd_rn(sum[i + 1], b[i + 1]));
      }
      row.set(slot, sum);
      if (chunk >= chunks) return;
      store_chunk<kAligned>(new_residual + chunk * kChunkColumns, sum, k - chunk * kChunkColumns);
    });
  }

  // Without a weight the extremes of y are those of h times the factor: one reduction is enough.
  constexpr bool kWeighted = !std::is_same_v<W, Ones>;
  SquareSums squares;
  ChunkRanges<T, kAligned> of_thread;
  for_each_chunk_or_zeros<kHeld>(chunks, [&](int slot, int chunk) {
    const Chunk<T>& h = row.get(slot, chunk, read_sum);
#pragma unroll
    for (int i = 0; i < kChunkColumns; ++i) squares.add(i, h[i]);
    if constexpr (!kWeighted) of_thread.add(k_lo, chunk * kChunkColumns, h);
  });
  share_sum(squares, exchange.sum);
  Range ranges[2];
  if constexpr (kWeighted) {
    __syncthreads();
  } else {
    of_thread.get(ranges);
    reduce_ranges(ranges, exchange.ranges);
  }
  const float factor = inverse_rms(shared_sum(exchange.sum), k, p.eps);

  const auto y = [&](int slot, int chunk) {
    const Chunk<T>& h = row.get(slot, chunk, read_sum);
    Normalized result;
#pragma unroll
    for (int i = 0; i < kChunkColumns; ++i) result.y[i] = __fmul_rn(h[i], factor);
    weights.multiply(slot, chunk, result.y);
    return result;
  };
  if constexpr (kWeighted) {
    // 0 times an infinite factor is NaN, but so are, or infinite, the row's own numbers.
    for_each_chunk_or_zeros<kHeld>(chunks, [&](int slot, int chunk) {
      add_to_ranges<kAligned>(ranges, k_lo, chunk * kChunkColumns, y(slot, chunk));
    });
    reduce_ranges(ranges, exchange.ranges);
  } else {
    for (Range& range : ranges) {
      range = {__fmul_rn(range.min, factor), __fmul_rn(range.max, factor)};
    }
  }

  const RowCodes codes(ranges, p.out, blockIdx.x);
  store_chunks<T, kHeld, kAligned>(codes, chunks, y);
}

}  // namespace

void rms_norm_quantize(const RmsNormQuantizeParams& p, Stream stream) {
  const auto launch = [&]<class T, class W, int kHeld, bool kAligned>() {
    launch_pdl("rms_norm_quantize", rms_norm_quantize_kernel<T, W, kHeld, kAligned>,
               {.x = static_cast<unsigned>(p.rows), .threads = kRowThreads}, stream, p);
  };
  // Read from memory in every pass, since no model is served with them: a weight in float32 or of
  // another type than x, and rows with a weight that are longer than 8192 columns.
  launch_row_kernel(p.x_type, p.out, {p.x, p.residual, p.new_residual, p.weight},
                    [&](auto t, auto held, auto aligned) {
                      using T = decltype(t);
                      constexpr int kHeld = held.value;
                      constexpr bool kAligned = aligned.value;
                      if (p.weight == nullptr) {
                        launch.template operator()<T, Ones, kHeld, kAligned>();
                        return;
                      }
                      if constexpr (sizeof(T) == 2) {
                        if (p.weight_type == p.x_type) {
                          constexpr int kFits = kHeld <= kMostHeldWeights ? kHeld : 0;
                          launch.template operator()<T, T, kFits, kAligned>();
                          return;
                        }
                      }
                      launch.template operator()<T, AnyType, 0, kAligned>();
                    });
}

}  // namespace resq::cuda
