// Tree attention on a GPU: blocks take units of work in turn, one item for one KV head each.
//
// The item's segments are one stream of tokens, read in tiles of COLUMNS tokens through rings of shared memory that
// asynchronous copies fill; a tile may span many short segments. Packed rows (a plan row for a query head of the group)
// are taken ROWS at a time. Few rows: warps share the tokens of a tile and merge their sums at the end; many: each warp
// has 16 rows and all tokens.
#pragma once

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/tree_attention_gpu.hpp"
#include "gpu/gpu.cuh"

#if defined(FORKTREE_EMULATE_CUDA)
#define FORKTREE_BOUNDS(threads, blocks)
#else
#define FORKTREE_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#endif

namespace forktree {
namespace attention {

constexpr float INF = __builtin_inff(), LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
constexpr int ROWS = 64;            // packed rows done together
constexpr int SEGMENT_BATCH = 128;  // segments looked at together, one a thread
constexpr int WARPS = ATTENTION_THREADS / 32;

// A token of a tile.
struct alignas(16) Column {
    int32_t rows;  // plan rows it concerns, within those done together: from `rows & 0xffff` to `rows >> 16`
    int32_t node, offset, pos;
};

// A plan row.
struct alignas(16) Query {
    int32_t tip, tail, last, mask;
    int32_t pos, row, token;
};

// A segment, as the tokens [begin, end) of the stream; the first is at `start` of the node.
struct alignas(16) Run {
    int32_t rows, node;
    int32_t shift;   // offset in the node less place in the stream
    int32_t pos;     // of the node
    int32_t source;  // slot of offset 0 if contiguous, else index of it in slot_index
    int32_t contiguous;
};

// How much of its part of a tile the rows of one warp see.
enum class Visibility { none, some, all };

template <int D>
struct alignas(128) Shared {
    static constexpr int COLUMNS = D == 256 ? 32 : 64;
    static constexpr int STAGES = D == 64 ? 3 : 2;
    static constexpr int RING = STAGES + 2;    // tiles known: computed on, on their way, and one being looked up
    static constexpr bool KEEPS_Q = D == 256;  // too many registers otherwise
    static constexpr int SUM_STRIDE = D + 8;   // floats; no two rows of a fragment in the same banks

    uint16_t k[STAGES][COLUMNS * D], v[STAGES][COLUMNS * D];
    uint16_t q[KEEPS_Q ? ROWS * D : 8];
    Column column[RING][COLUMNS];
    int32_t slot[RING][COLUMNS];
    int32_t count[RING];   // tokens in the tile; 0: there are no more
    int32_t single[RING];  // all of one segment
    Query query[ROWS];
    Run run[SEGMENT_BATCH];
    int32_t run_end[SEGMENT_BATCH];
    float top[ROWS], mass[ROWS];
    int32_t done[ATTENTION_THREADS];  // tokens whose last partial was written here
    int32_t warp_sum[WARPS];
    int32_t not_finite;             // a sum is not finite: all is done again, and
    int32_t sanitize_v;             // what is not finite in V is kept from rows that do not see it
    int32_t not_finite_v[COLUMNS];  // tokens of this tile with such a V
    PlanView plan;                  // not in registers, which are short

    // Sums of the warps, where K and V were.
    FORKTREE_DEVICE float* sums() { return reinterpret_cast<float*>(k); }
};

template <class T, int D, bool BIASED>
class Block {
    using S = Shared<D>;
    static constexpr int COLUMNS = S::COLUMNS, STAGES = S::STAGES, RING = S::RING, CHUNKS = D / 8;
    static_assert(ROWS * S::SUM_STRIDE * 4 <= sizeof(S::k) + sizeof(S::v) + sizeof(S::q),
                  "sums fit where K, V, Q were");

    const GpuAttention& call;
    S& shared;
    const PlanView& plan;
    const int thread = gpu::thread(), lane = gpu::lane(), warp = gpu::warp();

    // The unit.
    Item item;
    int kv_head;
    int first_packed, packed;  // rows done together: first of the item's packed rows, how many
    int first_row, rows;       // the same in plan rows

