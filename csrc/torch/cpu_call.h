// What the CPU operators share beside their arguments: the log of kernels.
#pragma once

#include "cpu/isa.h"
#include "torch/log_kernel.h"

namespace resq {

inline void log_cpu_kernel(const char* op, cpu::Isa isa = cpu::vector_isa()) {
  if (logs_kernels()) log_kernel(op, std::string("cpu ") + cpu::isa_name(isa));
}

}  // namespace resq
