"""`forktree.ops.append_kv` by `csrc/cuda/append_kv.cu`."""

import torch
from torch import Tensor

from forktree import _core
from forktree.ops import params
from forktree.ops.checks import check_slots
from forktree.ops.cuda import stream_of
from forktree.ops.pool import KVPool


def launch(k: Tensor, v: Tensor, slots: Tensor, pool: KVPool) -> None:
    check_slots(slots, pool)
    with torch.cuda.device_of(k):
        params.append_kv(_core.cuda_append_kv, stream_of(k), k, v, slots, pool)
