#include "cpu/simd_scalar.h"
#include "ops/mixed_quantize/mixed_quantize.h"

namespace resq::cpu::scalar {
#include "ops/mixed_quantize/mixed_quantize_body.h"
}  // namespace resq::cpu::scalar
