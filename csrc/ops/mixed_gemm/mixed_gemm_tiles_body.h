// The body of mixed_gemm over tiles of sums (AMX-INT8), for batches large enough for them
// (mixed_gemm_plan.h). Included inside a namespace that has the verbs of cpu/simd_*.h and `Tiles`,
// which offers, for tile registers 0..7 and strides in bytes:
//   configure(const TileConfig&), release()
//   zero<kTile>(), load<kTile>(from, stride), store<kTile>(to, stride)
//   add_products<kSums, kA, kB>()             sums[m][n] += sum over the 4 k of a word and all
//   words
//                                             of A[m][word][k] (signed) B[word][n][k] (unsigned)
//
// The packed layout is that of B tiles: a word of 4 columns of K of 16 output rows is one row of a
// tile, 128 bytes from the next. High codes are loaded where they lie; low codes are unpacked to
// such words, one chunk of K at a time, which then stays in the first-level cache while the rows of
// the panel pass. The sums of a panel stay in the second-level cache from one chunk to the next.

#include "ops/mixed_gemm/mixed_gemm_rows.h"

namespace {

constexpr int64_t kTileRows = kMixedGemmTileRows;               // rows of activations, and of words
constexpr int64_t kStepColumns = kTileRows * kPackedWordBytes;  // columns of K in a tile
constexpr int64_t kTileBytes = kTileRows * kStepColumns;
constexpr int64_t kWordStride = kPackedBlockRows * kPackedWordBytes;
constexpr int64_t kChunkColumns = kMixedGemmChunkSteps * kStepColumns;
constexpr int64_t kStripTiles = 2;  // tiles of rows that share the loads of weights

constexpr int64_t step_columns(int64_t k) { return align_up(k, kStepColumns); }

// Activations of a panel as A tiles, [K / 64][16 rows][64] for each 16 rows, and its sums.
struct TilePanel {
  int64_t index = -1, first_row = 0, rows = 0, tiles = 0;
  Row* row;
  int8_t* lo;
  int8_t* hi;
  uint32_t* sums_lo;  // [rows][kBlock]
  uint32_t* sums_hi;
  uint8_t* chunk;     // words of one chunk of weights
  int8_t* row_codes;  // one row in its natural order

