// AMX-INT8: a tile product multiplies 16 of M by 16 of N over 64 of K. The sums are those of
// vpdpbusd, the epilogue is that of AVX-512.
#if defined(__x86_64__)
#include "cpu/simd_common.h"
#include "ops/mixed_gemm/cpu/plan.h"
#include "ops/mixed_gemm/cpu/tile_config.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c")
namespace resq::cpu::amx {
namespace {
#include "cpu/simd_avx512vnni.h"
#include "ops/mixed_gemm/cpu/tiles_amx.h"

// clang-format off: the body depends on the includes above it
#include "ops/mixed_gemm/cpu/amx_body.h"
// clang-format on
}  // namespace

void mixed_gemm_tasks(const MixedGemmTasks& tasks, int64_t begin, int64_t end) {
  run_tasks(tasks, begin, end);
}

}  // namespace resq::cpu::amx
#pragma GCC pop_options
#endif
