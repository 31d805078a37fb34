// At first every root tree is one item. Then the costliest item is cut in two, by rows or by tokens, until none costs
// more than its share, or cutting costs more than it gains.
#include "plan/plan.hpp"

#include <cstring>
#include <numeric>
#include <queue>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

namespace forktree {
namespace {

constexpr int32_t FEW_ROWS = 8;    // up to here every boundary between rows is tried
constexpr int32_t CANDIDATES = 4;  // boundaries tried otherwise: those that promise most

// Cutting one item after the other does not always end well, so small plans are made in several ways.
struct Trial {
    int64_t percent;    // of an even share that an item may cost
    bool rows, tokens;  // ways to cut
};
constexpr Trial TRIALS[] = {{100, true, true},  {110, true, true}, {100, false, true}, {100, true, false},
                            {125, true, true},  {85, true, true},  {110, false, true}, {70, true, true},
                            {125, false, true}, {150, true, true}};
constexpr size_t FEW_PIECES = 2000;  // pieces looked at in all trials but the first
constexpr int64_t NEAR = 50;         // no more trials if not more than 1 / NEAR can be gained

// Lowest position of any range of rows.
class Lowest {
public:
    explicit Lowest(std::vector<int32_t> values) : levels{std::move(values)} {
        for (size_t step = 1; 2 * step <= levels[0].size(); step *= 2) {
            const std::vector<int32_t>& below = levels.back();
            std::vector<int32_t> level(levels[0].size() - 2 * step + 1);
            for (size_t i = 0; i < level.size(); ++i) level[i] = std::min(below[i], below[i + step]);
            levels.push_back(std::move(level));
        }
    }
    int32_t operator()(int32_t lo, int32_t hi) const {
        int level = 0;
        while (2 << level <= hi - lo) ++level;
        return std::min(levels[level][lo], levels[level][hi - (1 << level)]);
    }

private:
    std::vector<std::vector<int32_t>> levels;
};

// What an item reads of a stretch.
struct Piece {
    int32_t stretch, start, stop, lo, hi;
    bool again;  // read by another item as well
    int64_t cost;
};

struct Work {
    int32_t row_begin, row_end;
    bool partial;
    int64_t cost;
    std::vector<Piece> pieces;  // in path order

    int32_t rows() const { return row_end - row_begin; }
};

// A way to cut: at a row, or before token `offset` of a piece (0: before the piece).
struct Cut {
    int64_t time = INT64_MAX, cost = INT64_MAX;
    int32_t row = -1, piece = -1, offset = 0;

    bool found() const { return time != INT64_MAX; }
    bool operator<(const Cut& other) const { return time != other.time ? time < other.time : cost < other.cost; }
};

class Planner {
public:
    Planner(const Layout& layout, const PlanOptions& options)
        : l(layout),
          o(options),
          price(o.target, o.num_qo_heads, o.num_kv_heads, o.head_dim),
          s(stretches(layout)),
          lowest(o.window ? positions() : std::vector<int32_t>{0}),
          several(rows() + 1),
          items_of(rows()) {
        std::vector<int32_t> rows_of(l.tokens);
        for (const Row& row : s.row) ++rows_of[row.token];
        for (int32_t r = 0; r < rows(); ++r) several[r + 1] = several[r] + (rows_of[s.row[r].token] > 1);
    }

    std::vector<int32_t> run() {
        whole_trees();
        keep_cap();
        if (o.invariant) {
            try_each_tree();
        } else {
            try_all();
        }
        return write();
    }

private:
    int32_t rows() const { return int32_t(s.row.size()); }

    std::vector<int32_t> positions() const {
        std::vector<int32_t> result;
        for (const Row& row : s.row) result.push_back(l.row_pos[row.row]);
        return result.empty() ? std::vector<int32_t>{0} : result;
    }

    // ------------------------------------------------------------------ pieces

    // Leaves of a piece what rows [lo, hi) can see; false if that is nothing.
    bool clip(Piece& p, int32_t lo, int32_t hi) const {
        const Stretch& from = s.stretch[p.stretch];
        p.lo = lo;
        p.hi = hi;
        if (o.window)
            p.start = int32_t(std::max<int64_t>(p.start, lowest(lo, hi) - o.window + 1 - l.node_pos[from.node]));
        if (from.uneven) p.stop = std::min(p.stop, sight(from.node, lo, hi));
        if (p.start >= p.stop) return false;
        p.cost = cost(p);
        return true;
    }

