// kv_attention for AVX2.
#if defined(__x86_64__)
#include <algorithm>
#include <bit>
#include <limits>
#include <utility>

#include "cpu/simd_common.h"
#include "ops/kv_attention/kv_attention.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

namespace resq::avx2 {
namespace {

#include "cpu/lanes_avx2.h"
#include "ops/kv_attention/block_words_avx2.h"
#include "ops/kv_attention/kv_attention_block.h"

}  // namespace

#include "ops/kv_attention/kv_attention_body.h"

}  // namespace resq::avx2

#pragma GCC pop_options
#endif
