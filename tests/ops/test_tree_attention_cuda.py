"""The CUDA kernel of tree attention, run on the CPU: groups, lengths and layouts that its tiles make special."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

import attention
from attention import attend, by_fp64, case_of, tensors
from backends import CUDA, CUTS
from forktree import _core
from forktree.ops.params import KvPool, TreeAttentionParams
from forktree.plan.layout import TreeLayout
from layouts import KINDS, Case, chunk, random_layout, shared_prompt

pytestmark = pytest.mark.skipif(bool(CUDA.absent), reason=CUDA.absent or "is there")

DIMS = (64, 96, 128, 256)
compare = partial(attention.compare, CUDA, expected=by_fp64)


@pytest.fixture(autouse=True)
def cuda(monkeypatch):
    monkeypatch.setenv("FORKTREE_BACKEND", "cuda")


@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8, 70])
def test_groups(group):
    for kind in ("random", "chunks"):
        case = random_layout(group, kind)
        for cost_model in (None, CUTS):
            compare(case, *tensors(case, 2 * group, 2, 64, dtype=torch.float16), cost_model=cost_model)


@pytest.mark.parametrize(("dim", "window"), [(64, None), (64, 1), (64, 90), (128, 70), (256, None), (256, 90)])
@pytest.mark.parametrize("kind", KINDS)
def test_long_nodes_and_windows(kind, dim, window):
    """Tiles within one segment, across several, and cut by the window."""
    case = random_layout(5, kind, max_len=140)
    q, k, v = tensors(case, 2, 1, dim, dtype=torch.float16)
    compare(case, q, k, v, window=window)
    compare(case, q, k, v, window=window, cost_model=replace(CUTS, units=16))


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize(("branches", "group"), [(5, 3), (16, 1), (17, 1), (32, 1), (33, 1), (64, 1), (65, 1), (30, 7)])
def test_packed_rows(branches, group, dim):
    """On both sides of every arrangement of warps, up to several tiles of rows an item."""
    case = case_of(shared_prompt(1, branches, 130, 3, spread=True))
    compare(case, *tensors(case, 2 * group, 2, dim, dtype=torch.bfloat16))


@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 128, 129, 300])
def test_tokens(length):
    """On both sides of every border between tiles, with one stage of the pipeline filled, or all, or none."""
    for dim in DIMS:
        case = case_of(replace(shared_prompt(1, 2, length, 1), slot_index=np.arange(length + 2)[::-1] * 2))
        compare(case, *tensors(case, 2, 1, dim, dtype=torch.float16))


@pytest.mark.parametrize("lengths", [[1] * 300, [0, 1] * 200, [0] * 300 + [5], [3, 0, 0, 70] * 50, [0] * 3])
def test_many_small_segments(lengths):
    """A chain of more nodes than are looked at together; a second row leaves it half way."""
    lengths, nodes = np.array(lengths), len(lengths)
    begin = np.cumsum(lengths) - lengths
    half = nodes // 2
    layout = TreeLayout(
        slot_index=np.random.default_rng(0).permutation(lengths.sum()),
        node_begin=begin,
        node_len=lengths,
        node_parent=np.arange(nodes) - 1,
        node_fork=[0, *lengths[:-1]],
        node_pos=begin,
        row_indptr=[0, 1, 2],
        path_indptr=[0, 1, 2],
        path_node=[nodes - 1, half],
        path_stop=[TreeLayout.ALL] * 2,
        path_top=[-1] * 2,
        causal=[0, 0],
        row_token=[0, 1],
        row_pos=[max(lengths.sum() - 1, 0), max(begin[half] + lengths[half] - 1, 0)],
    )
    case = Case(layout, [], int(lengths.sum()) + 1, set(layout.slot_index.tolist()))
    for window in (None, 50):
        compare(case, *tensors(case, 4, 2, 64, dtype=torch.float16), window=window)


@pytest.mark.parametrize("dim", [64, 256])
def test_chunks(dim):
    """A causal chunk of several tiles of rows over a prompt."""
    case = case_of(chunk(150))
    compare(case, *tensors(case, 2, 1, dim, dtype=torch.float16))
    compare(case, *tensors(case, 3, 1, dim, dtype=torch.float16), window=70, cost_model=CUTS)


@pytest.mark.parametrize("dim", DIMS)
def test_damage_in_every_arrangement_of_warps(dim):
    for branches in (3, 16, 40):
        case = case_of(shared_prompt(1, branches, 70, 5))
        q, k, v = tensors(case, 2, 1, dim, dtype=torch.bfloat16)
        clean = attend(CUDA, case, q, k, v)
        v[case.layout.node_begin[2] + 1] = torch.inf  # of the second branch
        others = [row for row in range(branches) if row != 1]
        out, lse = attend(CUDA, case, q, k, v)
        assert not out[1].isfinite().any() and torch.equal(out[others], clean[0][others]) and torch.equal(lse, clean[1])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(dtype=0), r"dtype must be 1 \(bf16\) or 2 \(fp16\), got 0"),
        (dict(q=8), "q must be at an address that is a multiple of 16, got 8"),
        (dict(q_row_stride=12), "strides of q must be multiples of 8, got 12 and 64"),
        (dict(num_qo_heads=3), "query heads must be a multiple of the KV heads, got 3 and 2"),
        (dict(k_dim=80, v_dim=80), "head_dim must be 64, 96, 128 or 256, got 80"),
        (dict(v_dim=96), "head_dim must be that of K as of V, got 64 and 96"),
        (dict(k=24), "k_slots must be at an address"),
        (dict(k_slot_stride=12), "strides of k_slots must be multiples of 8, got 12 and 64"),
        (dict(v_head_stride=3), "strides of v_slots must be multiples of 8, got 128 and 3"),
        (dict(num_tokens=-1), "num_tokens and max_partials must be at least 0, got -1 and 0"),
    ],
)
def test_the_binding_checks_what_it_is_given(changed, message):
    pool = dict(k_slot_stride=128, k_head_stride=64, v_slot_stride=128, v_head_stride=64)
    params = TreeAttentionParams(
        pool=KvPool(num_kv_heads=2, k_dim=64, v_dim=64, **pool),
        q_row_stride=64,
        q_head_stride=64,
        num_qo_heads=4,
        dtype=1,
        scale=1.0,
        num_tokens=5,
    )
    for name, value in changed.items():
        setattr(params.pool if hasattr(params.pool, name) and name != "dtype" else params, name, value)
    with pytest.raises(ValueError, match=message):
        _core.cuda_tree_attention(bytes(params), 0)
