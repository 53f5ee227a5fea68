// rms_norm: a block reads a row once and keeps it in registers. Bit for bit what the CPU computes.
#include <type_traits>

#include "cuda/pdl.cuh"
#include "cuda/row_launch.cuh"
#include "cuda/row_norm.cuh"
#include "ops/rms_norm/rms_norm.h"

namespace resq::cuda {
namespace {

template <class T, class W, int kHeld, bool kAligned>
__global__ void __launch_bounds__(kRowThreads) rms_norm_kernel(RmsNormParams p) {
  __shared__ SumExchange exchange;
  const int k = static_cast<int>(p.columns);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * k;
  const T* x = static_cast<const T*>(p.x) + first;
  T* y = static_cast<T*>(p.y) + first;
  const int chunks = (k + kChunkColumns - 1) / kChunkColumns;
  pdl_trigger();
  pdl_wait();

  const auto read_x = [=](int chunk) {
    return load_chunk<kAligned>(x + chunk * kChunkColumns, k - chunk * kChunkColumns);
  };
  HeldChunks<T, kHeld> row;
  constexpr bool kAny = std::is_same_v<W, AnyType>;
  NormWeights<W, kHeld, kAligned> weights(p.weight, p.weight_type, k);
  row.load(chunks, read_x);
  weights.load(chunks);
  SquareSums squares;
  for_each_chunk_or_zeros<kHeld>(chunks, [&](int slot, int chunk) {
    const Chunk<T>& h = row.get(slot, chunk, read_x);
#pragma unroll
    for (int i = 0; i < kChunkColumns; ++i) squares.add(i, h[i]);
  });
  share_sum(squares, exchange);
  __syncthreads();
  const float factor = inverse_rms(shared_sum(exchange), k, p.eps);
  for_each_chunk<kHeld, full_chunks<T>(kHeld)>(chunks, [&](int slot, int chunk) {
    const Chunk<T>& h = row.get(slot, chunk, read_x);
    float normed[kChunkColumns];
#pragma unroll
    for (int i = 0; i < kChunkColumns; ++i) normed[i] = __fmul_rn(h[i], factor);
    if (!kAny || p.weight != nullptr) weights.multiply(slot, chunk, normed);
    Chunk<T> rounded;
#pragma unroll
    for (int i = 0; i < kChunkColumns; i += 2) rounded.set(i, normed[i], normed[i + 1]);
    store_chunk<kAligned>(y + chunk * kChunkColumns, rounded, k - chunk * kChunkColumns);
  });
}

}  // namespace

void rms_norm(const RmsNormParams& p, Stream stream) {
  const auto launch = [&]<class T, class W, int kHeld, bool kAligned>() {
    launch_pdl("rms_norm", rms_norm_kernel<T, W, kHeld, kAligned>,
               {.x = static_cast<unsigned>(p.rows), .threads = kRowThreads}, stream, p);
  };
  // Read from memory in both passes, since no model is served with them: a weight in float32 or of
  // another type than x, none, and rows that are longer than 8192 columns.
  const MixedRows shape{.k_lo = 0, .k_hi = p.columns};
  launch_row_kernel(p.type, shape, {p.x, p.y, p.weight}, [&](auto t, auto held, auto aligned) {
    using T = decltype(t);
    constexpr bool kAligned = aligned.value;
    if constexpr (sizeof(T) == 2) {
      if (p.weight != nullptr && p.weight_type == p.type) {
        constexpr int kFits = held.value <= kMostHeldWeights ? held.value : 0;
        launch.template operator()<T, T, kFits, kAligned>();
        return;
      }
    }
    launch.template operator()<T, AnyType, 0, kAligned>();
  });
}

}  // namespace resq::cuda
