import time

import numpy as np
import pytest
import torch

from forktree.plan.layout import TreeLayout
from layouts import KINDS, random_layout, shared_prompt


def arguments(layout):
    return {name: value for name, value in vars(layout).items() if name in TreeLayout.__dataclass_fields__}


def small(**changes):
    """A root, children at 4 and 2; contexts: two rows of a chunk at the first, one at the other."""
    fields = dict(
        slot_index=list(range(10)),
        node_begin=[0, 4, 7],
        node_len=[4, 3, 3],
        node_parent=[-1, 0, 0],
        node_fork=[0, 4, 2],
        node_pos=[0, 4, 2],
        row_indptr=[0, 2, 3],
        path_indptr=[0, 1, 2],
        path_node=[1, 2],
        path_stop=[TreeLayout.ALL, 2],
        path_top=[-1, -1],
        causal=[1, 0],
        row_token=[0, 1, 2],
        row_pos=[5, 6, 3],
    )
    return TreeLayout(**{**fields, **changes})


def slots(layout, row, window=None):
    return layout.slot_index[layout.visible(row, window)[0]].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_visible_is_what_the_tracked_lists_say(kind):
    for seed in range(20):
        case = random_layout(seed, kind, room=seed % 3)
        for row in range(case.layout.num_rows):
            index, position = case.layout.visible(row)
            got = zip(case.layout.slot_index[index].tolist(), position.tolist(), strict=True)
            assert sorted(got) == sorted(case.seen[row])


def test_small_layout_by_hand():
    layout = small()
    assert (layout.num_rows, layout.num_contexts, layout.num_nodes, layout.num_tokens) == (3, 2, 3, 3)
    assert slots(layout, 0) == [0, 1, 2, 3, 4, 5]
    assert slots(layout, 1) == [0, 1, 2, 3, 4, 5, 6]
    assert slots(layout, 2) == [0, 1, 7, 8]
    assert slots(layout, 1, window=3) == [4, 5, 6]
    assert layout.visible(2)[1].tolist() == [0, 1, 2, 3]
    assert layout.slot_bounds == (0, 9)
    masked = small(mask_indptr=[0, 2, 2], mask_bits=[0b01, 0b10])
    assert slots(masked, 0) == [0, 1, 2, 3, 4, 5] and slots(masked, 1) == [0, 1, 2, 3, 4, 6]


def test_takes_lists_arrays_and_tensors():
    layout = small(slot_index=torch.arange(10), node_len=np.array([4, 3, 3], np.int64), causal=[True, False])
    for name, value in arguments(layout).items():
        assert value is None or value.dtype == np.int32, name
    assert small(mask_indptr=[0, 2, 2], mask_bits=torch.tensor([1, -1])).mask_bits.tolist() == [1, 2**32 - 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slot_index": [0.5] * 10}, r"slot_index must be an integer array .* got float64"),
        (
            {"node_len": [[4, 3, 3]]},
            r"node_len must be an integer array with 1 dimension\(s\), got int64 \(1, 3\)",
        ),
        ({"slot_index": [2**31] * 10}, r"slot_index must fit int32, got values from 2147483648"),
        ({"node_begin": [0, 4]}, r"node_begin must have 3 entries \(nodes in node_len\), got 2"),
        ({"node_begin": [0, 4, 8]}, r"node_begin\[2\] .* within slot_index \(10 entries\), got 8"),
        ({"node_begin": [0, -1, 7]}, r"node_begin\[1\] must be >= 0, got -1"),
        ({"node_len": [4, 3, -1]}, r"node_len\[2\] must be >= 0, got -1"),
        ({"node_pos": [0, 4, -2]}, r"node_pos\[2\] must be >= 0, got -2"),
        ({"node_parent": [-1, 0, 3]}, r"node_parent\[2\] must be -1 or a node, in \[-1, 3\), got 3"),
        (
            {"node_parent": [-1, 2, 1], "node_fork": [0, 0, 0]},
            r"node_parent\[1\] must be without cycles, got 2",
        ),
        ({"node_parent": [0, 0, 0]}, r"node_parent\[0\] must be without cycles, got 0"),
        ({"node_fork": [0, 5, 2]}, r"node_fork\[1\] must be between 0 and node_len of the parent, got 5"),
        ({"row_indptr": [0, 2, 4]}, r"row_indptr must rise from 0 to 3 \(rows\)"),
        ({"row_indptr": [0, 3]}, r"row_indptr must have 3 entries \(contexts in causal, plus 1\), got 2"),
        ({"path_indptr": [0, 2, 2]}, r"path_indptr\[1\] must be rising: .* at least one path, got 0"),
        ({"path_node": [1, 3]}, r"path_node\[1\] must be a node, in \[0, 3\), got 3"),
        ({"path_stop": [4, 2]}, r"path_stop\[0\] must be between 0 and node_len of path_node, or 2147483647"),
        ({"path_top": [-1, 1]}, r"path_top\[1\] must be an ancestor of path_node, or -1, got 1"),
        ({"path_top": [-1, 2]}, r"path_top\[1\] must be an ancestor of path_node, or -1, got 2"),
        ({"path_top": [-1, 3]}, r"path_top\[1\] must be -1 or a node"),
        ({"causal": [2, 0]}, r"causal\[0\] must be 0 or 1, got 2"),
        ({"row_pos": [0, 1]}, r"row_pos must have 3 entries \(rows in row_token\), got 2"),
        ({"row_pos": [0, 1, -1]}, r"row_pos\[2\] must be >= 0, got -1"),
        ({"row_token": [0, -1, 1]}, r"row_token\[1\] must be >= 0, got -1"),
        (
            {"path_stop": [1, 2]},
            r"row_indptr\[0\] must be no more rows than the context sees tokens of its tip",
        ),
        ({"mask_indptr": [0, 2, 2]}, r"mask_indptr and mask_bits must be given together"),
        (
            {"mask_indptr": [0, 1, 2], "mask_bits": [1, 1]},
            r"mask_indptr\[0\] must be no words or rows \* ceil",
        ),
        (
            {"mask_indptr": [0, 2, 2], "mask_bits": [1]},
            r"mask_indptr must rise from 0 to 1 \(words in mask_bits\)",
        ),
        (
            {"mask_indptr": [0, 2, 2], "mask_bits": [0.5, 1]},
            r"mask_bits must be uint32 \[words\], got float64",
        ),
    ],
)
def test_bad_input_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_validation_is_cheap():
    fields = arguments(shared_prompt(500, 1, 4, 4))
    times = []
    for _ in range(20):
        begin = time.perf_counter()
        TreeLayout(**fields)
        times.append(time.perf_counter() - begin)
    assert min(times) < 1e-3


