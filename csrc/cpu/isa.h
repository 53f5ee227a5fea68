// Which instruction sets the CPU kernels may use. The choice is a pure function of what the machine
// has and of RESQ_CPU_ISA, so that tests can ask what another machine would run.
#pragma once

#include <cstdint>
#include <string>

namespace resq::cpu {

// In order of preference; each needs all features of the previous ones. kAmx adds tiles for
// mixed_gemm's prefill; everything else runs the vector kernels of kAvx512Vnni under it.
enum class Isa { kScalar = 0, kAvx2 = 1, kAvx512Vnni = 2, kAmx = 3 };

inline constexpr Isa kAllIsas[] = {Isa::kScalar, Isa::kAvx2, Isa::kAvx512Vnni, Isa::kAmx};

const char* isa_name(Isa isa);

// One bit for each entry of kFeatures (cpu/isa.cpp).
using Features = uint32_t;

// The features of this machine. Where the processor has AMX tiles, requests permission to use tile
// data from the operating system, once: Linux grants the 8 KB of state per thread to a process that
// asks before its first use.
Features detect_features();

// The features that `isa` needs and `have` lacks, by name with commas between; "" if none.
std::string missing_features(Isa isa, Features have);

// The most preferred set of which no feature is missing.
Isa best_isa(Features have);

// `forced` is the value of RESQ_CPU_ISA ("" = not set). Throws a sentence when the name is unknown
// or the machine lacks the set: a forced variant is never replaced by another one.
Isa select_isa(const std::string& forced, Features have);

// The variant that runs in this process; decided at the first call.
Isa current_isa();

// The set whose vector kernels run in this process: kAvx512Vnni under kAmx.
inline Isa vector_isa() { return current_isa() == Isa::kAmx ? Isa::kAvx512Vnni : current_isa(); }

}  // namespace resq::cpu
