// The Hadamard transform of one float32 row in place, unscaled. Every output is the same sequence
// of additions on every instruction set.
// Included inside the namespace of an instruction set.

// The stages kHalf, 2 kHalf, ... below kRadix on the vectors a[0], a[1], ... Recursive, so that g++
// keeps the vectors in registers: with a loop over the stages 8192 elements took 8.7 us instead of
// 2.8.
template <int kHalf, int kRadix>
inline void butterflies(Vec (&a)[kRadix]) {
  if constexpr (kHalf < kRadix) {
    for (int i = 0; i < kRadix; ++i) {
      if (i & kHalf) continue;
      const Vec sum = a[i] + a[i + kHalf];
      a[i + kHalf] = a[i] - a[i + kHalf];
      a[i] = sum;
    }
    butterflies<2 * kHalf>(a);
  }
}

// Stages h .. h * kRadix / 2 of blocks of h * kRadix floats. kFirst: also the stages inside a
// vector.
template <int kRadix, bool kFirst>
inline void sylvester_pass(float* x, int64_t n, int64_t h) {
  for (int64_t base = 0; base < n; base += kRadix * h) {
    for (int64_t i = base; i < base + h; i += kLanes) {
      Vec a[kRadix];
      for (int r = 0; r < kRadix; ++r) {
        a[r] = load(x + i + r * h);
        if (kFirst) a[r] = hadamard_lanes(a[r], kLanes);
      }
      butterflies<1>(a);
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
// per pass: rows of 57 KB and more do not stay in the first-level cache between passes.
inline void sylvester_stages(float* x, int64_t n, int64_t power) {
  if (power < kLanes) {
    for (int64_t i = 0; i < n; i += kLanes) {
      store(x + i, hadamard_lanes(load(x + i), power));
    }
    return;
  }
  int64_t h = sylvester_pass<true>(x, n, kLanes, power);
  while (h < power) h = sylvester_pass<false>(x, n, h, power);
}

constexpr int64_t kTableFloats = 16 * kPaleyTile;  // one table: 16 lines

// Tabulates the 16 sums of one vector from each of four lines.
inline void tabulate(Vec a, Vec b, Vec c, Vec d, float* table) {
  const Vec first[4] = {a + b, b - a, a - b, 0.0f - (a + b)};
  const Vec second[4] = {c + d, d - c, c - d, 0.0f - (c + d)};
  for (int e = 0; e < 16; ++e) store(table + e * kPaleyTile, first[e % 4] + second[e / 4]);
}

// The tables of groups [first, first + count) of the lines x_0, x_1, ... at x, x + stride, ...
template <int kStreams>
inline void tabulate_groups(const float* x, int64_t stride, int64_t rows, int64_t first,
                            int64_t count, float* table) {
  for (int64_t j = 4 * first; j < 4 * (first + count); j += 4, table += kStreams * kTableFloats) {
    for (int64_t v = 0; v < kPaleyTile; v += kLanes) {
      const float* p = x + j * kStreams * stride + v;
      if constexpr (kStreams == 1) {
        tabulate(load(p), load(p + stride), load(p + 2 * stride), load(p + 3 * stride), table + v);
      } else {
        const Vec a0 = load(p), b0 = load(p + stride);
        const Vec a1 = load(p + 2 * stride), b1 = load(p + 3 * stride);
        // The rows of a construction II are 2 mod 4: the last group has two inputs.
        const bool full = j + 2 < rows;
        const Vec a2 = full ? load(p + 4 * stride) : set1(0.0f);
        const Vec b2 = full ? load(p + 5 * stride) : set1(0.0f);
        const Vec a3 = full ? load(p + 6 * stride) : set1(0.0f);
        const Vec b3 = full ? load(p + 7 * stride) : set1(0.0f);
        tabulate(a0 + b0, a1 + b1, a2 + b2, a3 + b3, table + v);
        tabulate(a0 - b0, a1 - b1, a2 - b2, a3 - b3, table + kTableFloats + v);
      }
    }
  }
}

// Adds the tabulated groups [first, first + count) to the sums of every row of S. The sums start
// at 0 (kFirst) or in `partial`, and end there or (kLast) as lines of y.
template <int kStreams, bool kFirst, bool kLast>
inline void add_groups(const float* x, float* y, int64_t stride, const PaleyFactor& factor,
                       int64_t first, int64_t count, const float* table, float* partial) {
  // Four chains of additions hide their latency: the vectors of one row, or of two or four rows.
  // Vector c of a row belongs to stream c % kStreams.
  constexpr int kChains = 4, kVectors = kStreams * kPaleyTile / kLanes;
  constexpr int kRows = kVectors < kChains ? kChains / kVectors : 1;
  const int64_t groups = factor.groups;
  for (int64_t i = 0; i < factor.rows; i += kRows) {
    const uint16_t* offsets = factor.table_offsets.data() + i * groups + first;
    for (int start = 0; start < kRows * kVectors; start += kChains) {
      Vec sums[kChains];
      int64_t row[kChains], column[kChains], line[kChains];
      for (int c = 0; c < kChains; ++c) {
        row[c] = (start + c) / kVectors;
        column[c] = (start + c) % kVectors / kStreams * kLanes;
        line[c] = (i + row[c]) * kStreams + c % kStreams;
      }
      for (int c = 0; c < kChains; ++c) {
        const int64_t place = c % kStreams * kTableFloats + column[c];
        sums[c] = kFirst ? load(table + offsets[row[c] * groups] + place)
                         : load(partial + line[c] * kPaleyTile + column[c]);
      }
      for (int64_t t = kFirst ? 1 : 0; t < count; ++t) {
        for (int c = 0; c < kChains; ++c) {
          const int64_t place = c % kStreams * kTableFloats + column[c];
          sums[c] = sums[c] + load(table + offsets[row[c] * groups + t] + place);
        }
      }
      if constexpr (!kLast) {
        for (int c = 0; c < kChains; ++c) {
          store(partial + line[c] * kPaleyTile + column[c], sums[c]);
        }
      } else if constexpr (kStreams == 1) {
        for (int c = 0; c < kChains; ++c) store(y + line[c] * stride + column[c], sums[c]);
      } else {
        for (int c = 0; c < kChains; c += 2) {
          const int64_t place = line[c] * stride + column[c];
          const Vec a = load(x + place), b = load(x + place + stride);
          store(y + place, sums[c] - (b + b));
          store(y + place + stride, sums[c + 1] - (a + a));
        }
      }
    }
  }
}

// y = P x for one tile, x and y being lines `stride` floats apart; y may be x. `partial` holds
// [order] lines from one set of tables to the next.
template <int kStreams>
inline void paley_tile(const float* x, float* y, int64_t stride, const PaleyFactor& factor,
                       float* table, float* partial) {
  const int64_t groups = factor.groups, step = factor.groups_at_once();
  tabulate_groups<kStreams>(x, stride, factor.rows, 0, groups < step ? groups : step, table);
  if (groups <= step) {
    add_groups<kStreams, true, true>(x, y, stride, factor, 0, groups, table, partial);
    return;
  }
  add_groups<kStreams, true, false>(x, y, stride, factor, 0, step, table, partial);
  int64_t first = step;
  for (; first + step < groups; first += step) {
    tabulate_groups<kStreams>(x, stride, factor.rows, first, step, table);
    add_groups<kStreams, false, false>(x, y, stride, factor, first, step, table, partial);
  }
  tabulate_groups<kStreams>(x, stride, factor.rows, first, groups - first, table);
  add_groups<kStreams, false, true>(x, y, stride, factor, first, groups - first, table, partial);
}

inline void paley_tile(const float* x, float* y, int64_t stride, const PaleyFactor& factor,
                       float* table, float* partial) {
  if (factor.streams == 1) return paley_tile<1>(x, y, stride, factor, table, partial);
  paley_tile<2>(x, y, stride, factor, table, partial);
}

// Copies a run of kRun floats (kRun = 0: `run` floats) between a line and a piece.
template <int kRun>
inline void copy_run(float* to, const float* from, int64_t run) {
  std::memcpy(to, from, static_cast<size_t>(kRun ? kRun : run) * sizeof(float));
}

// Gathers a tile of `count` pieces of `run` floats, piece p at x + p * jump, into lines, multiplies
// it, and scatters it back.
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
  float* partial = table + kPaleyTables * 16 * kPaleyTile;
  float* lines = partial + factor.order * kPaleyTile;
  const int64_t block = factor.order * inner;
  if (inner <= kPaleyTile / 2) {  // a tile spans several blocks, whose runs are copied together
    const int64_t pieces = kPaleyTile / inner, blocks = n / block;
    for (int64_t b = 0; b < blocks; b += pieces) {
      const int64_t count = blocks - b < pieces ? blocks - b : pieces;
      float* first = x + b * block;
      switch (inner) {
#define RESQ_RUN(label, run)                                                                \
  label:                                                                                    \
  gathered_paley_tile<run>(first, inner, block, count, run, factor, table, partial, lines); \
  break;
        RESQ_RUN(case 1, 1)
        RESQ_RUN(case 2, 2)
        RESQ_RUN(case 4, 4)
        RESQ_RUN(default, 8)  // inner <= 8 is a power of two: orders are 12 or more
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
  return largest == 0 ? 0 : (kPaleyTables * 16 + 2 * largest) * kPaleyTile;
}

inline void transform_row(float* x, const HadamardPlan& plan, float* scratch) {
  sylvester_stages(x, plan.n, plan.power);
  int64_t inner = plan.power;
  for (size_t i = plan.paley.size(); i-- > 0;) {
    paley_stage(x, plan.n, inner, *plan.paley[i], scratch);
    inner *= plan.paley[i]->order;
  }
}
