// The SIMD operations of each instruction set over arrays.
#pragma once

#include <pybind11/pybind11.h>

void define_simd(pybind11::module_& m);
