// The CUDA layouts of a Hadamard transform and the quotient of silu, for the exhaustive tests.
#pragma once

#include <pybind11/pybind11.h>

void define_cuda_hadamard(pybind11::module_& m);
