from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forktree.plan.check import check_plan
from forktree.plan.cost_model import CPU, CostModel
from forktree.plan.format import LIVE, Item, Row, Seg
from forktree.plan.layout import TreeLayout
from forktree.plan.plan import plan_attention
from layouts import KINDS, random_layout, shared_prompt

HEADS = dict(num_qo_heads=4, num_kv_heads=2, head_dim=8)
FREE = replace(CPU, item=0, segment=0, partial=0, grain=0)  # cutting costs nothing, so it is done


def plan(layout, **options):
    return plan_attention(layout, **HEADS, **options)


@pytest.mark.slow
@pytest.mark.parametrize("cost_model", [None, FREE, replace(FREE, units=99, lanes=2, max_lanes=4)])
@pytest.mark.parametrize("kind", KINDS)
def test_plans_of_random_layouts(kind, cost_model):
    for seed in range(25):
        layout = random_layout(seed, kind, room=seed % 3).layout
        for window in (None, 1, 6):
            check_plan(plan(layout, window=window, cost_model=cost_model))


PRICE = st.sampled_from([0, 1, 10, 100])
COST_MODELS = st.builds(
    CostModel,
    units=st.integers(1, 20),
    heads_per_item=st.integers(1, 3),
    lanes=st.sampled_from([1, 2, 4, 16]),
    max_lanes=st.sampled_from([1, 4, 8, 1000]),
    memory=PRICE,
    cache=PRICE,
    mac=PRICE,
    exp=PRICE,
    partial=PRICE,
    segment=PRICE,
    item=st.sampled_from([0, 1, 1000, 100_000]),
    grain=st.sampled_from([0, 1, 1000, 100_000]),
)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(KINDS),
    max_len=st.sampled_from([1, 9, 300]),
    window=st.sampled_from([None, 1, 6, 70]),
    cost_model=COST_MODELS,
    max_partials=st.none() | st.integers(0, 20),
    invariant=st.booleans(),
)
def test_plans_at_any_price(seed, kind, max_len, window, cost_model, max_partials, invariant):
    layout = random_layout(seed, kind, room=seed % 3, max_len=max_len).layout
    options = dict(window=window, cost_model=cost_model, invariant=invariant)
    unbound = plan(layout, **options)
    check_plan(unbound)
    assert np.array_equal(plan(layout, **options).buffer, unbound.buffer)
    assert unbound.stats().attended == sum(layout.visible(r, window)[0].size for r in range(layout.num_rows))
    group = HEADS["num_qo_heads"] // HEADS["num_kv_heads"]
    for row_begin, row_end, *_ in unbound.item.tolist():
        assert row_end - row_begin == 1 or (row_end - row_begin) * group <= cost_model.max_lanes
    if max_partials is None:
        return
    several = np.bincount(layout.row_token, minlength=layout.num_tokens)
    needed = int((several[layout.row_token] > 1).sum())
    try:
        made = plan(layout, max_partials=max_partials, **options)
    except ValueError as error:
        assert f"got {max_partials}" in str(error)
        assert (unbound.num_partials if invariant else needed) > max_partials
    else:
        check_plan(made)
        assert made.num_partials <= max_partials


def test_a_cap_on_partials_is_kept_by_reading_again():
    layout = shared_prompt(1, 4, 5000, 10)
    free = plan(layout, cost_model=FREE)
    assert free.num_partials > 40 and free.stats().planned_tokens == free.stats().distinct_tokens
    for cap in (0, 7, 8, 15, 40):
        made = plan(layout, cost_model=FREE, max_partials=cap)
        check_plan(made)
        assert made.num_partials <= cap
    assert plan(layout, cost_model=FREE, max_partials=0).stats().planned_tokens == 4 * 5010


def test_rows_of_one_token_need_partials():
    layout = replace(shared_prompt(1, 3, 20, 10), row_token=[0, 1, 0])
    made = plan(layout)
    check_plan(made)
    assert made.num_partials == 3 and len(made.item) == 1
    made = plan(layout, max_partials=2)
    check_plan(made)
    assert made.num_partials == 2
    with pytest.raises(ValueError, match="max_partials must be at least 2, which this layout needs, got 1"):
        plan(layout, max_partials=1)