    // Where rows [lo, hi) stop seeing a node that causal contexts end in.
    int32_t sight(int32_t node, int32_t lo, int32_t hi) const {
        int32_t stop = 0;
        for (int32_t r = hi - 1; r >= lo; r = s.context_begin[r] - 1) {  // the last row of a context sees most
            if (s.row[r].tip != node || s.row[r].last == LIVE) return LIVE;
            stop = std::max(stop, s.row[r].last + 1);
        }
        return stop;
    }

    int32_t tokens(const Piece& p) const {
        const int32_t length = l.node_len[s.stretch[p.stretch].node];
        return std::max(0, std::min(p.stop, length) - p.start);
    }
    int64_t cost(const Piece& p) const {
        const int64_t n = tokens(p);
        return price.segment(p.hi - p.lo, n, p.again ? n : 0);
    }

    // ------------------------------------------------------------------ items

    // Takes in an item; what it costs and whether it writes partials follow from its pieces and rows.
    void add(std::vector<Piece>&& pieces) {
        if (pieces.empty()) return;
        Work w{INT32_MAX, 0, false, 0, std::move(pieces)};
        for (const Piece& p : w.pieces) {
            w.row_begin = std::min(w.row_begin, p.lo);
            w.row_end = std::max(w.row_end, p.hi);
        }
        for (int32_t r = w.row_begin; r < w.row_end; ++r) ++items_of[r];
        work.push_back(std::move(w));
    }

    // After all that share its rows were added.
    void settle(size_t i) {
        Work& w = work[i];
        w.partial = several[w.row_begin] < several[w.row_end];
        for (int32_t r = w.row_begin; r < w.row_end; ++r) w.partial |= items_of[r] > 1;
        w.cost = price.item(w.rows()) + (w.partial ? price.partials(w.rows()) : 0);
        for (const Piece& p : w.pieces) w.cost += p.cost;
        sum += w.cost;
        partials += w.partial ? w.rows() : 0;
    }

    std::vector<Piece> remove(size_t i) {
        Work& w = work[i];
        for (int32_t r = w.row_begin; r < w.row_end; ++r) --items_of[r];
        sum -= w.cost;
        partials -= w.partial ? w.rows() : 0;
        return std::move(w.pieces);
    }

    void whole_trees() {
        std::vector<Piece> pieces;
        long double most = 0;  // what it all costs, cut as finely as can be
        for (size_t i = 0, tree = 0; tree < s.tree_end.size(); ++tree) {
            for (; i < size_t(s.tree_end[tree]); ++i) {
                const Stretch& from = s.stretch[i];
                Piece p{int32_t(i), from.start, from.stop, from.lo, from.hi, false, 0};
                most += price.finest(p.hi - p.lo, tokens(p));
                if (most * price.heads > (long double)(INT64_MAX / 4))
                    throw std::invalid_argument("cost_model must price this step below 2**61 ps, got prices that do not");
                if (clip(p, p.lo, p.hi)) pieces.push_back(p);
            }
            add(std::move(pieces));
            pieces.clear();
        }
        for (size_t i = 0; i < work.size(); ++i) settle(i);
    }

    // Rows of tokens with several rows need partials whatever is done; if the cap is passed, no others get any.
    void keep_cap() {
        if (o.invariant) return;  // what is needed shows once all is cut
        if (partials > o.max_partials && several[rows()] <= o.max_partials) {
            const auto needs = [&](int32_t row) { return several[row + 1] > several[row]; };
            for (size_t i = 0; i < work.size();) {
                int32_t row = work[i].row_begin + 1;
                while (row < work[i].row_end && needs(row) == needs(row - 1)) ++row;
                if (row < work[i].row_end) cut_rows(i, row);  // the rest comes last
                else ++i;
            }
        }
        if (partials > o.max_partials) refuse_cap(several[rows()]);
    }

    [[noreturn]] void refuse_cap(int64_t needed) const {
        throw std::invalid_argument("max_partials must be at least " + std::to_string(needed) +
                                    ", which this layout needs, got " + std::to_string(o.max_partials));
    }

    void cut_rows(size_t i, int32_t row) {
        std::vector<Piece> left, right;
        for (const Piece& p : remove(i)) {
            Piece a = p, b = p;
            const bool in_left = p.lo < row && clip(a, p.lo, std::min(p.hi, row));
            if (in_left) left.push_back(a);
            b.again |= in_left;
            if (p.hi > row && clip(b, std::max(p.lo, row), p.hi)) right.push_back(b);
        }
        replace(i, std::move(left), std::move(right));
    }

