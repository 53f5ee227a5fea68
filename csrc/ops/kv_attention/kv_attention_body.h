// The one CPU body of kv_attention. Included inside the namespace of an instruction set.

#include "ops/kv_attention/kv_attention_block.h"

// 16-bit weights of a register of tokens.
using WeightVec = int16_t __attribute__((vector_size(sizeof(IVec) / 2)));

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
  int16_t* integers;  // [rows, head_dim] in the order of kPairOrder
  QueryRow* queries;  // [rows]
  float* split;       // [rows, kv_state_floats]
  float* total;       // [rows, kv_state_floats]

  Workspace(float* memory, int64_t rows) {
    auto* next = reinterpret_cast<char*>(memory);
    const auto take = [&](int64_t bytes) {
      char* taken = next;
      next += bytes;
      return taken;
    };
    block = reinterpret_cast<Block<kHeadDim>*>(take(sizeof(Block<kHeadDim>)));
    const int64_t state_bytes = rows * kv_state_floats(kHeadDim) * sizeof(float);
    split = reinterpret_cast<float*>(take(state_bytes));
    total = reinterpret_cast<float*>(take(state_bytes));
    integers = reinterpret_cast<int16_t*>(take(rows * kHeadDim * sizeof(int16_t)));
    queries = reinterpret_cast<QueryRow*>(take(rows * sizeof(QueryRow)));
    static_assert(sizeof(Block<kHeadDim>) + kHeadDim * sizeof(int16_t) + sizeof(QueryRow) +
                      2 * kv_state_floats(kHeadDim) * sizeof(float) <=
                  kv_workspace_floats(kHeadDim, 1) * sizeof(float));
  }
};

// max is the second operand where either is NaN. Structs and not lambdas: g++ 12 compiles a lambda
// for the baseline instruction set, whatever the pragma around it says.
struct Sum {
  template <class Vector>
  Vector operator()(Vector a, Vector b) const {
    return a + b;
  }
};
struct Maximum {
  template <class Vector>
  Vector operator()(Vector a, Vector b) const {
    return a > b ? a : b;
  }
  Vec operator()(Vec a, Vec b) const { return max(a, b); }
};

// Combines lanes j and j + kWidth / 2, then halves the rest in the same way: 16 lanes fold in the
// same order whatever the width of the registers that hold them.
template <class Op, int kWidth>
inline float fold_lanes(typename Vectors<kWidth>::Vec v) {
  if constexpr (kWidth == 1) {
    return v[0];
  } else {
    typename Vectors<kWidth / 2>::Vec low, high;
    __builtin_memcpy(&low, &v, sizeof(low));
    __builtin_memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof(low), sizeof(high));
    return fold_lanes<Op, kWidth / 2>(Op()(low, high));
  }
}
template <class Op>
inline float fold(Vec (&v)[16 / kLanes]) {
  for (int n = 16 / kLanes / 2; n >= 1; n /= 2) {
    for (int j = 0; j < n; ++j) v[j] = Op()(v[j], v[j + n]);
  }
  return fold_lanes<Op, kLanes>(v[0]);
}

// 2^x for x <= 0, 0 below -127, NaN for NaN. The polynomial is a degree-6 minimax fit on
// [-0.5, 0.5]: relative error 1e-8 before and 9e-8 after rounding.
inline Vec exp2(Vec x) {
  x = max(set1(-127.0f), x);
  const Vec shifted = x + kRoundMagic;
  const Vec f = x - (shifted - kRoundMagic);
  const IVec n = __builtin_bit_cast(IVec, shifted) - std::bit_cast<int32_t>(kRoundMagic);
  Vec y = f * 0x1.44138ap-13f + 0x1.5f0890p-10f;
  y = y * f + 0x1.3b2a54p-7f;
  y = y * f + 0x1.c6af6cp-5f;
  y = y * f + 0x1.ebfbe0p-3f;
  y = y * f + 0x1.62e430p-1f;
  y = y * f + 1.0f;
  return y * exp2_int(n);
}
inline float exp2(float x) { return exp2(set1(x))[0]; }

