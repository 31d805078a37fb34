"""`forktree.ops.tree_attention`: persistent programs over the items of a plan (`forktree.plan.format`).

A unit of work is an item and a KV head. Its packed rows m are plan row m // G and head m % G of the group; its segments
are one stream of tokens, cut into tiles whatever the segments' lengths, so that hundreds of one-token nodes fill a
tile. Partials are merged by the program that finishes a token last, in the order of the merge list.
"""

import os
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from forktree.ops.dispatch import MAX_DIM
from forktree.ops.plan_tensors import PlanTensors
from forktree.ops.pool import AttentionOptions, KVPool
from forktree.plan.cost_model import ROOFLINE_ROWS, multiprocessors
from forktree.triton_kernels.device import architecture, device_of
from forktree.triton_kernels.merge_states import LANES, LISTED, _merge
from forktree.triton_kernels.plan_format import (
    HEADER_EMPTY_TOKENS_OFFSET,
    HEADER_ITEM_OFFSET,
    HEADER_MASK_OFFSET,
    HEADER_MERGE_INDPTR_OFFSET,
    HEADER_MERGE_PARTIAL_OFFSET,
    HEADER_NODE_LEN_OFFSET,
    HEADER_NUM_EMPTY_TOKENS,
    HEADER_NUM_ITEMS,
    HEADER_NUM_TOKENS,
    HEADER_ROW_OFFSET,
    HEADER_ROW_POS_OFFSET,
    HEADER_SEG_OFFSET,
    HEADER_WINDOW,
    ITEM_PARTIAL,
    ITEM_ROW_BEGIN,
    ITEM_ROW_END,
    ITEM_SEG_BEGIN,
    ITEM_SEG_END,
    ITEM_WIDTH,
    LIVE,
    ROW_LAST,
    ROW_MASK,
    ROW_ROW,
    ROW_TAIL,
    ROW_TIP,
    ROW_TOKEN,
    ROW_WIDTH,
    SEG_INDEX_BEGIN,
    SEG_NODE,
    SEG_POS,
    SEG_ROW_HI,
    SEG_ROW_LO,
    SEG_START,
    SEG_STOP,
    SEG_WIDTH,
)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
SEGS = 32  # segments looked at together
# Triton's interpreter multiplies bf16 as the integers it keeps them in.
WIDEN = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
COUNTERS: dict[tuple[torch.device, int], list[Tensor]] = {}


@triton.jit
def _plain(fields, row_fields, rows, window):
    """Offsets [from, until) of a segment that all rows see."""
    row_lo, row_hi, tip_lo, tip_hi, pos_lo, pos_hi = rows
    node, pos = tl.load(fields + SEG_NODE), tl.load(fields + SEG_POS)
    plain_from = 0
    all_rows = (tl.load(fields + SEG_ROW_LO) <= row_lo) & (tl.load(fields + SEG_ROW_HI) > row_hi)
    plain_until = tl.where(all_rows, 2147483647, 0)
    if (node >= tip_lo) & (node <= tip_hi):
        tail, last = tl.load(row_fields + ROW_TAIL), tl.load(row_fields + ROW_LAST)
        mask = tl.load(row_fields + ROW_MASK)
        causal = tl.maximum(tail, tl.minimum(last, LIVE - 1) + 1)
        until = tl.where(mask >= 0, tail, causal)
        until = tl.where(tl.load(row_fields + ROW_TIP) == node, until, 2147483647)
        plain_until = tl.minimum(plain_until, tl.min(until))
    if window > 0:
        plain_from = tl.maximum(pos_hi - pos, 0) - window + 1
        plain_until = tl.minimum(plain_until, pos_lo - pos + 1)
    return plain_from, plain_until


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
    """Of each column of a tile: its segment, offset in its node and slot; whether all rows see all columns; the run.

    The run is the segment of a tile's last column: where it ends, its number, what leads from its columns to offsets
    and indices, and the offsets all rows see. Only a tile that reaches beyond the last one's run looks up its segments.
    """
    col = tile + tl.arange(0, BLOCK_N)
    inside = col < total
    run_end, number, to_offset, to_index, plain_from, plain_until = run
    within = tile + BLOCK_N <= run_end
    at = tl.full([BLOCK_N], 0, tl.int32) + number
    offset = col + to_offset
    index = col + to_index
    if within == 0:
        # The last segment that ends at or before a column, and its end: both rise, so that one maximum gives both.
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
        plain_from, plain_until = _plain(seg + SEG_WIDTH * number, row_fields, rows, window)
    first = tile + to_offset
    plain = within & (first >= plain_from) & (first + BLOCK_N <= plain_until)
    slot = tl.load(slot_index + index, mask=inside, other=0)
    return at, offset, slot, plain, (run_end, number, to_offset, to_index, plain_from, plain_until)


