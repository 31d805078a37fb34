// What one warp computes of a row tile: scores, softmax and sums over its columns of every tile.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/tree_attention/block.cuh"

namespace forktree {
namespace attention {

// A warp takes 16 packed rows and some columns of each tile. As mma wants it, a thread holds elements 2t and 2t + 1 of
// every 8 of rows g and g + 8, where g = lane / 4 and t = lane % 4.
template <class T, int D, bool BIASED>
template <int WARPS_M>
class Block<T, D, BIASED>::Warp {
    static constexpr int WARPS_N = WARPS / WARPS_M, WIDTH = COLUMNS / WARPS_N;

    Block& block;
    const GpuAttention& call;
    S& shared;
    const int lane = gpu::lane(), first_m = gpu::warp() % WARPS_M * 16, first_column = gpu::warp() / WARPS_M * WIDTH;
    int row[2];              // of the thread's packed rows, in the row tile; -1 if there is none
    int row_begin, row_end;  // of all rows of the warp
    const int window;
    float slope[2];
    uint32_t q[S::KEEPS_Q ? 1 : D / 16][4];
    float sum[D / 8][4];
    float top[2] = {-INF, -INF}, mass[2] = {};  // top of raw scores, or base 2 if biased; mass of this thread's columns

public:
    FORKTREE_DEVICE explicit Warp(Block& block)
        : block(block), call(block.call), shared(block.shared), window(block.plan.header->window) {
        const int begin = block.first_packed, group = call.group, before = block.first_row - block.item.row_begin;
        row_begin = row_end = 0;
        if (first_m < block.packed) {
            row_begin = (begin + first_m) / group - before;
            row_end = (begin + min(first_m + 16, block.packed) - 1) / group - before + 1;
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int m = first_m + lane / 4 + 8 * i;
            row[i] = m < block.packed ? (begin + m) / group - before : -1;
            slope[i] = 0;
            if (BIASED && call.alibi_slopes && row[i] >= 0)
                slope[i] = call.alibi_slopes[block.kv_head * group + (begin + m) % group] * LOG2E;
        }
#pragma unroll
        for (auto& tile : sum)
            for (float& x : tile) x = 0;
    }

    // Runs the pipeline: while tile i is computed, the next ones are in flight. Each half step waits for the oldest
    // copy, K or V, and starts another into the place that the last half step has read.
    FORKTREE_DEVICE void attend() {
        load_queries();
        for (int i = -STAGES - 1;; ++i) {
            gpu::wait<2 * STAGES - 2>();
            gpu::sync_block();
            const int place = i >= 0 ? i % RING : 0;
            if (i >= 0 && shared.count[place] == 0) break;
            if (i + STAGES - 1 >= 0)
                block.fetch(shared.v[(i + STAGES - 1) % STAGES], call.pool.v, call.pool.v_slot_stride,
                            call.pool.v_head_stride, (i + STAGES - 1) % RING);
            gpu::commit();
            const int coming = (i + STAGES + 1) % RING, slot = block.look_up(coming);
            float s[WIDTH / 8][4];
            const Visibility visibility = i >= 0 ? visibility_of(place) : Visibility::none;
            if (visibility != Visibility::none) {
                score(shared.k[i % STAGES], s);
                if (BIASED) bias(place, s);
                if (visibility == Visibility::some) apply_mask(place, s);
                softmax_step(s);
            }
            gpu::wait<2 * STAGES - 2>();
            gpu::sync_block();
            if (i + STAGES >= 0)
                block.fetch(shared.k[(i + STAGES) % STAGES], call.pool.k, call.pool.k_slot_stride,
                            call.pool.k_head_stride, (i + STAGES) % RING);
            gpu::commit();
            if (i >= 0 && shared.sanitize_v) {
                block.sanitize(shared.v[i % STAGES]);
                if (visibility != Visibility::none) poison(s);
            }
            if (visibility != Visibility::none) add(shared.v[i % STAGES], s);
            block.keep_slot(coming, slot);
        }
        gpu::wait<0>();
        gpu::sync_block();
        store_state();
        gpu::sync_block();
    }

private:
    FORKTREE_DEVICE void load_queries() {
        if constexpr (S::KEEPS_Q) {
            block.fetch_queries();  // committed with the first tile
        } else {
            const T* const from[2] = {block.query(first_m + lane / 4) + lane % 4 * 2,
                                      block.query(first_m + lane / 4 + 8) + lane % 4 * 2};
#pragma unroll
            for (int k = 0; k < D / 16; ++k)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    q[k][i] = *reinterpret_cast<const uint32_t*>(from[i % 2] + 16 * k + i / 2 * 8);
        }
    }

