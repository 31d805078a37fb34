"""`forktree.ops.append_kv` by index_copy."""

from torch import Tensor

from forktree.ops.checks import check_slots
from forktree.ops.pool import KVPool


def launch(k: Tensor, v: Tensor, slots: Tensor, pool: KVPool) -> None:
    check_slots(slots, pool)
    slots = slots.long()
    stored = slots >= 0
    if not stored.all():
        slots, k, v = slots[stored], k[stored], v[stored]
    pool.k.index_copy_(0, slots, k)
    pool.v.index_copy_(0, slots, v)
