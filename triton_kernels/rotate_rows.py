"""`forktree.ops.rotate_rows`: one program a row, whose angles serve all its heads."""

import triton
import triton.language as tl
from torch import Tensor

from forktree.triton_kernels.device import device_of

HEADS = 8  # turned at once: 8 * 64 pairs are four for each of 128 threads
NUM_WARPS = 4


@triton.jit(do_not_specialize=["heads"])
def _rotate_rows(
    q,
    shift,
    inv_freq,
    out,
    row_stride,
    head_stride,
    last_stride,
    heads,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, BLOCK_P)
    angle = tl.load(shift + row).to(tl.float64) * tl.load(inv_freq + pair, mask=pair < PAIRS, other=0.0)
    cos, sin = tl.cos(angle).to(tl.float32)[None, :], tl.sin(angle).to(tl.float32)[None, :]
    x_at = pair * 2 if INTERLEAVED else pair
    y_at = x_at + (1 if INTERLEAVED else PAIRS)
    rest = tl.arange(0, BLOCK_D)
    for first in range(0, heads, HEADS):
        head = (first + tl.arange(0, HEADS)).to(tl.int64)
        real = head < heads
        start = q + row * row_stride + head[:, None] * head_stride
        to = out + (row * heads + head[:, None]) * D
        turned = real[:, None] & (pair[None, :] < PAIRS)
        x = tl.load(start + x_at[None, :] * last_stride, mask=turned, other=0.0).to(tl.float32)
        y = tl.load(start + y_at[None, :] * last_stride, mask=turned, other=0.0).to(tl.float32)
        tl.store(to + x_at[None, :], (x * cos - y * sin).to(out.dtype.element_ty), mask=turned)
        tl.store(to + y_at[None, :], (y * cos + x * sin).to(out.dtype.element_ty), mask=turned)
        if 2 * PAIRS < D:
            kept = real[:, None] & (rest[None, :] >= 2 * PAIRS) & (rest[None, :] < D)
            tl.store(to + rest[None, :], tl.load(start + rest[None, :] * last_stride, mask=kept), mask=kept)


def launch(q: Tensor, shift: Tensor, inv_freq: Tensor, interleaved: bool, rotary_dim: int) -> Tensor:
    rows, heads, dim = q.shape
    out = q.new_empty(rows, heads, dim)
    if not out.numel():
        return out
    with device_of(q):
        _rotate_rows[(rows,)](
            q,
            shift.contiguous(),
            inv_freq.double().contiguous(),
            out,
            *q.stride(),
            heads,
            dim,
            rotary_dim // 2,
            interleaved,
            HEADS,
            triton.next_power_of_2(rotary_dim // 2),
            triton.next_power_of_2(dim),
            num_warps=NUM_WARPS,
        )
    return out
