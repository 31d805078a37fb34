"""Outputs that no item writes: those merged from partials, and those of tokens that see nothing."""

from __future__ import annotations

import triton
import triton.language as tl

from forktree.triton_kernels.merge_states import _merge
from forktree.triton_kernels.plan_format import (
    HEADER_MERGE_INDPTR_OFFSET,
    HEADER_MERGE_PARTIAL_OFFSET,
    ROW_TOKEN,
    ROW_WIDTH,
)


@triton.jit
def _merge_last(
    plan,
    row,
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
    """Counts the item's partials of one KV head as written, and merges the tokens whose partials are complete.

    turn: items over the same rows that end together start with different rows, and so share the merging.
    """
    tl.debug_barrier()  # every thread's partials are stored before any thread counts them
    merge_indptr = plan + tl.load(plan + HEADER_MERGE_INDPTR_OFFSET)
    merge_partial = plan + tl.load(plan + HEADER_MERGE_PARTIAL_OFFSET)
    d = tl.arange(0, BLOCK_DV)
    packed = (row_end - row_begin) * group
    blocks = tl.cdiv(packed, LANES)
    for i in range(0, blocks):
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
            tl.debug_barrier()  # what one thread has seen counted, all threads may read
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
    """Writes the output of a token that sees nothing: 0, and the log-sum-exp of the sink alone."""
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
