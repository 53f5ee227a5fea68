// How the CPU cuts a mixed_gemm into tasks.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/packed_weight.h"
#include "cpu/variants.h"
#include "ops/mixed_gemm/mixed_gemm.h"

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

struct MixedGemmTasks {
  MixedGemmParams gemm;
  MixedGemmPlan plan;  // made with the tile rows of the instruction set
};

namespace cpu {
// Runs tasks [begin, end) of the plan.
RESQ_DECLARE_ROWS_KERNEL(mixed_gemm_tasks, MixedGemmTasks)
}  // namespace cpu

}  // namespace resq
