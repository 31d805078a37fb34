"""`ops.rotate_rows` by every backend that is there, against rotation of complex numbers in fp64."""

import pytest
import torch

from backends import (
    DENSE,
    EXACT,
    FLOATS,
    NARROW,
    ON_GPU,
    ONE_ISA,
    REFERENCE,
    TORCH,
    by_reference,
    each,
    each_of,
    on,
    sentinels,
)
from forktree import ops

# on outputs of size 1 on a GPU
TOLERANCE = {torch.float32: 5e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def rotary(x, position, inv_freq, interleaved):
    """Rotary embedding as complex numbers, in fp64."""
    half = inv_freq.numel()
    x = x.double()
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    pairs = turned.unflatten(-1, (half, 2)) if interleaved else turned.unflatten(-1, (2, half)).transpose(-1, -2)
    phase = torch.polar(torch.ones(half, dtype=torch.float64), position * inv_freq.double())
    pairs = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * phase)
    turned = pairs if interleaved else pairs.transpose(-1, -2)
    return torch.cat([turned.flatten(-2), rest], -1)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [16, 6])
@each(*ONE_ISA)
def test_moves_rows_to_other_positions(backend, rotary_dim, interleaved):
    inv_freq = 10000.0 ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    x = torch.randn(4, 3, 16)
    start, shift = [0, 7, 100, 131072], [0, 5, -60, 100000]
    q = torch.stack([rotary(x[i], start[i], inv_freq, interleaved) for i in range(4)]).float()
    before = q.clone()
    got = ops.rotate_rows(q, torch.tensor(shift), inv_freq, interleaved=interleaved, rotary_dim=rotary_dim)
    expected = torch.stack([rotary(x[i], start[i] + shift[i], inv_freq, interleaved) for i in range(4)])
    torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(q, before) and torch.equal(got[0], q[0])


@each_of(("dtype",), ((b, d) for b in ONE_ISA for d in (*NARROW, *[torch.float64] * (b in (REFERENCE, TORCH)))))
def test_keeps_the_dtype(backend, dtype):
    inv_freq = torch.tensor([1.0, 0.1])
    q = torch.randn(2, 1, 4).to(dtype)
    got = ops.rotate_rows(q, torch.tensor([3, 4], dtype=torch.int32), inv_freq)
    expected = torch.stack([rotary(q[i], 3 + i, inv_freq, False) for i in range(2)])
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected.to(dtype))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("interleaved", [False, True])
# 300: several threads
@each_of(("rows",), ((b, n) for b in ONE_ISA for n in (3, 300)[: 1 if b.interpreted else 2]))
def test_any_strides_any_number_of_threads(backend, rows, interleaved, dtype, threads):
    packed = torch.randn(rows, 9, 40).to(dtype)
    inv_freq = 10000.0 ** (-torch.arange(0, 32, 2) / 32)
    shift = torch.randint(-(2**20), 2**20, (rows, 2))
    spread = torch.stack([packed, packed], 3)[..., 0]
    views = [stride(packed) for stride in DENSE.values()]
    for q in (packed, packed[:, 1:7], packed[:, ::3], spread, *views):
        expected = by_reference("rotate_rows", q, shift[:, 0], inv_freq, interleaved, 32)
        results = []
        for n in threads[: 1 if backend.interpreted else 3]:
            torch.set_num_threads(n)
            results.append(ops.rotate_rows(q, shift[:, 0], inv_freq, interleaved=interleaved, rotary_dim=32))
            assert torch.equal(results[-1], results[0])
        torch.testing.assert_close(results[0], expected)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dims", [(64, 64), (128, 32), (80, 6)], ids=str)
@each_of(("dtype",), ((b, dtype) for b in (*EXACT, *ON_GPU) for dtype in FLOATS))
def test_far_shifts(backend, dtype, dims, interleaved):
    dim, rotary_dim = dims
    q = torch.randn(9, 5, dim).to(dtype)
    shift = torch.tensor([0, 1, -1, 5, -60, 4096, 131072, -131072, 10**6])
    inv_freq = 10000.0 ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    how = dict(interleaved=interleaved, rotary_dim=rotary_dim)
    with sentinels(backend.device):
        got = ops.rotate_rows(*on(backend.device, q, shift, inv_freq), **how).cpu()
    expected = by_reference("rotate_rows", q.double(), shift, inv_freq, *how.values())
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=TOLERANCE[dtype])
    assert torch.equal(got[0], q[0]) and torch.equal(got[..., rotary_dim:], q[..., rotary_dim:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 4)}, r"q must be a floating-point \[R, H, D\], got torch.float32 \(2, 4\)"),
        ({"shift": torch.zeros(2)}, r"shift must be int32 or int64 \[2\] on cpu, got torch.float32 \[2\]"),
        (
            {"inv_freq": torch.zeros(1)},
            r"inv_freq must be floating-point \[2\] on cpu, got torch.float32 \[1\]",
        ),
        ({"rotary_dim": 3}, r"rotary_dim must be even and in \[2, 4\] \(D\), got 3"),
        ({"rotary_dim": 6}, r"rotary_dim must be even and in \[2, 4\] \(D\), got 6"),
    ],
)
@each(*EXACT)  # Triton, as on a GPU, looks at no values
def test_bad_input_is_refused_by_name(backend, change, message):
    arguments = {"q": torch.zeros(2, 1, 4), "shift": torch.tensor([0, 1]), "inv_freq": torch.zeros(2)}
    with pytest.raises(ValueError, match=message):
        ops.rotate_rows(**{**arguments, **change})
