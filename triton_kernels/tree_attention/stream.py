"""The tokens of an item's segments as one stream: which of them are the columns of a tile."""

from __future__ import annotations

import triton
import triton.language as tl

from forktree.triton_kernels.plan_format import SEG_INDEX_BEGIN, SEG_START, SEG_WIDTH
from forktree.triton_kernels.tree_attention.visibility import _visible_to_all


@triton.jit
def _columns(
    seg,
    slot_index,
    row_fields,
    rows,
    window,
    first_seg,
    ends,
    total,
    tile,
    run,
    BLOCK_N: tl.constexpr,
    SEGS: tl.constexpr,
):
    """Returns each column's segment, offset in its node and slot; whether all rows see all columns; and the run.

    The run describes the segment of the tile's last column: where it ends in the stream, its number, what to add to a
    column for the offset and for the index into `slot_index`, and the offsets that all rows see. Segments are looked up
    only for a tile that extends beyond the run of the tile before it.
    """
    col = tile + tl.arange(0, BLOCK_N)
    inside = col < total
    run_end, number, to_offset, to_index, visible_from, visible_until = run
    within = tile + BLOCK_N <= run_end
    at = tl.full([BLOCK_N], 0, tl.int32) + number
    offset = col + to_offset
    index = col + to_index
    if within == 0:
        # The last segment that ends at or before a column, and where it ends. Both rise with the number of the segment,
        # so that one maximum gives both.
        key = ends.to(tl.int64) * (2 * SEGS) + tl.arange(0, SEGS) + 1
        passed = tl.max(tl.where(ends[:, None] <= col[None, :], key[:, None], 0), 0)
        at = first_seg + (passed % (2 * SEGS)).to(tl.int32)
        begin = (passed // (2 * SEGS)).to(tl.int32)
        offset = tl.load(seg + SEG_WIDTH * at + SEG_START, mask=inside, other=0) + col - begin
        index = tl.load(seg + SEG_WIDTH * at + SEG_INDEX_BEGIN, mask=inside, other=0) + offset
        number = tl.max(tl.where(inside, at, first_seg))
        run_end = tl.min(tl.where(first_seg + tl.arange(0, SEGS) >= number, ends, 2147483647))
        to_offset = tl.max(tl.where(inside & (at == number), offset - col, -2147483648))
        to_index = tl.load(seg + SEG_WIDTH * number + SEG_INDEX_BEGIN) + to_offset
        visible_from, visible_until = _visible_to_all(seg + SEG_WIDTH * number, row_fields, rows, window)
    first = tile + to_offset
    all_visible = within & (first >= visible_from) & (first + BLOCK_N <= visible_until)
    slot = tl.load(slot_index + index, mask=inside, other=0)
    return at, offset, slot, all_visible, (run_end, number, to_offset, to_index, visible_from, visible_until)
