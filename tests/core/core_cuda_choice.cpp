// Which CUDA kernel a device and a shape run, for the tests: pure host functions, no CUDA headers.
#include "core_cuda_choice.h"

#include "cuda/arch.h"
#include "ops/mixed_gemm/mixed_gemm_config.h"

namespace py = pybind11;

void define_cuda_choice(py::module_& m) {
  using namespace resq::cuda;
  py::enum_<Family>(m, "CudaFamily")
      .value("UNSUPPORTED", Family::kUnsupported)
      .value("PORTABLE", Family::kPortable)
      .value("SM80", Family::kSm80)
      .value("SM90", Family::kSm90);
  py::enum_<MixedGemmKernel>(m, "MixedGemmKernel")
      .value("SMALL_BATCH", MixedGemmKernel::kSmallBatch)
      .value("SM80", MixedGemmKernel::kSm80)
      .value("SM90", MixedGemmKernel::kSm90);
  py::class_<MixedGemmChoice>(m, "MixedGemmChoice")
      .def_readonly("kernel", &MixedGemmChoice::kernel)
      .def_readonly("tile_rows", &MixedGemmChoice::tile_rows)
      .def_readonly("tile_columns", &MixedGemmChoice::tile_columns)
      .def_readonly("splits", &MixedGemmChoice::splits)
      .def_readonly("workspace_bytes", &MixedGemmChoice::workspace_bytes);
  m.def("cuda_family", family);
  m.def("weight_layout", weight_layout);
  m.def("packs_activations", packs_activations);
  m.def("mixed_gemm_choice",
        [](int64_t rows, int64_t n, int64_t k_lo, int64_t k_hi, bool packed, Family family,
           int sms) { return mixed_gemm_choice({rows, n, k_lo, k_hi, packed}, family, sms); });
}
