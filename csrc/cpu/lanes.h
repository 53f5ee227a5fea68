// Arithmetic over vectors of the native width, shared by the instruction sets of kv_append and
// kv_attention. Included inside the namespace of an instruction set that has defined kLanes,
// Floats, Ints (GNU vectors of kLanes numbers), load_halves and store_halves; hence no include
// guard.
//
// Every operation is one correctly rounded float32 operation per lane and no result depends on
// kLanes, so that all instruction sets agree bit for bit.

template <class Vector>
inline Vector load(const void* p) {
  Vector v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
template <class Vector>
inline void store(void* p, const Vector& v) {
  __builtin_memcpy(p, &v, sizeof(v));
}
inline Floats broadcast(float x) { return Floats{} + x; }
inline Ints broadcast(int32_t x) { return Ints{} + x; }

// Vectors of any power of two of numbers: parts of a row narrower than a register, and folds.
template <int kWidth>
struct Vectors {
  typedef float Floats __attribute__((vector_size(kWidth * sizeof(float))));
  typedef int32_t Ints __attribute__((vector_size(kWidth * sizeof(float))));
};

// maximum is the second operand where either is NaN. Structs and not lambdas: g++ 12 compiles a
// lambda for the baseline instruction set, whatever the pragma around it says.
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
  Floats operator()(Floats a, Floats b) const { return maximum(a, b); }
};

// Lanes j and j + kWidth / 2 meet, then the halves of what is left: 16 lanes fold in the same order
// whatever the width of the registers that hold them.
template <class Op, int kWidth>
inline float fold_lanes(typename Vectors<kWidth>::Floats v) {
  if constexpr (kWidth == 1) {
    return v[0];
  } else {
    typename Vectors<kWidth / 2>::Floats low, high;
    __builtin_memcpy(&low, &v, sizeof(low));
    __builtin_memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof(low), sizeof(high));
    return fold_lanes<Op, kWidth / 2>(Op()(low, high));
  }
}
template <class Op>
inline float fold(Floats (&v)[16 / kLanes]) {
  for (int n = 16 / kLanes / 2; n >= 1; n /= 2) {
    for (int j = 0; j < n; ++j) v[j] = Op()(v[j], v[j + n]);
  }
  return fold_lanes<Op, kLanes>(v[0]);
}

// x + kRoundMagic rounds |x| < 2^22 half to even and leaves the integer in the low mantissa bits.
inline constexpr float kRoundMagic = 0x1.8p23f;

// Numbers to and from float32. `count` is a multiple of kLanes.
inline void load_row(const void* row, FloatType type, int64_t first, int count, float* out) {
  if (type == FloatType::kFloat32) {
    __builtin_memcpy(out, static_cast<const float*>(row) + first, count * sizeof(float));
    return;
  }
  const uint16_t* in = static_cast<const uint16_t*>(row) + first;
  if (type == FloatType::kFloat16) {
    for (int j = 0; j < count; j += kLanes) store(out + j, load_halves(in + j));
    return;
  }
  for (int j = 0; j < count; ++j) out[j] = std::bit_cast<float>(static_cast<uint32_t>(in[j]) << 16);
}

inline void store_row(const float* in, int count, FloatType type, void* row, int64_t first) {
  if (type == FloatType::kFloat32) {
    __builtin_memcpy(static_cast<float*>(row) + first, in, count * sizeof(float));
    return;
  }
  uint16_t* out = static_cast<uint16_t*>(row) + first;
  if (type == FloatType::kFloat16) {
    for (int j = 0; j < count; j += kLanes) store_halves(out + j, load<Floats>(in + j));
    return;
  }
  for (int j = 0; j < count; ++j) {
    const uint32_t bits = std::bit_cast<uint32_t>(in[j]);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    out[j] = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
  }
}

// row := row cos + rotate_half(row) sin.
template <int kHeadDim>
inline void rope(float* row, const float* cos, const float* sin) {
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
inline void rotate_block(const float* rows, const float* rotation, float* out) {
  constexpr int kVectors = kLanes == 16 ? 4 : 2;
  for (int column = 0; column < kHeadDim; column += kVectors * kLanes) {
    Floats sums[kRows][kVectors] = {};
    for (int d = 0; d < kHeadDim; ++d) {
      const float* u = rotation + d * kHeadDim + column;
      for (int v = 0; v < kVectors; ++v) {
        const Floats weights = load<Floats>(u + v * kLanes);
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
inline void rotate(float* rows, int count, const float* rotation) {
  alignas(64) float out[kRotatedRows * kHeadDim];
  switch (count) {
    case 4: rotate_block<kHeadDim, 4>(rows, rotation, out); break;
    case 3: rotate_block<kHeadDim, 3>(rows, rotation, out); break;
    case 2: rotate_block<kHeadDim, 2>(rows, rotation, out); break;
    default: rotate_block<kHeadDim, 1>(rows, rotation, out); break;
  }
  __builtin_memcpy(rows, out, count * kHeadDim * sizeof(float));
}
