"""`forktree.ops.rotate_rows` by `csrc/cuda/rotate_rows.cu`."""

import torch
from torch import Tensor

from forktree import _core
from forktree.ops import params
from forktree.ops.cuda import stream_of


def launch(q: Tensor, shift: Tensor, inv_freq: Tensor, interleaved: bool, rotary_dim: int) -> Tensor:
    with torch.cuda.device_of(q):
        return params.rotate_rows(_core.cuda_rotate_rows, stream_of(q), q, shift, inv_freq, interleaved, rotary_dim)
