// One call of tree attention on a GPU, as the kernel gets it.
#pragma once

#include <cstdint>

#include "common/numeric.hpp"
#include "plan/format.h"

namespace forktree {

constexpr int ATTENTION_THREADS = 128;  // of a block

// Strides in elements, multiples of 8; all addresses are aligned to 16 bytes and the last dimension is contiguous.
struct GpuAttention {
    const void* q;  // [at least R, Hq, D]
    int64_t q_row_stride, q_head_stride;
    const void* k;  // [slots, Hk, D]
    int64_t k_slot_stride, k_head_stride;
    const void* v;  // [slots, Hk, D]
    int64_t v_slot_stride, v_head_stride;
    int32_t num_qo_heads, num_kv_heads;
    int32_t group;        // num_qo_heads / num_kv_heads
    int32_t num_tokens;   // T or more; what is beyond the plan's is cleared
    const int32_t* plan;  // checked on the host
    const int32_t* slot_index;
    float scale;
    float softcap;              // 0 = none
    const float* sinks;         // [Hq] or null
    const float* alibi_slopes;  // [Hq] or null
    void* out;                  // [num_tokens, Hq, D]
    float* lse;                 // [num_tokens, Hq]
    float* partial_out;         // [P, Hq, D], not normalised
    float* partial_top;         // [P, Hq], base 2
    float* partial_mass;        // [P, Hq]
    int32_t* counters;          // [num_tokens, Hk]: partials that are there; 0 between launches
};

struct GpuStream {
    int device;  // the current one
    void* stream;
};

// Runs the kernel of one element type and head dim, with as many blocks as the device holds. biased: softcap, ALiBi or
// a scale that is not positive.
template <class T, int D>
void launch_attention(const GpuAttention& call, bool biased, GpuStream stream);

// The whole operation on device tensors; group and partials are filled in here. partials: [max_partials, Hq, D + 2]
// fp32, room for what the items leave. Throws std::invalid_argument, naming what does not fit.
namespace cuda {
void tree_attention(int dtype, int32_t head_dim, int64_t max_partials, float* partials, GpuAttention call,
                    GpuStream stream);
}

}  // namespace forktree
