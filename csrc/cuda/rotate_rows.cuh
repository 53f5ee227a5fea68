// The rotation of rows of keys or queries that wait in shared memory: kv_append, kv_attention.
#pragma once

#include "cuda/numbers.cuh"

namespace resq::cuda {

// sums[r] = sum over d of loaded[d][first_row + r] * U[d][dim], in the order of d; the row itself
// without a rotation. U is matrix `matrix` of `rotation`, whose numbers are of type Rotation;
// add_product(a, b, sum) answers a b + sum, rounded as the caller needs it.
template <class Rotation, int kHeadDim, int kBlockRows, int kRows, class AddProduct>
__device__ inline void rotate_rows(FloatArray rotation, int matrix,
                                   const float (&loaded)[kHeadDim][kBlockRows], int first_row,
                                   int dim, AddProduct add_product, float (&sums)[kRows]) {
  if (!rotation.data) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) sums[r] = loaded[dim][first_row + r];
    return;
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) sums[r] = 0.0f;
  const auto* u = static_cast<const Rotation*>(rotation.data) + dim + matrix * kHeadDim * kHeadDim;
#pragma unroll 16
  for (int d = 0; d < kHeadDim; ++d) {
    const float weight = number(u[d * kHeadDim]);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      sums[r] = add_product(weight, loaded[d][first_row + r], sums[r]);
    }
  }
}

}  // namespace resq::cuda