    // The stream.
    int next_seg, position, total;  // next segment to look at; place within the runs in shared memory, and their end
    int run, run_stop;              // run the last tile ended in, and where that ends

public:
    FORKTREE_DEVICE Block(const GpuAttention& call)
        : call(call), shared(*reinterpret_cast<S*>(gpu::shared_memory())), plan(shared.plan) {}

    FORKTREE_DEVICE void work() {
        if (thread == 0) shared.plan = plan_view(call.plan_buffer);
        gpu::sync_block();
        clear();
        const int heads = call.pool.num_kv_heads, units = plan.header->num_items * heads;
        for (int unit = gpu::block(); unit < units; unit += gpu::blocks()) {
            item = plan.item[unit / heads];
            kv_head = unit % heads;
            const int all = (item.row_end - item.row_begin) * call.group;
            for (first_packed = 0; first_packed < all; first_packed += ROWS) {
                packed = min(all - first_packed, ROWS);
                attend_rows();
            }
            if (item.partial >= 0) merge_what_is_complete();
        }
    }

private:
    static FORKTREE_DEVICE int min(int a, int b) { return a < b ? a : b; }
    static FORKTREE_DEVICE int max(int a, int b) { return a > b ? a : b; }
    static FORKTREE_DEVICE float larger(float a, float b) { return fmaxf(a, b); }  // the other one if one is NaN

    // ------------------------------------------------------------------ outputs

    // Tokens nobody writes: those the plan names, and those beyond it.
    FORKTREE_DEVICE void clear() {
        const int beyond = int(call.num_tokens) - plan.header->num_tokens, heads = call.num_qo_heads;
        const int64_t all = (int64_t(plan.header->num_empty_tokens) + beyond) * heads;
        for (int64_t i = gpu::block() * WARPS + warp; i < all; i += gpu::blocks() * WARPS) {
            const int index = int(i / heads), head = int(i % heads);
            const int token = index < beyond ? plan.header->num_tokens + index : plan.empty_tokens[index - beyond];
            const float nothing[4] = {};
            for (int d = 4 * lane; d < D; d += 128) write(output(token, head) + d, nothing);
            if (lane == 0) call.lse[int64_t(token) * heads + head] = call.sinks ? call.sinks[head] : -INF;
        }
    }

    FORKTREE_DEVICE T* output(int token, int head) {
        return static_cast<T*>(call.out) + (int64_t(token) * call.num_qo_heads + head) * D;
    }

    static FORKTREE_DEVICE void write(T* to, const float (&x)[4]) {
        const uint64_t low = gpu::pack(x[0], x[1], T{}), high = gpu::pack(x[2], x[3], T{});
        *reinterpret_cast<uint64_t*>(to) = high << 32 | low;
    }

    // Output d to d + 4 of a token from sums relative to 2 ** top.
    FORKTREE_DEVICE void finish(int token, int head, float top, float mass, int d, float (&sum)[4]) {
        float factor = 1;
        if (call.sinks) {
            const float sink = call.sinks[head] * LOG2E, all = larger(top, sink);
            if (all != -INF) {
                factor = top == -INF ? 0.f : gpu::exp2(top - all);
                mass = mass * factor + gpu::exp2(sink - all);
                top = all;
            }
        }
        const float scale = mass == 0 ? 0.f : factor * gpu::reciprocal(mass);
        for (float& x : sum) x *= scale;
        write(output(token, head) + d, sum);
        if (d == 0)
            call.lse[int64_t(token) * call.num_qo_heads + head] = mass == 0 ? -INF : (top + gpu::log2(mass)) * LN2;
    }