    void cut_tokens(size_t i, int32_t piece, int32_t offset) {
        std::vector<Piece> pieces = remove(i), right(pieces.begin() + piece, pieces.end());
        pieces.resize(piece);
        if (offset) {
            Piece& b = right.front();
            Piece a = b;
            b.start += offset;
            a.stop = b.start;
            a.cost = cost(a);
            b.cost = cost(b);
            pieces.push_back(a);
        }
        replace(i, std::move(pieces), std::move(right));
    }

    // Puts the left part in the place of item i and the right one last; either may be empty.
    void replace(size_t i, std::vector<Piece>&& left, std::vector<Piece>&& right) {
        const size_t last = work.size();
        if (left.empty()) left.swap(right);
        add(std::move(left));
        work[i] = std::move(work.back());
        work.pop_back();
        add(std::move(right));
        settle(i);
        if (work.size() > last) settle(last);
    }

    // ------------------------------------------------------------------ search

    // Every root tree as if it were alone.
    void try_each_tree() {
        std::vector<Work> trees, all;
        trees.swap(work);
        for (Work& tree : trees) {
            sum = tree.cost;
            partials = tree.partial ? tree.rows() : 0;
            work.clear();
            work.push_back(std::move(tree));
            try_all();
            std::move(work.begin(), work.end(), std::back_inserter(all));
        }
        work = std::move(all);
    }

    void try_all() {
        const std::vector<Work> whole = work;
        const std::vector<int32_t> whole_items_of = items_of;
        const int64_t whole_sum = sum, whole_partials = partials;
        const auto restore = [&] {
            work = whole;
            items_of = whole_items_of;
            sum = whole_sum;
            partials = whole_partials;
        };
        std::vector<Work> best;
        int64_t best_time = INT64_MAX;
        size_t pieces = 0;
        for (const Work& w : work) pieces += w.pieces.size();
        size_t looked_at = 0;
        for (const Trial& trial : TRIALS) {
            if (looked_at) restore();
            Outcome got = cut_all(trial, INT32_MAX);
            if (got.time < best_time) {
                if (got.last_time - got.time > got.time / NEAR) {
                    restore();
                    cut_all(trial, got.cuts);
                }
                best_time = got.time;
                best = std::move(work);
            }
            looked_at += pieces;
            if (looked_at > FEW_PIECES || best_time <= price.spread(whole_sum) + price.spread(whole_sum) / NEAR ||
                best_time <= o.target.grain)
                break;
        }
        work = std::move(best);
    }

    struct Outcome {
        int64_t time = INT64_MAX, last_time = 0;  // the least on the way, and in the end
        int32_t cuts = 0, all_cuts = 0;           // how many led there, how many were made
    };

    // Cuts at most so many times, beyond the cuts that must be.
    Outcome cut_all(const Trial& trial, int32_t most) {
        using Entry = std::pair<int64_t, int64_t>;  // cost, -index
        std::priority_queue<Entry> queue;
        std::vector<size_t> wide;
        const auto push = [&](size_t i) {
            if (too_wide(work[i])) wide.push_back(i);
            else queue.push({work[i].cost, -int64_t(i)});
        };
        for (size_t i = 0; i < work.size(); ++i) push(i);
        Outcome got;
        while (!wide.empty() || !queue.empty()) {
            const bool forced = !wide.empty();
            if (!forced) {
                got.last_time = std::max(price.spread(sum), price.alone(queue.top().first));
                if (got.last_time < got.time) {
                    got.time = got.last_time;
                    got.cuts = got.all_cuts;
                }
                if (got.all_cuts == most) break;
            }
            const size_t i = forced ? wide.back() : size_t(-queue.top().second);
            if (forced) wide.pop_back();
            else queue.pop();
            const int64_t limit = this->limit(trial);
            if (!forced && work[i].cost <= limit) break;
            const int64_t parts = std::max<int64_t>(2, ceil_div(work[i].cost, limit));
            Cut cut;
            if (trial.rows || forced) by_rows(work[i], parts, cut);
            if (trial.tokens && !forced) by_tokens(work[i], parts, cut);
            if (!cut.found() || (!forced && cut.time >= price.alone(work[i].cost))) {
                break;  // the costliest cannot be helped
            }
            const size_t before = work.size();
            if (cut.row >= 0) cut_rows(i, cut.row);
            else cut_tokens(i, cut.piece, cut.offset);
            got.all_cuts += !forced;
            push(i);
            if (work.size() > before) push(before);
        }
        return got;
    }

