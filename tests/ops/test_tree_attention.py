"""`ops.tree_attention` by every backend that is there, in each dtype it takes, against attention in fp64."""

import math
from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attention import TOLERANCE, attend, by_fp64, case_of, compare, planned, tensors
from backends import (
    COMPILED,
    DENSE,
    EMULATED,
    EVERY,
    HOST,
    INTERPRETED,
    ON_GPU,
    REFERENCE,
    TORCH,
    Backend,
    each,
    each_of,
    on,
    sentinels,
)
from damage import check_damage
from forktree import ops
from forktree.ops import AttentionOptions, KVPool
from forktree.ops.dispatch import launcher
from forktree.ops.plan_tensors import PlanTensors
from forktree.plan.cost_model import CPU
from forktree.plan.layout import TreeLayout
from forktree.plan.plan import plan_attention
from layouts import KINDS, Case, chunk, naive_attention, random_layout, shared_prompt

SINKS = torch.tensor([0.5, -1.0, 2.0, -torch.inf])
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
OPTIONS = {
    "none": {},
    "scale": {"scale": 0.3},
    "negative scale": {"scale": -0.2},
    "no scale": {"scale": 0.0},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": SINKS},
    "alibi_slopes": {"alibi_slopes": SLOPES},
    "all": {"scale": -0.3, "softcap": 1.5, "sinks": SINKS, "alibi_slopes": SLOPES},
}


def sizes(backend, seed):
    """Of random layouts: on a GPU they take several blocks, in an interpreter they are few."""
    if backend.device == "cuda":
        return dict(num_nodes=5 + 12 * seed, max_len=9 + 30 * seed)
    return dict(num_contexts=5) if backend.interpreted else {}


@pytest.mark.parametrize("kind", KINDS)
@each_of(("dtype",), ((b, dtype) for b in EVERY for dtype in b.dtypes[: 1 if b.interpreted else 3]))
def test_random_layouts(backend, dtype, kind):
    """In an interpreter also what `test_windows` tries, and other dtypes in `test_head_shapes`."""
    for seed in range(backend.layouts if dtype == backend.dtypes[0] or backend.for_gpus else 1):
        case = random_layout(seed, kind, room=seed % 3, **sizes(backend, seed))
        window = 6 if backend.interpreted and seed else None
        for dims in backend.head_dims:
            q, k, v = tensors(case, 4, 2, *dims, dtype=dtype, seed=seed)
            for cost_model in backend.cost_models:
                compare(backend, case, q, k, v, window=window, cost_model=cost_model)


HEADS = [(1, 1, 4, 4), (6, 2, 8, 12), (4, 4, 16, 8), (2, 1, 4, 1100), (2, 1, 700, 3), (7, 1, 96, 33), (2, 2, 256, 256)]
GPU_HEADS = [(2, 2, 64, 64), (8, 2, 96, 96), (6, 2, 128, 128), (2, 1, 256, 256), (7, 1, 128, 128), (16, 2, 64, 64)]
GPU_HEADS += [(4, 2, 64, 128), (4, 2, 192, 128), (4, 2, 40, 24)]


@each_of(
    ("dtype", "heads"),
    (
        (b, dtype, heads)
        for b in EVERY
        for dtype in b.dtypes
        for heads in (GPU_HEADS if b.for_gpus else HEADS)
        if b.takes(dtype, *heads[2:])
    ),
)
def test_head_shapes(backend, dtype, heads):
    for seed in (0, 1):
        case = random_layout(seed, **sizes(backend, seed))
        compare(backend, case, *tensors(case, *heads, dtype=dtype))


@pytest.mark.parametrize("window", [1, 6])
@pytest.mark.parametrize("kind", KINDS)
@each(*(b for b in HOST if not b.interpreted))
def test_windows(backend, kind, window):
    for seed in range(4):
        case = random_layout(seed, kind, **sizes(backend, seed))
        dims = backend.head_dims[seed % len(backend.head_dims)]
        for cost_model in backend.cost_models:
            q, k, v = tensors(case, 4, 2, *dims, dtype=backend.dtypes[0])
            compare(backend, case, q, k, v, window=window, cost_model=cost_model)


