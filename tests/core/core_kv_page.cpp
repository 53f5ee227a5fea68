// The arithmetic of a KV page's ranges and codes, and of its place in the cache: pure host
// functions, no CUDA headers.
#include "core_kv_page.h"

#include <pybind11/numpy.h>

#include "core/kv_page.h"
#include "cuda/inverse.h"

namespace py = pybind11;

void define_kv_page(py::module_& m) {
  m.def("half_below", py::vectorize([](float x) { return resq::half_below<>(x).bits; }));
  m.def("half_above", py::vectorize([](float x) { return resq::half_above<>(x).bits; }));
  m.def("kv_code", py::vectorize([](float x, float offset, float inv_scale, int levels) {
          return resq::kv_code(x, {{}, {}, offset, inv_scale}, levels);
        }));
  m.def("cuda_inverse64", resq::cuda::inverse64);
}
