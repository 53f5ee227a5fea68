// The one CPU body of kv_append. Included inside the namespace of an instruction set.

// The bytes that a token owns in a K or V tile, and the dims whose codes each of them holds: `high`
// is the dim of the high nibble, or kWide where the byte is one 8-bit code.
inline constexpr uint8_t kWide = 255;
struct OwnedByte {
  uint16_t byte;
  uint8_t low, high;
};
template <int kHeadDim>
struct OwnedBytes {
  using Layout = KvLayout<kHeadDim>;
  OwnedByte k[Layout::kTileTokens][Layout::kRowBytes] = {};
  OwnedByte v[Layout::kTileTokens][Layout::kRowBytes] = {};

  constexpr OwnedBytes() {
    for (int token = 0; token < Layout::kTileTokens; ++token) {
      fill(k[token], [=](int dim) { return kv_k_place<kHeadDim>(token, dim); });
      fill(v[token], [=](int dim) { return kv_v_place<kHeadDim>(token, dim); });
    }
  }

  template <class Place>
  static constexpr void fill(OwnedByte* owned, Place place) {
    int16_t index[kKvTileBytes] = {};  // 1 + the position in `owned`
    int count = 0;
    for (int dim = 0; dim < kHeadDim; ++dim) {
      const KvPlace p = place(dim);
      if (index[p.byte] == 0) {
        owned[count] = {static_cast<uint16_t>(p.byte), 0, p.wide ? kWide : uint8_t{0}};
        index[p.byte] = static_cast<int16_t>(++count);
      }
      OwnedByte& entry = owned[index[p.byte] - 1];
      (p.shift == 0 ? entry.low : entry.high) = static_cast<uint8_t>(dim);
    }
  }
};
template <int kHeadDim>
inline constexpr OwnedBytes<kHeadDim> kOwnedBytes{};

// kv_range of the extremes of kCount numbers; NaN if one of them is NaN or infinite.
template <int kCount>
inline KvRange row_range(const float* x, int levels) {
  constexpr int kWidth = kCount < kLanes ? kCount : kLanes;
  using Wide = typename Vectors<kWidth>::Vec;
  using WideInts = typename Vectors<kWidth>::IVec;
  Wide min = load_bits<Wide>(x), max = min;
  WideInts magnitude{};
  for (int first = 0; first < kCount; first += kWidth) {
    // The last vector of 56 numbers overlaps the previous one, which does not change the extremes.
    const Wide value = load_bits<Wide>(x + (first + kWidth <= kCount ? first : kCount - kWidth));
    const WideInts bits = __builtin_bit_cast(WideInts, value) & 0x7fffffff;
    min = value < min ? value : min;
    max = value > max ? value : max;
    magnitude = bits > magnitude ? bits : magnitude;
  }
  WideInts lane{};
  for (int j = 0; j < kWidth; ++j) lane[j] = j;
  for (int distance = kWidth / 2; distance >= 1; distance /= 2) {
    const Wide other_min = __builtin_shuffle(min, lane ^ distance);
    const Wide other_max = __builtin_shuffle(max, lane ^ distance);
    const WideInts other = __builtin_shuffle(magnitude, lane ^ distance);
    min = other_min < min ? other_min : min;
    max = other_max > max ? other_max : max;
    magnitude = other > magnitude ? other : magnitude;
  }
  return magnitude[0] >= 0x7f800000 ? kKvNanRange : kv_range(min[0], max[0], levels);
}

// kv_code of kCount numbers. A part with NaN has inv_scale 0 and gives 0 for finite numbers; NaN
// compares false and gives 0 too.
template <int kCount>
inline void row_codes(const float* x, const KvRange& range, int levels, uint8_t* codes) {
  const float top = static_cast<float>(levels);
  for (int j = 0; j < kCount; ++j) {
    float code = (x[j] - range.offset) * range.inv_scale;
    code = code < top ? code : (code >= top ? top : 0.0f);
    code = code > 0.0f ? code : 0.0f;
    const int32_t bits = std::bit_cast<int32_t>(code + kRoundMagic);
    codes[j] = static_cast<uint8_t>(bits - std::bit_cast<int32_t>(kRoundMagic));
  }
}

struct StoredRanges {
  Half low_scale, low_offset, high_scale, high_offset;
};

