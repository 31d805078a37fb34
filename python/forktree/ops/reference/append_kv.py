"""Specification of `forktree.ops.append_kv`."""

from torch import Tensor

from forktree.ops.checks import check_slots
from forktree.ops.pool import KVPool


def launch(k: Tensor, v: Tensor, slots: Tensor, pool: KVPool) -> None:
    check_slots(slots, pool)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            pool.k[slot] = k[token]
            pool.v[slot] = v[token]
