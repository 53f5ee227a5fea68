// The vector body of mixed_gemm on CPUs. An ISA file defines `Simd` inside its namespace and its
// target region and includes this file there, so that it is compiled once for each instruction set.
// All but the entry point is local to the file: other operators share the namespaces.
//
// Simd offers:
//   kTileRows                         rows of the largest tile
//   kPrefetchBytes                    how far ahead a single tile asks for its weights; 0: not
//   Tile<kRows>                       kRows x 32 int32 sums, zero at first, with
//     add_group<kHigh>(weight, words)   adds 8 columns of K; `weight` is a group of the packed
//                                       layout (128 bytes, or 256 of the high part), `words` the
//                                       activation codes in the order [2][kRows][4]
//     store(uint32_t[kRows][32])
// and cpu/simd_*.h gives load and store of floats in every output type.

#include "ops/mixed_gemm/mixed_gemm_rows.h"

namespace {

// Activations of a panel: for each tile of R rows, words of 4 codes in the order [K / 4][R], so
// that a tile reads one stream whatever R is. The low parts of all tiles come first.
struct Panel {
  int64_t index = -1, first_row = 0, rows = 0, tiles = 0;
  Row* row;
  int8_t* lo;
  int8_t* hi;
  int8_t* row_codes;  // one row in its natural order, before its words are spread

  Panel(int64_t max_rows, int64_t lo_columns, int64_t hi_columns) {
    constexpr int64_t kRowFloats = sizeof(Row) / sizeof(float);
    const int64_t bytes = max_rows * (lo_columns + hi_columns) + std::max(lo_columns, hi_columns);
    float* scratch = thread_row_buffer().floats(max_rows * kRowFloats + ceil_div(bytes, 4));
    row = reinterpret_cast<Row*>(scratch);
    lo = reinterpret_cast<int8_t*>(scratch + max_rows * kRowFloats);
    hi = lo + max_rows * lo_columns;
    row_codes = hi + max_rows * hi_columns;
  }

  int64_t tile_begin(int64_t tile) const { return tile * rows / tiles; }
};

// Spreads the words of `columns` codes, `tile_rows` apart.
void spread_words(const int8_t* codes, int64_t columns, int64_t tile_rows, int8_t* words) {
  for (int64_t i = 0; i < columns / kPackedWordBytes; ++i) {
    std::memcpy(words + i * tile_rows * kPackedWordBytes, codes + i * kPackedWordBytes,
                kPackedWordBytes);
  }
}

void fill_panel(const MixedGemmParams& p, const MixedGemmPlan& plan, int64_t index, Panel& panel) {
  const int64_t lo_columns = packed_columns(p.k_lo), hi_columns = packed_columns(p.k_hi);
  panel.index = index;
  panel.first_row = plan.first_row(index);
  panel.rows = std::min(plan.panel_rows, p.rows - panel.first_row);
  panel.tiles = ceil_div(panel.rows, plan.tile_rows);
  for (int64_t tile = 0; tile < panel.tiles; ++tile) {
    const int64_t begin = panel.tile_begin(tile), end = panel.tile_begin(tile + 1);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t m = panel.first_row + i, word = (i - begin) * kPackedWordBytes;
      unpack_row(p, m, panel.row_codes);
      const int32_t sum_lo = pad_and_sum(panel.row_codes, p.k_lo, lo_columns);
      spread_words(panel.row_codes, lo_columns, end - begin, panel.lo + begin * lo_columns + word);
      std::copy_n(p.q_hi + m * p.k_hi, p.k_hi, panel.row_codes);
      const int32_t sum_hi = pad_and_sum(panel.row_codes, p.k_hi, hi_columns);
      spread_words(panel.row_codes, hi_columns, end - begin, panel.hi + begin * hi_columns + word);
      panel.row[i] = make_row(p.params + 4 * m, sum_lo, sum_hi);
    }
  }
}

