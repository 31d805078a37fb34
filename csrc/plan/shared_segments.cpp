#include "plan/shared_segments.hpp"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

namespace forktree {
namespace {

constexpr int32_t NONE = -1;

// Children and path ends hang from a node at an offset. They are visited by descending offset, so that those that see a
// given token of the node come first: a depth-first walk then numbers the readers of every segment consecutively.
class Traversal {
public:
    explicit Traversal(const Layout& layout) : l(layout), tail(layout.nodes, LIVE), used(layout.nodes, false) {
        for (int64_t c = 0; c < l.contexts; ++c) {
            if (!rows(c)) continue;
            const int64_t last = l.path_indptr[c + 1] - 1;
            if (partially_visible(c)) {
                int32_t& at = tail[l.path_node[last]];
                at = std::min(at, tip_len(c) - rows(c));
            }
            for (int64_t p = l.path_indptr[c]; p <= last; ++p) {
                paths.push_back({int32_t(p), int32_t(c), p == last});
                if (p != last || l.path_top[p] >= 0) joins = true;
            }
        }
        for (const Path& path : paths)
            for (int32_t v = l.path_node[path.path]; v >= 0 && !used[v]; v = l.node_parent[v]) used[v] = true;
        sort_children();
        order_roots();
    }

    SharedSegments run() {
        rank.reserve(paths.size());
        for (size_t i = 0; i < roots.size(); ++i) {
            descend(roots[i]);
            if (i + 1 == roots.size() || tree[i + 1] != tree[i]) out.tree_end.push_back(int32_t(found.size()));
        }
        if (joins) {
            gather_runs();
        } else {
            for (int32_t p : rank) contexts.push_back(paths[p].context);
        }
        number_rows();
        emit();
        return std::move(out);
    }

private:
    struct Path {
        int32_t path, context;
        bool last;
    };
    struct Frame {
        int32_t node, child,
            next_end;  // next_end: the segment whose readers end where children of a lower offset begin
    };

    int32_t rows(int64_t c) const { return l.row_indptr[c + 1] - l.row_indptr[c]; }
    bool masked(int64_t c) const { return l.mask_indptr && l.mask_indptr[c + 1] > l.mask_indptr[c]; }
    bool partially_visible(int64_t c) const { return (l.causal[c] && rows(c) > 1) || masked(c); }
    int32_t tip_len(int64_t c) const {
        const int64_t last = l.path_indptr[c + 1] - 1;
        return std::min(l.path_stop[last], l.node_len[l.path_node[last]]);
    }
    int32_t offset(int64_t child) const { return LIVE - int32_t(children[child] >> 32); }

    void sort_children() {
        begin.assign(l.nodes + 1, 0);
        const auto each = [&](auto take) {
            for (int32_t v = 0; v < l.nodes; ++v)
                if (used[v] && l.node_parent[v] >= 0) take(l.node_parent[v], l.node_fork[v], uint32_t(v));
            for (size_t p = 0; p < paths.size(); ++p) {
                const Path& path = paths[p];
                const int32_t node = l.path_node[path.path];
                const bool fixed =
                    path.last && partially_visible(path.context);  // chunks and drafts are planned as they are now
                const int32_t stop = l.path_stop[path.path];
                take(node, fixed ? std::min(stop, l.node_len[node]) : stop, uint32_t(l.nodes + p));
            }
        };
        each([&](int32_t node, int32_t, uint32_t) { ++begin[node + 1]; });
        std::partial_sum(begin.begin(), begin.end(), begin.begin());
        children.resize(begin.back());
        std::vector<int32_t> at(begin.begin(), begin.end() - 1);
        each([&](int32_t node, int32_t from, uint32_t child) {
            children[at[node]++] = int64_t(LIVE - from) << 32 | child;
        });
        for (int64_t v = 0; v < l.nodes; ++v)
            if (begin[v + 1] - begin[v] > 1) std::sort(children.begin() + begin[v], children.begin() + begin[v + 1]);
    }

