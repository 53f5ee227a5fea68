// mixed_gemm's choice of an instruction set and of a plan, and its body over tiles with the tiles
// emulated, so that machines without AMX run it too.
#include "core_mixed_gemm.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>

#include "cpu/simd_common.h"
#include "ops/mixed_gemm/cpu/plan.h"
#include "ops/mixed_gemm/cpu/tile_config.h"

namespace resq::cpu::emulated {
namespace {
#include "cpu/simd_scalar.h"
#include "emulated_tiles.h"

// clang-format off: the body depends on the includes above it
#include "ops/mixed_gemm/cpu/amx_body.h"
// clang-format on
}  // namespace
}  // namespace resq::cpu::emulated

namespace py = pybind11;

namespace {

using resq::MixedGemmPlan;
using resq::cpu::Isa;

template <class T>
using Array = py::array_t<T, py::array::c_style>;

// Every task of a machine with AMX, in `runs` runs of consecutive tasks. Returns float32.
Array<float> mixed_gemm_over_tiles(const Array<int8_t>& q_lo, const Array<uint8_t>& q_lo_packed,
                                   const Array<int8_t>& q_hi, const Array<float>& params,
                                   const Array<uint8_t>& packed_weight,
                                   const Array<float>& weight_scale,
                                   const Array<int32_t>& weight_sum, const Array<float>& bias,
                                   int64_t runs) {
  const bool packed = q_lo_packed.size() > 0;
  const int64_t rows = params.shape(0), n = weight_scale.shape(0);
  const int64_t k_lo = packed ? 2 * q_lo_packed.shape(1) : q_lo.shape(1), k_hi = q_hi.shape(1);
  Array<float> out({rows, n});
  const resq::MixedGemmTasks tasks{
      .gemm = {.m = rows,
               .n = n,
               .k_lo = k_lo,
               .k_hi = k_hi,
               .q_lo = packed ? static_cast<const void*>(q_lo_packed.data()) : q_lo.data(),
               .q_lo_packed = packed,
               .q_hi = q_hi.data(),
               .params = params.data(),
               .packed_weight = packed_weight.data(),
               .weight_scale = weight_scale.data(),
               .weight_sum = weight_sum.data(),
               .bias = bias.size() ? bias.data() : nullptr,
               .bias_type = resq::FloatType::kFloat32,
               .out = out.mutable_data(),
               .out_type = resq::FloatType::kFloat32},
      .plan = resq::mixed_gemm_plan(rows, n, k_lo, k_hi, Isa::kAmx)};
  if (!tasks.plan.amx) throw std::invalid_argument("so few rows do not run on tiles");
  const int64_t count = tasks.plan.tasks();
  for (int64_t run = 0; run < runs; ++run) {
    resq::cpu::emulated::run_tasks(tasks, run * count / runs, (run + 1) * count / runs);
  }
  return out;
}

}  // namespace

void define_mixed_gemm(py::module_& m) {
  namespace cpu = resq::cpu;
  py::enum_<Isa>(m, "Isa")
      .value("SCALAR", Isa::kScalar)
      .value("AVX2", Isa::kAvx2)
      .value("AVX512VNNI", Isa::kAvx512Vnni)
      .value("AMX", Isa::kAmx);
  m.def("detect_features", cpu::detect_features);
  m.def("missing_features", cpu::missing_features);
  m.def("best_isa", cpu::best_isa);
  m.def("select_isa", cpu::select_isa);
  py::class_<MixedGemmPlan>(m, "MixedGemmPlan")
      .def_readonly("panels", &MixedGemmPlan::panels)
      .def_readonly("blocks", &MixedGemmPlan::blocks)
      .def_readonly("panel_m", &MixedGemmPlan::panel_m)
      .def_readonly("tile_m", &MixedGemmPlan::tile_m)
      .def_readonly("grain", &MixedGemmPlan::grain)
      .def_readonly("amx", &MixedGemmPlan::amx);
  m.def("mixed_gemm_plan", resq::mixed_gemm_plan);
  m.def("mixed_gemm_over_tiles", mixed_gemm_over_tiles);
}
