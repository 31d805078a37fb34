// The Python module forktree._core. Tensors arrive as addresses, sizes and strides: nothing here knows torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/isa.hpp"
#include "cpu/append_kv.hpp"
#include "cpu/merge_states.hpp"
#include "cpu/rotate_rows.hpp"
#include "cpu/score_tokens.hpp"
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

void append_kv(int dtype, int64_t tokens, int64_t heads, int64_t num_slots, Address slots, bool wide, Address k,
               int64_t k_row_stride, int64_t k_head_stride, int64_t k_dim, Address k_slots, int64_t k_slot_stride,
               int64_t k_slots_head_stride, Address v, int64_t v_row_stride, int64_t v_head_stride, int64_t v_dim,
               Address v_slots, int64_t v_slot_stride, int64_t v_slots_head_stride, int threads) {
    forktree::append_kv(
        dtype, heads, num_slots, {at<void>(slots), wide, tokens},
        {k_dim, {at<void>(k), k_row_stride, k_head_stride}, {at<void>(k_slots), k_slot_stride, k_slots_head_stride}},
        {v_dim, {at<void>(v), v_row_stride, v_head_stride}, {at<void>(v_slots), v_slot_stride, v_slots_head_stride}},
        threads);
}

void rotate_rows(int dtype, Address q, int64_t row_stride, int64_t head_stride, int64_t rows, int64_t heads,
                 int64_t dim, Address shift, bool wide, Address inv_freq, int64_t pairs, bool interleaved, Address out,
                 int threads) {
    forktree::rotate_rows(dtype, at<void>(q), row_stride, head_stride, heads, dim, {at<void>(shift), wide, rows},
                          {at<double>(inv_freq), pairs, interleaved}, at<void>(out), threads);
}

void merge_states(int dtype, Address o, Address lse, int64_t states, int64_t heads, int64_t dim, Address indptr,
                  bool indptr_wide, int64_t indptr_size, Address index, bool index_wide, int64_t index_size,
                  Address out, Address total, int threads) {
    forktree::merge_states(dtype, at<void>(o), at<float>(lse), states, heads, dim,
                           {at<void>(indptr), indptr_wide, indptr_size}, {at<void>(index), index_wide, index_size},
                           at<void>(out), at<float>(total), threads);
}

// As in TokenScoring.
int64_t score_tokens(int dtype, Address hidden, int64_t row_stride, int64_t rows, int64_t size, Address lm_head,
                     int64_t vocab, Address bias, float scale, float softcap, int64_t top_k, Address keys,
                     Address settings, Address edit_indptr, Address edit_ids, Address edit_ops, Address edit_values,
                     Address allowed, Address lse, Address entropy, Address top_ids, Address top_logits, Address token,
                     Address token_logit, Address shaped_log_prob, int threads) {
    forktree::TokenScoring call{};
    call.dtype = forktree::Dtype(dtype);
    call.hidden = at<void>(hidden);
    call.row_stride = row_stride;
    call.rows = rows;
    call.size = size;
    call.lm_head = at<void>(lm_head);
    call.vocab = vocab;
    call.bias = at<float>(bias);
    call.scale = scale;
    call.softcap = softcap;
    call.top_k = top_k;
    call.keys = at<uint64_t>(keys);
    call.settings = at<double>(settings);
    call.edit_indptr = at<int32_t>(edit_indptr);
    call.edit_ids = at<int32_t>(edit_ids);
    call.edit_ops = at<int32_t>(edit_ops);
    call.edit_values = at<float>(edit_values);
    call.allowed = at<int32_t>(allowed);
    call.lse = at<float>(lse);
    call.entropies = at<float>(entropy);
    call.top_ids = at<int64_t>(top_ids);
    call.top_logits = at<float>(top_logits);
    call.token = at<int64_t>(token);
    call.token_logit = at<float>(token_logit);
    call.shaped_log_prob = at<float>(shaped_log_prob);
    return forktree::score_tokens(call, threads);
}

void tree_attention(int dtype, Address q, int64_t q_row_stride, int64_t q_head_stride, int64_t rows,
                    int32_t num_qo_heads, int32_t key_dim, Address k, int64_t k_slot_stride, int64_t k_head_stride,
                    Address v, int64_t v_slot_stride, int64_t v_head_stride, int64_t num_slots, int32_t num_kv_heads,
                    int32_t value_dim, Address plan, int64_t plan_size, Address slot_index, int64_t slot_index_size,
                    float scale, float softcap, Address sinks, Address alibi_slopes, Address out, Address lse,
                    int64_t num_tokens, int64_t max_partials, int threads) {
    forktree::Attention call{};
    call.dtype = forktree::Dtype(dtype);
    call.q = at<void>(q);
    call.q_row_stride = q_row_stride;
    call.q_head_stride = q_head_stride;
    call.k = at<void>(k);
    call.k_slot_stride = k_slot_stride;
    call.k_head_stride = k_head_stride;
    call.v = at<void>(v);
    call.v_slot_stride = v_slot_stride;
    call.v_head_stride = v_head_stride;
    call.num_qo_heads = num_qo_heads;
    call.num_kv_heads = num_kv_heads;
    call.key_dim = key_dim;
    call.value_dim = value_dim;
    call.slot_index = at<int32_t>(slot_index);
    call.scale = scale;
    call.softcap = softcap;
    call.sinks = at<float>(sinks);
    call.alibi_slopes = at<float>(alibi_slopes);
    call.out = at<void>(out);
    call.lse = at<float>(lse);
    forktree::tree_attention(
        call, {at<int32_t>(plan), plan_size, rows, num_tokens, max_partials, num_slots, slot_index_size}, threads);
}

