// The one body of mixed_gemm on CPUs. An ISA file defines `Simd` inside its namespace and its
// target region and includes this file there, so that it is compiled once for each instruction set.
// All but the entry point is local to the file: other operators share the namespaces.
//
// Simd offers:
//   kTileRows                         rows of the largest tile
//   Tile<kRows>                       kRows x 32 int32 sums, zero at first, with
//     add_group<kHigh>(weight, words)   adds 8 columns of K; `weight` is a group of the packed
//                                       layout (128 bytes, or 256 of the high part), `words` the
//                                       activation codes in the order [2][kRows][4]
//     store(uint32_t[kRows][32])
// and cpu/simd_*.h gives load and store of floats in every output type.

namespace {

constexpr int64_t kBlock = kPackedBlockRows;

// What the epilogue needs of one activation row and part.
struct RowPart {
  float scale;
  uint32_t zero;        // two's complement; all integer arithmetic is modulo 2^32, d fits in int32
  uint32_t correction;  // storage offset of the weight codes x sum of the row's codes
};

struct Row {
  RowPart lo, hi;
};

// What the epilogue needs of the columns of one weight block; columns past n hold zeros.
struct Columns {
  int64_t first, count;
  float scale_lo[kBlock], scale_hi[kBlock], bias[kBlock];
  uint32_t sum_lo[kBlock], sum_hi[kBlock];
};

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

// Zeros are integers of magnitude at most 255; the test keeps the conversion defined for others.
uint32_t exact_integer(float zero) {
  const bool fits = zero >= -0x1p30f && zero <= 0x1p30f;
  return fits ? static_cast<uint32_t>(static_cast<int32_t>(zero)) : 0u;
}

// Pads `codes` with zeros to whole groups, spreads its words `tile_rows` apart, returns its sum.
int32_t spread_words(int8_t* codes, int64_t k, int64_t tile_rows, int8_t* words) {
  const int64_t padded = packed_columns(k);
  for (int64_t i = k; i < padded; ++i) codes[i] = 0;
  int32_t sum = 0;
  for (int64_t i = 0; i < k; ++i) sum += codes[i];
  for (int64_t i = 0; i < padded / kPackedWordBytes; ++i) {
    std::memcpy(words + i * tile_rows * kPackedWordBytes, codes + i * kPackedWordBytes,
                kPackedWordBytes);
  }
  return sum;
}

// The low codes of one row, one a byte.
void unpack_row(const MixedGemmParams& p, int64_t m, int8_t* codes) {
  if (!p.q_lo_packed) {
    std::copy_n(static_cast<const int8_t*>(p.q_lo) + m * p.k_lo, p.k_lo, codes);
    return;
  }
  const auto* bytes = static_cast<const uint8_t*>(p.q_lo) + m * (p.k_lo / 2);
  for (int64_t k = 0; k < p.k_lo / 2; ++k) {
    codes[2 * k] = unpack_int4_even(bytes[k]);
    codes[2 * k + 1] = unpack_int4_odd(bytes[k]);
  }
}

void fill_panel(const MixedGemmParams& p, const MixedGemmPlan& plan, int64_t index, Panel& panel) {
  const int64_t lo_columns = packed_columns(p.k_lo), hi_columns = packed_columns(p.k_hi);
  panel.index = index;
  panel.first_row = index * p.rows / plan.panels;
  panel.rows = (index + 1) * p.rows / plan.panels - panel.first_row;
  panel.tiles = ceil_div(panel.rows, plan.max_tile_rows);
  for (int64_t tile = 0; tile < panel.tiles; ++tile) {
    const int64_t begin = panel.tile_begin(tile), end = panel.tile_begin(tile + 1);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t m = panel.first_row + i, word = (i - begin) * kPackedWordBytes;
      unpack_row(p, m, panel.row_codes);
      const auto sum_lo = static_cast<uint32_t>(
          spread_words(panel.row_codes, p.k_lo, end - begin, panel.lo + begin * lo_columns + word));
      std::copy_n(p.q_hi + m * p.k_hi, p.k_hi, panel.row_codes);
      const auto sum_hi = static_cast<uint32_t>(
          spread_words(panel.row_codes, p.k_hi, end - begin, panel.hi + begin * hi_columns + word));
      const float* params = p.params + 4 * m;
      panel.row[i] = {{params[0], exact_integer(params[1]), sum_lo * kPackedOffsetLo},
                      {params[2], exact_integer(params[3]), sum_hi * kPackedOffsetHi}};
    }
  }
}