// Sums of kRows activation rows x 32 columns over one part of K: [kRows][kBlock]. Each step asks
// for half as many bytes of `ahead` as it uses of `weight`; without, for what it will use later.
template <int kRows, bool kHigh>
inline void accumulate(const uint8_t* weight, const int8_t* words, int64_t k, const uint8_t* ahead,
                       uint32_t* out) {
  typename Simd::template Tile<kRows> tile;
  constexpr int64_t kGroupBytes = kPackedGroupColumns * kBlock / (kHigh ? 1 : 2);
  const int64_t groups = packed_columns(k) / kPackedGroupColumns;
  for (int64_t group = 0; group < groups; ++group) {
    if (ahead) {
      for (int64_t line = 0; line < kGroupBytes / 2; line += 64) {
        __builtin_prefetch(ahead + group * kGroupBytes / 2 + line, 0, 2);
      }
    } else if constexpr (Simd::kPrefetchBytes > 0) {
      for (int64_t line = 0; line < kGroupBytes; line += 64) {
        __builtin_prefetch(weight + Simd::kPrefetchBytes + line);
      }
    }
    tile.template add_group<kHigh>(weight, words);
    weight += kGroupBytes;
    words += kPackedGroupColumns * kRows;
  }
  tile.store(out);
}

template <int kRows>
void run_tile(const MixedGemmParams& p, const Panel& panel, int64_t first, const uint8_t* weight,
              const uint8_t* ahead, const Columns& c) {
  alignas(64) uint32_t sums_lo[kRows][kBlock], sums_hi[kRows][kBlock];
  accumulate<kRows, false>(weight, panel.lo + first * packed_columns(p.k_lo), p.k_lo, ahead,
                           sums_lo[0]);
  accumulate<kRows, true>(weight + packed_block_lo_bytes(p.k_lo),
                          panel.hi + first * packed_columns(p.k_hi), p.k_hi,
                          ahead ? ahead + packed_block_lo_bytes(p.k_lo) / 2 : nullptr, sums_hi[0]);
  for (int r = 0; r < kRows; ++r) {
    finish_row(p, panel.first_row + first + r, panel.row[first + r], sums_lo[r], sums_hi[r], c);
  }
}

using TileKernel = void (*)(const MixedGemmParams&, const Panel&, int64_t, const uint8_t*,
                            const uint8_t*, const Columns&);

template <int... kRowsMinusOne>
constexpr std::array<TileKernel, sizeof...(kRowsMinusOne)> tile_kernels(
    std::integer_sequence<int, kRowsMinusOne...>) {
  return {run_tile<kRowsMinusOne + 1>...};
}

}  // namespace

void mixed_gemm_tasks(const MixedGemmTasks& tasks, int64_t begin, int64_t end) {
  static constexpr auto kTiles = tile_kernels(std::make_integer_sequence<int, Simd::kTileRows>());
  const MixedGemmParams& p = tasks.gemm;
  const MixedGemmPlan& plan = tasks.plan;
  Panel panel(plan.panel_rows, packed_columns(p.k_lo), packed_columns(p.k_hi));
  Columns columns;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t block = task % plan.blocks;
    if (task / plan.blocks != panel.index) fill_panel(p, plan, task / plan.blocks, panel);
    load_columns(p, block, columns);
    const int64_t block_bytes = packed_block_bytes(p.k_lo, p.k_hi);
    const uint8_t* weight = p.packed_weight + block * block_bytes;
    for (int64_t tile = 0; tile < panel.tiles; ++tile) {
      // With more than one tile the memory would idle while the others read the block from the
      // cache: the first two fetch half of the next block each (M = 16: 10 % faster). A single tile
      // is one stream, which the hardware's prefetchers follow (Simd::kPrefetchBytes).
      const bool fetches = panel.tiles > 1 && tile < 2 && block + 1 < plan.blocks;
      const uint8_t* ahead = fetches ? weight + block_bytes + tile * block_bytes / 2 : nullptr;
      const int64_t first = panel.tile_begin(tile);
      kTiles[panel.tile_begin(tile + 1) - first - 1](p, panel, first, weight, ahead, columns);
    }
  }
}