    // ---------------------------------------------------------------- visibility

    // Returns whether row i of the thread sees all tokens between two of the same segment.
    FORKTREE_DEVICE bool sees_all(int i, const Column& from, const Column& to) const {
        if (row[i] < 0) return true;
        const Query& query = shared.query[row[i]];
        return concerns(from, row[i]) && in_window(from.pos, query) && in_window(to.pos, query) &&
               (from.node != query.tip || to.offset < query.tail || (query.mask < 0 && to.offset <= query.last));
    }

    static FORKTREE_DEVICE bool concerns(const Column& c, int row) {
        return ((c.rows & 0xffff) <= row) & (row < c.rows >> 16);
    }

    FORKTREE_DEVICE bool in_window(int pos, const Query& query) const {
        return (window == 0) | ((pos <= query.pos) & (query.pos - window < pos));
    }

    FORKTREE_DEVICE bool sees(const Column& c, int row, const Query& query) const {
        const bool own = (c.node == query.tip) & (c.offset >= query.tail);
        bool seen = concerns(c, row) & in_window(c.pos, query) & (!own | (c.offset <= query.last));
        if (seen & own & (query.mask >= 0)) {
            const int bit = c.offset - query.tail;
            seen = block.plan.mask[query.mask + bit / 32] >> bit % 32 & 1;
        }
        return seen;
    }

    FORKTREE_DEVICE Visibility visibility_of(int place) const {
        const Column* const columns = shared.column[place] + first_column;
        bool some = false;
        for (int c = lane; c < WIDTH; c += 32)
            some |= (columns[c].rows & 0xffff) < row_end && row_begin < columns[c].rows >> 16;
        if (!gpu::ballot(some)) return Visibility::none;
        if (!shared.single[place] || shared.count[place] < COLUMNS) return Visibility::some;
        const Column &from = columns[0], &to = columns[WIDTH - 1];
        const bool all = sees_all(0, from, to) && sees_all(1, from, to);
        return gpu::ballot(!all) ? Visibility::some : Visibility::all;
    }

    FORKTREE_DEVICE void apply_mask(int place, float (&s)[WIDTH / 8][4]) const {
        const Query query[2] = {shared.query[max(row[0], 0)], shared.query[max(row[1], 0)]};
        const Column* const columns = shared.column[place] + first_column + lane % 4 * 2;
        uint32_t seen = 0;  // found in a loop of its own, which is not unrolled: it is a lot of code
#pragma unroll 1
        for (int n = 0; n < WIDTH / 8; ++n)
#pragma unroll
            for (int j = 0; j < 2; ++j)
#pragma unroll
                for (int i = 0; i < 2; ++i)
                    seen |= uint32_t(sees(columns[8 * n + j], row[i], query[i])) << (4 * n + 2 * i + j);
#pragma unroll
        for (int n = 0; n < WIDTH / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                if (!(seen >> (4 * n + e) & 1)) s[n][e] = -INF;
    }

    // ---------------------------------------------------------------- scores and sums

    FORKTREE_DEVICE void score(const uint16_t* tile, float (&s)[WIDTH / 8][4]) const {
        const uint16_t* const keys = chunk_of(tile, first_column + lane / 16 * 8 + lane % 8, lane / 8 % 2);
        const uint16_t* const queries = S::KEEPS_Q ? chunk_of(shared.q, first_m + lane % 16, lane / 16) : nullptr;
#pragma unroll
        for (auto& x : s) x[0] = x[1] = x[2] = x[3] = 0;
#pragma unroll
        for (int k = 0; k < D / 16; ++k) {
            uint32_t a[4];
            if constexpr (S::KEEPS_Q) {
                gpu::load_matrix(a, step(queries, 2 * k));
            } else {
                memcpy(a, q[k], sizeof a);
            }
#pragma unroll
            for (int n = 0; n < WIDTH / 16; ++n) {
                uint32_t b[4];
                gpu::load_matrix(b, step(keys, 2 * k) + 16 * n * D);
                gpu::mma(s[2 * n], a, b[0], b[1], T{});
                gpu::mma(s[2 * n + 1], a, b[2], b[3], T{});
            }
        }
    }

    // Applies scale, soft cap and ALiBi to the scores, in base 2. Where there is only a scale, `softmax_step` does it.
    FORKTREE_DEVICE void bias(int place, float (&s)[WIDTH / 8][4]) const {
        const float cap = call.softcap, inverse = gpu::reciprocal(cap);
        const int pos[2] = {shared.query[max(row[0], 0)].pos, shared.query[max(row[1], 0)].pos};
#pragma unroll
        for (int n = 0; n < WIDTH / 8; ++n)
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const int key = shared.column[place][first_column + 8 * n + lane % 4 * 2 + j].pos;
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float x = s[n][2 * i + j] * call.scale;
                    if (cap > 0) x = cap * gpu::tanh(x * inverse);
                    s[n][2 * i + j] = x * LOG2E + slope[i] * float(key - pos[i]);
                }
            }
    }