    // Roots, trees that joins connect next to one another.
    void order_roots() {
        std::vector<int32_t> number(l.nodes, NONE);
        for (int32_t v = 0; v < l.nodes; ++v) {
            if (!used[v] || l.node_parent[v] >= 0) continue;
            number[v] = int32_t(roots.size());
            roots.push_back(v);
        }
        tree.resize(roots.size());
        std::iota(tree.begin(), tree.end(), 0);
        if (!joins) return;
        const auto find = [&](int32_t i) {
            while (tree[i] != i) i = tree[i] = tree[tree[i]];
            return i;
        };
        std::vector<int32_t> up(l.nodes, NONE);  // some ancestor, in the end the root
        const auto root_of = [&](int32_t v) {
            int32_t root = v;
            while (l.node_parent[root] >= 0) root = up[root] >= 0 ? up[root] : l.node_parent[root];
            while (v != root) {
                const int32_t next = up[v] >= 0 ? up[v] : l.node_parent[v];
                up[v] = root;
                v = next;
            }
            return number[root];
        };
        for (size_t p = 1; p < paths.size(); ++p) {
            if (paths[p].context != paths[p - 1].context) continue;
            const int32_t a = find(root_of(l.path_node[paths[p].path]));
            const int32_t b = find(root_of(l.path_node[paths[p - 1].path]));
            tree[std::max(a, b)] = std::min(a, b);
        }
        std::vector<std::pair<int32_t, int32_t>> order;
        for (size_t i = 0; i < roots.size(); ++i) order.push_back({find(int32_t(i)), roots[i]});
        std::sort(order.begin(), order.end());
        for (size_t i = 0; i < roots.size(); ++i) std::tie(tree[i], roots[i]) = order[i];
    }

    // Finds the segments below a root; lo and hi number paths.
    void descend(int32_t root) {
        enter(root);
        while (!stack.empty()) {
            Frame& frame = stack.back();
            const int32_t first = begin[frame.node], end = begin[frame.node + 1];
            if (frame.child > first && (frame.child == end || offset(frame.child) != offset(frame.child - 1)) &&
                frame.next_end >= 0 && found[frame.next_end].node == frame.node)
                found[frame.next_end--].hi = int32_t(rank.size());
            if (frame.child == end) {
                stack.pop_back();
                continue;
            }
            const uint32_t child = uint32_t(children[frame.child++]);
            if (child < l.nodes) enter(int32_t(child));  // `frame` is gone
            else rank.push_back(int32_t(child - l.nodes));
        }
    }

    void enter(int32_t node) {
        int32_t start = 0;
        for (int32_t k = begin[node + 1]; k-- > begin[node];) {
            if (offset(k) == start) continue;
            found.push_back({node, start, offset(k), int32_t(rank.size()), 0, false});
            start = offset(k);
        }
        stack.push_back({node, begin[node], int32_t(found.size()) - 1});
    }

    // Nodes above, plus 1; remembered in `depth`.
    int32_t depth_of(int32_t node, std::vector<int32_t>& depth) const {
        int32_t steps = 0, v = node;
        for (; v >= 0 && !depth[v]; v = l.node_parent[v]) ++steps;
        int32_t result = steps + (v >= 0 ? depth[v] : 0);
        for (v = node; v >= 0 && !depth[v]; v = l.node_parent[v]) depth[v] = result--;
        return depth[node];
    }

