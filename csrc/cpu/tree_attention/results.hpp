// Outputs and log-sum-exps from unnormalised sums, and the merging of partials.
#pragma once

#include "cpu/tree_attention/scratch.hpp"

namespace forktree::FORKTREE_ISA {
namespace {

constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;

// Stores an output, [Dv].
inline void store_output(const Attention& call, int64_t to, const float* from) {
    const int64_t dim = call.pool.v_dim;
    if (call.dtype == Dtype::fp32) __builtin_memcpy(static_cast<float*>(call.out) + to * dim, from, 4 * dim);
    else narrow(from, static_cast<uint16_t*>(call.out) + to * dim, dim, call.dtype);
}

// Adds the sink of a head, and stores the log-sum-exp at index `to`. Returns the factor that normalises the sum of
// weighted values; 0 if the row saw nothing.
inline float store_lse(const Attention& call, int64_t qo_head, float top, float mass, int64_t to) {
    float shift = 1.0f;
    if (call.sinks) {
        const float sink = call.sinks[qo_head] * LOG2_E, old_top = top;
        top = sink > top ? sink : top;
        shift = top == -INF ? 1.0f : __builtin_exp2f(old_top - top);
        mass = mass * shift + (top == -INF ? 0.0f : __builtin_exp2f(sink - top));
    }
    call.lse[to] = mass == 0.0f ? -INF : (top + __builtin_log2f(mass)) * LN_2;
    return mass == 0.0f ? 0.0f : shift / mass;
}

// Merges the partials of a token in the order of its list. sum: scratch, [Dv].
inline void merge(const Attention& call, int64_t token, float* sum) {
    const int64_t heads = call.num_qo_heads, dim = call.pool.v_dim;
    const int32_t* begin = call.plan.merge_partial + call.plan.merge_indptr[token];
    const int32_t* end = call.plan.merge_partial + call.plan.merge_indptr[token + 1];
    for (int64_t head = 0; head < heads; ++head) {
        float top = -INF, mass = 0.0f;
        for (const int32_t* p = begin; p < end; ++p) {
            const float x = call.partial_max[*p * heads + head];
            top = x > top ? x : top;
        }
        const float base = top == -INF ? 0.0f : top;
        __builtin_memset(sum, 0, 4 * dim);
        for (const int32_t* p = begin; p < end; ++p) {
            const int64_t state = *p * heads + head;
            const float weight = __builtin_exp2f(call.partial_max[state] - base);
            mass += call.partial_mass[state] * weight;
            const float* from = call.partial_out + state * dim;
            for (int64_t d = 0; d < dim; ++d) sum[d] += from[d] * weight;
        }
        const int64_t to = token * heads + head;
        const float factor = store_lse(call, head, top, mass, to);
        for (int64_t d = 0; d < dim; ++d) sum[d] *= factor;
        store_output(call, to, sum);
    }
}

}  // namespace
}  // namespace forktree::FORKTREE_ISA
