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

namespace cuda {

// The same on the current device, in order with what else `stream` does. Slots beyond the pool are not looked for, as
// that would wait for the device: they are not stored. Throws std::runtime_error if the device does not take it.
void append_kv(int dtype, int64_t heads, int64_t num_slots, Indices slots, const Append& k, const Append& v,
               void* stream);

}  // namespace cuda
}  // namespace forktree
