"""`PlanBuffers`: plans at fixed addresses of a device, where captured graphs find them.

    memory   plan of the first layer spec | of the second | … | slot_index, which all of them share

Each section has spare capacity. A plan is read as far as its header says, so what follows it does not matter.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from forktree.device.staging import Event, Staging

if TYPE_CHECKING:
    from forktree.plan.plan import AttentionPlan
    from forktree.types import IntArray

PLAN_CAPACITY = 1 << 15  # int32 of a plan at first: one of 512 rows and 1,000 segments; 5 us to copy
SLOT_CAPACITY = 1 << 16


class PlanBuffers:
    """Holds the plans of one step.

    Other plans replace them by one asynchronous copy; plans grown from them, by one small scatter.

    Args:
        device: that the plans are read on.
        num_plans: how many a step has, one of each layer spec.
        record_event: gives an event after all work that the device has been given so far.
    """

    def __init__(self, device: torch.device, num_plans: int, record_event: Callable[[], Event]) -> None:
        self._device = device
        self._staging = Staging(device, record_event)
        self._uploaded: list[AttentionPlan] = []
        self._reserve([*(num_plans * [PLAN_CAPACITY]), SLOT_CAPACITY])

    @property
    def sections(self) -> list[tuple[Tensor, Tensor]]:
        """Plan and slot_index of each layer spec, int32, each with its spare capacity."""
        *plans, slots = self.memory.split(self._capacity)
        return [(plan, slots) for plan in plans]

    @torch.inference_mode()  # whatever mode the caller is in: tensors made in it are only written in it
    def upload(self, plans: Sequence[AttentionPlan]) -> bool:
        """Puts plans of one layout, one of each layer spec, into the memory, where `AttentionPlan.on` finds them too.

        Returns:
            Whether they did not fit, so that all moved to larger memory.
        """
        before = self._uploaded
        if len(plans) == len(before) and all(new is old for new, old in zip(plans, before, strict=True)):
            return False
        slots = _common_slots(plans)
        self._uploaded = []
        for plan in before:
            plan.cache.pop(self._device, None)
        moved = self._ensure_capacity(plans, slots)
        if before and not moved and all(new.grew_from(old) for new, old in zip(plans, before, strict=True)):
            self._grow(plans, before, slots)
        else:
            self._fill(plans, slots)
        for plan, section in zip(plans, self.sections, strict=True):
            plan.cache[self._device] = section
        self._uploaded = list(plans)
        return moved

    def _fill(self, plans: Sequence[AttentionPlan], slots: IntArray) -> None:
        size = self._begin[-1] + slots.size
        host = self._staging.next_host_buffer(size)
        for begin, plan in zip(self._begin, plans, strict=False):
            host[begin : begin + plan.buffer.size] = plan.buffer
        host[self._begin[-1] :] = slots
        self._staging.upload(self.memory[:size])

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
        host = self._staging.next_host_buffer(3 * count)
        host[: 2 * count].view(np.int64)[:] = np.concatenate(index)
        host[2 * count :] = np.concatenate(value)
        entries = self.memory.new_empty(3 * count)
        self._staging.upload(entries)
        self.memory.scatter_(0, entries[: 2 * count].view(torch.int64), entries[2 * count :])

    def _ensure_capacity(self, plans: Sequence[AttentionPlan], slots: IntArray) -> bool:
        """Doubles the sections that are too small. Returns whether there were any."""
        needed = [*(plan.buffer.size for plan in plans), slots.size]
        pairs = list(zip(self._capacity, needed, strict=True))
        if all(capacity >= size for capacity, size in pairs):
            return False
        self._reserve([max(capacity, 1 << (size - 1).bit_length()) for capacity, size in pairs])
        return True

    def _reserve(self, capacity: list[int]) -> None:
        self._capacity = capacity
        self._begin = [0, *itertools.accumulate(capacity[:-1])]
        self.memory = torch.empty(sum(capacity), dtype=torch.int32, device=self._device)


def _common_slots(plans: Sequence[AttentionPlan]) -> IntArray:
    """slot_index as far as any node reaches."""
    layout = plans[0].layout
    for other in (plan.layout for plan in plans[1:]):
        for name in ("slot_index", "node_begin", "node_len"):
            ours, theirs = getattr(layout, name), getattr(other, name)
            if ours is not theirs and not np.array_equal(ours, theirs):
                raise ValueError(f"plans must be of one layout, got two that differ in {name}")
    return layout.slot_index[: int((layout.node_begin + layout.node_len).max(initial=0))]
