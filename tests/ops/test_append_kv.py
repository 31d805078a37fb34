"""`ops.append_kv` by every backend that is there, to the bit."""

import pytest
import torch

from backends import DENSE, FLOATS, ON_GPU, ONE_ISA, each, each_of, on, sparse
from forktree import ops
from forktree.ops import KVPool


@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
@each_of(
    ("dtype", "dims"),
    (
        (b, dtype, dims)
        for b in (*ONE_ISA, *ON_GPU)
        for dtype in FLOATS
        for dims in [(24, 300), (3, 5), (64, 64), (128, 96)][: 1 if b.interpreted else 4]
    ),
)
def test_writes_the_named_slots_only(backend, dtype, dims, integer):
    """Of K and V that are views of one projection."""
    many = torch.randperm(60)[:37]
    many[::5] = -1
    for slots in ([4, 0, 6], [4, -1, 6], [-1, -5, -1], [], many.tolist()):
        room = 60 if len(slots) > 6 else 7
        (packed,) = on(backend.device, torch.randn(len(slots), 2, 3, max(dims)).to(dtype))
        k, v = packed[:, 0, :, : dims[0]], packed[:, 1, :, : dims[1]]
        pools = on(backend.device, *(torch.full((room, 3, dim), 9.0, dtype=dtype) for dim in dims))
        ops.append_kv(k, v, torch.tensor(slots, dtype=integer, device=backend.device), KVPool(*pools))
        for pool, x in zip(pools, (k, v), strict=True):
            for slot in range(room):
                if slot in slots:
                    assert torch.equal(pool[slot], x[slots.index(slot)])
                else:
                    assert pool[slot].eq(9).all()


@each(*ONE_ISA)
def test_takes_views(backend):
    packed = torch.randn(4, 3, 2, 3)  # q, k, v of one projection
    k_slots, v_slots = torch.zeros(4, 2, 3), torch.zeros(4, 2, 3)
    ops.append_kv(packed[:, 1], packed[:, 2], torch.tensor([3, 2, 1, 0]), KVPool(k_slots, v_slots))
    assert torch.equal(k_slots.flip(0), packed[:, 1]) and torch.equal(v_slots.flip(0), packed[:, 2])


def expand(x):
    return x[:, :1].expand_as(x)


