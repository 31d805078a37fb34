// What the threads of a block share: the tiles in flight, their tokens, and the rows that attend to them.
#pragma once

#include <cstdint>

#include "cuda/tree_attention/tree_attention.hpp"
#include "gpu/gpu.cuh"

namespace forktree {
namespace attention {

constexpr float INF = __builtin_inff(), LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
constexpr int ROWS = 64;            // packed rows of a row tile
constexpr int SEGMENT_BATCH = 128;  // segments that are looked up together, one a thread
constexpr int WARPS = ATTENTION_THREADS / 32;

// A token of a tile, a column of its scores.
struct alignas(16) Column {
    int32_t rows;  // rows of the row tile it concerns: from `rows & 0xffff` to `rows >> 16`
    int32_t node, offset, pos;
};

// A plan row of the row tile.
struct alignas(16) Query {
    int32_t tip, tail, last, mask;
    int32_t pos, row, token;
};

// A segment as a run of tokens in the stream.
struct alignas(16) Run {
    int32_t rows, node;
    int32_t shift;   // offset in the node minus position in the stream
    int32_t pos;     // of the node
    int32_t source;  // slot of offset 0 if contiguous, else its index in slot_index
    int32_t contiguous;
};

// How much of its columns of a tile the rows of a warp see.
enum class Visibility { none, some, all };

template <int D>
struct alignas(128) Shared {
    static constexpr int COLUMNS = D == 256 ? 32 : 64;
    static constexpr int STAGES = D == 64 ? 3 : 2;
    static constexpr int RING = STAGES + 2;    // tiles with known tokens: the current one, in flight, being looked up
    static constexpr bool KEEPS_Q = D == 256;  // in shared memory: registers do not suffice
    static constexpr int SUM_STRIDE = D + 8;   // in floats, so that no two rows of a fragment share banks

    uint16_t k[STAGES][COLUMNS * D], v[STAGES][COLUMNS * D];
    uint16_t q[KEEPS_Q ? ROWS * D : 8];
    Column column[RING][COLUMNS];
    int32_t slot[RING][COLUMNS];
    int32_t count[RING];   // tokens in the tile; 0 after the last
    int32_t single[RING];  // whether all are of one segment
    Query query[ROWS];
    Run run[SEGMENT_BATCH];
    int32_t run_end[SEGMENT_BATCH];
    float top[ROWS], mass[ROWS];
    int32_t done[ATTENTION_THREADS];  // tokens whose last partial this block has written, else -1
    int32_t warp_sum[WARPS];
    int32_t not_finite;             // whether a sum is not finite, so that all is computed again
    int32_t sanitize_v;             // whether NaN and inf in V are kept from rows that do not see them
    int32_t not_finite_v[COLUMNS];  // whether V of a token of this tile is not finite
    PlanView plan;                  // registers are scarce

    // The sums of the warps take the place of K, V and Q.
    FORKTREE_DEVICE float* sums() { return reinterpret_cast<float*>(k); }
};

}  // namespace attention
}  // namespace forktree
