// The Python module forktree._core. Tensors arrive as addresses, sizes and strides: nothing here knows torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "isa.hpp"
#include "tree_attention.hpp"

namespace py = pybind11;

namespace {

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void tree_attention(int dtype, uintptr_t q, int64_t q_row_stride, int64_t q_head_stride, int64_t rows,
                    int32_t num_qo_heads, int32_t key_dim, uintptr_t k, uintptr_t v, int64_t num_slots,
                    int32_t num_kv_heads, int32_t value_dim, uintptr_t plan, int64_t plan_size, uintptr_t slot_index,
                    int64_t slot_index_size, float scale, float softcap, uintptr_t sinks, uintptr_t alibi_slopes,
                    uintptr_t out, uintptr_t lse, int64_t num_tokens, int threads) {
    forktree::Attention call{};
    call.dtype = forktree::Dtype(dtype);
    call.q = at<void>(q);
    call.q_row_stride = q_row_stride;
    call.q_head_stride = q_head_stride;
    call.k = at<void>(k);
    call.v = at<void>(v);
    call.num_qo_heads = num_qo_heads;
    call.num_kv_heads = num_kv_heads;
    call.group = num_qo_heads / num_kv_heads;
    call.key_dim = key_dim;
    call.value_dim = value_dim;
    call.plan = forktree::plan_view(at<int32_t>(plan), plan_size);
    call.slot_index = at<int32_t>(slot_index);
    call.scale = scale;
    call.softcap = softcap;
    call.sinks = at<float>(sinks);
    call.alibi_slopes = at<float>(alibi_slopes);
    call.out = at<void>(out);
    call.lse = at<float>(lse);
    (void)rows; (void)num_tokens;
    forktree::tree_attention(call, num_slots, slot_index_size, threads);
}

}  // namespace

PYBIND11_MODULE(_core, m) {
    m.def("isas", &forktree::isas);
    m.def("isa", &forktree::isa_name);
    m.def("use_isa", &forktree::use_isa, py::arg("name"));
    m.def("tree_attention", &tree_attention, py::call_guard<py::gil_scoped_release>());
}