def together(layouts, rng):
    """All layouts in one step, nodes and contexts of each among those of the others; and their rows."""
    owner = {
        what: rng.permutation(np.repeat(np.arange(len(layouts)), [getattr(x, f"num_{what}") for x in layouts]))
        for what in ("nodes", "contexts")
    }
    node = [np.append(np.flatnonzero(owner["nodes"] == i), -1) for i in range(len(layouts))]  # index -1 stays -1
    columns = {f.name: [] for f in fields(TreeLayout) if f.name not in ("mask_indptr", "mask_bits")}
    begin = np.cumsum([0, *(x.slot_index.size for x in layouts)])
    tokens = np.cumsum([0, *(x.num_tokens for x in layouts)])
    taken = [0] * len(layouts)
    for i in owner["nodes"]:
        x, n = layouts[i], taken[i]
        taken[i] += 1
        columns["node_begin"].append(x.node_begin[n] + begin[i])
        columns["node_parent"].append(node[i][x.node_parent[n]])
        for name in ("node_len", "node_fork", "node_pos"):
            columns[name].append(getattr(x, name)[n])
    rows = [[] for _ in layouts]
    words, word_end, row_end, path_end = [], [0], [0], [0]
    taken = [0] * len(layouts)
    for i in owner["contexts"]:
        x, c = layouts[i], taken[i]
        taken[i] += 1
        for r in range(x.row_indptr[c], x.row_indptr[c + 1]):
            rows[i].append(len(columns["row_token"]))
            columns["row_token"].append(x.row_token[r] + tokens[i])
            columns["row_pos"].append(x.row_pos[r])
        for p in range(x.path_indptr[c], x.path_indptr[c + 1]):
            columns["path_node"].append(node[i][x.path_node[p]])
            columns["path_stop"].append(x.path_stop[p])
            columns["path_top"].append(node[i][x.path_top[p]])
        columns["causal"].append(x.causal[c])
        if x.mask_indptr is not None:
            words += x.mask_bits[x.mask_indptr[c] : x.mask_indptr[c + 1]].tolist()
        row_end.append(len(columns["row_token"]))
        path_end.append(len(columns["path_node"]))
        word_end.append(len(words))
    columns |= dict(
        slot_index=np.concatenate([x.slot_index for x in layouts]), row_indptr=row_end, path_indptr=path_end
    )
    both = TreeLayout(**columns, mask_indptr=word_end, mask_bits=np.array(words, np.uint32))
    return both, rows, begin


def story(made, row, origin=0):
    """How a row is computed: its items in the order they are merged, each with the tokens it reads for the row."""
    r = int(np.flatnonzero(made.row_order == row)[0])
    token = made.row[r, Row.TOKEN]
    partials = made.merge_partial[made.merge_indptr[token] : made.merge_indptr[token + 1]].tolist()
    items = []
    for row_begin, row_end, seg_begin, seg_end, first in made.item.tolist():
        if not row_begin <= r < row_end:
            continue
        segs = made.seg[seg_begin:seg_end]
        mine = segs[(segs[:, Seg.ROW_LO] <= r) & (r < segs[:, Seg.ROW_HI])]
        when = partials.index(first + r - row_begin) if first >= 0 else -1
        items.append((when, (mine[:, [Seg.INDEX_BEGIN, Seg.START, Seg.STOP]] - [origin, 0, 0]).tolist()))
    return [(when < 0, segs) for when, segs in sorted(items, key=lambda item: item[0])]


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(KINDS),
    max_len=st.sampled_from([9, 3000]),
    window=st.sampled_from([None, 6]),
    cost_model=COST_MODELS,
)
def test_invariant_plans_do_not_depend_on_strangers(seed, kind, max_len, window, cost_model):
    layouts = [random_layout(seed + i, kind, max_len=max_len, uneven=max_len < 10).layout for i in range(3)]
    options = dict(window=window, cost_model=cost_model, invariant=True)
    both, rows, origin = together(layouts, np.random.default_rng(seed))
    made = plan(both, **options)
    if max_len < 10:
        check_plan(made)
    for i, layout in enumerate(layouts):
        alone = plan(layout, **options)
        for r, row in enumerate(rows[i]):
            assert story(made, row, origin[i]) == story(alone, r)


