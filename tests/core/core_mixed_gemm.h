// mixed_gemm's plans and its body over tiles, with the tiles emulated.
#pragma once

#include <pybind11/pybind11.h>

void define_mixed_gemm(pybind11::module_& m);
