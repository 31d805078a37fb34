"""The Triton kernels under Triton's interpreter, their programs in random order: no GPU is needed."""

from dataclasses import replace
from functools import partial
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backends import DENSE, by_reference, specified
from damage import check_damage
from forktree import ops
from forktree.ops import AttentionOptions, KVPool
from forktree.plan.cost_model import CPU
from forktree.plan.layout import TreeLayout
from forktree.plan.plan import AttentionPlan, plan_attention
from layouts import KINDS, Case, chunk, naive_attention, random_layout, shared_prompt

triton_kernels = pytest.importorskip("forktree.triton_kernels", reason="needs Triton")
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles here: tests/test_gpu.py"),
    pytest.mark.usefixtures("shuffled", "sentinels"),
]
SCATTERED = replace(CPU, units=100, grain=1, item=100, segment=1, partial=1)  # cuts wherever it can
NEW_EMPTY = torch.Tensor.new_empty
DTYPES = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}  # tolerance on outputs of size 1


@pytest.fixture(scope="module", autouse=True)
def backend():
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("FORKTREE_BACKEND", "triton")
        yield


def nans(like, *shape, dtype=None, **interpreted):
    empty = NEW_EMPTY(like, *shape, dtype=dtype or like.dtype, **interpreted)
    return empty.fill_(torch.nan) if empty.is_floating_point() else empty


@pytest.fixture(scope="module")
def sentinels():
    """What is not written shows."""
    with patch.object(torch.Tensor, "new_empty", nans):
        yield


