// The items of a plan in the making: what each reads and costs, and how one is cut in two.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "plan/planner.hpp"

namespace forktree {

// What an item reads of a shared segment: tokens [start, stop) of its node, for plan rows [lo, hi).
struct ItemSegment {
    int32_t shared, start, stop, lo, hi;
    bool reread;  // read by another item as well
    int64_t cost;
};

struct WorkItem {
    int32_t row_begin, row_end;
    bool partial;
    int64_t cost;
    std::vector<ItemSegment> segments;  // in path order

    int32_t rows() const { return row_end - row_begin; }
};

// Minimum of any range of values.
class RangeMin {
public:
    explicit RangeMin(std::vector<int32_t> values);

    int32_t operator()(int32_t begin, int32_t end) const {
        int level = 0;
        while (2 << level <= end - begin) ++level;
        return std::min(levels[level][begin], levels[level][end - (1 << level)]);
    }

private:
    std::vector<std::vector<int32_t>> levels;  // of ranges of 1, 2, 4, … values
};

struct ItemsState {
    std::vector<WorkItem> items;
    std::vector<int32_t> items_of;  // [R] how many items a plan row is in
    int64_t sum = 0;                // what all items cost, per KV head
    int64_t partials = 0;           // rows of partials they write
};

class WorkItems : public ItemsState {
public:
    const Layout& layout;
    const PlanOptions& options;
    const Prices price;
    const SharedSegments shared;

    // Every root tree is one item.
    WorkItems(const Layout& layout, const PlanOptions& options);

    int32_t rows() const { return int32_t(shared.row.size()); }

    int32_t tokens(const ItemSegment& s) const {
        const int32_t length = layout.node_len[shared.segment[s.shared].node];
        return std::max(0, std::min(s.stop, length) - s.start);
    }

    int64_t cost(const ItemSegment& s) const {
        const int64_t n = tokens(s);
        return price.segment(s.hi - s.lo, n, s.reread ? n : 0);
    }

    // What an item of so many rows costs before it reads anything.
    int64_t fixed_cost(int32_t rows, bool partial) const {
        return price.item(rows) + (partial ? price.partials(rows) : 0);
    }

    // Clips a segment to what rows [lo, hi) can see. Returns false if nothing remains.
    bool clip(ItemSegment& s, int32_t lo, int32_t hi) const {
        const SharedSegment& from = shared.segment[s.shared];
        s.lo = lo;
        s.hi = hi;
        if (options.window)
            s.start = int32_t(
                std::max<int64_t>(s.start, lowest_pos(lo, hi) - options.window + 1 - layout.node_pos[from.node]));
        if (from.partially_visible) s.stop = std::min(s.stop, visible_end(from.node, lo, hi));
        if (s.start >= s.stop) return false;
        s.cost = cost(s);
        return true;
    }

    // Each puts the left part in the place of item i and the right one last; either may be empty.
    void cut_rows(size_t i, int32_t row);
    void cut_tokens(size_t i, int32_t segment, int32_t offset);  // before token `offset` of a segment

    // Tokens with several query rows always need partials. If these alone exceed the cap, there is no plan; if all
    // partials do, only they get any.
    void enforce_cap();
    [[noreturn]] void refuse_cap(int64_t needed) const;

    // Cap on partials while items are cut. Invariant plans cannot heed how many partials strangers need.
    int64_t cap() const { return options.invariant ? INT64_MAX : options.max_partials; }

private:
    const RangeMin lowest_pos;   // of plan rows
    std::vector<int32_t> multi;  // [R+1] how many plan rows so far share their token with another row

    std::vector<int32_t> positions() const;
    int32_t visible_end(int32_t node, int32_t lo, int32_t hi) const;
    void add_whole_trees();
    void add(std::vector<ItemSegment>&& segments);
    void settle(size_t i);
    std::vector<ItemSegment> remove(size_t i);
    void replace(size_t i, std::vector<ItemSegment>&& left, std::vector<ItemSegment>&& right);
};

}  // namespace forktree
