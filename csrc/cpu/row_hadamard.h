// The Hadamard transform of one float32 row in place, unscaled. Every output is the same sequence
// of additions on every instruction set. Included inside the namespace of an instruction set, after
// its verbs (cpu/simd_*.h).
#pragma once

#include "cpu/row_access.h"

// Kronecker factor Sylvester(power), contiguous; the row is padded to a multiple of kLanes.
inline void sylvester_stages(float* x, int64_t n, int64_t power) {
  for (int64_t i = 0; i < n; i += Vec::kLanes) {
    store(x + i, hadamard_lanes(load(x + i), power));
  }
  for (int64_t h = Vec::kLanes; h < power; h *= 2) {
    for (int64_t base = 0; base < n; base += 2 * h) {
      for (int64_t i = base; i < base + h; i += Vec::kLanes) {
        const Vec a = load(x + i), b = load(x + i + h);
        store(x + i, a + b);
        store(x + i + h, a - b);
      }
    }
  }
}

// Dense factor over an axis of length `order` with `inner` contiguous elements per step.
inline void paley_stage(float* x, int64_t n, int64_t inner, const PaleyFactor& factor,
                        float* scratch) {
  const int64_t order = factor.order;
  for (int64_t block = 0; block < n; block += order * inner) {
    for (int64_t column = 0; column < inner; column += Vec::kLanes) {
      const int64_t count = inner - column < Vec::kLanes ? inner - column : Vec::kLanes;
      float* tile = x + block + column;
      for (int64_t j = 0; j < order; ++j) {
        store(scratch + j * Vec::kLanes, load_up_to(tile + j * inner, count));
      }
      for (int64_t i = 0; i < order; ++i) {
        Vec sum = set1(0.0f);
        const int8_t* signs = factor.signs.data() + i * order;
        for (int64_t j = 0; j < order; ++j) {
          const Vec v = load(scratch + j * Vec::kLanes);
          sum = signs[j] > 0 ? sum + v : sum - v;
        }
        store_up_to(tile + i * inner, sum, count);
      }
    }
  }
}

// Floats of scratch that transform_row needs.
inline int64_t hadamard_scratch(const HadamardPlan& plan) {
  int64_t largest = 0;
  for (const auto& factor : plan.paley) {
    largest = factor->order > largest ? factor->order : largest;
  }
  return largest * Vec::kLanes;
}

inline void transform_row(float* x, const HadamardPlan& plan, float* scratch) {
  sylvester_stages(x, plan.n, plan.power);
  int64_t inner = plan.power;
  for (size_t i = plan.paley.size(); i-- > 0;) {
    paley_stage(x, plan.n, inner, *plan.paley[i], scratch);
    inner *= plan.paley[i]->order;
  }
}
