// Stress of cpu/team.h.
#include "core_team.h"

#include <pybind11/pybind11.h>

void define_team(pybind11::module_& m) {
  m.def("team_mistakes", team_mistakes, pybind11::call_guard<pybind11::gil_scoped_release>());
}
