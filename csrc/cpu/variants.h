// One function per instruction set, and the choice among them.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

// RESQ_DECLARE_ROWS_KERNEL(name, Params), inside namespace resq::cpu, declares one function
// `name(const Params&, int64_t begin_row, int64_t end_row)` per instruction set of this platform;
// RESQ_ROWS_KERNEL(name) is the one for this process.
#if defined(__x86_64__)
#define RESQ_DECLARE_ROWS_KERNEL(name, Params)       \
  namespace scalar {                                 \
  void name(const Params& params, int64_t, int64_t); \
  }                                                  \
  namespace avx2 {                                   \
  void name(const Params& params, int64_t, int64_t); \
  }                                                  \
  namespace avx512vnni {                             \
  void name(const Params& params, int64_t, int64_t); \
  }
#define RESQ_ROWS_KERNEL(name)                                            \
  ::resq::cpu::choose(::resq::cpu::scalar::name, ::resq::cpu::avx2::name, \
                      ::resq::cpu::avx512vnni::name)
#else
#define RESQ_DECLARE_ROWS_KERNEL(name, Params)       \
  namespace scalar {                                 \
  void name(const Params& params, int64_t, int64_t); \
  }
#define RESQ_ROWS_KERNEL(name) ::resq::cpu::choose(::resq::cpu::scalar::name)
#endif

namespace resq::cpu {

// Vector kernels in the order of Isa.
template <class Kernel, class... Kernels>
Kernel choose(Kernel scalar, Kernels... others) {
  const Kernel variants[] = {scalar, others...};
  return variants[static_cast<int>(vector_isa())];
}

}  // namespace resq::cpu