def tensors(case, heads=4, kv_heads=2, dim=8, value_dim=None, dtype=torch.float32, seed=0):
    """q and pools whose unused slots are NaN."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(case.layout.num_rows, heads, dim, generator=g).to(dtype)
    k, v = (torch.randn(case.num_slots, kv_heads, d, generator=g).to(dtype) for d in (dim, value_dim or dim))
    unused = [s for s in range(case.num_slots) if s not in case.used]
    k[unused] = v[unused] = torch.nan
    return q, k, v


def case_of(layout):
    return Case(layout, [], int(layout.slot_index.max()) + 1, set(layout.slot_index.tolist()))


def make(case, q, k, window=None, cost_model=None):
    heads = dict(num_qo_heads=q.shape[1], num_kv_heads=k.shape[1], head_dim=q.shape[2])
    return plan_attention(case.layout, window=window, cost_model=cost_model, **heads)


def attend(case, q, k, v, window=None, cost_model=None, **options):
    made = make(case, q, k, window, cost_model)
    return ops.tree_attention(q, KVPool(k, v), made, AttentionOptions(**options), return_lse=True)


def compare(case, q, k, v, *, cost_model=None, **options):
    out, lse = attend(case, q, k, v, cost_model=cost_model, **options)
    expected, expected_lse = naive_attention(case, q, k, v, **options)
    assert out.dtype == q.dtype and lse.dtype == torch.float32
    np.testing.assert_allclose(out.double().numpy(), expected, rtol=DTYPES[q.dtype], atol=DTYPES[q.dtype])
    np.testing.assert_allclose(lse.double().numpy(), expected_lse, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("cost_model", [CPU, SCATTERED], ids=["whole", "scattered"])
@pytest.mark.parametrize("kind", KINDS)
def test_random_layouts(kind, cost_model):
    for seed in range(2):
        case = random_layout(seed, kind, room=seed, num_contexts=5)
        compare(case, *tensors(case, seed=seed), cost_model=cost_model, window=[None, 6][seed])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(1, 1, 4, 4), (6, 2, 8, 12), (7, 1, 96, 33), (2, 2, 256, 256)])
def test_head_shapes(heads, dtype):
    case = random_layout(1)
    compare(case, *tensors(case, *heads, dtype=dtype))


@pytest.mark.parametrize("used", ["scale", "softcap", "sinks", "alibi_slopes", "all"])
def test_options(used):
    options = {
        "scale": -0.3,
        "softcap": 1.5,
        "sinks": torch.tensor([0.5, -1.0, 2.0, -torch.inf]),
        "alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625]),
    }
    case = random_layout(0, "drafts")
    chosen = options if used == "all" else {used: options[used]}
    for cost_model in (CPU, SCATTERED):
        compare(case, *tensors(case), cost_model=cost_model, window=7 if used == "all" else None, **chosen)


@settings(deadline=None, max_examples=8, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_layout_option_and_split(data):
    """Against the specification in fp64, cut by targets that split everywhere."""
    draw = data.draw
    kind, seed, dtype = draw(st.sampled_from(KINDS)), draw(st.integers(0, 10**6)), draw(st.sampled_from(list(DTYPES)))
    group, kv_heads = draw(st.integers(1, 9)), draw(st.integers(1, 2))
    dim, value_dim = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    window = draw(st.none() | st.integers(1, 100))
    heads = group * kv_heads
    options = {
        "scale": draw(st.floats(-1, 1)),
        "softcap": draw(st.none() | st.floats(0.1, 30)),
        "sinks": draw(st.none() | st.just(torch.linspace(-1, 2, heads))),
        "alibi_slopes": draw(st.none() | st.just(torch.linspace(0.0, 0.1, heads))),
    }
    case = random_layout(
        seed, kind, max_len=draw(st.sampled_from([5, 20])), num_contexts=4, room=draw(st.integers(0, 2))
    )
    q, k, v = tensors(case, heads, kv_heads, dim, value_dim, dtype, seed)
    out, lse = attend(case, q, k, v, window, draw(st.sampled_from([CPU, SCATTERED])), **options)
    made = make(case, q, k, window)
    expected, expected_lse = specified(q.double(), k.double(), v.double(), made, AttentionOptions(**options))
    np.testing.assert_allclose(out.double(), expected, rtol=DTYPES[dtype], atol=DTYPES[dtype])
    np.testing.assert_allclose(lse, expected_lse, rtol=5e-5, atol=5e-5)


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


def against_reference(layout, window=None, cost_model=None, dim=16, heads=4, kv_heads=2, **options):
    case = case_of(layout)
    q, k, v = tensors(case, heads, kv_heads, dim)
    out, lse = attend(case, q, k, v, window, cost_model, **options)
    made = make(case, q, k, window)
    expected, expected_lse = specified(q.double(), k.double(), v.double(), made, AttentionOptions(**options))
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
    assert make(case_of(layout), *tensors(case_of(layout))[:2], None, cost_model).num_partials > 15
    against_reference(layout, cost_model=cost_model, sinks=torch.tensor([0.5, 0.0, -1.0, 2.0]))


def bucket(made: AttentionPlan, q, k, v, tokens, partials, **options):
    arguments = dict(scale=0.3, softcap=None, sinks=None, alibi_slopes=None) | options
    return torch.ops.forktree.tree_attention.default(
        q, k, v, *made.on(q.device), num_tokens=tokens, max_partials=partials, **arguments
    )


def test_a_bucket_larger_than_the_plan():
    """Rooms of captured graphs: rows, tokens and partials exceed the plan's; what is beyond is cleared."""
    case = random_layout(3, "random", num_contexts=5)
    q, k, v = tensors(case)
    made = make(case, q, k, cost_model=SCATTERED)
    expected = bucket(made, q, k, v, case.layout.num_tokens, made.num_partials)
    more = torch.cat([q, torch.full((5, *q.shape[1:]), torch.nan)])
    sinks = torch.tensor([0.5, 0.0, -1.0, 2.0])
    out, lse = bucket(made, more, k, v, case.layout.num_tokens + 9, made.num_partials + 4)
    assert torch.equal(out[:-9], expected[0]) and torch.equal(lse[:-9], expected[1])
    assert out[-9:].eq(0).all() and lse[-9:].eq(-torch.inf).all()
    _, lse = bucket(made, more, k, v, case.layout.num_tokens + 9, made.num_partials + 4, sinks=sinks)
    assert torch.equal(lse[-9:], sinks.expand(9, 4))


