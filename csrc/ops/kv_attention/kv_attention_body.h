// The body of kv_attention; included inside the namespace of an instruction set that has defined
// the vectors of cpu/lanes.h, dot_pairs, unpack_keys, unpack_values and load_metadata.

namespace {

using Shorts = int16_t __attribute__((vector_size(sizeof(Ints) / 2)));

// Blocks as the integer products want them: a 32-bit word holds two 16-bit codes, of dims
// (2 j, 2 j + 1) of a token for K, of tokens (2 j, 2 j + 1) of a dim for V.
template <int kHeadDim>
struct Block {
  int32_t keys[kHeadDim / 2][kKeyBlock];
  int32_t values[kKeyBlock / 2][kHeadDim];
  float metadata[8][kKeyBlock];  // (scale, offset) of K low, K high, V low, V high
};

// A query row: q' ~ scale * integer per part, and the sums of q' as quantized.
struct QueryRow {
  float scale_lo, scale_hi, sum_lo, sum_hi;
};

// Softmax of one block: weights of a part ~ factor * integer; offset = sum of weight * v_offset.
struct BlockSoftmax {
  float max, sum, factor_lo, factor_hi, offset_lo, offset_hi;
};

template <int kHeadDim>
struct Workspace {
  Block<kHeadDim>* block;
  int16_t* integers;  // [rows, head_dim]
  QueryRow* queries;  // [rows]
  float* split;       // [rows, kv_state_floats]
  float* total;       // [rows, kv_state_floats]

