// The body of mixed_gemm over tiles of sums (AMX-INT8), for M large enough for them (plan.h).
// Included inside a namespace that has the operations of cpu/simd.h and `Tiles`, which offers, for
// tile registers 0..7 and strides in bytes:
//
//   configure(const TileConfig&), release()
//   zero<kTile>(), load<kTile>(from, stride), store<kTile>(to, stride)
//   add_products<kSums, kA, kB>()    sums[m][n] += sum over words and the 4 k of a word of
//                                    A[m][word][k] (signed) B[word][n][k] (unsigned)
//
// The packed layout is that of B tiles: the words of 16 of N, 4 of K each, are one row of a tile,
// and rows are 128 bytes apart. High codes are loaded in place. Low codes are unpacked to such
// words, one chunk of K at a time, which then stays in the first-level cache while all rows of the
// panel use it. The sums of a panel stay in the second-level cache from one chunk to the next.

#include "ops/mixed_gemm/cpu/epilogue.h"

constexpr int64_t kTileM = kMixedGemmAmxTileM;         // and the words of a tile of B
constexpr int64_t kTileK = kTileM * kPackedWordBytes;  // a step
constexpr int64_t kTileBytes = kTileM * kTileK;
constexpr int64_t kWordStride = kPackedBlockN * kPackedWordBytes;
constexpr int64_t kChunkK = kMixedGemmChunkSteps * kTileK;
constexpr int64_t kStripTiles = 2;  // tiles of M that share the loads of weights

// K in whole steps.
constexpr int64_t step_k(int64_t k) { return align_up(k, kTileK); }

// Activations of a panel as A tiles, [K / 64][16][64] for each 16 of M, and its sums.
struct TilePanel {
  int64_t index = -1, first_m = 0, m = 0, tiles = 0;
  RowScales* scales;
  int8_t* lo;
  int8_t* hi;
  uint32_t* sums_lo;  // [m][kBlockN]
  uint32_t* sums_hi;
  uint8_t* chunk;     // words of one chunk of weights
  int8_t* row_codes;  // one row in its natural order

  TilePanel(int64_t max_m, int64_t k_lo, int64_t k_hi) {
    const int64_t padded_m = align_up(max_m, kTileM);
    const int64_t lo_bytes = padded_m * step_k(k_lo), hi_bytes = padded_m * step_k(k_hi);
    const int64_t sum_bytes = padded_m * kBlockN * sizeof(uint32_t);
    const int64_t chunk_bytes = kChunkK * kBlockN;
    const int64_t code_bytes = step_k(k_lo) + step_k(k_hi);
    const int64_t scale_bytes =
        max_m * sizeof(RowScales);  // last: the others are whole cache lines
    const int64_t bytes =
        lo_bytes + hi_bytes + 2 * sum_bytes + chunk_bytes + code_bytes + scale_bytes;
    auto* next = reinterpret_cast<int8_t*>(thread_row_buffer().floats(ceil_div(bytes, 4)));
    lo = next;
    hi = lo + lo_bytes;
    sums_lo = reinterpret_cast<uint32_t*>(hi + hi_bytes);
    sums_hi = sums_lo + padded_m * kBlockN;
    chunk = reinterpret_cast<uint8_t*>(sums_hi + padded_m * kBlockN);
    row_codes = reinterpret_cast<int8_t*>(chunk + chunk_bytes);
    scales = reinterpret_cast<RowScales*>(row_codes + code_bytes);
  }
};

// Writes the codes of row `i` of the panel into its tiles.
void spread_row(const int8_t* codes, int64_t padded_k, int64_t i, int8_t* tiles) {
  int8_t* to = tiles + i / kTileM * kTileM * padded_k + i % kTileM * kTileK;
  for (int64_t k = 0; k < padded_k; k += kTileK) {
    std::memcpy(to + k * kTileM, codes + k, kTileK);
  }
}

void fill_tile_panel(const MixedGemmParams& p, const MixedGemmPlan& plan, int64_t index,
                     TilePanel& panel) {
  const int64_t padded_k_lo = step_k(p.k_lo), padded_k_hi = step_k(p.k_hi);
  panel.index = index;
  panel.first_m = plan.first_m(index);
  panel.m = std::min(plan.panel_m, p.m - panel.first_m);
  panel.tiles = ceil_div(panel.m, kTileM);
  for (int64_t i = 0; i < panel.m; ++i) {
    panel.scales[i] = read_row(p, panel.first_m + i, padded_k_lo, padded_k_hi, panel.row_codes);
    spread_row(panel.row_codes, padded_k_lo, i, panel.lo);
    spread_row(panel.row_codes + padded_k_lo, padded_k_hi, i, panel.hi);
  }
  // The rows that pad the last tile get sums that are never read. Zeros make them deterministic.
  const int64_t filled = std::max(padded_k_lo, padded_k_hi);
  std::memset(panel.row_codes, 0, filled);
  for (int64_t i = panel.m; i < panel.tiles * kTileM; ++i) {
    spread_row(panel.row_codes, padded_k_lo, i, panel.lo);
    spread_row(panel.row_codes, padded_k_hi, i, panel.hi);
  }
}

