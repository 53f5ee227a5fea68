// The Hadamard transform of one float32 row in place, unscaled. Every output is the same sequence
// of additions on every instruction set.
// Included inside the namespace of an instruction set, after its verbs (cpu/simd_*.h).
#pragma once

#include "cpu/row_access.h"

// log2(kRadix) stages h, 2h, ... on the kRadix vectors a[0], a[1], ...
template <int kRadix>
inline void butterflies(Vec (&a)[kRadix]) {
  for (int half = 1; half < kRadix; half *= 2) {
    for (int base = 0; base < kRadix; base += 2 * half) {
      for (int i = base; i < base + half; ++i) {
        const Vec sum = a[i] + a[i + half];
        a[i + half] = a[i] - a[i + half];
        a[i] = sum;
      }
    }
  }
}

// Stages h .. h * kRadix / 2 of blocks of h * kRadix floats; kFirst: and those inside a vector.
template <int kRadix, bool kFirst>
inline void sylvester_pass(float* x, int64_t n, int64_t h) {
  for (int64_t base = 0; base < n; base += kRadix * h) {
    for (int64_t i = base; i < base + h; i += Vec::kLanes) {
      Vec a[kRadix];
      for (int r = 0; r < kRadix; ++r) {
        a[r] = load(x + i + r * h);
        if (kFirst) a[r] = hadamard_lanes(a[r], Vec::kLanes);
      }
      butterflies(a);
      for (int r = 0; r < kRadix; ++r) store(x + i + r * h, a[r]);
    }
  }
}

template <bool kFirst>
inline int64_t sylvester_pass(float* x, int64_t n, int64_t h, int64_t power) {
  switch (power / h) {
    case 1: sylvester_pass<1, kFirst>(x, n, h); return h;
    case 2: sylvester_pass<2, kFirst>(x, n, h); return 2 * h;
    case 4: sylvester_pass<4, kFirst>(x, n, h); return 4 * h;
    default: sylvester_pass<8, kFirst>(x, n, h); return 8 * h;
  }
}

// Kronecker factor Sylvester(power), contiguous; x is padded to a multiple of kLanes. Three stages
// a pass: a row of 57 KB and more leaves the first cache between passes.
inline void sylvester_stages(float* x, int64_t n, int64_t power) {
  if (power < Vec::kLanes) {
    for (int64_t i = 0; i < n; i += Vec::kLanes) {
      store(x + i, hadamard_lanes(load(x + i), power));
    }
    return;
  }
  int64_t h = sylvester_pass<true>(x, n, Vec::kLanes, power);
  while (h < power) h = sylvester_pass<false>(x, n, h, power);
}

// One line of kPaleyTile floats.
struct Line {
  static constexpr int kVectors = kPaleyTile / Vec::kLanes;
  Vec v[kVectors];
};

inline Line load_line(const float* p) {
  Line a;
  for (int i = 0; i < Line::kVectors; ++i) a.v[i] = load(p + i * Vec::kLanes);
  return a;
}
inline void store_line(float* p, const Line& a) {
  for (int i = 0; i < Line::kVectors; ++i) store(p + i * Vec::kLanes, a.v[i]);
}

// table[e] = sum over t of (bit t of e ? -x_t : x_t), x_t = the line at x + t * stride.
inline void tabulate_group(const float* x, int64_t stride, float* table) {
  for (int i = 0; i < Line::kVectors; ++i) {
    const float* p = x + i * Vec::kLanes;
    float* out = table + i * Vec::kLanes;
    const Vec a = load(p), b = load(p + stride), c = load(p + 2 * stride), d = load(p + 3 * stride);
    const Vec first[4] = {a + b, b - a, a - b, set1(0.0f) - (a + b)};
    const Vec second[4] = {c + d, d - c, c - d, set1(0.0f) - (c + d)};
    for (int e = 0; e < 16; ++e) store(out + e * kPaleyTile, first[e % 4] + second[e / 4]);
  }
}

