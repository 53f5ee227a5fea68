// A thread per row, whose errors stay in registers; the feedback is the same for all rows.
#include <cuda_runtime.h>

#include "core/host_device.h"
#include "ops/gptq_block/gptq_block.h"

namespace resq::cuda {
namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads)
    gptq_block_kernel(const __grid_constant__ GptqBlockParams p) {
  // Transposed: the factors of a column are neighbours.
  __shared__ float feedback[kGptqColumns][kGptqColumns];
  const int columns = static_cast<int>(p.columns);
  for (int at = threadIdx.x; at < columns * columns; at += kThreads) {
    feedback[at % columns][at / columns] = p.feedback[at];
  }
  __syncthreads();
  const int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (row >= p.rows) return;
  const float scale = p.scale[row], lowest = -p.half, highest = p.half - 1.0f;
  float errors[kGptqColumns];
#pragma unroll
  for (int j = 0; j < kGptqColumns; ++j) {
    if (j >= columns) break;
    const int64_t at = j * p.rows + row;
    float target = p.targets[at];
#pragma unroll
    for (int i = 0; i < j; ++i) {
      target = __fadd_rn(target, __fmul_rn(feedback[j][i], errors[i]));
    }
    const float x = __fdiv_rn(target, scale);
    const float code = __fadd_rn(rintf(fminf(highest, fmaxf(x, lowest))), 0.0f);  // no -0
    errors[j] = __fsub_rn(p.weight[at], __fmul_rn(code, scale));
    p.codes[at] = static_cast<int8_t>(code);
    p.errors[at] = errors[j];
    p.exact[at] = x;
  }
}

}  // namespace

void gptq_block(const GptqBlockParams& p, Stream stream) {
  launch_kernel("gptq_block", gptq_block_kernel,
                {.x = static_cast<unsigned>(ceil_div(p.rows, kThreads)), .threads = kThreads},
                stream, p);
}

}  // namespace resq::cuda