@triton.jit
def _seen(seg, row, row_pos, mask_words, lanes, tipped, window, at, offset, inside, zero, BLOCK_M: tl.constexpr):
    """[M, N] which columns the rows see. `zero` keeps what follows in its branch: it would be spilled if hoisted."""
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
            bit = offset[None, :] - tail[:, None]
            masked = seen & own & (mask[:, None] >= 0)
            word = tl.load(mask_words + mask[:, None] + (bit >> 5), mask=masked, other=-1)
            seen &= ((word >> (bit & 31)) & 1) != 0
    return seen


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
    mask_words,
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
    CAREFUL: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Attention of packed rows to the item's stream: unnormalised output, max (base 2) and mass."""
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
        at, offset, slot, plain, run = _columns(
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
            # The next tile's slots are looked up here, so that its K and V can be loaded while this one is computed.
            next_at, next_offset, next_slot, next_plain, run = _columns(
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
            # The branch yields the mask: if it yielded s, Triton would do the softmax in another layout than that of s.
            seen = tl.full([BLOCK_M, BLOCK_N], True, tl.int1)
            if plain == 0:
                seen = _seen(seg, row, row_pos, mask_words, lanes, tipped, window, at, offset, inside, zero, BLOCK_M)
            s = tl.where(seen, s, float("-inf"))

            top = tl.maximum(m, tl.max(s, 1))
            base = tl.where(top == float("-inf"), 0.0, top)  # -inf - -inf would be NaN
            p = tl.exp2(s - base[:, None])
            decay = tl.exp2(m - base)
            mass = mass * decay + tl.sum(p, 1)
            m = top
            acc *= decay[:, None]
            if CAREFUL:
                finite = tl.abs(v.to(tl.float32)) < float("inf")
                bad = tl.min(finite.to(tl.int32), 1) == 0
                v = tl.where(finite, v, 0.0)
                spoilt = tl.max(tl.where(bad[None, :] & (s != float("-inf")), 1, 0), 1) > 0
                acc = tl.where(spoilt[:, None], float("nan"), acc)
            p = p.to(v.dtype)
            if WIDEN:
                p, v = p.to(tl.float32), v.to(tl.float32)
            acc = tl.dot(p, v, acc, input_precision="ieee")
            at, offset, slot, plain = next_at, next_offset, next_slot, next_plain
    return acc, m, mass


@triton.jit
def _item(
    inputs,
    sections,
    results,
    item,
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
    SINKS: tl.constexpr,
    ALIBI: tl.constexpr,
    CAREFUL: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Outputs or partials of an item for one KV head. Returns whether any is NaN."""
    q, k_slots, v_slots, slot_index, sinks, alibi_slopes, strides = inputs
    q_row_stride, q_head_stride, k_slot_stride, k_head_stride, v_slot_stride, v_head_stride = strides
    seg, row, node_len, row_pos, mask_words, window = sections
    out, lse, partial_out, partial_lse = results
    row_begin, row_end, seg_begin, seg_end, partial, head, kv_heads, group = item
    dk, dv = tl.arange(0, BLOCK_DK), tl.arange(0, BLOCK_DV)
    packed = (row_end - row_begin) * group
    wide_head = head.to(tl.int64)
    spoilt = 0
    for first in range(0, packed, BLOCK_M):
        lane = first + tl.arange(0, BLOCK_M)
        real = lane < packed
        lane = tl.minimum(lane, packed - 1)
        plan_row = row_begin + lane // group
        q_head = head * group + lane % group
        fields = row + ROW_WIDTH * plan_row
        layout_row = tl.load(fields + ROW_ROW)
        q_at = q + layout_row.to(tl.int64) * q_row_stride + q_head.to(tl.int64) * q_head_stride
        q_tile = tl.load(q_at[:, None] + dk[None, :], mask=dk[None, :] < DK, other=0.0)
        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        mass = tl.zeros([BLOCK_M], tl.float32)
        slope = mass
        if SINKS and partial < 0:
            m = tl.load(sinks + q_head) * LOG2E
            mass = tl.where(m > float("-inf"), 1.0, 0.0)
        if ALIBI:
            slope = tl.load(alibi_slopes + q_head) * LOG2E
        acc, m, mass = _row_tile(
            q_tile,
            k_slots + wide_head * k_head_stride,
            v_slots + wide_head * v_head_stride,
            k_slot_stride,
            v_slot_stride,
            seg,
            seg_begin,
            seg_end,
            slot_index,
            node_len,
            mask_words,
            window,
            row,
            (first, packed, row_begin, group),
            plan_row,
            fields,
            row_pos,
            slope,
            m,
            mass,
            scale,
            softcap,
            DK,
            DV,
            BLOCK_M,
            BLOCK_N,
            BLOCK_DK,
            BLOCK_DV,
            SEGS,
            SOFTCAP,
            ALIBI,
            CAREFUL,
            STAGES,
        )
        divisor = tl.where(mass == 0, 1.0, mass)
        o = acc / divisor[:, None]
        total = tl.where(mass == 0, float("-inf"), (m + tl.log2(divisor)) * LN2)
        spoilt = tl.maximum(spoilt, tl.max((o != o).to(tl.int32)))
        stored = real[:, None] & (dv[None, :] < DV)
        if partial < 0:
            state = tl.load(fields + ROW_TOKEN).to(tl.int64) * (kv_heads * group) + q_head
            tl.store(out + state[:, None] * DV + dv[None, :], o.to(out.dtype.element_ty), mask=stored)
            tl.store(lse + state, total, mask=real)
        else:
            state = (partial + plan_row - row_begin).to(tl.int64) * (kv_heads * group) + q_head
            tl.store(partial_out + state[:, None] * DV + dv[None, :], o, mask=stored)
            tl.store(partial_lse + state, total, mask=real)
    return spoilt


@triton.jit
def _merge_last(
    row,
    merge_indptr,
    merge_partial,
    partial_out,
    partial_lse,
    counters,
    sinks,
    out,
    lse,
    kv_heads,
    group,
    head,
    row_begin,
    row_end,
    turn,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    SINKS: tl.constexpr,
    LANES: tl.constexpr,
    LISTED: tl.constexpr,
):
    """Counts the item's partials of one KV head as written; merges the tokens that have all of theirs now."""
    tl.debug_barrier()  # the partials of all threads come before the counting of any
    d = tl.arange(0, BLOCK_DV)
    packed = (row_end - row_begin) * group
    blocks = tl.cdiv(packed, LANES)
    for i in range(0, blocks):
        # Items over the same rows that end together begin with different rows, and so share the merging.
        lane = (i + turn) % blocks * LANES + tl.arange(0, LANES)
        real = lane < packed
        q_head = head * group + lane % group
        token = tl.load(row + ROW_WIDTH * (row_begin + lane // group) + ROW_TOKEN, mask=real, other=0)
        begin = tl.load(merge_indptr + token, mask=real, other=0)
        count = tl.load(merge_indptr + token + 1, mask=real, other=0) - begin
        output = token.to(tl.int64) * (kv_heads * group) + q_head
        before = tl.atomic_add(counters + output, 1, mask=real, sem="acq_rel", scope="gpu")
        complete = real & (before == count - 1)
        if tl.max(complete.to(tl.int32)) > 0:
            tl.debug_barrier()  # what any thread has seen counted, all may read
            tl.store(counters + output, 0, mask=complete)  # for the next launch
            m = tl.full([LANES], float("-inf"), tl.float32)
            mass = tl.zeros([LANES], tl.float32)
            if SINKS:
                m = tl.load(sinks + q_head, mask=real, other=float("-inf"))
                mass = tl.where(m > float("-inf"), 1.0, 0.0)
            merged, total = _merge(
                partial_out,
                partial_lse,
                merge_partial,
                begin,
                tl.where(complete, count, 0),
                kv_heads * group,
                q_head,
                m,
                mass,
                d,
                DV,
                LANES,
                BLOCK_DV,
                LISTED,
            )
            at = out + output[:, None] * DV + d[None, :]
            tl.store(at, merged.to(out.dtype.element_ty), mask=complete[:, None] & (d[None, :] < DV))
            tl.store(lse + output, total, mask=complete)


@triton.jit
def _write_empty(token, sinks, out, lse, heads, DV: tl.constexpr, SINKS: tl.constexpr, BLOCK: tl.constexpr):
    """A token that sees nothing."""
    element = tl.arange(0, BLOCK)
    zeros = tl.zeros([BLOCK], out.dtype.element_ty)
    for first in range(0, heads * DV, BLOCK):
        at = first + element
        tl.store(out + token.to(tl.int64) * (heads * DV) + at, zeros, mask=at < heads * DV)
    for first in range(0, heads, BLOCK):
        at = first + element
        total = tl.full([BLOCK], float("-inf"), tl.float32)
        if SINKS:
            total = tl.load(sinks + at, mask=at < heads, other=0.0)
        tl.store(lse + token.to(tl.int64) * heads + at, total, mask=at < heads)


@triton.jit(do_not_specialize=["num_tokens", "kv_heads", "group", "max_partials"])
def _tree_attention(
    q,
    k_slots,
    v_slots,
    plan,
    slot_index,
    sinks,
    alibi_slopes,
    out,
    lse,
    scratch,
    counters,
    q_row_stride,
    q_head_stride,
    k_slot_stride,
    k_head_stride,
    v_slot_stride,
    v_head_stride,
    num_tokens,
    max_partials,
    kv_heads,
    group,
    scale,
    softcap,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SEGS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    ALIBI: tl.constexpr,
    STAGES: tl.constexpr,
    LANES: tl.constexpr,
    LISTED: tl.constexpr,
):
    """Grid: any number of programs."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    heads = kv_heads * group
    tokens, items = tl.load(plan + HEADER_NUM_TOKENS), tl.load(plan + HEADER_NUM_ITEMS)
    num_empty, window = tl.load(plan + HEADER_NUM_EMPTY_TOKENS), tl.load(plan + HEADER_WINDOW)
    item = plan + tl.load(plan + HEADER_ITEM_OFFSET)
    seg = plan + tl.load(plan + HEADER_SEG_OFFSET)
    merge_indptr = plan + tl.load(plan + HEADER_MERGE_INDPTR_OFFSET)
    merge_partial = plan + tl.load(plan + HEADER_MERGE_PARTIAL_OFFSET)
    empty_tokens = plan + tl.load(plan + HEADER_EMPTY_TOKENS_OFFSET)
    row = plan + tl.load(plan + HEADER_ROW_OFFSET)
    node_len = plan + tl.load(plan + HEADER_NODE_LEN_OFFSET)
    row_pos = plan + tl.load(plan + HEADER_ROW_POS_OFFSET)
    mask_words = plan + tl.load(plan + HEADER_MASK_OFFSET)
    partial_lse = scratch + max_partials.to(tl.int64) * heads * DV

    strides = (q_row_stride, q_head_stride, k_slot_stride, k_head_stride, v_slot_stride, v_head_stride)
    inputs = (q, k_slots, v_slots, slot_index, sinks, alibi_slopes, strides)
    sections = (seg, row, node_len, row_pos, mask_words, window)
    results = (out, lse, scratch, partial_lse)
    for unit in range(program, items * kv_heads, programs):
        fields = item + unit // kv_heads * ITEM_WIDTH
        head = unit % kv_heads
        row_begin, row_end = tl.load(fields + ITEM_ROW_BEGIN), tl.load(fields + ITEM_ROW_END)
        seg_begin, seg_end = tl.load(fields + ITEM_SEG_BEGIN), tl.load(fields + ITEM_SEG_END)
        partial = tl.load(fields + ITEM_PARTIAL)
        work = (row_begin, row_end, seg_begin, seg_end, partial, head, kv_heads, group)
        spoilt = _item(
            inputs,
            sections,
            results,
            work,
            scale,
            softcap,
            DK,
            DV,
            BLOCK_M,
            BLOCK_N,
            BLOCK_DK,
            BLOCK_DV,
            SEGS,
            SOFTCAP,
            SINKS,
            ALIBI,
            False,
            STAGES,
        )
        if spoilt > 0:
            # NaN or inf in V reaches rows that do not see it, as 0 * NaN is NaN: once more, with care.
            _item(
                inputs,
                sections,
                results,
                work,
                scale,
                softcap,
                DK,
                DV,
                16,
                16,
                BLOCK_DK,
                BLOCK_DV,
                SEGS,
                SOFTCAP,
                SINKS,
                ALIBI,
                True,
                1,
            )
        if partial >= 0:
            _merge_last(
                row,
                merge_indptr,
                merge_partial,
                scratch,
                partial_lse,
                counters,
                sinks,
                out,
                lse,
                kv_heads,
                group,
                head,
                row_begin,
                row_end,
                unit // kv_heads,
                DV,
                BLOCK_DV,
                SINKS,
                LANES,
                LISTED,
            )

    for i in range(program, num_empty + num_tokens - tokens, programs):
        token = tokens + i - num_empty
        if i < num_empty:
            token = tl.load(empty_tokens + i)
        _write_empty(token, sinks, out, lse, heads, DV, SINKS, BLOCK_N * 16)


@dataclass(frozen=True)
class Config:
    block_m: int  # packed rows of a row tile
    block_n: int  # columns of a tile
    num_warps: int
    num_stages: int


INTERPRETED = Config(64, 16, 4, 1)  # small tiles: several of each for small tests
INTERPRETED_PROGRAMS = 3


def config(arch: int, itemsize: int, dim: int, packed_rows: int, biased: bool) -> Config:
    """What is launched on an architecture (80, 90, ...) for heads of `dim`, a power of two, and so many packed rows.

    biased: with soft cap or ALiBi, whose terms take registers.

    A tile of K and V takes 4 * block_n * dim bytes of shared memory in each stage but one, Q 2 * dim a row, in 16-bit
    types: all fits the 99 KB of the smallest GPUs, the widest the 227 KB of sm_90 and sm_100. There is one program a
    multiprocessor, whose registers 256 threads fill; more columns, or fewer warps, spill in the loop over tiles
    (bench/kernels.py). 32 KB on their way keep the memory of an H200 busy: 4.3 TB/s for 0.8 us, over 132.
    A row tile of 64 is the least that `wgmma` takes; narrow steps wait for memory, where rows to spare cost nothing.
    Wide ones have 128 rows: each tile is read half as often. fp32 products run on the ordinary cores.
    """
    if itemsize == 4:
        return Config(16, 32 if dim <= 128 else 16, 4, 2)
    if dim > 128:
        return Config(64, 32, 8, 2)
    if packed_rows <= ROOFLINE_ROWS:
        return Config(64, 64, 8, 3) if dim <= 64 else Config(64, 32, 8, 4)
    return Config(128, 64 if dim > 64 and 90 <= arch < 120 and not biased else 32, 8, 3)


def launch(q: Tensor, pool: KVPool, plan: PlanTensors, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    k_slots, v_slots, num_tokens, max_partials = pool.k, pool.v, plan.num_tokens, plan.max_partials
    softcap, sinks, alibi_slopes = options.softcap or 0.0, options.sinks, options.alibi_slopes
    heads, k_dim = q.shape[1:]
    kv_heads, v_dim = v_slots.shape[1:]
    if max(k_dim, v_dim) > MAX_DIM:
        raise ValueError(f"k and v of the pool must have head dims of at most {MAX_DIM}, got {k_dim} and {v_dim}")
    if q.stride(2) != 1:
        q = q.contiguous()
    out = q.new_empty(num_tokens, heads, v_dim)
    lse = q.new_empty(num_tokens, heads, dtype=torch.float32)
    scratch = lse.new_empty(max_partials * heads * (v_dim + 1))
    if q.is_cpu:
        chosen, programs = INTERPRETED, INTERPRETED_PROGRAMS
    else:
        dim = triton.next_power_of_2(max(k_dim, v_dim))
        packed_rows = q.shape[0] * heads // kv_heads
        biased = softcap > 0 or alibi_slopes is not None
        chosen = config(architecture(q.device), q.element_size(), dim, packed_rows, biased)
        programs = multiprocessors(q.device)
    with device_of(q):
        _tree_attention[(programs,)](
            q,
            k_slots,
            v_slots,
            plan.buffer,
            plan.slot_index,
            _per_head(sinks),
            _per_head(alibi_slopes),
            out,
            lse,
            scratch,
            _counters(num_tokens * heads, q.device),
            q.stride(0),
            q.stride(1),
            k_slots.stride(0),
            k_slots.stride(1),
            v_slots.stride(0),
            v_slots.stride(1),
            num_tokens,
            max_partials,
            kv_heads,
            heads // kv_heads,
            options.scale_of(k_dim),
            softcap,
            DK=k_dim,
            DV=v_dim,
            BLOCK_DK=max(16, triton.next_power_of_2(k_dim)),
            BLOCK_DV=max(16, triton.next_power_of_2(v_dim)),
            BLOCK_M=chosen.block_m,
            BLOCK_N=chosen.block_n,
            SEGS=SEGS,
            SOFTCAP=softcap > 0,
            SINKS=sinks is not None,
            ALIBI=alibi_slopes is not None,
            STAGES=chosen.num_stages,
            LANES=LANES,
            LISTED=LISTED,
            num_warps=chosen.num_warps,
            num_stages=chosen.num_stages,
        )
    return out, lse


def _per_head(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


def _counters(size: int, device: torch.device) -> Tensor:
    """Zeros for the arrivals at each output; kernels leave them zero.

    One tensor for each stream, as launches on one follow each other. Captured graphs keep its address, so that an
    outgrown one stays.
    """
    stream = 0 if device.type == "cpu" else torch.cuda.current_stream(device).cuda_stream
    held = COUNTERS.setdefault((device, stream), [])
    if not held or held[-1].numel() < size:
        held.append(torch.zeros(triton.next_power_of_2(max(size, 1024)), dtype=torch.int32, device=device))
    return held[-1]
