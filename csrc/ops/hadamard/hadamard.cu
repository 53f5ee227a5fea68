// hadamard: a block transforms a row in shared memory. docs/notes/0011.
#include "cuda/hadamard_block.cuh"
#include "ops/hadamard/hadamard.h"

namespace resq::cuda {
namespace {

template <class T>
__device__ inline void store_eight(T* to, const float (&y)[8], int count, bool aligned) {
  Chunk<T> chunk;
#pragma unroll
  for (int i = 0; i < 8; i += 2) chunk.set(i, y[i], y[i + 1]);
  if (aligned) {
    store_chunk<true>(to, chunk, 8);
  } else {
    store_chunk<false>(to, chunk, count);
  }
}

// A row in runs of eight columns, 0 beyond the row.
struct Row {
  struct Fetched {
    float x[8];
  };
  static constexpr int kAhead = 1;

  const HadamardParams& p;
  int64_t row;
  int n;

  __device__ Fetched fetch(int run) const {
    const bool inside = 8 * run < n;
    Fetched fetched;
    load_eight(p.x, p.type, inside ? row * n + 8 * run : 0, inside ? n - 8 * run : 0,
               inside && n % 8 == 0, fetched.x);
    return fetched;
  }
  __device__ void values(const Fetched& fetched, float (&x)[8]) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = fetched.x[i];
  }
};

template <bool kSplit>
__global__ void __launch_bounds__(kHadamardThreads, kSplit ? 1 : 2)
    hadamard_kernel(const __grid_constant__ HadamardParams p,
                    const __grid_constant__ HadamardLayout h) {
  extern __shared__ __align__(16) unsigned char shared[];
  const int n = kSplit ? 2 * h.n : h.n;
  const bool aligned = n % 8 == 0;
  prepare_transform(shared, h);
  pdl_wait();
  pdl_trigger();
  for (unsigned row = blockIdx.x; row < p.rows; row += gridDim.x) {
    TransformedRow<kSplit, true> result(shared, h);
    result.load(Row{p, row, n});
    result.transform();
    result.for_each([&](int run, const float (&y)[8]) {
      float scaled[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) scaled[i] = __fmul_rn(y[i], p.scale);
      const int64_t index = static_cast<int64_t>(row) * n + 8 * run;
      switch (p.type) {
        case FloatType::kFloat32:
          return store_eight(static_cast<float*>(p.y) + index, scaled, n - 8 * run, aligned);
        case FloatType::kFloat16:
          return store_eight(static_cast<Half*>(p.y) + index, scaled, n - 8 * run, aligned);
        case FloatType::kBFloat16:
          return store_eight(static_cast<BFloat16*>(p.y) + index, scaled, n - 8 * run, aligned);
      }
    });
  }
}

}  // namespace

void hadamard(const HadamardParams& p, const HadamardLayout& layout, const Device& device,
              Stream stream) {
  launch_hadamard("hadamard", layout.split ? hadamard_kernel<true> : hadamard_kernel<false>, layout,
                  p.rows, device, stream, p, layout);
}

}  // namespace resq::cuda
