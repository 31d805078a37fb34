"""The kernel: persistent programs over the items of a plan."""

from __future__ import annotations

import triton
import triton.language as tl

from forktree.triton_kernels.plan_format import (
    HEADER_EMPTY_TOKENS_OFFSET,
    HEADER_ITEM_OFFSET,
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
    ROW_ROW,
    ROW_TOKEN,
    ROW_WIDTH,
)
from forktree.triton_kernels.tree_attention.merge import _merge_last, _write_empty
from forktree.triton_kernels.tree_attention.row_tile import LOG2E, _row_tile

LN2 = tl.constexpr(0.6931471805599453)


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
    SANITIZE_V: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Writes outputs or partials of an item for one KV head. Returns whether any is NaN."""
    q, k_slots, v_slots, slot_index, sinks, alibi_slopes, strides = inputs
    q_row_stride, q_head_stride, k_slot_stride, k_head_stride, v_slot_stride, v_head_stride = strides
    plan, seg, row, node_len, row_pos, window = sections
    out, lse, partial_out, partial_lse = results
    row_begin, row_end, seg_begin, seg_end, partial, head, kv_heads, group = item
    dk, dv = tl.arange(0, BLOCK_DK), tl.arange(0, BLOCK_DV)
    packed = (row_end - row_begin) * group
    wide_head = head.to(tl.int64)
    has_nan = 0
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
            plan,
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
            SANITIZE_V,
            STAGES,
        )
        divisor = tl.where(mass == 0, 1.0, mass)
        o = acc / divisor[:, None]
        total = tl.where(mass == 0, float("-inf"), (m + tl.log2(divisor)) * LN2)
        has_nan = tl.maximum(has_nan, tl.max((o != o).to(tl.int32)))
        stored = real[:, None] & (dv[None, :] < DV)
        if partial < 0:
            state = tl.load(fields + ROW_TOKEN).to(tl.int64) * (kv_heads * group) + q_head
            tl.store(out + state[:, None] * DV + dv[None, :], o.to(out.dtype.element_ty), mask=stored)
            tl.store(lse + state, total, mask=real)
        else:
            state = (partial + plan_row - row_begin).to(tl.int64) * (kv_heads * group) + q_head
            tl.store(partial_out + state[:, None] * DV + dv[None, :], o, mask=stored)
            tl.store(partial_lse + state, total, mask=real)
    return has_nan


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
    """Grid: any number of programs; they take the units of work, and then the tokens that see nothing, in turn."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    heads = kv_heads * group
    tokens, items = tl.load(plan + HEADER_NUM_TOKENS), tl.load(plan + HEADER_NUM_ITEMS)
    num_empty, window = tl.load(plan + HEADER_NUM_EMPTY_TOKENS), tl.load(plan + HEADER_WINDOW)
    item = plan + tl.load(plan + HEADER_ITEM_OFFSET)
    seg = plan + tl.load(plan + HEADER_SEG_OFFSET)
    row = plan + tl.load(plan + HEADER_ROW_OFFSET)
    node_len = plan + tl.load(plan + HEADER_NODE_LEN_OFFSET)
    row_pos = plan + tl.load(plan + HEADER_ROW_POS_OFFSET)
    partial_lse = scratch + max_partials.to(tl.int64) * heads * DV

    strides = (q_row_stride, q_head_stride, k_slot_stride, k_head_stride, v_slot_stride, v_head_stride)
    inputs = (q, k_slots, v_slots, slot_index, sinks, alibi_slopes, strides)
    sections = (plan, seg, row, node_len, row_pos, window)
    results = (out, lse, scratch, partial_lse)
    for unit in range(program, items * kv_heads, programs):
        fields = item + unit // kv_heads * ITEM_WIDTH
        head = unit % kv_heads
        row_begin, row_end = tl.load(fields + ITEM_ROW_BEGIN), tl.load(fields + ITEM_ROW_END)
        seg_begin, seg_end = tl.load(fields + ITEM_SEG_BEGIN), tl.load(fields + ITEM_SEG_END)
        partial = tl.load(fields + ITEM_PARTIAL)
        work = (row_begin, row_end, seg_begin, seg_end, partial, head, kv_heads, group)
        has_nan = _item(
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
        if has_nan > 0:
            # NaN or inf in V reaches rows that do not see it, as 0 * NaN is NaN. This is rare: all is done again.
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
                plan,
                row,
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

    empty_tokens = plan + tl.load(plan + HEADER_EMPTY_TOKENS_OFFSET)
    for i in range(program, num_empty + num_tokens - tokens, programs):
        token = tokens + i - num_empty
        if i < num_empty:
            token = tl.load(empty_tokens + i)
        _write_empty(token, sinks, out, lse, heads, DV, SINKS, BLOCK_N * 16)
