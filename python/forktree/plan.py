"""The plan: a layout turned into work items, so that tokens seen by the same rows are read once for them.

    item [W, 5]  row_begin, row_end, seg_begin, seg_end, first partial or -1 (writes the output itself)
    seg  [Q, 8]  index_begin, start, stop or LIVE, node, row_lo, row_hi, pos, contiguous
    merge        CSR: output token -> partials, in path order

Rows are numbered in plan order: contexts depth-first over the tree, so that the readers of every stretch of a
node are consecutive. Segment tokens are offsets o in [start, stop) of a node: slot `slot_index[index_begin +
o]`, position `pos + o`, for rows [row_lo, row_hi). Row r of an item has partial `first + r - row_begin`; an
item has none if no token of its rows has anything to merge. What rows of one item see differently (causal,
mask, window) is not in the plan: executors take it from the layout.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from forktree.layout import Array, IntArray, TreeLayout, ranges

LIVE = TreeLayout.ALL  # stop of a segment that ends where its node does, also after growing
LONG = 512  # tokens from which a segment is an item of its own, which can be read in place
THIN = 16  # fewer shared tokens are read again by every context: cheaper than a partial for each row

ROW_BEGIN, ROW_END, SEG_BEGIN, SEG_END, PARTIAL = range(5)
INDEX_BEGIN, START, STOP, NODE, ROW_LO, ROW_HI, POS, CONTIGUOUS = range(8)


@dataclass(frozen=True)
class PlanStats:
    """Counts of one layer; bytes are those of K and V of all KV heads, both of head_dim elements."""

    distinct_tokens: int  # tokens any row sees
    distinct_bytes: int
    planned_tokens: int  # tokens read, again and again if by several items
    planned_bytes: int
    attended: int  # (row, token) pairs that count
    computed: int  # (row, token) pairs the items span: attended plus what masks hide
    partials: int  # rows of partials written and merged


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    layout: TreeLayout
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    device: str
    window: int | None
    item: IntArray  # [W, 5]
    seg: IntArray  # [Q, 8]
    merge_indptr: IntArray  # [T+1]
    merge_partial: IntArray  # [P]
    row_order: IntArray  # [R'] layout row of each plan row
    cache: dict[Any, Any] = field(default_factory=dict, repr=False)  # what backends prepare once a plan

    @property
    def num_partials(self) -> int:
        return self.merge_partial.size

    @cached_property
    def seg_stop(self) -> IntArray:
        """[Q] where segments end now."""
        return np.minimum(self.seg[:, STOP], self.layout.node_len[self.seg[:, NODE]])

    @cached_property
    def seg_tokens(self) -> IntArray:
        """[Q] tokens of each segment now."""
        tokens: IntArray = np.maximum(self.seg_stop - self.seg[:, START], 0)
        return tokens

    def grow(self, node_len: Any, row_pos: Any, slot_index: Any = None) -> AttentionPlan:
        """The same plan after tips grew and their rows moved on, see `TreeLayout.grown`."""
        layout = self.layout.grown(node_len, row_pos, slot_index)
        grew = layout.node_len > self.layout.node_len
        fixed = self.layout.tip[self.layout.uneven]
        if grew[fixed].any():
            node = int(fixed[np.argmax(grew[fixed])])
            raise ValueError(
                f"node {node} must keep its {self.layout.node_len[node]} tokens, as it is the tip of a "
                f"causal or masked context of several rows, got {layout.node_len[node]}: plan anew"
            )
        return replace(self, layout=layout, cache={})

    def stats(self, itemsize: int = 2) -> PlanStats:
        """Itemsize: bytes of one element of K or V."""
        seg, tokens = self.seg, self.seg_tokens.astype(np.int64)
        read = ranges(seg[:, INDEX_BEGIN] + seg[:, START], tokens)
        distinct, planned = np.unique(read).size, read.size
        size = 2 * self.num_kv_heads * self.head_dim * itemsize
        computed = int(((seg[:, ROW_HI] - seg[:, ROW_LO]) * tokens).sum())
        rows = range(self.layout.num_rows)
        attended = sum(self.layout.visible(row, self.window)[0].size for row in rows)
        return PlanStats(distinct, distinct * size, planned, planned * size, attended, computed, self.num_partials)


def plan(
    layout: TreeLayout,
    *,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    device: str = "cpu",
    window: int | None = None,
) -> AttentionPlan:
    """Decides who reads which tokens together, for all layers of one head shape and window."""
    for name, value in (
        ("num_qo_heads", num_qo_heads),
        ("num_kv_heads", num_kv_heads),
        ("head_dim", head_dim),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if num_qo_heads % num_kv_heads:
        raise ValueError(f"num_qo_heads must be a multiple of num_kv_heads, got {num_qo_heads} and {num_kv_heads}")
    if window is not None and not 1 <= window < 2**31:
        raise ValueError(f"window must be in [1, 2**31) or None, got {window}")

    contexts, node, start, stop, lo, hi = _stretches(layout)
    rows = layout.context_rows[contexts]
    row_end = np.append(0, np.cumsum(rows))
    row_order = ranges(layout.row_indptr[contexts], rows)

    node, start, stop, lo, hi = _cut_at_uneven_tails(layout, node, start, stop, lo, hi)
    if window is not None and node.size:
        first = _lowest(layout.row_pos[row_order], row_end[lo], row_end[hi])
        start = np.maximum(start, first - window + 1 - layout.node_pos[node])
        node, start, stop, lo, hi = (x[start < stop] for x in (node, start, stop, lo, hi))
    node, start, stop, lo, hi = _fold_thin(layout, node, start, stop, lo, hi)

    # One item a group of rows; long segments have items of their own.
    tokens = np.minimum(stop, layout.node_len[node]) - start
    alone = np.where(tokens >= LONG, 1 + np.arange(node.size), 0)
    pos = layout.node_pos[node] + start
    order = np.lexsort((pos, alone, hi, lo))
    node, start, stop, lo, hi, alone, pos = (x[order] for x in (node, start, stop, lo, hi, alone, pos))
    seg_end = 1 + np.flatnonzero(_last_of_runs(lo) | _last_of_runs(hi) | _last_of_runs(alone))
    seg_begin = np.append(0, seg_end)[:-1]

    # Items in path order: partials of a token then are too.
    order = np.argsort(pos[seg_begin], kind="stable")
    count = (seg_end - seg_begin)[order]
    segs = ranges(seg_begin[order], count)
    node, start, stop, lo, hi = (x[segs] for x in (node, start, stop, lo, hi))
    seg_end = np.cumsum(count)
    seg_begin = seg_end - count
    item_rows = np.stack([row_end[lo[seg_begin]], row_end[hi[seg_begin]]], 1)
    partial, merge_indptr, merge_partial = _merges(layout, row_order, item_rows)

    begin = layout.node_begin[node]
    return AttentionPlan(
        layout,
        num_qo_heads,
        num_kv_heads,
        head_dim,
        str(device),
        window,
        item=_int32(item_rows[:, 0], item_rows[:, 1], seg_begin, seg_end, partial),
        seg=_int32(
            begin,
            start,
            stop,
            node,
            row_end[lo],
            row_end[hi],
            layout.node_pos[node],
            _contiguous(layout.slot_index, begin + start, begin + stop, stop != LIVE),
        ),
        merge_indptr=merge_indptr.astype(np.int32),
        merge_partial=merge_partial.astype(np.int32),
        row_order=row_order.astype(np.int32),
    )


def _stretches(layout: TreeLayout) -> tuple[Array, ...]:
    """Contexts in depth-first order, and all stretches of nodes seen by the same contexts.

    Returns contexts [C'] (those with rows) and node, start, stop, lo, hi [Q]: contexts[lo:hi] see [start,
    stop) of node. Nodes and path ends hang from their parent node at an offset; ordered by falling offset,
    those who see a given token of the parent come first.
    """
    n = layout.num_nodes
    context = np.repeat(np.arange(layout.num_contexts), np.diff(layout.path_indptr))
    paths = np.flatnonzero(layout.context_rows[context] > 0)
    context, leaf_node, leaf_stop = context[paths], layout.path_node[paths], layout.path_stop[paths]
    is_last = _last_of_runs(context)
    fixed = layout.uneven[context] & is_last  # chunks and drafts are planned as they are now
    leaf_stop = np.where(fixed, np.minimum(leaf_stop, layout.node_len[leaf_node]), leaf_stop)

    # How many paths come through each node: sums over subtrees by pointer doubling, `n` standing for no node.
    parent = np.append(np.where(layout.node_parent < 0, n, layout.node_parent), n)
    size = np.bincount(leaf_node, minlength=n + 1)
    up = parent
    while (up < n).any():
        size[:n] += np.bincount(up[:n], size[:n], n + 1)[:n].astype(np.int64)
        up = up[up]

    nodes = np.flatnonzero(size[:n] > 0)
    hangs_from = np.concatenate([parent[nodes], leaf_node]).astype(np.int64)
    offset = np.concatenate([layout.node_fork[nodes], leaf_stop]).astype(np.int64)
    key = (hangs_from << 32) + (LIVE - offset) * (hangs_from < n)
    order = np.argsort(key, kind="stable")
    key, hangs_from, offset = key[order], hangs_from[order], offset[order]
    end = np.cumsum(np.concatenate([size[nodes], np.ones_like(paths)])[order])
    first = np.searchsorted(hangs_from, hangs_from)  # of its siblings
    before = np.append(0, end)[first]  # paths in order before the siblings
    end_of_kin = end - before
    begin = np.empty_like(end)
    begin[order] = np.append(0, end)[:-1] - before  # among siblings, unsorted

    # Where each node's paths begin: sums along the way to the root.
    where = np.zeros(n + 1, np.int64)
    where[nodes] = begin[: nodes.size]
    up = parent
    while (up < n).any():
        where += where[up]
        up = up[up]
    rank = where[leaf_node] + begin[nodes.size :]

    last = _last_of_runs(key) & (hangs_from < n)
    node, stop, hi = hangs_from[last], offset[last], end_of_kin[last]
    start = np.where(_last_of_runs(node), 0, np.append(stop, 0)[1:])
    lo = where[node]
    hi = lo + hi
    node, start, stop, lo, hi = (x[stop > start] for x in (node, start, stop, lo, hi))

    by_rank = np.argsort(rank)
    tops = layout.path_top[paths]
    if is_last.all() and (tops < 0).all():
        return context[by_rank], node, start, stop, lo, hi

    # Joins: a context's place is that of its last path, so readers of a stretch may lie apart.
    contexts = context[is_last][np.argsort(rank[is_last])]
    place = np.empty(layout.num_contexts, np.int64)
    place[contexts] = np.arange(contexts.size)
    stretch = np.repeat(np.arange(node.size), hi - lo)
    reader = by_rank[ranges(lo, hi - lo)]
    depth = layout.node_depth
    below_top = depth[node[stretch]] > depth[tops[reader]]
    stretch, at = stretch[below_top], place[context[reader[below_top]]]
    order = np.lexsort((at, stretch))
    stretch, at = stretch[order], at[order]
    same = stretch[1:] == stretch[:-1]
    if (twice := same & (at[1:] == at[:-1])).any():
        i = int(np.argmax(twice))
        raise ValueError(
            f"paths of context {contexts[at[i]]} must not share tokens, got node {node[stretch[i]]} "
            f"[{start[stretch[i]]}, {stop[stretch[i]]}) in two of them"
        )
    ends = np.flatnonzero(_last_of_runs(stretch) | _last_of_runs(at - np.arange(at.size)))
    begins = np.append(0, ends + 1)[:-1]
    stretch = stretch[ends]
    return contexts, node[stretch], start[stretch], stop[stretch], at[begins], at[ends] + 1


def _cut_at_uneven_tails(
    layout: TreeLayout, node: Array, start: Array, stop: Array, lo: Array, hi: Array
) -> tuple[Array, ...]:
    """Cuts stretches where rows of a chunk or draft begin to differ: only what lies behind needs a mask."""
    if not layout.uneven.any():
        return node, start, stop, lo, hi
    tail = uneven_tails(layout)[node]
    cut = (start < tail) & (tail < stop)
    twice = np.repeat(np.arange(node.size), 1 + cut)
    second = np.append(False, ~_last_of_runs(twice))[:-1]
    first = np.append(second, False)[1:]
    start = np.where(second, tail[twice], start[twice])
    stop = np.where(first, tail[twice], stop[twice])
    return node[twice], start, stop, lo[twice], hi[twice]


def uneven_tails(layout: TreeLayout) -> Array:
    """[N] offset from which rows of some context may see a node differently (LIVE: nowhere)."""
    tail = np.full(layout.num_nodes, LIVE, np.int64)
    at = np.flatnonzero(layout.uneven)
    np.minimum.at(tail, layout.tip[at], layout.tip_len[at] - layout.context_rows[at])
    return tail


def _fold_thin(layout: TreeLayout, node: Array, start: Array, stop: Array, lo: Array, hi: Array) -> tuple[Array, ...]:
    """Splits stretches of a few tokens into one for each of their contexts."""
    thin = (np.minimum(stop, layout.node_len[node]) - start < THIN) & (hi - lo > 1)
    copies = np.where(thin, hi - lo, 1)
    source = np.repeat(np.arange(node.size), copies)
    split = thin[source]
    lo = np.where(split, ranges(lo, copies), lo[source])
    hi = np.where(split, lo + 1, hi[source])
    return node[source], start[source], stop[source], lo, hi


def _merges(layout: TreeLayout, row_order: Array, item_rows: Array) -> tuple[Array, Array, Array]:
    """First partial of each item [W] or -1, and the merge lists. A token's only partial is its output."""
    rows = item_rows[:, 1] - item_rows[:, 0]
    item = np.repeat(np.arange(rows.size), rows)
    token = layout.row_token[row_order[ranges(item_rows[:, 0], rows)]]
    count = np.bincount(token, minlength=layout.num_tokens)
    merges = np.bincount(item, count[token] > 1, rows.size) > 0
    end = np.cumsum(rows * merges)
    partial = np.where(merges, end - rows, -1)
    token = token[merges[item]]
    indptr = np.append(0, np.cumsum(np.bincount(token, minlength=layout.num_tokens)))
    return partial, indptr, np.argsort(token, kind="stable")


