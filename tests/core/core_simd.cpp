#include "core_simd.h"

#include <pybind11/numpy.h>

#include <cstring>
#include <stdexcept>
#include <string>

namespace resq::cpu {

// Functions over arrays of any length for the row operations, of a multiple of 16 for the others.
struct SimdOps {
  int64_t lanes;
  void (*exp)(const float* x, float* y, int64_t n);
  void (*silu)(const float* x, float* y, int64_t n);
  void (*round)(const float* x, float* y, int64_t n);
  void (*min)(const float* a, const float* b, float* y, int64_t n);
  void (*max)(const float* a, const float* b, float* y, int64_t n);
  void (*to_float16)(const float* x, uint16_t* y, int64_t n);
  void (*to_bfloat16)(const float* x, uint16_t* y, int64_t n);
  void (*from_float16)(const uint16_t* x, float* y, int64_t n);
  void (*from_bfloat16)(const uint16_t* x, float* y, int64_t n);
  void (*to_int8)(const float* x, int8_t* y, int64_t n);
  void (*round_to_int)(const float* x, int32_t* y, int64_t n);
  void (*exp2_int)(const int32_t* x, float* y, int64_t n);
  void (*dot_pairs)(const int32_t* a, const int32_t* b, int32_t* sums, int64_t n);
};

}  // namespace resq::cpu

#define RESQ_ISA_BODY "core_simd_body.h"
#include "cpu/foreach_isa.h"

namespace py = pybind11;

namespace {

using resq::cpu::SimdOps;

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

void check_whole_vectors(int64_t count) {
  if (count % 16 != 0) throw std::invalid_argument("expected a multiple of 16 elements");
}

template <class To, class From>
auto mapped(void (*SimdOps::*op)(const From*, To*, int64_t)) {
  return [op](const SimdOps& ops, const Array<From>& x) {
    check_whole_vectors(x.size());
    Array<To> y(x.size());
    (ops.*op)(x.data(), y.mutable_data(), x.size());
    return y;
  };
}

// Rows of any length; 16 numbers more than the row, of bytes 0x55 where nothing was written.
template <class To, class From>
auto row_mapped(void (*SimdOps::*op)(const From*, To*, int64_t)) {
  return [op](const SimdOps& ops, const Array<From>& x) {
    Array<To> y(x.size() + 16);
    std::memset(y.mutable_data(), 0x55, y.nbytes());
    (ops.*op)(x.data(), y.mutable_data(), x.size());
    return y;
  };
}

auto pair_mapped(void (*SimdOps::*op)(const float*, const float*, float*, int64_t)) {
  return [op](const SimdOps& ops, const Array<float>& a, const Array<float>& b) {
    check_whole_vectors(a.size());
    if (b.size() != a.size()) throw std::invalid_argument("expected as many elements");
    Array<float> y(a.size());
    (ops.*op)(a.data(), b.data(), y.mutable_data(), a.size());
    return y;
  };
}

// The sums after `a` and `b` are added to `sums`.
Array<int32_t> dot_pairs(const SimdOps& ops, const Array<int32_t>& sums, const Array<int32_t>& a,
                         const Array<int32_t>& b) {
  check_whole_vectors(a.size());
  if (b.size() != a.size() || sums.size() != a.size()) {
    throw std::invalid_argument("expected as many elements");
  }
  Array<int32_t> result(std::vector<int64_t>{a.size()}, sums.data());
  ops.dot_pairs(a.data(), b.data(), result.mutable_data(), a.size());
  return result;
}

SimdOps simd_ops(const std::string& isa) {
#if defined(__x86_64__)
  if (isa == "avx2") return resq::cpu::avx2::simd_ops();
  if (isa == "avx512vnni") return resq::cpu::avx512vnni::simd_ops();
#endif
  if (isa == "scalar") return resq::cpu::scalar::simd_ops();
  throw std::invalid_argument("no such instruction set: " + isa);
}

}  // namespace

void define_simd(py::module_& m) {
  m.def("simd_ops", simd_ops);
  py::class_<SimdOps>(m, "SimdOps")
      .def_readonly("lanes", &SimdOps::lanes)
      .def("exp", mapped(&SimdOps::exp))
      .def("silu", mapped(&SimdOps::silu))
      .def("round", mapped(&SimdOps::round))
      .def("min", pair_mapped(&SimdOps::min))
      .def("max", pair_mapped(&SimdOps::max))
      .def("to_float16", row_mapped(&SimdOps::to_float16))
      .def("to_bfloat16", row_mapped(&SimdOps::to_bfloat16))
      .def("from_float16", row_mapped(&SimdOps::from_float16))
      .def("from_bfloat16", row_mapped(&SimdOps::from_bfloat16))
      .def("to_int8", mapped(&SimdOps::to_int8))
      .def("round_to_int", mapped(&SimdOps::round_to_int))
      .def("exp2_int", mapped(&SimdOps::exp2_int))
      .def("dot_pairs", dot_pairs);
}
