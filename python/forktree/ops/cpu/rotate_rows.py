"""`forktree.ops.rotate_rows` by `csrc/cpu/rotate_rows.cpp`."""

from torch import Tensor

from forktree import _core
from forktree.ops import params
from forktree.ops.cpu import run


def launch(q: Tensor, shift: Tensor, inv_freq: Tensor, interleaved: bool, rotary_dim: int) -> Tensor:
    call, out = params.rotate_rows(q, shift, inv_freq, interleaved, rotary_dim)
    run(_core.rotate_rows, call)
    return out
