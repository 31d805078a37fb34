"""Proof that a plan reads what its layout shows: `check_plan`, for tests."""

from __future__ import annotations

import numpy as np

from forktree.plan.format import LIVE, Item, Row, sections
from forktree.plan.layout import TreeLayout
from forktree.plan.plan import AttentionPlan
from forktree.types import AnyArray


def check_plan(plan: AttentionPlan) -> None:
    """Raises ValueError unless executors that follow the plan compute exactly what the layout says.

    Slow and independent of how plans are made: rows are taken one by one from `TreeLayout.visible`.
    """
    layout, item, seg, row = plan.layout, plan.item, plan.seg, plan.row
    if not np.array_equal(np.sort(plan.row_order), np.arange(layout.num_rows)):
        raise ValueError("row_order must be a permutation of all rows")
    if not np.array_equal(row[:, Row.TOKEN], layout.row_token[plan.row_order]):
        raise ValueError(f"row must have the layout's tokens, got {row[:, Row.TOKEN]}")
    seg_begin, seg_end = item[:, Item.SEG_BEGIN], item[:, Item.SEG_END]
    if not (np.array_equal(seg_begin[1:], seg_end[:-1]) and seg_end[-1:].sum() == len(seg)):
        raise ValueError("items must own all segments, one after the other")
    partials: list[list[int]] = [[] for _ in range(layout.num_tokens)]
    partial_reads: dict[int, tuple[int, list[AnyArray]]] = {}  # partial: layout row, indices
    reads: list[list[AnyArray]] = [[] for _ in range(layout.num_rows)]
    direct = np.zeros(layout.num_tokens, np.int64)
    for w, (row_begin, row_end, seg_begin, seg_end, partial) in enumerate(item.tolist()):
        if not 0 <= row_begin < row_end <= layout.num_rows:
            raise ValueError(f"item {w} must have rows within [0, {layout.num_rows}), got [{row_begin}, {row_end})")
        for r in range(row_begin, row_end):
            token = row[r, Row.TOKEN]
            if partial < 0:
                direct[token] += 1
            else:
                partials[token].append(partial + r - row_begin)
                partial_reads[partial + r - row_begin] = int(row[r, Row.ROW]), []
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
                reads[row[r, Row.ROW]].append(index)
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


def _sees(plan: AttentionPlan, r: int, node: int, offset: AnyArray, pos: int) -> AnyArray:
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


def _check_path_order(layout: TreeLayout, token: int, merged: list[tuple[int, list[AnyArray]]]) -> None:
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
    """The buffer must hold the plan's arrays and the layout's; that it is well formed was checked when it was made."""
    layout, parts = plan.layout, sections(plan.buffer)
    mask = np.zeros(0, np.int32) if layout.mask_bits is None else layout.mask_bits.view(np.int32)
    ours = {"node_len": layout.node_len, "row_pos": layout.row_pos, "mask": mask}
    ours |= {name: getattr(plan, name) for name in parts if name not in ours}
    for name, part in parts.items():
        if not np.array_equal(ours[name], part):
            raise ValueError(f"buffer must hold the plan's arrays, got {part} for {ours[name]} ({name})")
