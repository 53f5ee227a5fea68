// Where a CUDA block keeps a row that it transforms, and the quotient of silu: pure host functions,
// no CUDA headers.
#include "core_cuda_hadamard.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "cuda/hadamard_layout.h"
#include "cuda/quotient.h"
#include "near_reciprocal.h"

namespace py = pybind11;

namespace {

using resq::cuda::HadamardLayout;
using Ints = py::array_t<int>;

HadamardLayout layout(int64_t n, bool split) {
  const resq::HadamardPlan* found = resq::hadamard_plan(n);
  if (found == nullptr) throw std::invalid_argument("no plan");
  return resq::cuda::hadamard_layout(*found, split);
}

Ints array(const std::vector<int>& values) {
  return Ints(static_cast<py::ssize_t>(values.size()), values.data());
}

// place(0), place(1), ... of `count` floats.
Ints places(const HadamardLayout& h, int count) {
  std::vector<int> result;
  for (int e = 0; e < count; ++e) result.push_back(h.place(e));
  return array(result);
}

// Of every column of an axis.
Ints columns(const HadamardLayout& h, int order, int stride) {
  const auto known = std::find(h.stride, h.stride + h.factors, stride);
  const uint32_t inverse = known == h.stride + h.factors ? resq::cuda::inverse(stride)
                                                         : h.stride_inverse[known - h.stride];
  std::vector<int> result;
  for (int q = 0; q < h.n / order; ++q) result.push_back(h.column(q, order, stride, inverse));
  return array(result);
}

// Divisors below `end` by which a dividend below `end` has another quotient. A quotient grows with
// the dividend, so the multiples of a divisor and the numbers before them decide.
std::vector<int> wrong_divisors(int end) {
  std::vector<int> wrong;
  for (int b = 2; b < end; ++b) {
    const uint32_t inverse = resq::cuda::inverse(b);
    bool right = true;
    for (int k = 0; k * b < end; ++k) {
      right &= resq::cuda::quotient_by(k * b, inverse) == k;
      right &= k == 0 || resq::cuda::quotient_by(k * b - 1, inverse) == k - 1;
    }
    right &= resq::cuda::quotient_by(end - 1, inverse) == (end - 1) / b;
    if (!right) wrong.push_back(b);
  }
  return wrong;
}

// x / d of a reciprocal that is `units` in the last place off.
float quotient(float x, float d, int units) {
  return resq::cuda::quotient(x, d, near_reciprocal(d, units));
}

}  // namespace

void define_cuda_hadamard(py::module_& m) {
  py::class_<HadamardLayout>(m, "HadamardLayout")
      .def(py::init(&layout))
      .def_readonly("n", &HadamardLayout::n)
      .def_readonly("power", &HadamardLayout::power)
      .def_readonly("block", &HadamardLayout::block)
      .def_readonly("pad", &HadamardLayout::pad)
      .def_readonly("row_bytes", &HadamardLayout::row_bytes)
      .def_property_readonly("axes",
                             [](const HadamardLayout& h) {
                               std::vector<std::pair<int, int>> axes;
                               for (int i = 0; i < h.factors; ++i) {
                                 axes.emplace_back(h.order[i], h.stride[i]);
                               }
                               return axes;
                             })
      .def("places", &places)
      .def("columns", &columns);
  m.def("cuda_wrong_divisors", &wrong_divisors);
  m.def("cuda_quotient", py::vectorize(quotient));
  m.def("cuda_has_plain_quotient", py::vectorize(resq::cuda::has_plain_quotient));
}
