"""`forktree.ops.merge_states` by `csrc/cuda/merge_states.cu`."""

from torch import Tensor

from forktree import _core
from forktree.ops import params
from forktree.ops.checks import check_lists
from forktree.ops.cuda import run


def launch(o: Tensor, lse: Tensor, indptr: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    if o.is_cpu:
        check_lists(indptr, index, o.shape[0])
    call, out, total = params.merge_states(o, lse, indptr, index)
    run(_core.cuda_merge_states, call, o)
    return out, total
