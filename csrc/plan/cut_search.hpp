// Finds the best way to cut one item in two.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "plan/work_items.hpp"

namespace forktree {

// A way to cut: at a row, or before token `offset` of a segment (0: before the segment).
struct Cut {
    int64_t time = INT64_MAX, cost = INT64_MAX;
    int32_t row = -1, segment = -1, offset = 0;

    bool found() const { return time != INT64_MAX; }
    bool operator<(const Cut& other) const { return time != other.time ? time < other.time : cost < other.cost; }
};

class CutSearch {
public:
    explicit CutSearch(const WorkItems& work) : work(work) {}

    // Replace `best` if they find a better cut of the item, which is to become `parts` items in the end.
    void by_rows(const WorkItem& item, int64_t parts, Cut& best);
    void by_tokens(const WorkItem& item, int64_t parts, Cut& best);

private:
    // Part of a cut: what it costs, and what each further item made of it will cost more.
    struct Part {
        int64_t cost, more;
        int64_t in(int64_t items) const { return ceil_div(cost + (items - 1) * more, items); }
    };

    const WorkItems& work;
    std::vector<int64_t> ended, before, added;
    std::vector<std::pair<int32_t, int32_t>> rows_from;

    void consider(const WorkItem& item, int64_t parts, Part left, Part right, Cut cut, Cut& best) const;
};

}  // namespace forktree
