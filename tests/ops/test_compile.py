"""The registered operations, and torch.compile: one graph, the same results, pools that are written in place."""

import math
import re

import pytest
import torch
from torch._inductor.utils import run_and_get_code
from torch.library import opcheck

from compiled_layer import DIM, HEADS, SLOTS, Layer, inputs, layout
from forktree import ops
from forktree.ops import KVPool
from forktree.plan.plan import plan_attention

POOL = SLOTS * HEADS * DIM

def largest_buffer(code):
    """Elements of the largest buffer that generated code allocates."""
    shapes = re.findall(r"empty_strided_cpu\(\(([^)]*)\)", code)
    return max(math.prod(int(n) for n in shape.split(",") if n.strip()) for shape in shapes)


@torch.no_grad()
def test_pools_are_written_in_place():
    torch.manual_seed(0)
    layer, arguments = Layer(), inputs()
    expected = layer(*arguments)
    pools = [layer.k_slots.clone(), layer.v_slots.clone()]
    assert all(pool.count_nonzero() for pool in pools)
    layer.k_slots.zero_()
    layer.v_slots.zero_()
    addresses = layer.k_slots.data_ptr(), layer.v_slots.data_ptr()

    got, (code,) = run_and_get_code(torch.compile(layer, fullgraph=True), *arguments)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close([layer.k_slots, layer.v_slots], pools)
    assert (layer.k_slots.data_ptr(), layer.v_slots.data_ptr()) == addresses
    for name in ("append_kv", "rotate_rows", "tree_attention", "merge_states"):
        assert f"torch.ops.forktree.{name}.default(" in code
    assert largest_buffer(code) < POOL and "copy_" not in code

    # That a clone would have been seen.
    def cloning(k, v, slots, k_slots, v_slots):
        k_slots = k_slots + 0
        ops.append_kv(k, v, slots, KVPool(k_slots, v_slots))
        return k_slots

    k = torch.randn(4, HEADS, DIM)
    _, (code,) = run_and_get_code(
        torch.compile(cloning, fullgraph=True), k, k, arguments[1], layer.k_slots, layer.v_slots
    )
    assert largest_buffer(code) >= POOL


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_registrations_are_sound(dtype):
    registered = torch.ops.forktree
    k, pool = torch.randn(3, HEADS, DIM).to(dtype), torch.zeros(7, HEADS, DIM, dtype=dtype)
    opcheck(registered.append_kv.default, (k, k, torch.tensor([6, -1, 0]), pool, pool.clone()))
    q = torch.randn(3, 2 * HEADS, DIM).to(dtype)[:, ::2]
    opcheck(registered.rotate_rows.default, (q, torch.arange(3), torch.rand(3), True, 6))
    o, lse = torch.randn(5, HEADS, DIM).to(dtype), torch.randn(5, HEADS)
    opcheck(registered.merge_states.default, (o, lse, torch.tensor([0, 2, 2]), torch.tensor([4, 1])))
    made = plan_attention(layout(), num_qo_heads=2 * HEADS, num_kv_heads=HEADS, head_dim=DIM)
    q, pool = torch.randn(4, 2 * HEADS, DIM).to(dtype), torch.randn(SLOTS, HEADS, DIM).to(dtype)
    for per_head in (None, torch.rand(2 * HEADS)):
        arguments = (q, pool, pool, *made.on(q.device), 4, made.num_partials, 0.3, None, per_head, per_head)
        opcheck(registered.tree_attention.default, arguments)


def test_tokens_may_come_from_the_pool():
    pool = torch.arange(8.0)[:, None, None].repeat(1, 2, 3)
    torch.ops.forktree.append_kv.default(pool[1:3], pool[1:3], torch.tensor([6, -1]), pool, pool.clone())
    assert pool[:, 0, 0].tolist() == [0, 1, 2, 3, 4, 5, 1, 7]
