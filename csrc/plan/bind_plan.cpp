#include "plan/bind_plan.hpp"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "plan/planner.hpp"
#include "plan/stats.hpp"
#include "plan/validate.hpp"

namespace py = pybind11;

namespace forktree {
namespace {

using Ints = py::array_t<int32_t, py::array::c_style>;
using Words = py::array_t<uint32_t, py::array::c_style>;

// A plain struct of int64_t from its fields in order.
template <class Struct>
Struct from_fields(const char* name, const std::vector<int64_t>& fields) {
    Struct result;
    constexpr size_t count = sizeof result / sizeof(int64_t);
    if (fields.size() != count)
        throw std::invalid_argument(std::string(name) + " must have " + std::to_string(count) + " fields, got " +
                                    std::to_string(fields.size()));
    std::memcpy(&result, fields.data(), sizeof result);
    return result;
}

// The arrays of a TreeLayout, which were checked there. They stay alive as long as this does.
class LayoutArrays {
public:
    explicit LayoutArrays(py::handle from) : from(from) {
        layout.slot_index = array<Ints>("slot_index").data();
        layout.node_begin = array<Ints>("node_begin").data();
        const Ints node_len = array<Ints>("node_len");
        layout.node_len = node_len.data();
        layout.nodes = node_len.size();
        layout.node_parent = array<Ints>("node_parent").data();
        layout.node_fork = array<Ints>("node_fork").data();
        layout.node_pos = array<Ints>("node_pos").data();
        layout.row_indptr = array<Ints>("row_indptr").data();
        layout.path_indptr = array<Ints>("path_indptr").data();
        layout.path_node = array<Ints>("path_node").data();
        layout.path_stop = array<Ints>("path_stop").data();
        layout.path_top = array<Ints>("path_top").data();
        const Ints causal = array<Ints>("causal");
        layout.causal = causal.data();
        layout.contexts = causal.size();
        const Ints row_token = array<Ints>("row_token");
        layout.row_token = row_token.data();
        layout.rows = row_token.size();
        layout.row_pos = array<Ints>("row_pos").data();
        layout.tokens = from.attr("num_tokens").cast<int64_t>();
        if (from.attr("mask_bits").is_none()) return;
        layout.mask_indptr = array<Ints>("mask_indptr").data();
        const Words words = array<Words>("mask_bits");
        layout.mask_bits = words.data();
        layout.mask_words = words.size();
    }

    Layout layout{};

private:
    py::handle from;
    std::vector<py::array> kept;  // contiguous copies, where an array is not

    template <class Array>
    Array array(const char* name) {
        Array found = from.attr(name).template cast<Array>();
        kept.push_back(found);
        return found;
    }
};

Ints make_plan(py::handle layout, const std::vector<int64_t>& heads, int64_t window,
               const std::vector<int64_t>& cost_model, int64_t max_partials, bool invariant) {
    const LayoutArrays arrays(layout);
    const std::vector<int32_t> buffer =
        plan(arrays.layout, {from_fields<HeadShape>("heads", heads), window,
                             from_fields<CostModel>("cost_model", cost_model), max_partials, invariant});
    validate(open_plan(buffer.data(), int64_t(buffer.size())));  // kernels trust it from here on
    return Ints(py::ssize_t(buffer.size()), buffer.data());
}

void check_header(const Ints& buffer) { open_plan(buffer.data(), buffer.size()); }

void check_buffer(const Ints& buffer) { validate(open_plan(buffer.data(), buffer.size())); }

auto plan_stats(const Ints& buffer, const std::vector<int64_t>& cost_model) {
    const PlanView view = open_plan(buffer.data(), buffer.size());
    validate(view);
    const PlanStats s = stats(view, from_fields<CostModel>("cost_model", cost_model));
    return std::make_tuple(s.distinct, s.planned, s.attended, s.computed, s.padded, s.predicted, s.sum, s.longest);
}

}  // namespace

void bind_plan(py::module_& module) {
    module.def("plan", &make_plan);
    module.def("plan_stats", &plan_stats, py::arg("buffer"), py::arg("cost_model"));
    module.def("check_plan_header", &check_header, py::arg("buffer"));
    module.def("check_plan_buffer", &check_buffer, py::arg("buffer"));
}

}  // namespace forktree