  TilePanel(int64_t max_rows, int64_t k_lo, int64_t k_hi) {
    const int64_t rows = align_up(max_rows, kTileRows);
    const int64_t lo_bytes = rows * step_columns(k_lo), hi_bytes = rows * step_columns(k_hi);
    const int64_t sum_bytes = rows * kBlock * sizeof(uint32_t);
    const int64_t chunk_bytes = kChunkColumns * kBlock;
    const int64_t code_bytes = std::max(step_columns(k_lo), step_columns(k_hi));
    const int64_t row_bytes = max_rows * sizeof(Row);  // last: the others are whole cache lines
    const int64_t bytes =
        lo_bytes + hi_bytes + 2 * sum_bytes + chunk_bytes + code_bytes + row_bytes;
    auto* next = reinterpret_cast<int8_t*>(thread_row_buffer().floats(ceil_div(bytes, 4)));
    lo = next;
    hi = lo + lo_bytes;
    sums_lo = reinterpret_cast<uint32_t*>(hi + hi_bytes);
    sums_hi = sums_lo + rows * kBlock;
    chunk = reinterpret_cast<uint8_t*>(sums_hi + rows * kBlock);
    row_codes = reinterpret_cast<int8_t*>(chunk + chunk_bytes);
    row = reinterpret_cast<Row*>(row_codes + code_bytes);
  }
};

// Writes the codes of row `i` of the panel into its tiles.
void spread_row(const int8_t* codes, int64_t columns, int64_t i, int8_t* tiles) {
  int8_t* to = tiles + i / kTileRows * kTileRows * columns + i % kTileRows * kStepColumns;
  for (int64_t k = 0; k < columns; k += kStepColumns) {
    std::memcpy(to + k * kTileRows, codes + k, kStepColumns);
  }
}

void fill_tile_panel(const MixedGemmParams& p, const MixedGemmPlan& plan, int64_t index,
                     TilePanel& panel) {
  const int64_t lo_columns = step_columns(p.k_lo), hi_columns = step_columns(p.k_hi);
  panel.index = index;
  panel.first_row = plan.first_row(index);
  panel.rows = std::min(plan.panel_rows, p.rows - panel.first_row);
  panel.tiles = ceil_div(panel.rows, kTileRows);
  for (int64_t i = 0; i < panel.rows; ++i) {
    const int64_t m = panel.first_row + i;
    unpack_row(p, m, panel.row_codes);
    const int32_t sum_lo = pad_and_sum(panel.row_codes, p.k_lo, lo_columns);
    spread_row(panel.row_codes, lo_columns, i, panel.lo);
    std::copy_n(p.q_hi + m * p.k_hi, p.k_hi, panel.row_codes);
    const int32_t sum_hi = pad_and_sum(panel.row_codes, p.k_hi, hi_columns);
    spread_row(panel.row_codes, hi_columns, i, panel.hi);
    panel.row[i] = make_row(p.params + 4 * m, sum_lo, sum_hi);
  }
  // The rows that fill up the last tile get sums that nobody reads: zeros, to be determinate.
  const int64_t filled = std::max(lo_columns, hi_columns);
  std::memset(panel.row_codes, 0, filled);
  for (int64_t i = panel.rows; i < panel.tiles * kTileRows; ++i) {
    spread_row(panel.row_codes, lo_columns, i, panel.lo);
    spread_row(panel.row_codes, hi_columns, i, panel.hi);
  }
}

// Nibbles of `columns` columns (whole groups) -> words.
void unpack_words(const uint8_t* nibbles, int64_t columns, uint8_t* words) {
  for (int64_t group = 0; group < columns / kPackedGroupColumns; ++group) {
    for (int64_t i = 0; i < kWordStride; ++i) words[i] = nibbles[i] & 15;
    for (int64_t i = 0; i < kWordStride; ++i) words[kWordStride + i] = nibbles[i] >> 4;
    nibbles += kWordStride;
    words += 2 * kWordStride;
  }
}

// The words of `columns` columns of weights that begin at `weight`, in whole steps: in `chunk`, or
// where they lie.
template <bool kHigh>
const uint8_t* chunk_words(const uint8_t* weight, int64_t columns, uint8_t* chunk) {
  if (kHigh && columns % kStepColumns == 0) return weight;
  const int64_t bytes = columns * kBlock;
  if constexpr (kHigh) {
    std::memcpy(chunk, weight, bytes);
  } else {
    unpack_words(weight, columns, chunk);
  }
  // Behind the end stand zero codes of activations; the block's own bytes end here.
  std::memset(chunk + bytes, 0, step_columns(columns) * kBlock - bytes);
  return chunk;
}

// Adds one chunk to the sums of kTiles tiles of rows x 32 columns, which start at zero in the first
// chunk. `a`: the first tile of rows at this chunk; `stride`: from it to the next.
template <int kTiles>
void add_chunk(const int8_t* a, int64_t stride, const uint8_t* words, int64_t columns, bool first,
               uint32_t* sums) {
  constexpr int64_t kSumStride = kBlock * sizeof(uint32_t);
  uint32_t* below = sums + kTileRows * kBlock;
  // Sums in tiles 0 to 3, A in 4 and 5, B in 6 and 7.
  if (first) {
    Tiles::template zero<0>();
    Tiles::template zero<1>();
    if constexpr (kTiles == 2) {
      Tiles::template zero<2>();
      Tiles::template zero<3>();
    }
  } else {
    Tiles::template load<0>(sums, kSumStride);
    Tiles::template load<1>(sums + kTileRows, kSumStride);
    if constexpr (kTiles == 2) {
      Tiles::template load<2>(below, kSumStride);
      Tiles::template load<3>(below + kTileRows, kSumStride);
    }
  }
  for (int64_t k = 0; k < columns; k += kStepColumns) {
    Tiles::template load<6>(words, kWordStride);
    Tiles::template load<4>(a, kStepColumns);
    Tiles::template add_products<0, 4, 6>();
    Tiles::template load<7>(words + kStepColumns, kWordStride);
    Tiles::template add_products<1, 4, 7>();
    if constexpr (kTiles == 2) {
      Tiles::template load<5>(a + stride, kStepColumns);
      Tiles::template add_products<2, 5, 6>();
      Tiles::template add_products<3, 5, 7>();
    }
    words += kTileRows * kWordStride;
    a += kTileBytes;
  }
  Tiles::template store<0>(sums, kSumStride);
  Tiles::template store<1>(sums + kTileRows, kSumStride);
  if constexpr (kTiles == 2) {
    Tiles::template store<2>(below, kSumStride);
    Tiles::template store<3>(below + kTileRows, kSumStride);
  }
}

// The sums of one part of K for all rows of the panel. `weight`: the part's codes in the block.
template <bool kHigh>
void multiply_panel(const int8_t* activations, const uint8_t* weight, int64_t k,
                    const TilePanel& panel, uint32_t* sums) {
  const int64_t columns = packed_columns(k), stride = kTileRows * step_columns(k);
  for (int64_t begin = 0; begin < columns; begin += kChunkColumns) {
    const int64_t count = std::min(kChunkColumns, columns - begin);
    const uint8_t* words = chunk_words<kHigh>(weight, count, panel.chunk);
    for (int64_t tile = 0; tile < panel.tiles; tile += kStripTiles) {
      const int8_t* a = activations + tile * stride + begin * kTileRows;
      uint32_t* to = sums + tile * kTileRows * kBlock;
      if (tile + 1 < panel.tiles) {
        add_chunk<2>(a, stride, words, count, begin == 0, to);
      } else {
        add_chunk<1>(a, stride, words, count, begin == 0, to);
      }
    }
    weight += count * kBlock / (kHigh ? 1 : 2);
  }
}

// The tile registers of a thread hold 8 KB, which the operating system saves while they are in use.
struct TileScope {
  TileScope() { Tiles::configure(tile_config(kTileRows, kStepColumns)); }
  ~TileScope() { Tiles::release(); }
};

}  // namespace

void mixed_gemm_tasks(const MixedGemmTasks& tasks, int64_t begin, int64_t end) {
  const MixedGemmParams& p = tasks.gemm;
  const MixedGemmPlan& plan = tasks.plan;
  TilePanel panel(plan.panel_rows, p.k_lo, p.k_hi);
  Columns columns;
  const TileScope scope;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t block = task % plan.blocks;
    if (task / plan.blocks != panel.index) fill_tile_panel(p, plan, task / plan.blocks, panel);
    load_columns(p, block, columns);
    const uint8_t* weight = p.packed_weight + block * packed_block_bytes(p.k_lo, p.k_hi);
    multiply_panel<false>(panel.lo, weight, p.k_lo, panel, panel.sums_lo);
    multiply_panel<true>(panel.hi, weight + packed_block_lo_bytes(p.k_lo), p.k_hi, panel,
                         panel.sums_hi);
    for (int64_t i = 0; i < panel.rows; ++i) {
      finish_row(p, panel.first_row + i, panel.row[i], panel.sums_lo + i * kBlock,
                 panel.sums_hi + i * kBlock, columns);
    }
  }
}
