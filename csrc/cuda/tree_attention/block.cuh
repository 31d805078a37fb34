// Tree attention on a GPU: the blocks take units of work in turn, a unit being an item for one KV head.
//
// The item's segments form one stream of tokens, which is read in tiles of COLUMNS tokens through rings of shared
// memory that asynchronous copies fill; a tile may span many short segments. Packed rows, a plan row and a query head
// of the group each, are taken a row tile of ROWS at a time. If it has few rows, warps share the tokens of a tile and
// their sums are merged at the end; if it has many, each warp has 16 rows and all tokens (`Warp`).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/tree_attention/shared.cuh"

namespace forktree {
namespace attention {

template <class T, int D, bool BIASED>
class Block {
    template <int WARPS_M>
    class Warp;

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
    int first_packed, packed;  // the row tile: first of the item's packed rows, and how many
    int first_row, rows;       // the same in plan rows

    // The stream.
    int next_seg, position, total;  // next segment to load; position within the runs in shared memory, and their end
    int run, run_stop;              // run that the last tile ended in, and where that ends

public:
    FORKTREE_DEVICE Block(const GpuAttention& call)
        : call(call), shared(*reinterpret_cast<S*>(gpu::shared_memory())), plan(shared.plan) {}

    FORKTREE_DEVICE void work() {
        if (thread == 0) shared.plan = plan_view(call.plan_buffer);
        gpu::sync_block();
        write_empty();
        const int heads = call.pool.num_kv_heads, units = plan.header->num_items * heads;
        for (int unit = gpu::block(); unit < units; unit += gpu::blocks()) {
            item = plan.item[unit / heads];
            kv_head = unit % heads;
            const int all = (item.row_end - item.row_begin) * call.group;
            for (first_packed = 0; first_packed < all; first_packed += ROWS) {
                packed = min(all - first_packed, ROWS);
                attend_rows();
            }
            if (item.partial >= 0) merge_complete();
        }
    }

private:
    static FORKTREE_DEVICE int min(int a, int b) { return a < b ? a : b; }
    static FORKTREE_DEVICE int max(int a, int b) { return a > b ? a : b; }
    static FORKTREE_DEVICE float larger(float a, float b) { return fmaxf(a, b); }  // the other one if one is NaN

    // ------------------------------------------------------------------ outputs

    // Writes the tokens that see nothing: those the plan lists, and those beyond the plan's.
    FORKTREE_DEVICE void write_empty() {
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

    // Writes elements d to d + 4 of a token's output from sums relative to 2 ** top, and its log-sum-exp.
    FORKTREE_DEVICE void write_output(int token, int head, float top, float mass, int d, float (&sum)[4]) {
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

    // Counts the item's partials of one KV head as written, and merges the tokens whose partials are complete.
    FORKTREE_DEVICE void merge_complete() {
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

    // Merges the partials of a token in the order of its list. By one warp. Other blocks have written some of them, so
    // loads bypass the first-level cache.
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
            write_output(token, head, top, mass, d, sum);
        }
    }

    // ------------------------------------------------------------------ the stream of tokens

    // Loads the next segments. By the whole block.
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
                low = high = 0;  // of no row of the row tile
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

    // Returns the run that holds position x.
    FORKTREE_DEVICE int find_run(int x) const {
        int found = 0;
        for (int step = SEGMENT_BATCH / 2; step; step /= 2)
            if (shared.run_end[found + step - 1] <= x) found += step;
        return found;
    }

    // Writes the next COLUMNS tokens of the stream to a place of the ring. Returns the slot of the thread's token,
    // which may still be on its way from memory; `keep_slot` stores it later. By the whole block.
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

    // The chunks of 8 elements of a row are permuted by the row's low bits, so that ldmatrix finds 8 rows in different
    // banks. Rows and tiles begin at multiples of 1 + SWIZZLE chunks, so one exclusive or leads from a chunk to
    // another, see `step`.
    static constexpr int SWIZZLE = D % 64 == 0 ? 7 : 3;

    static FORKTREE_DEVICE uint16_t* chunk_of(uint16_t* tile, int row, int chunk) {
        return tile + row * D + 8 * (chunk ^ (SWIZZLE == 7 ? row & 7 : row >> 1 & 3));
    }
    static FORKTREE_DEVICE const uint16_t* chunk_of(const uint16_t* tile, int row, int chunk) {
        return chunk_of(const_cast<uint16_t*>(tile), row, chunk);
    }

    // Returns where the chunk is that comes `chunks`, an even number, after chunk 0 or 1 of a row.
    static FORKTREE_DEVICE const uint16_t* step(const uint16_t* from, int chunks) {
        const uintptr_t at = reinterpret_cast<uintptr_t>(from) ^ (chunks & SWIZZLE) * 16;
        return reinterpret_cast<const uint16_t*>(at) + (chunks & ~SWIZZLE) * 8;
    }

    // Starts copying a tile of K or V. What lies beyond the stream becomes 0: weights are 0 there, but 0 * NaN is NaN.
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

    // Sets to 0 what is not finite in a tile of V, and notes at which tokens: weights are 0 for rows that do not see
    // them, but 0 * NaN is NaN. By the whole block.
    FORKTREE_DEVICE void sanitize(uint16_t* tile) {
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

    // Returns the query of a packed row. Rows beyond the last one get its query; their sums are not used.
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

    // ------------------------------------------------------------------ row tiles

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

    // Merges the sums that `parts` warps have of each row, and writes outputs or partials. By the whole block.
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
                    write_output(shared.query[row - first_row].token, head, top, mass, d, sum);
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
};

}  // namespace attention
}  // namespace forktree
