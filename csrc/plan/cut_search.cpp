#include "plan/cut_search.hpp"

#include <algorithm>

namespace forktree {
namespace {

constexpr int32_t FEW_ROWS = 8;    // up to here every boundary between rows is tried
constexpr int32_t CANDIDATES = 4;  // boundaries tried otherwise: those that promise most

}  // namespace

// Keeps `cut` if it lowers the predicted time, assuming both halves are cut again into `parts` items in total.
void CutSearch::consider(const WorkItem& item, int64_t parts, Part left, Part right, Cut cut, Cut& best) const {
    const int64_t fewer = parts / 2, more = parts - fewer;
    const int64_t longest =
        std::min(std::max(left.in(fewer), right.in(more)), std::max(left.in(more), right.in(fewer)));
    cut.cost = left.cost + right.cost;
    cut.time = std::max(work.price.alone(longest), work.options.cost_model.grain);
    cut.time = std::max(cut.time, work.price.spread(work.sum - item.cost + cut.cost));
    if (cut < best) best = cut;
}

void CutSearch::by_rows(const WorkItem& item, int64_t parts, Cut& best) {
    const int32_t n = item.rows();
    if (n < 2) return;
    const int64_t item_price = work.options.cost_model.item;
    // Of boundary x, between rows x - 1 and x of the item: what segments that end here or before cost, what all rows
    // before it cost if rows of a segment cost the same, and what cutting there adds.
    ended.assign(n + 1, 0);
    before.assign(n + 1, 0);
    added.assign(n + 1, 0);
    int64_t total = 0;
    for (const ItemSegment& s : item.segments) {
        const int32_t lo = s.lo - item.row_begin, hi = s.hi - item.row_begin;
        total += s.cost;
        ended[hi] += s.cost;
        if (n - 1 <= FEW_ROWS) continue;
        const int64_t row = s.cost / (hi - lo);
        before[lo] += row;
        before[hi] -= row;
        if (hi - lo < 2) continue;
        const int64_t length = work.tokens(s), half = (hi - lo) / 2;
        const int64_t extra = work.price.segment(half, length, s.reread ? length : 0) +
                              work.price.segment(hi - lo - half, length, length) - s.cost;
        added[lo + 1] += extra;
        added[hi] -= extra;
    }
    for (int32_t x = 1; x <= n; ++x) ended[x] += ended[x - 1];

    const auto attempt = [&](int32_t x) {
        const int32_t row = item.row_begin + x;
        int64_t left = work.fixed_cost(x, item.partial) + ended[x];
        int64_t right = work.fixed_cost(n - x, item.partial) + total - ended[x];
        for (const ItemSegment& s : item.segments) {
            if (s.lo >= row || s.hi <= row) continue;
            ItemSegment a = s, b = s;
            const bool in_left = work.clip(a, s.lo, row);
            b.reread |= in_left;
            left += in_left ? a.cost : 0;
            right += work.clip(b, row, s.hi) ? b.cost - s.cost : -s.cost;
        }
        Cut cut;
        cut.row = row;
        consider(item, parts, {left, item_price}, {right, item_price}, cut, best);
    };
    if (n - 1 <= FEW_ROWS) {
        for (int32_t x = 1; x < n; ++x) attempt(x);
        return;
    }
    Cut promising[CANDIDATES];
    int64_t rate = 0, left = 0, extra = 0;
    for (int32_t x = 1; x < n; ++x) {
        rate += before[x - 1];
        left += rate;
        extra += added[x];
        Cut cut;
        cut.row = x;
        consider(item, parts, {work.fixed_cost(x, item.partial) + left + extra / 2, item_price},
                 {work.fixed_cost(n - x, item.partial) + total - left + extra / 2, item_price}, cut,
                 promising[CANDIDATES - 1]);
        for (int32_t i = CANDIDATES - 1; i > 0 && promising[i] < promising[i - 1]; --i)
            std::swap(promising[i], promising[i - 1]);
    }
    for (const Cut& cut : promising)
        if (cut.found()) attempt(cut.row);
    // Rows that fill the lanes.
    const int32_t step = int32_t(std::max<int64_t>(1, work.options.cost_model.lanes / work.price.group));
    const int32_t full = promising[0].row / step * step;
    if (full > 0) attempt(full);
    if (full + step < n) attempt(full + step);
}

void CutSearch::by_tokens(const WorkItem& item, int64_t parts, Cut& best) {
    const int32_t n = int32_t(item.segments.size());
    // Rows from segment i on.
    rows_from.resize(n + 1);
    rows_from[n] = {INT32_MAX, 0};
    for (int32_t i = n; i-- > 0;)
        rows_from[i] = {std::min(rows_from[i + 1].first, item.segments[i].lo),
                        std::max(rows_from[i + 1].second, item.segments[i].hi)};
    int64_t total = 0;
    for (const ItemSegment& s : item.segments) total += s.cost;

    const auto attempt = [&](int32_t lo, int32_t hi, int32_t i, int64_t left, int64_t right, int32_t offset) {
        const auto [right_lo, right_hi] = rows_from[i];
        const bool partial = item.partial || (lo < right_hi && right_lo < hi);
        const int32_t a = hi - lo, b = right_hi - right_lo;
        if (partial && work.partials + a + b - (item.partial ? item.rows() : 0) > work.cap()) return;
        Cut cut;
        cut.segment = i;
        cut.offset = offset;
        const int64_t more_left = work.fixed_cost(a, partial), more_right = work.fixed_cost(b, partial);
        consider(item, parts, {left + more_left, more_left}, {right + more_right, more_right}, cut, best);
    };
    int32_t lo = INT32_MAX, hi = 0;
    int64_t left = 0;
    for (int32_t i = 0; i < n; ++i) {
        const ItemSegment& s = item.segments[i];
        if (i) attempt(lo, hi, i, left, total - left, 0);
        lo = std::min(lo, s.lo);
        hi = std::max(hi, s.hi);
        // Within a segment: where the left part gets its share.
        const int64_t length = work.tokens(s);
        if (length > BLOCK) {
            const int64_t a = work.fixed_cost(hi - lo, true);
            const int64_t b = work.fixed_cost(rows_from[i].second - rows_from[i].first, true);
            for (const int64_t part : {parts / 2, parts - parts / 2}) {
                const int64_t share = (total + part * a + (parts - part) * b) / parts;
                const int64_t want = std::clamp<int64_t>(part * (share - a) - left, 0, s.cost);
                const int64_t even = int64_t(__int128(length) * want / std::max<int64_t>(1, s.cost));
                const int64_t at = std::max<int64_t>(0, even - BLOCK) / BLOCK * BLOCK + BLOCK;
                for (const int64_t offset : {at, at + BLOCK}) {
                    if (offset >= length) continue;
                    ItemSegment x = s, y = s;
                    y.start += int32_t(offset);
                    x.stop = y.start;
                    attempt(lo, hi, i, left + work.cost(x), total - left - s.cost + work.cost(y), int32_t(offset));
                }
            }
        }
        left += s.cost;
    }
}

}  // namespace forktree
