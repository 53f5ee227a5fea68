#if defined(__x86_64__)
#include "cpu/simd_common.h"
#include "ops/silu_mul_hadamard_quantize/silu_mul_hadamard_quantize.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#include "cpu/simd_avx2.h"

namespace resq::cpu::avx2 {
#include "ops/silu_mul_hadamard_quantize/silu_mul_hadamard_quantize_body.h"
}  // namespace resq::cpu::avx2
#pragma GCC pop_options
#endif
