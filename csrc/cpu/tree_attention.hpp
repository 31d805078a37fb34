// Tree attention: every query row over the tokens its plan lets it see.
#pragma once

#include <cstdint>

#include "common/numeric.hpp"
#include "plan/format.h"

namespace forktree {

// All of one call. Strides in elements; the last dimension is contiguous everywhere.
struct Attention {
    Dtype dtype;
    const void* q;  // [R, Hq, Dk]
    int64_t q_row_stride, q_head_stride;
    const void* k;  // [slots, Hk, Dk]
    int64_t k_slot_stride, k_head_stride;
    const void* v;  // [slots, Hk, Dv]
    int64_t v_slot_stride, v_head_stride;
    int32_t num_qo_heads, num_kv_heads, key_dim, value_dim;
    int32_t group;  // num_qo_heads / num_kv_heads
    PlanView plan;
    const int32_t* slot_index;
    float scale;
    float softcap;              // 0 = none
    const float* sinks;         // [Hq] or null
    const float* alibi_slopes;  // [Hq] or null
    void* out;                  // [T, Hq, Dv]
    float* lse;                 // [T, Hq]
    float* partial_out;         // [P, Hq, Dv]
    float* partial_max;         // [P, Hq], base 2
    float* partial_mass;        // [P, Hq]
};

// What one thread does at a time: an item for some of its KV heads.
struct AttentionTask {
    int32_t item, head_begin, head_end;
};

// The part that is compiled for each instruction set.
struct AttentionKernel {
    // Bytes of scratch `run` needs for a task over `rows` rows and `heads` KV heads.
    int64_t (*scratch)(const Attention&, int64_t rows, int64_t heads);
    // scratch: 64-byte aligned. Writes outputs, or partials.
    void (*run)(const Attention&, AttentionTask, char* scratch);
    // Output of a token whose rows are in partials. scratch: [Dv].
    void (*merge)(const Attention&, int64_t token, float* scratch);
};

namespace portable {
AttentionKernel attention_kernel(const Attention& call);
}
namespace avx2 {
AttentionKernel attention_kernel(const Attention& call);
}
namespace avx512 {
AttentionKernel attention_kernel(const Attention& call);
}
namespace avx512bf16 {
AttentionKernel attention_kernel(const Attention& call);
}
namespace amx {
AttentionKernel attention_kernel(const Attention& call);
}

// What the arguments were made for, to be compared with the plan.
struct AttentionSizes {
    const int32_t* plan;
    int64_t plan_size, rows, tokens, max_partials, num_slots, slot_index_size;  // all but num_slots: at least
    bool plan_trusted;  // the plan was validated when it was made, and its slots when it met this pool
};

// The whole operation; `group`, `plan` and the partials are filled in here. Throws std::invalid_argument, naming what
// does not fit, before anything is written.
void tree_attention(Attention call, const AttentionSizes& sizes, int threads);

}  // namespace forktree
