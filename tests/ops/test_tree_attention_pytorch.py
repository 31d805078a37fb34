"""`tree_attention` by PyTorch: every way of cutting, stacking and reading in place."""

import importlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from attention import compare, tensors
from backends import TORCH, each
from forktree import ops
from forktree.ops import KVPool
from forktree.plan.cost_model import CPU
from forktree.plan.layout import TreeLayout
from forktree.plan.plan import plan_attention
from layouts import KINDS, random_layout

executor = importlib.import_module("forktree.ops.pytorch.tree_attention")


@pytest.mark.parametrize("kind", KINDS)
@each(TORCH)
def test_cut_and_folded_work(backend, kind, monkeypatch):
    """Limits so small that every way of cutting, stacking and reading in place is taken."""
    for name, value in (
        ("MAX_SCORES", 64),
        ("MAX_TOKENS", 5),
        ("BATCH_COST", 30),
        ("LONG", 3),
        ("MAX_ELEMENTS", 99),
    ):
        monkeypatch.setattr(executor, name, value)
    cost_model = replace(CPU, units=64, lanes=2, max_lanes=8, item=100, segment=1, grain=1)
    for seed in range(8):
        case = random_layout(seed, kind, max_len=20)
        compare(backend, case, *tensors(case), cost_model=cost_model)
        compare(backend, case, *tensors(case), window=9, cost_model=cost_model)


@each(TORCH)
def test_large_chunk_over_a_long_prompt(backend, monkeypatch):
    monkeypatch.setattr(executor, "MAX_SCORES", 1 << 14)
    rows = 300
    layout = TreeLayout(
        slot_index=np.arange(1500),
        node_begin=[0, 600],
        node_len=[600, 900],
        node_parent=[-1, 0],
        node_fork=[0, 550],
        node_pos=[0, 550],
        row_indptr=[0, rows, rows + 1],
        path_indptr=[0, 1, 2],
        path_node=[1, 0],
        path_stop=[TreeLayout.ALL] * 2,
        path_top=[-1] * 2,
        causal=[1, 0],
        row_token=np.arange(rows + 1),
        row_pos=[*range(1150, 1450), 599],
    )
    q, k, v = torch.randn(rows + 1, 2, 8), torch.randn(1500, 1, 8), torch.randn(1500, 1, 8)
    for window in (None, 700):
        made = plan_attention(layout, num_qo_heads=2, num_kv_heads=1, head_dim=8, window=window)
        out = ops.tree_attention(q, KVPool(k, v), made)
        order = [*range(550), *range(600, 1500)]
        pos = torch.arange(1450)
        bias = (pos > torch.arange(1150, 1450)[:, None]) | (pos <= torch.arange(1150, 1450)[:, None] - (window or 9999))
        expected = torch.nn.functional.scaled_dot_product_attention(
            q[:rows].transpose(0, 1),
            k[order].transpose(0, 1).expand(2, -1, -1),
            v[order].transpose(0, 1).expand(2, -1, -1),
            ~bias,
        )
        torch.testing.assert_close(out[:rows], expected.transpose(0, 1))
