"""The CUDA kernel of tree attention, run on the CPU: head dims, groups and sizes that its tiles make special."""

from dataclasses import replace
from functools import partial
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backends import DENSE, specified
from damage import check_damage
from forktree import _core, ops
from forktree.ops import AttentionOptions, KVPool
from forktree.ops.params import KvPool, TreeAttentionParams
from forktree.ops.plan_tensors import PlanTensors
from forktree.plan.cost_model import CPU
from forktree.plan.layout import TreeLayout
from forktree.plan.plan import plan_attention
from layouts import KINDS, Case, chunk, naive_attention, random_layout, shared_prompt

pytestmark = pytest.mark.skipif(
    _core.build["cuda"] != "emulated", reason="needs a core built with FORKTREE_CUDA=emulate, as `make proof` does"
)

DIMS = (64, 96, 128, 256)
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3}  # on outputs of size 1
DTYPES = tuple(TOLERANCE)
FINE = replace(CPU, units=1000, grain=1)  # cuts everywhere, so partials everywhere


@pytest.fixture(autouse=True)
def cuda(monkeypatch):
    monkeypatch.setenv("FORKTREE_BACKEND", "cuda")


def new_nan(like, *shape, dtype=None):
    """What is not written shows."""
    shape = shape[0] if isinstance(shape[0], tuple) else shape
    return torch.full(shape, torch.nan, dtype=dtype or like.dtype)


def case_of(layout):
    """A layout whose slots are those of a pool just large enough."""
    return Case(layout, [], int(layout.slot_index.max()) + 1, set(layout.slot_index.tolist()))


