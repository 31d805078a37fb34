"""`forktree.ops.merge_states` by `csrc/cpu/merge_states.cpp`, which refuses lists that are none."""

from torch import Tensor

from forktree import _core
from forktree.ops import params
from forktree.ops.cpu import run


def launch(o: Tensor, lse: Tensor, indptr: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    call, out, total = params.merge_states(o, lse, indptr, index)
    run(_core.merge_states, call)
    return out, total
