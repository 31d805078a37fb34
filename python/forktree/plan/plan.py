"""The plan: a layout turned into work items, so that tokens seen by the same rows are read once for them.

    item [W, 5]  row_begin, row_end, seg_begin, seg_end, first partial or -1 (writes the output itself)
    seg  [Q, 8]  index_begin, start, stop or LIVE, node, row_lo, row_hi, pos, contiguous
    row  [R, 6]  row of the layout, token, tip, tail, last, mask
    merge        CSR: output token -> partials, in path order
    empty_tokens [Z]  output tokens that no item writes and nothing is merged for

Rows are numbered in plan order: contexts depth-first over the tree, so that the readers of every stretch of a
node are consecutive. An item is a range of rows (a subtree of queries) that walks its segments, top first. A
segment is the tokens at offsets o in [start, stop) of a node, slot `slot_index[index_begin + o]`, position
`pos + o`, and concerns rows [row_lo, row_hi) of its item only. Such a row sees o if the window lets it and
    node != tip  or  o < tail  or  (o <= last and (mask < 0 or bit o - tail from word `mask` on is set)).
Row r of an item has partial `first + r - row_begin`; an item has none if no token of its rows has anything to
merge. Rows no segment concerns, or that see nothing of theirs, come to nothing: (0, -inf).

At first a root tree is one item (joins make several trees one). The planner (`csrc/plan.cpp`) cuts the
costliest item in two until all cost less than their share, choosing what makes the predicted time least:
- by rows: what rows on both sides see is read again, from cache;
- by tokens: rows that see tokens on both sides write partials, to be merged.
The predicted time is that of all items spread over `CostModel.units`, or that of the longest one if that is more.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from forktree import _core
from forktree.plan.cost_model import CostModel, cost_model_for
from forktree.plan.layout import Array, IntArray, TreeLayout, ranges

LIVE = TreeLayout.ALL  # stop of a segment that ends where its node does, also after growing

ROW_BEGIN, ROW_END, SEG_BEGIN, SEG_END, PARTIAL = range(5)
INDEX_BEGIN, START, STOP, NODE, ROW_LO, ROW_HI, POS, CONTIGUOUS = range(8)
ROW, TOKEN, TIP, TAIL, LAST, MASK = range(6)
HEADER = 16
CLEARS = 13  # of the header


@dataclass(frozen=True)
class PlanStats:
    """Counts of one layer; bytes are those of K and V of all KV heads, both of head_dim elements."""

    distinct_tokens: int  # tokens any row sees
    distinct_bytes: int
    planned_tokens: int  # tokens read, again and again if by several items
    planned_bytes: int
    attended: int  # (row, token) pairs that count
    computed: int  # (row, token) pairs the segments span: attended plus what masks hide
    partials: int  # rows of partials written and merged
    partial_bytes: int
    padding: float  # packed (row, token) pairs computed, lanes filled up, for one attended
    imbalance: float  # the longest piece of work over an even share of all, if above 1
    predicted: float  # microseconds


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    layout: TreeLayout
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    device: str
    window: int | None
    cost_model: CostModel
    buffer: IntArray  # all of it, as `csrc/plan_view.hpp` says; the arrays below are views of it
    item: IntArray  # [W, 5]
    seg: IntArray  # [Q, 8]
    merge_indptr: IntArray  # [T+1]
    merge_partial: IntArray  # [P]
    empty_tokens: IntArray  # [Z]
    row: IntArray  # [R, 6]
    cache: dict[Any, Any] = field(default_factory=dict, repr=False)  # what backends prepare once a plan
    before: weakref.ref[AttentionPlan] | None = field(default=None, repr=False)  # what it grew from

    @property
    def row_order(self) -> IntArray:
        """[R] layout row of each plan row."""
        return self.row[:, ROW]

    @property
    def num_partials(self) -> int:
        return self.merge_partial.size

    @cached_property
    def growing(self) -> slice:
        """Where the buffer has what growing changes: node_len [N], then row_pos [R]."""
        fixed = (self.item, self.seg, self.merge_indptr, self.merge_partial, self.empty_tokens, self.row)
        begin = HEADER + sum(x.size for x in fixed)
        return slice(begin, begin + self.layout.num_nodes + self.layout.num_rows)

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The buffer and the layout's slot_index on a device, for kernels. On a GPU they arrive asynchronously."""
        tensors: tuple[Tensor, Tensor] | None = self.cache.get(device)
        if tensors is None:
            buffer = torch.from_numpy(self.buffer)
            slots = torch.from_numpy(np.ascontiguousarray(self.layout.slot_index))
            if device.type != "cpu":
                buffer, slots = (x.pin_memory().to(device, non_blocking=True) for x in (buffer, slots))
            tensors = self.cache[device] = buffer, slots
        return tensors

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
        fixed = self.layout.tip[self.layout.partially_visible]
        if grew[fixed].any():
            node = int(fixed[np.argmax(grew[fixed])])
            raise ValueError(
                f"node {node} must keep its {self.layout.node_len[node]} tokens, as it is the tip of a "
                f"causal or masked context of several rows, got {layout.node_len[node]}: plan anew"
            )
        buffer = self.buffer.copy()
        buffer[self.growing] = np.concatenate([layout.node_len, layout.row_pos])
        return replace(self, layout=layout, buffer=buffer, cache={}, before=weakref.ref(self))

    def grew_from(self, before: AttentionPlan) -> bool:
        """Whether this is what `before.grow` returned."""
        return self.before is not None and self.before() is before

    def changes(self, before: AttentionPlan) -> tuple[IntArray, IntArray]:
        """Entries of the buffer that growing from `before` changed, and entries of slot_index that it added."""
        lens, old = self.layout.node_len, before.layout.node_len
        grew = np.flatnonzero(lens > old)
        changed = np.flatnonzero(self.buffer[self.growing] != before.buffer[self.growing]) + self.growing.start
        return changed, ranges(self.layout.node_begin[grew] + old[grew], lens[grew] - old[grew])

    def stats(self, itemsize: int = 2) -> PlanStats:
        """Itemsize: bytes of one element of K or V."""
        distinct, planned, attended, computed, padded, predicted, total, longest = _core.plan_count(
            self.buffer, self.cost_model.values
        )
        size = 2 * self.num_kv_heads * self.head_dim * itemsize
        return PlanStats(
            distinct_tokens=distinct,
            distinct_bytes=distinct * size,
            planned_tokens=planned,
            planned_bytes=planned * size,
            attended=attended,
            computed=computed,
            partials=self.num_partials,
            partial_bytes=self.num_partials * self.num_qo_heads * (self.head_dim + 2) * 4,
            padding=padded * self.num_kv_heads / max(1, attended * self.num_qo_heads),
            imbalance=max(1.0, longest * self.cost_model.units / max(1, total)),
            predicted=predicted / 1e6,
        )


