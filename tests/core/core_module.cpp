// csrc/core and the SIMD operations as a Python module, for the exhaustive tests only.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "core/float16.h"
#include "core/hadamard.h"
#include "core/int4.h"
#include "core/packed_weight_cuda.h"
#include "core/quantize.h"
#include "core_cuda_choice.h"
#include "core_cuda_hadamard.h"
#include "core_cuda_scale.h"
#include "core_kv_page.h"
#include "core_mixed_gemm.h"
#include "core_simd.h"

namespace py = pybind11;

void define_team(py::module_& m);  // core_team.cpp

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

// The plan of n as (power, [(order, streams, table_offsets [rows, groups])]).
py::tuple plan(int64_t n) {
  const resq::HadamardPlan* found = resq::hadamard_plan(n);
  if (found == nullptr) throw std::invalid_argument("no plan");
  py::list factors;
  for (const auto& factor : found->paley) {
    const Array<uint16_t> offsets(std::vector<int64_t>{factor->rows, factor->groups},
                                  factor->table_offsets.data());
    factors.append(py::make_tuple(factor->order, factor->streams, offsets));
  }
  return py::make_tuple(found->power, factors);
}

// The CUDA layouts of a packed weight: of every code of a block, (byte, in the high nibble) and the
// byte; of every nibble and byte of a fragment, [lane][index] -> (row, column).
void define_packed_weight_cuda(py::module_& m) {
  using resq::CudaLayout;
  py::enum_<CudaLayout>(m, "CudaLayout")
      .value("MMA", CudaLayout::kMma)
      .value("WGMMA", CudaLayout::kWgmma);
  m.def("cuda_packed_weight_bytes", resq::cuda_packed_weight_bytes);
  m.def("cuda_block_bytes", resq::cuda_block_bytes);
  m.def("cuda_lo_place", [](CudaLayout layout, int64_t n, int64_t k) {
    const resq::NibblePlace place = resq::cuda_lo_place(layout, n, k);
    return py::make_tuple(place.byte, place.high);
  });
  m.def("cuda_hi_byte", resq::cuda_hi_byte);
  m.def("cuda_lo_code", [](CudaLayout layout, int64_t lane, int64_t nibble) {
    const resq::FragmentCode code = resq::cuda_lo_code(layout, lane, nibble);
    return py::make_tuple(code.n, code.k);
  });
  m.def("cuda_hi_code", [](int64_t lane, int64_t byte) {
    const resq::FragmentCode code = resq::cuda_hi_code(lane, byte);
    return py::make_tuple(code.n, code.k);
  });
}

}  // namespace

PYBIND11_MODULE(resq_core, m) {
  m.def("pack_int4", py::vectorize(resq::pack_int4));
  m.def("unpack_int4_even", py::vectorize(resq::unpack_int4_even));
  m.def("unpack_int4_odd", py::vectorize(resq::unpack_int4_odd));
  m.def("quantize_code", py::vectorize(resq::quantize_code));
  m.def("asymmetric_scale", [](float lo, float hi, int bits) {
    const resq::ScaleZero q = resq::asymmetric_scale(lo, hi, bits);
    return py::make_tuple(q.scale, q.zero);
  });
  m.def("symmetric_scale", [](float lo, float hi, int bits) {
    const resq::ScaleZero q = resq::symmetric_scale(lo, hi, bits);
    return py::make_tuple(q.scale, q.zero);
  });
  define_packed_weight_cuda(m);
  define_cuda_choice(m);
  define_cuda_hadamard(m);
  define_cuda_scale(m);
  define_kv_page(m);
  define_mixed_gemm(m);
  m.def("paley_kind", resq::paley_kind);
  m.def("paley_matrix", [](int64_t order) {
    const resq::SignMatrix matrix = resq::paley_matrix(order);
    return Array<int8_t>(std::vector<int64_t>{order, order}, matrix.at.data());
  });
  m.def("hadamard_factors", resq::hadamard_factors);
  m.def("hadamard_plan", plan);
  m.attr("PALEY_TILE") = resq::kPaleyTile;
  m.attr("PALEY_TABLES") = resq::kPaleyTables;
  define_simd(m);
  define_team(m);
}