#if defined(FORKTREE_CUDA)

void cuda_append_kv(int dtype, int64_t tokens, int64_t heads, int64_t num_slots, Address slots, bool wide, Address k,
                    int64_t k_row_stride, int64_t k_head_stride, int64_t k_dim, Address k_slots, int64_t k_slot_stride,
                    int64_t k_slots_head_stride, Address v, int64_t v_row_stride, int64_t v_head_stride, int64_t v_dim,
                    Address v_slots, int64_t v_slot_stride, int64_t v_slots_head_stride, Address stream) {
    forktree::cuda::append_kv(
        dtype, heads, num_slots, {at<void>(slots), wide, tokens},
        {k_dim, {at<void>(k), k_row_stride, k_head_stride}, {at<void>(k_slots), k_slot_stride, k_slots_head_stride}},
        {v_dim, {at<void>(v), v_row_stride, v_head_stride}, {at<void>(v_slots), v_slot_stride, v_slots_head_stride}},
        at<void>(stream));
}

void cuda_rotate_rows(int dtype, Address q, int64_t row_stride, int64_t head_stride, int64_t rows, int64_t heads,
                      int64_t dim, Address shift, bool wide, Address inv_freq, int64_t pairs, bool interleaved,
                      Address out, Address stream) {
    forktree::cuda::rotate_rows(dtype, at<void>(q), row_stride, head_stride, heads, dim, {at<void>(shift), wide, rows},
                                {at<double>(inv_freq), pairs, interleaved}, at<void>(out), at<void>(stream));
}

void cuda_merge_states(int dtype, Address o, Address lse, int64_t states, int64_t heads, int64_t dim, Address indptr,
                       bool indptr_wide, int64_t indptr_size, Address index, bool index_wide, int64_t index_size,
                       Address out, Address total, Address stream) {
    forktree::cuda::merge_states(
        dtype, at<void>(o), at<float>(lse), states, heads, dim, {at<void>(indptr), indptr_wide, indptr_size},
        {at<void>(index), index_wide, index_size}, at<void>(out), at<float>(total), at<void>(stream));
}

void cuda_tree_attention(int dtype, Address q, int64_t q_row_stride, int64_t q_head_stride, int32_t num_qo_heads,
                         int32_t head_dim, Address k, int64_t k_slot_stride, int64_t k_head_stride, Address v,
                         int64_t v_slot_stride, int64_t v_head_stride, int32_t num_kv_heads, Address plan,
                         Address slot_index, float scale, float softcap, Address sinks, Address alibi_slopes,
                         Address out, Address lse, int32_t num_tokens, Address partials, int64_t max_partials,
                         Address counters, int device, Address stream) {
    forktree::GpuAttention call{};
    call.q = at<void>(q);
    call.q_row_stride = q_row_stride;
    call.q_head_stride = q_head_stride;
    call.k = at<void>(k);
    call.k_slot_stride = k_slot_stride;
    call.k_head_stride = k_head_stride;
    call.v = at<void>(v);
    call.v_slot_stride = v_slot_stride;
    call.v_head_stride = v_head_stride;
    call.num_qo_heads = num_qo_heads;
    call.num_kv_heads = num_kv_heads;
    call.num_tokens = num_tokens;
    call.plan = at<int32_t>(plan);
    call.slot_index = at<int32_t>(slot_index);
    call.scale = scale;
    call.softcap = softcap;
    call.sinks = at<float>(sinks);
    call.alibi_slopes = at<float>(alibi_slopes);
    call.out = at<void>(out);
    call.lse = at<float>(lse);
    call.counters = at<int32_t>(counters);
    forktree::cuda::tree_attention(dtype, head_dim, max_partials, at<float>(partials), call,
                                   {device, at<void>(stream)});
}
#endif

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
    m.def("append_kv", &append_kv, Unlocked());
    m.def("rotate_rows", &rotate_rows, Unlocked());
    m.def("merge_states", &merge_states, Unlocked());
    m.def("score_tokens", &score_tokens, Unlocked());
    m.def("tree_attention", &tree_attention, Unlocked());
#if defined(FORKTREE_CUDA)
    m.def("cuda_append_kv", &cuda_append_kv, Unlocked());
    m.def("cuda_rotate_rows", &cuda_rotate_rows, Unlocked());
    m.def("cuda_merge_states", &cuda_merge_states, Unlocked());
    m.def("cuda_tree_attention", &cuda_tree_attention, Unlocked());
#endif
    m.def("plan", &plan);
    m.def("plan_count", &plan_count, py::arg("buffer"), py::arg("cost_model"));
    m.def(
        "check_plan_buffer", [](const Ints& buffer) { forktree::plan_view(buffer.data(), buffer.size()); },
        py::arg("buffer"));
}
