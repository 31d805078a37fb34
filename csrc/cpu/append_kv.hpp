// Writes each token's K and V into its slot of the pools.
#pragma once

#include <cstdint>

#include "common/indices.hpp"

namespace forktree {

// [n, Hk, dim]: strides in elements, contiguous in dim.
struct Strided {
    void* data;
    int64_t stride, head_stride;
};

// K or V of all tokens, and where they go.
struct Append {
    int64_t dim;
    Strided rows;  // [T, Hk, dim]
    Strided pool;  // [num_slots, Hk, dim]
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
