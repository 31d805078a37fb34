"""Attention of one row tile to an item's stream of tokens: the loop over tiles of K and V."""

from __future__ import annotations

import triton
import triton.language as tl

from forktree.triton_kernels.device import WIDEN
from forktree.triton_kernels.plan_format import (
    LIVE,
    ROW_LAST,
    ROW_ROW,
    ROW_TIP,
    SEG_NODE,
    SEG_POS,
    SEG_ROW_HI,
    SEG_ROW_LO,
    SEG_START,
    SEG_STOP,
    SEG_WIDTH,
)
from forktree.triton_kernels.tree_attention.stream import _columns
from forktree.triton_kernels.tree_attention.visibility import _seen

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _row_tile(
    q,
    k_head,
    v_head,
    k_stride,
    v_stride,
    seg,
    seg_begin,
    seg_end,
    slot_index,
    node_len,
    plan,
    window,
    row,
    lanes,
    plan_row,
    row_fields,
    row_pos,
    slope,
    m,
    mass,
    scale,
    softcap,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    SEGS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
    SANITIZE_V: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Attends to the item's stream. Returns the rows' unnormalised output, maximum (base 2) and mass.

    SANITIZE_V: a row that sees a token with NaN or inf in V becomes NaN; such a V does not reach other rows.
    """
    dk, dv = tl.arange(0, BLOCK_DK), tl.arange(0, BLOCK_DV)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    if WIDEN:
        q = q.to(tl.float32)
    row_lo, row_hi = tl.min(plan_row), tl.max(plan_row)
    tip = tl.load(row_fields + ROW_TIP)
    tip_lo, tip_hi = tl.min(tip), tl.max(tip)
    tipped = tip_hi >= 0
    furthest = tl.max(tl.load(row_fields + ROW_LAST))
    pos_lo, pos_hi = row_lo, row_hi
    if window > 0:
        at_pos = tl.load(row_pos + tl.load(row_fields + ROW_ROW))
        pos_lo, pos_hi = tl.min(at_pos), tl.max(at_pos)
    rows = (row_lo, row_hi, tl.maximum(tip_lo, 0), tip_hi, pos_lo, pos_hi)
    for first_seg in range(seg_begin, seg_end, SEGS):
        fields = seg + SEG_WIDTH * (first_seg + tl.arange(0, SEGS))
        real = first_seg + tl.arange(0, SEGS) < seg_end
        node = tl.load(fields + SEG_NODE, mask=real, other=-1)
        lo = tl.load(fields + SEG_ROW_LO, mask=real, other=0)
        hi = tl.load(fields + SEG_ROW_HI, mask=real, other=0)
        stop = tl.minimum(tl.load(fields + SEG_STOP, mask=real, other=0), tl.load(node_len + node, mask=real, other=0))
        if tipped & (tip_lo == tip_hi):
            stop = tl.where(node == tip_hi, tl.minimum(stop, tl.minimum(furthest, LIVE - 1) + 1), stop)
        length = tl.maximum(stop - tl.load(fields + SEG_START, mask=real, other=0), 0)
        length = tl.where((lo <= row_hi) & (hi > row_lo), length, 0)
        ends = tl.cumsum(length, 0)
        total = tl.sum(length)
        none = total - total
        run = (none, none, none, none, none, none)
        at, offset, slot, all_visible, run = _columns(
            seg, slot_index, row_fields, rows, window, first_seg, ends, total, 0, run, BLOCK_N, SEGS
        )
        for tile in tl.range(0, total, BLOCK_N, num_stages=STAGES):
            zero = tl.minimum(run[1], 0)
            inside = tile + tl.arange(0, BLOCK_N) < total
            k_at = k_head + slot.to(tl.int64)[None, :] * k_stride + dk[:, None]
            v_at = v_head + slot.to(tl.int64)[:, None] * v_stride + dv[None, :]
            if BLOCK_DK == DK:
                k = tl.load(k_at, mask=inside[None, :], other=0.0)
            else:
                k = tl.load(k_at, mask=inside[None, :] & (dk[:, None] < DK), other=0.0)
            if BLOCK_DV == DV:
                v = tl.load(v_at, mask=inside[:, None], other=0.0)
            else:
                v = tl.load(v_at, mask=inside[:, None] & (dv[None, :] < DV), other=0.0)
            # The next tile's slots are looked up before this one's products, so that its K and V load meanwhile.
            next_at, next_offset, next_slot, next_all_visible, run = _columns(
                seg, slot_index, row_fields, rows, window, first_seg, ends, total, tile + BLOCK_N, run, BLOCK_N, SEGS
            )

            if WIDEN:
                k = k.to(tl.float32)
            s = tl.dot(q, k, input_precision="ieee")
            if SOFTCAP:
                s = softcap * LOG2E * (1 - 2 / (tl.exp2(s * (2 * LOG2E * scale / softcap)) + 1))
            else:
                s *= scale * LOG2E
            if ALIBI:
                pos = tl.load(seg + SEG_WIDTH * at + SEG_POS, mask=inside, other=0) + offset
                s += slope[:, None] * (pos[None, :] - tl.load(row_pos + tl.load(row_fields + ROW_ROW))[:, None])
            # The branch yields the mask. If it yielded s, Triton would convert s to another layout for the softmax.
            seen = tl.full([BLOCK_M, BLOCK_N], True, tl.int1)
            if all_visible == 0:
                seen = _seen(seg, row, row_pos, plan, lanes, tipped, window, at, offset, inside, zero, BLOCK_M)
            s = tl.where(seen, s, float("-inf"))

            top = tl.maximum(m, tl.max(s, 1))
            base = tl.where(top == float("-inf"), 0.0, top)  # -inf - -inf would be NaN
            p = tl.exp2(s - base[:, None])
            decay = tl.exp2(m - base)
            mass = mass * decay + tl.sum(p, 1)
            m = top
            acc *= decay[:, None]
            if SANITIZE_V:
                finite = tl.abs(v.to(tl.float32)) < float("inf")
                bad = tl.min(finite.to(tl.int32), 1) == 0
                v = tl.where(finite, v, 0.0)
                poisoned = tl.max(tl.where(bad[None, :] & (s != float("-inf")), 1, 0), 1) > 0
                acc = tl.where(poisoned[:, None], float("nan"), acc)
            p = p.to(v.dtype)
            if WIDEN:
                p, v = p.to(tl.float32), v.to(tl.float32)
            acc = tl.dot(p, v, acc, input_precision="ieee")
            at, offset, slot, all_visible = next_at, next_offset, next_slot, next_all_visible
    return acc, m, mass
