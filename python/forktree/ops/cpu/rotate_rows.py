"""`forktree.ops.rotate_rows` by `csrc/cpu/rotate_rows.cpp`."""

import torch
from torch import Tensor

from forktree import _core
from forktree.ops import params


def launch(q: Tensor, shift: Tensor, inv_freq: Tensor, interleaved: bool, rotary_dim: int) -> Tensor:
    return params.rotate_rows(_core.rotate_rows, torch.get_num_threads(), q, shift, inv_freq, interleaved, rotary_dim)