    // This item has written partials for all its rows: whoever brings a token's last one merges them.
    FORKTREE_DEVICE void merge_what_is_complete() {
        for (int begin = item.row_begin; begin < item.row_end; begin += ATTENTION_THREADS) {
            gpu::sync_block();
            int token = -1;
            if (begin + thread < item.row_end) {
                token = plan.row[begin + thread].token;
                const int partials = plan.merge_indptr[token + 1] - plan.merge_indptr[token];
                int* counter = call.counters + int64_t(token) * call.pool.num_kv_heads + kv_head;
                gpu::fence();
                if (gpu::atomic_add(counter, 1) == partials - 1) {
                    *counter = 0;  // for the next launch
                    gpu::fence();
                } else {
                    token = -1;
                }
            }
            shared.done[thread] = token;
            gpu::sync_block();
            const int all = min(item.row_end - begin, ATTENTION_THREADS) * call.group;
            for (int i = warp; i < all; i += WARPS)
                if (shared.done[i / call.group] >= 0)
                    merge(shared.done[i / call.group], kv_head * call.group + i % call.group);
        }
    }

    // By one warp, in the order of the list. Other blocks wrote the partials: loads pass by the first cache.
    FORKTREE_DEVICE void merge(int token, int head) {
        const int begin = plan.merge_indptr[token], end = plan.merge_indptr[token + 1];
        const auto state = [&](int i) { return int64_t(plan.merge_partial[i]) * call.num_qo_heads + head; };
        float top = -INF, mass = 0;
        for (int i = begin + lane; i < end; i += 32) top = larger(top, gpu::load_cg(call.partial_top + state(i)));
        for (int other = 16; other; other /= 2) top = larger(top, gpu::shuffle_xor(top, other));
        const auto weight = [&](int64_t at) {
            const float own = gpu::load_cg(call.partial_top + at);
            return own == -INF ? 0.f : gpu::exp2(own - top);
        };
        for (int i = begin + lane; i < end; i += 32)
            mass += gpu::load_cg(call.partial_mass + state(i)) * weight(state(i));
        for (int other = 16; other; other /= 2) mass += gpu::shuffle_xor(mass, other);
        for (int d = 4 * lane; d < D; d += 128) {
            float sum[4] = {};
            for (int i = begin; i < end; ++i) {
                const float w = weight(state(i));
                float x[4];
                const gpu::Chunk chunk =
                    gpu::load_cg(reinterpret_cast<const gpu::Chunk*>(call.partial_out + state(i) * D + d));
                memcpy(x, &chunk, sizeof x);
                for (int j = 0; j < 4; ++j) sum[j] += w * x[j];
            }
            finish(token, head, top, mass, d, sum);
        }
    }

    // ------------------------------------------------------------------ the stream of tokens

    // Looks at the next segments. By the whole block.
    FORKTREE_DEVICE void load_runs() {
        gpu::sync_block();
        Seg seg{};
        int low = 0, high = 0, length = 0;
        if (next_seg + thread < item.seg_end) {
            seg = plan.seg[next_seg + thread];
            low = max(seg.row_lo - first_row, 0);
            high = min(seg.row_hi - first_row, rows);
            if (low < high) {
                length = max(min(seg.stop, plan.node_len[seg.node]) - seg.start, 0);
            } else {
                low = high = 0;  // of other rows than those done together
            }
        }
        int end = length;
        for (int d = 1; d < 32; d *= 2) {
            const int before = gpu::shuffle(end, (lane - d) & 31);
            if (lane >= d) end += before;
        }
        if (lane == 31) shared.warp_sum[warp] = end;
        gpu::sync_block();
        total = 0;
        for (int w = 0; w < WARPS; ++w) {
            if (w < warp) end += shared.warp_sum[w];
            total += shared.warp_sum[w];
        }
        int source = seg.index_begin;
        if (seg.contiguous && length) source = call.slot_index[seg.index_begin + seg.start] - seg.start;
        shared.run[thread] = {low | high << 16, seg.node, seg.start - (end - length), seg.pos, source, seg.contiguous};
        shared.run_end[thread] = end;
        gpu::sync_block();
        next_seg = min(next_seg + SEGMENT_BATCH, item.seg_end);
        position = run_stop = 0;
    }

