"""The plan: a layout turned into work items, so that tokens seen by the same rows are read once for them.

Rows are numbered in plan order: contexts depth-first over the tree, so that the readers of every run of a node's tokens
are consecutive. An item is a range of rows (a subtree of queries) that walks its segments, top first. A segment is the
tokens at offsets o in [start, stop) of a node, slot `slot_index[index_begin + o]`, position `pos + o`; it concerns rows
[row_lo, row_hi) of its item only. Such a row sees o if the window lets it and

    node != tip  or  o < tail  or  (o <= last and (mask < 0 or bit o - tail from word `mask` on is set)).

Row r of an item has partial `partial + r - row_begin`; an item has none if no token of its rows has anything to merge.
Rows that no segment concerns, or that see nothing of theirs, get the empty result (0, -inf). `forktree.plan.format` has
the arrays and their fields.

At first a root tree is one item (joins make several trees one). The planner (`csrc/plan/planner.cpp`) cuts the
costliest item in two until all cost less than their share, choosing the cut that makes the predicted time least:

- by rows: what rows on both sides see is read again, from cache;
- by tokens: rows that see tokens on both sides write partials, which are merged.

The predicted time is that of all items spread over `CostModel.units`, or that of the longest one if that is more.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from forktree import _core
from forktree.plan.cost_model import CostModel, cost_model_for
from forktree.plan.format import HEADER_WIDTH, Header, Row, Seg, sections
from forktree.plan.layout import TreeLayout, ranges
from forktree.types import IntArray


@dataclass(frozen=True)
class PlanStats:
    """Counts of one layer; bytes are those of K and V of all KV heads.

    Attributes:
        distinct_tokens: tokens any row sees.
        distinct_bytes: their bytes.
        planned_tokens: tokens read, counted again for every item that reads them.
        planned_bytes: their bytes.
        attended: (row, token) pairs that count.
        computed: (row, token) pairs that segments span: `attended` and what masks hide.
        partials: rows of partials that are written and merged.
        partial_bytes: their bytes.
        padding: packed (row, token) pairs computed, lanes filled up, for one attended.
        imbalance: the longest unit of work over an even share of all, if above 1.
        predicted: time, in microseconds.
    """

    distinct_tokens: int
    distinct_bytes: int
    planned_tokens: int
    planned_bytes: int
    attended: int
    computed: int
    partials: int
    partial_bytes: int
    padding: float
    imbalance: float
    predicted: float


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """Work items of one step, for layers of one head shape and window. Made by `plan_attention`.

    A plan is validated once, when it is made: by `_core.plan`, or here if it is put together otherwise. Kernels then
    trust its buffer, which is read-only from there on. Growing rewrites `node_len` and `row_pos` alone, and checks
    those.

    Attributes:
        layout: what rows may see.
        num_qo_heads, num_kv_heads, head_dim, window: what the plan is for, see `plan_attention`.
        value_dim, bytes_per_token: format of K and V that it was priced for, see `plan_attention`.
        device: where it will be executed.
        cost_model: prices that it was made with.
        buffer: all of it, int32, as `forktree.plan.format` says.
        cache: what backends prepare once a plan.
        before: the plan that it grew from.
    """

    layout: TreeLayout
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    bytes_per_token: int
    device: str
    window: int | None
    cost_model: CostModel
    buffer: IntArray
    cache: dict[Any, Any] = field(default_factory=dict, repr=False)
    before: weakref.ref[AttentionPlan] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Validates the buffer, and that it reads what the layout names.

        Raises:
            ValueError: a kernel that trusted the buffer would leave it, or read other slots than the layout's.
        """
        if not _is_sealed(self.buffer):
            object.__setattr__(self, "buffer", _sealed(self.buffer.copy()))
        _core.check_plan_buffer(self.buffer)
        layout, header, parts = self.layout, self.buffer[:HEADER_WIDTH].tolist(), sections(self.buffer)
        heads = (self.num_qo_heads, self.num_kv_heads, self.head_dim, self.window or 0)
        got = tuple(header[i] for i in (Header.NUM_QO_HEADS, Header.NUM_KV_HEADS, Header.HEAD_DIM, Header.WINDOW))
        if got != heads:
            raise ValueError(f"buffer must have the plan's heads and window, {heads}, got {got}")
        sizes = (layout.num_rows, layout.num_tokens, layout.num_nodes)
        got = tuple(header[i] for i in (Header.NUM_ROWS, Header.NUM_TOKENS, Header.NUM_NODES))
        if got != sizes:
            raise ValueError(f"buffer must have the rows, tokens and nodes of its layout, {sizes}, got {got}")
        if not np.array_equal(parts["node_len"], layout.node_len):
            raise ValueError(f"buffer must have the layout's node_len, {layout.node_len}, got {parts['node_len']}")
        seg = parts["seg"]
        begin = layout.node_begin[seg[:, Seg.NODE]]
        if not np.array_equal(seg[:, Seg.INDEX_BEGIN], begin):
            raise ValueError(
                f"segments of buffer must begin where their nodes do, at {begin} of slot_index, got "
                f"{seg[:, Seg.INDEX_BEGIN]}"
            )

    @cached_property
    def _sections(self) -> dict[str, IntArray]:
        return sections(self.buffer)

    @cached_property
    def item(self) -> IntArray:
        """[W, 5] see `format.Item`."""
        return self._sections["item"]

    @cached_property
    def seg(self) -> IntArray:
        """[Q, 8] see `format.Seg`."""
        return self._sections["seg"]

    @cached_property
    def row(self) -> IntArray:
        """[R, 6] see `format.Row`."""
        return self._sections["row"]

    @cached_property
    def merge_indptr(self) -> IntArray:
        """[T+1] where the partials of each output token begin in `merge_partial`."""
        return self._sections["merge_indptr"]

    @cached_property
    def merge_partial(self) -> IntArray:
        """[P] partials of output tokens, in path order."""
        return self._sections["merge_partial"]

    @cached_property
    def empty_tokens(self) -> IntArray:
        """[Z] output tokens that no item writes and nothing is merged for."""
        return self._sections["empty_tokens"]

    @property
    def row_order(self) -> IntArray:
        """[R] layout row of each plan row."""
        return self.row[:, Row.ROW]

    @cached_property
    def num_partials(self) -> int:
        """P, rows of partials."""
        return int(self.buffer[Header.NUM_PARTIALS])

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The buffer and the layout's slot_index on a device, for kernels. On a GPU they arrive asynchronously."""
        tensors: tuple[Tensor, Tensor] | None = self.cache.get(device)
        if tensors is None:
            buffer = torch.from_numpy(self.buffer.base)  # torch has no read-only tensors
            slots = torch.from_numpy(np.ascontiguousarray(self.layout.slot_index))
            if device.type != "cpu":
                buffer, slots = (x.pin_memory().to(device, non_blocking=True) for x in (buffer, slots))
            tensors = self.cache[device] = buffer, slots
        return tensors

    @cached_property
    def seg_stop(self) -> IntArray:
        """[Q] where segments end now."""
        return np.minimum(self.seg[:, Seg.STOP], self.layout.node_len[self.seg[:, Seg.NODE]])

    @cached_property
    def seg_tokens(self) -> IntArray:
        """[Q] tokens of each segment now."""
        tokens: IntArray = np.maximum(self.seg_stop - self.seg[:, Seg.START], 0)
        return tokens

    def grow(self, node_len: Any, row_pos: Any, slot_index: Any = None) -> AttentionPlan:
        """The same plan after tips grew and their rows moved on.

        Args:
            node_len: see `TreeLayout.grown`.
            row_pos: likewise.
            slot_index: likewise.

        Raises:
            ValueError: the layout cannot grow like this, or a node grew whose tokens rows see in part (the tip of a
                causal or masked context of several rows): plan anew.
        """
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
        lengths, positions = self._growing
        buffer[lengths], buffer[positions] = layout.node_len, layout.row_pos
        kept = {name: getattr(self, name) for name in _FIELDS}
        # `layout.grown` checked all that changed.
        return _trusted(kept | dict(layout=layout, buffer=_sealed(buffer), cache={}, before=weakref.ref(self)))

    @property
    def _growing(self) -> tuple[slice, slice]:
        """Where the buffer has what growing changes: node_len [N] and row_pos [R]."""
        lengths, positions = (int(self.buffer[i]) for i in (Header.NODE_LEN_OFFSET, Header.ROW_POS_OFFSET))
        return (
            slice(lengths, lengths + self.layout.num_nodes),
            slice(positions, positions + self.layout.num_rows),
        )

    def grew_from(self, before: AttentionPlan) -> bool:
        """Whether this is what `before.grow` returned."""
        return self.before is not None and self.before() is before

    def changes(self, before: AttentionPlan) -> tuple[IntArray, IntArray]:
        """Entries of the buffer that growing from `before` changed, and entries of slot_index that it added."""
        lens, old = self.layout.node_len, before.layout.node_len
        grew = np.flatnonzero(lens > old)
        changed = [np.flatnonzero(self.buffer[part] != before.buffer[part]) + part.start for part in self._growing]
        return np.concatenate(changed), ranges(self.layout.node_begin[grew] + old[grew], lens[grew] - old[grew])

    def stats(self) -> PlanStats:
        """What the plan does and costs under its cost model."""
        distinct, planned, attended, computed, padded, predicted, total, longest = _core.plan_stats(
            self.buffer, self.cost_model.values
        )
        return PlanStats(
            distinct_tokens=distinct,
            distinct_bytes=distinct * self.bytes_per_token,
            planned_tokens=planned,
            planned_bytes=planned * self.bytes_per_token,
            attended=attended,
            computed=computed,
            partials=self.num_partials,
            partial_bytes=self.num_partials * self.num_qo_heads * (self.value_dim + 2) * 4,
            padding=padded * self.num_kv_heads / max(1, attended * self.num_qo_heads),
            imbalance=max(1.0, longest * self.cost_model.units / max(1, total)),
            predicted=predicted / 1e6,
        )


