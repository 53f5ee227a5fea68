// Parallel loops of the CPU operators, on torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <exception>
#include <type_traits>

#include "cpu/team.h"

namespace resq {

// The team whose first thread this is.
inline cpu::Team*& current_team() {
  thread_local cpu::Team* team = nullptr;
  return team;
}

// Calls body(begin, end) for parts of [0, count), in the threads of the current team, or of torch.
// A second thread pays off from `grain` items on if it must be woken first. `pieces`: of a share.
template <class Body>
void parallel_for(int64_t count, int64_t grain, const Body& body, int64_t pieces = cpu::kPieces) {
  cpu::Team* team = current_team();
  if (!team) {
    torch::stable::parallel_for(0, count, grain, body);
    return;
  }
  const auto work = [](const void* context, int64_t begin, int64_t end) {
    (*static_cast<const Body*>(context))(begin, end);
  };
  team->run(count, ceil_div(grain, cpu::kTeamGrain), pieces, work, &body);
}

// Calls body() in this thread, with torch's other threads as its team.
template <class Body>
void with_team(const Body& body) {
  const int64_t threads = torch::stable::get_num_threads();
  cpu::Team team(threads);
  std::exception_ptr error;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t) {
    if (begin != 0) return team.follow(begin);
    current_team() = &team;
    try {
      body();
    } catch (...) {
      error = std::current_exception();
    }
    current_team() = nullptr;
    team.close();
  });
  if (error) std::rethrow_exception(error);
}

}  // namespace resq
