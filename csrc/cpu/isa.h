// Which instruction sets the CPU kernels may use. The choice is a pure function of what the machine
// reports and of RESQ_CPU_ISA, so that tests can ask what another machine would run.
#pragma once

#include <string>

namespace resq::cpu {

enum class Isa { kScalar = 0, kAvx2 = 1, kAvx512Vnni = 2 };  // in order of preference

const char* isa_name(Isa isa);

// The best set that the machine supports.
Isa detect_isa();

// `forced` is the value of RESQ_CPU_ISA ("" = not set). Throws a sentence when the name is unknown
// or the machine lacks the set: a forced variant is never replaced by another one.
Isa select_isa(const std::string& forced, Isa best);

// The variant that runs in this process; decided at the first call.
Isa current_isa();

}  // namespace resq::cpu
