// Vectors at the end of a row. Included inside the namespace of an instruction set, after its verbs
// (cpu/simd_*.h).
#pragma once

// min(count, kLanes) elements, the rest 0.
template <class T>
inline Vec load_up_to(const T* p, int64_t count) {
  if (count >= Vec::kLanes) return load(p);
  T lanes[Vec::kLanes] = {};
  std::memcpy(lanes, p, static_cast<size_t>(count) * sizeof(T));
  return load(lanes);
}

template <class T>
inline void store_up_to(T* p, Vec a, int64_t count) {
  if (count >= Vec::kLanes) return store(p, a);
  T lanes[Vec::kLanes];
  store(lanes, a);
  std::memcpy(p, lanes, static_cast<size_t>(count) * sizeof(T));
}
