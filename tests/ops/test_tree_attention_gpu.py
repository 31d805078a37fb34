"""`tree_attention` on a GPU: large steps, streams, load, captured graphs. Collected everywhere."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from attention import TOLERANCE, attend, case_of
from backends import GPU_CUTS, ON_GPU, each, on, specified
from forktree import ops
from forktree.ops import KVPool
from forktree.plan.plan import plan_attention
from layouts import naive_attention, random_layout, shared_prompt

DEVICE = "cuda"


LARGE = {
    "64 branches": lambda: shared_prompt(1, 64, 4099, 37),
    "300 branches": lambda: shared_prompt(1, 300, 700, 3, spread=True),
    "many prompts": lambda: shared_prompt(40, 5, 203, 17, spread=True),
    "deep": lambda: random_layout(0, "deep", num_nodes=400, num_contexts=200, max_len=16).layout,
    "chain": lambda: random_layout(0, "chain", num_nodes=300, num_contexts=50, max_len=12).layout,
    "long drafts": lambda: random_layout(3, "drafts", num_nodes=6, num_contexts=6, max_len=300).layout,
}


@pytest.mark.parametrize("heads", [(32, 8, 128), (14, 2, 64)], ids=str)
@pytest.mark.parametrize("cost_model", ON_GPU[0].cost_models, ids=["narrow", "wide", "cut"])
@pytest.mark.parametrize("name", LARGE)
@each(*ON_GPU)
def test_large_steps(backend, name, cost_model, heads, monkeypatch):
    """Hundreds of segments an item, of rows, and partials of many blocks; beside PyTorch in fp64."""
    layout = LARGE[name]()
    g = torch.Generator().manual_seed(0)
    slots = int(layout.slot_bounds[1]) + 1
    q = torch.randn(layout.num_rows, heads[0], heads[2], generator=g).bfloat16()
    k, v = torch.randn(2, slots, heads[1], heads[2], generator=g).bfloat16()
    out, lse = attend(backend, case_of(layout), q, k, v, cost_model=cost_model)
    monkeypatch.setenv("FORKTREE_BACKEND", "torch")
    expected, expected_lse = attend(backend, case_of(layout), q.double(), k.double(), v.double())
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=TOLERANCE[torch.bfloat16])
    torch.testing.assert_close(lse, expected_lse.float(), rtol=1e-4, atol=2e-4)


@each(*ON_GPU)
def test_the_same_bits_under_load(backend):
    """An error that moves is a race."""
    layout = shared_prompt(1, 48, 3001, 19)
    made = plan_attention(layout, num_qo_heads=16, num_kv_heads=4, head_dim=128, device=DEVICE, cost_model=GPU_CUTS)
    assert made.num_partials > 100
    q = torch.randn(layout.num_rows, 16, 128, device=DEVICE, dtype=torch.bfloat16)
    k, v = torch.randn(2, layout.slot_index.size, 4, 128, device=DEVICE, dtype=torch.bfloat16)
    first = [x.clone() for x in ops.tree_attention(q, KVPool(k, v), made, return_lse=True)]
    load, busy = torch.cuda.Stream(), torch.randn(2048, 2048, device=DEVICE)
    wrong = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(100):
        with torch.cuda.stream(load):
            busy @ busy
        for got, expected in zip(ops.tree_attention(q, KVPool(k, v), made, return_lse=True), first, strict=True):
            wrong += (got != expected).sum()
    assert wrong.item() == 0


@each(*ON_GPU)
def test_two_streams_at_once(backend):
    """Each has counters of its own."""
    layout = shared_prompt(1, 48, 3001, 19)
    made = plan_attention(layout, num_qo_heads=16, num_kv_heads=4, head_dim=128, device=DEVICE, cost_model=GPU_CUTS)
    q = torch.randn(2, layout.num_rows, 16, 128, device=DEVICE, dtype=torch.bfloat16)
    k, v = torch.randn(2, layout.slot_index.size, 4, 128, device=DEVICE, dtype=torch.bfloat16)
    expected = [ops.tree_attention(one, KVPool(k, v), made).clone() for one in q]
    streams = [torch.cuda.Stream() for _ in q]
    torch.cuda.synchronize()
    got = [[], []]
    for _ in range(50):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                got[i].append(ops.tree_attention(q[i], KVPool(k, v), made))
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected[i]) for i in range(2) for out in got[i])


@each(*ON_GPU)
def test_a_captured_graph_serves_other_plans(backend):
    """The plan is read on the device: its buffers are refilled, and the graph is replayed."""
    rows, tokens, partials, slots = 24, 24, 4000, 2000
    g = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, slots, 2, 64, generator=g).bfloat16().to(DEVICE)
    q = torch.zeros(rows, 4, 64, dtype=torch.bfloat16, device=DEVICE)
    plan_room, slot_room = (torch.zeros(n, dtype=torch.int32, device=DEVICE) for n in (60_000, 4000))

    def fill(seed):
        kind = ("random", "star", "deep")[seed % 3]
        case = random_layout(seed, kind, num_nodes=8 + 5 * seed, num_contexts=4 + seed, uneven=False)
        heads = dict(num_qo_heads=4, num_kv_heads=2, head_dim=64)
        made = plan_attention(case.layout, **heads, device=DEVICE, cost_model=GPU_CUTS, max_partials=partials)
        buffer, index = made.on(q.device)
        plan_room[: len(buffer)] = buffer
        slot_room[: len(index)] = index
        query = torch.randn(case.layout.num_rows, 4, 64, generator=g).bfloat16()
        q[: len(query)] = query.to(DEVICE)
        return case, query

    def call():
        room = (tokens, partials, 0.125, None, None, None)
        return torch.ops.forktree.tree_attention.default(q, k, v, plan_room, slot_room, *room)

    fill(0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()  # loads the kernel, makes the counters
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out, lse = call()
    for seed in range(12):
        case, query = fill(seed)
        out.fill_(torch.nan)
        lse.fill_(torch.nan)
        graph.replay()
        expected, expected_lse = naive_attention(case, query, k.cpu(), v.cpu(), scale=0.125)
        n = case.layout.num_tokens
        np.testing.assert_allclose(out[:n].double().cpu().numpy(), expected, rtol=0, atol=2e-2)
        np.testing.assert_allclose(lse[:n].cpu().numpy(), expected_lse, rtol=1e-4, atol=2e-4)
        assert out[n:].eq(0).all() and lse[n:].eq(-torch.inf).all()


@each(*ON_GPU)
def test_pools_past_two_billion_elements(backend):
    slots, kv_heads, dim = 2**31 // (8 * 128) + 5000, 8, 128
    if torch.cuda.mem_get_info()[0] < 3 * slots * kv_heads * dim * 2:
        pytest.skip("needs three times the pool's memory")
    pools = [torch.full((slots, kv_heads, dim), torch.nan, dtype=torch.bfloat16, device=DEVICE) for _ in "kv"]
    layout = shared_prompt(1, 6, 700, 5)
    used = torch.arange(slots - layout.slot_index.size, slots)  # the very last ones
    layout = replace(layout, slot_index=used.numpy())
    g = torch.Generator().manual_seed(0)
    q = torch.randn(layout.num_rows, 16, dim, generator=g).bfloat16()
    k, v = torch.randn(2, len(used), kv_heads, dim, generator=g).bfloat16()
    ops.append_kv(*on(DEVICE, k, v, used), KVPool(*pools))
    assert all(torch.equal(pool[-len(used) :].cpu(), x) for pool, x in zip(pools, (k, v), strict=True))
    made = plan_attention(layout, num_qo_heads=16, num_kv_heads=kv_heads, head_dim=dim, device=DEVICE)
    out = ops.tree_attention(q.to(DEVICE), KVPool(*pools), made)
    low = replace(layout, slot_index=np.arange(len(used)))
    small = plan_attention(low, num_qo_heads=16, num_kv_heads=kv_heads, head_dim=dim)
    expected, _ = specified(q.double(), k.double(), v.double(), small)
    torch.testing.assert_close(out.cpu().double(), expected, rtol=0, atol=2e-2)
