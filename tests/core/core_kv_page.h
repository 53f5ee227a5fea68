// The arithmetic of a KV page's ranges and codes, for the exhaustive tests.
#pragma once

#include <pybind11/pybind11.h>

void define_kv_page(pybind11::module_& m);
