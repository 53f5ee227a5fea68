// The one CPU body of silu_mul_hadamard_quantize.
// Included inside the namespace of an instruction set.

#include "cpu/row_hadamard.h"
#include "cpu/row_quantize.h"
#include "cpu/row_silu.h"

template <class T>
void multiply_rows(const SiluMulHadamardQuantizeParams& params, int64_t begin, int64_t end) {
  const int64_t n = params.n, padded = align_up(n, kLanes);
  const int64_t scratch = params.plan ? hadamard_scratch(*params.plan) : 0;
  float* floats = thread_row_buffer().floats(padded + scratch);
  for (int64_t row = begin; row < end; ++row) {
    const T* gate = static_cast<const T*>(params.gate_up) + row * 2 * n;
    const T* up = gate + n;
    for (int64_t i = 0; i < n; i += kLanes) {
      const Vec product = silu(load_up_to(gate + i, n - i)) * load_up_to(up + i, n - i);
      store(floats + i, product * params.scale);  // the transform is linear: saves a pass
    }
    if (params.plan) transform_row(floats, *params.plan, floats + padded);
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
