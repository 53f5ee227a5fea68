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

#include "core/packed_weight.h"

namespace resq {

enum class FloatType { kFloat32, kFloat16, kBFloat16 };

constexpr int64_t float_bytes(FloatType type) { return type == FloatType::kFloat32 ? 4 : 2; }

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
};

// How the work is cut. A panel is a run of activation rows that one thread unpacks into its own
// scratch; a tile is the rows of a panel that share one pass over a weight block. A task is one
// (panel, weight block) pair, numbered panel by panel: a thread that takes a run of tasks unpacks
// each panel once and walks through the packed weight in memory order.
struct MixedGemmPlan {
  int64_t panels, blocks, max_panel_rows, max_tile_rows;

  int64_t tasks() const { return panels * blocks; }
};

// Panel bytes: a quarter of a 1 MB second-level cache, beside the weight block (75 KB at K = 4096)
// and the output. A weight block is read from memory once for each panel; at 60 rows (K = 4096)
// the tile kernel asks for 0.6 bytes a cycle, far below what memory delivers.
inline constexpr int64_t kMixedGemmPanelBytes = 256 * 1024;

constexpr MixedGemmPlan mixed_gemm_plan(int64_t rows, int64_t n, int64_t k_lo, int64_t k_hi,
                                        int64_t max_tile_rows) {
  const int64_t row_bytes = std::max<int64_t>(packed_columns(k_lo) + packed_columns(k_hi), 1);
  const int64_t tiles = std::max<int64_t>(kMixedGemmPanelBytes / (max_tile_rows * row_bytes), 1);
  const int64_t panels = ceil_div(rows, tiles * max_tile_rows);
  return {panels, packed_blocks(n), panels ? ceil_div(rows, panels) : 0, max_tile_rows};
}

// Runs tasks [begin, end) of the plan made with kMaxTileRows of the same namespace.
namespace scalar {
extern const int64_t kMaxTileRows;
void mixed_gemm_tasks(const MixedGemmParams& params, int64_t begin, int64_t end);
}  // namespace scalar
namespace avx2 {
extern const int64_t kMaxTileRows;
void mixed_gemm_tasks(const MixedGemmParams& params, int64_t begin, int64_t end);
}  // namespace avx2
namespace avx512vnni {
extern const int64_t kMaxTileRows;
void mixed_gemm_tasks(const MixedGemmParams& params, int64_t begin, int64_t end);
}  // namespace avx512vnni

}  // namespace resq
