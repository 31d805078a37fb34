// Tree attention: every query row over the tokens its plan lets it see.
#pragma once

#include <cstdint>

#include "isa_dispatch.hpp"
#include "params.h"
#include "plan/format.h"

namespace forktree {

// A call with what is known of it once the plan is read.
struct Attention : TreeAttentionParams {
    PlanView plan;
    int32_t group;        // num_qo_heads / num_kv_heads
    float* partial_out;   // [P, Hq, Dv]
    float* partial_max;   // [P, Hq], base 2
    float* partial_mass;  // [P, Hq]
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

FORKTREE_FOR_EACH_ISA(AttentionKernel attention_kernel(const Attention& call);)

// The whole operation. Throws std::invalid_argument, naming what does not fit, before anything is written.
void tree_attention(const TreeAttentionParams& params, int threads);

}  // namespace forktree