  Workspace(float* memory, int64_t rows) {
    static_assert(sizeof(Block<kHeadDim>) == sizeof(float) * kKeyBlock * (kHeadDim + 8));
    block = reinterpret_cast<Block<kHeadDim>*>(memory);
    memory += sizeof(Block<kHeadDim>) / sizeof(float);
    split = memory;
    total = split + rows * kv_state_floats(kHeadDim);
    memory = total + rows * kv_state_floats(kHeadDim);
    integers = reinterpret_cast<int16_t*>(memory);
    queries = reinterpret_cast<QueryRow*>(memory + rows * kHeadDim / 2);
  }
};

inline Ints lane_index() {
  Ints index{};
  for (int j = 0; j < kLanes; ++j) index[j] = j;
  return index;
}

// Folds 16 virtual lanes, held in 16 / kLanes vectors, in the same order for every kLanes.
inline Floats add(Floats a, Floats b) { return a + b; }
template <Floats (*op)(Floats, Floats)>
inline float fold(Floats (&v)[16 / kLanes]) {
  for (int n = 16 / kLanes / 2; n >= 1; n /= 2) {
    for (int j = 0; j < n; ++j) v[j] = op(v[j], v[j + n]);
  }
  Floats x = v[0];
  for (int distance = kLanes / 2; distance >= 1; distance /= 2) {
    x = op(x, __builtin_shuffle(x, lane_index() ^ distance));
  }
  return x[0];
}

// 2^x for x <= 0, 0 below -127, NaN for NaN. The polynomial is a degree-6 minimax fit on
// [-0.5, 0.5]: relative error 1e-8 before and 9e-8 after rounding.
inline Floats exp2(Floats x) {
  x = x < -127.0f ? broadcast(-127.0f) : x;
  const Floats shifted = x + kRoundMagic;
  const Floats f = x - (shifted - kRoundMagic);
  const Ints n = __builtin_bit_cast(Ints, shifted) - std::bit_cast<int32_t>(kRoundMagic);
  Floats y = f * 0x1.44138ap-13f + 0x1.5f0890p-10f;
  y = y * f + 0x1.3b2a54p-7f;
  y = y * f + 0x1.c6af6cp-5f;
  y = y * f + 0x1.ebfbe0p-3f;
  y = y * f + 0x1.62e430p-1f;
  y = y * f + 1.0f;
  return y * __builtin_bit_cast(Floats, (n + 127) << 23);
}
inline float exp2(float x) { return exp2(broadcast(x))[0]; }

// 16-bit integers of kCount numbers, rounded half to even to multiples of max|x| / 32767; answers
// that scale and the sum of the multiples. NaN and infinities answer NaN for both.
template <int kCount>
inline void quantize_query(const float* x, int16_t* integers, float* scale, float* sum) {
  float largest = 0.0f;
  bool finite = true;
  for (int j = 0; j < kCount; ++j) {
    const float magnitude = x[j] < 0.0f ? -x[j] : x[j];
    finite &= magnitude <= std::numeric_limits<float>::max();
    largest = magnitude > largest ? magnitude : largest;
  }
  const float inverse = largest > 0x1p-100f && finite ? 32767.0f / largest : 0.0f;
  int32_t total = 0;
  for (int j = 0; j < kCount; ++j) {
    const float rounded = (finite ? x[j] : 0.0f) * inverse + kRoundMagic;
    const int32_t integer = std::bit_cast<int32_t>(rounded) - std::bit_cast<int32_t>(kRoundMagic);
    integers[j] = static_cast<int16_t>(integer);
    total += integer;
  }
  *scale = finite ? largest * (1.0f / 32767.0f) : std::numeric_limits<float>::quiet_NaN();
  *sum = *scale * static_cast<float>(total);
}

template <int kHeadDim>
inline void prepare_queries(const KvAttentionParams& p, const KvAttentionTask& task,
                            const Workspace<kHeadDim>& w) {
  constexpr int kLow = KvLayout<kHeadDim>::kLowDims;
  const int64_t group = p.group(), rows = task.queries * group;
  const float* rotation = p.rotation;
  if (rotation && !p.shared_rotation) rotation += task.kv_head * kHeadDim * kHeadDim;
  alignas(64) float x[kRotatedRows * kHeadDim];
  for (int64_t first = 0; first < rows; first += kRotatedRows) {
    const int count = static_cast<int>(rows - first < kRotatedRows ? rows - first : kRotatedRows);
    for (int r = 0; r < count; ++r) {
      const int64_t token = task.first_query + (first + r) / group;
      const int64_t head = task.kv_head * group + (first + r) % group;
      load_row(p.q, p.type, (token * p.n_q + head) * kHeadDim, kHeadDim, x + r * kHeadDim);
      if (!p.cos) continue;
      rope<kHeadDim>(x + r * kHeadDim, p.cos + token * kHeadDim, p.sin + token * kHeadDim);
    }
    if (rotation) rotate<kHeadDim>(x, count, rotation);
    for (int j = 0; j < count * kHeadDim; ++j) x[j] *= p.scale;
    for (int r = 0; r < count; ++r) {
      const float* row = x + r * kHeadDim;
      int16_t* integers = w.integers + (first + r) * kHeadDim;
      QueryRow& query = w.queries[first + r];
      quantize_query<kLow>(row, integers, &query.scale_lo, &query.sum_lo);
      quantize_query<kHeadDim - kLow>(row + kLow, integers + kLow, &query.scale_hi, &query.sum_hi);
    }
  }
}

// Where the tile that starts with token `token` of the sequence lies.
struct Tile {
  const uint8_t *keys, *values, *metadata;
};
template <int kHeadDim>
inline Tile tile_at(const KvAttentionParams& p, const KvAttentionTask& task, int64_t token) {
  const int64_t page = p.block_table[task.sequence * p.max_pages + token / p.page_size];
  const int64_t position = token % p.page_size;
  const uint8_t* chunk =
      p.cache + (page * p.n_kv + task.kv_head) * p.page_size * KvLayout<kHeadDim>::kTokenBytes;
  return {chunk + kv_k_tile_byte<kHeadDim>(position),
          chunk + kv_v_tile_byte<kHeadDim>(p.page_size, position),
          chunk + kv_metadata_byte<kHeadDim>(p.page_size, position)};
}

inline void prefetch(const uint8_t* bytes, int count) {
  for (int i = 0; i < count; i += 64) __builtin_prefetch(bytes + i, 0, 2);
}

// Unpacks tokens [first, end) of the sequence, at most kKeyBlock of them. Tokens from `end` on get
// scales and offsets 0: what a page's tail holds has no effect. The next block is prefetched, which
// the hardware does not do across the three streams of a page (8 x 4096 tokens, ns a token: 45
// without, 40 into L1, 30 into L2).
template <int kHeadDim>
inline void load_block(const KvAttentionParams& p, const KvAttentionTask& task, int64_t first,
                       int64_t end, Block<kHeadDim>* block) {
  constexpr int kTokens = KvLayout<kHeadDim>::kTileTokens;
  for (int64_t token = first; token < end; token += kTokens) {
    if (token + kKeyBlock < task.last_visible()) {
      const Tile next = tile_at<kHeadDim>(p, task, token + kKeyBlock);
      prefetch(next.keys, kKvTileBytes);
      prefetch(next.values, kKvTileBytes);
      prefetch(next.metadata, kTokens * kKvMetadataBytes);
    }
    const Tile tile = tile_at<kHeadDim>(p, task, token);
    const int64_t at = token - first;
    unpack_keys<kHeadDim>(tile.keys, &block->keys[0][at]);
    unpack_values<kHeadDim>(tile.values, block->values[at / 2]);
    for (int t = 0; t < kTokens; t += 8) {
      load_metadata(tile.metadata + t * kKvMetadataBytes, &block->metadata[0][at + t]);
    }
  }
  for (int field = 0; field < 8; ++field) {
    float* values = block->metadata[field];
    const float factor = field % 2 == 0 ? 1.0f / kKvScaleFactor : 1.0f;
    for (int t = 0; t < kKeyBlock; ++t) values[t] = t < end - first ? values[t] * factor : 0.0f;
  }
}

// c[r][column] = sum over j of a[r][2 j] b[j][column].low + a[r][2 j + 1] b[j][column].high.
template <int kRows, int kVectors>
inline void pair_tile(const int16_t* a, int64_t a_stride, const int32_t* b, int64_t b_stride,
                      int pairs, int32_t* c, int64_t c_stride) {
  Ints sums[kRows][kVectors] = {};
  for (int j = 0; j < pairs; ++j) {
    Ints codes[kVectors];
    for (int v = 0; v < kVectors; ++v) codes[v] = load<Ints>(b + j * b_stride + v * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const Ints x = broadcast(load<int32_t>(a + r * a_stride + 2 * j));
      for (int v = 0; v < kVectors; ++v) sums[r][v] = dot_pairs(sums[r][v], x, codes[v]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) store(c + r * c_stride + v * kLanes, sums[r][v]);
  }
}

template <int kRows, int kColumns>
inline void pair_product(const int16_t* a, int64_t a_stride, const int32_t* b, int64_t b_stride,
                         int pairs, int32_t* c, int64_t c_stride) {
  constexpr int kWide = (kLanes == 16 ? 4 : 2) * kLanes;
  constexpr int kRest = kColumns % kWide / kLanes;
  for (int column = 0; column + kWide <= kColumns; column += kWide) {
    pair_tile<kRows, kWide / kLanes>(a, a_stride, b + column, b_stride, pairs, c + column,
                                     c_stride);
  }
  if constexpr (kRest > 0) {
    constexpr int kColumn = kColumns - kRest * kLanes;
    pair_tile<kRows, kRest>(a, a_stride, b + kColumn, b_stride, pairs, c + kColumn, c_stride);
  }
}

// Vector `v` of a row's 64 numbers. Functions and not lambdas: g++ 12 compiles a lambda for the
// baseline instruction set, whatever the pragma around it says.
inline Floats numbers(const int32_t* sums, int v) {
  return __builtin_convertvector(load<Ints>(sums + v * kLanes), Floats);
}
inline Floats numbers(const float* x, int v) { return load<Floats>(x + v * kLanes); }

// x where the token is visible, else `otherwise`.
template <bool kFull>
inline Floats in_sight(int v, int visible, Floats x, float otherwise) {
  if constexpr (kFull) return x;
  return lane_index() + v * kLanes < visible ? x : broadcast(otherwise);
}

// Scores of one row and block -> 16-bit weights for the codes of V. `kFull` says that all tokens
// are visible, else the first `visible` are; the bits do not depend on it.
template <bool kFull>
inline BlockSoftmax block_softmax(const int32_t* sums_lo, const int32_t* sums_hi, const QueryRow& q,
                                  const float (*metadata)[kKeyBlock], int visible,
                                  int16_t* weights_lo, int16_t* weights_hi) {
  constexpr int kVectors = kKeyBlock / kLanes, kVirtual = 16 / kLanes;

  Floats scores[kVectors], largest[kVirtual];
  for (int v = 0; v < kVirtual; ++v)
    largest[v] = broadcast(-std::numeric_limits<float>::infinity());
  for (int v = 0; v < kVectors; ++v) {
    const Floats lo = numbers(sums_lo, v) * q.scale_lo * numbers(metadata[0], v) +
                      numbers(metadata[1], v) * q.sum_lo;
    const Floats hi = numbers(sums_hi, v) * q.scale_hi * numbers(metadata[2], v) +
                      numbers(metadata[3], v) * q.sum_hi;
    scores[v] = in_sight<kFull>(v, visible, lo + hi, -std::numeric_limits<float>::infinity());
    largest[v % kVirtual] = maximum(scores[v], largest[v % kVirtual]);
  }
  BlockSoftmax out;
  out.max = fold<maximum>(largest);

  Floats lo[kVectors], hi[kVectors];
  Floats sum[kVirtual] = {}, offset_lo[kVirtual] = {}, offset_hi[kVirtual] = {};
  Floats top_lo[kVirtual] = {}, top_hi[kVirtual] = {};
  for (int v = 0; v < kVectors; ++v) {
    const int lane = v % kVirtual;
    const Floats weight = exp2(scores[v] - out.max);
    sum[lane] += weight;
    offset_lo[lane] += in_sight<kFull>(v, visible, weight * numbers(metadata[5], v), 0.0f);
    offset_hi[lane] += in_sight<kFull>(v, visible, weight * numbers(metadata[7], v), 0.0f);
    lo[v] = in_sight<kFull>(v, visible, weight * numbers(metadata[4], v), 0.0f);
    hi[v] = in_sight<kFull>(v, visible, weight * numbers(metadata[6], v), 0.0f);
    top_lo[lane] = maximum(lo[v], top_lo[lane]);
    top_hi[lane] = maximum(hi[v], top_hi[lane]);
  }
  out.sum = fold<add>(sum);
  out.offset_lo = fold<add>(offset_lo);
  out.offset_hi = fold<add>(offset_hi);
  const float largest_lo = fold<maximum>(top_lo), largest_hi = fold<maximum>(top_hi);
  const float inverse_lo = largest_lo > 0x1p-100f ? 32767.0f / largest_lo : 0.0f;
  const float inverse_hi = largest_hi > 0x1p-100f ? 32767.0f / largest_hi : 0.0f;
  out.factor_lo = largest_lo * (1.0f / 32767.0f);
  out.factor_hi = largest_hi * (1.0f / 32767.0f);
  for (int v = 0; v < kVectors; ++v) {
    store(weights_lo + v * kLanes,
          __builtin_convertvector(round_to_int(lo[v] * inverse_lo), Shorts));
    store(weights_hi + v * kLanes,
          __builtin_convertvector(round_to_int(hi[v] * inverse_hi), Shorts));
  }
  return out;
}

// state := state and (max, sum, part(d)) under a common maximum.
template <int kHeadDim, class Part>
inline void merge(float* state, float max, float sum, Part part) {
  float& state_max = state[kHeadDim];
  float& state_sum = state[kHeadDim + 1];
  const float common = max > state_max ? max : state_max;
  const float old_factor = exp2(state_max - common), factor = exp2(max - common);
  state_max = common;
  state_sum = state_sum * old_factor + sum * factor;
  for (int d = 0; d < kHeadDim; ++d) state[d] = state[d] * old_factor + part(d) * factor;
}

template <int kHeadDim>
inline void clear_state(float* state) {
  for (int d = 0; d < kHeadDim; ++d) state[d] = 0.0f;
  state[kHeadDim] = -std::numeric_limits<float>::infinity();
  state[kHeadDim + 1] = 0.0f;
}

// Rows [first, first + kRows) against one block.
template <int kHeadDim, int kRows>
inline void attend_rows(const KvAttentionParams& p, const KvAttentionTask& task,
                        int64_t first_token, int64_t first, const Workspace<kHeadDim>& w) {
  constexpr int kLow = KvLayout<kHeadDim>::kLowDims;
  constexpr int kLowColumns = (kLow + 15) / 16 * 16;  // head dim 64: 8 columns more than needed
  alignas(64) int32_t score_lo[kRows][kKeyBlock], score_hi[kRows][kKeyBlock];
  alignas(64) int16_t weights_lo[kRows][kKeyBlock], weights_hi[kRows][kKeyBlock];
  alignas(64) int32_t out_lo[kRows][kLowColumns], out_hi[kRows][16];
  BlockSoftmax softmax[kRows];
  const Block<kHeadDim>& block = *w.block;

  const int16_t* q = w.integers + first * kHeadDim;
  pair_product<kRows, kKeyBlock>(q, kHeadDim, block.keys[0], kKeyBlock, kLow / 2, score_lo[0],
                                 kKeyBlock);
  pair_product<kRows, kKeyBlock>(q + kLow, kHeadDim, block.keys[kLow / 2], kKeyBlock,
                                 (kHeadDim - kLow) / 2, score_hi[0], kKeyBlock);
  for (int r = 0; r < kRows; ++r) {
    const int64_t visible = task.visible + (first + r) / p.group() - first_token;
    const auto run = visible >= kKeyBlock ? block_softmax<true> : block_softmax<false>;
    softmax[r] = run(score_lo[r], score_hi[r], w.queries[first + r], block.metadata,
                     static_cast<int>(visible), weights_lo[r], weights_hi[r]);
  }
  pair_product<kRows, kLowColumns>(weights_lo[0], kKeyBlock, block.values[0], kHeadDim,
                                   kKeyBlock / 2, out_lo[0], kLowColumns);
  pair_product<kRows, 16>(weights_hi[0], kKeyBlock, block.values[0] + kHeadDim - 16, kHeadDim,
                          kKeyBlock / 2, out_hi[0], 16);
  for (int r = 0; r < kRows; ++r) {
    alignas(64) float part[kHeadDim];
    const BlockSoftmax& s = softmax[r];
    for (int d = 0; d < kLow; ++d) {
      part[d] = static_cast<float>(out_lo[r][d]) * s.factor_lo + s.offset_lo;
    }
    for (int d = kLow; d < kHeadDim; ++d) {
      part[d] = static_cast<float>(out_hi[r][d - (kHeadDim - 16)]) * s.factor_hi + s.offset_hi;
    }
    merge<kHeadDim>(w.split + (first + r) * kv_state_floats(kHeadDim), s.max, s.sum,
                    [&](int d) { return part[d]; });
  }
}

template <int kHeadDim>
inline void split_states(const KvAttentionParams& p, const KvAttentionTask& task, int64_t split,
                         const Workspace<kHeadDim>& w) {
  const int64_t group = p.group(), rows = task.queries * group;
  const int64_t end = std::min<int64_t>(task.last_visible(), (split + 1) * kSplitTokens);
  for (int64_t r = 0; r < rows; ++r) clear_state<kHeadDim>(w.split + r * kv_state_floats(kHeadDim));
  for (int64_t token = split * kSplitTokens; token < end; token += kKeyBlock) {
    load_block<kHeadDim>(p, task, token, std::min<int64_t>(end, token + kKeyBlock), w.block);
    // The first query that sees a token of this block: visible + i > token.
    int64_t row = std::max<int64_t>(0, token - task.visible + 1) * group;
    for (; row + 4 <= rows; row += 4) attend_rows<kHeadDim, 4>(p, task, token, row, w);
    switch (rows - row) {
      case 3: attend_rows<kHeadDim, 3>(p, task, token, row, w); break;
      case 2: attend_rows<kHeadDim, 2>(p, task, token, row, w); break;
      case 1: attend_rows<kHeadDim, 1>(p, task, token, row, w); break;
      default: break;
    }
  }
}

// Merges the states of one split into the total; rows that see none of its tokens keep theirs.
template <int kHeadDim>
inline void merge_split(const KvAttentionParams& p, const KvAttentionTask& task, int64_t split,
                        const float* states, const Workspace<kHeadDim>& w) {
  constexpr int64_t kFloats = kv_state_floats(kHeadDim);
  for (int64_t r = 0; r < task.queries * p.group(); ++r) {
    if (split == 0) clear_state<kHeadDim>(w.total + r * kFloats);
    if (task.visible + r / p.group() <= split * kSplitTokens) continue;
    const float* part = states + r * kFloats;
    merge<kHeadDim>(w.total + r * kFloats, part[kHeadDim], part[kHeadDim + 1],
                    [&](int d) { return part[d]; });
  }
}

template <int kHeadDim>
inline void write_out(const KvAttentionParams& p, const KvAttentionTask& task,
                      const Workspace<kHeadDim>& w) {
  const int64_t group = p.group();
  for (int64_t r = 0; r < task.queries * group; ++r) {
    alignas(64) float row[kHeadDim] = {};
    if (task.visible + r / group > 0) {
      const float* state = w.total + r * kv_state_floats(kHeadDim);
      const float inverse = 1.0f / state[kHeadDim + 1];
      for (int d = 0; d < kHeadDim; ++d) row[d] = state[d] * inverse;
    }
    const int64_t token = task.first_query + r / group, head = task.kv_head * group + r % group;
    store_row(row, kHeadDim, p.type, p.out, (token * p.n_q + head) * kHeadDim);
  }
}

template <int kHeadDim>
inline void attend_task(const KvAttentionParams& p, const KvAttentionTask& task, float* workspace) {
  const Workspace<kHeadDim> w(workspace, task.queries * p.group());
  if (task.splits() > 0) prepare_queries<kHeadDim>(p, task, w);
  for (int64_t split = 0; split < task.splits(); ++split) {
    split_states<kHeadDim>(p, task, split, w);
    merge_split<kHeadDim>(p, task, split, w.split, w);
  }
  write_out<kHeadDim>(p, task, w);
}

template <int kHeadDim>
inline void attend_one_split(const KvAttentionParams& p, const KvAttentionTask& task, int64_t split,
                             float* states, float* workspace) {
  const int64_t rows = task.queries * p.group();
  const Workspace<kHeadDim> w(workspace, rows);
  prepare_queries<kHeadDim>(p, task, w);
  split_states<kHeadDim>(p, task, split, w);
  __builtin_memcpy(states, w.split, rows * kv_state_floats(kHeadDim) * sizeof(float));
}

template <int kHeadDim>
inline void merge_all(const KvAttentionParams& p, const KvAttentionTask& task, const float* states,
                      float* workspace) {
  const int64_t rows = task.queries * p.group();
  const Workspace<kHeadDim> w(workspace, rows);
  for (int64_t split = 0; split < task.splits(); ++split) {
    merge_split<kHeadDim>(p, task, split, states + split * rows * kv_state_floats(kHeadDim), w);
  }
  write_out<kHeadDim>(p, task, w);
}

}  // namespace

void attend(const KvAttentionParams& p, const KvAttentionTask& task, float* workspace) {
  p.head_dim == 128 ? attend_task<128>(p, task, workspace) : attend_task<64>(p, task, workspace);
}

void attend_split(const KvAttentionParams& p, const KvAttentionTask& task, int64_t split,
                  float* states, float* workspace) {
  p.head_dim == 128 ? attend_one_split<128>(p, task, split, states, workspace)
                    : attend_one_split<64>(p, task, split, states, workspace);
}

void merge_splits(const KvAttentionParams& p, const KvAttentionTask& task, const float* states,
                  float* workspace) {
  p.head_dim == 128 ? merge_all<128>(p, task, states, workspace)
                    : merge_all<64>(p, task, states, workspace);
}
