// Compiles RESQ_ISA_BODY once for every instruction set. Each copy is in a file-local namespace and
// a target region of its own, and follows the set's SIMD operations (cpu/simd_*.h).
// RESQ_ISA_CHOOSE(f) is the f of the set that this process runs.
//
//   #define RESQ_ISA_BODY "ops/hadamard/hadamard_body.h"
//   #include "cpu/foreach_isa.h"
//
// A body is included several times, so it has no include guard and includes no standard header.
// Where a set needs code of its own, the body includes another file: RESQ_ISA_AVX2 or
// RESQ_ISA_AVX512VNNI is defined in the region of that set, neither is in the portable region.
#pragma once

#include "cpu/isa.h"
#include "cpu/simd_common.h"

namespace resq::cpu::scalar {
namespace {
#include "cpu/simd_scalar.h"
// clang-format off: the body depends on the includes above it
#include RESQ_ISA_BODY
// clang-format on
}  // namespace
}  // namespace resq::cpu::scalar

#if defined(__x86_64__)
#define RESQ_ISA_AVX2
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace resq::cpu::avx2 {
namespace {
#include "cpu/simd_avx2.h"
// clang-format off
#include RESQ_ISA_BODY
// clang-format on
}  // namespace
}  // namespace resq::cpu::avx2
#pragma GCC pop_options
#undef RESQ_ISA_AVX2

#define RESQ_ISA_AVX512VNNI
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c")
namespace resq::cpu::avx512vnni {
namespace {
#include "cpu/simd_avx512vnni.h"
// clang-format off
#include RESQ_ISA_BODY
// clang-format on
}  // namespace
}  // namespace resq::cpu::avx512vnni
#pragma GCC pop_options
#undef RESQ_ISA_AVX512VNNI
#endif

namespace resq::cpu {

// Kernels in the order of Isa.
template <class Kernel, class... Kernels>
Kernel choose(Kernel scalar, Kernels... others) {
  const Kernel kernels[] = {scalar, others...};
  return kernels[static_cast<int>(vector_isa())];
}

}  // namespace resq::cpu

#if defined(__x86_64__)
#define RESQ_ISA_CHOOSE(f) \
  ::resq::cpu::choose(::resq::cpu::scalar::f, ::resq::cpu::avx2::f, ::resq::cpu::avx512vnni::f)
#else
#define RESQ_ISA_CHOOSE(f) ::resq::cpu::choose(::resq::cpu::scalar::f)
#endif