    // A joining context stands where its last path does, so readers of a segment may lie apart: one run each.
    void gather_runs() {
        std::vector<int32_t> place(l.contexts, NONE), depth(l.nodes, 0);
        for (int32_t p : rank) {
            if (!paths[p].last) continue;
            place[paths[p].context] = int32_t(contexts.size());
            contexts.push_back(paths[p].context);
        }
        std::vector<SharedSegment> runs;
        std::vector<int32_t> at;
        std::vector<int32_t> tree_end;
        size_t next_tree = 0;
        for (size_t i = 0; i < found.size(); ++i) {
            const SharedSegment& s = found[i];
            while (next_tree < out.tree_end.size() && out.tree_end[next_tree] <= int32_t(i)) {
                tree_end.push_back(int32_t(runs.size()));
                ++next_tree;
            }
            at.clear();
            for (int32_t r = s.lo; r < s.hi; ++r) {
                const Path& path = paths[rank[r]];
                const int32_t top = l.path_top[path.path];
                if (top < 0 || depth_of(s.node, depth) > depth_of(top, depth)) at.push_back(place[path.context]);
            }
            std::sort(at.begin(), at.end());
            for (size_t j = 0; j < at.size(); ++j) {
                if (j && at[j] == at[j - 1])
                    throw std::invalid_argument("paths of context " + std::to_string(contexts[at[j]]) +
                                                " must not share tokens, got node " + std::to_string(s.node) + " [" +
                                                std::to_string(s.start) + ", " + std::to_string(s.stop) +
                                                ") in two of them");
                if (j && at[j] == at[j - 1] + 1) runs.back().hi = at[j] + 1;
                else runs.push_back({s.node, s.start, s.stop, at[j], at[j] + 1, false});
            }
        }
        while (next_tree++ < out.tree_end.size()) tree_end.push_back(int32_t(runs.size()));
        found = std::move(runs);
        out.tree_end = std::move(tree_end);
    }

    void number_rows() {
        row_begin.push_back(0);
        out.row.reserve(l.rows);
        out.context_begin.reserve(l.rows);
        for (int32_t c : contexts) {
            const int32_t n = rows(c), words = (n + 31) / 32;
            const bool differs = partially_visible(c);
            const int32_t tip = differs ? l.path_node[l.path_indptr[c + 1] - 1] : NONE;
            const int32_t tail = differs ? tip_len(c) - n : 0;
            for (int32_t i = 0; i < n; ++i) {
                const int32_t row = l.row_indptr[c] + i;
                const int32_t last = !differs ? LIVE : tail + (l.causal[c] ? i : n - 1);
                const int32_t mask = masked(c) ? l.mask_indptr[c] + i * words : NONE;
                out.row.push_back({row, l.row_token[row], tip, tail, last, mask});
                out.context_begin.push_back(row_begin.back());
            }
            row_begin.push_back(row_begin.back() + n);
        }
    }

    // From places of contexts to plan rows; cut where rows of a chunk or draft begin to see different parts.
    void emit() {
        size_t next_tree = 0;
        std::vector<int32_t> tree_end;
        out.segment.reserve(found.size());
        for (size_t i = 0; i <= found.size(); ++i) {
            for (; next_tree < out.tree_end.size() && out.tree_end[next_tree] == int32_t(i); ++next_tree)
                tree_end.push_back(int32_t(out.segment.size()));
            if (i == found.size()) break;
            SharedSegment s = found[i];
            s.lo = row_begin[s.lo];
            s.hi = row_begin[s.hi];
            const int32_t cut = tail[s.node];
            if (s.start < cut && cut < s.stop) {
                out.segment.push_back({s.node, s.start, cut, s.lo, s.hi, false});
                s.start = cut;
            }
            s.partially_visible = s.start >= cut;
            out.segment.push_back(s);
        }
        out.tree_end = std::move(tree_end);
    }

    const Layout& l;
    std::vector<int32_t> tail;  // of each node: the offset from which rows of some context may see it differently
    std::vector<char> used;
    std::vector<Path> paths;  // of contexts with rows
    bool joins = false;
    std::vector<int32_t> begin;     // [N+1] of each node's children
    std::vector<int64_t> children;  // (LIVE - offset, node or N + path), ascending for each node
    std::vector<int32_t> roots, tree;
    std::vector<Frame> stack;
    std::vector<SharedSegment> found;
    std::vector<int32_t> rank;  // paths, depth-first
    std::vector<int32_t> contexts, row_begin;
    SharedSegments out;
};

}  // namespace

SharedSegments shared_segments(const Layout& layout) { return Traversal(layout).run(); }

}  // namespace forktree
