// The Python module forktree._core. Tensors arrive as addresses, sizes and strides: nothing here knows torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "isa.hpp"

namespace py = pybind11;

PYBIND11_MODULE(_core, m) {
    // What setup.py compiled it with.
    py::dict build;
    build["compiler"] = FORKTREE_COMPILER;
    build["flags"] = FORKTREE_FLAGS;
    build["isas"] = FORKTREE_ISAS;
#ifdef _OPENMP
    build["openmp"] = true;
#else
    build["openmp"] = false;
#endif
    m.attr("build") = build;

    m.def("isas", &forktree::isas);
    m.def("isa", &forktree::isa_name);
    m.def("use_isa", &forktree::use_isa, py::arg("name"));
}
