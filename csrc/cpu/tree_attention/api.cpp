#include <algorithm>
#include <atomic>
#include <new>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/memory.hpp"
#include "common/parallel.hpp"
#include "cpu/tree_attention/tree_attention.hpp"
#include "plan/validate.hpp"

namespace forktree {
namespace {

AttentionKernel kernel(const Attention& call){FORKTREE_RETURN_OF_ISA(attention_kernel(call))}

int64_t seg_tokens(const PlanView& plan, const Seg& seg) {
    return std::max<int64_t>(0, int64_t(std::min(seg.stop, plan.node_len[seg.node])) - seg.start);
}

void expect(const char* what, int64_t planned, int64_t given) {
    if (planned != given)
        throw std::invalid_argument(std::string(what) + " must be " + std::to_string(planned) +
                                    " as in the plan, got " + std::to_string(given));
}

// Of arguments that may have room for a larger plan.
void expect_at_least(const char* what, int64_t planned, int64_t given) {
    if (planned > given)
        throw std::invalid_argument(std::string(what) + " must be at least " + std::to_string(planned) +
                                    " as in the plan, got " + std::to_string(given));
}

// Validates the plan, and that the slots it reads are in the pool.
void check_plan(const Attention& call) {
    const int64_t index_end = validate(call.plan);
    if (index_end > call.slot_index_size)
        throw std::invalid_argument("slot_index must have at least " + std::to_string(index_end) +
                                    " entries for this plan, got " + std::to_string(call.slot_index_size));
    for (int32_t s = 0; s < call.plan.header->num_segs; ++s) {
        const Seg& seg = call.plan.seg[s];
        const int64_t tokens = seg_tokens(call.plan, seg), begin = int64_t(seg.index_begin) + seg.start;
        int32_t low = 0, high = -1;
        for (int64_t i = begin; i < begin + tokens; ++i) {
            low = std::min(low, call.slot_index[i]);
            high = std::max(high, call.slot_index[i]);
        }
        if (low < 0 || high >= call.pool.num_slots)
            throw std::invalid_argument("slot_index must be in [0, " + std::to_string(call.pool.num_slots) +
                                        "), the pool, got " + std::to_string(low < 0 ? low : high));
    }
}

// What items cost for one KV head: vectors of 16 lanes x tokens, and something for each segment.
std::vector<int64_t> work_of(const Attention& call) {
    const PlanView& plan = call.plan;
    std::vector<int64_t> work(plan.header->num_items);
    for (int32_t i = 0; i < plan.header->num_items; ++i)
        for (int32_t s = plan.item[i].seg_begin; s < plan.item[i].seg_end; ++s) {
            const Seg& seg = plan.seg[s];
            work[i] += (seg_tokens(plan, seg) + 8) * ((int64_t(seg.row_hi - seg.row_lo) * call.group + 15) / 16);
        }
    return work;
}

// Items, most work first, for as many KV heads at a time as leave every thread enough to do.
std::vector<AttentionTask> tasks(const Attention& call, const std::vector<int64_t>& work, int64_t all, int threads) {
    const int32_t items = int32_t(work.size()), heads = call.pool.num_kv_heads;
    std::vector<int32_t> order(items);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return work[a] > work[b]; });
    std::vector<AttentionTask> result;
    for (const int32_t i : order) {
        // Several heads at a time read memory in order, as long as a task is no more than an eighth of a thread's share
        // and its sums stay in cache.
        const Item& item = call.plan.item[i];
        const int64_t lanes = int64_t(item.row_end - item.row_begin) * call.group;
        const int64_t share = threads > 1 ? all * heads / (8 * threads) / std::max<int64_t>(work[i], 1) : heads;
        const int32_t step = int32_t(std::clamp<int64_t>(std::min(share, 512 / lanes), 1, heads));
        for (int32_t head = 0; head < heads; head += step) result.push_back({i, head, std::min(head + step, heads)});
    }
    return result;
}

// An output that nothing is computed for: 0, and the log-sum-exp of nothing or of the sink alone.
void write_empty(const Attention& call, int64_t token) {
    const int64_t heads = call.num_qo_heads, row = heads * call.pool.v_dim * item_size(int(call.dtype));
    std::memset(static_cast<char*>(call.out) + token * row, 0, row);
    for (int64_t head = 0; head < heads; ++head)
        call.lse[token * heads + head] = call.sinks ? call.sinks[head] : -__builtin_inff();
}

}  // namespace

void tree_attention(const TreeAttentionParams& params, int threads) {
    Attention call{params, open_plan(params.plan_buffer, params.plan_size), 0, nullptr, nullptr, nullptr};
    const PlanView& plan = call.plan;
    expect_at_least("rows of q", plan.header->num_rows, call.rows);
    expect_at_least("num_tokens", plan.header->num_tokens, call.num_tokens);
    expect_at_least("max_partials", plan.header->num_partials, call.max_partials);
    expect("query heads", plan.header->num_qo_heads, call.num_qo_heads);
    expect("KV heads", plan.header->num_kv_heads, call.pool.num_kv_heads);
    expect("head_dim", plan.header->head_dim, call.pool.k_dim);
    call.group = call.num_qo_heads / call.pool.num_kv_heads;
    if (!call.plan_trusted) check_plan(call);
    const AttentionKernel run = kernel(call);

    static thread_local Memory scratch, partials;
    const int64_t states = int64_t(plan.header->num_partials) * call.num_qo_heads;
    call.partial_out = reinterpret_cast<float*>(partials.get(4 * states * (call.pool.v_dim + 2)));
    call.partial_max = call.partial_out + states * call.pool.v_dim;
    call.partial_mass = call.partial_max + states;

    for (int32_t i = 0; i < plan.header->num_empty_tokens; ++i) write_empty(call, plan.empty_tokens[i]);
    for (int64_t token = plan.header->num_tokens; token < call.num_tokens; ++token) write_empty(call, token);

    // A thread is worth calling for some 10 us of work: 30,000 multiply-adds of vectors.
    const std::vector<int64_t> work = work_of(call);
    const int64_t all = std::accumulate(work.begin(), work.end(), int64_t(0));
    const int64_t steps = all * call.pool.num_kv_heads * (call.pool.k_dim + call.pool.v_dim);
    threads = int(std::clamp<int64_t>(steps / 30000, 1, std::max(threads, 1)));
    const std::vector<AttentionTask> todo = tasks(call, work, all, threads);
    std::atomic<bool> no_memory{false};
    parallel(int64_t(todo.size()), threads, [&](int64_t i) {
        const Item& item = plan.item[todo[i].item];
        const int64_t bytes = run.scratch(call, item.row_end - item.row_begin, todo[i].head_end - todo[i].head_begin);
        try {
            run.run(call, todo[i], scratch.get(bytes));
        } catch (const std::bad_alloc&) {
            no_memory = true;  // an exception may not leave its thread
        }
    });
    if (no_memory) throw std::bad_alloc();
    if (plan.header->num_partials)
        parallel(plan.header->num_tokens, threads, [&](int64_t token) {
            if (plan.merge_indptr[token] < plan.merge_indptr[token + 1])
                run.merge(call, token, reinterpret_cast<float*>(scratch.get(4 * call.pool.v_dim)));
        });
}

}  // namespace forktree
