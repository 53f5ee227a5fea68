// A block transforms a row: it loads runs of eight columns, does the stages in shared memory, and
// returns the results in the same runs. A split row becomes two rows of half the length, the sums
// and the differences of neighbours (which is stage 1). They are transformed one after the other in
// the same shared memory: the differences, then the results of the sums, are kept in registers.
#pragma once

#include "cuda/launch.h"
#include "cuda/pdl.cuh"
#include "cuda/row_hadamard.cuh"
#include "cuda/with_type.h"

namespace resq::cuda {

template <bool kSplit, bool kTensor>
class TransformedRow {
 public:
  __device__ TransformedRow(unsigned char* shared, const HadamardLayout& h)
      : shared_(shared), row_(reinterpret_cast<float*>(shared)), h_(h) {}

  // source.fetch(run) loads what columns 8 run .. 8 run + 7 are made of, 0 beyond the row, and
  // source.values(fetched, x) computes them. A thread fetches kAhead runs before it uses the first.
  // All threads of a warp compute together, also runs beyond the row.
  template <class Source>
  __device__ void load(const Source& source) {
    constexpr int kAhead = Source::kAhead;
    const int end = static_cast<int>(align_up(runs(), 32));
    typename Source::Fetched fetched[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) fetched[i] = source.fetch(threadIdx.x + i * kHadamardThreads);
    int run = threadIdx.x;
#pragma unroll 1
    for (int first = 0; run < end; first += kAhead) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i, run += kHadamardThreads) {
        if (run >= end) break;
        float x[8];
        source.values(fetched[i], x);
        fetched[i] = source.fetch(run + kAhead * kHadamardThreads);
        if constexpr (kSplit) {
          float sums[4], differences[4];
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            sums[k] = __fadd_rn(x[2 * k], x[2 * k + 1]);
            differences[k] = __fsub_rn(x[2 * k], x[2 * k + 1]);
          }
          start_run(h_, sums);
          start_run(h_, differences);
          if (run < runs()) store_four(run_at(run), sums);
          // The slot is first + i, but registers have no run-time index.
#pragma unroll
          for (int slot = 0; slot < kMostHalfRuns; ++slot) {
            if (slot % kAhead == i && slot - i == first) kept_[slot] = four(differences);
          }
        } else {
          start_run(h_, x);
          if (run < runs()) {
            float* at = run_at(run);
            store_four(at, x);
            store_four(at + 4, x + 4);
          }
        }
      }
    }
  }

  // Call after load. for_each may follow.
  __device__ void transform() {
    if constexpr (kSplit) {
#pragma unroll 1
      for (int half = 0; half < 2; ++half) {
        if (half == 1) exchange_halves();
        finish_transform<kTensor>(shared_, h_);
      }
    } else {
      finish_transform<kTensor>(shared_, h_);
    }
  }

  // Calls use(run, y) for the thread's runs.
  template <class Use>
  __device__ void for_each(Use use) const {
    if constexpr (kSplit) {
#pragma unroll
      for (int slot = 0; slot < kMostHalfRuns; ++slot) {
        const int run = threadIdx.x + slot * kHadamardThreads;
        if (run >= runs()) break;
        const float4 odd = load_four(run_at(run));
        const float y[8] = {kept_[slot].x, odd.x, kept_[slot].y, odd.y,
                            kept_[slot].z, odd.z, kept_[slot].w, odd.w};
        use(run, y);
      }
    } else {
#pragma unroll 1
      for (int run = threadIdx.x; run < runs(); run += kHadamardThreads) {
        const float* at = run_at(run);
        const float4 a = load_four(at), b = load_four(at + 4);
        const float y[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
        use(run, y);
      }
    }
  }

 private:
  __device__ int runs() const { return kSplit ? h_.n / 4 : (h_.n + 7) / 8; }
  // Blocks consist of whole runs.
  __device__ float* run_at(int run) const { return row_ + h_.place((kSplit ? 4 : 8) * run); }
  __device__ static float4 four(const float* x) { return make_float4(x[0], x[1], x[2], x[3]); }
  __device__ static void store_four(float* at, const float* x) {
    *reinterpret_cast<float4*>(at) = four(x);
  }
  __device__ static float4 load_four(const float* at) {
    return *reinterpret_cast<const float4*>(at);
  }
  // A run belongs to the same thread in both halves, so no barrier is needed before it is
  // overwritten.
  __device__ void exchange_halves() {
#pragma unroll
    for (int slot = 0; slot < kMostHalfRuns; ++slot) {
      const int run = threadIdx.x + slot * kHadamardThreads;
      if (run < runs()) {
        float* at = run_at(run);
        const float4 result = load_four(at);
        *reinterpret_cast<float4*>(at) = kept_[slot];
        kept_[slot] = result;
      }
    }
  }

  unsigned char* shared_;
  float* row_;
  const HadamardLayout& h_;
  float4 kept_[kSplit ? kMostHalfRuns : 1];
};

// Loads eight numbers of any type as floats, 0 from `count` on. `aligned`: all eight exist and
// their address is aligned.
template <class T>
__device__ inline void load_eight(const T* from, int count, bool aligned, float (&x)[8]) {
  const Chunk<T> chunk = aligned ? load_chunk<true>(from, 8) : load_chunk<false>(from, count);
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = chunk[i];
}
__device__ inline void load_eight(const void* base, FloatType type, int64_t index, int count,
                                  bool aligned, float (&x)[8]) {
  with_type(type, [&](auto t) {
    load_eight(static_cast<const decltype(t)*>(base) + index, count, aligned, x);
  });
}

// Launches kernel<split>(params, layout, ...) with one block per row; where a block prepares
// tables for all its rows, with no more blocks than fit the device at once.
template <class Kernel, class... Arguments>
inline void launch_hadamard(const char* op, Kernel kernel, const HadamardLayout& layout,
                            int64_t rows, const Device& device, Stream stream,
                            Arguments... arguments) {
  const int64_t resident = int64_t{device.sms} * (device.shared_bytes / layout.shared_bytes);
  const int64_t blocks = layout.tensor_factors == 0 || rows < resident ? rows
                         : resident > 0                                ? resident
                                                                       : 1;
  launch_pdl(op, kernel,
             {.x = static_cast<unsigned>(blocks),
              .threads = kHadamardThreads,
              .shared_bytes = layout.shared_bytes},
             stream, arguments...);
}

}  // namespace resq::cuda
