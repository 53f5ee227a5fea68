// kv_dequantize for AVX2.
#if defined(__x86_64__)
#include <algorithm>
#include <bit>

#include "cpu/simd_common.h"
#include "ops/kv_dequantize/kv_dequantize.h"
#include "ops/kv_dequantize/kv_dequantize_runs.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

namespace resq::avx2 {
namespace {

#include "cpu/lanes_avx2.h"

}  // namespace

#include "ops/kv_dequantize/kv_dequantize_body.h"

}  // namespace resq::avx2

#pragma GCC pop_options
#endif
