// The Python module forktree._core. Tensors arrive in structs of addresses, sizes, strides: nothing here knows torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>

#include "common/isa.hpp"
#include "cpu/append_kv.hpp"
#include "cpu/merge_states.hpp"
#include "cpu/rotate_rows.hpp"
#include "cpu/score_tokens/score_tokens.hpp"
#include "cpu/tree_attention/tree_attention.hpp"
#include "cuda/tree_attention/tree_attention.hpp"
#include "plan/bind_plan.hpp"

namespace py = pybind11;

namespace {

template <class Params>
Params unpacked(std::string_view bytes) {
    if (bytes.size() != sizeof(Params))
        throw std::invalid_argument("the struct must have " + std::to_string(sizeof(Params)) + " bytes, got " +
                                    std::to_string(bytes.size()));
    Params params;
    std::memcpy(&params, bytes.data(), sizeof(Params));
    return params;
}

// Calls an operation with a struct of params.h, and the number of threads or a stream.
template <auto OPERATION, class Params>
auto on_cpu(std::string_view params, int threads) {
    return OPERATION(unpacked<Params>(params), threads);
}

#if defined(FORKTREE_CUDA)
template <auto OPERATION, class Params>
void on_gpu(std::string_view params, uintptr_t stream) {
    OPERATION(unpacked<Params>(params), reinterpret_cast<void*>(stream));
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
    forktree::bind_plan(m);
}
