"""`forktree.ops.append_kv` by `csrc/cpu/append_kv.cpp`, which refuses slots beyond the pool."""

from torch import Tensor

from forktree import _core
from forktree.ops import params
from forktree.ops.cpu import run
from forktree.ops.pool import KVPool


def launch(k: Tensor, v: Tensor, slots: Tensor, pool: KVPool) -> None:
    run(_core.append_kv, params.append_kv(k, v, slots, pool))
