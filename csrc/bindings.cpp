// The Python module forktree._core. Tensors arrive in structs of addresses, sizes and strides: nothing here knows
// torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <tuple>

#include "common/isa.hpp"
#include "cpu/append_kv.hpp"
#include "cpu/merge_states.hpp"
#include "cpu/rotate_rows.hpp"
#include "cpu/score_tokens/score_tokens.hpp"
#include "cpu/tree_attention.hpp"
#include "cuda/tree_attention_gpu.hpp"
#include "plan/plan.hpp"

namespace py = pybind11;

namespace {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

// Calls an operation with a struct of params.h, of which Python has the address; the second argument is the number of
// threads, or a stream.
template <auto OPERATION, class Params>
auto on_cpu(Address params, int threads) {
    return OPERATION(*at<const Params>(params), threads);
}

#if defined(FORKTREE_CUDA)
template <auto OPERATION, class Params>
void on_gpu(Address params, Address stream) {
    OPERATION(*at<const Params>(params), at<void>(stream));
}
#endif

// By struct: its size, and of each member its name, offset and size.
py::dict params_layout() {
    py::dict layout;
#define STRUCT(name, ...)                                                                                        \
    {                                                                                                            \
        using Self = forktree::name;                                                                             \
        py::dict members;                                                                                        \
        for (const auto& [member, offset, size] : {__VA_ARGS__}) members[member] = py::make_tuple(offset, size); \
        layout[#name] = py::make_tuple(sizeof(Self), members);                                                   \
    }
#define MEMBER(name) std::tuple<const char*, size_t, size_t>{#name, offsetof(Self, name), sizeof(Self::name)}
    FORKTREE_PARAMS(STRUCT, MEMBER)
#undef MEMBER
#undef STRUCT
    return layout;
}

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
    const forktree::Layout layout{slot_index.size(),
                                  node_len.size(),
                                  row_token.size(),
                                  num_tokens,
                                  causal.size(),
                                  mask_bits ? mask_bits->size() : 0,
                                  slot_index.data(),
                                  node_begin.data(),
                                  node_len.data(),
                                  node_parent.data(),
                                  node_fork.data(),
                                  node_pos.data(),
                                  row_indptr.data(),
                                  path_indptr.data(),
                                  path_node.data(),
                                  path_stop.data(),
                                  path_top.data(),
                                  causal.data(),
                                  row_token.data(),
                                  row_pos.data(),
                                  mask_indptr ? mask_indptr->data() : nullptr,
                                  mask_bits ? mask_bits->data() : nullptr};
    const std::vector<int32_t> buffer =
        forktree::plan(layout, {num_qo_heads, num_kv_heads, head_dim, window, target(fields), max_partials, invariant});
    return Ints(py::ssize_t(buffer.size()), buffer.data());
}

auto plan_count(const Ints& buffer, const TargetTuple& fields) {
    const forktree::PlanCounts c = forktree::count(forktree::plan_view(buffer.data(), buffer.size()), target(fields));
    return std::make_tuple(c.distinct, c.planned, c.attended, c.computed, c.padded, c.predicted, c.sum, c.longest);
}

}  // namespace

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
    build["cuda"] = FORKTREE_CUDA_BUILT;
    build["why_no_cuda"] = FORKTREE_WHY_NO_CUDA;
    m.attr("build") = build;

    m.def("isas", &forktree::isas);
    m.def("isa", &forktree::isa_name);
    m.def("use_isa", &forktree::use_isa, py::arg("name"));

    using Unlocked = py::call_guard<py::gil_scoped_release>;
    m.def("append_kv", &on_cpu<&forktree::append_kv, forktree::AppendKvParams>, Unlocked());
    m.def("rotate_rows", &on_cpu<&forktree::rotate_rows, forktree::RotateRowsParams>, Unlocked());
    m.def("merge_states", &on_cpu<&forktree::merge_states, forktree::MergeStatesParams>, Unlocked());
    m.def("score_tokens", &on_cpu<&forktree::score_tokens, forktree::ScoreTokensParams>, Unlocked());
    m.def("tree_attention", &on_cpu<&forktree::tree_attention, forktree::TreeAttentionParams>, Unlocked());
#if defined(FORKTREE_CUDA)
    m.def("cuda_append_kv", &on_gpu<&forktree::cuda::append_kv, forktree::AppendKvParams>, Unlocked());
    m.def("cuda_rotate_rows", &on_gpu<&forktree::cuda::rotate_rows, forktree::RotateRowsParams>, Unlocked());
    m.def("cuda_merge_states", &on_gpu<&forktree::cuda::merge_states, forktree::MergeStatesParams>, Unlocked());
    m.def("cuda_tree_attention", &on_gpu<&forktree::cuda::tree_attention, forktree::TreeAttentionParams>, Unlocked());
#endif
    m.attr("params") = params_layout();
    m.def("plan", &plan);
    m.def("plan_count", &plan_count, py::arg("buffer"), py::arg("cost_model"));
    m.def(
        "check_plan_buffer", [](const Ints& buffer) { forktree::plan_view(buffer.data(), buffer.size()); },
        py::arg("buffer"));
}
