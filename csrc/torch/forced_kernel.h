// A kernel that runs instead of the one that an operator would choose, to measure it and to test
// it: the one that an environment variable names for the process, or that the operator force_kernel
// named for the calling thread.
#pragma once

#include <map>
#include <string>

#include "torch/environment.h"
#include "torch/tensor.h"

namespace resq {

// In the words of the operator's log; empty: the operator chooses.
struct ForcedKernel {
  const char* by;  // the variable or operator that forces it
  std::string choice;

  explicit operator bool() const { return !choice.empty(); }
};

// Operator -> what its variable forces, read once.
inline const std::map<std::string, ForcedKernel>& forced_in_process() {
  const auto read = [](const char* variable) {
    return ForcedKernel{variable, environment_text(variable)};
  };
  static const std::map<std::string, ForcedKernel> forced = {
      {"mixed_gemm", read("RESQ_MIXED_GEMM")}, {"kv_attention", read("RESQ_KV_ATTENTION")}};
  return forced;
}

// Operator -> what is forced in the calling thread.
inline std::map<std::string, std::string>& forced_in_thread() {
  thread_local std::map<std::string, std::string> forced;
  return forced;
}

inline ForcedKernel forced_kernel(const char* op) {
  const std::map<std::string, std::string>& here = forced_in_thread();
  const auto found = here.find(op);
  return found == here.end() ? forced_in_process().at(op)
                             : ForcedKernel{"force_kernel", found->second};
}

// Returns what was forced in this thread before, to be put back; "" forces nothing.
inline std::string force_kernel(std::string op, std::string choice) {
  if (forced_in_process().count(op) == 0) {
    fail("force_kernel", "op", "mixed_gemm or kv_attention", op);
  }
  std::map<std::string, std::string>& here = forced_in_thread();
  const auto found = here.find(op);
  const std::string before = found == here.end() ? "" : found->second;
  if (choice.empty()) {
    here.erase(op);
  } else {
    here[op] = choice;
  }
  return before;
}

}  // namespace resq
