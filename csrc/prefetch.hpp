// What will be read next is asked for while something else is computed.
#pragma once

#include "simd.hpp"
#include "tree_attention.hpp"

namespace forktree::FORKTREE_ISA {
namespace {

// Asks for the K and V of the chunk that comes next, a few cache lines at a time, in the order in which they lie in
// memory. The heads of a chunk are worked through one after the other, in pieces of a row of the pool: memory
// read in that order is slow.
class Prefetch {
    static constexpr int64_t LINE = 64;
    const char* pools[2] = {};
    int64_t pitch[2] = {}, row_bytes[2] = {};  // from slot to slot; those of the task's heads
    const int32_t* slots = nullptr;
    const char* at = nullptr;
    int64_t tokens = 0, token = 0, left = 0;  // left: bytes of this row
    int pool = 0;

public:
    static constexpr int64_t TERMS = 32;  // of a product, between two steps

    int64_t lines = 0;  // to ask for in each step

    Prefetch(const Attention& call, int64_t head_begin, int64_t heads) {
        const int64_t item_size = call.dtype == Dtype::fp32 ? 4 : 2;
        const int64_t dims[2] = {call.key_dim * item_size, call.value_dim * item_size};
        const void* bases[2] = {call.k, call.v};
        for (int i = 0; i < 2; ++i) {
            pools[i] = static_cast<const char*>(bases[i]) + head_begin * dims[i];
            pitch[i] = call.num_kv_heads * dims[i];
            row_bytes[i] = heads * dims[i];
        }
    }

    // steps: how many there will be while this chunk is fetched, about.
    void begin(const int32_t* next_slots, int64_t count, int64_t steps) {
        slots = next_slots;
        tokens = count;
        token = 0;
        left = 0;
        pool = 1;
        lines = count ? (count * (row_bytes[0] + row_bytes[1]) / LINE + steps - 1) / steps : 0;
    }

    void step() {
        for (int64_t i = 0; i < lines; ++i) {
            if (left <= 0) {
                pool = 1 - pool;  // K of a token, then its V
                if (pool == 0 && token == tokens) {
                    lines = 0;
                    return;
                }
                at = pools[pool] + slots[token] * pitch[pool];
                left = row_bytes[pool];
                token += pool;
            }
            __builtin_prefetch(at, 0, 2);
            at += LINE;
            left -= LINE;
        }
    }
};

}  // namespace
}  // namespace forktree::FORKTREE_ISA
