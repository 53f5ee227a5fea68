// The vector body of mixed_gemm on CPUs. Included inside the namespace of an instruction set. M
// counts rows of activations, N rows of weights, K what is summed over (plan.h).
//
// A set's tile_*.h offers
//   kTileM                            M of the largest tile
//   kPrefetchBytes                    how far ahead a single tile prefetches its weights; 0: off
//   kUsesLargest                      whether sum_products reads `largest`
//   sum_products<kM, kHigh>(weight, words, groups, largest, prefetch, out)
//                                     sums of kM rows x 32 of N over `groups` of 8 of K, to
//                                     uint32_t[kM][32]; `weight`: groups of the packed layout (128
//                                     bytes, or 256 of the high part), `words`: activation codes in
//                                     the order [K / 4][kM][4], of a magnitude of at most
//                                     `largest`; calls prefetch(group) once for each of them

// Bytes of a group of a block.
constexpr int64_t group_bytes(bool high) { return kPackedGroupK * kPackedBlockN / (high ? 1 : 2); }

#if defined(RESQ_ISA_AVX512VNNI)
#include "ops/mixed_gemm/cpu/tile_avx512vnni.h"
#elif defined(RESQ_ISA_AVX2)
#include "ops/mixed_gemm/cpu/tile_avx2.h"
#else
#include "ops/mixed_gemm/cpu/tile_scalar.h"
#endif

#include "ops/mixed_gemm/cpu/epilogue.h"

// Activations of a panel: for each tile of kM rows, words of 4 codes in the order [K / 4][kM], so
// that a tile reads one stream whatever kM is. The low parts of all tiles come first.
struct Panel {
  int64_t index = -1, first_m = 0, m = 0, tiles = 0;
  int largest_lo = 0, largest_hi = 0;  // magnitude of a code, with kUsesLargest
  RowScales* scales;
  int8_t* lo;
  int8_t* hi;
  int8_t* row_codes;  // from read_row, before their words are spread

  // `padded_k`: rounded up to whole groups of the packed weight.
  Panel(int64_t max_m, int64_t padded_k_lo, int64_t padded_k_hi) {
    constexpr int64_t kScaleFloats = sizeof(RowScales) / sizeof(float);
    const int64_t bytes = (max_m + 1) * (padded_k_lo + padded_k_hi);
    float* scratch = thread_row_buffer().floats(max_m * kScaleFloats + ceil_div(bytes, 4));
    scales = reinterpret_cast<RowScales*>(scratch);
    lo = reinterpret_cast<int8_t*>(scratch + max_m * kScaleFloats);
    hi = lo + max_m * padded_k_lo;
    row_codes = hi + max_m * padded_k_hi;
  }

  int64_t tile_begin(int64_t tile) const { return tile * m / tiles; }
};

// Spreads the words of `padded_k` codes, `tile_m` words apart.
void spread_words(const int8_t* codes, int64_t padded_k, int64_t tile_m, int8_t* words) {
  for (int64_t i = 0; i < padded_k / kPackedWordBytes; ++i) {
    std::memcpy(words + i * tile_m * kPackedWordBytes, codes + i * kPackedWordBytes,
                kPackedWordBytes);
  }
}

// The largest magnitude of `count` codes.
int largest(const int8_t* codes, int64_t count) {
  int8_t low = 0, high = 0;
  for (int64_t i = 0; i < count; ++i) {
    low = std::min(low, codes[i]);
    high = std::max(high, codes[i]);
  }
  return std::max<int>(-low, high);
}

void fill_panel(const MixedGemmParams& p, const MixedGemmPlan& plan, int64_t index, Panel& panel) {
  const int64_t padded_k_lo = packed_k(p.k_lo), padded_k_hi = packed_k(p.k_hi);
  panel.index = index;
  panel.first_m = plan.first_m(index);
  panel.m = std::min(plan.panel_m, p.m - panel.first_m);
  panel.tiles = ceil_div(panel.m, plan.tile_m);
  panel.largest_lo = panel.largest_hi = 0;
  for (int64_t tile = 0; tile < panel.tiles; ++tile) {
    const int64_t begin = panel.tile_begin(tile), end = panel.tile_begin(tile + 1);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t tile_m = end - begin, word = (i - begin) * kPackedWordBytes;
      panel.scales[i] = read_row(p, panel.first_m + i, padded_k_lo, padded_k_hi, panel.row_codes);
      const int8_t* hi = panel.row_codes + padded_k_lo;
      if constexpr (kUsesLargest) {
        panel.largest_lo = std::max(panel.largest_lo, largest(panel.row_codes, padded_k_lo));
        panel.largest_hi = std::max(panel.largest_hi, largest(hi, padded_k_hi));
      }
      spread_words(panel.row_codes, padded_k_lo, tile_m, panel.lo + begin * padded_k_lo + word);
      spread_words(hi, padded_k_hi, tile_m, panel.hi + begin * padded_k_hi + word);
    }
  }
}