// Quantizes one row and stores its bytes; returns the stored ranges of its two parts.
// Flattened: with calls of kv_range a row took 14 % longer.
template <int kHeadDim>
[[gnu::flatten]] inline StoredRanges store_row_codes(const float* x, bool uniform,
                                                     const OwnedByte* owned, uint8_t* tile) {
  using Layout = KvLayout<kHeadDim>;
  alignas(64) uint8_t codes[kHeadDim];
  KvRange low, high;
  if (uniform) {
    low = high = row_range<kHeadDim>(x, kKvLowLevels);
    row_codes<kHeadDim>(x, low, kKvLowLevels, codes);
  } else {
    low = row_range<Layout::kLowDims>(x, kKvLowLevels);
    high = row_range<Layout::kHighDims>(x + Layout::kLowDims, kKvHighLevels);
    row_codes<Layout::kLowDims>(x, low, kKvLowLevels, codes);
    row_codes<Layout::kHighDims>(x + Layout::kLowDims, high, kKvHighLevels,
                                 codes + Layout::kLowDims);
  }
  for (int i = 0; i < Layout::kRowBytes; ++i) {
    const OwnedByte entry = owned[i];
    const int nibble = entry.high == kWide ? 0 : codes[entry.high] << 4;
    tile[entry.byte] = static_cast<uint8_t>(codes[entry.low] | nibble);
  }
  return {low.stored_scale, low.stored_offset, high.stored_scale, high.stored_offset};
}

template <int kHeadDim>
inline void append_row(const KvAppendParams& p, int64_t token, int64_t head, const float* k,
                       const float* v) {
  using Layout = KvLayout<kHeadDim>;
  const int64_t slot = p.slot_mapping[token];
  const int64_t page = slot / p.page_size, position = slot % p.page_size;
  uint8_t* chunk = p.cache + (page * p.n_kv + head) * p.page_size * Layout::kTokenBytes;
  const auto& owned = kOwnedBytes<kHeadDim>;
  const int64_t in_tile = position % Layout::kTileTokens;
  const StoredRanges ranges[2] = {
      store_row_codes<kHeadDim>(k, p.uniform, owned.k[in_tile],
                                chunk + kv_k_tile_byte<kHeadDim>(position)),
      store_row_codes<kHeadDim>(v, p.uniform, owned.v[in_tile],
                                chunk + kv_v_tile_byte<kHeadDim>(p.page_size, position))};
  static_assert(sizeof(ranges) == kKvMetadataBytes);
  __builtin_memcpy(chunk + kv_metadata_byte<kHeadDim>(p.page_size, position), ranges,
                   sizeof(ranges));
}

// row := row cos + rotate_half(row) sin.
template <int kHeadDim>
inline void apply_rope(float* row, const float* cos, const float* sin) {
  constexpr int kHalf = kHeadDim / 2;
  for (int j = 0; j < kHalf; ++j) {
    const float first = row[j], second = row[j + kHalf];
    row[j] = first * cos[j] - second * sin[j];
    row[j + kHalf] = second * cos[j + kHalf] + first * sin[j + kHalf];
  }
}

// out[r] = rows[r] U for kRows rows of kHeadDim; every sum runs over d in order. The accumulators
// of a block of columns stay in registers.
template <int kHeadDim, int kRows>
inline void multiply_by_rotation(const float* rows, const float* rotation, float* out) {
  constexpr int kVectors = kLanes == 16 ? 4 : 2;
  for (int column = 0; column < kHeadDim; column += kVectors * kLanes) {
    Vec sums[kRows][kVectors] = {};
    for (int d = 0; d < kHeadDim; ++d) {
      const float* u = rotation + d * kHeadDim + column;
      for (int v = 0; v < kVectors; ++v) {
        const Vec weights = load(u + v * kLanes);
        for (int r = 0; r < kRows; ++r) sums[r][v] += weights * rows[r * kHeadDim + d];
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        store(out + r * kHeadDim + column + v * kLanes, sums[r][v]);
      }
    }
  }
}

inline constexpr int kRotatedRows = 4;  // rows whose sums share one pass over the rotation

