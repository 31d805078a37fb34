"""Kernels trust a plan buffer once `plan_view` took it: whatever it holds, they must stay within bounds."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forktree import _core
from forktree.plan.cost_model import CPU
from forktree.plan.plan import HEADER, LIVE, plan
from layouts import KINDS, random_layout, shared_prompt

HEADS = dict(num_qo_heads=4, num_kv_heads=2, head_dim=8)
TINY = replace(CPU, item=0, segment=0, partial=0, grain=0)


def walk(buffer):
    """Goes through a plan as a kernel does; IndexError if it would leave the buffer."""
    rows, tokens, items, segs, nodes, partials, words = buffer[2:9].tolist()
    clears = int(buffer[13])
    assert buffer.min(initial=0) >= -(2**31)
    sizes = [5 * items, 8 * segs, tokens + 1, partials, clears, 6 * rows, nodes, rows, words]
    item, seg, indptr, merge, _, row, node_len, row_pos, _ = np.split(buffer[HEADER:], np.cumsum(sizes)[:-1])
    item, seg, row = item.reshape(-1, 5), seg.reshape(-1, 8), row.reshape(-1, 6)

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


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 10**6), kind=st.sampled_from(KINDS), data=st.data())
def test_hostile_buffers_are_refused_or_harmless(seed, kind, data):
    layout = random_layout(seed, kind, num_nodes=4, num_contexts=4).layout
    made = plan(layout, **HEADS, window=data.draw(st.sampled_from([None, 6])), cost_model=TINY)
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


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, 0, "begin with 1179341873, got 0"),
        (1, 5, "have .* entries as its header says"),
        (4, 3, "have .* entries as its header says"),
        (2, -1, "have sizes and a window of at least 0, got -1"),
        (9, 3, "have num_qo_heads that are a multiple of num_kv_heads, got 3 and 2"),
        (11, 0, "have heads and a head_dim of at least 1, got 0"),
        (HEADER + 1, 4, "have item 0 with rows within the plan"),
        (HEADER + 3, 3, "have items that own all segments"),
        (HEADER + 4, 0, "have item 0 with partials within the plan"),
        (HEADER + 5 + 2, 21, "have segment 0 within its node"),
        (HEADER + 5 + 5, 4, "have segment 0 with rows of its item"),
        (HEADER + 5 + 8 + 7, 1, "have segment 1 contiguous"),
        (HEADER + 5 + 4 * 8 + 1, 1, "have a merge_indptr that rises from 0"),
        (HEADER + 5 + 4 * 8 + 4, 1, "have row 1 different from all others"),
        (HEADER + 5 + 4 * 8 + 4 + 1, 3, "have row 0 of an output token"),
        (HEADER + 5 + 4 * 8 + 4 + 5, 0, "have row 0 with bits within the mask"),
        (-1, -1, "have node_len and row_pos of at least 0"),
    ],
)
def test_refusals_say_why(at, value, message):
    buffer = plan(shared_prompt(1, 3, 20, 10), **HEADS).buffer.copy()
    buffer[at] = value
    with pytest.raises(ValueError, match=f"plan must {message}"):
        _core.check_plan_buffer(buffer)
