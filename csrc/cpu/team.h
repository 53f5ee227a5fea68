// Threads that stay awake between many short pieces of parallel work.
//
// A decode step of a small model is 300 operators of a few microseconds. To hand each of them to
// the threads of OpenMP costs 2 us, and milliseconds where another program has one of the cores:
// all threads must come, and leave, every time. A team is handed out once for all of them. Its
// first thread runs the operators; the others wait in a loop for parts of the work.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>

#include "core/host_device.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <sched.h>

namespace resq::cpu {

inline constexpr int64_t kLine = 64;  // of a cache, in bytes
// Pieces that a thread's share is cut into, so that others can take over what it does not get to;
// kWhole where each piece would first repeat some work.
inline constexpr int64_t kPieces = 4, kWhole = 1;
// Pieces of a job at most, or one a thread: to take one costs a miss where the cores are many.
inline constexpr int64_t kPiecesOfJob = 16;
// How much less work pays for a second thread of a team than for one that must be woken.
inline constexpr int64_t kTeamGrain = 8;
// Turns of a waiting loop, about 20 ns each, after which it lets other programs run.
inline constexpr int kTurnsAwake = 4096;

// Waits a moment; `turns` counts how often. Where another program needs the core it gets it.
inline void pause(int& turns) {
  if (++turns > kTurnsAwake) {
    sched_yield();
    return;
  }
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// Only the first thread may come: what another one has not begun, the first does itself. So nothing
// waits for a thread that does not run, but for a piece that it has begun.
class Team {
 public:
  using Work = void (*)(const void* context, int64_t begin, int64_t end);

  explicit Team(int64_t threads) : threads_(threads), shares_(new Share[threads]) {}

  // Runs work(context, begin, end) over [0, count), on a second thread if there are more than
  // `grain` items, each share in so many pieces, and returns when all of it is done; then throws
  // what a part has thrown first. By the first thread only.
  void run(int64_t count, int64_t grain, int64_t pieces, Work work, const void* context) {
    const int64_t threads = count < threads_ * grain ? ceil_div(count, grain) : threads_;
    if (threads <= 1) {
      if (count > 0) work(context, 0, count);
      return;
    }
    // Released one by one after `job_` is none: who reads one of these values sees that, or a later
    // job (`take_part`).
    work_.store(work, std::memory_order_release);
    context_.store(context, std::memory_order_release);
    count_.store(count, std::memory_order_release);
    parts_.store(threads, std::memory_order_release);
    const int64_t all = std::min(pieces * threads, std::max(threads, kPiecesOfJob));
    piece_.store(ceil_div(count, all), std::memory_order_release);
    items_done_.store(0, std::memory_order_relaxed);
    const uint64_t job = ++last_job_;
    for (int64_t part = 0; part < threads; ++part) {
      shares_[part].next.store(tagged(job, 0), std::memory_order_relaxed);
    }
    job_.store(job, std::memory_order_release);
    take_part(job, 0);
    for (int turns = 0; items_done_.load(std::memory_order_acquire) != count;) pause(turns);
    job_.store(kNone, std::memory_order_relaxed);
    if (failed_.exchange(false, std::memory_order_relaxed)) std::rethrow_exception(error_);
  }

  // Sends the others home.
  void close() { job_.store(kClosed, std::memory_order_release); }

  // What thread 1, 2, ... does until the team is closed.
  void follow(int64_t thread) {
    uint64_t seen = kNone;
    for (int turns = 0;;) {
      const uint64_t job = job_.load(std::memory_order_acquire);
      if (job == kClosed) return;
      if (job == seen || job == kNone) {
        pause(turns);
        continue;
      }
      take_part(job, thread);
      seen = job, turns = 0;
    }
  }

 private:
  static constexpr uint64_t kNone = 0, kClosed = ~uint64_t{0};

  // The next piece, tagged with its job: a thread that comes late takes none of a later job.
  struct alignas(kLine) Share {
    std::atomic<uint64_t> next{0};
  };
  static constexpr uint64_t kPieceMask = 0xffffffff;
  static constexpr uint64_t tagged(uint64_t job, uint64_t piece) { return job << 32 | piece; }

  // Does pieces of a thread's own share, then of the others'.
  void take_part(uint64_t job, int64_t thread) {
    const Work work = work_.load(std::memory_order_acquire);
    const void* context = context_.load(std::memory_order_acquire);
    const int64_t count = count_.load(std::memory_order_acquire);
    const int64_t parts = parts_.load(std::memory_order_acquire);
    const int64_t piece = piece_.load(std::memory_order_acquire);
    // Has the job ended meanwhile, these may be of the next one.
    if (job_.load(std::memory_order_relaxed) != job) return;
    for (int64_t i = 0; i < parts; ++i) {
      const int64_t part = (thread + i) % parts;
      const int64_t first = count * part / parts, last = count * (part + 1) / parts;
      std::atomic<uint64_t>& next = shares_[part].next;
      int64_t done = 0;
      uint64_t seen = next.load(std::memory_order_relaxed);
      while (true) {
        const int64_t begin = first + static_cast<int64_t>(seen & kPieceMask) * piece;
        if ((seen ^ tagged(job, 0)) > kPieceMask || begin >= last) break;
        if (!next.compare_exchange_weak(seen, seen + 1, std::memory_order_relaxed)) continue;
        const int64_t end = begin + piece < last ? begin + piece : last;
        try {
          work(context, begin, end);
        } catch (...) {
          if (!failed_.exchange(true, std::memory_order_relaxed)) error_ = std::current_exception();
        }
        done += end - begin;
        ++seen;
      }
      // With many threads each look at another's share is a miss, so the last one ends it.
      const int64_t before = done > 0 ? items_done_.fetch_add(done, std::memory_order_release)
                                      : items_done_.load(std::memory_order_relaxed);
      if (before + done == count) return;
    }
  }

  const int64_t threads_;
  const std::unique_ptr<Share[]> shares_;
  uint64_t last_job_ = 0;  // of the first thread
  alignas(kLine) std::atomic<uint64_t> job_{0};
  std::atomic<int64_t> count_{0}, piece_{0}, parts_{0};
  std::atomic<Work> work_{nullptr};
  std::atomic<const void*> context_{nullptr};
  alignas(kLine) std::atomic<int64_t> items_done_{0};
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;
};

}  // namespace resq::cpu
