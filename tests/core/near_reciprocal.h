// Reciprocals as an approximate instruction may give them, for the exhaustive tests.
#pragma once

#include <bit>
#include <cstdint>

// 1 / x, `units` in the last place off: neighbours among the positive floats are neighbours as
// integers.
inline float near_reciprocal(float x, int units) {
  return std::bit_cast<float>(std::bit_cast<int32_t>(1.0f / x) + units);
}
