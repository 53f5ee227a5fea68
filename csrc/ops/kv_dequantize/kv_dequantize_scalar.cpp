// Portable kv_dequantize: four-lane GNU vectors, which are SSE2 on x86-64 and NEON on aarch64.
#include <algorithm>
#include <bit>

#include "ops/kv_dequantize/kv_dequantize.h"
#include "ops/kv_dequantize/kv_dequantize_runs.h"

namespace resq::scalar {
namespace {

#include "cpu/lanes_scalar.h"

}  // namespace

#include "ops/kv_dequantize/kv_dequantize_body.h"

}  // namespace resq::scalar
