"""`ops.merge_states` by every backend that is there, against one softmax over everything."""

import pytest
import torch

from backends import (
    EMULATED,
    EXACT,
    FLOATS,
    NARROW,
    ON_GPU,
    ONE_ISA,
    REFERENCE,
    TORCH,
    Backend,
    by_reference,
    each,
    each_of,
    off_alignment,
    on,
    sentinels,
    sparse,
)
from forktree import ops

# on outputs of size 1
TOLERANCE = {torch.float32: 5e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def state(scores, values):
    """Attention state of scores [L, H] over values [L, H, D]."""
    return (scores.softmax(0)[..., None] * values).sum(0), scores.logsumexp(0)


def states(lengths, heads=3, dim=4, dtype=torch.float32):
    """Scores and values of all tokens, and one state for each of `lengths` consecutive stretches."""
    scores, values = (
        torch.randn(sum(lengths), heads, dtype=dtype),
        torch.randn(sum(lengths), heads, dim, dtype=dtype),
    )
    parts = [state(*x) for x in zip(scores.split(lengths), values.split(lengths), strict=True)]
    return scores, values, torch.stack([o for o, _ in parts]), torch.stack([lse for _, lse in parts])


def merge(o, lse, lists):
    index = torch.tensor([i for entries in lists for i in entries], dtype=torch.int64)
    indptr = torch.tensor([0, *torch.tensor([len(x) for x in lists]).cumsum(0).tolist()], dtype=torch.int32)
    return ops.merge_states(o, lse, indptr, index)


@each(*ONE_ISA)
def test_equals_one_softmax_over_everything(backend):
    scores, values, o, lse = states([3, 1, 5, 2])
    out, total = merge(o, lse, [[0, 1, 2, 3], [2], [3, 0], [], [1, 2, 3]])
    first, second = scores.split([9, 2])[0], values.split([9, 2])[0]
    for t, (s, v) in enumerate([(scores, values), (first[4:], second[4:])]):
        torch.testing.assert_close((out[t], total[t]), state(s, v))
    torch.testing.assert_close((out[2], total[2]), state(scores[[9, 10, 0, 1, 2]], values[[9, 10, 0, 1, 2]]))
    assert out[3].eq(0).all() and total[3].eq(-torch.inf).all()
    torch.testing.assert_close((out[4], total[4]), state(scores[3:], values[3:]))


@each(*ONE_ISA)
def test_is_associative(backend):
    _, _, o, lse = states([2, 3, 4], dtype=torch.float64 if backend in (REFERENCE, TORCH) else torch.float32)
    whole = merge(o, lse, [[0, 1, 2]])
    for pair, rest in (([0, 1], 2), ([1, 2], 0)):
        half = merge(o, lse, [pair])
        again = merge(torch.cat([half[0], o[[rest]]]), torch.cat([half[1], lse[[rest]]]), [[0, 1]])
        torch.testing.assert_close(again, whole)


@each(*ONE_ISA)
def test_empty_states(backend):
    _, _, o, lse = states([2])
    o, lse = torch.cat([o, torch.full_like(o, torch.nan)]), torch.cat([lse, torch.full_like(lse, -torch.inf)])
    out, total = merge(o, lse, [[0, 1], [1, 0], [1], [1, 1], []])
    for t in (0, 1):
        assert torch.equal(out[t], o[0]) and torch.equal(total[t], lse[0])
    assert out[2:].eq(0).all() and total[2:].eq(-torch.inf).all()


@each(*ONE_ISA)
def test_large_scores_do_not_overflow(backend):
    o = torch.tensor([[[1.0]], [[3.0]]])
    out, total = merge(o, torch.tensor([[1e4], [1e4]]), [[0, 1]])
    assert out.item() == 2.0 and total.item() == pytest.approx(1e4 + 0.6931, abs=1e-2)


@each_of(("dtype",), ((b, dtype) for b in ONE_ISA for dtype in NARROW))
def test_narrow_outputs(backend, dtype):
    _, _, o, lse = states([2, 2])
    out, total = merge(o.to(dtype), lse, [[0, 1]])
    assert out.dtype == dtype and total.dtype == torch.float32
    torch.testing.assert_close(out, merge(o.to(dtype).float(), lse, [[0, 1]])[0].to(dtype))


@each_of(("dtype",), ((b, dtype) for b in EXACT for dtype in NARROW))
def test_every_narrow_number_survives(backend, dtype):
    o = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(64, 8, 128).view(dtype)
    out, _ = merge(o, torch.zeros(64, 8), [[i] for i in range(64)])
    assert torch.equal(out.isnan(), o.isnan())
    assert torch.equal(out[~o.isnan()], o[~o.isnan()])


@each_of(("dtype",), ((b, dtype) for b in EXACT for dtype in NARROW))
def test_narrow_outputs_are_rounded_to_nearest_even(backend, dtype):
    """Means of neighbours: every tie there is, between subnormal numbers too; sums must stay below fp32's largest."""
    bits = torch.arange(2**15 - 1, dtype=torch.int16)
    low, high = bits.view(dtype), (bits + 1).view(dtype)
    o = torch.stack([low, high])[:, None, high.float() < min(torch.finfo(dtype).max, 1e38)]
    out, _ = merge(o, torch.zeros(2, 1), [[0, 1]])
    assert torch.equal(out[0, 0], (o.double().mean(0)[0]).to(dtype))


@pytest.mark.parametrize("dtype", FLOATS)
# 400: several threads
@each_of(("outputs",), ((b, n) for b in ONE_ISA for n in (4, 400)[: 1 if b.interpreted else 2]))
def test_any_strides_any_number_of_threads(backend, outputs, dtype, threads):
    o, lse = torch.randn(50, 150, 3).to(dtype).transpose(1, 2), torch.randn(3, 50).mul(20).t()
    lse[::7], o[::7] = -torch.inf, torch.nan
    count = torch.randint(0, 9, (outputs,))
    index = torch.randint(0, 50, (int(count.sum()), 2))[:, 0]
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), count.cumsum(0)]).repeat_interleave(2)[::2]
    expected = by_reference("merge_states", o, lse, indptr, index)
    results = []
    for n in threads[: 1 if backend.interpreted else 3]:
        torch.set_num_threads(n)
        results.append(ops.merge_states(o, lse, indptr, index))
        assert torch.equal(results[-1][0], results[0][0]) and torch.equal(results[-1][1], results[0][1])
    torch.testing.assert_close(results[0], expected)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dim", [64, 40, 7])