// Nibbles of `k` of K (whole groups) -> words.
void unpack_words(const uint8_t* nibbles, int64_t k, uint8_t* words) {
  for (int64_t group = 0; group < k / kPackedGroupK; ++group) {
    for (int64_t i = 0; i < kWordStride; ++i) words[i] = nibbles[i] & 15;
    for (int64_t i = 0; i < kWordStride; ++i) words[kWordStride + i] = nibbles[i] >> 4;
    nibbles += kWordStride;
    words += 2 * kWordStride;
  }
}

// The words of `k` of K that begin at `weight`, in whole steps: unpacked or copied to `chunk`, or
// in place.
template <bool kHigh>
const uint8_t* chunk_words(const uint8_t* weight, int64_t k, uint8_t* chunk) {
  if (kHigh && k % kTileK == 0) return weight;
  const int64_t bytes = k * kBlockN;
  if constexpr (kHigh) {
    std::memcpy(chunk, weight, bytes);
  } else {
    unpack_words(weight, k, chunk);
  }
  // Past the end the activations have zero codes; the block's own bytes end here.
  std::memset(chunk + bytes, 0, step_k(k) * kBlockN - bytes);
  return chunk;
}

// Adds one chunk to the sums of kTiles tiles of M x 32 of N, which start at zero in the first
// chunk. `a`: the first tile of M at this chunk; `stride`: from it to the next.
template <int kTiles>
void add_chunk(const int8_t* a, int64_t stride, const uint8_t* words, int64_t chunk_k, bool first,
               uint32_t* sums) {
  constexpr int64_t kSumStride = kBlockN * sizeof(uint32_t);
  uint32_t* below = sums + kTileM * kBlockN;
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
    Tiles::template load<1>(sums + kTileM, kSumStride);
    if constexpr (kTiles == 2) {
      Tiles::template load<2>(below, kSumStride);
      Tiles::template load<3>(below + kTileM, kSumStride);
    }
  }
  for (int64_t k = 0; k < chunk_k; k += kTileK) {
    Tiles::template load<6>(words, kWordStride);
    Tiles::template load<4>(a, kTileK);
    Tiles::template add_products<0, 4, 6>();
    Tiles::template load<7>(words + kTileK, kWordStride);
    Tiles::template add_products<1, 4, 7>();
    if constexpr (kTiles == 2) {
      Tiles::template load<5>(a + stride, kTileK);
      Tiles::template add_products<2, 5, 6>();
      Tiles::template add_products<3, 5, 7>();
    }
    words += kTileM * kWordStride;
    a += kTileBytes;
  }
  Tiles::template store<0>(sums, kSumStride);
  Tiles::template store<1>(sums + kTileM, kSumStride);
  if constexpr (kTiles == 2) {
    Tiles::template store<2>(below, kSumStride);
    Tiles::template store<3>(below + kTileM, kSumStride);
  }
}

// The sums of one part of K for the whole panel. `weight`: the part's codes in the block.
template <bool kHigh>
void multiply_panel(const int8_t* activations, const uint8_t* weight, int64_t k,
                    const TilePanel& panel, uint32_t* sums) {
  const int64_t padded_k = packed_k(k), stride = kTileM * step_k(k);
  for (int64_t begin = 0; begin < padded_k; begin += kChunkK) {
    const int64_t count = std::min(kChunkK, padded_k - begin);
    const uint8_t* words = chunk_words<kHigh>(weight, count, panel.chunk);
    for (int64_t tile = 0; tile < panel.tiles; tile += kStripTiles) {
      const int8_t* a = activations + tile * stride + begin * kTileM;
      uint32_t* to = sums + tile * kTileM * kBlockN;
      if (tile + 1 < panel.tiles) {
        add_chunk<2>(a, stride, words, count, begin == 0, to);
      } else {
        add_chunk<1>(a, stride, words, count, begin == 0, to);
      }
    }
    weight += count * kBlockN / (kHigh ? 1 : 2);
  }
}

// The tile registers of a thread hold 8 KB, which the operating system saves while they are in use.
struct TileScope {
  TileScope() { Tiles::configure(tile_config(kTileM, kTileK)); }
  ~TileScope() { Tiles::release(); }
};

// Tasks [begin, end) of the plan.
void run_tasks(const MixedGemmTasks& tasks, int64_t begin, int64_t end) {
  const MixedGemmParams& p = tasks.gemm;
  const MixedGemmPlan& plan = tasks.plan;
  TilePanel panel(plan.panel_m, p.k_lo, p.k_hi);
  BlockScales scales;
  const TileScope scope;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t block = task % plan.blocks;
    if (task / plan.blocks != panel.index) fill_tile_panel(p, plan, task / plan.blocks, panel);
    load_block_scales(p, block, scales);
    const uint8_t* weight = p.packed_weight + block * packed_block_bytes(p.k_lo, p.k_hi);
    multiply_panel<false>(panel.lo, weight, p.k_lo, panel, panel.sums_lo);
    multiply_panel<true>(panel.hi, weight + packed_block_lo_bytes(p.k_lo), p.k_hi, panel,
                         panel.sums_hi);
    for (int64_t i = 0; i < panel.m; ++i) {
      finish_row(p, panel.first_m + i, panel.scales[i], panel.sums_lo + i * kBlockN,
                 panel.sums_hi + i * kBlockN, scales);
    }
  }
}
