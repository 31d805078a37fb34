"""Plans at fixed addresses: whatever was held before, the memory has what the plans say."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from forktree.device import plan_buffers
from forktree.device.plan_buffers import PlanBuffers
from forktree.plan.plan import plan_attention
from graph_fake import Passed
from layouts import KINDS, random_layout

CPU = torch.device("cpu")
HEADS = dict(num_qo_heads=4, num_kv_heads=2, head_dim=8)


def new_buffers(num_plans=2):
    buffers = PlanBuffers(CPU, num_plans, Passed)
    buffers.memory.fill_(-77)
    buffers.sent = []  # int32 of each copy
    write = buffers._staging.next_host_buffer

    def spy(size):
        buffers.sent.append(size)
        return write(size)

    buffers._staging.next_host_buffer = spy
    return buffers


def plans_of(layout):
    return [plan_attention(layout, **HEADS), plan_attention(layout, **HEADS, window=5)]


def assert_holds(buffers, plans):
    """Bit by bit, as far as a kernel reads."""
    for made, (buffer, slots) in zip(plans, buffers.sections, strict=True):
        assert np.array_equal(buffer[: made.buffer.size], made.buffer)
        layout = made.layout
        for begin, length in zip(layout.node_begin, layout.node_len, strict=True):
            assert np.array_equal(slots[begin : begin + length], layout.slot_index[begin : begin + length])
        on = made.on(CPU)
        assert [x.data_ptr() for x in on] == [buffer.data_ptr(), slots.data_ptr()]


def grown(plans, rng, layout=None):
    """The plans after some nodes grew into their room, and all rows moved on."""
    layout = layout or plans[0].layout
    length = layout.node_len + rng.integers(0, 2, layout.num_nodes)
    end = np.append(layout.node_begin[1:], layout.slot_index.size)
    length = np.minimum(length, end - layout.node_begin).astype(np.int32)
    slots = layout.slot_index.copy()
    for node in np.flatnonzero(length > layout.node_len):
        slots[layout.node_begin[node] + layout.node_len[node]] = rng.integers(1000)
    positions = layout.row_pos + rng.integers(0, 2, layout.num_rows).astype(np.int32)
    return [made.grow(length, positions, slots) for made in plans]


@pytest.mark.parametrize("kind", KINDS)
def test_any_plan_after_any_other(kind):
    buffers = new_buffers()
    for seed in range(5):
        plans = plans_of(random_layout(seed, kind).layout)
        assert not buffers.upload(plans)
        assert_holds(buffers, plans)
    assert len(buffers.sent) == 5  # one copy each
    buffers.upload(plans)
    assert len(buffers.sent) == 5  # none for what is there


@pytest.mark.parametrize("kind", ["random", "chain", "star", "deep"])
def test_growth_equals_filling_anew(kind):
    rng = np.random.default_rng(0)
    buffers = new_buffers()
    plans = plans_of(random_layout(3, kind, room=12, uneven=False, num_nodes=30).layout)
    buffers.upload(plans)
    (full,) = buffers.sent
    for _ in range(10):
        plans = grown(plans, rng)
        assert not buffers.upload(plans)
        assert_holds(buffers, plans)
        fresh = new_buffers()
        fresh.upload(plans)
        for (ours, _), (theirs, _), made in zip(buffers.sections, fresh.sections, plans, strict=True):
            assert torch.equal(ours[: made.buffer.size], theirs[: made.buffer.size])
    assert max(buffers.sent[1:]) < full / 100


def test_other_growth_than_that_of_what_is_held():
    """Twice from the same plan with other slots; back to the first; two steps at once."""
    rng = np.random.default_rng(1)
    buffers = new_buffers()
    first = plans_of(random_layout(1, "star", room=6, uneven=False).layout)
    one, other = grown(first, rng), grown(first, rng)
    for plans in (first, one, other, first, other, one, grown(grown(one, rng), rng), first, grown(one, rng)):
        buffers.upload(plans)
        assert_holds(buffers, plans)


def test_plans_that_are_not_held_any_more_are_found_elsewhere():
    buffers = new_buffers()
    first, second = (plans_of(random_layout(seed, "star").layout) for seed in (0, 1))
    buffers.upload(first)
    buffers.upload(second)
    for made in first:
        buffer, _ = made.on(CPU)
        assert np.array_equal(buffer, made.buffer)


def test_larger_memory_where_it_does_not_suffice(monkeypatch):
    monkeypatch.setattr(plan_buffers, "PLAN_CAPACITY", 64)
    monkeypatch.setattr(plan_buffers, "SLOT_CAPACITY", 8)
    buffers = new_buffers()
    moves = 0
    for size in (1, 2, 4, 8, 16, 4, 2, 64):
        plans = plans_of(random_layout(0, "star", num_nodes=size, num_contexts=size).layout)
        before = buffers.memory.data_ptr()
        moved = buffers.upload(plans)
        moves += moved
        assert moved == (buffers.memory.data_ptr() != before)
        assert_holds(buffers, plans)
    assert 2 <= moves <= 6


def test_growth_beyond_the_memory(monkeypatch):
    monkeypatch.setattr(plan_buffers, "SLOT_CAPACITY", 8)
    rng = np.random.default_rng(0)
    buffers = new_buffers()
    plans = plans_of(random_layout(0, "chain", num_nodes=1, num_contexts=2, max_len=3, room=40, uneven=False).layout)
    moves = 0
    for _ in range(30):
        moves += buffers.upload(plans)
        assert_holds(buffers, plans)
        plans = grown(plans, rng)
    assert 1 <= moves <= 2


def test_plans_of_two_layouts_are_refused():
    buffers = new_buffers()
    one, other = (plans_of(random_layout(seed, "star").layout) for seed in (0, 1))
    buffers.upload(one)
    with pytest.raises(ValueError, match="plans must be of one layout, got two that differ in slot_index"):
        buffers.upload([one[0], other[1]])
    assert_holds(buffers, one)
    slots = one[0].layout.slot_index
    same = replace(one[0].layout, slot_index=slots.copy())
    buffers.upload([one[0], plan_attention(same, **HEADS, window=5)])


def test_callers_in_inference_mode_and_not():
    buffers = new_buffers()
    rng = np.random.default_rng(0)
    plans = plans_of(random_layout(0, "star", room=9, uneven=False).layout)
    with torch.inference_mode():
        buffers = new_buffers()
        buffers.upload(plans)
    buffers.upload(plans := grown(plans, rng))
    with torch.inference_mode():
        buffers.upload(plans := grown(plans, rng))
    buffers.upload(plans := plans_of(plans[0].layout))
    assert_holds(buffers, plans)
