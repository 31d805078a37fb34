"""Kernels trust a plan buffer once `validate` took it: whatever it holds, they must stay within bounds."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forktree import _core
from forktree.plan.cost_model import CPU
from forktree.plan.format import LIVE, MAGIC, Header, Item, Row, Seg, sections
from forktree.plan.plan import plan_attention
from layouts import KINDS, random_layout, shared_prompt

HEADS = dict(num_qo_heads=4, num_kv_heads=2, head_dim=8)
TINY = replace(CPU, item=0, segment=0, partial=0, grain=0)


def walk(buffer):
    """Goes through a plan as a kernel does; IndexError if it would leave the buffer."""
    rows, tokens, segs, nodes, partials, words = (
        int(buffer[Header[f"NUM_{name}"]]) for name in ("ROWS", "TOKENS", "SEGS", "NODES", "PARTIALS", "MASK_WORDS")
    )
    assert buffer.min(initial=0) >= -(2**31)
    parts = sections(buffer)
    item, seg, row, node_len, row_pos = (parts[name] for name in ("item", "seg", "row", "node_len", "row_pos"))
    indptr, merge = parts["merge_indptr"], parts["merge_partial"]
    for part in (*parts.values(), row):
        assert np.shares_memory(part, buffer) or not part.size

    def within(index, size):
        if not 0 <= index < size:
            raise IndexError(f"{index} is not in [0, {size})")

    for row_begin, row_end, seg_begin, seg_end, partial in item.tolist():
        within(row_begin, rows)
        within(row_end - 1, rows)
        if partial >= 0:
            within(partial + row_end - row_begin - 1, partials)
        for q in range(seg_begin, seg_end):
            within(q, segs)
            index_begin, start, stop, node, lo, hi, pos, _ = seg[q].tolist()
            within(node, nodes)
            end = min(stop, int(node_len[node]))
            assert stop == LIVE or end == stop
            assert index_begin + start >= 0 and pos + end < 2**31
            assert row_begin <= lo < hi <= row_end
            for r in range(lo, hi):
                layout_row, token, tip, tail, last, mask = row[r].tolist()
                within(layout_row, rows)
                within(token, tokens)
                seen = min(end - 1, last)
                if node == tip and mask >= 0 and max(start, tail) <= seen:
                    within(mask + (seen - tail) // 32, words)
    for t in range(tokens):
        for i in range(indptr[t], indptr[t + 1]):
            within(i, partials)
            within(merge[i], partials)
    assert sorted(row[:, 0].tolist()) == list(range(rows)) and row_pos.min(initial=0) >= 0


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 10**6), kind=st.sampled_from(KINDS), data=st.data())
def test_hostile_buffers_are_refused_or_harmless(seed, kind, data):
    layout = random_layout(seed, kind, num_nodes=4, num_contexts=4).layout
    made = plan_attention(layout, **HEADS, window=data.draw(st.sampled_from([None, 6])), cost_model=TINY)
    buffer = made.buffer.copy()
    walk(buffer)
    values = (
        st.integers(-2, 8) | st.sampled_from([-(2**31), 2**31 - 1, 2**30, buffer.size]) | st.integers(-(2**31), LIVE)
    )
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, buffer.size - 1))
        buffer[at] = data.draw(values)
    buffer = buffer[: data.draw(st.just(buffer.size) | st.integers(0, buffer.size))]
    try:
        _core.check_plan_buffer(buffer)
    except ValueError as error:
        assert str(error).startswith("plan must ")
    else:
        walk(buffer)


def place(section, entry, field=0):
    """Where a field of the n-th entry of a section lies, in a buffer of `shared_prompt(1, 3, 20, 10)`."""
    buffer = plan_attention(shared_prompt(1, 3, 20, 10), **HEADS).buffer
    part = sections(buffer)[section]
    return int(buffer[Header[f"{section.upper()}_OFFSET"]]) + entry * (part.shape[1] if part.ndim == 2 else 1) + field


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (Header.MAGIC, 0, "begin with 1179341874, got 0"),
        (Header.SIZE, 5, "have .* entries as its header says, got 5"),
        (Header.NUM_ITEMS, 3, "have its section seg at entry 40 or later, as .*, got 30"),
        (Header.NUM_MASK_WORDS, 3, "have .* entries as its header says"),
        (Header.ROW_POS_OFFSET, 2**31 - 1, "have its section mask at entry 2147483650 or later"),
        (Header.ITEM_OFFSET, -1, "have its section item at entry 25 or later, as .*, got -1"),
        (Header.NUM_ROWS, -1, "have sizes and a window of at least 0, got -1"),
        (Header.NUM_QO_HEADS, 3, "have num_qo_heads that are a multiple of num_kv_heads, got 3 and 2"),
        (Header.HEAD_DIM, 0, "have heads and a head_dim of at least 1, got 0"),
        (Header.BYTES_PER_TOKEN, 0, "have a value_dim and bytes_per_token of at least 1, got 0"),
        (("item", 0, Item.ROW_END), 4, "have item 0 with rows within the plan"),
        (("item", 0, Item.SEG_END), 3, "have items that own all segments"),
        (("item", 0, Item.PARTIAL), 0, "have item 0 with partials within the plan"),
        (("seg", 0, Seg.STOP), 21, "have segment 0 within its node"),
        (("seg", 0, Seg.ROW_HI), 4, "have segment 0 with rows of its item"),
        (("seg", 1, Seg.CONTIGUOUS), 1, "have segment 1 contiguous"),
        (("merge_indptr", 1), 1, "have a merge_indptr that rises from 0"),
        (("row", 0, Row.ROW), 1, "have row 1 different from all others"),
        (("row", 0, Row.TOKEN), 3, "have row 0 of an output token"),
        (("row", 0, Row.MASK), 0, "have row 0 with bits within the mask"),
        (-1, -1, "have node_len and row_pos of at least 0"),
    ],
)
def test_refusals_say_why(at, value, message):
    made = plan_attention(shared_prompt(1, 3, 20, 10), **HEADS)
    buffer = made.buffer.copy()
    buffer[place(*at) if isinstance(at, tuple) else at] = value
    with pytest.raises(ValueError, match=f"plan must {message}"):
        _core.check_plan_buffer(buffer)
    with pytest.raises(ValueError, match=f"plan must {message}"):
        replace(made, buffer=buffer)


def test_a_plan_is_read_only_once_it_was_validated():
    made = plan_attention(shared_prompt(1, 3, 20, 10), **HEADS)
    grown = made.grow(made.layout.node_len, made.layout.row_pos + 1)
    ours = made.buffer.copy()
    for held in (made, grown, replace(made, buffer=ours), replace(made, buffer=made.buffer[:])):
        with pytest.raises(ValueError, match="read-only"):
            held.buffer[0] = 1
        for part in sections(held.buffer).values():
            assert not part.flags.writeable
        buffer, _ = held.on(torch.device("cpu"))
        assert np.array_equal(buffer, held.buffer)
    ours[0] = 1
    assert made.buffer[0] == MAGIC


def test_plans_of_other_layouts_are_refused():
    made = plan_attention(shared_prompt(1, 3, 20, 10), **HEADS)
    layout = made.layout
    for other, message in (
        (shared_prompt(1, 4, 20, 10), "buffer must have the rows, tokens and nodes of its layout"),
        (shared_prompt(1, 3, 21, 10), "buffer must have the layout's node_len"),
        (replace(layout, node_begin=layout.node_begin[::-1].copy(), slot_index=np.arange(80)), "segments of buffer"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(made, layout=other)


def test_positions_stay_below_2_31():
    layout = shared_prompt(1, 3, 20, 10)
    with pytest.raises(ValueError, match=r"node_len\[0\] must be such that positions are below 2\*\*31, got 20"):
        replace(layout, node_pos=np.array([2**31 - 5, 20, 20, 20], np.int32))
    high = replace(layout, node_pos=np.array([2**31 - 1 - 20, 20, 20, 20], np.int32), slot_index=np.arange(90))
    made = plan_attention(high, **HEADS)
    with pytest.raises(ValueError, match=r"node_len\[0\] must be such that positions are below 2\*\*31, got 21"):
        made.grow(np.append(21, high.node_len[1:]), high.row_pos)
