#include "cpu/simd_scalar.h"
#include "verbs.h"

namespace resq::cpu::scalar {
#include "verbs_body.h"
}  // namespace resq::cpu::scalar
