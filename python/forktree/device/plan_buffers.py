"""Plans at fixed addresses of a device, where captured graphs find them.

    memory   plan of the first layer kind | of the second | … | slot_index, which all kinds share

Each section has room to spare. A plan is read as far as its header says, so what lies behind it does not matter.
"""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from forktree.device.staging import Event, Staging
from forktree.plan.layout import IntArray
from forktree.plan.plan import AttentionPlan

PLAN_ROOM = 1 << 15  # int32 of a plan at first: one of 512 rows and 1,000 segments; 5 us to copy
SLOT_ROOM = 1 << 16


class PlanBuffers:
    """Holds the plans of one step. Others take their place by one asynchronous copy; those grown from them, by one
    small scatter."""

    def __init__(self, device: torch.device, num_plans: int, mark: Callable[[], Event]) -> None:
        self._device = device
        self._staging = Staging(device, mark)
        self._held: list[AttentionPlan] = []
        self._reserve([*(num_plans * [PLAN_ROOM]), SLOT_ROOM])

    @property
    def sections(self) -> list[tuple[Tensor, Tensor]]:
        """Plan and slot_index of each kind, int32, with the room behind them."""
        *plans, slots = self.memory.split(self._rooms)
        return [(plan, slots) for plan in plans]

    @torch.inference_mode()  # whatever mode the caller is in: tensors made in it are only written in it
    def hold(self, plans: Sequence[AttentionPlan]) -> bool:
        """Puts the plans of one layout, one of each kind, where `AttentionPlan.on` finds them too.

        Returns whether all moved to larger memory.
        """
        before = self._held
        if len(plans) == len(before) and all(new is old for new, old in zip(plans, before, strict=True)):
            return False
        slots = _common_slots(plans)
        self._held = []
        for plan in before:
            plan.cache.pop(self._device, None)
        moved = self._make_room(plans, slots)
        if before and not moved and all(new.grew_from(old) for new, old in zip(plans, before, strict=True)):
            self._grow(plans, before, slots)
        else:
            self._fill(plans, slots)
        for plan, section in zip(plans, self.sections, strict=True):
            plan.cache[self._device] = section
        self._held = list(plans)
        return moved

    def _fill(self, plans: Sequence[AttentionPlan], slots: IntArray) -> None:
        size = self._begin[-1] + slots.size
        host = self._staging.write(size)
        for begin, plan in zip(self._begin, plans, strict=False):
            host[begin : begin + plan.buffer.size] = plan.buffer
        host[self._begin[-1] :] = slots
        self._staging.send(self.memory[:size])

    def _grow(self, plans: Sequence[AttentionPlan], before: Sequence[AttentionPlan], slots: IntArray) -> None:
        index, value = [], []
        for begin, new, old in zip(self._begin, plans, before, strict=False):
            changed, added = new.changes(old)
            index.append(begin + changed)
            value.append(new.buffer[changed])
        index.append(self._begin[-1] + added)
        value.append(slots[added])
        count = sum(x.size for x in value)
        if not count:
            return
        host = self._staging.write(3 * count)
        host[: 2 * count].view(np.int64)[:] = np.concatenate(index)
        host[2 * count :] = np.concatenate(value)
        entries = self.memory.new_empty(3 * count)
        self._staging.send(entries)
        self.memory.scatter_(0, entries[: 2 * count].view(torch.int64), entries[2 * count :])

    def _make_room(self, plans: Sequence[AttentionPlan], slots: IntArray) -> bool:
        """By doubling what does not suffice. Returns whether anything did not."""
        needed = [*(plan.buffer.size for plan in plans), slots.size]
        if all(room >= size for room, size in zip(self._rooms, needed, strict=True)):
            return False
        self._reserve([max(room, 1 << (size - 1).bit_length()) for room, size in zip(self._rooms, needed, strict=True)])
        return True

    def _reserve(self, rooms: list[int]) -> None:
        self._rooms = rooms
        self._begin = [0, *itertools.accumulate(rooms[:-1])]
        self.memory = torch.empty(sum(rooms), dtype=torch.int32, device=self._device)


def _common_slots(plans: Sequence[AttentionPlan]) -> IntArray:
    """slot_index as far as any node reaches."""
    layout = plans[0].layout
    for other in (plan.layout for plan in plans[1:]):
        for name in ("slot_index", "node_begin", "node_len"):
            ours, theirs = getattr(layout, name), getattr(other, name)
            if ours is not theirs and not np.array_equal(ours, theirs):
                raise ValueError(f"plans must be of one layout, got two that differ in {name}")
    return layout.slot_index[: int((layout.node_begin + layout.node_len).max(initial=0))]
