"""Specification of `forktree.ops.rotate_rows`."""

from torch import Tensor

from forktree.ops.checks import math_dtype


def launch(q: Tensor, shift: Tensor, inv_freq: Tensor, interleaved: bool, rotary_dim: int) -> Tensor:
    angle = shift.double()[:, None, None] * inv_freq.double()  # [R, 1, rotary_dim / 2]
    cos, sin = angle.cos().to(math_dtype(q)), angle.sin().to(math_dtype(q))
    out = q.to(math_dtype(q), copy=True)
    turned = out[..., :rotary_dim]
    x, y = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    x_new, y_new = x * cos - y * sin, y * cos + x * sin
    x.copy_(x_new)
    y.copy_(y_new)
    return out.to(q.dtype)