@each(*ONE_ISA)
def test_states_at_any_address(backend, dim, dtype):
    o, lse = torch.randn(5, 3, dim).to(dtype), torch.randn(5, 3)
    lists = [[0, 1, 2], [3], [4, 0]]
    expected = merge(o, lse, lists)
    assert all(torch.equal(*x) for x in zip(merge(off_alignment(o), lse, lists), expected, strict=True))
    index, indptr = torch.tensor([0, 1, 2, 3, 4, 0]), torch.tensor([0, 3, 4, 6])
    torch.testing.assert_close(expected, by_reference("merge_states", o, lse, indptr, index))


@each(Backend("cpu"), *EMULATED)  # the others read all states
def test_states_beyond_2_31_elements(backend):
    states = 2**22 + 2
    o, lse = sparse(states, 4, 128, dtype=torch.bfloat16), sparse(states, 4, dtype=torch.float32)
    o[-1], o[1], lse[1] = 3, 1, -torch.inf
    out, _ = merge(o, lse, [[states - 1], [1, states - 1]])
    assert out.eq(3).all()


@pytest.mark.parametrize("dim", [64, 128, 5])
@each_of(("dtype",), ((b, dtype) for b in (*ONE_ISA, *ON_GPU) for dtype in FLOATS))
def test_long_lists(backend, dtype, dim):
    o, lse = torch.randn(40, 6, dim).to(dtype), torch.randn(40, 6) * 3
    lse[::7], o[::7] = -torch.inf, 0  # empty states
    counts = torch.tensor([0, 1, 2, 30, 1, 0, 7])
    indptr, index = torch.tensor([0, *counts.cumsum(0).tolist()]), torch.randint(40, (int(counts.sum()),))
    index[0] = 7
    with sentinels(backend.device):
        out, total = ops.merge_states(*on(backend.device, o, lse, indptr.int(), index))
    expected, expected_lse = by_reference("merge_states", o.double(), lse.double(), indptr, index)
    torch.testing.assert_close(out.cpu().double(), expected, rtol=0, atol=TOLERANCE[dtype])
    torch.testing.assert_close(total.cpu().double(), expected_lse, rtol=1e-5, atol=1e-5)
    assert out[0].eq(0).all() and total[0].eq(-torch.inf).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["o", "lse"])
@each(*ONE_ISA)
def test_what_is_not_finite_stays_with_its_outputs(backend, where, bad):
    _, _, o, lse = states([2, 3, 4])
    (o if where == "o" else lse)[1, 2] = bad
    out, total = merge(o, lse, [[0, 2], [0, 1], [1], [2, 0]])
    for t in range(4):
        for h in range(3):
            assert out[t, h].isfinite().all() == (not (h == 2 and t in (1, 2)))
            assert total[t, h].isfinite() == (not (h == 2 and t in (1, 2) and where == "lse"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"o": torch.zeros(2, 3)}, r"o must be a floating-point \[P, Hq, Dv\], got torch.float32 \(2, 3\)"),
        (
            {"lse": torch.zeros(2, 2)},
            r"lse must be torch.float32 \[2, 3\] on cpu, got torch.float32 \[2, 2\]",
        ),
        ({"lse": torch.zeros(2, 3).half()}, r"lse must be torch.float32 \[2, 3\] on cpu, got torch.float16"),
        ({"index": torch.zeros(2)}, r"index must be int32 or int64 \[2\] on cpu, got torch.float32"),
        ({"index": torch.tensor([0, 2])}, r"index must be in \[0, 2\), got 0 to 2"),
        (
            {"indptr": torch.tensor([0, 3])},
            r"indptr must rise from 0 to 2 \(entries in index\), got \[0, 3\]",
        ),
        ({"indptr": torch.tensor([], dtype=torch.int32)}, r"indptr must be int32 or int64 \[1\] on cpu"),
    ],
)
@each(*EXACT)  # Triton, as on a GPU, looks at no values
def test_bad_input_is_refused_by_name(backend, change, message):
    arguments = {
        "o": torch.zeros(2, 3, 4),
        "lse": torch.zeros(2, 3),
        "indptr": torch.tensor([0, 2]),
        "index": torch.tensor([0, 1]),
    }
    with pytest.raises(ValueError, match=message):
        ops.merge_states(**{**arguments, **change})
