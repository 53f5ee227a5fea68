#include "cpu/simd_scalar.h"
#include "ops/silu_mul_hadamard_quantize/silu_mul_hadamard_quantize.h"

namespace resq::cpu::scalar {
#include "ops/silu_mul_hadamard_quantize/silu_mul_hadamard_quantize_body.h"
}  // namespace resq::cpu::scalar
