// kv_attention for AVX-512 VNNI.
#if defined(__x86_64__)
#include <algorithm>
#include <bit>
#include <limits>
#include <utility>

#include "cpu/simd_common.h"
#include "ops/kv_attention/kv_attention.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c")

namespace resq::avx512vnni {
namespace {

#include "cpu/lanes_avx512.h"
#include "ops/kv_attention/block_words_avx512.h"
#include "ops/kv_attention/kv_attention_block.h"

}  // namespace

#include "ops/kv_attention/kv_attention_body.h"

}  // namespace resq::avx512vnni

#pragma GCC pop_options
#endif