    bool too_wide(const Work& w) const { return w.rows() > 1 && w.rows() * price.group > o.target.max_lanes; }

    // What an item should cost at most, per KV head.
    int64_t limit(const Trial& trial) const {
        const int64_t share = price.spread(sum) / 100 * trial.percent;
        return std::max<int64_t>(1, std::max(share, o.target.grain) / price.alone(1));
    }

    // Part of a cut: what it costs, and what each further item made of it will cost more.
    struct Part {
        int64_t cost, more;
        int64_t in(int64_t items) const { return ceil_div(cost + (items - 1) * more, items); }
    };

    // Keeps a cut if the plan takes less time with it, the parts being cut further into `parts` in all.
    void consider(const Work& w, int64_t parts, Part left, Part right, Cut cut, Cut& best) const {
        const int64_t fewer = parts / 2, most = parts - fewer;
        const int64_t longest =
            std::min(std::max(left.in(fewer), right.in(most)), std::max(left.in(most), right.in(fewer)));
        cut.cost = left.cost + right.cost;
        cut.time = std::max(price.alone(longest), o.target.grain);
        cut.time = std::max(cut.time, price.spread(sum - w.cost + cut.cost));
        if (cut < best) best = cut;
    }

    void by_rows(const Work& w, int64_t parts, Cut& best) {
        const int32_t n = w.rows();
        if (n < 2) return;
        // Of boundary x, between rows x - 1 and x of the item: what pieces that end here or before cost, what all rows
        // before it cost if rows of a piece cost the same, and what cutting there adds.
        ended.assign(n + 1, 0);
        before.assign(n + 1, 0);
        added.assign(n + 1, 0);
        int64_t total = 0;
        for (const Piece& p : w.pieces) {
            const int32_t lo = p.lo - w.row_begin, hi = p.hi - w.row_begin;
            total += p.cost;
            ended[hi] += p.cost;
            if (n - 1 <= FEW_ROWS) continue;
            const int64_t row = p.cost / (hi - lo);
            before[lo] += row;
            before[hi] -= row;
            if (hi - lo < 2) continue;
            const int64_t length = tokens(p), half = (hi - lo) / 2;
            const int64_t extra = price.segment(half, length, p.again ? length : 0) +
                                  price.segment(hi - lo - half, length, length) - p.cost;
            added[lo + 1] += extra;
            added[hi] -= extra;
        }
        for (int32_t x = 1; x <= n; ++x) ended[x] += ended[x - 1];

        const auto attempt = [&](int32_t x) {
            const int32_t row = w.row_begin + x;
            int64_t left = fixed(x, w.partial) + ended[x], right = fixed(n - x, w.partial) + total - ended[x];
            for (const Piece& p : w.pieces) {
                if (p.lo >= row || p.hi <= row) continue;
                Piece a = p, b = p;
                const bool in_left = clip(a, p.lo, row);
                b.again |= in_left;
                left += in_left ? a.cost : 0;
                right += clip(b, row, p.hi) ? b.cost - p.cost : -p.cost;
            }
            Cut cut;
            cut.row = row;
            consider(w, parts, {left, o.target.item}, {right, o.target.item}, cut, best);
        };
        if (n - 1 <= FEW_ROWS) {
            for (int32_t x = 1; x < n; ++x) attempt(x);
            return;
        }
        Cut most[CANDIDATES];
        int64_t rate = 0, left = 0, extra = 0;
        for (int32_t x = 1; x < n; ++x) {
            rate += before[x - 1];
            left += rate;
            extra += added[x];
            Cut cut;
            cut.row = x;
            Cut& worst = most[CANDIDATES - 1];
            consider(w, parts, {fixed(x, w.partial) + left + extra / 2, o.target.item},
                     {fixed(n - x, w.partial) + total - left + extra / 2, o.target.item}, cut, worst);
            for (int32_t i = CANDIDATES - 1; i > 0 && most[i] < most[i - 1]; --i) std::swap(most[i], most[i - 1]);
        }
        for (const Cut& cut : most)
            if (cut.found()) attempt(cut.row);
        const int32_t step = int32_t(std::max<int64_t>(1, o.target.lanes / price.group));  // rows that fill the lanes
        const int32_t full = most[0].row / step * step;
        if (full > 0) attempt(full);
        if (full + step < n) attempt(full + step);
    }

