// RESQ_LOG_KERNELS=1: every kernel that runs is named on standard error, the first time it does.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <set>
#include <string>

namespace resq {

inline bool logs_kernels() {
  static const bool wanted = [] {
    const char* value = std::getenv("RESQ_LOG_KERNELS");
    return value && *value && std::string(value) != "0";
  }();
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
