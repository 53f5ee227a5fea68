// mixed_gemm: y = activations (INT4 | INT8 codes per row) x weight (INT4 | INT8 codes per output
// row).
//
//   d_p[m, n] = sum_k q_p[m, k] w_p[n, k] - zero_p[m] wsum_p[n]          exact in int32, p = lo, hi
//   y[m, n] = ((float(d_lo) s_lo[m]) t_lo[n] + (float(d_hi) s_hi[m]) t_hi[n]) + bias[n]
//
// each float32 operation rounded on its own, in this order (docs/formats.md section 4), so that the
// result has the same bits for every batch size, thread count and instruction set.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/float16.h"
#include "core/packed_weight.h"
#include "cpu/variants.h"

namespace resq {

// How the work is cut. A panel is a run of activation rows that one thread unpacks into its own
// scratch; a tile is the rows of a panel that share one pass over a weight block. A task is one
// (panel, weight block) pair, numbered panel by panel: a thread that takes a run of tasks unpacks
// each panel once and walks through the packed weight in memory order.
struct MixedGemmPlan {
  int64_t panels, blocks, max_panel_rows, max_tile_rows;
  int64_t grain;  // tasks below which a second thread costs more than it saves

  int64_t tasks() const { return panels * blocks; }
};

// A panel stays in a second-level cache of 1 MB beside the weight block that passes through, and is
// as tall as that allows: a weight block is read from memory once for each panel. Measured with
// K = 14336 (36 MB of weights) on one core: 256 KB 176, 512 KB 200, 768 KB 207 G products/s.
inline constexpr int64_t kMixedGemmPanelBytes = 768 * 1024;

// Products that a thread should have: 0.5 M take 3 to 10 us, about what waking a thread takes.
inline constexpr int64_t kMixedGemmGrainProducts = 1 << 19;

constexpr MixedGemmPlan mixed_gemm_plan(int64_t rows, int64_t n, int64_t k_lo, int64_t k_hi,
                                        int64_t max_tile_rows) {
  const int64_t row_bytes = std::max<int64_t>(packed_columns(k_lo) + packed_columns(k_hi), 1);
  const int64_t tiles = std::max<int64_t>(kMixedGemmPanelBytes / (max_tile_rows * row_bytes), 1);
  const int64_t panels = ceil_div(rows, tiles * max_tile_rows);
  const int64_t panel_rows = panels ? ceil_div(rows, panels) : 0;
  const int64_t products = std::max<int64_t>(panel_rows * row_bytes * kPackedBlockRows, 1);
  return {panels, packed_blocks(n), panel_rows, max_tile_rows,
          ceil_div(kMixedGemmGrainProducts, products)};
}

// Rows of the largest tile: as many as keep their sums in registers.
constexpr int mixed_gemm_tile_rows(cpu::Isa isa) { return isa == cpu::Isa::kAvx512Vnni ? 12 : 2; }

struct MixedGemmParams {
  int64_t rows, n, k_lo, k_hi;
  const void* q_lo;              // uint8 [rows, k_lo / 2] packed codes, or int8 [rows, k_lo]
  bool q_lo_packed;              // which of the two
  const int8_t* q_hi;            // [rows, k_hi]
  const float* params;           // [rows, 4]: scale_lo, zero_lo, scale_hi, zero_hi
  const uint8_t* packed_weight;  // [packed_weight_bytes(n, k_lo, k_hi)]
  const float* weight_scale;     // [n, 2]: t_lo, t_hi
  const int32_t* weight_sum;     // [n, 2]: wsum_lo, wsum_hi
  const void* bias;              // [n] of bias_type, or nullptr
  FloatType bias_type;
  void* out;  // [rows, n] of out_type
  FloatType out_type;
  MixedGemmPlan plan;
};

namespace cpu {
// Runs tasks [begin, end) of p.plan, which was made with the tile rows of the instruction set.
RESQ_DECLARE_ROWS_KERNEL(mixed_gemm_tasks, MixedGemmParams)
}  // namespace cpu

}  // namespace resq
