// The one CPU body of silu_mul_hadamard_quantize.
// Included inside the namespace of an instruction set.

#include "cpu/row_hadamard.h"
#include "cpu/row_quantize.h"
#include "cpu/row_silu.h"

// out[i] = silu(gate[i]) * up[i] * scale for i < count; up to kLanes - 1 floats more are written.
template <class T>
void multiply(const T* gate, const T* up, int64_t count, float scale, float* out) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec product = silu(load_up_to(gate + i, count - i)) * load_up_to(up + i, count - i);
    store(out + i, product * scale);  // the transform is linear: saves a pass
  }
}

template <class T>
void multiply_rows(const SiluMulHadamardQuantizeParams& params, int64_t begin, int64_t end) {
  const int64_t n = params.n, padded = align_up(n, kLanes) + kLanes;
  const int64_t scratch = params.plan ? hadamard_scratch(*params.plan) : 0;
  const int64_t transformed = params.plan ? n : params.out.k_lo;
  float* floats = thread_row_buffer().floats(padded + scratch);
  for (int64_t row = begin; row < end; ++row) {
    const T* gate = static_cast<const T*>(params.gate_up) + row * 2 * n;
    const T* up = gate + n;
    multiply(gate, up, transformed, params.scale, floats);
    if (params.plan) {
      transform_row(floats, *params.plan, floats + padded);
    } else if (params.block > 1) {
      sylvester_stages(floats, transformed, params.block);
    }
    // After the blocks, which may end inside a vector.
    multiply(gate + transformed, up + transformed, n - transformed, 1.0f, floats + transformed);
    quantize_row(floats, params.out, row);
  }
}

void silu_mul_hadamard_quantize_rows(const SiluMulHadamardQuantizeParams& params, int64_t begin,
                                     int64_t end) {
  switch (params.type) {
    case FloatType::kFloat32: return multiply_rows<float>(params, begin, end);
    case FloatType::kFloat16: return multiply_rows<Half>(params, begin, end);
    case FloatType::kBFloat16: return multiply_rows<BFloat16>(params, begin, end);
  }
}