// rows := rows U, `count` <= kRotatedRows rows of kHeadDim.
template <int kHeadDim>
inline void apply_key_rotation(float* rows, int count, const float* rotation) {
  alignas(64) float out[kRotatedRows * kHeadDim];
  switch (count) {
    case 4: multiply_by_rotation<kHeadDim, 4>(rows, rotation, out); break;
    case 3: multiply_by_rotation<kHeadDim, 3>(rows, rotation, out); break;
    case 2: multiply_by_rotation<kHeadDim, 2>(rows, rotation, out); break;
    default: multiply_by_rotation<kHeadDim, 1>(rows, rotation, out); break;
  }
  __builtin_memcpy(rows, out, count * kHeadDim * sizeof(float));
}

// The row of x that starts at number `first`, after RoPE.
template <int kHeadDim>
inline void load_rope(const KvAppendParams& p, const void* x, int64_t token, int64_t first,
                      float* out) {
  load_row(x, p.type, first, kHeadDim, out);
  if (!p.cos.data) return;
  apply_rope<kHeadDim>(out, p.cos.floats() + token * kHeadDim, p.sin.floats() + token * kHeadDim);
}

template <int kHeadDim>
inline const float* group_rotation(const KvAppendParams& p, int64_t group) {
  const float* rotation = p.rotation.floats();
  return rotation ? rotation + group * kHeadDim * kHeadDim : nullptr;
}

template <int kHeadDim>
inline void append_rows(const KvAppendParams& p, int64_t group, int64_t begin, int64_t end) {
  struct Row {
    int64_t token, head;
  };
  const KvAppendGroups rows_of(p, p.n_kv);
  const float* rotation = group_rotation<kHeadDim>(p, group);
  alignas(64) float k[kRotatedRows * kHeadDim], v[kHeadDim];
  while (begin < end) {
    Row rows[kRotatedRows];
    int count = 0;
    for (; begin < end && count < kRotatedRows; ++begin) {
      const Row row{rows_of.token(begin), rows_of.head(group, begin)};
      if (p.slot_mapping[row.token] < 0) continue;
      rows[count] = row;
      float* out = k + count++ * kHeadDim;
      load_rope<kHeadDim>(p, p.k, row.token, row.token * p.k_stride + row.head * kHeadDim, out);
    }
    if (count == 0) return;
    if (rotation) apply_key_rotation<kHeadDim>(k, count, rotation);
    for (int r = 0; r < count; ++r) {
      load_row(p.v, p.type, rows[r].token * p.v_stride + rows[r].head * kHeadDim, kHeadDim, v);
      append_row<kHeadDim>(p, rows[r].token, rows[r].head, k + r * kHeadDim, v);
    }
  }
}

template <int kHeadDim>
inline void rotate_queries(const KvAppendParams& p, int64_t group, int64_t begin, int64_t end) {
  const KvAppendGroups rows_of(p, p.n_q);
  const float* rotation = group_rotation<kHeadDim>(p, group);
  alignas(64) float q[kRotatedRows * kHeadDim];
  for (; begin < end; begin += kRotatedRows) {
    const int count = static_cast<int>(end - begin < kRotatedRows ? end - begin : kRotatedRows);
    for (int r = 0; r < count; ++r) {
      const int64_t token = rows_of.token(begin + r), head = rows_of.head(group, begin + r);
      load_rope<kHeadDim>(p, p.q, token, token * p.q_stride + head * kHeadDim, q + r * kHeadDim);
    }
    if (rotation) apply_key_rotation<kHeadDim>(q, count, rotation);
    for (int r = 0; r < count; ++r) {
      const int64_t token = rows_of.token(begin + r), head = rows_of.head(group, begin + r);
      __builtin_memcpy(p.rotated_q + (token * p.n_q + head) * kHeadDim, q + r * kHeadDim,
                       kHeadDim * sizeof(float));
    }
  }
}

// Appends rows [begin, end) of group `group`.
void kv_append_rows(const KvAppendParams& p, int64_t group, int64_t begin, int64_t end) {
  if (p.head_dim == 128) {
    append_rows<128>(p, group, begin, end);
  } else {
    append_rows<64>(p, group, begin, end);
  }
}

// Rotates rows [begin, end) of group `group` of q.
void kv_rotate_queries(const KvAppendParams& p, int64_t group, int64_t begin, int64_t end) {
  if (p.head_dim == 128) {
    rotate_queries<128>(p, group, begin, end);
  } else {
    rotate_queries<64>(p, group, begin, end);
  }
}
