"""`forktree.ops.append_kv` by `csrc/cuda/append_kv.cu`."""

from torch import Tensor

from forktree import _core
from forktree.ops import params
from forktree.ops.checks import check_slots
from forktree.ops.cuda import run
from forktree.ops.pool import KVPool


def launch(k: Tensor, v: Tensor, slots: Tensor, pool: KVPool) -> None:
    check_slots(slots, pool)
    run(_core.cuda_append_kv, params.append_kv(k, v, slots, pool), k)
