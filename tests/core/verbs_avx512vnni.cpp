#if defined(__x86_64__)
#include "cpu/simd_common.h"
#include "verbs.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
#include "cpu/simd_avx512vnni.h"

namespace resq::cpu::avx512vnni {
#include "verbs_body.h"
}  // namespace resq::cpu::avx512vnni
#pragma GCC pop_options
#endif
