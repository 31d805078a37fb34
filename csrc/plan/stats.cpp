// Prices a finished plan: the same model as the planner's, but read off the buffer.
#include "plan/stats.hpp"

#include <algorithm>
#include <vector>

namespace forktree {

PlanStats stats(const PlanView& plan, const CostModel& cost_model) {
    const Header& h = *plan.header;
    const Prices price(cost_model, {h.num_qo_heads, h.num_kv_heads, h.head_dim, h.value_dim, h.bytes_per_token});
    std::vector<int64_t> begin(h.num_nodes + 1);
    for (int32_t n = 0; n < h.num_nodes; ++n) begin[n + 1] = begin[n] + plan.node_len[n];
    std::vector<char> read(begin.back());

    PlanStats c{};
    for (int32_t w = 0; w < h.num_items; ++w) {
        const Item& item = plan.item[w];
        int64_t cost = price.item(item.row_end - item.row_begin);
        if (item.partial >= 0) cost += price.partials(item.row_end - item.row_begin);
        for (int32_t q = item.seg_begin; q < item.seg_end; ++q) {
            const Seg& s = plan.seg[q];
            const int64_t start = s.start, stop = std::max<int64_t>(start, std::min(s.stop, plan.node_len[s.node]));
            const int64_t tokens = stop - start, rows = s.row_hi - s.row_lo;
            const auto from = read.begin() + begin[s.node];
            const int64_t reread = tokens ? std::count(from + start, from + stop, 1) : 0;
            if (tokens) std::fill(from + start, from + stop, 1);
            c.distinct += tokens - reread;
            c.planned += tokens;
            c.computed += rows * tokens;
            c.padded += price.lane_groups(rows) * cost_model.lanes * tokens;
            cost += price.segment(rows, tokens, reread);
            for (int32_t r = s.row_lo; r < s.row_hi; ++r) {
                const Row& row = plan.row[r];
                int64_t lo = start, hi = stop;
                if (h.window) {
                    const int64_t at = int64_t(plan.row_pos[row.row]) - s.pos;
                    lo = std::max(lo, at - h.window + 1);
                    hi = std::min(hi, at + 1);
                }
                if (row.tip != s.node) {
                    c.attended += std::max<int64_t>(0, hi - lo);
                    continue;
                }
                hi = std::min<int64_t>(hi, int64_t(std::max(row.last, row.tail - 1)) + 1);
                if (row.mask < 0) {
                    c.attended += std::max<int64_t>(0, hi - lo);
                    continue;
                }
                c.attended += std::max<int64_t>(0, std::min<int64_t>(hi, row.tail) - lo);
                for (int64_t bit = std::max<int64_t>(lo, row.tail) - row.tail; bit < hi - row.tail; ++bit)
                    c.attended += plan.mask[row.mask + bit / 32] >> bit % 32 & 1;
            }
        }
        c.sum += cost * price.heads;
        c.longest = std::max(c.longest, price.alone(cost));
    }
    c.predicted = std::max(ceil_div(c.sum, cost_model.units), c.longest);
    return c;
}

}  // namespace forktree
