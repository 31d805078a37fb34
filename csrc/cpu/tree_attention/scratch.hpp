// The memory a task works in.
#pragma once

#include "cpu/tree_attention/tree_attention.hpp"
#include "simd/product.hpp"

namespace forktree::FORKTREE_ISA {
namespace {

constexpr int64_t SCORE_TILE = 128;  // tokens whose scores are held at a time
constexpr int64_t KV_TILE = 256;     // tokens whose K and V are prepared at a time, for all rows, at most
constexpr int64_t CACHED = 1 << 18;  // bytes of K and V of a KV tile, all heads of the task: a quarter of an L2 cache
constexpr float INF = __builtin_inff();

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Returns how many lanes a row of the transposed queries and outputs takes: an odd number of cache lines, so that the
// rows of a block of lanes do not all compete for the same sets of the cache, and enough for a block that begins at the
// last lane.
inline int64_t lane_stride(int64_t lanes) { return (round_up(lanes + BLOCK, 16) / 16 | 1) * 16; }

// The memory of a task, laid out from an address on.
template <class Element>
struct Scratch {
    typedef typename Element::Term Term;

    int64_t stride, size;  // lanes of a row; bytes in all
    Term* queries;         // [heads, key_terms, stride]
    float* outputs;        // [heads, Dv, stride]
    float* tops;           // [heads, stride] highest score so far, base 2; in fp32 rounded up to an integer
    float* masses;         // [heads, stride] sum of 2^(score - top)
    float* lost;           // [heads, stride] what rounding took from that sum
    Term* keys;            // [KV_TILE, key_terms]
    Term* values;          // [KV_TILE / TERMS, Dv]
    Term* values_row;      // [Dv]
    Term* block_q;         // [key_terms, BLOCK]
    float* scores;         // [SCORE_TILE, BLOCK]
    Term* weights;         // [SCORE_TILE / TERMS, BLOCK]
    int32_t* first;        // [BLOCK] a lane sees the offsets first .. last of the segment's node
    int32_t* last;         // [BLOCK]
    float* output;         // [Dv]

    Scratch(const Attention& call, int64_t rows, int64_t heads, uintptr_t address)
        : stride(lane_stride(rows * call.group)) {
        const int64_t key_terms = call.pool.k_dim / Element::TERMS, value_dim = call.pool.v_dim;
        const uintptr_t begin = address;
        const auto take = [&](auto*& pointer, int64_t count) {
            pointer = reinterpret_cast<decltype(pointer + 0)>(address);
            address += round_up(4 * count, 64);
        };
        take(queries, heads * key_terms * stride);
        take(outputs, heads * value_dim * stride);
        take(tops, heads * stride);
        take(masses, heads * stride);
        take(lost, heads * stride);
        take(keys, KV_TILE * key_terms);
        take(values, KV_TILE / Element::TERMS * value_dim);
        take(values_row, value_dim);
        take(block_q, key_terms * BLOCK);
        take(scores, SCORE_TILE * BLOCK);
        take(weights, SCORE_TILE / Element::TERMS * BLOCK);
        take(first, BLOCK);
        take(last, BLOCK);
        take(output, value_dim);
        size = int64_t(address - begin);
    }
};

}  // namespace
}  // namespace forktree::FORKTREE_ISA
