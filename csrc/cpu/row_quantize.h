// One float32 row -> codes and (scale, zero): docs/formats.md section 2.
// Included inside the namespace of an instruction set.

struct Range {
  float min, max;  // widened to contain 0, which changes no scale
  bool finite;
};

inline Range row_range(const float* x, int64_t k) {
  constexpr int kUnroll = 4;  // hides the latency of min and max
  Vec mins[kUnroll] = {}, maxs[kUnroll] = {}, nan[kUnroll] = {};
  int64_t i = 0;
  for (; i + kUnroll * kLanes <= k; i += kUnroll * kLanes) {
    for (int u = 0; u < kUnroll; ++u) {
      const Vec v = load(x + i + u * kLanes);
      mins[u] = min(mins[u], v);
      maxs[u] = max(maxs[u], v);
      nan[u] += v * 0.0f;  // 0, and NaN from the first NaN or infinite v on
    }
  }
  for (; i < k; i += kLanes) {
    const Vec v = load_up_to(x + i, k - i);
    mins[0] = min(mins[0], v);
    maxs[0] = max(maxs[0], v);
    nan[0] += v * 0.0f;
  }
  for (int u = 1; u < kUnroll; ++u) {
    mins[0] = min(mins[0], mins[u]);
    maxs[0] = max(maxs[0], maxs[u]);
    nan[0] += nan[u];
  }
  Range range{mins[0][0], maxs[0][0], true};
  for (int lane = 0; lane < kLanes; ++lane) {
    range.min = mins[0][lane] < range.min ? mins[0][lane] : range.min;
    range.max = maxs[0][lane] > range.max ? maxs[0][lane] : range.max;
    range.finite = range.finite && nan[0][lane] == 0.0f;
  }
  return range;
}

// value -> code of one part, as floats.
struct Coder {
  Coder(ScaleZero q, int bits)
      : inv_scale(set1(1.0f / q.scale)),
        zero(set1(q.zero)),
        lowest(set1(-static_cast<float>(1 << (bits - 1)))),
        highest(set1(static_cast<float>((1 << (bits - 1)) - 1))) {}

  Vec operator()(Vec x) const { return max(lowest, min(highest, round(x * inv_scale) + zero)); }

  Vec inv_scale, zero, lowest, highest;
};

inline void write_codes(const float* x, int64_t k, const Coder& code, int8_t* codes) {
  int64_t i = 0;
  for (; i + kLanes <= k; i += kLanes) store(codes + i, code(load(x + i)));
  if (i < k) store_up_to(codes + i, code(load_up_to(x + i, k - i)), k - i);
}

inline void write_nibbles(const float* x, int64_t k, const Coder& code, uint8_t* bytes) {
  constexpr int64_t kBlock = 64;  // codes packed at once
  for (int64_t i = 0; i < k; i += kBlock) {
    int8_t codes[kBlock];
    const int64_t count = k - i < kBlock ? k - i : kBlock;
    write_codes(x + i, count, code, codes);
    for (int64_t j = 0; j < count / 2; ++j) {
      bytes[i / 2 + j] = pack_int4(codes[2 * j], codes[2 * j + 1]);
    }
  }
}

inline void quantize_part(const float* x, int64_t k, int bits, bool packed, bool symmetric,
                          float clip, void* codes, float* params) {
  if (k == 0) {
    params[0] = params[1] = 0.0f;
    return;
  }
  const Range range = row_range(x, k);
  if (!range.finite) {
    params[0] = std::numeric_limits<float>::quiet_NaN();
    params[1] = 0.0f;
    std::memset(codes, 0, static_cast<size_t>(packed ? k / 2 : k));
    return;
  }
  const float min = range.min * clip, max = range.max * clip;
  const ScaleZero q =
      symmetric ? symmetric_scale(min, max, bits) : asymmetric_scale(min, max, bits);
  params[0] = q.scale;
  params[1] = q.zero;
  if (packed) {
    write_nibbles(x, k, Coder(q, bits), static_cast<uint8_t*>(codes));
  } else {
    write_codes(x, k, Coder(q, bits), static_cast<int8_t*>(codes));
  }
}

// x: [k_lo + k_hi] floats of row `row`.
inline void quantize_row(const float* x, const MixedRows& rows, int64_t row) {
  const int64_t lo_bytes = rows.packed ? rows.k_lo / 2 : rows.k_lo;
  float* params = rows.params + 4 * row;
  quantize_part(x, rows.k_lo, rows.lo_bits, rows.packed, rows.symmetric, rows.clip,
                static_cast<uint8_t*>(rows.q_lo) + row * lo_bytes, params);
  quantize_part(x + rows.k_lo, rows.k_hi, 8, false, rows.symmetric, 1.0f,
                rows.q_hi + row * rows.k_hi, params + 2);
}
