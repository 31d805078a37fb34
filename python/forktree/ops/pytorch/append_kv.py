"""`forktree.ops.append_kv` by index_copy."""

from torch import Tensor


def append_kv(k: Tensor, v: Tensor, slots: Tensor, k_slots: Tensor, v_slots: Tensor) -> None:
    slots = slots.long()
    stored = slots >= 0
    if not stored.all():
        slots, k, v = slots[stored], k[stored], v[stored]
    k_slots.index_copy_(0, slots, k)
    v_slots.index_copy_(0, slots, v)
