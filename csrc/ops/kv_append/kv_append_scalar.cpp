// Portable kv_append: four-lane GNU vectors, which are SSE2 on x86-64 and NEON on aarch64.
#include <bit>

#include "ops/kv_append/kv_append.h"

namespace resq::scalar {
namespace {

#include "cpu/lanes_scalar.h"

}  // namespace

#include "ops/kv_append/kv_append_body.h"

}  // namespace resq::scalar
