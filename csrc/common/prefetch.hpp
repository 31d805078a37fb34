// Prefetches what will be read next while something else is computed.
#pragma once

#include "cpu/tree_attention/tree_attention.hpp"
#include "simd/simd.hpp"

namespace forktree::FORKTREE_ISA {
namespace {

// Prefetches the K and V of the next tile, a few cache lines at a time, in the order in which they lie in memory. The
// kernel reads them head by head, in pieces of a row of the pool, an order in which memory is slow.
class Prefetch {
    static constexpr int64_t LINE = 64;

    // The task's heads in a pool: pieces a slot, one where its heads are contiguous.
    struct Pool {
        const char* data;
        int64_t slot_pitch, pieces, piece_pitch, piece_bytes;
    };

    Pool pools[2];
    const int32_t* slots = nullptr;
    const char* at = nullptr;
    int64_t tokens = 0, token = 0, piece = 0, left = 0;  // left: bytes of this piece
    int pool = 0;

public:
    static constexpr int64_t TERMS = 32;  // of a product, between two steps

    int64_t lines = 0;  // to prefetch in each step

    Prefetch(const Attention& call, int64_t head_begin, int64_t heads) {
        const int64_t item_size = call.dtype == Dtype::fp32 ? 4 : 2;
        const auto part = [&](const void* data, int64_t slot_stride, int64_t head_stride, int64_t dim) {
            const int64_t pieces = head_stride == dim ? 1 : heads;
            return Pool{static_cast<const char*>(data) + head_begin * head_stride * item_size, slot_stride * item_size,
                        pieces, head_stride * item_size, heads / pieces * dim * item_size};
        };
        pools[0] = part(call.pool.k, call.pool.k_slot_stride, call.pool.k_head_stride, call.pool.k_dim);
        pools[1] = part(call.pool.v, call.pool.v_slot_stride, call.pool.v_head_stride, call.pool.v_dim);
    }

    // steps: about how many there will be while this tile is fetched.
    void begin(const int32_t* next_slots, int64_t count, int64_t steps) {
        slots = next_slots;
        tokens = count;
        token = -1;
        left = 0;
        pool = 1;
        piece = pools[1].pieces;
        int64_t bytes = 0;
        for (const Pool& p : pools) bytes += p.pieces * p.piece_bytes;
        lines = count ? (count * bytes / LINE + steps - 1) / steps : 0;
    }

    void step() {
        for (int64_t i = 0; i < lines; ++i) {
            if (left <= 0) {
                if (++piece >= pools[pool].pieces) {
                    piece = 0;
                    pool = 1 - pool;  // K of a token, then its V
                    if (pool == 0 && ++token == tokens) {
                        lines = 0;
                        return;
                    }
                }
                const Pool& p = pools[pool];
                at = p.data + slots[token] * p.slot_pitch + piece * p.piece_pitch;
                left = p.piece_bytes;
            }
            __builtin_prefetch(at, 0, 2);
            at += LINE;
            left -= LINE;
        }
    }
};

}  // namespace
}  // namespace forktree::FORKTREE_ISA
