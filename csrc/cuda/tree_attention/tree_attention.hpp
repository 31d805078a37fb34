// One call of tree attention on a GPU, as the kernel gets it.
#pragma once

#include <cstdint>

#include "params.h"
#include "plan/format.h"

namespace forktree {

constexpr int ATTENTION_THREADS = 128;  // of a block

// A call as the kernel gets it. Strides are multiples of 8, and all addresses are aligned to 16 bytes; Dk = Dv = D. The
// plan was checked on the host.
struct GpuAttention : TreeAttentionParams {
    int32_t group;        // num_qo_heads / num_kv_heads
    float* partial_out;   // [P, Hq, D], not normalised
    float* partial_top;   // [P, Hq], base 2
    float* partial_mass;  // [P, Hq]
};

// Runs the kernel of one element type and head dim, with as many blocks as the device holds.
template <class T, int D>
void launch_attention(const GpuAttention& call, void* stream);

// The whole operation on the current device, in order with what else `stream` does. Throws std::invalid_argument,
// naming what does not fit.
namespace cuda {
void tree_attention(const TreeAttentionParams& params, void* stream);
}

}  // namespace forktree
