"""Random arguments, most of them with something wrong: a call gives what the reference gives, or raises and changes
nothing. Both the public functions and the registered operations, which have no one else to check for them.
"""

from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backends import by_reference, specified
from forktree import _core, ops
from forktree.ops import AttentionOptions, KVPool
from forktree.plan.cost_model import CPU
from forktree.plan.plan import plan_attention
from layouts import KINDS, random_layout

fuzz = settings(max_examples=250, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

REFUSED = (ValueError, RuntimeError, TypeError)
NARROW = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
INTEGER = st.sampled_from([torch.int32, torch.int64])
SIZE = st.sampled_from([0, 1, 2, 3, 5, 8])
ROWS = st.sampled_from([0, 1, 2, 5, 300])
STRANGE = [-(2**63), -(2**31), -1, 2**31 - 1, 2**31, 2**63 - 1]


def values(*shape, dtype):
    """Numbers that depend on the shape alone."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


# Same numbers, other strides.
LAYOUTS = [
    lambda x: x,
    lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    lambda x: torch.stack([x, x], -1)[..., 1],
    lambda x: torch.stack([x, x])[1],
    lambda x: torch.cat([x.flatten()[:1], x.flatten()])[x.numel() > 0 :].view(x.shape),
]

# Something else, which may be wrong.
CHANGES = [
    lambda x: x.double(),
    lambda x: x.half(),
    lambda x: x.int(),
    lambda x: x.bool(),
    lambda x: x.to(torch.complex64),
    lambda x: x.to("meta"),
    lambda x: x.to_sparse(),
    lambda x: x[None],
    lambda x: x[..., 0] if x.shape[-1:].numel() and x.numel() else x.flatten(),
    lambda x: x[:-1],
    lambda x: x[..., :-1],
    lambda x: torch.cat([x, x]),
    lambda x: x[:0],
    lambda x: x[:1].expand(3, *x.shape[1:]) if len(x) else x,
    lambda x: x[:1].expand(2**40, *x.shape[1:]) if 0 < x.numel() < 2**20 else x,
]


def tampered(data, arguments, pools=()):
    """The arguments by name, each in a random layout, and none, one or two of them changed."""
    for name, x in arguments.items():
        if isinstance(x, torch.Tensor) and name not in pools:
            arguments[name] = data.draw(st.sampled_from(LAYOUTS))(x)
    tensors = sorted(name for name, x in arguments.items() if isinstance(x, torch.Tensor))
    for name in data.draw(st.lists(st.sampled_from(tensors), max_size=2, unique=True)):
        x = arguments[name]
        if x.layout == torch.strided and x.ndim:
            arguments[name] = data.draw(st.sampled_from(CHANGES))(x)
    return arguments


def integers(data, size, below, dtype):
    """Numbers in [0, below) as far as there are any, with a strange one now and then."""
    x = torch.tensor(data.draw(st.lists(st.integers(0, max(below - 1, 0)), min_size=size, max_size=size)), dtype=dtype)
    if size and data.draw(st.integers(0, 3)) == 0:
        strange = [n for n in [*STRANGE, below] if torch.iinfo(dtype).min <= n <= torch.iinfo(dtype).max]
        x[data.draw(st.integers(0, size - 1))] = data.draw(st.sampled_from(strange))
    return x


def on_meta(arguments):
    return any(isinstance(x, torch.Tensor) and x.is_meta for x in arguments.values())


def check(call, operation, arguments):
    """One call that returns something."""
    try:
        got = call(**arguments)
    except REFUSED:
        return False
    if not on_meta(arguments):
        torch.testing.assert_close(got, by_reference(operation, *arguments.values()), equal_nan=True)
    return True


def append_kv(k, v, slots, k_slots, v_slots):
    ops.append_kv(k, v, slots, KVPool(k_slots, v_slots))


@pytest.mark.parametrize("call", [append_kv, torch.ops.forktree.append_kv.default])
@fuzz
@given(st.data())
def test_append_kv(call, data):
    tokens, heads, k_dim, v_dim, num_slots = (data.draw(x) for x in (ROWS, SIZE, SIZE, SIZE, ROWS))
    dtype, integer = data.draw(NARROW), data.draw(INTEGER)
    slots = integers(data, tokens, num_slots, integer)
    first = torch.tensor([s not in seen and not seen.add(s) for seen in [set()] for s in slots.tolist()])
    slots = slots.where(first, -1) if tokens else slots  # of two with the same slot, either may win
    arguments = {
        "k": values(tokens, heads, k_dim, dtype=dtype),
        "v": values(tokens, heads, v_dim, dtype=dtype),
        "slots": slots,
        "k_slots": torch.full((num_slots, heads, k_dim), 9.0, dtype=dtype),
        "v_slots": torch.full((num_slots, heads, v_dim), 9.0, dtype=dtype),
    }
    arguments = tampered(data, arguments, pools=("k_slots", "v_slots"))
    before = {name: x.clone() for name, x in arguments.items() if name.endswith("_slots") and x.numel() < 2**20}
    try:
        call(**arguments)
    except REFUSED:
        pass
    else:
        if not on_meta(arguments):
            pool = KVPool(before["k_slots"], before["v_slots"])
            by_reference("append_kv", arguments["k"], arguments["v"], arguments["slots"], pool)
    for name, x in before.items():
        if x.layout == torch.strided and not x.is_meta:
            assert torch.equal(arguments[name], x)


@pytest.mark.parametrize("call", [ops.rotate_rows, torch.ops.forktree.rotate_rows.default])
@fuzz
@given(st.data())
def test_rotate_rows(call, data):
    rows, heads, pairs = (data.draw(x) for x in (ROWS, SIZE, SIZE))
    dim = 2 * pairs + data.draw(SIZE)
    arguments = {
        "q": values(rows, heads, dim, dtype=data.draw(NARROW)),
        "shift": integers(data, rows, 1000, data.draw(INTEGER)),
        "inv_freq": values(pairs, dtype=data.draw(st.sampled_from([torch.float32, torch.float64]))),
        "interleaved": data.draw(st.booleans()),
        "rotary_dim": data.draw(st.sampled_from([*[2 * pairs] * 12, 3, *STRANGE])),
    }
    check(call, "rotate_rows", tampered(data, arguments))


@pytest.mark.parametrize("call", [ops.merge_states, torch.ops.forktree.merge_states.default])
@fuzz
@given(st.data())
def test_merge_states(call, data):
    states, heads, dim, entries, outputs = (data.draw(x) for x in (SIZE, SIZE, SIZE, ROWS, SIZE))
    entries *= states > 0
    lse = values(states, heads, dtype=torch.float32) * 50
    lse[:1] = data.draw(st.sampled_from([0.0, -torch.inf]))
    cuts = integers(data, outputs, entries + 1, data.draw(INTEGER))
    indptr = torch.cat([cuts.new_zeros(1), cuts.sort()[0], cuts.new_full((1,), entries)])
    arguments = {
        "o": values(states, heads, dim, dtype=data.draw(NARROW)),
        "lse": lse,
        "indptr": indptr,
        "index": integers(data, entries, states, data.draw(INTEGER)),
    }
    check(call, "merge_states", tampered(data, arguments))


def options(arguments):
    return AttentionOptions(sinks=arguments["sinks"], alibi_slopes=arguments["alibi_slopes"])


def attend(made, q, k_slots, v_slots, **per_head):
    return ops.tree_attention(q, KVPool(k_slots, v_slots), made, AttentionOptions(**per_head))


@fuzz
@given(st.data())
def test_tree_attention(data):
    """The public function: tensors that may not fit the plan, slots outside the pool."""
    arguments, case = attention_arguments(data)
    made = arguments.pop("made")
    if data.draw(st.integers(0, 3)) == 0:
        slots = case.layout.slot_index.copy()
        slots[data.draw(st.integers(0, slots.size - 1))] = data.draw(st.sampled_from([-1, 2**31 - 1, -(2**31)]))
        made = plan_attention(replace(case.layout, slot_index=slots), **heads_of(made))
    arguments = tampered(data, arguments)
    try:
        got = attend(made, **arguments)
    except REFUSED:
        return
    if not on_meta(arguments):
        expected, _ = specified(*(arguments[name] for name in ("q", "k_slots", "v_slots")), made, options(arguments))
        torch.testing.assert_close(got, expected, equal_nan=True)


@pytest.mark.skipif(_core.build["cuda"] != "emulated", reason="needs a core built with FORKTREE_CUDA=emulate")
@settings(fuzz, max_examples=100)
@given(st.data())
def test_tree_attention_cuda(monkeypatch, data):
    """The same where head dims are mostly those there is a kernel for."""
    monkeypatch.setenv("FORKTREE_BACKEND", "cuda")
    dims = data.draw(st.sampled_from([(64,), (96,), (256,), (64, 80)]))
    arguments, _ = attention_arguments(data, dims, dims)
    made = arguments.pop("made")
    arguments = tampered(data, arguments)
    try:
        got = attend(made, **arguments)
    except REFUSED:
        return
    if not on_meta(arguments):
        expected, _ = specified(*(arguments[name] for name in ("q", "k_slots", "v_slots")), made, options(arguments))
        torch.testing.assert_close(got, expected, equal_nan=True, rtol=2e-2, atol=2e-2)


@settings(fuzz, max_examples=1500)
@given(st.data())
def test_a_plan_that_was_tampered_with(data):
    """The registered operation reads any plan buffer: what it cannot trust is refused, nothing else is touched."""
    arguments, case = attention_arguments(data)
    made = arguments.pop("made")
    buffer, slots = (x.clone() for x in made.on(torch.device("cpu")))
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, 15) | st.integers(0, buffer.numel() - 1))
        buffer[at] = data.draw(st.integers(-3, 40) | st.sampled_from([2**31 - 1, -(2**31), 2**30, int(buffer[at]) ^ 1]))
    buffer = buffer[: data.draw(st.sampled_from([None] * 9 + [0, 5, 16, -1]))]
    slots = slots[: data.draw(st.sampled_from([None] * 9 + [0, 1, -1]))]
    arguments = tampered(data, {**arguments, "plan": buffer, "slot_index": slots})
    tokens = data.draw(st.sampled_from([case.layout.num_tokens] * 9 + [0, 99, -1, 2**40]))
    partials = data.draw(st.sampled_from([made.num_partials] * 9 + [0, 99, -1]))
    before = {name: x.clone() for name, x in arguments.items() if name.endswith("_slots") and x.numel() < 2**20}
    with suppress(REFUSED):
        sizes = {"num_tokens": tokens, "max_partials": partials}
        torch.ops.forktree.tree_attention.default(**sizes, scale=0.3, softcap=None, **arguments)
    for name, x in before.items():
        if x.layout == torch.strided and not x.is_meta:
            assert torch.equal(arguments[name].nan_to_num(), x.nan_to_num())


def attention_arguments(data, dims=(1, 2, 3, 8), value_dims=(0, 1, 2, 3, 8)):
    """Arguments of tree_attention, with `made`, a plan that cuts finely."""
    kv_heads, group = (data.draw(st.sampled_from([1, 2, 3, 8])) for _ in range(2))
    dim, value_dim = data.draw(st.sampled_from(dims)), data.draw(st.sampled_from(value_dims))
    case = random_layout(data.draw(st.integers(0, 10**4)), data.draw(st.sampled_from(KINDS)), room=1)
    dtype, heads = data.draw(NARROW), kv_heads * group
    sinks = data.draw(st.none() | st.just(torch.linspace(-1, 1, heads)))
    made = plan_attention(
        case.layout,
        num_qo_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        window=data.draw(st.none() | st.integers(1, 9)),
        cost_model=replace(CPU, grain=1, units=data.draw(st.sampled_from([1, 1000]))),
    )
    arguments = {
        "q": values(case.layout.num_rows, heads, dim, dtype=dtype),
        "k_slots": values(case.num_slots, kv_heads, dim, dtype=dtype),
        "v_slots": values(case.num_slots, kv_heads, value_dim, dtype=dtype),
        "sinks": sinks,
        "alibi_slopes": sinks,
    }
    return {**arguments, "made": made}, case


def heads_of(made):
    return {name: getattr(made, name) for name in ("num_qo_heads", "num_kv_heads", "head_dim", "window")}