// y = P x for one tile, x and y being lines `stride` floats apart; y may be x. `partial` holds
// [order] lines between the blocks of kPaleyGroups groups.
inline void paley_tile(const float* x, float* y, int64_t stride, const PaleyFactor& factor,
                       float* table, float* partial) {
  constexpr int kRows = 4 / Line::kVectors > 0 ? 4 / Line::kVectors : 1;  // four chains of adds
  const int64_t order = factor.order, groups = order / 4;
  for (int64_t first = 0; first < groups; first += kPaleyGroups) {
    const int64_t count = groups - first < kPaleyGroups ? groups - first : kPaleyGroups;
    for (int64_t g = 0; g < count; ++g) {
      tabulate_group(x + 4 * (first + g) * stride, stride, table + g * 16 * kPaleyTile);
    }
    const bool last = first + count == groups;
    for (int64_t i = 0; i < order; i += kRows) {
      Line sums[kRows];
      const uint16_t* offsets[kRows];
      for (int r = 0; r < kRows; ++r) {
        offsets[r] = factor.table_offsets.data() + (i + r) * groups + first;
        sums[r] = load_line(first == 0 ? table + offsets[r][0] : partial + (i + r) * kPaleyTile);
      }
      for (int64_t g = first == 0 ? 1 : 0; g < count; ++g) {
        for (int r = 0; r < kRows; ++r) {
          const float* entry = table + offsets[r][g];
          for (int j = 0; j < Line::kVectors; ++j) {
            sums[r].v[j] = sums[r].v[j] + load(entry + j * Vec::kLanes);
          }
        }
      }
      for (int r = 0; r < kRows; ++r) {
        store_line(last ? y + (i + r) * stride : partial + (i + r) * kPaleyTile, sums[r]);
      }
    }
  }
}

// A run of `kRun` floats (0: of `run` floats) between a row of lines and one of pieces.
template <int kRun>
inline void copy_run(float* to, const float* from, int64_t run) {
  std::memcpy(to, from, static_cast<size_t>(kRun ? kRun : run) * sizeof(float));
}

// The tile of `count` pieces of `run` floats, piece p at x + p * jump, as lines; and back.
template <int kRun>
inline void gathered_paley_tile(float* x, int64_t stride, int64_t jump, int64_t count, int64_t run,
                                const PaleyFactor& factor, float* table, float* partial,
                                float* lines) {
  for (int64_t j = 0; j < factor.order; ++j) {
    float* line = lines + j * kPaleyTile;
    for (int64_t p = 0; p < count; ++p) {
      copy_run<kRun>(line + p * run, x + p * jump + j * stride, run);
    }
    for (int64_t c = count * run; c < kPaleyTile; ++c) line[c] = 0.0f;
  }
  paley_tile(lines, lines, kPaleyTile, factor, table, partial);
  for (int64_t j = 0; j < factor.order; ++j) {
    const float* line = lines + j * kPaleyTile;
    for (int64_t p = 0; p < count; ++p) {
      copy_run<kRun>(x + p * jump + j * stride, line + p * run, run);
    }
  }
}

// Dense factor over an axis of `order` steps of `inner` contiguous floats.
inline void paley_stage(float* x, int64_t n, int64_t inner, const PaleyFactor& factor,
                        float* scratch) {
  float* table = scratch;
  float* partial = table + kPaleyGroups * 16 * kPaleyTile;
  float* lines = partial + factor.order * kPaleyTile;
  const int64_t block = factor.order * inner;
  if (inner <= kPaleyTile / 2) {  // a tile spans several blocks, whose runs are copied together
    const int64_t pieces = kPaleyTile / inner, blocks = n / block;
    for (int64_t b = 0; b < blocks; b += pieces) {
      const int64_t count = blocks - b < pieces ? blocks - b : pieces;
      float* first = x + b * block;
      switch (inner) {
#define RESQ_RUN(run)                                                                         \
  case run:                                                                                   \
    gathered_paley_tile<run>(first, inner, block, count, run, factor, table, partial, lines); \
    break;
        RESQ_RUN(1)
        RESQ_RUN(2)
        RESQ_RUN(4)
        RESQ_RUN(8)
#undef RESQ_RUN
      }
    }
    return;
  }
  for (int64_t start = 0; start < n; start += block) {
    int64_t column = 0;
    for (; column + kPaleyTile <= inner; column += kPaleyTile) {
      float* tile = x + start + column;
      paley_tile(tile, tile, inner, factor, table, partial);
    }
    if (column < inner) {
      gathered_paley_tile<0>(x + start + column, inner, 0, 1, inner - column, factor, table,
                             partial, lines);
    }
  }
}

// Floats of scratch that transform_row needs.
inline int64_t hadamard_scratch(const HadamardPlan& plan) {
  int64_t largest = 0;
  for (const auto& factor : plan.paley) {
    largest = factor->order > largest ? factor->order : largest;
  }
  return largest == 0 ? 0 : (kPaleyGroups * 16 + 2 * largest) * kPaleyTile;
}

inline void transform_row(float* x, const HadamardPlan& plan, float* scratch) {
  sylvester_stages(x, plan.n, plan.power);
  int64_t inner = plan.power;
  for (size_t i = plan.paley.size(); i-- > 0;) {
    paley_stage(x, plan.n, inner, *plan.paley[i], scratch);
    inner *= plan.paley[i]->order;
  }
}
