#include "cpu/isa.h"

#include <cstdlib>
#include <iterator>
#include <stdexcept>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace resq::cpu {
namespace {

struct Feature {
  Isa isa;  // the first set that needs it
  const char* name;
};

constexpr Feature kFeatures[] = {
    {Isa::kAvx2, "avx2"},
    {Isa::kAvx2, "fma"},
    {Isa::kAvx2, "f16c"},
    {Isa::kAvx512Vnni, "avx512f"},
    {Isa::kAvx512Vnni, "avx512bw"},
    {Isa::kAvx512Vnni, "avx512vl"},
    {Isa::kAvx512Vnni, "avx512dq"},
    {Isa::kAvx512Vnni, "avx512vnni"},
    {Isa::kAmx, "amx-tile"},
    {Isa::kAmx, "amx-int8"},
    {Isa::kAmx, "the operating system's permission to use tile data"},
};

#if defined(__x86_64__)
// arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA), since Linux 5.16. It holds for all threads
// of the process.
bool ask_for_tile_data() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx2: return "avx2";
    case Isa::kAvx512Vnni: return "avx512vnni";
    case Isa::kAmx: return "amx";
    default: return "scalar";
  }
}

Features detect_features() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool tiles = __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-int8");
  const bool present[] = {
      __builtin_cpu_supports("avx2") != 0,
      __builtin_cpu_supports("fma") != 0,
      __builtin_cpu_supports("f16c") != 0,
      __builtin_cpu_supports("avx512f") != 0,
      __builtin_cpu_supports("avx512bw") != 0,
      __builtin_cpu_supports("avx512vl") != 0,
      __builtin_cpu_supports("avx512dq") != 0,
      __builtin_cpu_supports("avx512vnni") != 0,
      __builtin_cpu_supports("amx-tile") != 0,
      __builtin_cpu_supports("amx-int8") != 0,
      tiles && ask_for_tile_data(),
  };
  static_assert(std::size(present) == std::size(kFeatures));
  Features have = 0;
  for (size_t i = 0; i < std::size(present); ++i) have |= Features{present[i]} << i;
  return have;
#else
  return 0;
#endif
}

std::string missing_features(Isa isa, Features have) {
  std::string names;
  for (size_t i = 0; i < std::size(kFeatures); ++i) {
    if (kFeatures[i].isa > isa || (have >> i & 1)) continue;
    if (!names.empty()) names += ", ";
    names += kFeatures[i].name;
  }
  return names;
}

Isa best_isa(Features have) {
  Isa best = Isa::kScalar;
  for (Isa isa : kAllIsas) {
    if (missing_features(isa, have).empty()) best = isa;
  }
  return best;
}

Isa select_isa(const std::string& forced, Features have) {
  if (forced.empty()) return best_isa(have);
  for (Isa isa : kAllIsas) {
    if (forced == isa_name(isa)) {
      const std::string missing = missing_features(isa, have);
      if (missing.empty()) return isa;
      throw std::runtime_error("RESQ_CPU_ISA: " + forced + " was asked for, but this machine has " +
                               isa_name(best_isa(have)) + " at best: it lacks " + missing);
    }
  }
  throw std::runtime_error("RESQ_CPU_ISA: expected scalar, avx2, avx512vnni or amx, got " + forced);
}

Isa current_isa() {
  static const Isa isa = [] {
    const char* forced = std::getenv("RESQ_CPU_ISA");
    return select_isa(forced ? forced : "", detect_features());
  }();
  return isa;
}

}  // namespace resq::cpu