    int64_t fixed(int32_t rows, bool partial) const { return price.item(rows) + (partial ? price.partials(rows) : 0); }

    void by_tokens(const Work& w, int64_t parts, Cut& best) {
        const int32_t n = int32_t(w.pieces.size());
        // Rows from piece i on.
        from.resize(n + 1);
        from[n] = {INT32_MAX, 0};
        for (int32_t i = n; i-- > 0;)
            from[i] = {std::min(from[i + 1].first, w.pieces[i].lo), std::max(from[i + 1].second, w.pieces[i].hi)};
        int64_t total = 0;
        for (const Piece& p : w.pieces) total += p.cost;

        const auto attempt = [&](int32_t lo, int32_t hi, int32_t i, int64_t left, int64_t right, int32_t offset) {
            const bool shared = lo < from[i].second && from[i].first < hi;
            const bool partial = w.partial || shared;
            const int32_t a = hi - lo, b = from[i].second - from[i].first;
            if (partial && partials + a + b - (w.partial ? w.rows() : 0) > cap()) return;
            Cut cut;
            cut.piece = i;
            cut.offset = offset;
            const int64_t more_left = fixed(a, partial), more_right = fixed(b, partial);
            consider(w, parts, {left + more_left, more_left}, {right + more_right, more_right}, cut, best);
        };
        int32_t lo = INT32_MAX, hi = 0;
        int64_t left = 0;
        for (int32_t i = 0; i < n; ++i) {
            const Piece& p = w.pieces[i];
            if (i) attempt(lo, hi, i, left, total - left, 0);
            lo = std::min(lo, p.lo);
            hi = std::max(hi, p.hi);
            // Within a piece: where the left part gets its share.
            const int64_t length = tokens(p);
            if (length > BLOCK) {
                const int64_t a = fixed(hi - lo, true), b = fixed(from[i].second - from[i].first, true);
                for (const int64_t part : {parts / 2, parts - parts / 2}) {
                    const int64_t share = (total + part * a + (parts - part) * b) / parts;
                    const int64_t want = std::clamp<int64_t>(part * (share - a) - left, 0, p.cost);
                    const int64_t even = int64_t(__int128(length) * want / std::max<int64_t>(1, p.cost));
                    const int64_t at = std::max<int64_t>(0, even - BLOCK) / BLOCK * BLOCK + BLOCK;
                    for (const int64_t offset : {at, at + BLOCK}) {
                        if (offset >= length) continue;
                        Piece x = p, y = p;
                        y.start += int32_t(offset);
                        x.stop = y.start;
                        const int64_t mine = cost(x), rest = cost(y);
                        attempt(lo, hi, i, left + mine, total - left - p.cost + rest, int32_t(offset));
                    }
                }
            }
            left += p.cost;
        }
    }

    // Invariant plans cannot heed how many partials strangers need.
    int64_t cap() const { return o.invariant ? INT64_MAX : o.max_partials; }

    // ------------------------------------------------------------------ output

    std::vector<int32_t> write() {
        // Costliest first, so that what comes last is short; partials are merged in path order all the same.
        std::vector<size_t> path(work.size());
        std::iota(path.begin(), path.end(), 0);
        std::sort(path.begin(), path.end(), [&](size_t a, size_t b) {
            const Piece &x = work[a].pieces.front(), &y = work[b].pieces.front();
            return std::tie(x.stretch, x.start, x.lo) < std::tie(y.stretch, y.start, y.lo);
        });
        std::vector<size_t> order = path;
        std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return work[a].cost > work[b].cost; });

        std::vector<int32_t> count(l.tokens);
        for (const Work& w : work)
            for (int32_t r = w.row_begin; r < w.row_end; ++r) ++count[s.row[r].token];
        std::vector<int32_t> clear;
        for (int32_t t = 0; t < l.tokens; ++t)
            if (!count[t]) clear.push_back(t);
        int64_t segs = 0;
        partials = 0;
        std::vector<int32_t> first(work.size(), -1);
        for (size_t i : order) {
            const Work& w = work[i];
            segs += int64_t(w.pieces.size());
            bool merges = false;
            for (int32_t r = w.row_begin; r < w.row_end; ++r) merges |= count[s.row[r].token] > 1;
            if (!merges) continue;
            first[i] = int32_t(partials);
            partials += w.rows();
        }
        if (partials > o.max_partials) refuse_cap(partials);
        const int64_t words = l.mask_indptr ? l.mask_words : 0;
        const int64_t size = 16 + 5 * int64_t(work.size()) + 8 * segs + l.tokens + 1 + partials +
                             int64_t(clear.size()) + 6 * l.rows + l.nodes + l.rows + words;
        if (size > INT32_MAX)
            throw std::invalid_argument("a plan must have less than 2**31 entries, got " + std::to_string(size));

