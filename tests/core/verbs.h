// The vector verbs of each instruction set as functions over arrays whose length is a multiple of
// 16, so that the test module needs no vector types.
#pragma once

#include <cstdint>

namespace resq::cpu {

struct Verbs {
  int64_t lanes;
  void (*exp)(const float* x, float* y, int64_t n);
  void (*silu)(const float* x, float* y, int64_t n);
  void (*round)(const float* x, float* y, int64_t n);
  void (*to_float16)(const float* x, uint16_t* y, int64_t n);
  void (*to_bfloat16)(const float* x, uint16_t* y, int64_t n);
  void (*from_float16)(const uint16_t* x, float* y, int64_t n);
  void (*from_bfloat16)(const uint16_t* x, float* y, int64_t n);
};

namespace scalar {
Verbs verbs();
}
namespace avx2 {
Verbs verbs();
}
namespace avx512vnni {
Verbs verbs();
}

}  // namespace resq::cpu