@pytest.mark.parametrize("number", range(len(OPTIONS)), ids=OPTIONS)
@each(*EVERY)
def test_options(backend, number):
    """Each option with each window, each with each kind of layout, and each kind of layout with each window; in an
    interpreter each option once."""
    dtype, options = backend.dtypes[-1 if backend.for_gpus else 0], OPTIONS[list(OPTIONS)[number]]
    for seed, kind in enumerate(("random", "drafts", "joins", "chunks")):
        if backend.interpreted and seed != number % 4:
            continue
        case = random_layout(seed, kind, max_len=20, **({} if backend.device == "cpu" else dict(num_nodes=16)))
        window = (None, 1, 7, 40)[(seed + number + number // 4) % 4]
        for dims in backend.head_dims[:2]:
            cost_model = backend.cost_models[seed % len(backend.cost_models)]
            q, k, v = tensors(case, 4, 2, *dims, dtype=dtype, seed=seed)
            compare(backend, case, q, k, v, window=window, cost_model=cost_model, **options)


@pytest.mark.parametrize("name", ["", "reference", "torch"])
def test_fp64_is_computed_in_fp64(name, monkeypatch):
    monkeypatch.setenv("FORKTREE_BACKEND", name)
    case = random_layout(2)
    compare(Backend(name), case, *tensors(case, dtype=torch.float64))


@each(*HOST)
def test_growth_follows_the_tips(backend):
    """A plan made once serves several steps, while new tokens fill the room after tips."""
    for seed in range(2 if backend.interpreted else 6):
        window, dim, dtype = 6 if seed % 2 else None, backend.head_dims[0][0], backend.dtypes[0]
        case = random_layout(seed, num_contexts=6, room=3, uneven=False)
        layout = case.layout
        free = [s for s in range(case.num_slots) if s not in case.used]
        slot_index = layout.slot_index.copy()
        made = plan_attention(layout, num_qo_heads=4, num_kv_heads=2, head_dim=dim, window=window)
        path_row = np.repeat(np.arange(layout.num_rows), np.diff(layout.path_indptr))
        live = np.flatnonzero(layout.path_stop == TreeLayout.ALL)
        for _ in range(3):
            node_len = made.layout.node_len.copy()
            for node in set(layout.path_node[live].tolist()):
                slot = free.pop()
                case.used.add(slot)
                slot_index[layout.node_begin[node] + node_len[node]] = slot
                for path in live[layout.path_node[live] == node]:
                    case.seen[path_row[path]].append((slot, int(layout.node_pos[node] + node_len[node])))
                node_len[node] += 1
            made = made.grow(node_len, made.layout.row_pos + 1, slot_index)
            case.layout = made.layout
            q, k, v = tensors(case, dim=dim, dtype=dtype)
            out = ops.tree_attention(q, KVPool(k, v), made)
            expected, _ = naive_attention(case, q, k, v, window=window)
            np.testing.assert_allclose(out.double(), expected, rtol=0, atol=TOLERANCE[dtype])


@each(*EVERY)
def test_sees_nothing(backend):
    layout = TreeLayout(
        [3], [0], [1], [-1], [0], [0], [0, 1, 2], [0, 1, 2], [0, 0], [0, 1], [-1] * 2, [0] * 2, [0, 2], [0, 0]
    )
    case = Case(layout, [[], [(3, 0)]], 5, {3})
    q, k, v = tensors(case, 2, 1, *backend.head_dims[0], dtype=backend.dtypes[0])
    for sinks in (None, torch.tensor([1.0, 2.0]), torch.tensor([-torch.inf, 2.0])):
        compare(backend, case, q, k, v, sinks=sinks)
        out, lse = attend(backend, case, q, k, v, sinks=sinks)
        nothing = torch.full((2,), -torch.inf) if sinks is None else sinks
        assert out[:2].eq(0).all() and torch.equal(lse[:2], nothing.expand(2, 2))
        if nothing[0] == -torch.inf:
            torch.testing.assert_close(out[2, 0], v[3, 0])
    node_without_tokens = TreeLayout(
        [0], [0], [0], [-1], [0], [0], [0, 1], [0, 1], [0], [TreeLayout.ALL], [-1], [0], [1], [3]
    )
    out, lse = attend(backend, Case(node_without_tokens, [[]], 5), q[:1], k, v)
    assert out.shape[0] == 2 and out.eq(0).all() and lse.eq(-torch.inf).all()
    nobody = TreeLayout([], [], [], [], [], [], [0], [0], [], [], [], [], [], [])
    for layout in (nobody, TreeLayout.from_pages(np.zeros((0, 3), int), [], 16)):
        assert attend(backend, Case(layout, [], 5), q[:0], k, v)[0].shape == (0, 2, v.shape[2])


@each(*HOST)
def test_tokens_nobody_writes_are_cleared(backend):
    case = random_layout(0, "random")
    case.layout = replace(case.layout, row_token=case.layout.row_token + 3)
    q, k, v = tensors(case, dim=backend.head_dims[0][0], dtype=backend.dtypes[0])
    assert planned(case, q, k).empty_tokens.size >= 3
    compare(backend, case, q, k, v)
    compare(backend, case, q, k, v, sinks=SINKS)


@pytest.mark.parametrize("sinks", [None, SINKS], ids=["", "sinks"])
@each(*EMULATED, *INTERPRETED, *ON_GPU)
def test_room_for_a_larger_plan(backend, sinks):
    """Buckets of captured graphs: more rows of q, tokens, partials, plan and slots than the plan has."""
    case = random_layout(1, "random", **(dict(max_len=60) if backend.for_gpus else dict(num_contexts=5)))
    q, k, v = tensors(case, 4, 2, *backend.head_dims[0], dtype=backend.dtypes[-1 if backend.for_gpus else 0])
    cost_model = backend.cost_models[-1]
    made = planned(case, q, k, cost_model=cost_model, device=backend.device)
    assert made.num_partials and made.empty_tokens.size
    expected = attend(backend, case, q, k, v, cost_model=cost_model, sinks=sinks)
    right, right_lse = naive_attention(case, q, k, v, sinks=sinks)
    empty = torch.full((4,), -torch.inf) if sinks is None else sinks
    tokens, partials = case.layout.num_tokens, made.num_partials
    k, v, of_heads = on(backend.device, k, v, sinks)
    buffers = made.on(k.device)
    larger = [torch.cat([x, x.new_full((50,), 10**9)]) for x in buffers]
    launch = launcher(backend.name, "tree_attention")
    for more in (0, 1, 9)[2 * backend.interpreted :]:
        rows = torch.cat([q, torch.full((more, *q.shape[1:]), torch.nan, dtype=q.dtype)]).to(backend.device)
        room = PlanTensors(*larger, tokens + more, partials + 4 * more)
        with sentinels(backend.device):
            out, lse = launch(rows, KVPool(k, v), room, AttentionOptions(sinks=of_heads))
        out, lse = out.cpu(), lse.cpu()
        np.testing.assert_allclose(out[:tokens].double(), right, rtol=0, atol=TOLERANCE[q.dtype])
        np.testing.assert_allclose(lse[:tokens].double(), right_lse, rtol=1e-4, atol=2e-4)
        assert out[tokens:].eq(0).all()
        assert torch.equal(lse[tokens:], empty.expand(more, 4))
        if backend.device == "cpu":
            assert torch.equal(out[:tokens], expected[0]) and torch.equal(lse[:tokens], expected[1])


@cache
def beside_torch(heads, kv_heads, dim, dtype):
    """Arguments of a shared prompt, the exact outputs, and how far off PyTorch is: [seed, yardstick, output].

    `scaled_dot_product_attention` on the expanded batch. In fp32 the order of sums decides, and PyTorch's is that of
    the BLAS: there sums in order are a second yardstick.
    """
    branches, shared, own = 16, 600, 40
    layout = shared_prompt(1, branches, shared, own, spread=True)
    slots = torch.stack([torch.from_numpy(layout.slot_index[layout.visible(r)[0]]) for r in range(branches)]).long()

    def sdpa(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(
            q[:, :, None], k[slots].transpose(1, 2), v[slots].transpose(1, 2), enable_gqa=True
        )[:, :, 0]

    def in_order(q, k, v):
        k, v = (x[slots].transpose(1, 2).repeat_interleave(heads // kv_heads, 1) for x in (k, v))
        scores = sum(q[:, :, None, d] * k[..., d] for d in range(dim)) * dim**-0.5
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        tokens = range(weights.shape[2])
        return sum(weights[:, :, j, None] * v[:, :, j] for j in tokens) / sum(weights[:, :, j, None] for j in tokens)

    found = []
    for seed in range(4):
        q, k, v = tensors(case_of(layout), heads, kv_heads, dim, dtype=dtype, seed=seed)
        exact = sdpa(q.double(), k.double(), v.double())
        theirs = [yardstick(q, k, v) for yardstick in ([sdpa, in_order] if dtype == torch.float32 else [sdpa])]
        found.append((q, k, v, exact, [(x.double() - exact).abs().flatten() for x in theirs]))
    return layout, found


ERROR_HEADS = [(6, 2, 32), (4, 4, 64), (7, 1, 128), (8, 4, 256), (5, 1, 80)]
GPU_ERROR_HEADS = [(4, 4, 64), (6, 2, 96), (7, 1, 128), (8, 4, 256)]


@each_of(
    ("dtype", "heads"),
    (
        (b, dtype, heads)
        for b in (REFERENCE, TORCH, *COMPILED)
        for dtype in b.dtypes
        for heads in (GPU_ERROR_HEADS if b.for_gpus else ERROR_HEADS)
    ),
)
def test_error_is_that_of_torch_at_this_dtype(backend, dtype, heads):
    """Judged against fp64: in the mean, in the square, and for all but one output in a thousand. Beyond these it is
    chance which way an output was rounded."""
    layout, found = beside_torch(*heads, dtype)
    errors = []
    for q, k, v, exact, theirs in found[: 1 if backend == REFERENCE else 4]:  # which is slow
        out, _ = attend(backend, case_of(layout), q, k, v)
        errors.append(torch.stack([(out.double() - exact).abs().flatten(), *theirs]))
    error = torch.cat(errors, 1)
    most = int(0.999 * error.shape[1])
    for measure, slack in (
        (error.mean(1), 1.1),
        (error.square().mean(1).sqrt(), 1.1),
        (error.kthvalue(most).values, 1.1),
        (error.amax(1), 2),
    ):
        assert measure[0] <= slack * measure[1:].max()


@each(*HOST)
def test_same_bits_every_time(backend):
    """Also where blocks and programs run in another order every time."""
    case = random_layout(7, "joins", max_len=90 if backend.for_gpus else 9)
    q, k, v = tensors(case, 4, 2, *backend.head_dims[0], dtype=backend.dtypes[0])
    for cost_model in backend.cost_models:
        first = attend(backend, case, q, k, v, cost_model=cost_model)
        for _ in range(1 if backend.interpreted else 4):
            for x, y in zip(first, attend(backend, case, q, k, v, cost_model=cost_model), strict=True):
                assert torch.equal(x, y)


QUERIES = {
    "heads first": lambda q: q.transpose(0, 1).contiguous().transpose(0, 1),
    "rows apart": lambda q: torch.cat([q, q], 2)[..., : q.shape[2]],
    "elements apart": lambda q: torch.stack([q, q], -1)[..., 1],
    "off alignment": lambda q: torch.cat([q.flatten()[:1], q.flatten()])[1:].view(q.shape),
    "an odd number apart": lambda q: torch.cat([q, q[..., :3]], 2)[..., : q.shape[2]],
}


@pytest.mark.parametrize("stride", QUERIES)
@each(*HOST)
def test_queries_of_any_strides(backend, stride):
    case = random_layout(4)
    q, k, v = tensors(case, 4, 2, *backend.head_dims[0], dtype=backend.dtypes[-1 if backend.for_gpus else 0])
    for got, expected in zip(
        attend(backend, case, QUERIES[stride](q), k, v), attend(backend, case, q, k, v), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 if backend.name == "torch" else 0)


@each_of(
    ("stride",),
    ((b, s) for b in HOST for s in DENSE if b.name != "cuda" or ("odd" not in s and "off" not in s)),
)
def test_pools_of_any_strides(backend, stride):
    for seed, dtype in enumerate(backend.dtypes[: 1 if backend.interpreted else 3]):
        case = random_layout(seed, max_len=9 if backend.interpreted else 90, **sizes(backend, seed))
        for dims in [(64, 64), (256, 256)] if backend.for_gpus else [(24, 40)]:
            q, k, v = tensors(case, 6, 2, *dims, dtype=dtype)
            expected = attend(backend, case, q, k, v)
            for strided in ((DENSE[stride](k), DENSE[stride](v)), (k, DENSE[stride](v))):
                got = attend(backend, case, q, *strided)
                torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 if backend.name == "torch" else 0)


@pytest.mark.parametrize(
    ("heads", "slots", "view"),
    [(1, 2**25 + 100, lambda x: x), (4, 3 * 2**22, lambda x: x.view(x.shape[1], -1, x.shape[2]).transpose(0, 1))],
    ids=["slots", "heads"],
)
@each(*HOST)
def test_offsets_beyond_31_bits(backend, heads, slots, view):
    """Pools of more than 2**31 elements, of which a few are ever touched."""
    dim = 64
    k, v = (view(torch.empty(slots, heads, dim, dtype=torch.bfloat16)) for _ in "kv")
    layout = replace(shared_prompt(1, 2, 3, 2), slot_index=np.array([slots - 1 - i for i in range(7)]))
    q = torch.randn(2, heads, dim).bfloat16()
    new = torch.randn(2, 7, heads, dim).bfloat16()
    ops.append_kv(new[0], new[1], torch.from_numpy(layout.slot_index), KVPool(k, v))
    found = attend(backend, case_of(layout), q, k, v)
    expected = attend(backend, case_of(replace(layout, slot_index=np.arange(7))), q, new[0], new[1])
    torch.testing.assert_close(found, expected)


DAMAGED = {  # dims of K and V
    "cuda": [(dim, dim) for dim in (64, 96, 128, 256)],
    "triton": [(16, 16)],
}


@each_of(
    ("kind",), ((b, kind) for b in HOST for kind in (("random", "drafts", "chunks") if b.interpreted else KINDS))
)
def test_damage_stays_with_the_rows_that_see_it(backend, kind):
    """In Triton tiles may be smaller the second time, and sums are added in another order."""
    per_head = {
        "sinks": torch.tensor([0.5, -torch.inf, 1.0, 0.0, 2.0, -1.0]),
        "alibi_slopes": torch.linspace(0, 0.1, 6),
    }
    every = ({}, {"window": 5}, {"window": 90, "softcap": 2.0}, per_head)
    same = partial(torch.allclose, rtol=2e-6, atol=2e-6) if backend.interpreted else torch.equal
    number = KINDS.index(kind)
    for seed, options in enumerate(every):
        if (backend.name == "reference" and seed > 1) or (backend.interpreted and seed != number % 4):
            continue  # the reference is slow, and reads nothing but what rows see
        dims = DAMAGED.get(backend.name, [(32, 24)])
        dtype = backend.dtypes[0 if backend.interpreted else (seed + number) % len(backend.dtypes)]
        case = random_layout(
            seed,
            kind,
            max_len=9 if backend.interpreted else (9, 150)[seed // 2],
            room=seed % 2,
            num_contexts=3 if backend.interpreted else 8,
        )
        q, k, v = tensors(case, 6, 2, *dims[(seed + number) % len(dims)], dtype, seed)
        cost_model = replace(CPU, units=64, grain=1) if seed % 2 else None
        attended = partial(attend, backend, case, q, cost_model=cost_model, **options)
        check_damage(case, k, v, 6, attended, options.get("window"), seed, same)


@each(*HOST)
def test_a_chunk_whose_last_token_is_damaged(backend):
    """The smallest case: of two rows the first does not see the second's token."""
    case = case_of(chunk(2))
    q, k, v = tensors(case, 1, 1, *backend.head_dims[0], dtype=backend.dtypes[0])
    v[1] = torch.nan
    out, _ = attend(backend, case, q, k, v)
    torch.testing.assert_close(out[0], v[0])
    assert out[1].isnan().all()


EXAMPLES = {"cpu": 20, "cuda": 30, "triton": 8}


@each(*COMPILED, *INTERPRETED)
def test_any_layout_option_and_split(backend):
    """Against the specification in fp64, cut by targets that split everywhere."""
    groups, dims = st.integers(1, 9), st.integers(1, 40 if backend.interpreted else 70)
    if backend.for_gpus:
        groups, dims = st.sampled_from([1, 2, 3, 4, 7, 8, 20]), st.sampled_from([d for d, _ in backend.head_dims])

    @settings(
        deadline=None,
        max_examples=EXAMPLES[backend.name],
        derandomize=backend.interpreted,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def holds(data):
        draw = data.draw
        kind, seed, dtype = (
            draw(st.sampled_from(KINDS)),
            draw(st.integers(0, 10**6)),
            draw(st.sampled_from(backend.dtypes)),
        )
        group, kv_heads = draw(groups), draw(st.integers(1, 2 if backend.interpreted else 3))
        dim, value_dim = draw(dims), draw(dims)
        heads = group * kv_heads
        options = {
            "window": draw(st.none() | st.integers(1, 400)),
            "scale": draw(st.none() | st.floats(-1, 1)),
            "softcap": draw(st.none() | st.floats(0.1, 30)),
            "sinks": draw(st.none() | st.just(torch.linspace(-1, 2, heads))),
            "alibi_slopes": draw(st.none() | st.just(torch.linspace(0.0, 0.1, heads))),
        }
        units, grain = draw(st.sampled_from([1, 16, 1000])), draw(st.sampled_from([1, CPU.grain]))
        small = dict(max_len=draw(st.sampled_from([5, 20])), num_contexts=4)
        of = small if backend.interpreted else dict(max_len=draw(st.sampled_from([9, 150])))
        case = random_layout(seed, kind, room=draw(st.integers(0, 2)), **of)
        q, k, v = tensors(case, heads, kv_heads, dim, dim if backend.for_gpus else value_dim, dtype, seed)
        out, lse = attend(backend, case, q, k, v, cost_model=replace(CPU, units=units, grain=grain), **options)
        expected, expected_lse = by_fp64(case, q, k, v, **options)
        near = 2e-5 if backend.for_gpus else 5e-5
        np.testing.assert_allclose(out.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        np.testing.assert_allclose(lse, expected_lse, rtol=near, atol=near)

    holds()


# ---------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda a: a.update(q=a["q"][1:]),
            r"q must be \[12, 4, 8\] \(rows of the layout, .* got \[11, 4, 8\]",
        ),
        (lambda a: a.update(q=a["q"][:, :2]), r"q must be \[12, 4, 8\] .* got \[12, 2, 8\]"),
        (lambda a: a.update(q=a["q"].int()), "q must be fp32, bf16, fp16 or fp64, got torch.int32"),
        (
            lambda a: a.update(q=a["q"].half()),
            "k of the pool must be torch.float16 on cpu as q is, got torch.float32",
        ),
        (
            lambda a: a.update(v_slots=a["v_slots"].half()),
            "v of a pool must be torch.float32 on cpu as k is",
        ),
        (lambda a: a.update(v_slots=a["v_slots"][1:]), r"k and v of a pool must be \[slots, Hk, Dk\] and"),
        (
            lambda a: a.update(k_slots=a["k_slots"][:, :1].contiguous(), v_slots=a["v_slots"][:, :1].contiguous()),
            r"k of the pool must be \[slots, 2, 8\] \(heads and head_dim of the plan\), got \[\d+, 1, 8\]",
        ),
        (
            lambda a: a.update(k_slots=a["k_slots"][:3], v_slots=a["v_slots"][:3]),
            r"slot_index must be in \[0, 3\), the pool, got \d+ to \d+",
        ),
        (
            lambda a: a.update(k_slots=a["k_slots"].transpose(1, 2).contiguous().transpose(1, 2)),
            r"k and v of a pool must be dense in their last dimension, got strides \(16, 1, 2\) and \(16, 8, 1\)",
        ),
        (
            lambda a: a.update(sinks=torch.zeros(2)),
            r"sinks must be floating-point \[4\] on cpu, got .* \[2\]",
        ),
        (
            lambda a: a.update(alibi_slopes=torch.zeros(4, dtype=torch.int32)),
            "alibi_slopes must be floating-point",
        ),
    ],
)
def test_bad_input_is_refused_by_name(change, message):
    case = random_layout(0, num_contexts=12, uneven=False)
    q, k, v = tensors(case)
    arguments = {
        "q": q,
        "k_slots": k,
        "v_slots": v,
        "plan": plan_attention(case.layout, num_qo_heads=4, num_kv_heads=2, head_dim=8),
    }
    change(arguments)
    with pytest.raises(ValueError, match=message):
        pool = KVPool(arguments["k_slots"], arguments["v_slots"])
        options = AttentionOptions(sinks=arguments.get("sinks"), alibi_slopes=arguments.get("alibi_slopes"))
        ops.tree_attention(arguments["q"], pool, arguments["plan"], options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(
            ({"softcap": x}, f"softcap must be a finite fp32 number above 0, or None, got {x}")
            for x in (0.0, -1.0, math.inf, math.nan, 1e-60)
        ),
        *(({"scale": x}, "scale must be a finite fp32 number, or None, got ") for x in (math.inf, math.nan, 1e60)),
        *(({"sinks": torch.tensor([0.0, x])}, "sinks must be numbers or -inf, got ") for x in (math.inf, math.nan)),
        *(
            ({"alibi_slopes": torch.tensor([0.0, x])}, "alibi_slopes must be finite, got ")
            for x in (-math.inf, math.inf, math.nan)
        ),
        ({"sinks": torch.zeros(2, dtype=torch.int64)}, "sinks must be floating-point .2. on cpu, got torch.int64"),
        ({"sinks": torch.zeros(2, device="meta")}, "sinks must be floating-point .2. on cpu, got .* on meta"),
    ],
)
@each(*HOST)
def test_bad_options_are_refused_by_name(backend, options, message):
    q, k, v = torch.randn(3, 2, 2, 4)
    with pytest.raises(ValueError, match=message):
        made = plan_attention(chunk(2), num_qo_heads=2, num_kv_heads=2, head_dim=4)
        ops.tree_attention(q, KVPool(k, v), made, AttentionOptions(**options))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: [x.float() for x in a], "q must be bf16 or fp16 for the CUDA kernel, got torch.float32"),
        (lambda a: [x[..., :32].contiguous() for x in a], r"head_dim must be 64, 96, .*, got 32 and 32"),
        (lambda a: [*a[:2], torch.cat([a[2], a[2]], 2)], r"head_dim must be .*, of K as of V, .* got 64 and 128"),
        (
            lambda a: [*a[:2], torch.cat([a[2].flatten()[:1], a[2].flatten()])[1:].view(a[2].shape)],
            r"v of the pool must begin at a multiple of 16 bytes, .* got 0x",
        ),
        (
            lambda a: [*a[:2], torch.cat([a[2], a[2][..., :1]], 2)[..., :-1]],
            r"v of the pool must begin .*, and so must its slots and heads, .* strides \(130, 65, 1\): leave it to",
        ),
    ],
)
@each(*EMULATED, *(b for b in ON_GPU if b.name == "cuda"))
def test_what_there_is_no_kernel_for_is_refused(backend, change, message):
    case = random_layout(0)
    q, k, v = change(on(backend.device, *tensors(case, 4, 2, 64, dtype=torch.float16)))
    with pytest.raises(ValueError, match=message):
        attend(backend, case, q, k, v)
