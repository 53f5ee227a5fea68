// Portable kv_attention: four-lane GNU vectors, which are SSE2 on x86-64 and NEON on aarch64.
#include <algorithm>
#include <bit>
#include <limits>
#include <utility>

#include "ops/kv_attention/kv_attention.h"

namespace resq::scalar {
namespace {

#include "cpu/lanes_scalar.h"
#include "ops/kv_attention/block_words_scalar.h"
#include "ops/kv_attention/kv_attention_block.h"

}  // namespace

#include "ops/kv_attention/kv_attention_body.h"

}  // namespace resq::scalar
