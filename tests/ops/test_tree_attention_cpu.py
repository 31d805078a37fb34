"""`tree_attention` by the compiled backend: its bits depend neither on threads, nor on company, nor on nodes."""

from dataclasses import replace

import numpy as np
import torch

from attention import attend, case_of, tensors
from backends import ISAS, each, each_dtype
from forktree import ops
from forktree.ops import AttentionOptions, KVPool
from forktree.plan.cost_model import CPU
from forktree.plan.plan import plan_attention
from layouts import chunk, shared_prompt


@each_dtype(*ISAS)
def test_same_bits_whatever_the_number_of_threads(backend, dtype, threads):
    cost_model = replace(CPU, grain=10**6)  # enough to do for all
    for layout in (shared_prompt(2, 40, 900, 70), shared_prompt(1, 1, 5000, 1), shared_prompt(30, 1, 90, 30)):
        case = case_of(layout)
        q, k, v = tensors(case, 8, 4, 32, dtype=dtype)
        results = []
        for number in threads:
            torch.set_num_threads(number)
            results.append(attend(backend, case, q, k, v, cost_model=cost_model))
        for out, lse in results[1:]:
            assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])


@each_dtype(*ISAS)
def test_a_row_keeps_its_bits_among_strangers(backend, dtype):
    """invariant=True: whatever other root trees are in the step."""
    alone, crowd = shared_prompt(1, 5, 1500, 70), shared_prompt(3, 5, 1500, 70)
    q, k, v = tensors(case_of(crowd), 8, 4, 32, dtype=dtype)
    heads = dict(num_qo_heads=8, num_kv_heads=4, head_dim=32, invariant=True)
    out, lse = ops.tree_attention(q, KVPool(k, v), plan_attention(crowd, **heads), return_lse=True)
    again, lse_again = ops.tree_attention(q[:5], KVPool(k, v), plan_attention(alone, **heads), return_lse=True)
    assert torch.equal(out[:5], again) and torch.equal(lse[:5], lse_again)


@each(*ISAS)
def test_how_nodes_are_cut_leaves_no_trace_in_fp32(backend):
    """A prompt reads the same whether or not others share parts of it."""
    tokens, rows = 150, 3
    whole = replace(chunk(tokens), row_indptr=[0, rows], row_token=np.arange(rows), row_pos=np.arange(147, 150))
    lengths = np.array([1, 70, 64, 2, 13])
    begin = np.cumsum(lengths) - lengths
    cut = replace(
        whole,
        node_begin=begin,
        node_len=lengths,
        node_parent=[-1, 0, 1, 2, 3],
        node_fork=[0, *lengths[:-1]],
        node_pos=begin,
        path_node=[4],
    )
    heads = dict(num_qo_heads=6, num_kv_heads=2, head_dim=24)
    q, (k, v) = torch.randn(rows, 6, 24), torch.randn(2, tokens, 2, 24)
    for options in ({}, {"softcap": 3.0}, {"window": 60}):
        window = options.pop("window", None)
        plans = [plan_attention(x, window=window, **heads) for x in (whole, cut)]
        results = [ops.tree_attention(q, KVPool(k, v), made, AttentionOptions(**options)) for made in plans]
        assert torch.equal(*results)