float load_float(const void* data, FloatType type, int64_t i) {
  if (type == FloatType::kFloat16) return to_float(static_cast<const Half*>(data)[i]);
  if (type == FloatType::kBFloat16) return to_float(static_cast<const BFloat16*>(data)[i]);
  return static_cast<const float*>(data)[i];
}

void load_columns(const MixedGemmParams& p, int64_t block, Columns& c) {
  c.first = block * kBlock;
  c.count = std::min(kBlock, p.n - c.first);
  for (int64_t j = 0; j < kBlock; ++j) {
    const bool inside = j < c.count;
    const int64_t n = inside ? c.first + j : 0;
    c.scale_lo[j] = inside ? p.weight_scale[2 * n] : 0.0f;
    c.scale_hi[j] = inside ? p.weight_scale[2 * n + 1] : 0.0f;
    c.sum_lo[j] = inside ? static_cast<uint32_t>(p.weight_sum[2 * n]) : 0u;
    c.sum_hi[j] = inside ? static_cast<uint32_t>(p.weight_sum[2 * n + 1]) : 0u;
    c.bias[j] = inside && p.bias ? load_float(p.bias, p.bias_type, n) : 0.0f;
  }
}

// Sums of kRows activation rows x 32 columns over one part of K: [kRows][kBlock]. Each step asks
// for half as many bytes of `ahead` as it uses of `weight`, if not null.
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
    }
    tile.template add_group<kHigh>(weight, words);
    weight += kGroupBytes;
    words += kPackedGroupColumns * kRows;
  }
  tile.store(out);
}

// One part of the epilogue, without the sum of the two parts.
void scale_sums(const uint32_t* sums, const RowPart& row, const uint32_t* weight_sum,
                const float* weight_scale, float* y) {
  for (int64_t j = 0; j < kBlock; ++j) {
    const uint32_t d = sums[j] - row.correction - row.zero * weight_sum[j];
    y[j] = (static_cast<float>(static_cast<int32_t>(d)) * row.scale) * weight_scale[j];
  }
}

template <class T>
void store_row(const float* y, T* out, int64_t count) {
  T rounded[kBlock];
  for (int64_t j = 0; j < kBlock; j += Vec::kLanes) store(rounded + j, load(y + j));
  std::memcpy(out, rounded, static_cast<size_t>(count) * sizeof(T));
}

void store_row(const float* y, const MixedGemmParams& p, int64_t m, const Columns& c) {
  const int64_t at = m * p.n + c.first;
  switch (p.out_type) {
    case FloatType::kFloat32: return store_row(y, static_cast<float*>(p.out) + at, c.count);
    case FloatType::kFloat16: return store_row(y, static_cast<Half*>(p.out) + at, c.count);
    case FloatType::kBFloat16: return store_row(y, static_cast<BFloat16*>(p.out) + at, c.count);
  }
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
    const Row& row = panel.row[first + r];
    alignas(64) float y[kBlock] = {}, y_hi[kBlock];
    if (p.k_lo) scale_sums(sums_lo[r], row.lo, c.sum_lo, c.scale_lo, y);
    if (p.k_hi) {
      scale_sums(sums_hi[r], row.hi, c.sum_hi, c.scale_hi, p.k_lo ? y_hi : y);
      if (p.k_lo) {
        for (int64_t j = 0; j < kBlock; ++j) y[j] = y[j] + y_hi[j];
      }
    }
    if (p.bias) {
      for (int64_t j = 0; j < kBlock; ++j) y[j] = y[j] + c.bias[j];
    }
    store_row(y, p, panel.first_row + first + r, c);
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
  Panel panel(plan.max_panel_rows, packed_columns(p.k_lo), packed_columns(p.k_hi));
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
      // streams at the speed of the hardware prefetcher, and no distance of software prefetch
      // from 512 bytes to 16 KB improved on that.
      const bool fetches = panel.tiles > 1 && tile < 2 && block + 1 < plan.blocks;
      const uint8_t* ahead = fetches ? weight + block_bytes + tile * block_bytes / 2 : nullptr;
      const int64_t first = panel.tile_begin(tile);
      kTiles[panel.tile_begin(tile + 1) - first - 1](p, panel, first, weight, ahead, columns);
    }
  }
}
