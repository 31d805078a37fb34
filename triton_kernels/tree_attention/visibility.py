"""Which columns of a tile the rows see."""

from __future__ import annotations

import triton
import triton.language as tl

from forktree.triton_kernels.plan_format import (
    HEADER_MASK_OFFSET,
    LIVE,
    ROW_LAST,
    ROW_MASK,
    ROW_ROW,
    ROW_TAIL,
    ROW_TIP,
    ROW_WIDTH,
    SEG_NODE,
    SEG_POS,
    SEG_ROW_HI,
    SEG_ROW_LO,
    SEG_WIDTH,
)


@triton.jit
def _visible_to_all(fields, row_fields, rows, window):
    """Returns the offsets [from, until) of a segment that all rows of the row tile see."""
    row_lo, row_hi, tip_lo, tip_hi, pos_lo, pos_hi = rows
    node, pos = tl.load(fields + SEG_NODE), tl.load(fields + SEG_POS)
    visible_from = 0
    all_rows = (tl.load(fields + SEG_ROW_LO) <= row_lo) & (tl.load(fields + SEG_ROW_HI) > row_hi)
    visible_until = tl.where(all_rows, 2147483647, 0)
    if (node >= tip_lo) & (node <= tip_hi):
        tail, last = tl.load(row_fields + ROW_TAIL), tl.load(row_fields + ROW_LAST)
        mask = tl.load(row_fields + ROW_MASK)
        causal = tl.maximum(tail, tl.minimum(last, LIVE - 1) + 1)
        until = tl.where(mask >= 0, tail, causal)
        until = tl.where(tl.load(row_fields + ROW_TIP) == node, until, 2147483647)
        visible_until = tl.minimum(visible_until, tl.min(until))
    if window > 0:
        visible_from = tl.maximum(pos_hi - pos, 0) - window + 1
        visible_until = tl.minimum(visible_until, pos_lo - pos + 1)
    return visible_from, visible_until


@triton.jit
def _seen(seg, row, row_pos, plan, lanes, tipped, window, at, offset, inside, zero, BLOCK_M: tl.constexpr):
    """Returns which columns the rows see, [M, N].

    zero: 0, computed in the loop so that the rows' fields are loaded in this branch: hoisted, they would be spilled.
    """
    first, packed, row_begin, group = lanes
    plan_row = row_begin + tl.minimum(first + zero + tl.arange(0, BLOCK_M), packed - 1) // group
    row_fields = row + ROW_WIDTH * plan_row
    lo = tl.load(seg + SEG_WIDTH * at + SEG_ROW_LO, mask=inside, other=0)
    hi = tl.load(seg + SEG_WIDTH * at + SEG_ROW_HI, mask=inside, other=0)
    seen = (plan_row[:, None] >= lo[None, :]) & (plan_row[:, None] < hi[None, :])
    if window > 0:
        pos = tl.load(seg + SEG_WIDTH * at + SEG_POS, mask=inside, other=0) + offset
        back = tl.load(row_pos + tl.load(row_fields + ROW_ROW))[:, None] - pos[None, :]
        seen &= (back >= 0) & (back < window)
    if tipped:
        node = tl.load(seg + SEG_WIDTH * at + SEG_NODE, mask=inside, other=-1)
        tail = tl.load(row_fields + ROW_TAIL)
        own = (node[None, :] == tl.load(row_fields + ROW_TIP)[:, None]) & (offset[None, :] >= tail[:, None])
        seen &= (own == 0) | (offset[None, :] <= tl.load(row_fields + ROW_LAST)[:, None])
        mask = tl.load(row_fields + ROW_MASK)
        if tl.max(mask) >= 0:
            mask_words = plan + tl.load(plan + HEADER_MASK_OFFSET)
            bit = offset[None, :] - tail[:, None]
            masked = seen & own & (mask[:, None] >= 0)
            word = tl.load(mask_words + mask[:, None] + (bit >> 5), mask=masked, other=-1)
            seen &= ((word >> (bit & 31)) & 1) != 0
    return seen
