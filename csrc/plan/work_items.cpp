#include "plan/work_items.hpp"

#include <stdexcept>
#include <string>
#include <utility>

namespace forktree {

RangeMin::RangeMin(std::vector<int32_t> values) : levels{std::move(values)} {
    for (size_t step = 1; 2 * step <= levels[0].size(); step *= 2) {
        const std::vector<int32_t>& below = levels.back();
        std::vector<int32_t> level(levels[0].size() - 2 * step + 1);
        for (size_t i = 0; i < level.size(); ++i) level[i] = std::min(below[i], below[i + step]);
        levels.push_back(std::move(level));
    }
}

WorkItems::WorkItems(const Layout& layout, const PlanOptions& options)
    : layout(layout),
      options(options),
      price(options.cost_model, options.heads),
      shared(shared_segments(layout)),
      lowest_pos(options.window ? positions() : std::vector<int32_t>{0}),
      multi(rows() + 1) {
    items_of.resize(rows());
    std::vector<int32_t> rows_of(layout.tokens);
    for (const Row& row : shared.row) ++rows_of[row.token];
    for (int32_t r = 0; r < rows(); ++r) multi[r + 1] = multi[r] + (rows_of[shared.row[r].token] > 1);
    add_whole_trees();
}

std::vector<int32_t> WorkItems::positions() const {
    std::vector<int32_t> result;
    for (const Row& row : shared.row) result.push_back(layout.row_pos[row.row]);
    return result.empty() ? std::vector<int32_t>{0} : result;
}

// Where rows [lo, hi) stop seeing a node that causal contexts end in.
int32_t WorkItems::visible_end(int32_t node, int32_t lo, int32_t hi) const {
    int32_t end = 0;
    for (int32_t r = hi - 1; r >= lo; r = shared.context_begin[r] - 1) {  // the last row of a context sees most
        if (shared.row[r].tip != node || shared.row[r].last == LIVE) return LIVE;
        end = std::max(end, shared.row[r].last + 1);
    }
    return end;
}

void WorkItems::add_whole_trees() {
    std::vector<ItemSegment> segments;
    long double finest = 0;  // what it all costs, cut as finely as can be
    for (size_t i = 0, tree = 0; tree < shared.tree_end.size(); ++tree) {
        for (; i < size_t(shared.tree_end[tree]); ++i) {
            const SharedSegment& from = shared.segment[i];
            ItemSegment s{int32_t(i), from.start, from.stop, from.lo, from.hi, false, 0};
            finest += price.finest(s.hi - s.lo, tokens(s));
            if (finest * price.heads > (long double)(INT64_MAX / 4))
                throw std::invalid_argument("cost_model must price this step below 2**61 ps, got prices that do not");
            if (clip(s, s.lo, s.hi)) segments.push_back(s);
        }
        add(std::move(segments));
        segments.clear();
    }
    for (size_t i = 0; i < items.size(); ++i) settle(i);
}

// Takes in an item; what it costs and whether it writes partials follow from its segments and rows, see `settle`.
void WorkItems::add(std::vector<ItemSegment>&& segments) {
    if (segments.empty()) return;
    WorkItem item{INT32_MAX, 0, false, 0, std::move(segments)};
    for (const ItemSegment& s : item.segments) {
        item.row_begin = std::min(item.row_begin, s.lo);
        item.row_end = std::max(item.row_end, s.hi);
    }
    for (int32_t r = item.row_begin; r < item.row_end; ++r) ++items_of[r];
    items.push_back(std::move(item));
}

// Prices an item. Called after all that share its rows were added.
void WorkItems::settle(size_t i) {
    WorkItem& item = items[i];
    item.partial = multi[item.row_begin] < multi[item.row_end];
    for (int32_t r = item.row_begin; r < item.row_end; ++r) item.partial |= items_of[r] > 1;
    item.cost = fixed_cost(item.rows(), item.partial);
    for (const ItemSegment& s : item.segments) item.cost += s.cost;
    sum += item.cost;
    partials += item.partial ? item.rows() : 0;
}

std::vector<ItemSegment> WorkItems::remove(size_t i) {
    WorkItem& item = items[i];
    for (int32_t r = item.row_begin; r < item.row_end; ++r) --items_of[r];
    sum -= item.cost;
    partials -= item.partial ? item.rows() : 0;
    return std::move(item.segments);
}

void WorkItems::enforce_cap() {
    if (options.invariant) return;  // what is needed shows once all is cut
    if (partials > options.max_partials && multi[rows()] <= options.max_partials) {
        const auto needs = [&](int32_t row) { return multi[row + 1] > multi[row]; };
        for (size_t i = 0; i < items.size();) {
            int32_t row = items[i].row_begin + 1;
            while (row < items[i].row_end && needs(row) == needs(row - 1)) ++row;
            if (row < items[i].row_end) cut_rows(i, row);  // the rest comes last
            else ++i;
        }
    }
    if (partials > options.max_partials) refuse_cap(multi[rows()]);
}

void WorkItems::refuse_cap(int64_t needed) const {
    throw std::invalid_argument("max_partials must be at least " + std::to_string(needed) +
                                ", which this layout needs, got " + std::to_string(options.max_partials));
}

void WorkItems::cut_rows(size_t i, int32_t row) {
    std::vector<ItemSegment> left, right;
    for (const ItemSegment& s : remove(i)) {
        ItemSegment a = s, b = s;
        const bool in_left = s.lo < row && clip(a, s.lo, std::min(s.hi, row));
        if (in_left) left.push_back(a);
        b.reread |= in_left;
        if (s.hi > row && clip(b, std::max(s.lo, row), s.hi)) right.push_back(b);
    }
    replace(i, std::move(left), std::move(right));
}

void WorkItems::cut_tokens(size_t i, int32_t segment, int32_t offset) {
    std::vector<ItemSegment> segments = remove(i), right(segments.begin() + segment, segments.end());
    segments.resize(segment);
    if (offset) {
        ItemSegment& b = right.front();
        ItemSegment a = b;
        b.start += offset;
        a.stop = b.start;
        a.cost = cost(a);
        b.cost = cost(b);
        segments.push_back(a);
    }
    replace(i, std::move(segments), std::move(right));
}

void WorkItems::replace(size_t i, std::vector<ItemSegment>&& left, std::vector<ItemSegment>&& right) {
    const size_t last = items.size();
    if (left.empty()) left.swap(right);
    add(std::move(left));
    items[i] = std::move(items.back());
    items.pop_back();
    add(std::move(right));
    settle(i);
    if (items.size() > last) settle(last);
}

}  // namespace forktree
