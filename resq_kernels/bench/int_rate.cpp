// The peak rate of integer products of one thread: mixed_gemm's instructions on registers alone.
// int_rate.py compiles this file and calls it on every thread at once.
#include <time.h>

namespace {

constexpr long kSteps = 4'000'000;

// Processor time of the calling thread: other processes do not count.
double thread_seconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

template <class Step>
double products_per_second(long products_per_step, Step step) {
  const double start = thread_seconds();
  step();
  return static_cast<double>(kSteps * products_per_step) / (thread_seconds() - start);
}

}  // namespace

// Sixteen independent sums hide the latency of four cycles.
extern "C" double resq_rate_avx512vnni() {
  return products_per_second(16 * 64, [] {
    long steps = kSteps;
    asm volatile(
        "1:\n"
        ".irp r,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n"
        "vpdpbusd %%zmm30, %%zmm31, %%zmm\\r\n"
        ".endr\n"
        "dec %0\n"
        "jnz 1b\n"
        : "+r"(steps)
        :
        : "zmm0", "zmm1", "zmm2", "zmm3", "zmm4", "zmm5", "zmm6", "zmm7", "zmm8", "zmm9", "zmm10",
          "zmm11", "zmm12", "zmm13", "zmm14", "zmm15");
  });
}

// The instructions of a 4-bit step: pmaddubsw and the 16-bit sum.
extern "C" double resq_rate_avx2() {
  return products_per_second(12 * 32, [] {
    long steps = kSteps;
    asm volatile(
        "1:\n"
        ".irp r,0,1,2,3,4,5,6,7,8,9,10,11\n"
        "vpmaddubsw %%ymm14, %%ymm15, %%ymm12\n"
        "vpaddw %%ymm12, %%ymm\\r, %%ymm\\r\n"
        ".endr\n"
        "dec %0\n"
        "jnz 1b\n"
        : "+r"(steps)
        :
        : "ymm0", "ymm1", "ymm2", "ymm3", "ymm4", "ymm5", "ymm6", "ymm7", "ymm8", "ymm9", "ymm10",
          "ymm11", "ymm12");
  });
}
