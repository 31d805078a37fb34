"""`forktree.ops.append_kv` by `csrc/cpu/append_kv.cpp`, which refuses slots beyond the pool."""

import torch
from torch import Tensor

from forktree import _core
from forktree.ops import params
from forktree.ops.pool import KVPool


def launch(k: Tensor, v: Tensor, slots: Tensor, pool: KVPool) -> None:
    params.append_kv(_core.append_kv, torch.get_num_threads(), k, v, slots, pool)