// 16-bit integers of kCount numbers, rounded half to even to multiples of max|x| / 32767; returns
// that scale and the sum of the multiples. NaN and infinities give NaN for both.
template <int kCount>
inline void quantize_query(const float* x, int16_t* integers, float* scale, float* sum) {
  int32_t largest_bits = 0;
  for (int j = 0; j < kCount; ++j) {
    const int32_t bits = std::bit_cast<int32_t>(x[j]) & 0x7fffffff;
    largest_bits = bits > largest_bits ? bits : largest_bits;
  }
  const bool finite = largest_bits < 0x7f800000;
  const float largest = std::bit_cast<float>(largest_bits);
  const float inverse = largest > 0x1p-100f && finite ? 32767.0f / largest : 0.0f;
  int32_t total = 0;
  for (int j = 0; j < kCount; ++j) {
    // NaN and infinities give garbage here, which has no effect because their scale is NaN.
    const int32_t bits = std::bit_cast<int32_t>(x[j] * inverse + kRoundMagic);
    const auto integer = static_cast<int16_t>(bits - std::bit_cast<int32_t>(kRoundMagic));
    integers[j] = integer;
    total += integer;
  }
  *scale = finite ? largest * (1.0f / 32767.0f) : std::numeric_limits<float>::quiet_NaN();
  *sum = *scale * static_cast<float>(total);
}

