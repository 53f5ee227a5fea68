// A row's scale without divisions: pure host functions, no CUDA headers.
#include "core_cuda_scale.h"

#include <pybind11/numpy.h>

#include <bit>

#include "cuda/scale.h"
#include "near_reciprocal.h"

namespace py = pybind11;

namespace {

bool same_bits(float a, float b) {
  return std::bit_cast<uint32_t>(a) == std::bit_cast<uint32_t>(b);
}

// Whether row_scale gives the bits of core/quantize.h for reciprocals that are `units` off.
bool same_scale(float min, float max, int bits, bool symmetric, int units) {
  const resq::ScaleZero expected =
      symmetric ? resq::symmetric_scale(min, max, bits) : resq::asymmetric_scale(min, max, bits);
  const resq::cuda::ScaleZeroInverse actual = resq::cuda::row_scale(
      min, max, bits, symmetric, [&](float x) { return near_reciprocal(x, units); });
  return same_bits(actual.scale, expected.scale) && same_bits(actual.zero, expected.zero) &&
         same_bits(actual.inverse, 1.0f / expected.scale);
}

float scale(float min, float max, int bits, bool symmetric) {
  return (symmetric ? resq::symmetric_scale : resq::asymmetric_scale)(min, max, bits).scale;
}

}  // namespace

void define_cuda_scale(py::module_& m) {
  m.def("cuda_same_scale", py::vectorize(same_scale));
  m.def("row_scale", py::vectorize(scale));
}
