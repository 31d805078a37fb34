// Arguments of the operations as they cross the binding: plain structs, shared by the CPU and CUDA and mirrored member
// by member in python/forktree/ops/params.py. Pointers are those of tensors on the operation's device. Strides are in
// elements; the last dimension is contiguous everywhere.
//
// R query rows, T tokens, Hq and Hk query and KV heads, Dk and Dv their sizes, V vocabulary, H hidden size.
#pragma once

#include <cstdint>

#include "common/indices.hpp"
#include "common/numeric.hpp"

namespace forktree {

// Keys and values of one layer.
struct KvPool {
    void* k;  // [num_slots, Hk, Dk]
    int64_t k_slot_stride, k_head_stride;
    void* v;  // [num_slots, Hk, Dv]
    int64_t v_slot_stride, v_head_stride;
    int64_t num_slots;
    int32_t num_kv_heads, k_dim, v_dim;
    Dtype dtype;
};

// Rows, tokens, partials, plan and slot_index may have room beyond what the plan needs.
struct TreeAttentionParams {
    KvPool pool;
    const void* q;  // [rows, Hq, Dk]
    int64_t q_row_stride, q_head_stride;
    int64_t rows;
    int64_t num_tokens;  // outputs beyond the plan's are cleared
    int64_t max_partials;
    const int32_t* plan_buffer;  // [plan_size], see plan/format.h
    int64_t plan_size;
    const int32_t* slot_index;  // [slot_index_size]
    int64_t slot_index_size;
    int32_t num_qo_heads;
    Dtype dtype;                // of q and out
    float scale;                // of q * k
    float softcap;              // 0: none
    const float* sinks;         // [Hq] or null
    const float* alibi_slopes;  // [Hq] or null
    void* out;                  // [num_tokens, Hq, Dv]
    float* lse;                 // [num_tokens, Hq], natural log
    // For CUDA; null for the CPU, which has scratch of its own.
    float* partials;    // [max_partials, Hq, Dv + 2]
    int32_t* counters;  // [num_tokens, Hk]: partials that are there; 0 between launches
    int64_t device;     // number of the current GPU
    // For the CPU: the plan was validated when it was made, and its slots when it met this pool.
    bool plan_trusted;

