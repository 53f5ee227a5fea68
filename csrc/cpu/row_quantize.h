// One float32 row -> codes and (scale, zero): docs/formats.md section 2.
// Included inside the namespace of an instruction set, after its verbs (cpu/simd_*.h).
#pragma once

#include "cpu/row_access.h"

struct Range {
  float lo, hi;  // widened to contain 0, which no scale depends on
  bool finite;
};

inline Range row_range(const float* x, int64_t k) {
  constexpr int kUnroll = 4;  // hides the latency of min and max
  Vec lo[kUnroll], hi[kUnroll], nan[kUnroll];
  for (int u = 0; u < kUnroll; ++u) lo[u] = hi[u] = nan[u] = set1(0.0f);
  int64_t i = 0;
  for (; i + kUnroll * Vec::kLanes <= k; i += kUnroll * Vec::kLanes) {
    for (int u = 0; u < kUnroll; ++u) {
      const Vec v = load(x + i + u * Vec::kLanes);
      lo[u] = min(lo[u], v);
      hi[u] = max(hi[u], v);
      nan[u] = nan[u] + (v - v);  // 0, or NaN for good once v is NaN or infinite
    }
  }
  for (; i < k; i += Vec::kLanes) {
    const Vec v = load_up_to(x + i, k - i);
    lo[0] = min(lo[0], v);
    hi[0] = max(hi[0], v);
    nan[0] = nan[0] + (v - v);
  }
  for (int u = 1; u < kUnroll; ++u) {
    lo[0] = min(lo[0], lo[u]);
    hi[0] = max(hi[0], hi[u]);
    nan[0] = nan[0] + nan[u];
  }
  float lows[Vec::kLanes], highs[Vec::kLanes], nans[Vec::kLanes];
  store(lows, lo[0]);
  store(highs, hi[0]);
  store(nans, nan[0]);
  Range range{lows[0], highs[0], true};
  for (int lane = 0; lane < Vec::kLanes; ++lane) {
    range.lo = lows[lane] < range.lo ? lows[lane] : range.lo;
    range.hi = highs[lane] > range.hi ? highs[lane] : range.hi;
    range.finite = range.finite && nans[lane] == 0.0f;
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

inline void write_containers(const float* x, int64_t k, const Coder& code, int8_t* codes) {
  int64_t i = 0;
  for (; i + Vec::kLanes <= k; i += Vec::kLanes) store(codes + i, code(load(x + i)));
  if (i < k) store_up_to(codes + i, code(load_up_to(x + i, k - i)), k - i);
}

inline void write_nibbles(const float* x, int64_t k, const Coder& code, uint8_t* bytes) {
  constexpr int64_t kBlock = 64;  // codes packed at once
  for (int64_t i = 0; i < k; i += kBlock) {
    int8_t codes[kBlock];
    const int64_t count = k - i < kBlock ? k - i : kBlock;
    write_containers(x + i, count, code, codes);
    for (int64_t j = 0; j < count / 2; ++j) {
      bytes[i / 2 + j] = static_cast<uint8_t>((codes[2 * j] & 15) | ((codes[2 * j + 1] & 15) << 4));
    }
  }
}

inline void quantize_part(const float* x, int64_t k, int bits, bool packed, const MixedRows& rows,
                          void* codes, float* params) {
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
  const float lo = range.lo * rows.clip, hi = range.hi * rows.clip;
  const ScaleZero q =
      rows.symmetric ? symmetric_scale(lo, hi, bits) : asymmetric_scale(lo, hi, bits);
  params[0] = q.scale;
  params[1] = q.zero;
  if (packed) {
    write_nibbles(x, k, Coder(q, bits), static_cast<uint8_t*>(codes));
  } else {
    write_containers(x, k, Coder(q, bits), static_cast<int8_t*>(codes));
  }
}

// x: [k_lo + k_hi] floats of row `row`.
inline void quantize_row(const float* x, const MixedRows& rows, int64_t row) {
  const int64_t lo_bytes = rows.packed ? rows.k_lo / 2 : rows.k_lo;
  float* params = rows.params + 4 * row;
  quantize_part(x, rows.k_lo, rows.lo_bits, rows.packed, rows,
                static_cast<uint8_t*>(rows.q_lo) + row * lo_bytes, params);
  quantize_part(x + rows.k_lo, rows.k_hi, 8, false, rows, rows.q_hi + row * rows.k_hi, params + 2);
}
