"""Operations on a GPU, by every backend that is there, against fp64 and the specification. Collected everywhere."""

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_tree_attention import tensors

from backends import by_reference, specified
from forktree import ops
from forktree.ops import AttentionOptions, KVPool
from forktree.ops.dispatch import missing, select_backend
from forktree.plan.cost_model import compute_bound_gpu, memory_bound_gpu
from forktree.plan.layout import TreeLayout
from forktree.plan.plan import plan_attention
from layouts import KINDS, naive_attention, random_layout, shared_prompt

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DEVICE = "cuda"
BACKENDS = ("triton", "cuda")
CUDA_DTYPES = (torch.bfloat16, torch.float16)  # its tree_attention is for tensor cores
# Largest error of outputs of size 1: rounding the output, and the weights before they are multiplied with values.
TOLERANCE = {torch.float32: 5e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
CUTS = replace(memory_bound_gpu(), item=0, grain=0, partial=0)  # cut wherever it can be: many partials
COST_MODELS = {"narrow": memory_bound_gpu(), "wide": compute_bound_gpu(), "cut": CUTS}


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    if why := missing(request.param):
        pytest.skip(why)
    monkeypatch.setenv("FORKTREE_BACKEND", request.param)
    return request.param


@pytest.fixture(params=TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request):
    return request.param


@contextmanager
def sentinels():
    """Memory that nobody writes is NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def on_device(*values):
    return [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in values]


def attend(layout, q, k, v, *, window=None, cost_model=None, **options):
    """out and lse on the CPU."""
    heads = dict(num_qo_heads=q.shape[1], num_kv_heads=k.shape[1], head_dim=q.shape[2])
    made = plan_attention(layout, **heads, device=DEVICE, window=window, cost_model=cost_model)
    chosen = AttentionOptions(**dict(zip(options, on_device(*options.values()), strict=True)))
    with sentinels():
        out, lse = ops.tree_attention(q.to(DEVICE), KVPool(*on_device(k, v)), made, chosen, return_lse=True)
    return out.cpu(), lse.cpu()


def compare(case, q, k, v, *, cost_model=None, **options):
    out, lse = attend(case.layout, q, k, v, cost_model=cost_model, **options)
    expected, expected_lse = naive_attention(case, q, k, v, **options)
    assert out.dtype == q.dtype and lse.dtype == torch.float32
    np.testing.assert_allclose(out.double().numpy(), expected, rtol=0, atol=TOLERANCE[q.dtype])
    np.testing.assert_allclose(lse.double().numpy(), expected_lse, rtol=1e-4, atol=2e-4)


def unless_refused(backend, dtype, dim=64, value_dim=64):
    """CUDA C++ takes what is for tensor cores, with head dims of its own, and refuses the rest by name."""
    if backend == "cuda" and (dtype not in CUDA_DTYPES or dim != value_dim):
        case = random_layout(1)
        with pytest.raises(ValueError, match=r"must|expected"):
            attend(case.layout, *tensors(case, 4, 2, dim, value_dim, dtype))
        pytest.skip("refused, as it should be")


# ---------------------------------------------------------------------- tree_attention


@pytest.mark.parametrize("cost_model", COST_MODELS)
@pytest.mark.parametrize("kind", KINDS)
def test_random_layouts(kind, cost_model, dtype, backend):
    unless_refused(backend, dtype)
    for seed in range(3):
        case = random_layout(seed, kind, room=seed % 3, num_nodes=5 + 12 * seed, max_len=9 + 30 * seed)
        compare(case, *tensors(case, 4, 2, 64, dtype=dtype, seed=seed), cost_model=COST_MODELS[cost_model])


@pytest.mark.parametrize(
    "heads",
    [(2, 2, 64, 64), (8, 2, 96, 96), (6, 2, 128, 128), (2, 1, 256, 256), (7, 1, 128, 128), (16, 2, 64, 64)],
    ids=str,
)
def test_head_shapes(heads, dtype, backend):
    unless_refused(backend, dtype, *heads[2:])
    for seed in range(2):
        case = random_layout(seed, "random", num_nodes=20, max_len=40)
        compare(case, *tensors(case, *heads, dtype=dtype))


@pytest.mark.parametrize("dims", [(64, 128), (192, 128), (40, 24)], ids=str)
def test_values_of_another_size(dims, dtype, backend):
    unless_refused(backend, dtype, *dims)
    case = random_layout(2)
    compare(case, *tensors(case, 4, 2, *dims, dtype=dtype))


@pytest.mark.parametrize("window", [None, 1, 7, 40])
@pytest.mark.parametrize("used", ["scale", "softcap", "sinks", "alibi_slopes", "all", "none"])
def test_options_and_windows(used, window, backend):
    every = {
        "scale": 0.3,
        "softcap": 1.5,
        "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0]),
        "alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625]),
    }
    options = every if used == "all" else {name: every[name] for name in every if name == used}
    for seed, kind in enumerate(["random", "joins", "drafts", "chunks"]):
        case = random_layout(seed, kind, num_nodes=16, max_len=20)
        q, k, v = tensors(case, 4, 2, 64, dtype=torch.bfloat16, seed=seed)
        compare(case, q, k, v, window=window, cost_model=COST_MODELS["cut" if seed % 2 else "wide"], **options)


LARGE = {
    "64 branches": lambda: shared_prompt(1, 64, 4099, 37),
    "300 branches": lambda: shared_prompt(1, 300, 700, 3, spread=True),
    "many prompts": lambda: shared_prompt(40, 5, 203, 17, spread=True),
    "deep": lambda: random_layout(0, "deep", num_nodes=400, num_contexts=200, max_len=16).layout,
    "chain": lambda: random_layout(0, "chain", num_nodes=300, num_contexts=50, max_len=12).layout,
    "long drafts": lambda: random_layout(3, "drafts", num_nodes=6, num_contexts=6, max_len=300).layout,
}


@pytest.mark.parametrize("heads", [(32, 8, 128), (14, 2, 64)], ids=str)
@pytest.mark.parametrize("cost_model", COST_MODELS)
@pytest.mark.parametrize("name", LARGE)
def test_large_steps(name, cost_model, heads, backend, monkeypatch):
    """Hundreds of segments an item, of rows, and partials of many blocks; beside PyTorch in fp64."""
    layout = LARGE[name]()
    g = torch.Generator().manual_seed(0)
    slots = int(layout.slot_bounds[1]) + 1
    q = torch.randn(layout.num_rows, heads[0], heads[2], generator=g).bfloat16()
    k, v = torch.randn(2, slots, heads[1], heads[2], generator=g).bfloat16()
    out, lse = attend(layout, q, k, v, cost_model=COST_MODELS[cost_model])
    monkeypatch.setenv("FORKTREE_BACKEND", "torch")
    expected, expected_lse = attend(layout, q.double(), k.double(), v.double())
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=TOLERANCE[torch.bfloat16])
    torch.testing.assert_close(lse, expected_lse.float(), rtol=1e-4, atol=2e-4)


def test_room_beyond_the_plan_is_cleared(backend):
    """As when a captured graph serves fewer tokens than it was captured for."""
    case = random_layout(5, "joins", num_nodes=20)
    q, k, v = tensors(case, 4, 2, 64, dtype=torch.bfloat16)
    made = plan_attention(case.layout, num_qo_heads=4, num_kv_heads=2, head_dim=64, device=DEVICE, cost_model=CUTS)
    tokens, extra = case.layout.num_tokens, 9
    q, k, v = on_device(torch.cat([q, torch.full_like(q[:1].repeat(extra, 1, 1), torch.nan)]), k, v)
    for sinks in (None, torch.tensor([0.5, -1.0, 2.0, 0.0])):
        arguments = (tokens + extra, made.num_partials + 30, 0.125, None, *on_device(sinks, None))
        with sentinels():
            out, lse = torch.ops.forktree.tree_attention.default(q, k, v, *made.on(q.device), *arguments)
        expected, _ = naive_attention(case, q[: case.layout.num_rows].cpu(), k.cpu(), v.cpu(), scale=0.125, sinks=sinks)
        np.testing.assert_allclose(out[:tokens].cpu().double().numpy(), expected, rtol=0, atol=2e-2)
        assert out[tokens:].eq(0).all()
        empty = torch.full((4,), -torch.inf) if sinks is None else sinks
        torch.testing.assert_close(lse[tokens:].cpu(), empty.expand(extra, 4))


def test_the_same_bits_under_load(backend):
    """An error that moves is a race."""
    layout = shared_prompt(1, 48, 3001, 19)
    made = plan_attention(layout, num_qo_heads=16, num_kv_heads=4, head_dim=128, device=DEVICE, cost_model=CUTS)
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


def test_two_streams_at_once(backend):
    """Each has counters of its own."""
    layout = shared_prompt(1, 48, 3001, 19)
    made = plan_attention(layout, num_qo_heads=16, num_kv_heads=4, head_dim=128, device=DEVICE, cost_model=CUTS)
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
        made = plan_attention(case.layout, **heads, device=DEVICE, cost_model=CUTS, max_partials=partials)
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
    ops.append_kv(*on_device(k, v, used), KVPool(*pools))
    assert all(torch.equal(pool[-len(used) :].cpu(), x) for pool, x in zip(pools, (k, v), strict=True))
    made = plan_attention(layout, num_qo_heads=16, num_kv_heads=kv_heads, head_dim=dim, device=DEVICE)
    out = ops.tree_attention(q.to(DEVICE), KVPool(*pools), made)
    low = replace(layout, slot_index=np.arange(len(used)))
    small = plan_attention(low, num_qo_heads=16, num_kv_heads=kv_heads, head_dim=dim)
    expected, _ = specified(q.double(), k.double(), v.double(), small)
    torch.testing.assert_close(out.cpu().double(), expected, rtol=0, atol=2e-2)


def test_nothing_to_do(backend):
    """A token that sees nothing, and a step whose nodes are empty."""
    layout = TreeLayout([0], [0], [0], [-1], [0], [0], [0, 1], [0, 1], [0], [TreeLayout.ALL], [-1], [0], [1], [3])
    q = torch.randn(1, 4, 64).bfloat16()
    k, v = torch.full((2, 3, 2, 64), torch.nan).bfloat16()
    out, lse = attend(layout, q, k, v)
    assert out.shape == (2, 4, 64) and out.eq(0).all() and lse.eq(-torch.inf).all()


# ---------------------------------------------------------------------- the others


@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
@pytest.mark.parametrize("dims", [(64, 64), (128, 96), (3, 5)], ids=str)
def test_append_kv(dims, integer, dtype, backend):
    n, heads, room = 37, 3, 60
    slots = torch.randperm(room)[:n]
    slots[::5] = -1
    packed = torch.randn(n, 2, heads, max(dims)).to(dtype)  # views with strides of their own
    k, v = packed[:, 0, :, : dims[0]], packed[:, 1, :, : dims[1]]
    pools = [torch.full((room, heads, dim), 9.0, dtype=dtype) for dim in dims]
    expected = [pool.clone() for pool in pools]
    for pool, x in zip(expected, (k, v), strict=True):
        pool[slots[slots >= 0]] = x[slots >= 0]
    packed, pools = packed.to(DEVICE), on_device(*pools)
    k, v = packed[:, 0, :, : dims[0]], packed[:, 1, :, : dims[1]]
    ops.append_kv(k, v, slots.to(DEVICE, integer), KVPool(*pools))
    assert all(torch.equal(pool.cpu(), x) for pool, x in zip(pools, expected, strict=True))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dims", [(64, 64), (128, 32), (80, 6)], ids=str)
def test_rotate_rows(dims, interleaved, dtype, backend):
    dim, rotary_dim = dims
    q = torch.randn(9, 5, dim).to(dtype)
    shift = torch.tensor([0, 1, -1, 5, -60, 4096, 131072, -131072, 10**6])
    inv_freq = 10000.0 ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    how = dict(interleaved=interleaved, rotary_dim=rotary_dim)
    with sentinels():
        got = ops.rotate_rows(*on_device(q, shift, inv_freq), **how)
    expected = by_reference("rotate_rows", q.double(), shift, inv_freq, *how.values())
    torch.testing.assert_close(got.cpu().double(), expected, rtol=0, atol=TOLERANCE[dtype])
    assert torch.equal(got[0].cpu(), q[0])


@pytest.mark.parametrize("dim", [64, 128, 5])
def test_merge_states(dim, dtype, backend):
    o, lse = torch.randn(40, 6, dim).to(dtype), torch.randn(40, 6) * 3
    lse[::7], o[::7] = -torch.inf, 0  # empty states
    counts = torch.tensor([0, 1, 2, 30, 1, 0, 7])
    indptr, index = torch.tensor([0, *counts.cumsum(0).tolist()]), torch.randint(40, (int(counts.sum()),))
    index[0] = 7
    with sentinels():
        out, total = ops.merge_states(*on_device(o, lse, indptr.int(), index))
    expected, expected_lse = by_reference("merge_states", o.double(), lse.double(), indptr, index)
    torch.testing.assert_close(out.cpu().double(), expected, rtol=0, atol=TOLERANCE[dtype])
    torch.testing.assert_close(total.cpu().double(), expected_lse, rtol=1e-5, atol=1e-5)
    assert out[0].eq(0).all() and total[0].eq(-torch.inf).all()


# ---------------------------------------------------------------------- choice and errors


def test_kernels_are_chosen_by_themselves(monkeypatch):
    monkeypatch.delenv("FORKTREE_BACKEND", raising=False)
    k = torch.zeros(1, 2, 64, dtype=torch.bfloat16, device=DEVICE)
    for rows, cuda_is_better in ((1, True), (4096, False)):
        q = torch.zeros(rows, 4, 64, dtype=torch.bfloat16, device=DEVICE)
        wanted = "cuda" if cuda_is_better and not missing("cuda") else "triton"
        assert select_backend("tree_attention", q, KVPool(k, k)) == wanted
    assert select_backend("tree_attention", q.double(), KVPool(k, k)) == "torch"


def test_what_lies_elsewhere_is_refused(backend):
    case = random_layout(1)
    q, k, v = tensors(case, 4, 2, 64, dtype=torch.bfloat16)
    made = plan_attention(case.layout, num_qo_heads=4, num_kv_heads=2, head_dim=64, device=DEVICE)
    with pytest.raises(ValueError, match=r"device|expected tensors on"):
        ops.tree_attention(q.to(DEVICE), KVPool(k, v), made)
    with pytest.raises(ValueError, match=r"device|expected tensors on"):
        ops.tree_attention(q, KVPool(k.to(DEVICE), v.to(DEVICE)), made)