    // Whether scores are more than q * k times a positive number.
    FORKTREE_INLINE bool biased() const { return softcap > 0 || alibi_slopes || !(scale > 0); }
};

struct AppendKvParams {
    KvPool pool;
    const void* k;  // [T, Hk, Dk]
    int64_t k_row_stride, k_head_stride;
    const void* v;  // [T, Hk, Dv]
    int64_t v_row_stride, v_head_stride;
    Indices slots;  // [T], negative: not stored
};

struct RotateRowsParams {
    const void* q;  // [R, heads, dim]
    int64_t row_stride, head_stride;
    int64_t heads, dim;
    Indices shift;           // [R] positions
    const double* inv_freq;  // [pairs] radians per position
    int64_t pairs;           // the first 2 * pairs elements of a head rotate
    void* out;               // [R, heads, dim], contiguous, not q
    Dtype dtype;
    bool interleaved;  // pairs are (0, 1), (2, 3), ...; otherwise (0, pairs), (1, pairs + 1), ...
};

struct MergeStatesParams {
    const void* o;     // [states, heads, dim], contiguous
    const float* lse;  // [states, heads], natural log
    int64_t states, heads, dim;
    Indices indptr;  // [T + 1]: output t merges o[index[i]] for i in [indptr[t], indptr[t + 1]), in this order
    Indices index;
    void* out;     // [T, heads, dim]
    float* total;  // [T, heads]
    Dtype dtype;   // of o and out
};

struct ScoreTokensParams {
    const void* hidden;  // [rows, H]
    int64_t row_stride, rows, hidden_size;
    const void* lm_head;  // [V, H], contiguous
    int64_t vocab;
    const float* bias;  // [V] or null
    float scale;
    float softcap;  // 0: none
    int64_t top_k;  // at most V
    // What samples a token of each row; keys null: no sampling.
    const uint64_t* keys;        // [rows]
    const double* settings;      // [4, rows]: temperature (0: greedy), top_k, top_p, min_p
    const int32_t* edit_indptr;  // [rows + 1] or null
    const int32_t* edit_ids;     // [E]
    const int32_t* edit_ops;     // [E], 0: add, 1: repetition
    const float* edit_values;    // [E]
    const int32_t* allowed;      // [rows, ceil(V / 32)] bits or null
    // Results; those not asked for are null.
    float* lse;              // [rows]
    float* entropy;          // [rows]
    int64_t* top_ids;        // [rows, top_k]
    float* top_logits;       // [rows, top_k]
    int64_t* token;          // [rows]
    float* token_logit;      // [rows]
    float* shaped_log_prob;  // [rows]
    Dtype dtype;             // of hidden and lm_head
};

// Every struct with its members: `STRUCT(name, MEMBER(name), ...)`, for the test that holds the mirror against them.
#define FORKTREE_PARAMS(STRUCT, MEMBER)                                                                                \
    STRUCT(Indices, MEMBER(data), MEMBER(wide), MEMBER(size))                                                          \
    STRUCT(KvPool, MEMBER(k), MEMBER(k_slot_stride), MEMBER(k_head_stride), MEMBER(v), MEMBER(v_slot_stride),          \
           MEMBER(v_head_stride), MEMBER(num_slots), MEMBER(num_kv_heads), MEMBER(k_dim), MEMBER(v_dim),               \
           MEMBER(dtype))                                                                                              \
    STRUCT(TreeAttentionParams, MEMBER(pool), MEMBER(q), MEMBER(q_row_stride), MEMBER(q_head_stride), MEMBER(rows),    \
           MEMBER(num_tokens), MEMBER(max_partials), MEMBER(plan_buffer), MEMBER(plan_size), MEMBER(slot_index),       \
           MEMBER(slot_index_size), MEMBER(num_qo_heads), MEMBER(dtype), MEMBER(scale), MEMBER(softcap),               \
           MEMBER(sinks), MEMBER(alibi_slopes), MEMBER(out), MEMBER(lse), MEMBER(partials), MEMBER(counters),          \
           MEMBER(device), MEMBER(plan_trusted))                                                                       \
    STRUCT(AppendKvParams, MEMBER(pool), MEMBER(k), MEMBER(k_row_stride), MEMBER(k_head_stride), MEMBER(v),            \
           MEMBER(v_row_stride), MEMBER(v_head_stride), MEMBER(slots))                                                 \
    STRUCT(RotateRowsParams, MEMBER(q), MEMBER(row_stride), MEMBER(head_stride), MEMBER(heads), MEMBER(dim),           \
           MEMBER(shift), MEMBER(inv_freq), MEMBER(pairs), MEMBER(out), MEMBER(dtype), MEMBER(interleaved))            \
    STRUCT(MergeStatesParams, MEMBER(o), MEMBER(lse), MEMBER(states), MEMBER(heads), MEMBER(dim), MEMBER(indptr),      \
           MEMBER(index), MEMBER(out), MEMBER(total), MEMBER(dtype))                                                   \
    STRUCT(ScoreTokensParams, MEMBER(hidden), MEMBER(row_stride), MEMBER(rows), MEMBER(hidden_size), MEMBER(lm_head),  \
           MEMBER(vocab), MEMBER(bias), MEMBER(scale), MEMBER(softcap), MEMBER(top_k), MEMBER(keys), MEMBER(settings), \
           MEMBER(edit_indptr), MEMBER(edit_ids), MEMBER(edit_ops), MEMBER(edit_values), MEMBER(allowed), MEMBER(lse), \
           MEMBER(entropy), MEMBER(top_ids), MEMBER(top_logits), MEMBER(token), MEMBER(token_logit),                   \
           MEMBER(shaped_log_prob), MEMBER(dtype))

}  // namespace forktree
