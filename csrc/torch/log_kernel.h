// RESQ_LOG_KERNELS=1: every kernel that runs is named on standard error, the first time it does.
#pragma once

#include <cstdio>
#include <mutex>
#include <set>
#include <string>

#include "torch/environment.h"

namespace resq {

inline bool logs_kernels() {
  static const bool wanted = environment_switch("RESQ_LOG_KERNELS", false);
  return wanted;
}

inline void log_kernel(const char* op, const std::string& kernel) {
  static std::mutex mutex;
  static std::set<std::string> seen;
  const std::string line = std::string("resq_kernels: ") + op + ": " + kernel + "\n";
  const std::lock_guard<std::mutex> lock(mutex);
  if (seen.insert(line).second) std::fputs(line.c_str(), stderr);
}

}  // namespace resq
