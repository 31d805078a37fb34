// Writes each token's K and V into its slot of the pools.
#pragma once

#include <cstdint>

#include "params.h"

namespace forktree {

// [n, Hk, dim]: strides in elements, contiguous in dim.
struct Strided {
    void* data;
    int64_t stride, head_stride;
};

// K or V of all tokens, and their destination.
struct Append {
    int64_t dim;
    Strided rows;  // [T, Hk, dim]
    Strided pool;  // [num_slots, Hk, dim]
};

inline Append keys(const AppendKvParams& x) {
    return {x.pool.k_dim,
            {const_cast<void*>(x.k), x.k_row_stride, x.k_head_stride},
            {x.pool.k, x.pool.k_slot_stride, x.pool.k_head_stride}};
}

inline Append values(const AppendKvParams& x) {
    return {x.pool.v_dim,
            {const_cast<void*>(x.v), x.v_row_stride, x.v_head_stride},
            {x.pool.v, x.pool.v_slot_stride, x.pool.v_head_stride}};
}

// Throws std::invalid_argument, before anything is written, if a slot lies beyond the pool. Of two tokens with the same
// slot either may win.
void append_kv(const AppendKvParams& params, int threads);

namespace cuda {

// The same on the current device, in stream order. Slots beyond the pool are not reported, as that would wait for the
// device; their rows are not stored. Throws std::runtime_error if the launch fails.
void append_kv(const AppendKvParams& params, void* stream);

}  // namespace cuda
}  // namespace forktree