    // Run that holds place x.
    FORKTREE_DEVICE int find_run(int x) const {
        int found = 0;
        for (int step = SEGMENT_BATCH / 2; step; step /= 2)
            if (shared.run_end[found + step - 1] <= x) found += step;
        return found;
    }

    // Notes the next COLUMNS tokens of the stream in a place of the ring. Returns the slot of the thread's own: it may
    // still be on its way from memory. By the whole block.
    FORKTREE_DEVICE int look_up(int place) {
        while (position == total && next_seg < item.seg_end) load_runs();
        const int count = min(COLUMNS, total - position);
        int single = 1, mine = run;
        if (position + count > run_stop) {
            run = find_run(max(position + count - 1, 0));
            run_stop = shared.run_end[run];
            single = (run ? shared.run_end[run - 1] : 0) <= position;
            mine = single || thread >= count ? run : find_run(position + thread);
        }
        int slot = 0;
        if (thread < COLUMNS) {
            const Run found = shared.run[mine];
            const int offset = position + thread + found.shift;
            shared.column[place][thread] = {thread < count ? found.rows : 0, found.node, offset, found.pos + offset};
            if (thread < count)
                slot = found.contiguous ? found.source + offset : call.slot_index[found.source + offset];
        }
        if (thread == 0) {
            shared.count[place] = count;
            shared.single[place] = single;
        }
        position += count;
        return slot;
    }

    FORKTREE_DEVICE void keep_slot(int place, int slot) {
        if (thread < COLUMNS) shared.slot[place][thread] = slot;
    }

    // ------------------------------------------------------------------ tiles in shared memory

    // Chunks of 8 elements of a row lie such that ldmatrix finds 8 rows in different banks: their low bits are those of
    // the row too. As rows and tiles begin at multiples of 1 + SWIZZLE chunks, other chunks of a row are one exclusive
    // or away, see `step`.
    static constexpr int SWIZZLE = D % 64 == 0 ? 7 : 3;

    static FORKTREE_DEVICE uint16_t* chunk_of(uint16_t* tile, int row, int chunk) {
        return tile + row * D + 8 * (chunk ^ (SWIZZLE == 7 ? row & 7 : row >> 1 & 3));
    }
    static FORKTREE_DEVICE const uint16_t* chunk_of(const uint16_t* tile, int row, int chunk) {
        return chunk_of(const_cast<uint16_t*>(tile), row, chunk);
    }

    // From chunk 0 or 1 of a row to that `chunks` (even) further on.
    static FORKTREE_DEVICE const uint16_t* step(const uint16_t* from, int chunks) {
        const uintptr_t at = reinterpret_cast<uintptr_t>(from) ^ (chunks & SWIZZLE) * 16;
        return reinterpret_cast<const uint16_t*>(at) + (chunks & ~SWIZZLE) * 8;
    }

    // Starts copying a tile of K or V. What is beyond the stream becomes 0: weights are 0 there, but 0 * NaN is NaN.
    FORKTREE_DEVICE void fetch(uint16_t* tile, const void* pool, int64_t slot_stride, int64_t head_stride, int place) {
        constexpr int AT_ONCE =
            D == 96 ? 8 : ATTENTION_THREADS / CHUNKS;  // rows; with 96 a quarter of the threads rest
        const int chunk = thread % CHUNKS, first = thread / CHUNKS, count = shared.count[place];
        if (count == 0 || first >= AT_ONCE) return;
        const T* const from = static_cast<const T*>(pool) + kv_head * head_stride + 8 * chunk;
#pragma unroll
        for (int i = 0; i < COLUMNS / AT_ONCE; ++i) {
            const int row = first + AT_ONCE * i;
            const bool valid = row < count;
            gpu::copy16(chunk_of(tile, row, chunk), from + (valid ? shared.slot[place][row] * slot_stride : 0), valid);
        }
    }

