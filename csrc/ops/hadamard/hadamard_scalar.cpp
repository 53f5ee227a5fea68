#include "cpu/simd_scalar.h"
#include "ops/hadamard/hadamard.h"

namespace resq::cpu::scalar {
#include "ops/hadamard/hadamard_body.h"
}  // namespace resq::cpu::scalar