        std::vector<int32_t> buffer(size);
        int32_t* at = buffer.data();
        const auto put = [&](const auto& value) {
            std::memcpy(at, &value, sizeof value);
            at += sizeof value / 4;
        };
        put(Header{Header::MAGIC,
                   int32_t(size),
                   int32_t(l.rows),
                   int32_t(l.tokens),
                   int32_t(work.size()),
                   int32_t(segs),
                   int32_t(l.nodes),
                   int32_t(partials),
                   int32_t(words),
                   int32_t(o.num_qo_heads),
                   int32_t(o.num_kv_heads),
                   int32_t(o.head_dim),
                   int32_t(o.window),
                   int32_t(clear.size()),
                   {}});
        int32_t seg = 0;
        for (size_t i : order) {
            const int32_t end = seg + int32_t(work[i].pieces.size());
            put(Item{work[i].row_begin, work[i].row_end, seg, end, first[i]});
            seg = end;
        }
        runs.assign(s.stretch.size(), UNKNOWN);
        for (size_t i : order) {
            for (const Piece& p : work[i].pieces) {
                const int32_t node = s.stretch[p.stretch].node;
                put(Seg{l.node_begin[node], p.start, p.stop, node, p.lo, p.hi, l.node_pos[node], contiguous(p)});
            }
        }
        int32_t* indptr = at;
        at += l.tokens + 1;
        std::fill(count.begin(), count.end(), 0);
        for (size_t i : path)
            for (int32_t r = work[i].row_begin; first[i] >= 0 && r < work[i].row_end; ++r) ++count[s.row[r].token];
        std::partial_sum(count.begin(), count.end(), indptr + 1);
        std::copy(indptr, indptr + l.tokens, count.begin());
        for (size_t i : path)
            for (int32_t r = work[i].row_begin; first[i] >= 0 && r < work[i].row_end; ++r)
                at[count[s.row[r].token]++] = first[i] + r - work[i].row_begin;
        at += partials;
        at = std::copy(clear.begin(), clear.end(), at);
        for (const Row& row : s.row) put(row);
        at = std::copy(l.node_len, l.node_len + l.nodes, at);
        at = std::copy(l.row_pos, l.row_pos + l.rows, at);
        if (words) std::memcpy(at, l.mask_bits, words * 4);
        return buffer;
    }

    // Whether slots are consecutive numbers; never claimed of segments that grow.
    bool contiguous(const Piece& p) {
        if (p.stop == LIVE) return false;
        const Stretch& from = s.stretch[p.stretch];
        const int32_t* slot = l.slot_index + l.node_begin[from.node];
        if (runs[p.stretch] == UNKNOWN && from.stop != LIVE)
            runs[p.stretch] = consecutive(slot + from.start, slot + from.stop) ? YES : NO;
        return runs[p.stretch] == YES || consecutive(slot + p.start, slot + p.stop);
    }

    static bool consecutive(const int32_t* slot, const int32_t* end) {
        while (end - slot > 1) {
            const int32_t* stop = std::min(slot + 256, end - 1);
            uint32_t breaks = 0;
            for (; slot < stop; ++slot) breaks |= uint32_t(slot[1]) - uint32_t(slot[0]) - 1;
            if (breaks) return false;
        }
        return true;
    }

    enum Run : char { UNKNOWN, NO, YES };

    const Layout& l;
    const PlanOptions& o;
    const Prices price;
    const Stretches s;
    const Lowest lowest;
    std::vector<int32_t> several;   // [R+1] how many plan rows so far share their token with another row
    std::vector<int32_t> items_of;  // [R] how many items a plan row is in
    std::vector<Work> work;
    int64_t sum = 0, partials = 0;
    std::vector<Run> runs;  // of each stretch: whether its slots are consecutive
    std::vector<int64_t> ended, before, added;
    std::vector<std::pair<int32_t, int32_t>> from;
};

}  // namespace

std::vector<int32_t> plan(const Layout& layout, const PlanOptions& options) { return Planner(layout, options).run(); }

}  // namespace forktree