def test_tokens_nobody_writes_are_cleared():
    empty = TreeLayout([], [], [], [], [], [], [0], [0], [], [], [], [], [], [])
    made = plan_attention(empty, num_qo_heads=2, num_kv_heads=1, head_dim=4)
    pool = torch.full((5, 1, 4), torch.nan)
    assert ops.tree_attention(torch.ones(0, 2, 4), KVPool(pool, pool), made).shape == (0, 2, 4)
    case = random_layout(0, "random")
    case.layout = replace(case.layout, row_token=case.layout.row_token + 3)
    assert make(case, *tensors(case)[:2]).empty_tokens.size >= 3
    compare(case, *tensors(case))
    compare(case, *tensors(case), sinks=torch.tensor([0.5, 0.0, -1.0, 2.0]))


def test_same_bits_in_any_order_of_programs():
    case = random_layout(7, "joins", num_contexts=4)
    q, k, v = tensors(case)
    results = [attend(case, q, k, v, cost_model=SCATTERED) for _ in range(2)]
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])


@pytest.mark.parametrize(("kind", "cost_model"), [("random", CPU), ("chunks", CPU), ("drafts", SCATTERED)])
def test_damage_stays_with_the_rows_that_see_it(kind, cost_model):
    """The second time tiles are smaller, and sums are added in another order."""
    options = {"window": 6} if cost_model is SCATTERED else {}
    case = random_layout(1, kind, num_contexts=3)
    q, k, v = tensors(case, 4, 2, 16)
    same = partial(torch.allclose, rtol=2e-6, atol=2e-6)
    attended = partial(attend, case, q, cost_model=cost_model, **options)
    check_damage(case, k, v, 4, attended, options.get("window"), 0, same)


@pytest.mark.parametrize("stride", DENSE)
def test_pools_of_any_strides(stride):
    case = random_layout(4, num_contexts=4)
    q, k, v = tensors(case, value_dim=12)
    expected, _ = attend(case, q, k, v)
    assert torch.equal(attend(case, q, DENSE[stride](k), DENSE[stride](v))[0], expected)
    pools = [DENSE[stride](torch.full_like(x, 9.0)) for x in (k, v)]
    slots = torch.tensor([3, -1, 0, 7])
    ops.append_kv(k[:4], v[:4], slots, KVPool(*pools))
    for pool, x in zip(pools, (k, v), strict=True):
        assert torch.equal(pool[[3, 0, 7]], x[[0, 2, 3]]) or x[[0, 2, 3]].isnan().any()


def test_queries_of_any_strides():
    case = random_layout(4)
    q, k, v = tensors(case)
    expected, _ = attend(case, q, k, v)
    assert torch.equal(attend(case, q.transpose(0, 1).contiguous().transpose(0, 1), k, v)[0], expected)
    assert torch.equal(attend(case, torch.stack([q, q], 3)[..., 0], k, v)[0], expected)


@pytest.mark.parametrize("heads", [1, 4])
def test_offsets_beyond_31_bits(heads):
    """Pools of more than 2**31 elements, heads first, of which a few are ever touched."""
    slots, dim = (2**25 + 100) // heads * (1 if heads == 1 else 2), 64
    k, v = (torch.empty(heads, slots, dim, dtype=torch.bfloat16).transpose(0, 1) for _ in "kv")
    layout = replace(shared_prompt(1, 2, 3, 2), slot_index=np.array([slots - 1 - i for i in range(7)]))
    q = torch.randn(2, heads, dim).bfloat16()
    new = torch.randn(2, 7, heads, dim).bfloat16()
    ops.append_kv(new[0], new[1], torch.from_numpy(layout.slot_index), KVPool(k, v))
    made = plan_attention(layout, num_qo_heads=heads, num_kv_heads=heads, head_dim=dim)
    out = ops.tree_attention(q, KVPool(k, v), made)
    low = plan_attention(replace(layout, slot_index=np.arange(7)), num_qo_heads=heads, num_kv_heads=heads, head_dim=dim)
    assert torch.equal(out, ops.tree_attention(q, KVPool(new[0], new[1]), low))