STRIDES = {**DENSE, "elements apart": lambda x: torch.stack([x, x], 3)[..., 1], "one head for all": expand}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("stride", STRIDES)
# 500: several threads
@each_of(("tokens",), ((b, n) for b in ONE_ISA for n in (5, 500)[: 1 if b.interpreted else 2]))
def test_any_strides_any_number_of_threads(backend, tokens, stride, dtype, threads):
    k, v = torch.randn(tokens, 4, 24).to(dtype), torch.randn(tokens, 4, 40).to(dtype)
    slots = torch.randperm(tokens + 7)[:tokens] - 3
    slots = torch.stack([slots, slots], 1)[:, 0]
    expected = [torch.full((tokens + 7, *x.shape[1:]), 9.0, dtype=dtype) for x in (k, v)]
    for pool, x in zip(expected, (k, v), strict=True):
        pool[slots[slots >= 0]] = (expand(x) if stride == "one head for all" else x)[slots >= 0]
    for n in threads[: 1 if backend.interpreted else 3]:
        torch.set_num_threads(n)
        pools = [torch.full_like(pool, 9.0) for pool in expected]
        ops.append_kv(STRIDES[stride](k), STRIDES[stride](v), slots, KVPool(*pools))
        assert torch.equal(pools[0], expected[0]) and torch.equal(pools[1], expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stride", DENSE)
@each(*ONE_ISA)
def test_pools_of_any_strides(backend, stride, dtype):
    k, v = torch.randn(5, 4, 24).to(dtype), torch.randn(5, 4, 40).to(dtype)
    slots = torch.tensor([6, 0, -1, 8, 3])
    expected = [torch.full((9, 4, x.shape[2]), 9.0, dtype=dtype) for x in (k, v)]
    for rows in (DENSE["heads first"], lambda x: x):
        pools = [DENSE[stride](pool) for pool in expected]
        ops.append_kv(rows(k), rows(v), slots, KVPool(*pools))
        for pool, x in zip(pools, (k, v), strict=True):
            assert torch.equal(pool[slots[slots >= 0]], x[slots >= 0])
            assert pool._base.ne(9).sum() == x[slots >= 0].ne(9).sum() + (stride == "off alignment")  # nothing else


@each(*ONE_ISA)
def test_bits_are_copied_not_numbers(backend):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(64, 4, 256)
    for dtype in (torch.bfloat16, torch.float16):
        k, pool = bits.view(dtype), torch.zeros(64, 4, 256, dtype=dtype)
        ops.append_kv(k, k, torch.arange(64), KVPool(pool, pool.clone()))
        assert torch.equal(pool.view(torch.int16), bits)


@each(*ONE_ISA)
def test_a_slot_named_twice_holds_one_of_both(backend):
    many = 20 if backend.interpreted else 1000
    k, pool = torch.arange(float(many))[:, None, None].expand(many, 2, 64), torch.zeros(2, 2, 64)
    ops.append_kv(k, k, torch.arange(many) % 2, KVPool(pool, pool.clone()))


@each(*ONE_ISA)
def test_pools_beyond_2_31_elements(backend):
    slots = 2**23 + 3
    k_slots, v_slots = (
        sparse(slots, 2, 128, dtype=torch.bfloat16),
        sparse(slots, 2, 8, dtype=torch.bfloat16),
    )
    k, v = torch.randn(3, 2, 128).bfloat16(), torch.randn(3, 2, 8).bfloat16()
    ops.append_kv(k, v, torch.tensor([slots - 1, 0, 2**23]), KVPool(k_slots, v_slots))
    for token, slot in enumerate([slots - 1, 0, 2**23]):
        assert torch.equal(k_slots[slot], k[token]) and torch.equal(v_slots[slot], v[token])
    assert k_slots[slots - 2].eq(0).all() and k_slots[1].eq(0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda a: a.update(k=a["k"][:1]),
            r"k must be torch.float32 \[2, 2, 3\] on cpu, got torch.float32 \[1, 2, 3\]",
        ),
        (
            lambda a: a.update(k=a["k"].half()),
            r"k must be torch.float32 \[2, 2, 3\] on cpu, got torch.float16",
        ),
        (
            lambda a: a.update(slots=torch.tensor([0.0, 1.0])),
            r"slots must be int32 or int64 \[2\] on cpu, got",
        ),
        (
            lambda a: a.update(slots=torch.tensor([0])),
            r"k must be torch.float32 \[1, 2, 3\] on cpu, got torch.float32 \[2, 2, 3\]",
        ),
        (lambda a: a.update(slots=torch.tensor([0, 7])), "slots must be below the pool's 7, got 7"),
        (
            lambda a: a.update(v_slots=torch.zeros(8, 2, 3)),
            r"k and v of a pool must be .* got \[7, 2, 3\] and \[8, 2",
        ),
        (
            lambda a: a.update(k_slots=torch.zeros(7, 3, 2).transpose(1, 2)),
            r"k and v of a pool must be dense in their last dimension, got strides \(6, 1, 2\) and",
        ),
        (
            lambda a: a.update(k_slots=torch.zeros(1, 2, 3).expand(7, 2, 3)),
            r"k of the pool must not overlap itself, got \[7, 2, 3\] with strides \(0, 3, 1\)",
        ),
        (
            lambda a: a.update(v_slots=torch.zeros(99).as_strided((7, 2, 3), (2, 6, 1))),
            r"v of the pool must not overlap itself, got \[7, 2, 3\] with strides \(2, 6, 1\)",
        ),
    ],
)
@each(*ONE_ISA)
def test_bad_input_is_refused_before_anything_is_written(backend, change, message):
    arguments = {
        "k": torch.ones(2, 2, 3),
        "v": torch.ones(2, 2, 3),
        "slots": torch.tensor([0, 1]),
        "k_slots": torch.zeros(7, 2, 3),
        "v_slots": torch.zeros(7, 2, 3),
    }
    change(arguments)
    with pytest.raises(ValueError, match=message):
        pool = KVPool(arguments["k_slots"], arguments["v_slots"])
        ops.append_kv(arguments["k"], arguments["v"], arguments["slots"], pool)
    assert arguments["k_slots"].eq(0).all() and arguments["v_slots"].eq(0).all()