def _last_of_runs(values: Array) -> Array:
    """Whether an entry differs from the next one."""
    return np.append(values[1:] != values[:-1], True)[: values.size]


def _lowest(values: Array, begin: Array, end: Array) -> Array:
    """Minimum of values[begin:end] for each pair; none is empty."""
    lowest: Array = np.minimum.reduceat(np.append(values, LIVE), np.stack([begin, end], 1).ravel())[::2]
    return lowest


def _contiguous(slot_index: Array, begin: Array, end: Array, fixed: Array) -> Array:
    """Whether slots are consecutive numbers; never claimed of segments that grow."""
    breaks = np.append(0, np.cumsum(np.diff(slot_index) != 1))
    whole: Array = breaks[np.where(fixed, begin, 0)] == breaks[np.where(fixed, end - 1, 0)]
    return whole & fixed


def _int32(*columns: Array) -> IntArray:
    return np.stack(columns, 1).astype(np.int32)


def check_plan(plan: AttentionPlan) -> None:
    """Raises ValueError unless every visible (row, token) is covered exactly once and merge lists are right.

    Slow and independent of how plans are made: rows are taken one by one from `TreeLayout.visible`.
    """
    layout, item, seg = plan.layout, plan.item, plan.seg
    if not np.array_equal(np.sort(plan.row_order), np.arange(layout.num_rows)):
        raise ValueError("row_order must be a permutation of all rows")
    if not (np.array_equal(item[1:, SEG_BEGIN], item[:-1, SEG_END]) and item[-1:, SEG_END].sum() == len(seg)):
        raise ValueError("items must own all segments, one after the other")
    partials: list[list[int]] = [[] for _ in range(layout.num_tokens)]
    covered: list[list[Array]] = [[] for _ in range(layout.num_rows)]
    direct = np.zeros(layout.num_tokens, np.int64)
    for w, (row_begin, row_end, seg_begin, seg_end, partial) in enumerate(item.tolist()):
        if not 0 <= row_begin < row_end <= layout.num_rows:
            raise ValueError(f"item {w} must have rows within [0, {layout.num_rows}), got [{row_begin}, {row_end})")
        for r in range(row_begin, row_end):
            token = layout.row_token[plan.row_order[r]]
            if partial < 0:
                direct[token] += 1
            else:
                partials[token].append(partial + r - row_begin)
        for q in range(seg_begin, seg_end):
            index_begin, start, stop, node, lo, hi, pos, contiguous = seg[q].tolist()
            if index_begin != layout.node_begin[node] or pos != layout.node_pos[node]:
                raise ValueError(
                    f"segment {q} must have index_begin {layout.node_begin[node]} and pos "
                    f"{layout.node_pos[node]} of node {node}, got {index_begin} and {pos}"
                )
            if not row_begin <= lo < hi <= row_end:
                raise ValueError(f"segment {q} must have rows within [{row_begin}, {row_end}), got [{lo}, {hi})")
            length = int(layout.node_len[node])
            if start < 0 or (stop != LIVE and stop > length):
                raise ValueError(f"segment {q} must lie within node {node} of {length} tokens, got [{start}, {stop})")
            index = index_begin + np.arange(start, min(stop, length))
            if contiguous and (stop == LIVE or (np.diff(layout.slot_index[index]) != 1).any()):
                raise ValueError(f"segment {q} must not be contiguous: its slots are not, or it grows")
            for r in range(lo, hi):
                covered[plan.row_order[r]].append(index)

    for row in range(layout.num_rows):
        context = int(np.searchsorted(layout.row_indptr, row, side="right")) - 1
        tokens, count = np.unique(np.concatenate([[], *covered[row]]), return_counts=True)
        if (count > 1).any():
            raise ValueError(
                f"row {row} must read a token once, got {count.max()} times for index {tokens[np.argmax(count)]:.0f}"
            )
        missing = np.setdiff1d(layout.visible(row, plan.window)[0], tokens)
        if missing.size:
            raise ValueError(f"row {row} must read all it sees, got nothing for indices {missing}")
        reach = [layout.node_begin[node] + np.arange(stop) for node, stop, _ in layout.walk(context)]
        beyond = np.setdiff1d(tokens, np.concatenate(reach))
        if beyond.size:
            raise ValueError(f"row {row} must not read beyond its context, got indices {beyond}")

    indptr = plan.merge_indptr
    if indptr.size != layout.num_tokens + 1 or indptr[0] != 0 or indptr[-1] != plan.merge_partial.size:
        raise ValueError(
            f"merge_indptr must have {layout.num_tokens + 1} entries from 0 to {plan.merge_partial.size}, got {indptr}"
        )
    for token, expected in enumerate(partials):
        got = plan.merge_partial[indptr[token] : indptr[token + 1]].tolist()
        if got != expected:
            raise ValueError(f"merge list of token {token} must be {expected}, got {got}")
        if direct[token] + (len(expected) > 0) > 1:
            raise ValueError(
                f"token {token} must be written once, got {direct[token]} direct items and {len(expected)} partials"
            )
    ids = np.sort(plan.merge_partial)
    if not np.array_equal(ids, np.arange(ids.size)):
        raise ValueError(f"merge_partial must name each partial once, got {ids}")
