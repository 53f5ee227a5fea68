// gptq_block: columns of a weight rounded one after another, each making up for the errors of those
// before it.
//
//   t_j = targets_j + sum over i < j of feedback_ij e_i     (i ascending)
//   x_j = t_j / scale,  c_j = round(clamp(x_j, -half, half - 1)),  e_j = w_j - c_j scale
//
// In float32 without fused multiply-adds: every device gives the same bits. Matrices are
// transposed, [columns, rows], so that the rows of the weight, which know nothing of each other,
// are neighbours. A NaN has code -half.
#pragma once

#include <cstdint>

#include "cuda/launch.h"

namespace resq {

// Most columns of a block: a CUDA thread keeps the errors of a row in registers. Earlier blocks
// come in as `targets`, by a matrix product, which larger blocks would take work from.
inline constexpr int kGptqColumns = 32;

struct GptqBlockParams {
  int64_t rows, columns;  // columns <= kGptqColumns
  const float* targets;   // [columns, rows]
  const float* weight;    // [columns, rows]
  const float* feedback;  // [columns, columns], of which i < j are read
  const float* scale;     // [rows]
  int8_t* codes;          // [columns, rows]
  float* errors;          // [columns, rows]
  float* exact;           // [columns, rows]: x
  float half;             // 2^(bits - 1)
};

namespace cuda {

// Device pointers; 0 < rows < 2^31, columns > 0.
void gptq_block(const GptqBlockParams& p, Stream stream);

}  // namespace cuda

}  // namespace resq