def test_empty_layout():
    layout = TreeLayout([], [], [], [], [], [], [0], [0], [], [], [], [], [], [])
    assert (layout.num_rows, layout.num_tokens, layout.slot_bounds) == (0, 0, (0, -1))


def test_grown():
    case = random_layout(3, room=2, uneven=False)
    layout = case.layout
    grown = layout.grown(layout.node_len + 1, layout.row_pos + 1)
    assert (grown.node_len == layout.node_len + 1).all() and grown.node_parent is layout.node_parent
    with pytest.raises(ValueError, match=r"node_len\[\d\] must be at least what it was"):
        grown.grown(layout.node_len, grown.row_pos)
    with pytest.raises(ValueError, match=r"row_pos\[0\] must be at least what it was"):
        grown.grown(grown.node_len, layout.row_pos)
    with pytest.raises(ValueError, match=r"node_len\[\d\] must be within slot_index"):
        grown.grown(layout.node_len + 99, grown.row_pos)
    with pytest.raises(ValueError, match="node_len must have 9 entries"):
        layout.grown([1], layout.row_pos)


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("seed", range(10))
def test_from_pages_shares_and_equals_a_flat_cache(seed, page_size):
    rng = np.random.default_rng(seed)
    batch, max_pages = 7, 6
    tables = rng.permutation(100)[: batch * max_pages].reshape(batch, max_pages)
    for b in range(1, batch):  # equal leading pages, with some earlier sequence
        equal = rng.integers(max_pages)
        tables[b, :equal] = tables[rng.integers(b), :equal]
    lengths = rng.integers(1, max_pages * page_size + 1, batch)
    query_lens = rng.integers(1, lengths + 1) if seed % 2 else None
    tables[np.arange(max_pages) >= -(-lengths // page_size)[:, None]] = -1
    layout = TreeLayout.from_pages(tables, torch.from_numpy(lengths), page_size, query_lens=query_lens)
    row = 0
    for b, length in enumerate(lengths.tolist()):
        flat = [int(tables[b, t // page_size]) * page_size + t % page_size for t in range(length)]
        queries = 1 if query_lens is None else int(query_lens[b])
        for i in range(queries):
            end = length - queries + 1 + i
            assert slots(layout, row) == flat[:end]
            assert layout.visible(row)[1].tolist() == list(range(end)) and layout.row_pos[row] == end - 1
            row += 1
    assert row == layout.num_rows
    if query_lens is None:  # each page wholly before the query tokens is stored once
        pages = {tuple(tables[b, : p + 1]) for b in range(batch) for p in range((lengths[b] - 1) // page_size)}
        private = lengths - (lengths - 1) // page_size * page_size
        assert layout.slot_index.size == len(pages) * page_size + private.sum()


def test_from_pages_refuses_bad_input():
    tables = [[0, 1], [2, 3]]
    for arguments_, message in [
        (([0, 1], [1], 4), "block_tables must be an integer array with 2"),
        ((tables, [1], 4), "lengths must have 2 entries"),
        ((tables, [1, 9], 4), r"lengths\[1\] must be in \[1, 8\] \(2 pages of 4\), got 9"),
        ((tables, [1, 1], 0), "page_size must be an integer of at least 1 that fits int32, got 0"),
        (([[0, 1], [2, -1]], [1, 5], 4), r"block_tables\[3\] must be a page id >= 0 where in use, got -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            TreeLayout.from_pages(*arguments_)
    with pytest.raises(ValueError, match=r"query_lens\[0\] must be in \[1, lengths\], got 3"):
        TreeLayout.from_pages(tables, [2, 2], 4, query_lens=[3, 1])
