"""`forktree.ops.merge_states` by `csrc/cuda/merge_states.cu`."""

import torch
from torch import Tensor

from forktree import _core
from forktree.ops import params
from forktree.ops.checks import check_lists
from forktree.ops.cuda import stream_of


def launch(o: Tensor, lse: Tensor, indptr: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    if o.is_cpu:
        check_lists(indptr, index, o.shape[0])
    with torch.cuda.device_of(o):
        return params.merge_states(_core.cuda_merge_states, stream_of(o), o, lse, indptr, index)