    // Makes 0 of what is not finite, and notes where that was: weights are 0 for rows that do not see it, but 0 * NaN
    // is NaN. By the whole block.
    FORKTREE_DEVICE void clean(uint16_t* tile) {
        if (thread < COLUMNS) shared.not_finite_v[thread] = 0;
        gpu::sync_block();
        constexpr uint16_t exponent = std::is_same_v<T, Bf16> ? 0x7f80 : 0x7c00;
        for (int i = thread; i < COLUMNS * D; i += ATTENTION_THREADS)
            if ((tile[i] & exponent) == exponent) {
                tile[i] = 0;
                shared.not_finite_v[i / D] = 1;
            }
        gpu::sync_block();
    }

    // Rows beyond the last are those of another: their sums are not used.
    FORKTREE_DEVICE const T* query(int m) const {
        const int at = first_packed + min(m, packed - 1);
        return static_cast<const T*>(call.q) +
               shared.query[at / call.group - first_row + item.row_begin].row * call.q_row_stride +
               (kv_head * call.group + at % call.group) * call.q_head_stride;
    }

    FORKTREE_DEVICE void fetch_queries() {
        for (int i = thread; i < ROWS * CHUNKS; i += ATTENTION_THREADS)
            gpu::copy16(chunk_of(shared.q, i / CHUNKS, i % CHUNKS), query(i / CHUNKS) + 8 * (i % CHUNKS), true);
    }

    // ------------------------------------------------------------------ rows done together

    FORKTREE_DEVICE void load_rows() {
        gpu::sync_block();
        first_row = item.row_begin + first_packed / call.group;
        rows = item.row_begin + (first_packed + packed - 1) / call.group + 1 - first_row;
        if (thread < rows) {
            const Row row = plan.row[first_row + thread];
            shared.query[thread] = {row.tip, row.tail, row.last, row.mask, plan.row_pos[row.row], row.row, row.token};
        }
        if (thread == 0) shared.not_finite = shared.sanitize_v = 0;
        gpu::sync_block();
    }

    FORKTREE_DEVICE void attend_rows() {
        load_rows();
        for (;;) {
            attend_warps();
            if (!shared.not_finite || shared.sanitize_v) break;
            gpu::sync_block();
            shared.sanitize_v = 1;
        }
        write_rows(packed <= 16 && COLUMNS == 64 ? 4 : packed <= 32 ? 2 : 1);
    }

    FORKTREE_DEVICE void attend_warps() {
        next_seg = item.seg_begin;
        position = total = run = run_stop = 0;
        if (COLUMNS == 64 && packed <= 16) {
            Warp<COLUMNS == 64 ? 1 : 2>(*this).attend();
        } else if (packed <= 32) {
            Warp<2>(*this).attend();
        } else {
            Warp<4>(*this).attend();
        }
    }

    // Sums of `parts` warps for each row, merged. By the whole block.
    FORKTREE_DEVICE void write_rows(int parts) {
        const int stride = ROWS / parts;
        for (int m = warp; m < packed; m += WARPS) {
            float top = -INF, mass = 0;
            for (int p = 0; p < parts; ++p) top = larger(top, shared.top[p * stride + m]);
            float weight[4];
#pragma unroll
            for (int p = 0; p < 4; ++p) {
                const bool some = p < parts && shared.top[p * stride + m] != -INF;
                weight[p] = some ? gpu::exp2(shared.top[p * stride + m] - top) : 0.f;
                if (some) mass += weight[p] * shared.mass[p * stride + m];
            }
            const int at = first_packed + m, row = item.row_begin + at / call.group;
            const int head = kv_head * call.group + at % call.group;
            for (int d = 4 * lane; d < D; d += 128) {
                float sum[4] = {};
#pragma unroll
                for (int p = 0; p < 4; ++p) {
                    if (p == parts) break;
                    const float* x = shared.sums() + (p * stride + m) * S::SUM_STRIDE + d;
                    for (int j = 0; j < 4; ++j) sum[j] += weight[p] * x[j];
                }
                if (item.partial < 0) {
                    finish(shared.query[row - first_row].token, head, top, mass, d, sum);
                } else {
                    write_partial(int64_t(item.partial + row - item.row_begin) * call.num_qo_heads + head, top, mass, d,
                                  sum);
                }
            }
        }
    }

