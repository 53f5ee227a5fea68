// The scales of a CUDA row, for the exhaustive tests.
#pragma once

#include <pybind11/pybind11.h>

void define_cuda_scale(pybind11::module_& m);
