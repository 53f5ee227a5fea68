// AMX-INT8: a tile product multiplies 16 rows of activations by 16 output rows over 64 columns of
// K. The sums are those of vpdpbusd, the epilogue is that of AVX-512.
#if defined(__x86_64__)
#include <algorithm>

#include "cpu/simd_common.h"
#include "cpu/tile_config.h"
#include "ops/mixed_gemm/mixed_gemm_plan.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
#include "cpu/simd_avx512vnni.h"

namespace resq::cpu::amx {
using namespace avx512vnni;

#include "cpu/tiles_amx.h"
#include "ops/mixed_gemm/mixed_gemm_tiles_body.h"
}  // namespace resq::cpu::amx
#pragma GCC pop_options
#endif