// Sums of kM rows of activations x 32 of N over one part of K: [kM][kBlockN]. Prefetches `ahead` at
// half the rate at which `weight` is consumed; without `ahead`, this stream of weights itself.
template <int kM, bool kHigh>
inline void accumulate(const uint8_t* weight, const int8_t* words, int64_t k, int largest,
                       const uint8_t* ahead, uint32_t* out) {
  constexpr int64_t kBytes = group_bytes(kHigh);
  const auto prefetch = [=](int64_t group) {
    if (ahead) {
      for (int64_t line = 0; line < kBytes / 2; line += 64) {
        __builtin_prefetch(ahead + group * kBytes / 2 + line, 0, 2);
      }
    } else if constexpr (kPrefetchBytes > 0) {
      for (int64_t line = 0; line < kBytes; line += 64) {
        __builtin_prefetch(weight + group * kBytes + kPrefetchBytes + line);
      }
    }
  };
  sum_products<kM, kHigh>(weight, words, packed_k(k) / kPackedGroupK, largest, prefetch, out);
}

template <int kM>
void run_tile(const MixedGemmParams& p, const Panel& panel, int64_t first, const uint8_t* weight,
              const uint8_t* ahead, const BlockScales& c) {
  alignas(64) uint32_t sums_lo[kM][kBlockN], sums_hi[kM][kBlockN];
  // Else finish_row waits for every line that it writes (AVX2, K = 576: 12 %).
  const int64_t bytes = float_bytes(p.out_type);
  const char* out = static_cast<const char*>(p.out) + c.first * bytes;
  for (int m = 0; m < kM; ++m) {
    __builtin_prefetch(out + (panel.first_m + first + m) * p.n * bytes, 1);
  }
  accumulate<kM, false>(weight, panel.lo + first * packed_k(p.k_lo), p.k_lo, panel.largest_lo,
                        ahead, sums_lo[0]);
  accumulate<kM, true>(weight + packed_block_lo_bytes(p.k_lo), panel.hi + first * packed_k(p.k_hi),
                       p.k_hi, panel.largest_hi,
                       ahead ? ahead + packed_block_lo_bytes(p.k_lo) / 2 : nullptr, sums_hi[0]);
  for (int m = 0; m < kM; ++m) {
    finish_row(p, panel.first_m + first + m, panel.scales[first + m], sums_lo[m], sums_hi[m], c);
  }
}

using TileKernel = void (*)(const MixedGemmParams&, const Panel&, int64_t, const uint8_t*,
                            const uint8_t*, const BlockScales&);

template <int... kMMinusOne>
constexpr std::array<TileKernel, sizeof...(kMMinusOne)> tile_kernels(
    std::integer_sequence<int, kMMinusOne...>) {
  return {run_tile<kMMinusOne + 1>...};
}

// Scales and sums of the block that is multiplied next, if there is one. Loading them when it
// begins was 6 % of a decode step: they lie apart from the weights, and memory is waited for twice
// a block (SmolLM2, one thread, Zen 3).
void prefetch_block_scales(const MixedGemmParams& p, int64_t block) {
  const int64_t first = 2 * block * kBlockN, last = 2 * std::min((block + 1) * kBlockN, p.n);
  for (int64_t i = first; i < last; i += 16) {
    __builtin_prefetch(p.weight_scale + i);
    __builtin_prefetch(p.weight_sum + i);
  }
}

// Tasks [begin, end) of the plan.
void run_tasks(const MixedGemmTasks& tasks, int64_t begin, int64_t end) {
  static constexpr auto kTiles = tile_kernels(std::make_integer_sequence<int, kTileM>());
  const MixedGemmParams& p = tasks.gemm;
  const MixedGemmPlan& plan = tasks.plan;
  Panel panel(plan.panel_m, packed_k(p.k_lo), packed_k(p.k_hi));
  BlockScales scales;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t block = task % plan.blocks;
    if (task / plan.blocks != panel.index) fill_panel(p, plan, task / plan.blocks, panel);
    load_block_scales(p, block, scales);
    prefetch_block_scales(p, block + 1);
    const int64_t block_bytes = packed_block_bytes(p.k_lo, p.k_hi);
    const uint8_t* weight = p.packed_weight + block * block_bytes;
    for (int64_t tile = 0; tile < panel.tiles; ++tile) {
      // With more than one tile, memory would idle while the later tiles read the block from the
      // cache, so the first two tiles prefetch half of the next block each (M = 16: 10 % faster). A
      // single tile is one stream, which the hardware's prefetchers follow (kPrefetchBytes).
      const bool fetches = panel.tiles > 1 && tile < 2 && block + 1 < plan.blocks;
      const uint8_t* ahead = fetches ? weight + block_bytes + tile * block_bytes / 2 : nullptr;
      const int64_t first = panel.tile_begin(tile);
      kTiles[panel.tile_begin(tile + 1) - first - 1](p, panel, first, weight, ahead, scales);
    }
  }
}
