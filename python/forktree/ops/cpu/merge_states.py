"""`forktree.ops.merge_states` by `csrc/cpu/merge_states.cpp`, which refuses lists that are none."""

import torch
from torch import Tensor

from forktree import _core
from forktree.ops import params


def launch(o: Tensor, lse: Tensor, indptr: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    return params.merge_states(_core.merge_states, torch.get_num_threads(), o, lse, indptr, index)