    FORKTREE_DEVICE void write_partial(int64_t at, float top, float mass, int d, const float (&sum)[4]) {
        gpu::Chunk chunk;
        memcpy(&chunk, sum, sizeof chunk);
        gpu::store16(call.partial_out + at * D + d, chunk);
        if (d != 0) return;
        call.partial_top[at] = top;
        call.partial_mass[at] = mass;
    }

    // ------------------------------------------------------------------ one warp

    // The warp's 16 rows and its columns of each tile. A thread holds, as mma does, elements 2t and 2t + 1 of every 8
    // of rows g and g + 8, where g = lane / 4 and t = lane % 4.
    template <int WARPS_M>
    class Warp {
        static constexpr int WARPS_N = WARPS / WARPS_M, WIDTH = COLUMNS / WARPS_N;

        Block& block;
        const GpuAttention& call;
        S& shared;
        const int lane = gpu::lane(), first_m = gpu::warp() % WARPS_M * 16,
                  first_column = gpu::warp() / WARPS_M * WIDTH;
        int row[2];              // of the thread's packed rows, within those done together; -1: none
        int row_begin, row_end;  // of all the warp's
        const int window;
        float slope[2];
        uint32_t q[S::KEEPS_Q ? 1 : D / 16][4];
        float sum[D / 8][4];
        float top[2] = {-INF, -INF}, mass[2] = {};  // of raw scores, or base 2 if biased; mass of this thread's columns

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

        // A pipeline: while tile i is computed, the next ones are on their way. Each half step waits for the oldest
        // copy, K or V, and starts another where the last half step has read.
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
                    block.clean(shared.v[i % STAGES]);
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

        // ---------------------------------------------------------------- who sees what

        // Whether row i of the thread sees all of a stretch of one segment.
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
            uint32_t seen = 0;  // first what is seen and then scores, as unrolled this is a lot of code
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

        // Scores in base 2, of all that is not just a positive scale.
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

        // Scores become weights, relative to a new maximum; the sums follow.
        FORKTREE_DEVICE void softmax_step(float (&s)[WIDTH / 8][4]) {
            const float unit = BIASED ? 1.f : call.scale * LOG2E;
            float factor[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float most = top[i];
#pragma unroll
                for (int n = 0; n < WIDTH / 8; ++n) most = larger(s[n][2 * i], larger(s[n][2 * i + 1], most));
                most = larger(gpu::shuffle_xor(most, 1), most);
                most = larger(gpu::shuffle_xor(most, 2), most);
                const float base = most == -INF ? 0.f : most * unit;  // -inf - -inf would be NaN
                factor[i] = gpu::exp2(top[i] * unit - base);
                top[i] = most;
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
            for (int i = 0; i < 4; ++i)
                a[i] = gpu::pack(s[2 * k + i / 2][i % 2 * 2], s[2 * k + i / 2][i % 2 * 2 + 1], T{});
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

        // Rows that attend to a token with non-finite V become NaN. V is 0 there by now.
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
};

template <class T, int D, bool BIASED>
FORKTREE_KERNEL void FORKTREE_BOUNDS(ATTENTION_THREADS, 2) kernel(const GpuAttention call) {
    Block<T, D, BIASED>(call).work();
}

}  // namespace attention

template <class T, int D>
void launch_attention(const GpuAttention& call, void* stream) {
    const bool biased = call.biased();
    const auto kernel = biased ? attention::kernel<T, D, true> : attention::kernel<T, D, false>;
    constexpr int BYTES = sizeof(attention::Shared<D>), DEVICES = 64;
    static std::atomic<int> known[2][DEVICES];  // resident blocks: asking takes longer than launching
    std::atomic<int>& blocks = known[biased][call.device % DEVICES];
    if (!blocks) blocks = gpu::resident_blocks(kernel, ATTENTION_THREADS, BYTES);
    gpu::launch(kernel, blocks.load(), ATTENTION_THREADS, BYTES, stream, call);
}

}  // namespace forktree
