#include "cpu/isa.h"

#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <stdexcept>

namespace resq::cpu {

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx2: return "avx2";
    case Isa::kAvx512Vnni: return "avx512vnni";
    default: return "scalar";
  }
}

Isa detect_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vnni")) {
    return Isa::kAvx512Vnni;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    return Isa::kAvx2;
  }
#endif
  return Isa::kScalar;
}

Isa select_isa(const std::string& forced, Isa best) {
  if (forced.empty()) return best;
  for (Isa isa : {Isa::kScalar, Isa::kAvx2, Isa::kAvx512Vnni}) {
    if (forced != isa_name(isa)) continue;
    if (isa > best) {
      throw std::runtime_error("RESQ_CPU_ISA: " + forced + " was asked for, but this machine has " +
                               isa_name(best) + " at best");
    }
    return isa;
  }
  throw std::runtime_error("RESQ_CPU_ISA: expected scalar, avx2 or avx512vnni, got " + forced);
}

Isa current_isa() {
  static const Isa isa = [] {
    const char* forced = std::getenv("RESQ_CPU_ISA");
    return select_isa(forced ? forced : "", detect_isa());
  }();
  return isa;
}

}  // namespace resq::cpu

static std::string cpu_isa() { return resq::cpu::isa_name(resq::cpu::current_isa()); }

STABLE_TORCH_LIBRARY_IMPL(resq, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
}