def plan_attention(
    layout: TreeLayout,
    *,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    value_dim: int | None = None,
    bytes_per_token: int | None = None,
    device: Any = "cpu",
    window: int | None = None,
    cost_model: CostModel | None = None,
    max_partials: int | None = None,
    invariant: bool = False,
) -> AttentionPlan:
    """Decides who reads which tokens together, for all layers of one head shape and window.

    Args:
        layout: what rows may see.
        num_qo_heads: heads of queries.
        num_kv_heads: heads of keys and values; divides num_qo_heads.
        head_dim: elements of a query or key of one head.
        value_dim: elements of a value of one head, default head_dim; only prices depend on it.
        bytes_per_token: K and V of one token in one layer, all KV heads, scales included; default: 2 bytes an element.
            Only prices depend on it.
        device: where it will be executed.
        window: positions a row sees, its own included; default: all.
        cost_model: what work costs; default: that of the device.
        max_partials: rows of partials there may be; tokens with several rows need one for each.
        invariant: plan each root tree as if it were alone in the step, so that a row's bits do not depend on
            strangers. Costs balance where many trees are large, nothing where there is one.

    Returns:
        A plan that was validated: kernels trust it.

    Raises:
        ValueError: an argument is out of range; paths of a join share tokens; the layout needs more partials.
    """
    value_dim = head_dim if value_dim is None else value_dim
    heads = dict(num_qo_heads=num_qo_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, value_dim=value_dim)
    for name, value in heads.items():
        if not 1 <= value < 2**16:
            raise ValueError(f"{name} must be in [1, 65536), got {value}")
    if num_qo_heads % num_kv_heads:
        raise ValueError(f"num_qo_heads must be a multiple of num_kv_heads, got {num_qo_heads} and {num_kv_heads}")
    if bytes_per_token is None:
        bytes_per_token = min(2 * num_kv_heads * (head_dim + value_dim), 2**31 - 1)
    if not 1 <= bytes_per_token < 2**31:
        raise ValueError(f"bytes_per_token must be in [1, 2**31) or None, got {bytes_per_token}")
    if window is not None and not 1 <= window < 2**31:
        raise ValueError(f"window must be in [1, 2**31) or None, got {window}")
    if max_partials is not None and max_partials < 0:
        raise ValueError(f"max_partials must be at least 0 or None, got {max_partials}")
    if cost_model is None:
        cost_model = cost_model_for(torch.device(device), layout.num_rows * num_qo_heads // num_kv_heads)
    buffer = _sealed(
        _core.plan(
            layout,
            (*heads.values(), bytes_per_token),
            window or 0,
            cost_model.values,
            2**31 - 1 if max_partials is None else max_partials,
            invariant,
        )
    )
    return _trusted(
        {
            "layout": layout,
            **heads,
            "bytes_per_token": bytes_per_token,
            "device": str(device),
            "window": window,
            "cost_model": cost_model,
            "buffer": buffer,
            "cache": {},
            "before": None,
        }
    )


_FIELDS = [f.name for f in fields(AttentionPlan)]


def _trusted(values: dict[str, Any]) -> AttentionPlan:
    """A plan of these fields, whose buffer was validated by `_core.plan`, or is one that has only grown."""
    made = object.__new__(AttentionPlan)
    made.__dict__.update(values)
    return made


def _sealed(buffer: IntArray) -> IntArray:
    """A read-only view of an array that nobody else has."""
    view = buffer.view()
    view.flags.writeable = False
    return view


def _is_sealed(buffer: IntArray) -> bool:
    base = buffer.base
    return not buffer.flags.writeable and isinstance(base, np.ndarray) and base.size == buffer.size
