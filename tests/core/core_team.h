// A Team under stress: without pybind11, so that a program under ThreadSanitizer can run it too.
#pragma once

#include <cstdint>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

#include "cpu/team.h"

// Items that `jobs` random jobs did not do exactly once, in a team of `threads` of which `present`
// come, the first included, after the first has begun. Every 16th job throws in one of its parts.
inline int64_t team_mistakes(int64_t threads, int64_t present, int64_t jobs, uint32_t seed) {
  resq::cpu::Team team(threads);
  std::vector<std::thread> others;
  for (int64_t thread = 1; thread < present; ++thread) {
    others.emplace_back([&team, thread] { team.follow(thread); });
  }
  struct Job {
    std::vector<int> visits;  // every item is of one part, so no two threads write the same
    int64_t fails_at;
  };
  std::mt19937 random(seed);
  int64_t mistakes = 0;
  for (int64_t i = 0; i < jobs; ++i) {
    const int64_t count = random() % 200, grain = 1 + random() % 40;
    Job job{std::vector<int>(count), i % 16 == 15 ? int64_t(random() % (count + 1)) : -1};
    const auto visit = [](const void* context, int64_t begin, int64_t end) {
      Job& job = *static_cast<Job*>(const_cast<void*>(context));
      for (int64_t item = begin; item < end; ++item) ++job.visits[item];
      if (begin <= job.fails_at && job.fails_at < end) throw std::runtime_error("a part");
    };
    bool thrown = false;
    try {
      team.run(count, grain, 1 + random() % 5, visit, &job);
    } catch (const std::runtime_error&) {
      thrown = true;
    }
    mistakes += thrown != (0 <= job.fails_at && job.fails_at < count);
    for (const int visits : job.visits) mistakes += visits != 1;
  }
  team.close();
  for (std::thread& other : others) other.join();
  return mistakes;
}
