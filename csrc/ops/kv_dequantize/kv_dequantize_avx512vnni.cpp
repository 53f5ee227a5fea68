// kv_dequantize for AVX-512.
#if defined(__x86_64__)
#include <algorithm>
#include <bit>

#include "cpu/simd_common.h"
#include "ops/kv_dequantize/kv_dequantize.h"
#include "ops/kv_dequantize/kv_dequantize_runs.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c")

namespace resq::avx512vnni {
namespace {

#include "cpu/lanes_avx512.h"

}  // namespace

#include "ops/kv_dequantize/kv_dequantize_body.h"

}  // namespace resq::avx512vnni

#pragma GCC pop_options
#endif
