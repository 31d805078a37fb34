import importlib
import time
from dataclasses import replace

import numpy as np
import pytest

from forktree.layout import TreeLayout
from forktree.plan import CONTIGUOUS, LIVE, PARTIAL, START, STOP, check_plan
from layouts import KINDS, random_layout, shared_prompt

planning = importlib.import_module("forktree.plan")  # the package may export the function by this name
HEADS = dict(num_qo_heads=4, num_kv_heads=2, head_dim=8)


def plan(layout, **options):
    return planning.plan(layout, **HEADS, **options)


@pytest.mark.parametrize("thin", [1, 4, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_plans_of_random_layouts(kind, thin, monkeypatch):
    monkeypatch.setattr(planning, "THIN", thin)
    monkeypatch.setattr(planning, "LONG", 5)
    for seed in range(25):
        layout = random_layout(seed, kind, room=seed % 3).layout
        for window in (None, 1, 6):
            check_plan(plan(layout, window=window))


def test_rows_that_see_the_same_read_it_once():
    layout = shared_prompt(3, 4, 40, 10)
    stats = plan(layout).stats()
    assert stats.distinct_tokens == stats.planned_tokens == 3 * (40 + 4 * 10)
    assert stats.distinct_bytes == stats.planned_bytes == stats.distinct_tokens * 2 * 2 * 8 * 2
    assert stats.attended == stats.computed == 12 * 50
    assert stats.partials == 24


def test_forks_inside_a_node_are_read_once(monkeypatch):
    """Root of 30 tokens; children at 30, 20 and 10, each a context: [0, 10) by three, [10, 20) by two, ..."""
    layout = TreeLayout(
        slot_index=np.arange(60),
        node_begin=[0, 30, 40, 50],
        node_len=[30, 10, 10, 10],
        node_parent=[-1, 0, 0, 0],
        node_fork=[0, 20, 30, 10],
        node_pos=[0, 20, 30, 10],
        row_indptr=[0, 1, 2, 3],
        path_indptr=[0, 1, 2, 3],
        path_node=[1, 2, 3],
        path_stop=[LIVE] * 3,
        path_top=[-1] * 3,
        causal=[0] * 3,
        row_token=[0, 1, 2],
        row_pos=[29, 39, 19],
    )
    monkeypatch.setattr(planning, "THIN", 1)
    made = plan(layout)
    check_plan(made)
    assert made.stats().planned_tokens == made.stats().distinct_tokens == 60
    assert made.row_order.tolist() == [1, 0, 2]
    shared = [(int(s[START]), int(s[STOP])) for s in made.seg if s[planning.NODE] == 0]
    assert sorted(shared) == [(0, 10), (10, 20), (20, 30)]


def test_a_chunk_is_one_item_and_its_past_needs_no_mask():
    layout = TreeLayout(
        slot_index=np.arange(40),
        node_begin=[0],
        node_len=[40],
        node_parent=[-1],
        node_fork=[0],
        node_pos=[0],
        row_indptr=[0, 16],
        path_indptr=[0, 1],
        path_node=[0],
        path_stop=[LIVE],
        path_top=[-1],
        causal=[1],
        row_token=np.arange(16),
        row_pos=np.arange(24, 40),
    )
    made = plan(layout)
    check_plan(made)
    assert made.item[:, PARTIAL].tolist() == [-1]
    assert made.seg[:, [START, STOP]].tolist() == [[0, 24], [24, 40]]
    assert made.stats().attended == sum(range(25, 41)) and made.stats().computed == 640


def test_windows_drop_what_no_row_can_see():
    layout = shared_prompt(2, 4, 100, 10)
    made = plan(layout, window=30)
    check_plan(made)
    assert made.stats().planned_tokens == 2 * (20 + 4 * 10) and made.stats().attended == 8 * 30
    assert plan(layout, window=5).stats().planned_tokens == 8 * 5


def test_growth_keeps_the_plan():
    for seed in range(20):
        layout = random_layout(seed, room=4).layout
        for window in (None, 5):
            made = plan(layout, window=window)
            fixed = np.isin(np.arange(layout.num_nodes), layout.tip[layout.uneven])
            for _ in range(4):
                grown = made.grow(made.layout.node_len + ~fixed, made.layout.row_pos + 1)
                assert grown.item is made.item and grown.seg is made.seg
                made = grown
                check_plan(made)


def test_growth_refuses_chunks():
    made = plan(random_layout(0, "chunks", room=1).layout)
    with pytest.raises(ValueError, match=r"node \d must keep its \d tokens, .* got \d: plan anew"):
        made.grow(made.layout.node_len + 1, made.layout.row_pos)


def test_joins_may_not_share_tokens():
    layout = TreeLayout(
        slot_index=np.arange(6),
        node_begin=[0, 4],
        node_len=[4, 2],
        node_parent=[-1, 0],
        node_fork=[0, 3],
        node_pos=[0, 3],
        row_indptr=[0, 1],
        path_indptr=[0, 2],
        path_node=[0, 1],
        path_stop=[2, 2],
        path_top=[-1, -1],
        causal=[0],
        row_token=[0],
        row_pos=[4],
    )
    with pytest.raises(ValueError, match=r"paths of context 0 must not share tokens, got node 0 \[0, 2\)"):
        plan(layout)


def test_empty_plans():
    for layout in (
        TreeLayout([], [], [], [], [], [], [0], [0], [], [], [], [], [], []),
        TreeLayout([3], [0], [1], [-1], [0], [0], [0, 0], [0, 1], [0], [1], [-1], [0], [], []),
        TreeLayout([3], [0], [1], [-1], [0], [0], [0, 1], [0, 1], [0], [0], [-1], [0], [0], [0]),
    ):
        for window in (None, 3):
            made = plan(layout, window=window)
            check_plan(made)
            assert len(made.item) == 0 and made.stats().distinct_tokens == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_qo_heads": 3}, "num_qo_heads must be a multiple of num_kv_heads, got 3 and 2"),
        ({"num_kv_heads": 0}, "num_kv_heads must be at least 1, got 0"),
        ({"head_dim": 0}, "head_dim must be at least 1, got 0"),
        ({"window": 0}, r"window must be in \[1, 2\*\*31\) or None, got 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        planning.plan(shared_prompt(1, 2, 3, 3), **{**HEADS, **options})


def edited(made, name, row, column, value):
    array = getattr(made, name).copy()
    array[row, column] = value
    return replace(made, **{name: array})


def test_check_plan_catches_corruption():
    made = plan(shared_prompt(1, 3, 20, 10))
    check_plan(made)
    with pytest.raises(ValueError, match="row 0 must read all it sees, got nothing for indices"):
        check_plan(edited(made, "seg", 0, STOP, 19))
    with pytest.raises(ValueError, match=r"segment 0 must lie within node 0 of 20 tokens, got \[0, 21\)"):
        check_plan(edited(made, "seg", 0, STOP, 21))
    with pytest.raises(ValueError, match="row 2 must read all it sees"):
        check_plan(edited(made, "seg", 0, planning.ROW_HI, 2))
    with pytest.raises(ValueError, match="segment 1 must have index_begin 20 and pos 20"):
        check_plan(edited(made, "seg", 1, planning.POS, 0))
    with pytest.raises(ValueError, match="segment 1 must not be contiguous"):
        check_plan(edited(made, "seg", 1, CONTIGUOUS, 1))
    with pytest.raises(ValueError, match="items must own all segments"):
        check_plan(replace(made, seg=np.concatenate([made.seg, made.seg[-1:]])))

    dropped = replace(made, item=made.item[:-1].copy(), seg=made.seg[:-1])
    with pytest.raises(ValueError, match="row 2 must read all it sees"):
        check_plan(dropped)
    doubled = replace(
        made,
        item=np.concatenate([made.item, [[0, 3, 4, 5, 6]]]).astype(np.int32),
        seg=np.concatenate([made.seg, made.seg[:1]]),
    )
    with pytest.raises(ValueError, match="row 0 must read a token once, got 2 times for index 0"):
        check_plan(doubled)
    beyond = edited(made, "item", 1, planning.ROW_END, 2)
    beyond = edited(beyond, "seg", 1, planning.ROW_HI, 2)
    with pytest.raises(ValueError, match="row 1 must not read beyond its context"):
        check_plan(beyond)
    with pytest.raises(ValueError, match="merge list of token 0 must be"):
        check_plan(replace(made, merge_partial=made.merge_partial[::-1].copy()))
    with pytest.raises(ValueError, match=r"merge list of token 2|written once"):
        check_plan(edited(made, "item", -1, PARTIAL, -1))
    with pytest.raises(ValueError, match="merge_indptr must have 4 entries"):
        check_plan(replace(made, merge_indptr=made.merge_indptr[:-1]))
    with pytest.raises(ValueError, match="row_order must be a permutation"):
        check_plan(replace(made, row_order=np.zeros(3, np.int32)))


def test_planning_is_cheap():
    layout = shared_prompt(100, 5, 40, 20)
    times = []
    for _ in range(20):
        begin = time.perf_counter()
        plan(layout)
        times.append(time.perf_counter() - begin)
    assert min(times) < 3e-3
