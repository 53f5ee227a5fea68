// The SIMD operations that are the same on every instruction set. Included by cpu/simd_*.h, which
// define for their set, inside its namespace:
//
//   kLanes, Vec, IVec            numbers of a register; GNU vectors of kLanes floats and int32
//   min, max                     of two Vecs; the second operand where either is NaN
//   round                        half to even, to floats
//   round_to_int                 half to even, to int32, for |x| < 2^22
//   load(p), store(p, x)         a Vec from and to float, Half or BFloat16
//   store(int8_t*, x)            integers in [-128, 127] as bytes
//   dot_pairs(sums, a, b)        sums + a.low b.low + a.high b.high per lane, of signed 16-bit
//                                halves, modulo 2^32
//   hadamard_lanes(x, width)     the stages below min(width, kLanes) of a Hadamard transform
//
// + - * / and comparisons are the vectors' own. Each is one correctly rounded float32 operation a
// lane, and no result depends on kLanes, so that all instruction sets agree bit for bit.

inline Vec set1(float x) { return Vec{} + x; }
inline IVec set1(int32_t x) { return IVec{} + x; }

inline IVec lane_index() {
  IVec index{};
  for (int j = 0; j < kLanes; ++j) index[j] = j;
  return index;
}

// 2^n of integers n in [-126, 127]; 0 at n = -127.
inline Vec exp2_int(IVec n) { return __builtin_bit_cast(Vec, (n + 127) << 23); }

// The bits of a value at any address, whatever its type.
template <class T>
inline T load_bits(const void* p) {
  T value;
  __builtin_memcpy(&value, p, sizeof(value));
  return value;
}
template <class T>
inline void store_bits(void* p, const T& value) {
  __builtin_memcpy(p, &value, sizeof(value));
}

// min(count, kLanes) numbers, the rest 0.
template <class T>
inline Vec load_up_to(const T* p, int64_t count) {
  if (count >= kLanes) return load(p);
  T lanes[kLanes] = {};
  std::memcpy(lanes, p, static_cast<size_t>(count) * sizeof(T));
  return load(lanes);
}
template <class T>
inline void store_up_to(T* p, Vec x, int64_t count) {
  if (count >= kLanes) return store(p, x);
  T lanes[kLanes];
  store(lanes, x);
  std::memcpy(p, lanes, static_cast<size_t>(count) * sizeof(T));
}

// `count` numbers to float32 with zeros up to a multiple of kLanes, and back.
template <class T>
inline void load_row(const T* row, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += kLanes) store(out + i, load_up_to(row + i, count - i));
}
template <class T>
inline void store_row(const float* x, int64_t count, T* row) {
  for (int64_t i = 0; i < count; i += kLanes) store_up_to(row + i, load(x + i), count - i);
}

// The same of numbers [first, first + count) of an array whose type is known at run time.
inline void load_row(const void* row, FloatType type, int64_t first, int64_t count, float* out) {
  switch (type) {
    case FloatType::kFloat32: return load_row(static_cast<const float*>(row) + first, count, out);
    case FloatType::kFloat16: return load_row(static_cast<const Half*>(row) + first, count, out);
    case FloatType::kBFloat16:
      return load_row(static_cast<const BFloat16*>(row) + first, count, out);
  }
}
inline void store_row(const float* x, int64_t count, FloatType type, void* row, int64_t first) {
  switch (type) {
    case FloatType::kFloat32: return store_row(x, count, static_cast<float*>(row) + first);
    case FloatType::kFloat16: return store_row(x, count, static_cast<Half*>(row) + first);
    case FloatType::kBFloat16: return store_row(x, count, static_cast<BFloat16*>(row) + first);
  }
}
