// The Python module forktree._core. Tensors arrive as addresses, sizes and strides: nothing here knows torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "isa.hpp"

namespace py = pybind11;

PYBIND11_MODULE(_core, m) {
    m.def("isas", &forktree::isas);
    m.def("isa", &forktree::isa_name);
    m.def("use_isa", &forktree::use_isa, py::arg("name"));
}
