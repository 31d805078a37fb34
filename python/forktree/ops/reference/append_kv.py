"""Specification of `forktree.ops.append_kv`."""

from torch import Tensor


def append_kv(k: Tensor, v: Tensor, slots: Tensor, k_slots: Tensor, v_slots: Tensor) -> None:
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            k_slots[slot] = k[token]
            v_slots[slot] = v[token]
