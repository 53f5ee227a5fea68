// A block transforms a row: it loads runs of eight columns, does the stages in shared memory, and
// returns the results in the same runs. A split row becomes two rows of half the length, the sums
// and the differences of neighbours (which is stage 1). They are transformed one after the other in
// the same shared memory, and the results of the first stay in registers. A split row is loaded
// twice.
#pragma once

#include "cuda/launch.h"
#include "cuda/pdl.cuh"
#include "cuda/row_hadamard.cuh"

namespace resq::cuda {

template <bool kSplit, bool kTensor>
class TransformedRow {
 public:
  // load(run, x) sets x to columns 8 run .. 8 run + 7. All threads of a warp call it together, also
  // for runs beyond the row, which are 0.
  template <class Load>
  __device__ TransformedRow(unsigned char* shared, const HadamardLayout& h, Load load)
      : row_(reinterpret_cast<float*>(shared)), h_(h) {
#pragma unroll 1
    for (int half = 0; half < (kSplit ? 2 : 1); ++half) {
#pragma unroll 1
      for (int run = threadIdx.x; run < align_up(runs(), 32); run += kHadamardThreads) {
        float x[8];
        load(run, x);
        if constexpr (kSplit) {
          float y[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            y[i] =
                half == 0 ? __fadd_rn(x[2 * i], x[2 * i + 1]) : __fsub_rn(x[2 * i], x[2 * i + 1]);
          }
          start_run(h, y);
          if (run < runs()) store_four(4 * run, y[0], y[1], y[2], y[3]);
        } else {
          start_run(h, x);
          if (run < runs()) {
            store_four(8 * run, x[0], x[1], x[2], x[3]);
            store_four(8 * run + 4, x[4], x[5], x[6], x[7]);
          }
        }
      }
      finish_transform<kTensor>(shared, h);
      if (kSplit && half == 0) keep_half();
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
        const float4 odd = load_four(4 * run);
        const float y[8] = {kept_[slot].x, odd.x, kept_[slot].y, odd.y,
                            kept_[slot].z, odd.z, kept_[slot].w, odd.w};
        use(run, y);
      }
    } else {
#pragma unroll 1
      for (int run = threadIdx.x; run < runs(); run += kHadamardThreads) {
        const float4 a = load_four(8 * run), b = load_four(8 * run + 4);
        const float y[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
        use(run, y);
      }
    }
  }

 private:
  __device__ int runs() const { return kSplit ? h_.n / 4 : (h_.n + 7) / 8; }
  __device__ void store_four(int e, float a, float b, float c, float d) {
    *reinterpret_cast<float4*>(row_ + h_.place(e)) = make_float4(a, b, c, d);
  }
  __device__ float4 load_four(int e) const {
    return *reinterpret_cast<const float4*>(row_ + h_.place(e));
  }
  // A run belongs to the same thread in both halves, so no barrier is needed before it is
  // overwritten.
  __device__ void keep_half() {
#pragma unroll
    for (int slot = 0; slot < kMostHalfRuns; ++slot) {
      const int run = threadIdx.x + slot * kHadamardThreads;
      if (run < runs()) kept_[slot] = load_four(4 * run);
    }
  }

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
  switch (type) {
    case FloatType::kFloat32:
      return load_eight(static_cast<const float*>(base) + index, count, aligned, x);
    case FloatType::kFloat16:
      return load_eight(static_cast<const Half*>(base) + index, count, aligned, x);
    case FloatType::kBFloat16:
      return load_eight(static_cast<const BFloat16*>(base) + index, count, aligned, x);
  }
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
