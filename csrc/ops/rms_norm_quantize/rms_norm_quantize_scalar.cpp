#include "cpu/simd_scalar.h"
#include "ops/rms_norm_quantize/rms_norm_quantize.h"

namespace resq::cpu::scalar {
#include "ops/rms_norm_quantize/rms_norm_quantize_body.h"
}  // namespace resq::cpu::scalar
