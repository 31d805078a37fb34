"""`forktree.ops.tree_attention` in PyTorch, following the plan.

Once a plan (`_prepare`, cached on it): runs of an item's segments that concern the same rows become *blocks*
of rows x tokens, large ones cut so that temporaries stay small, and blocks of similar size are padded to one
another and stacked, so that hundreds of short private tails are one batched matrix product. A block of one
long contiguous stretch reads the pools in place. Once a layer (`tree_attention`): every batch of blocks leaves
partials; `combine` makes outputs of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from forktree.ops.checks import math_dtype
from forktree.ops.plan_tensors import PlanTensors
from forktree.ops.pool import AttentionOptions, KVPool
from forktree.ops.pytorch.merge_states import MergeLists, combine, merge_lists
from forktree.plan.format import Item, Row, Seg
from forktree.plan.layout import TreeLayout, ranges
from forktree.plan.plan import AttentionPlan
from forktree.types import AnyArray

LONG = 512  # tokens from which a segment is a block of its own, which can be read in place
MAX_SCORES = 1 << 20  # scores of one batch of blocks: 4 MB in fp32, near the L2 cache
MAX_ELEMENTS = 1 << 19  # gathered K (or V) elements of one batch: 2 MB, as above
MAX_TOKENS = 1 << 14  # of one block
BATCH_COST = 1 << 14  # what one more batch costs, in scores


@dataclass(frozen=True)
class Batch:
    """`B` blocks padded to `R` rows x `L` tokens. Padding repeats rows and tokens of the same block."""

    shape: tuple[int, int, int]  # B, R, L
    q_index: Tensor  # [B * Hk * R] rows of q seen as [R * Hk, G * Dk]
    kv_index: Tensor | None  # [B * Hk * L] rows of the pools seen as [slots * Hk, D]
    kv_run: tuple[int, int]  # without kv_index: the block's slots
    hidden: Tensor | None  # bool, broadcasts to [B, Hk, R, G, L]: scores that do not count
    q_pos: Tensor  # [B, 1, R, 1, 1]
    k_pos: Tensor  # [B, 1, 1, 1, L]


@dataclass(frozen=True)
class Prepared:
    """A plan as batches of equal shape, and how their partials are merged."""

    device: torch.device
    batches: list[Batch]
    merge: MergeLists  # outputs (token, KV head) from partials (block, KV head, row), G heads each


@torch.no_grad()
def launch(q: Tensor, pool: KVPool, plan_tensors: PlanTensors, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    plan = plan_tensors.host
    assert plan is not None
    (k_slots, v_slots), softcap = (pool.k, pool.v), options.softcap
    prepared = plan.cache.get("torch")
    if prepared is None or prepared.device != q.device:
        prepared = plan.cache["torch"] = _prepare(plan, q.device)
    heads, kv_heads, dim = q.shape[1], k_slots.shape[1], v_slots.shape[2]
    group = heads // kv_heads
    q_rows = (q.to(math_dtype(q)) * options.scale_of(q.shape[2])).reshape(-1, group * q.shape[2])
    sinks, slopes = options.sinks, options.alibi_slopes
    if slopes is not None:
        slopes = slopes.to(q_rows.dtype).view(kv_heads, 1, group, 1)

    partials = sum(b.shape[0] * b.shape[1] for b in prepared.batches) * kv_heads
    o = q_rows.new_empty(partials, group, dim)
    top, mass = q_rows.new_empty(2, partials, group)
    shared = any(batch.hidden is not None for batch in prepared.batches)
    careful = not q.is_cpu  # from the start where looking at o would wait for the device
    while True:
        begin = 0
        for batch in prepared.batches:
            end = begin + batch.shape[0] * batch.shape[1] * kv_heads
            state = o[begin:end], top[begin:end], mass[begin:end]
            _attend(batch, q_rows, k_slots, v_slots, softcap, slopes, careful, *state)
            begin = end
        if careful or not shared or bool(o.sum().isfinite()):
            break
        careful = True

    tokens = plan.layout.num_tokens
    if sinks is not None:
        sinks = sinks.to(q_rows.dtype).view(kv_heads, group).repeat(tokens, 1)
    out, lse = combine(o, top, mass, prepared.merge, sinks)
    return out.view(tokens, heads, dim).to(q.dtype), lse.view(tokens, heads).float()


def _attend(
    batch: Batch,
    q_rows: Tensor,
    k_slots: Tensor,
    v_slots: Tensor,
    softcap: float | None,
    slopes: Tensor | None,
    careful: bool,
    o: Tensor,
    top: Tensor,
    mass: Tensor,
) -> None:
    """Writes the partials of a batch: o = sum of exp(s - top) v, top = max s, mass = sum of exp(s - top).

    careful: what is not finite in V is kept from rows that do not see it, as 0 * NaN is NaN.
    """
    blocks, rows, tokens = batch.shape
    kv_heads, group = k_slots.shape[1], o.shape[1]
    q = q_rows.index_select(0, batch.q_index).view(blocks * kv_heads, rows * group, -1)
    k, v = _keys(batch, k_slots, q.dtype), _keys(batch, v_slots, q.dtype)
    scores = torch.bmm(q, k.transpose(1, 2))
    by_head = scores.view(blocks, kv_heads, rows, group, tokens)
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    if slopes is not None:
        by_head.add_((batch.k_pos - batch.q_pos) * slopes)
    if batch.hidden is not None:
        by_head.masked_fill_(batch.hidden, -torch.inf)
    top = top.view(scores.shape[0], -1, 1)
    torch.amax(scores, -1, keepdim=True, out=top)
    top.clamp_(min=torch.finfo(top.dtype).min)  # where all are -inf: exp(-inf - lowest) = 0, not NaN
    spoilt = None
    if careful and batch.hidden is not None:
        bad = ~v.isfinite()
        v = v.masked_fill(bad, 0)
        spoilt = ((scores != -torch.inf) & bad.any(-1).unsqueeze(1)).any(-1, keepdim=True)
    scores.sub_(top).exp_()
    torch.sum(scores, -1, keepdim=True, out=mass.view(top.shape))
    o = o.view(scores.shape[0], scores.shape[1], -1)
    torch.bmm(scores, v, out=o)
    if spoilt is not None:
        o.masked_fill_(spoilt, torch.nan)


def _keys(batch: Batch, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """K or V of a batch, [B * Hk, L, D]."""
    heads, dim = slots.shape[1:]
    if batch.kv_index is None:
        return slots[batch.kv_run[0] : batch.kv_run[1]].to(dtype).transpose(0, 1)
    if slots.is_contiguous():
        picked = slots.view(-1, dim).index_select(0, batch.kv_index)
    else:
        picked = slots[batch.kv_index // heads, batch.kv_index % heads]
    return picked.to(dtype).view(batch.shape[0] * heads, batch.shape[2], dim)


# ---------------------------------------------------------------------- once a plan


def _prepare(plan: AttentionPlan, device: torch.device) -> Prepared:
    work = _Work(plan)
    blocks = work.blocks()
    batches, states = [], np.zeros(len(blocks), np.int64)  # states: where a block's partials begin
    stride = np.zeros(len(blocks), np.int64)  # from one KV head's rows to the next
    begin = 0
    for ids in work.batches(blocks):
        batch = work.batch(blocks[ids], device)
        batches.append(batch)
        size = plan.num_kv_heads * batch.shape[1]
        states[ids] = begin + np.arange(ids.size) * size
        stride[ids] = batch.shape[1]
        begin += ids.size * size

    # Merge lists: for every (token, KV head) its rows' partials in order of blocks.
    rows = blocks[:, 2] - blocks[:, 1]
    block = np.repeat(np.arange(rows.size), rows)
    row = ranges(blocks[:, 1], rows)
    token = plan.layout.row_token[plan.row_order[row]]
    by_token = np.argsort(token, kind="stable")
    count = np.bincount(token, minlength=plan.layout.num_tokens)
    heads = np.arange(plan.num_kv_heads)
    state = (states[block] + row - blocks[block, 1])[by_token, None] + stride[block][by_token, None] * heads
    per_output = np.repeat(count, heads.size)
    first = np.repeat(np.cumsum(count) - count, heads.size)
    index = state.ravel()[ranges(first, per_output) * heads.size + np.repeat(np.tile(heads, count.size), per_output)]
    return Prepared(device, batches, merge_lists(np.append(0, np.cumsum(per_output)), index, device))


class _Work:
    """A plan's runs and all their tokens; a block is (run, row_begin, row_end, token_begin, token_end)."""

    def __init__(self, plan: AttentionPlan) -> None:
        self.plan, self.layout = plan, plan.layout
        seg, tokens = plan.seg, plan.seg_tokens
        # Segments next to one another in an item that concern the same rows are a run; a long one is its own.
        item = np.repeat(np.arange(len(plan.item)), plan.item[:, Item.SEG_END] - plan.item[:, Item.SEG_BEGIN])
        alone = np.where(tokens >= LONG, 1 + np.arange(len(seg)), 0)
        key = np.stack([item, seg[:, Seg.ROW_LO], seg[:, Seg.ROW_HI], alone])
        first = np.flatnonzero(np.append(True, (key[:, 1:] != key[:, :-1]).any(0))[: len(seg)])
        run = np.repeat(np.arange(first.size), np.diff(np.append(first, len(seg))))  # of each segment
        self.last = np.append(first[1:], len(seg))[: first.size] - 1  # segment of each run
        self.rows = seg[first][:, [Seg.ROW_LO, Seg.ROW_HI]].astype(np.int64)
        token_begin = np.append(0, np.cumsum(tokens))
        self.begin, self.end = token_begin[first], token_begin[self.last + 1]
        self.segment = np.repeat(np.arange(len(seg)), tokens)  # of each token
        self.offset = ranges(seg[:, Seg.START], tokens)
        self.slot = self.layout.slot_index[seg[self.segment, Seg.INDEX_BEGIN] + self.offset]
        self.pos = seg[self.segment, Seg.POS] + self.offset
        self.row_pos = self.layout.row_pos[plan.row_order]

        # Runs whose rows see different parts of it.
        tail = np.full(self.layout.num_nodes + 1, TreeLayout.ALL)
        np.minimum.at(tail, plan.row[:, Row.TIP], plan.row[:, Row.TAIL])  # the last entry is for rows without a tip
        uneven = plan.seg_stop > tail[seg[:, Seg.NODE]]
        if plan.window is not None and len(seg):
            at = np.append(self.row_pos, self.row_pos[-1])
            edges = seg[:, [Seg.ROW_LO, Seg.ROW_HI]].ravel()
            nearest, farthest = np.minimum.reduceat(at, edges)[::2], np.maximum.reduceat(at, edges)[::2]
            first_pos, last_pos = seg[:, Seg.POS] + seg[:, Seg.START], seg[:, Seg.POS] + plan.seg_stop - 1
            uneven |= (first_pos <= farthest - plan.window) | (last_pos > nearest)
        self.uneven = np.bincount(run, uneven, first.size) > 0

    def blocks(self) -> AnyArray:
        """[K, 5] blocks of runs with tokens; too large ones are cut, first by tokens, then by rows."""
        blocks = np.stack([np.arange(len(self.rows)), *self.rows.T, self.begin, self.end], 1)
        blocks = blocks[self.end > self.begin]
        rows, tokens = blocks[:, 2] - blocks[:, 1], blocks[:, 4] - blocks[:, 3]
        large = (rows * tokens * self.plan.num_qo_heads > MAX_SCORES) | (tokens > MAX_TOKENS)
        if not large.any():
            return blocks
        return np.array(
            [
                b
                for block, cut in zip(blocks.tolist(), large.tolist(), strict=True)
                for b in (self._cut(*block) if cut else [block])
            ]
        )

    def _cut(self, run: int, row_begin: int, row_end: int, begin: int, end: int) -> list[list[int]]:
        pieces = []
        tail = self._causal_tail(run)
        for t in range(begin, end, MAX_TOKENS):
            t_end = min(t + MAX_TOKENS, end)
            step = max(1, MAX_SCORES // (self.plan.num_qo_heads * (t_end - t)))
            for r in range(row_begin, row_end, step):
                r_end = min(r + step, row_end)
                seen = min(t_end, end - min(row_end - r_end, tail))
                if seen > t:
                    pieces.append([run, r, r_end, t, seen])
        return pieces

    def _causal_tail(self, run: int) -> int:
        """How many of the run's last tokens are those of its rows, of one context's causal chunk, else 0."""
        plan, layout = self.plan, self.layout
        row_begin, row_end = self.rows[run]
        last = self.last[run]
        first_row, last_row = plan.row[row_begin], plan.row[row_end - 1]
        context = np.searchsorted(layout.row_indptr, first_row[Row.ROW], side="right") - 1
        chunk = (
            layout.causal[context]
            and layout.row_indptr[context + 1] > last_row[Row.ROW] >= first_row[Row.ROW]
            and plan.seg[last, Seg.NODE] == last_row[Row.TIP]
            and plan.seg_stop[last] == last_row[Row.LAST] + 1
        )
        return min(int(row_end - row_begin), int(plan.seg_tokens[last])) if chunk else 0

    def batches(self, blocks: AnyArray) -> list[AnyArray]:
        """Groups blocks (their indices) so that padding costs less than one more group would."""
        plan = self.plan
        rows, tokens = blocks[:, 2] - blocks[:, 1], blocks[:, 4] - blocks[:, 3]
        in_place = self._in_place(blocks)
        groups = [np.array([i]) for i in np.flatnonzero(in_place)]
        rest = np.flatnonzero(~in_place)
        # Classes: powers of two in rows, of sqrt(2) in tokens.
        row_class = np.ceil(np.log2(rows[rest])).astype(np.int64)
        key = row_class * 64 + np.ceil(2 * np.log2(tokens[rest])).astype(np.int64)
        order = np.argsort(key, kind="stable")
        rest, key = rest[order], key[order]
        pending: list[tuple[AnyArray, int, int, int]] = []  # group, rows, tokens, cost
        for ids in np.split(rest, np.flatnonzero(np.diff(key)) + 1) if rest.size else []:
            r, t = int(rows[ids].max()), int(tokens[ids].max())
            cost = self._cost(ids.size, r, t)
            if pending:
                last, last_r, last_t, last_cost = pending[-1]
                both, both_r, both_t = np.append(last, ids), max(r, last_r), max(t, last_t)
                together = self._cost(both.size, both_r, both_t)
                if together <= last_cost + cost:
                    pending[-1] = (both, both_r, both_t, together)
                    continue
            pending.append((ids, r, t, cost))
        width = plan.num_kv_heads * plan.head_dim
        for ids, r, t, _ in pending:
            most = max(1, min(MAX_SCORES // (r * t * plan.num_qo_heads), MAX_ELEMENTS // (t * width)))
            groups += [np.sort(ids)[i : i + most] for i in range(0, ids.size, most)]
        return groups

    def _cost(self, blocks: int, rows: int, tokens: int) -> int:
        """In scores; a gathered token of one KV head is priced as two."""
        return BATCH_COST + blocks * tokens * (rows * self.plan.num_qo_heads + 2 * self.plan.num_kv_heads)

    def _in_place(self, blocks: AnyArray) -> AnyArray:
        """Which blocks are worth reading in place: one long run of consecutive slots."""
        first, last = blocks[:, 3], blocks[:, 4] - 1
        result = last - first + 1 >= LONG
        for i in np.flatnonzero(result):
            result[i] = (np.diff(self.slot[first[i] : last[i] + 1]) == 1).all()
        return result

    def batch(self, blocks: AnyArray, device: torch.device) -> Batch:
        """The batch of some blocks, `[B, 5]`."""
        plan = self.plan
        run, row_begin, row_end, begin, end = blocks.T[:, :, None]
        rows = np.minimum(row_begin + np.arange((row_end - row_begin).max()), row_end - 1)  # [B, R] in plan order
        tokens = begin + np.arange((end - begin).max())
        beyond = tokens >= end
        tokens = np.where(beyond, begin, tokens)  # [B, L]
        hidden = beyond[:, None, None, None, :] if beyond.any() else None
        if self.uneven[run].any():
            hidden = (beyond[:, None] | self._unseen(rows[:, :, None], tokens[:, None]))[:, None, :, None]
        heads = np.arange(plan.num_kv_heads)[:, None]
        slot = self.slot[tokens]
        in_place = len(blocks) == 1 and bool(self._in_place(blocks)[0])

        def to_device(array: AnyArray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        return Batch(
            shape=(len(blocks), rows.shape[1], tokens.shape[1]),
            q_index=to_device((plan.row_order[rows].astype(np.int64)[:, None] * heads.size + heads).ravel()),
            kv_index=None if in_place else to_device((slot.astype(np.int64)[:, None] * heads.size + heads).ravel()),
            kv_run=(int(slot[0, 0]), int(slot[0, -1]) + 1),
            hidden=None if hidden is None else to_device(hidden),
            q_pos=to_device(self.row_pos[rows][:, None, :, None, None]),
            k_pos=to_device(self.pos[tokens][:, None, None, None, :]),
        )

    def _unseen(self, row: AnyArray, token: AnyArray) -> AnyArray:
        """Of pairs of plan rows [B, R, 1] and tokens [B, 1, L] of one run: not seen."""
        plan, layout = self.plan, self.layout
        tip, tail, last, mask = (plan.row[row, column] for column in (Row.TIP, Row.TAIL, Row.LAST, Row.MASK))
        offset = self.offset[token]
        own = (plan.seg[self.segment[token], Seg.NODE] == tip) & (offset >= tail)
        unseen: AnyArray = own & (offset > last)
        if layout.mask_bits is not None and layout.mask_bits.size:
            own &= (mask >= 0) & ~unseen
            bit = np.where(own, offset - tail, 0)
            unseen |= own & (
                layout.mask_bits[np.where(own, mask + bit // 32, 0)] >> bit.astype(np.uint32) % 32 & 1 == 0
            )
        if plan.window is not None:
            unseen |= (self.pos[token] <= self.row_pos[row] - plan.window) | (self.pos[token] > self.row_pos[row])
        return unseen