def test_rows_that_see_the_same_read_it_once():
    layout = shared_prompt(3, 4, 40, 10)
    stats = plan(layout).stats()
    assert stats.distinct_tokens == stats.planned_tokens == 3 * (40 + 4 * 10)
    assert stats.distinct_bytes == stats.planned_bytes == stats.distinct_tokens * 2 * 2 * 8 * 2
    assert stats.attended == stats.computed == 12 * 50
    assert stats.partials == 0 and len(plan(layout).item) == 3


def test_bytes_are_those_of_the_pool():
    """Counted, and priced: K of 24 elements and V of 8, 1 byte each, and a scale."""
    layout = shared_prompt(3, 4, 4000, 10)
    stats = plan(layout, value_dim=8, bytes_per_token=2 * (24 + 8) + 4).stats()
    assert stats.distinct_bytes == stats.distinct_tokens * 68
    bound = replace(CPU, mac=0, exp=0, segment=0, item=0, partial=0, grain=1 << 40)  # reading, by whole trees
    times = [plan(layout, cost_model=bound, bytes_per_token=size).stats().predicted for size in (64, 128, 640)]
    assert times[0] == plan(layout, cost_model=bound).stats().predicted  # 2 KV heads of 8 + 8 elements of 2 bytes
    assert times[1] == pytest.approx(2 * times[0]) and times[2] == pytest.approx(10 * times[0])
    stats = plan(layout, cost_model=FREE, value_dim=32).stats()
    assert stats.partial_bytes == stats.partials * 4 * (32 + 2) * 4 > 0


def test_forks_inside_a_node_are_read_once():
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
    made = plan(layout)
    check_plan(made)
    assert made.stats().planned_tokens == made.stats().distinct_tokens == 60
    assert made.row_order.tolist() == [1, 0, 2]
    shared = [(int(s[Seg.START]), int(s[Seg.STOP])) for s in made.seg if s[Seg.NODE] == 0]
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
    assert made.item[:, Item.PARTIAL].tolist() == [-1]
    assert made.seg[:, [Seg.START, Seg.STOP]].tolist() == [[0, 24], [24, 40]]
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
            fixed = np.isin(np.arange(layout.num_nodes), layout.tip[layout.partially_visible])
            for _ in range(4):
                grown = made.grow(made.layout.node_len + ~fixed, made.layout.row_pos + 1)
                assert np.array_equal(grown.item, made.item) and np.array_equal(grown.seg, made.seg)
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
        ({"num_kv_heads": 0}, "num_kv_heads must be in .1, 65536., got 0"),
        ({"head_dim": 0}, "head_dim must be in .1, 65536., got 0"),
        ({"value_dim": 0}, "value_dim must be in .1, 65536., got 0"),
        ({"bytes_per_token": 2**31}, r"bytes_per_token must be in \[1, 2\*\*31\) or None, got 2147483648"),
        ({"window": 0}, r"window must be in \[1, 2\*\*31\) or None, got 0"),
        ({"max_partials": -1}, "max_partials must be at least 0 or None, got -1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        plan_attention(shared_prompt(1, 2, 3, 3), **{**HEADS, **options})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"units": 0}, r"units must be in \[1, 65536\], got 0"),
        ({"memory": -1}, r"memory must be in \[0, 1048576\], got -1"),
    ],
)
def test_bad_cost_models(change, message):
    with pytest.raises(ValueError, match=message):
        replace(CPU, **change)


