// One launch, bound by memory: a warp copies one tile of K, one of V and their ranges to shared
// memory, 16 bytes a lane, then each lane computes eight dims of a token and stores 16 bytes (32 as
// float32); a warp's stores are whole rows of a head. Tiles past the length are not read.
#include <cuda_runtime.h>

#include <type_traits>

#include "cuda/chunk.cuh"
#include "cuda/copy_sm80.cuh"
#include "ops/kv_dequantize/kv_dequantize.h"
#include "ops/kv_dequantize/kv_dequantize_runs.h"

namespace resq::cuda {
namespace {

constexpr int kWarps = 4;
template <int kHeadDim>
__device__ constexpr KvRuns<kHeadDim> kRuns;

template <int kHeadDim>
struct alignas(16) Staged {
  uint8_t k[kKvTileBytes];
  uint8_t v[kKvTileBytes];
  uint8_t ranges[KvLayout<kHeadDim>::kTileTokens * kKvMetadataBytes];
};

template <int kBytes>
__device__ void start_copy(uint8_t* to, const uint8_t* from) {
#pragma unroll
  for (int first = 0; first < kBytes; first += 32 * 16) {
    const int at = first + threadIdx.x % 32 * 16;
    if (at < kBytes) copy_async_16(to + at, from + at);
  }
}

// Starts the copies of the tile at token `position` of a (page, head) chunk.
template <int kHeadDim>
__device__ void stage(const uint8_t* chunk, int64_t page_size, int64_t position,
                      Staged<kHeadDim>& to) {
  start_copy<kKvTileBytes>(to.k, chunk + kv_k_tile_byte<kHeadDim>(position));
  start_copy<kKvTileBytes>(to.v, chunk + kv_v_tile_byte<kHeadDim>(page_size, position));
  start_copy<sizeof(to.ranges)>(to.ranges, chunk + kv_metadata_byte<kHeadDim>(page_size, position));
  commit_copies();
}

struct Range {
  float scale, offset;
};
__device__ Range load_range(const uint8_t* stored) {
  const __half2 pair = *reinterpret_cast<const __half2*>(stored);
  return {__low2float(pair) / kKvScaleFactor, __high2float(pair)};
}

__device__ float dequantize(const uint8_t* tile, KvBits at, int levels, Range range) {
  const uint32_t word = *reinterpret_cast<const uint32_t*>(tile + at.word);
  const int code = static_cast<int>(word >> at.shift) & levels;
  return static_cast<float>(code) * range.scale + range.offset;
}

template <class T>
__device__ float saturate(float x) {
  return std::is_same_v<T, Half> && x > kKvLargest ? kKvLargest : x;  // NaN stays NaN
}

template <int kHeadDim, class T>
__global__ void __launch_bounds__(kWarps * 32)
    kv_dequantize_kernel(const __grid_constant__ KvDequantizeParams p) {
  using Layout = KvLayout<kHeadDim>;
  constexpr int kRowLanes = kHeadDim / kChunkColumns,
                kTokens = 32 / kRowLanes;  // of a warp's store
  __shared__ Staged<kHeadDim> all[kWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t index = blockIdx.x * kWarps + warp;
  if (index >= p.items()) return;
  const KvDequantizeItem item(p, index);
  const int64_t length = p.seq_lens[item.sequence];
  if (length < 0 || length > p.max_tokens || length > p.max_pages * p.page_size) __trap();

  Staged<kHeadDim>& staged = all[warp];
  if (item.first_token < length) {
    const auto page_size = static_cast<uint32_t>(p.page_size);
    const uint32_t page_index = item.first_token / page_size;
    const int64_t page = p.block_table[item.sequence * p.max_pages + page_index];
    if (page < 0 || page >= p.pages) __trap();
    stage<kHeadDim>(p.cache + (page * p.n_kv + item.head) * p.page_size * Layout::kTokenBytes,
                    p.page_size, item.first_token - page_index * page_size, staged);
    wait_copies<0>();
    __syncwarp();
  }

  const int run = lane % kRowLanes;
  const bool high = run * kChunkColumns >= Layout::kLowDims;
  const int levels = high ? kKvHighLevels : kKvLowLevels;
  for (int octet = 0; octet < Layout::kTileTokens / 8; ++octet) {
    const KvRun k_run = kRuns<kHeadDim>.k[octet][run], v_run = kRuns<kHeadDim>.v[octet][run];
#pragma unroll
    for (int first = 0; first < 8; first += kTokens) {
      const int t = first + lane / kRowLanes;
      const int64_t token = int64_t{item.first_token} + 8 * octet + t;
      if (token >= p.max_tokens) return;
      const int64_t row = (item.sequence * p.max_tokens + token) * p.n_kv + item.head;
      const int64_t out = row * kRowLanes + run;
      Chunk<T> k = {}, v = {};
      if (token < length) {
        const uint8_t* ranges = staged.ranges + (8 * octet + t) * kKvMetadataBytes + 4 * high;
        const Range k_range = load_range(ranges), v_range = load_range(ranges + 8);
        const auto key = [&](int j) {
          return saturate<T>(dequantize(staged.k, k_run.k(t, j), levels, k_range));
        };
        const auto value = [&](int j) {
          return saturate<T>(dequantize(staged.v, v_run.v(t, j), levels, v_range));
        };
#pragma unroll
        for (int j = 0; j < kChunkColumns; j += 2) {
          k.set(j, key(j), key(j + 1));
          v.set(j, value(j), value(j + 1));
        }
      }
      store_chunk<true>(static_cast<T*>(p.k) + out * kChunkColumns, k, kChunkColumns);
      store_chunk<true>(static_cast<T*>(p.v) + out * kChunkColumns, v, kChunkColumns);
    }
  }
}

template <int kHeadDim>
void launch(const KvDequantizeParams& p, Stream stream) {
  auto* kernel = kv_dequantize_kernel<kHeadDim, float>;
  if (p.type == FloatType::kFloat16) kernel = kv_dequantize_kernel<kHeadDim, Half>;
  if (p.type == FloatType::kBFloat16) kernel = kv_dequantize_kernel<kHeadDim, BFloat16>;
  const auto blocks = static_cast<unsigned>(ceil_div(p.items(), kWarps));
  launch_kernel("kv_dequantize", kernel, {.x = blocks, .threads = kWarps * 32}, stream, p);
}

}  // namespace

void kv_dequantize(const KvDequantizeParams& p, Stream stream) {
  if (p.items() == 0) return;
  p.head_dim == 128 ? launch<128>(p, stream) : launch<64>(p, stream);
}

}  // namespace resq::cuda
