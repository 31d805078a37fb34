// Writes each token's K and V into its slot of the pools.
#pragma once

#include <cstdint>

#include "indices.hpp"

namespace forktree {

// K or V of all tokens, and where they go.
struct Append {
    const void* rows;  // [T, Hk, dim], strides in elements, contiguous in dim
    int64_t row_stride, head_stride, dim;
    void* pool;  // [num_slots, Hk, dim], contiguous
};

// slots [T]: a negative one is not stored. Throws std::invalid_argument, before anything is written, if one lies beyond
// the pool. Of two tokens with the same slot either may win.
void append_kv(int dtype, int64_t heads, int64_t num_slots, Indices slots, const Append& k, const Append& v,
               int threads);

}  // namespace forktree
