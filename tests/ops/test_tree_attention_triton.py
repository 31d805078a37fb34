"""The Triton kernel of tree attention in Triton's interpreter: tiles, windows and lengths that are special to it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from attention import attend, by_fp64, case_of, planned, tensors
from backends import SCATTERED, TRITON
from forktree.plan.layout import TreeLayout
from layouts import chunk, random_layout, shared_prompt

pytestmark = [
    pytest.mark.skipif(bool(TRITON.absent), reason=TRITON.absent or "is there"),
    pytest.mark.usefixtures("shuffled"),
]


@pytest.fixture(autouse=True)
def triton(monkeypatch):
    monkeypatch.setenv("FORKTREE_BACKEND", "triton")


def forest(branches, levels, length, seed=0):
    """A chain of `levels` short nodes under each of which hang `branches` tips, as deep trees have them."""
    number = np.arange(levels * (branches + 1)).reshape(levels, branches + 1)
    rng = np.random.default_rng(seed)
    node_len = rng.integers(0, length + 1, number.size)
    node_len[number[:, 1:]] = 1
    parent = np.full(number.size, -1)
    parent[number[1:, 0]] = number[:-1, 0]
    parent[number[:, 1:]] = number[:, :1]
    fork = np.where(parent < 0, 0, node_len[parent])
    pos = np.zeros(number.size, np.int64)
    for node in number[:, 0].tolist()[1:]:
        pos[node] = pos[parent[node]] + fork[node]
    tips = number[:, 1:].ravel()
    pos[tips] = pos[parent[tips]] + fork[tips]
    return TreeLayout(
        slot_index=rng.permutation(int(node_len.sum())),
        node_begin=np.cumsum(node_len) - node_len,
        node_len=node_len,
        node_parent=parent,
        node_fork=fork,
        node_pos=pos,
        row_indptr=np.arange(tips.size + 1),
        path_indptr=np.arange(tips.size + 1),
        path_node=tips,
        path_stop=np.full(tips.size, TreeLayout.ALL),
        path_top=np.full(tips.size, -1),
        causal=np.zeros(tips.size, np.int64),
        row_token=np.arange(tips.size),
        row_pos=pos[tips],
    )


def against_reference(layout, window=None, cost_model=None, **options):
    """In fp64."""
    q, k, v = tensors(case_of(layout), 4, 2, 16)
    out, lse = attend(TRITON, case_of(layout), q, k, v, window=window, cost_model=cost_model, **options)
    expected, expected_lse = by_fp64(case_of(layout), q, k, v, window=window, **options)
    torch.testing.assert_close(out.double(), expected, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(lse, expected_lse, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("length", [1, 5])
def test_hundreds_of_short_nodes(length, window):
    """Several tiles and several chunks of segments an item, rows in several row tiles."""
    against_reference(forest(2, 30, length), window)


@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("tokens", [1, 16, 17, 130])
def test_causal_chunks(tokens, window):
    against_reference(chunk(tokens), window)


@pytest.mark.parametrize("positions", [(30, 30), (31, 31), (46, 62), (48, 48), (48, 65), (48, 64)])
def test_windows_that_end_inside_and_between_tiles(positions):
    """Rows that look from before the last key, as those of joins do: both edges cut a long run."""
    layout = shared_prompt(1, 2, 80, 2)
    against_reference(replace(layout, row_pos=positions), window=32)


@pytest.mark.parametrize("branches", [1, 4, 5, 16, 40])
def test_row_tiles_of_all_sizes(branches):
    against_reference(shared_prompt(1, branches, 50, 3), sinks=torch.tensor([0.5, 0.0, -1.0, 2.0]))


def test_a_few_outputs_wait_for_many_partials():
    cost_model = replace(SCATTERED, units=64)
    layout = shared_prompt(1, 3, 400, 2)
    assert planned(case_of(layout), *tensors(case_of(layout))[:2], cost_model=cost_model).num_partials > 15
    against_reference(layout, cost_model=cost_model, sinks=torch.tensor([0.5, 0.0, -1.0, 2.0]))


def test_heads_too_large_are_refused():
    case = random_layout(0)
    with pytest.raises(ValueError, match="head dims of at most 256, got 8 and 300"):
        attend(TRITON, case, *tensors(case, value_dim=300))