template <int kHeadDim>
inline void prepare_queries(const KvAttentionParams& p, const KvAttentionTask& task,
                            const Workspace<kHeadDim>& w) {
  constexpr int kLow = KvLayout<kHeadDim>::kLowDims;
  const int64_t group = p.group();
  for (int64_t r = 0; r < task.queries * group; ++r) {
    const int64_t token = task.first_query + r / group, head = task.kv_head * group + r % group;
    alignas(64) float x[kHeadDim];
    load_row(p.q.data, p.q.type, token * p.q_stride + head * kHeadDim, kHeadDim, x);
    for (int d = 0; d < kHeadDim; ++d) x[d] *= p.scale;
    alignas(64) int16_t integers[kHeadDim];
    QueryRow& query = w.queries[r];
    quantize_query<kLow>(x, integers, &query.scale_lo, &query.sum_lo);
    quantize_query<kHeadDim - kLow>(x + kLow, integers + kLow, &query.scale_hi, &query.sum_hi);
    int16_t* ordered = w.integers + r * kHeadDim;
    for (int n = 0; n < kHeadDim / 2; ++n) {
      store_bits(ordered + 2 * n, load_bits<int32_t>(integers + 2 * kPairOrder<kHeadDim>.pair[n]));
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

// Loads tokens [first, end) of the sequence, at most kKeyBlock of them. Tokens from `end` on get
// scales and offsets 0, so the contents of a page's tail have no effect. Prefetches the next block,
// which the hardware does not do across the streams of a page (8 x 4096 tokens, ns per token: 45
// without prefetch, 40 into the first-level cache, 30 into the second).
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
    load_key_tile<kHeadDim>(tile.keys, at, block);
    load_value_tile<kHeadDim>(tile.values, at, block);
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

// Vector `v` of a row's 64 numbers.
inline Vec numbers(const int32_t* sums, int v) {
  return __builtin_convertvector(load_bits<IVec>(sums + v * kLanes), Vec);
}
inline Vec numbers(const float* x, int v) { return load_bits<Vec>(x + v * kLanes); }

// x where the token is visible, else `otherwise`.
template <bool kFull>
inline Vec in_sight(int v, int visible, Vec x, float otherwise) {
  if constexpr (kFull) return x;
  return lane_index() + v * kLanes < visible ? x : set1(otherwise);
}

// Scores of one row and block -> 16-bit weights for the codes of V. `kFull` says that all tokens
// are visible, else the first `visible` are; the bits do not depend on it.
template <bool kFull>
inline BlockSoftmax block_softmax(const int32_t* sums_lo, const int32_t* sums_hi, const QueryRow& q,
                                  const float (*metadata)[kKeyBlock], int visible,
                                  int16_t* weights_lo, int16_t* weights_hi) {
  constexpr int kVectors = kKeyBlock / kLanes, kVirtual = 16 / kLanes;

  Vec scores[kVectors], largest[kVirtual];
  for (int v = 0; v < kVirtual; ++v) largest[v] = set1(-std::numeric_limits<float>::infinity());
  for (int v = 0; v < kVectors; ++v) {
    const Vec lo = numbers(sums_lo, v) * q.scale_lo * numbers(metadata[0], v) +
                   numbers(metadata[1], v) * q.sum_lo;
    const Vec hi = numbers(sums_hi, v) * q.scale_hi * numbers(metadata[2], v) +
                   numbers(metadata[3], v) * q.sum_hi;
    scores[v] = in_sight<kFull>(v, visible, lo + hi, -std::numeric_limits<float>::infinity());
    largest[v % kVirtual] = max(scores[v], largest[v % kVirtual]);
  }
  BlockSoftmax out;
  out.max = fold<Maximum>(largest);

  Vec lo[kVectors], hi[kVectors];
  Vec sum[kVirtual] = {}, offset_lo[kVirtual] = {}, offset_hi[kVirtual] = {};
  Vec top_lo[kVirtual] = {}, top_hi[kVirtual] = {};
  for (int v = 0; v < kVectors; ++v) {
    const int lane = v % kVirtual;
    const Vec weight = exp2(scores[v] - out.max);
    sum[lane] += weight;
    offset_lo[lane] += in_sight<kFull>(v, visible, weight * numbers(metadata[5], v), 0.0f);
    offset_hi[lane] += in_sight<kFull>(v, visible, weight * numbers(metadata[7], v), 0.0f);
    lo[v] = in_sight<kFull>(v, visible, weight * numbers(metadata[4], v), 0.0f);
    hi[v] = in_sight<kFull>(v, visible, weight * numbers(metadata[6], v), 0.0f);
    top_lo[lane] = max(lo[v], top_lo[lane]);
    top_hi[lane] = max(hi[v], top_hi[lane]);
  }
  out.sum = fold<Sum>(sum);
  out.offset_lo = fold<Sum>(offset_lo);
  out.offset_hi = fold<Sum>(offset_hi);
  const float largest_lo = fold<Maximum>(top_lo), largest_hi = fold<Maximum>(top_hi);
  const float inverse_lo = largest_lo > 0x1p-100f ? 32767.0f / largest_lo : 0.0f;
  const float inverse_hi = largest_hi > 0x1p-100f ? 32767.0f / largest_hi : 0.0f;
  out.factor_lo = largest_lo * (1.0f / 32767.0f);
  out.factor_hi = largest_hi * (1.0f / 32767.0f);
  for (int v = 0; v < kVectors; ++v) {
    store_bits(weights_lo + v * kLanes,
               __builtin_convertvector(round_to_int(lo[v] * inverse_lo), WeightVec));
    store_bits(weights_hi + v * kLanes,
               __builtin_convertvector(round_to_int(hi[v] * inverse_hi), WeightVec));
  }
  return out;
}

// Merges (max, sum, part [head_dim]) into `state` under a common maximum.
template <int kHeadDim>
inline void merge(float* state, float max, float sum, const float* part) {
  float& state_max = state[kHeadDim];
  float& state_sum = state[kHeadDim + 1];
  const float common = max > state_max ? max : state_max;
  const float old_factor = exp2(state_max - common), factor = exp2(max - common);
  state_max = common;
  state_sum = state_sum * old_factor + sum * factor;
  for (int d = 0; d < kHeadDim; ++d) state[d] = state[d] * old_factor + part[d] * factor;
}

template <int kHeadDim>
inline void clear_state(float* state) {
  for (int d = 0; d < kHeadDim; ++d) state[d] = 0.0f;
  state[kHeadDim] = -std::numeric_limits<float>::infinity();
  state[kHeadDim + 1] = 0.0f;
}

// Rows [first, first + kRows) against one block.
template <int kHeadDim, int kRows>
void attend_rows(const KvAttentionParams& p, const KvAttentionTask& task, int64_t first_token,
                 int64_t first, const Workspace<kHeadDim>& w) {
  constexpr int kLow = KvLayout<kHeadDim>::kLowDims;
  constexpr int kLowColumns = (kLow + 15) / 16 * 16;  // head dim 64: 8 columns more than needed
  const Block<kHeadDim>& block = *w.block;
  alignas(64) int32_t score_lo[kRows][kKeyBlock], score_hi[kRows][kKeyBlock];
  key_products<kHeadDim, kRows>(w.integers + first * kHeadDim, block, score_lo[0], score_hi[0]);

  alignas(64) int16_t weights_lo[kRows][kKeyBlock], weights_hi[kRows][kKeyBlock];
  BlockSoftmax softmax[kRows];
  for (int r = 0; r < kRows; ++r) {
    const int64_t visible = task.visible + (first + r) / p.group() - first_token;
    const auto run = visible >= kKeyBlock ? block_softmax<true> : block_softmax<false>;
    softmax[r] = run(score_lo[r], score_hi[r], w.queries[first + r], block.metadata,
                     static_cast<int>(visible), weights_lo[r], weights_hi[r]);
  }

  alignas(64) int32_t out_lo[kRows][kLowColumns], out_hi[kRows][16];
  value_products<kHeadDim, kRows, 0, kLowColumns / kLanes>(weights_lo[0], kKeyBlock, block,
                                                           out_lo[0], kLowColumns);
  value_products<kHeadDim, kRows, (kHeadDim - 16) / kLanes, kHeadDim / kLanes>(
      weights_hi[0], kKeyBlock, block, out_hi[0], 16);
  for (int r = 0; r < kRows; ++r) {
    alignas(64) float part[kHeadDim];
    const BlockSoftmax& s = softmax[r];
    for (int d = 0; d < kLow; ++d) {
      part[d] = static_cast<float>(out_lo[r][d]) * s.factor_lo + s.offset_lo;
    }
    for (int d = kLow; d < kHeadDim; ++d) {
      part[d] = static_cast<float>(out_hi[r][d - (kHeadDim - 16)]) * s.factor_hi + s.offset_hi;
    }
    merge<kHeadDim>(w.split + (first + r) * kv_state_floats(kHeadDim), s.max, s.sum, part);
  }
}

template <int kHeadDim>
inline void split_states(const KvAttentionParams& p, const KvAttentionTask& task, int64_t split,
                         const Workspace<kHeadDim>& w) {
  static constexpr decltype(&attend_rows<kHeadDim, 1>) kAttendRows[] = {
      attend_rows<kHeadDim, 1>, attend_rows<kHeadDim, 2>, attend_rows<kHeadDim, 3>,
      attend_rows<kHeadDim, 4>};
  const int64_t group = p.group(), rows = task.queries * group;
  const int64_t end = std::min<int64_t>(task.last_visible(), (split + 1) * kSplitTokens);
  for (int64_t r = 0; r < rows; ++r) clear_state<kHeadDim>(w.split + r * kv_state_floats(kHeadDim));
  for (int64_t token = split * kSplitTokens; token < end; token += kKeyBlock) {
    load_block<kHeadDim>(p, task, token, std::min<int64_t>(end, token + kKeyBlock), w.block);
    // The first query that sees a token of this block: visible + i > token.
    int64_t row = std::max<int64_t>(0, token - task.visible + 1) * group;
    for (; row < rows; row += 4) {
      kAttendRows[std::min<int64_t>(4, rows - row) - 1](p, task, token, row, w);
    }
  }
}

// Merges the states of one split into the total; rows that see none of its tokens are unchanged.
template <int kHeadDim>
inline void merge_split(const KvAttentionParams& p, const KvAttentionTask& task, int64_t split,
                        const float* states, const Workspace<kHeadDim>& w) {
  constexpr int64_t kFloats = kv_state_floats(kHeadDim);
  for (int64_t r = 0; r < task.queries * p.group(); ++r) {
    if (split == 0) clear_state<kHeadDim>(w.total + r * kFloats);
    if (task.visible + r / p.group() <= split * kSplitTokens) continue;
    const float* part = states + r * kFloats;
    merge<kHeadDim>(w.total + r * kFloats, part[kHeadDim], part[kHeadDim + 1], part);
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
    alignas(64) uint8_t rounded[kHeadDim * sizeof(float)];
    store_row(row, kHeadDim, p.out_type, rounded, 0);
    const int64_t size = p.out_type == FloatType::kFloat32 ? 4 : 2;
    const KvOutputRow to(p, token, head);
    auto* out = static_cast<uint8_t*>(p.out);
    __builtin_memcpy(out + to.low * size, rounded, to.low_dims * size);
    __builtin_memcpy(out + to.index(to.low_dims) * size, rounded + to.low_dims * size,
                     p.head_dim_hi * size);
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

// All splits of a task; writes `out`.
void attend(const KvAttentionParams& p, const KvAttentionTask& task, float* workspace) {
  p.head_dim == 128 ? attend_task<128>(p, task, workspace) : attend_task<64>(p, task, workspace);
}

// One split into `states` [rows, kv_state_floats].
void attend_split(const KvAttentionParams& p, const KvAttentionTask& task, int64_t split,
                  float* states, float* workspace) {
  p.head_dim == 128 ? attend_one_split<128>(p, task, split, states, workspace)
                    : attend_one_split<64>(p, task, split, states, workspace);
}

// States [splits, rows, kv_state_floats] in order; writes `out`.
void merge_splits(const KvAttentionParams& p, const KvAttentionTask& task, const float* states,
                  float* workspace) {
  p.head_dim == 128 ? merge_all<128>(p, task, states, workspace)
                    : merge_all<64>(p, task, states, workspace);
}
