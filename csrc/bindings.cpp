// The Python module forktree._core. Tensors arrive as addresses, sizes and strides: nothing here knows torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "isa.hpp"
#include "plan.hpp"

namespace py = pybind11;

namespace {

using Ints = py::array_t<int32_t, py::array::c_style>;
using Words = py::array_t<uint32_t, py::array::c_style>;
using TargetTuple = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                               int64_t, int64_t>;

forktree::Target target(const TargetTuple& fields) {
    return std::apply([](auto... field) { return forktree::Target{field...}; }, fields);
}

// The arrays are those of a TreeLayout, in its order; they were checked there.
Ints plan(const Ints& slot_index, const Ints& node_begin, const Ints& node_len, const Ints& node_parent,
          const Ints& node_fork, const Ints& node_pos, const Ints& row_indptr, const Ints& path_indptr,
          const Ints& path_node, const Ints& path_stop, const Ints& path_top, const Ints& causal, const Ints& row_token,
          const Ints& row_pos, const std::optional<Ints>& mask_indptr, const std::optional<Words>& mask_bits,
          int64_t num_tokens, int64_t num_qo_heads, int64_t num_kv_heads, int64_t head_dim, int64_t window,
          const TargetTuple& fields, int64_t max_partials, bool invariant) {
    const forktree::Layout layout{
        slot_index.size(), node_len.size(), row_token.size(), num_tokens, causal.size(), mask_bits ? mask_bits->size() : 0,
        slot_index.data(), node_begin.data(), node_len.data(), node_parent.data(), node_fork.data(), node_pos.data(),
        row_indptr.data(), path_indptr.data(), path_node.data(), path_stop.data(), path_top.data(), causal.data(),
        row_token.data(), row_pos.data(), mask_indptr ? mask_indptr->data() : nullptr,
        mask_bits ? mask_bits->data() : nullptr};
    const std::vector<int32_t> buffer = forktree::plan(
        layout, {num_qo_heads, num_kv_heads, head_dim, window, target(fields), max_partials, invariant});
    return Ints(py::ssize_t(buffer.size()), buffer.data());
}

auto plan_count(const Ints& buffer, const TargetTuple& fields) {
    const forktree::PlanCounts c = forktree::count(forktree::plan_view(buffer.data(), buffer.size()), target(fields));
    return std::make_tuple(c.distinct, c.planned, c.attended, c.computed, c.padded, c.predicted, c.sum, c.longest);
}

}  // namespace

PYBIND11_MODULE(_core, m) {
    m.def("isas", &forktree::isas);
    m.def("isa", &forktree::isa_name);
    m.def("use_isa", &forktree::use_isa, py::arg("name"));
    m.def("plan", &plan);
    m.def("plan_count", &plan_count, py::arg("buffer"), py::arg("target"));
    m.def("check_plan_buffer", [](const Ints& buffer) { forktree::plan_view(buffer.data(), buffer.size()); },
          py::arg("buffer"));
}