def test_prices_that_overflow():
    cost_model = replace(CPU, item=1 << 40, lanes=1 << 16, mac=1 << 20, memory=1 << 20)
    with pytest.raises(ValueError, match="cost_model must price this step below"):
        heads = dict(num_qo_heads=8, num_kv_heads=8, head_dim=8192)
        plan_attention(shared_prompt(1, 2000, 10**6, 1), **heads, cost_model=cost_model)


def edited(made, name, row, column, value):
    array = getattr(made, name).copy()
    array[row, column] = value
    return with_arrays(made, **{name: array})


def with_arrays(made, **arrays):
    """The same plan, with other arrays than its buffer has."""
    other = replace(made)
    other.__dict__.update(vars(made) | arrays)
    return other


def test_check_plan_catches_corruption():
    """One item: the shared 20 tokens, then 10 of each of three rows."""
    made = plan(shared_prompt(1, 3, 20, 10))
    check_plan(made)
    with pytest.raises(ValueError, match="row 0 must read all it sees, got nothing for indices"):
        check_plan(edited(made, "seg", 0, Seg.STOP, 19))
    with pytest.raises(ValueError, match=r"segment 0 must lie within node 0 of 20 tokens, got \[0, 21\)"):
        check_plan(edited(made, "seg", 0, Seg.STOP, 21))
    with pytest.raises(ValueError, match="row 2 must read all it sees"):
        check_plan(edited(made, "seg", 0, Seg.ROW_HI, 2))
    with pytest.raises(ValueError, match="segment 1 must have index_begin 20 and pos 20"):
        check_plan(edited(made, "seg", 1, Seg.POS, 0))
    with pytest.raises(ValueError, match="segment 1 must not be contiguous"):
        check_plan(edited(made, "seg", 1, Seg.CONTIGUOUS, 1))
    with pytest.raises(ValueError, match="items must own all segments"):
        check_plan(with_arrays(made, seg=np.concatenate([made.seg, made.seg[-1:]])))
    doubled = with_arrays(made, seg=np.concatenate([made.seg, made.seg[:1]]))
    with pytest.raises(ValueError, match="row 0 must read a token once, got 2 times for index 0"):
        check_plan(edited(doubled, "item", 0, Item.SEG_END, 5))
    with pytest.raises(ValueError, match="row 1 must read nothing else than it sees"):
        check_plan(edited(made, "seg", 1, Seg.ROW_HI, 2))
    with pytest.raises(ValueError, match=r"segment 0 must have rows within \[0, 2\), got \[0, 3\)"):
        check_plan(edited(made, "item", 0, Item.ROW_END, 2))
    with pytest.raises(ValueError, match="row_order must be a permutation"):
        check_plan(edited(made, "row", 0, Row.ROW, 1))
    with pytest.raises(ValueError, match="buffer must hold the plan's arrays"):
        check_plan(edited(made, "row", 0, Row.LAST, 3))
    with pytest.raises(ValueError, match="buffer must have the plan's heads and window"):
        check_plan(replace(made, num_kv_heads=1))


def test_check_plan_catches_wrong_merges():
    """Four items over 64 + 64 + 64 + 8 shared tokens, the last with all that is private as well."""
    made = plan(shared_prompt(1, 3, 200, 10), cost_model=replace(FREE, units=8))
    check_plan(made)
    assert made.item[:, Item.PARTIAL].tolist() == [0, 3, 6, 9] and made.merge_partial[:4].tolist() == [0, 3, 6, 9]
    with pytest.raises(ValueError, match="merge list of token 0 must be"):
        check_plan(with_arrays(made, merge_partial=np.roll(made.merge_partial, 1)))
    swapped = made.merge_partial.copy()
    swapped[:2] = 3, 0
    with pytest.raises(ValueError, match="partials of token 0 must be merged in path order"):
        check_plan(with_arrays(made, merge_partial=swapped))
    with pytest.raises(ValueError, match=r"merge list of token 0"):
        check_plan(edited(made, "item", -1, Item.PARTIAL, -1))
    with pytest.raises(ValueError, match="merge_indptr must have 4 entries"):
        check_plan(with_arrays(made, merge_indptr=made.merge_indptr[:-1]))
