// RoPE and the rotation of the keys' basis on rows of one head. Included inside the namespace of an
// instruction set.

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
