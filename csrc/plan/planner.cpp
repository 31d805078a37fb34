// At first every root tree is one item. Then the costliest item is cut in two, by rows or by tokens, until none costs
// more than its share, or cutting costs more than it gains.
#include "plan/planner.hpp"

#include <algorithm>
#include <iterator>
#include <queue>
#include <utility>

#include "plan/cut_search.hpp"
#include "plan/serialize.hpp"
#include "plan/work_items.hpp"

namespace forktree {
namespace {

// Cutting one item after the other does not always end well, so small plans are made in several ways.
struct Trial {
    int64_t percent;    // of an even share that an item may cost
    bool rows, tokens;  // ways to cut
};
constexpr Trial TRIALS[] = {{100, true, true},  {110, true, true}, {100, false, true}, {100, true, false},
                            {125, true, true},  {85, true, true},  {110, false, true}, {70, true, true},
                            {125, false, true}, {150, true, true}};
constexpr size_t FEW_SEGMENTS = 2000;  // segments looked at in all trials but the first
constexpr int64_t NEAR = 50;           // no more trials if not more than 1 / NEAR can be gained

class Planner {
public:
    Planner(const Layout& layout, const PlanOptions& options) : work(layout, options), search(work) {}

    std::vector<int32_t> run() {
        work.enforce_cap();
        if (work.options.invariant) try_each_tree();
        else try_all();
        return serialize(work);
    }

private:
    struct Outcome {
        int64_t time = INT64_MAX, last_time = 0;  // the least on the way, and in the end
        int32_t cuts = 0, all_cuts = 0;           // how many led there, how many were made
    };

    WorkItems work;
    CutSearch search;

    // Every root tree as if it were alone.
    void try_each_tree() {
        std::vector<WorkItem> trees, all;
        trees.swap(work.items);
        for (WorkItem& tree : trees) {
            work.sum = tree.cost;
            work.partials = tree.partial ? tree.rows() : 0;
            work.items.clear();
            work.items.push_back(std::move(tree));
            try_all();
            std::move(work.items.begin(), work.items.end(), std::back_inserter(all));
        }
        work.items = std::move(all);
    }

    void try_all() {
        const ItemsState whole = work;
        const auto restore = [&] { static_cast<ItemsState&>(work) = whole; };
        const int64_t even = work.price.spread(whole.sum);
        std::vector<WorkItem> best;
        int64_t best_time = INT64_MAX;
        size_t segments = 0;
        for (const WorkItem& item : work.items) segments += item.segments.size();
        size_t looked_at = 0;
        for (const Trial& trial : TRIALS) {
            if (looked_at) restore();
            const Outcome got = cut_all(trial, INT32_MAX);
            if (got.time < best_time) {
                if (got.last_time - got.time > got.time / NEAR) {
                    restore();
                    cut_all(trial, got.cuts);
                }
                best_time = got.time;
                best = std::move(work.items);
            }
            looked_at += segments;
            if (looked_at > FEW_SEGMENTS || best_time <= even + even / NEAR ||
                best_time <= work.options.cost_model.grain)
                break;
        }
        work.items = std::move(best);
    }

    // Makes at most `max_cuts` cuts, beyond those that must be.
    Outcome cut_all(const Trial& trial, int32_t max_cuts) {
        using Entry = std::pair<int64_t, int64_t>;  // cost, -index
        std::priority_queue<Entry> queue;
        std::vector<size_t> wide;
        const auto push = [&](size_t i) {
            if (too_wide(work.items[i])) wide.push_back(i);
            else queue.push({work.items[i].cost, -int64_t(i)});
        };
        for (size_t i = 0; i < work.items.size(); ++i) push(i);
        Outcome got;
        while (!wide.empty() || !queue.empty()) {
            const bool forced = !wide.empty();
            if (!forced) {
                got.last_time = std::max(work.price.spread(work.sum), work.price.alone(queue.top().first));
                if (got.last_time < got.time) {
                    got.time = got.last_time;
                    got.cuts = got.all_cuts;
                }
                if (got.all_cuts == max_cuts) break;
            }
            const size_t i = forced ? wide.back() : size_t(-queue.top().second);
            if (forced) wide.pop_back();
            else queue.pop();
            const WorkItem& item = work.items[i];
            const int64_t limit = item_limit(trial);
            if (!forced && item.cost <= limit) break;
            const int64_t parts = std::max<int64_t>(2, ceil_div(item.cost, limit));
            Cut cut;
            if (trial.rows || forced) search.by_rows(item, parts, cut);
            if (trial.tokens && !forced) search.by_tokens(item, parts, cut);
            if (!cut.found() || (!forced && cut.time >= work.price.alone(item.cost))) {
                break;  // the costliest cannot be helped
            }
            const size_t before = work.items.size();
            if (cut.row >= 0) work.cut_rows(i, cut.row);
            else work.cut_tokens(i, cut.segment, cut.offset);
            got.all_cuts += !forced;
            push(i);
            if (work.items.size() > before) push(before);
        }
        return got;
    }

    bool too_wide(const WorkItem& item) const {
        return item.rows() > 1 && item.rows() * work.price.group > work.options.cost_model.max_lanes;
    }

    // What an item should cost at most, per KV head.
    int64_t item_limit(const Trial& trial) const {
        const int64_t share = work.price.spread(work.sum) / 100 * trial.percent;
        return std::max<int64_t>(1, std::max(share, work.options.cost_model.grain) / work.price.alone(1));
    }
};

}  // namespace

std::vector<int32_t> plan(const Layout& layout, const PlanOptions& options) { return Planner(layout, options).run(); }

}  // namespace forktree
