// mixed_quantize: a block reads a row into registers, finds the ranges of its two parts with one
// reduction and writes the codes. Memory-bound on every architecture; docs/notes/0010.
#include "cuda/pdl.cuh"
#include "cuda/row_launch.cuh"
#include "cuda/row_quantize.cuh"
#include "ops/mixed_quantize/mixed_quantize.h"

namespace resq::cuda {
namespace {

template <class T, int kHeld, bool kAligned>
__global__ void __launch_bounds__(kRowThreads) mixed_quantize_kernel(MixedQuantizeParams p) {
  __shared__ RangeExchange<kRowWarps> exchange;
  const int k_lo = static_cast<int>(p.out.k_lo), k = k_lo + static_cast<int>(p.out.k_hi);
  const T* x = static_cast<const T*>(p.x) + static_cast<int64_t>(blockIdx.x) * k;
  const int chunks = (k + kChunkColumns - 1) / kChunkColumns;
  HeldChunks<T, kHeld> row;
  pdl_trigger();
  pdl_wait();

  const auto read = [&](int chunk) {
    return load_chunk<kAligned>(x + chunk * kChunkColumns, k - chunk * kChunkColumns);
  };
  row.load(chunks, read);

  ChunkRanges<T, kAligned> of_thread;
  for_each_chunk_or_zeros<kHeld>(chunks, [&](int slot, int chunk) {
    of_thread.add(k_lo, chunk * kChunkColumns, row.get(slot, chunk, read));
  });
  Range ranges[2];
  of_thread.get(ranges);
  reduce_ranges(ranges, exchange);

  const RowCodes codes(ranges, p.out, blockIdx.x);
  store_chunks<T, kHeld, kAligned>(codes, chunks,
                                   [&](int slot, int chunk) { return row.get(slot, chunk, read); });
}

}  // namespace

void mixed_quantize(const MixedQuantizeParams& p, Stream stream) {
  launch_row_kernel(p.x_type, p.out, {p.x}, [&](auto t, auto held, auto aligned) {
    const auto kernel =
        mixed_quantize_kernel<decltype(t), decltype(held)::value, decltype(aligned)::value>;
    launch_pdl("mixed_quantize", kernel,
               {.x = static_cast<unsigned>(p.rows), .threads = kRowThreads}, stream, p);
  });
}

}  // namespace resq::cuda
