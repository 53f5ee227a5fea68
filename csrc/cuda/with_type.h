// From a float type known at run time to a type of C++: in a launcher for a kernel with a template
// parameter for it, in a kernel for one access.
#pragma once

#include "core/float16.h"

namespace resq::cuda {

// f(T{}) for the type of the numbers. A default, as a fourth path for no type costs registers: 152
// instead of 146 in kv_attention on sm_90.
template <class F>
RESQ_HOST_DEVICE void with_type(FloatType type, F f) {
  switch (type) {
    case FloatType::kFloat32: return f(0.0f);
    case FloatType::kFloat16: return f(Half{});
    default: return f(BFloat16{});
  }
}

}  // namespace resq::cuda