def test_heads_too_large_are_refused():
    case = random_layout(0)
    with pytest.raises(ValueError, match="head dims of at most 256, got 8 and 300"):
        attend(case, *tensors(case, value_dim=300))


# ---------------------------------------------------------------------- the other operations

VIEWS = {
    "packed": lambda x: x,
    "rows apart": lambda x: torch.stack([x, x], 1)[:, 1],
    "heads first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "elements apart": lambda x: torch.stack([x, x], 3)[..., 1],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
def test_append_kv(integer, dtype, view):
    k, v = torch.randn(9, 4, 24).to(dtype), torch.randn(9, 4, 300).to(dtype)
    slots = torch.tensor([4, 0, -1, 11, 7, -5, 2, 1, 9], dtype=integer)
    expected = [torch.full((12, *x.shape[1:]), 9.0, dtype=dtype) for x in (k, v)]
    pools = [pool.clone() for pool in expected]
    by_reference("append_kv", k, v, slots, KVPool(*expected))
    ops.append_kv(VIEWS[view](k), VIEWS[view](v), torch.stack([slots, slots], 1)[:, 0], KVPool(*pools))
    assert torch.equal(pools[0], expected[0]) and torch.equal(pools[1], expected[1])


def test_slots_beyond_the_pool_are_refused():
    k, pool = torch.randn(2, 1, 4), torch.zeros(3, 1, 4)
    with pytest.raises(ValueError, match="slots must be below the pool's 3, got 3"):
        ops.append_kv(k, k, torch.tensor([0, 3]), KVPool(pool, pool.clone()))
    assert pool.eq(0).all()


def test_append_kv_copies_bits_not_numbers():
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(32, 8, 256)
    for dtype in (torch.bfloat16, torch.float16):
        k, pool = bits.view(dtype), torch.zeros(32, 8, 256, dtype=dtype)
        ops.append_kv(k, k, torch.arange(32), KVPool(pool, pool.clone()))
        assert torch.equal(pool.view(torch.int16), bits)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotate_rows(dtype, view, interleaved):
    q, inv_freq = torch.randn(7, 9, 40).to(dtype), 10000.0 ** (-torch.arange(0, 24, 2) / 24)
    shift = torch.tensor([0, 1, -1, 2**20, -(2**20), 7, 131072])
    arguments = (shift, inv_freq), dict(interleaved=interleaved, rotary_dim=24)
    got = ops.rotate_rows(VIEWS[view](q), *arguments[0], **arguments[1])
    torch.testing.assert_close(got, by_reference("rotate_rows", q, *arguments[0], *arguments[1].values()))
    assert torch.equal(got[0], q[0]) and torch.equal(got[..., 24:], q[..., 24:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_states(dtype):
    o, lse = torch.randn(50, 5, 150).to(dtype), torch.randn(5, 50).mul(20).t()
    lse[::7], o[::7] = -torch.inf, torch.nan
    count = torch.tensor([0, 1, 2, 9, 0, 4, 5, 3])
    index = torch.randint(0, 50, (int(count.sum()), 2))[:, 0]
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), count.cumsum(0)])
    got = ops.merge_states(o, lse, indptr, index)
    torch.testing.assert_close(got, by_reference("merge_states", o, lse, indptr, index))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["o", "lse"])
def test_merge_states_keeps_what_is_not_finite_in_its_outputs(where, bad):
    o, lse = torch.randn(3, 3, 4), torch.randn(3, 3)
    (o if where == "o" else lse)[1, 2] = bad
    lists = [[0, 2], [0, 1], [1], [2, 0]]
    index = torch.tensor([i for entries in lists for i in entries])
    out, total = ops.merge_states(o, lse, torch.tensor([0, 2, 4, 5, 7]), index)
    for t in range(4):
        for h in range(3):
            assert out[t, h].isfinite().all() == (not (h == 2 and t in (1, 2)))
            assert total[t, h].isfinite() == (not (h == 2 and t in (1, 2) and where == "lse"))
