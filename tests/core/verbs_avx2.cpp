#if defined(__x86_64__)
#include "cpu/simd_common.h"
#include "verbs.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#include "cpu/simd_avx2.h"

namespace resq::cpu::avx2 {
#include "verbs_body.h"
}  // namespace resq::cpu::avx2
#pragma GCC pop_options
#endif