def plan(
    layout: TreeLayout,
    *,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    device: Any = "cpu",
    window: int | None = None,
    cost_model: CostModel | None = None,
    max_partials: int | None = None,
    invariant: bool = False,
) -> AttentionPlan:
    """Decides who reads which tokens together, for all layers of one head shape and window.

    Args:
        device: where it will be executed.
        cost_model: what work costs; default: that of the device.
        max_partials: rows of partials there may be; tokens with several rows need one for each.
        invariant: plan each root tree as if it were alone in the step, so that a row's bits do not depend on
            strangers. Costs balance where many trees are large, nothing where there is one.
    """
    for name, value in (("num_qo_heads", num_qo_heads), ("num_kv_heads", num_kv_heads), ("head_dim", head_dim)):
        if not 1 <= value < 2**16:
            raise ValueError(f"{name} must be in [1, 65536), got {value}")
    if num_qo_heads % num_kv_heads:
        raise ValueError(f"num_qo_heads must be a multiple of num_kv_heads, got {num_qo_heads} and {num_kv_heads}")
    if window is not None and not 1 <= window < 2**31:
        raise ValueError(f"window must be in [1, 2**31) or None, got {window}")
    if max_partials is not None and max_partials < 0:
        raise ValueError(f"max_partials must be at least 0 or None, got {max_partials}")
    if cost_model is None:
        cost_model = cost_model_for(torch.device(device), layout.num_rows * num_qo_heads // num_kv_heads)
    buffer = _core.plan(
        layout.slot_index,
        layout.node_begin,
        layout.node_len,
        layout.node_parent,
        layout.node_fork,
        layout.node_pos,
        layout.row_indptr,
        layout.path_indptr,
        layout.path_node,
        layout.path_stop,
        layout.path_top,
        layout.causal,
        layout.row_token,
        layout.row_pos,
        layout.mask_indptr,
        layout.mask_bits,
        layout.num_tokens,
        num_qo_heads,
        num_kv_heads,
        head_dim,
        window or 0,
        cost_model.values,
        2**31 - 1 if max_partials is None else max_partials,
        invariant,
    )
    item, seg, merge_indptr, merge_partial, clear, row = _sections(buffer)
    return AttentionPlan(
        layout,
        num_qo_heads,
        num_kv_heads,
        head_dim,
        str(device),
        window,
        cost_model,
        buffer,
        item,
        seg,
        merge_indptr,
        merge_partial,
        clear,
        row,
    )


def _sections(buffer: IntArray) -> tuple[IntArray, IntArray, IntArray, IntArray, IntArray, IntArray]:
    """item, seg, merge_indptr, merge_partial, clear and row of a buffer."""
    rows, tokens, items, segs, _, partials = buffer[2:8].tolist()
    item_end = HEADER + 5 * items
    seg_end = item_end + 8 * segs
    indptr_end = seg_end + tokens + 1
    partial_end = indptr_end + partials
    clear_end = partial_end + int(buffer[CLEARS])
    return (
        buffer[HEADER:item_end].reshape(items, 5),
        buffer[item_end:seg_end].reshape(segs, 8),
        buffer[seg_end:indptr_end],
        buffer[indptr_end:partial_end],
        buffer[partial_end:clear_end],
        buffer[clear_end : clear_end + 6 * rows].reshape(rows, 6),
    )


def check_plan(plan: AttentionPlan) -> None:
    """Raises ValueError unless executors that follow the plan compute exactly what the layout says.

    Slow and independent of how plans are made: rows are taken one by one from `TreeLayout.visible`.
    """
    layout, item, seg, row = plan.layout, plan.item, plan.seg, plan.row
    if not np.array_equal(np.sort(plan.row_order), np.arange(layout.num_rows)):
        raise ValueError("row_order must be a permutation of all rows")
    if not np.array_equal(row[:, TOKEN], layout.row_token[plan.row_order]):
        raise ValueError(f"row must have the layout's tokens, got {row[:, TOKEN]}")
    if not (np.array_equal(item[1:, SEG_BEGIN], item[:-1, SEG_END]) and item[-1:, SEG_END].sum() == len(seg)):
        raise ValueError("items must own all segments, one after the other")
    partials: list[list[int]] = [[] for _ in range(layout.num_tokens)]
    partial_reads: dict[int, tuple[int, list[Array]]] = {}  # partial: layout row, indices
    reads: list[list[Array]] = [[] for _ in range(layout.num_rows)]
    direct = np.zeros(layout.num_tokens, np.int64)
    for w, (row_begin, row_end, seg_begin, seg_end, partial) in enumerate(item.tolist()):
        if not 0 <= row_begin < row_end <= layout.num_rows:
            raise ValueError(f"item {w} must have rows within [0, {layout.num_rows}), got [{row_begin}, {row_end})")
        for r in range(row_begin, row_end):
            token = row[r, TOKEN]
            if partial < 0:
                direct[token] += 1
            else:
                partials[token].append(partial + r - row_begin)
                partial_reads[partial + r - row_begin] = int(row[r, ROW]), []
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
            offset = np.arange(start, min(stop, length))
            if contiguous and (stop == LIVE or (np.diff(layout.slot_index[index_begin + offset]) != 1).any()):
                raise ValueError(f"segment {q} must not be contiguous: its slots are not, or it grows")
            for r in range(lo, hi):
                index = index_begin + offset[_sees(plan, r, node, offset, pos)]
                reads[row[r, ROW]].append(index)
                if partial >= 0:
                    partial_reads[partial + r - row_begin][1].append(index)

    for i in range(layout.num_rows):
        tokens, count = np.unique(np.concatenate([[], *reads[i]]), return_counts=True)
        visible = layout.visible(i, plan.window)[0]
        if (count > 1).any():
            raise ValueError(
                f"row {i} must read a token once, got {count.max()} times for index {tokens[np.argmax(count)]:.0f}"
            )
        if (missing := np.setdiff1d(visible, tokens)).size:
            raise ValueError(f"row {i} must read all it sees, got nothing for indices {missing}")
        if (beyond := np.setdiff1d(tokens, visible)).size:
            raise ValueError(f"row {i} must read nothing else than it sees, got indices {beyond}")

    indptr = plan.merge_indptr
    if indptr.size != layout.num_tokens + 1 or indptr[0] != 0 or indptr[-1] != plan.merge_partial.size:
        raise ValueError(
            f"merge_indptr must have {layout.num_tokens + 1} entries from 0 to {plan.merge_partial.size}, got {indptr}"
        )
    for token, expected in enumerate(partials):
        got = plan.merge_partial[indptr[token] : indptr[token + 1]].tolist()
        if sorted(got) != sorted(expected):
            raise ValueError(f"merge list of token {token} must be {expected} in some order, got {got}")
        if direct[token] + (len(expected) > 0) > 1:
            raise ValueError(
                f"token {token} must be written once, got {direct[token]} direct items and {len(expected)} partials"
            )
        _check_path_order(layout, token, [partial_reads[p] for p in got])
    if plan.empty_tokens.tolist() != [t for t, expected in enumerate(partials) if not expected and not direct[t]]:
        raise ValueError(f"empty_tokens must be the tokens that nothing writes, got {plan.empty_tokens}")
    ids = np.sort(plan.merge_partial)
    if not np.array_equal(ids, np.arange(ids.size)):
        raise ValueError(f"merge_partial must name each partial once, got {ids}")
    _check_buffer(plan)


def _sees(plan: AttentionPlan, r: int, node: int, offset: Array, pos: int) -> Array:
    """What executors do: whether plan row r sees these tokens of a segment."""
    row, _, tip, tail, last, mask = plan.row[r].tolist()
    seen = np.ones(offset.size, bool)
    if plan.window is not None:
        at, position = plan.layout.row_pos[row], pos + offset
        seen = (position > at - plan.window) & (position <= at)
    if node == tip:
        bits = np.ones(offset.size, bool)
        if mask >= 0:
            assert plan.layout.mask_bits is not None
            bit = np.clip(offset, tail, last) - tail
            bits = plan.layout.mask_bits[mask + bit // 32] >> bit % 32 & 1 == 1
        seen &= (offset < tail) | ((offset <= last) & bits)
    return seen


def _check_path_order(layout: TreeLayout, token: int, merged: list[tuple[int, list[Array]]]) -> None:
    """Partials of a row that sees a single path must come top first."""
    for row in {row for row, _ in merged}:
        context = int(np.searchsorted(layout.row_indptr, row, side="right")) - 1
        if layout.path_indptr[context + 1] - layout.path_indptr[context] > 1:
            continue
        way = {index: step for step, index in enumerate(layout.visible(row)[0].tolist())}
        read = [np.concatenate(indices) for r, indices in merged if r == row and indices]
        steps = [way[index] for indices in read for index in indices.tolist()]
        if steps != sorted(steps):
            raise ValueError(
                f"partials of token {token} must be merged in path order, got those of row {row} otherwise"
            )


def _check_buffer(plan: AttentionPlan) -> None:
    layout, buffer = plan.layout, plan.buffer
    _core.check_plan_buffer(buffer)
    heads = (plan.num_qo_heads, plan.num_kv_heads, plan.head_dim, plan.window or 0)
    if tuple(buffer[9:13].tolist()) != heads:
        raise ValueError(f"buffer must have the plan's heads and window, {heads}, got {buffer[9:13]}")
    mask = np.zeros(0, np.int32) if layout.mask_bits is None else layout.mask_bits.view(np.int32)
    sections = (*_sections(buffer), layout.node_len, layout.row_pos, mask)
    parts = (plan.item, plan.seg, plan.merge_indptr, plan.merge_partial, plan.empty_tokens, plan.row, *sections[6:])
    for part, section in zip(parts, sections, strict=True):
        if not np.array_equal(part, section):
            raise ValueError(f"buffer must hold the plan's arrays, got {section} for {part}")
    tail = buffer[buffer.size - sum(x.size for x in sections[6:]) :]
    if not np.array_equal(tail, np.concatenate(sections[6:])):
        raise ValueError(f"buffer must end with node_len, row_pos and mask of the layout, got {tail}")
