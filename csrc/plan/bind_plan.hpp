// The planner, as `forktree._core` offers it.
#pragma once

#include <pybind11/pybind11.h>

namespace forktree {

void bind_plan(pybind11::module_& module);

}  // namespace forktree