    // Turns scores into weights relative to the new maximum, and rescales the sums.
    FORKTREE_DEVICE void softmax_step(float (&s)[WIDTH / 8][4]) {
        const float unit = BIASED ? 1.f : call.scale * LOG2E;
        float factor[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float maximum = top[i];
#pragma unroll
            for (int n = 0; n < WIDTH / 8; ++n) maximum = larger(s[n][2 * i], larger(s[n][2 * i + 1], maximum));
            maximum = larger(gpu::shuffle_xor(maximum, 1), maximum);
            maximum = larger(gpu::shuffle_xor(maximum, 2), maximum);
            const float base = maximum == -INF ? 0.f : maximum * unit;  // -inf - -inf would be NaN
            factor[i] = gpu::exp2(top[i] * unit - base);
            top[i] = maximum;
            float added = 0;
#pragma unroll
            for (int n = 0; n < WIDTH / 8; ++n)
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    s[n][2 * i + j] = gpu::exp2(s[n][2 * i + j] * unit - base);
                    added += s[n][2 * i + j];
                }
            mass[i] = mass[i] * factor[i] + added;
        }
        if (!gpu::ballot(factor[0] != 1 || factor[1] != 1)) return;
#pragma unroll
        for (auto& x : sum) {
            x[0] *= factor[0], x[1] *= factor[0];
            x[2] *= factor[1], x[3] *= factor[1];
        }
    }

    FORKTREE_DEVICE void pack(const float (&s)[WIDTH / 8][4], int k, uint32_t (&a)[4]) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = gpu::pack(s[2 * k + i / 2][i % 2 * 2], s[2 * k + i / 2][i % 2 * 2 + 1], T{});
    }

    FORKTREE_DEVICE const uint16_t* values(const uint16_t* tile) const {
        return chunk_of(tile, first_column + lane % 16, lane / 16);
    }

    FORKTREE_DEVICE void add(const uint16_t* tile, const float (&s)[WIDTH / 8][4]) {
        const uint16_t* const v = values(tile);
#pragma unroll
        for (int k = 0; k < WIDTH / 16; ++k) {
            uint32_t a[4], b[4];
            pack(s, k, a);
#pragma unroll
            for (int d = 0; d < D / 16; ++d) {
                gpu::load_matrix_transposed(b, step(v, 2 * d) + 16 * k * D);
                gpu::mma(sum[2 * d], a, b[0], b[1], T{});
                gpu::mma(sum[2 * d + 1], a, b[2], b[3], T{});
            }
        }
    }

    // Sets rows to NaN that see a token whose V is not finite; V itself is already 0 there.
    FORKTREE_DEVICE void poison(const float (&s)[WIDTH / 8][4]) {
        bool bad[2] = {};
#pragma unroll
        for (int n = 0; n < WIDTH / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                bad[e / 2] |= s[n][e] != 0 && shared.not_finite_v[first_column + 8 * n + lane % 4 * 2 + e % 2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const bool all = gpu::ballot(bad[i]) >> (lane & ~3) & 15;
#pragma unroll
            for (auto& x : sum)
                if (all) x[2 * i] = x[2 * i + 1] = __builtin_nanf("");
        }
    }

    // Stores maximum, mass and sums in shared memory.
    FORKTREE_DEVICE void store_state() {
        const float unit = BIASED ? 1.f : call.scale * LOG2E;
        bool bad = false;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            mass[i] += gpu::shuffle_xor(mass[i], 1);
            mass[i] += gpu::shuffle_xor(mass[i], 2);
            const int m = gpu::warp() / WARPS_M * 16 * WARPS_M + first_m + lane / 4 + 8 * i;
            if (lane % 4 == 0) {
                shared.top[m] = top[i] * unit;
                shared.mass[m] = mass[i];
            }
#pragma unroll
            for (int d = 0; d < D / 8; ++d) {
                float* const to = shared.sums() + m * S::SUM_STRIDE + 8 * d + lane % 4 * 2;
                memcpy(to, &sum[d][2 * i], 8);
                bad |= !(sum[d][2 * i] - sum[d][2 * i] == 0) || !(sum[d][2 * i + 1] - sum[d][2 * i + 1] == 0);
            }
        }
        if (bad) shared.not_finite = 1;
    }
};

}  // namespace attention
}  // namespace forktree