def tensors(case, heads, kv_heads, dim, dtype, seed=0):
    """q and pools whose unused slots are NaN."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(case.layout.num_rows, heads, dim, generator=g).to(dtype)
    k, v = (torch.randn(case.num_slots, kv_heads, dim, generator=g).to(dtype) for _ in "kv")
    unused = [s for s in range(case.num_slots) if s not in case.used]
    k[unused] = v[unused] = torch.nan
    return q, k, v


def attend(case, q, k, v, *, window=None, cost_model=None, **options):
    heads = dict(num_qo_heads=q.shape[1], num_kv_heads=k.shape[1], head_dim=q.shape[2])
    made = plan_attention(case.layout, window=window, cost_model=cost_model, **heads)
    with patch.object(torch.Tensor, "new_empty", new_nan):
        return ops.tree_attention(q, KVPool(k, v), made, AttentionOptions(**options), return_lse=True)


def by_fp64(case, q, k, v, *, window=None, **options):
    """The reference in fp64: faster than `naive_attention`, which a few tests hold it and the kernel against."""
    heads = dict(num_qo_heads=q.shape[1], num_kv_heads=k.shape[1], head_dim=q.shape[2])
    made = plan_attention(case.layout, window=window, **heads)
    return specified(q.double(), k.double(), v.double(), made, AttentionOptions(**options))


def compare(case, q, k, v, *, expected=by_fp64, cost_model=None, **options):
    out, lse = attend(case, q, k, v, cost_model=cost_model, **options)
    out_expected, lse_expected = expected(case, q, k, v, **options)
    assert out.dtype == q.dtype and lse.dtype == torch.float32
    np.testing.assert_allclose(out.double(), out_expected, rtol=TOLERANCE[q.dtype], atol=TOLERANCE[q.dtype])
    np.testing.assert_allclose(lse, lse_expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("kind", KINDS)
def test_random_layouts(kind, dim, dtype):
    for seed in range(3):
        case = random_layout(seed, kind, room=seed % 3)
        compare(case, *tensors(case, 4, 2, dim, dtype, seed), expected=naive_attention)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8, 70])
def test_groups(group):
    for kind in ("random", "chunks"):
        case = random_layout(group, kind)
        for cost_model in (None, FINE):
            compare(case, *tensors(case, 2 * group, 2, 64, torch.float16), cost_model=cost_model)


@pytest.mark.parametrize(("dim", "window"), [(64, None), (64, 1), (64, 90), (128, 70), (256, None), (256, 90)])
@pytest.mark.parametrize("kind", KINDS)
def test_long_nodes_and_windows(kind, dim, window):
    """Tiles within one segment, across several, and cut by the window."""
    case = random_layout(5, kind, max_len=140)
    q, k, v = tensors(case, 2, 1, dim, torch.float16)
    compare(case, q, k, v, window=window)
    compare(case, q, k, v, window=window, cost_model=replace(FINE, units=16))


@pytest.mark.parametrize("used", ["negative scale", "no scale", "scale", "softcap", "sinks", "alibi_slopes", "all"])
@pytest.mark.parametrize("cost_model", [None, FINE])
def test_options(used, cost_model):
    options = {
        "scale": 0.3,
        "softcap": 1.5,
        "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0]),
        "alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625]),
    }
    chosen = {"negative scale": {"scale": -0.2}, "no scale": {"scale": 0.0}, "all": {**options, "window": 7}}
    for seed, kind in enumerate(("random", "drafts", "joins")):
        case = random_layout(seed, kind, max_len=40)
        q, k, v = tensors(case, 4, 2, 64, torch.float16)
        compare(case, q, k, v, cost_model=cost_model, **chosen.get(used, {used: options.get(used)}))


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize(("branches", "group"), [(5, 3), (16, 1), (17, 1), (32, 1), (33, 1), (64, 1), (65, 1), (30, 7)])
def test_packed_rows(branches, group, dim):
    """On both sides of every arrangement of warps, up to several tiles of rows an item."""
    case = case_of(shared_prompt(1, branches, 130, 3, spread=True))
    compare(case, *tensors(case, 2 * group, 2, dim, torch.bfloat16))


@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 128, 129, 300])
def test_tokens(length):
    """On both sides of every border between tiles, with one stage of the pipeline filled, or all, or none."""
    for dim in DIMS:
        case = case_of(replace(shared_prompt(1, 2, length, 1), slot_index=np.arange(length + 2)[::-1] * 2))
        compare(case, *tensors(case, 2, 1, dim, torch.float16))


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
        compare(case, *tensors(case, 4, 2, 64, torch.float16), window=window)


@pytest.mark.parametrize("dim", [64, 256])
def test_chunks(dim):
    """A causal chunk of several tiles of rows over a prompt."""
    case = case_of(chunk(150))
    compare(case, *tensors(case, 2, 1, dim, torch.float16))
    compare(case, *tensors(case, 3, 1, dim, torch.float16), window=70, cost_model=FINE)


@settings(deadline=None, max_examples=30, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_layout_option_and_split(data):
    draw = data.draw
    dtype, dim = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DIMS))
    kind, seed = draw(st.sampled_from(KINDS)), draw(st.integers(0, 10**6))
    group, kv_heads = draw(st.sampled_from([1, 2, 3, 4, 7, 8, 20])), draw(st.integers(1, 3))
    heads = group * kv_heads
    options = {
        "window": draw(st.none() | st.integers(1, 400)),
        "scale": draw(st.none() | st.floats(-1, 1)),
        "softcap": draw(st.none() | st.floats(0.1, 30)),
        "sinks": draw(st.none() | st.just(torch.linspace(-1, 2, heads))),
        "alibi_slopes": draw(st.none() | st.just(torch.linspace(0.0, 0.1, heads))),
    }
    cost_model = replace(CPU, units=draw(st.sampled_from([1, 16, 1000])), grain=draw(st.sampled_from([1, CPU.grain])))
    case = random_layout(seed, kind, max_len=draw(st.sampled_from([9, 150])), room=draw(st.integers(0, 2)))
    compare(case, *tensors(case, heads, kv_heads, dim, dtype, seed), cost_model=cost_model, **options)


@pytest.mark.parametrize("sinks", [None, torch.tensor([1.0, 2.0])])
def test_room_for_a_larger_plan(sinks):
    """Buckets of captured graphs: more rows of q, tokens, partials, plan and slots than the plan has."""
    case = random_layout(3, "random", max_len=60)
    q, k, v = tensors(case, 2, 1, 64, torch.float16)
    made = plan_attention(case.layout, num_qo_heads=2, num_kv_heads=1, head_dim=64, cost_model=FINE)
    assert made.num_partials and made.empty_tokens.size
    expected, expected_lse = attend(case, q, k, v, cost_model=FINE, sinks=sinks)
    buffer, slots = made.on(q.device)
    larger = [torch.cat([x, torch.full((50,), 10**9, dtype=torch.int32)]) for x in (buffer, slots)]
    launch = ops.dispatch.launcher("cuda", "tree_attention")
    tokens, partials = case.layout.num_tokens, made.num_partials
    with patch.object(torch.Tensor, "new_empty", new_nan):
        for more in (0, 1, 9):
            rows = torch.cat([q, torch.full((more, 2, 64), torch.nan, dtype=q.dtype)])
            room = PlanTensors(*larger, tokens + more, partials + more)
            out, lse = launch(rows, KVPool(k, v), room, AttentionOptions(sinks=sinks))
            assert torch.equal(out[:tokens], expected) and torch.equal(lse[:tokens], expected_lse)
            assert out[tokens:].eq(0).all()
            assert lse[tokens:].eq(-torch.inf if sinks is None else sinks).all()


def test_sees_nothing():
    layout = TreeLayout(
        [3], [0], [1], [-1], [0], [0], [0, 1, 2], [0, 1, 2], [0, 0], [0, 1], [-1] * 2, [0] * 2, [0, 2], [0, 0]
    )
    case = Case(layout, [[], [(3, 0)]], 5, {3})
    for sinks in (None, torch.tensor([1.0, 2.0]), torch.tensor([-torch.inf, 2.0])):
        compare(case, *tensors(case, 2, 1, 64, torch.float16), sinks=sinks, expected=naive_attention)
    nothing = TreeLayout.from_pages(np.zeros((0, 3), int), [], 16)
    made = plan_attention(nothing, num_qo_heads=2, num_kv_heads=1, head_dim=64)
    pool = torch.zeros(5, 1, 64, dtype=torch.float16)
    assert ops.tree_attention(pool.new_empty(0, 2, 64), KVPool(pool, pool), made).shape == (0, 2, 64)


def test_same_bits_in_any_order_of_blocks():
    """Blocks run in another order every time."""
    case = random_layout(7, "joins", max_len=90)
    q, k, v = tensors(case, 3, 1, 64, torch.bfloat16)
    first = attend(case, q, k, v, cost_model=FINE)
    for _ in range(4):
        for x, y in zip(first, attend(case, q, k, v, cost_model=FINE), strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize(("number", "kind"), enumerate(KINDS))
def test_damage_stays_with_the_rows_that_see_it(number, kind):
    options = {"window": 5, "softcap": 2.0} if number % 2 else {}
    case = random_layout(number, kind, num_contexts=4)
    q, k, v = tensors(case, 4, 2, DIMS[number % 4], DTYPES[number % 2])
    attended = partial(attend, case, q, cost_model=FINE if number > 3 else None, **options)
    check_damage(case, k, v, 4, attended, options.get("window"), number)


@pytest.mark.parametrize("dim", DIMS)
def test_damage_in_every_arrangement_of_warps(dim):
    for branches in (3, 16, 40):
        case = case_of(shared_prompt(1, branches, 70, 5))
        q, k, v = tensors(case, 2, 1, dim, torch.bfloat16)
        clean = attend(case, q, k, v)
        v[case.layout.node_begin[2] + 1] = torch.inf  # of the second branch
        others = [row for row in range(branches) if row != 1]
        out, lse = attend(case, q, k, v)
        assert not out[1].isfinite().any() and torch.equal(out[others], clean[0][others]) and torch.equal(lse, clean[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 64), (6, 2, 96), (7, 1, 128), (8, 4, 256)])
def test_error_is_that_of_torch_at_this_dtype(heads, kv_heads, dim, dtype):
    """Judged against fp64, beside scaled_dot_product_attention on the expanded batch: in the mean, in the square, and
    for all but one output in a thousand. Beyond these it is chance which way an output was rounded."""
    branches = 16
    case = case_of(shared_prompt(1, branches, 600, 40))
    layout = case.layout
    slots = torch.stack([torch.from_numpy(layout.slot_index[layout.visible(r)[0]]) for r in range(branches)]).long()

    def sdpa(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(
            q[:, :, None], k[slots].transpose(1, 2), v[slots].transpose(1, 2), enable_gqa=True
        )[:, :, 0]

    errors = []
    for seed in range(3):
        q, k, v = tensors(case, heads, kv_heads, dim, dtype, seed)
        exact = sdpa(q.double(), k.double(), v.double())
        both = attend(case, q, k, v)[0], sdpa(q, k, v)
        errors.append(torch.stack([(x.double() - exact).abs().flatten() for x in both]))
    ours, theirs = torch.cat(errors, 1)
    most = int(0.999 * ours.numel())
    assert ours.mean() <= 1.1 * theirs.mean() and ours.square().mean() <= 1.1**2 * theirs.square().mean()
    assert ours.kthvalue(most).values <= 1.1 * theirs.kthvalue(most).values and ours.max() <= 2 * theirs.max()


@pytest.mark.parametrize("heads", [1, 4])
def test_offsets_beyond_31_bits(heads):
    """Pools of more than 2**31 elements, heads first, of which a few are ever touched."""
    slots, dim = (2**25 + 100) // heads * (1 if heads == 1 else 2), 64
    k, v = (torch.empty(heads, slots, dim, dtype=torch.bfloat16).transpose(0, 1) for _ in "kv")
    layout = replace(shared_prompt(1, 2, 3, 2), slot_index=np.array([slots - 1 - i for i in range(7)]))
    q, new = torch.randn(2, heads, dim).bfloat16(), torch.randn(2, 7, heads, dim).bfloat16()
    ops.append_kv(new[0], new[1], torch.from_numpy(layout.slot_index), KVPool(k, v))
    out, lse = attend(case_of(layout), q, k, v)
    low = case_of(replace(layout, slot_index=np.arange(7)))
    expected, expected_lse = attend(low, q, new[0], new[1])
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)


@pytest.mark.parametrize("stride", [name for name in DENSE if "odd" not in name and "off" not in name])
def test_strides_of_pools(stride):
    for dim, dtype in ((64, torch.float16), (256, torch.bfloat16)):
        case = random_layout(4, max_len=90)
        q, k, v = tensors(case, 4, 2, dim, dtype)
        expected = attend(case, q, k, v)
        for got, right in zip(attend(case, q, DENSE[stride](k), DENSE[stride](v)), expected, strict=True):
            assert torch.equal(got, right)


@pytest.mark.parametrize(
    "strided",
    [
        lambda q: q.transpose(0, 1).contiguous().transpose(0, 1),  # read as it is
        lambda q: torch.cat([q, q], 2)[..., : q.shape[2]],
        lambda q: torch.stack([q, q], -1)[..., 1],  # the others are copied first
        lambda q: torch.cat([q.flatten()[:1], q.flatten()])[1:].view(q.shape),
        lambda q: torch.cat([q, q[..., :3]], 2)[..., : q.shape[2]],
    ],
)
def test_strides_of_queries(strided):
    case = random_layout(4)
    q, k, v = tensors(case, 4, 2, 64, torch.float16)
    assert torch.equal(attend(case, strided(q), k, v)[0], attend(case, q, k, v)[0])


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
def test_what_there_is_no_kernel_for_is_refused(change, message):
    case = random_layout(0)
    q, k, v = change(tensors(case, 4, 2, 64, torch.float16))
    with pytest.raises(ValueError, match=message):
        attend(case, q, k, v)


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
