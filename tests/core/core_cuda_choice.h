#pragma once

#include <pybind11/pybind11.h>

void define_cuda_choice(pybind11::module_& m);
