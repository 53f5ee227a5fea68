// The one macro that lets g++, nvcc and the host tests share core/, and two integer helpers.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define RESQ_HOST_DEVICE __host__ __device__
#else
#define RESQ_HOST_DEVICE
#endif

namespace resq {

RESQ_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
RESQ_HOST_DEVICE constexpr int64_t align_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace resq
