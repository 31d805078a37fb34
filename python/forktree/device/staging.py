"""`Staging`: host memory through which integers reach a device while the host goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from forktree.types import IntArray


class Event(Protocol):
    """A point in a device's work."""

    def synchronize(self) -> None:
        """Waits until the device has reached it."""
        ...


class Staging:
    """Two buffers in turn (pinned for a GPU): the host fills one while the device still reads the other.

    Args:
        device: that the integers go to.
        record_event: gives an event after all work that the device has been given so far.
    """

    def __init__(self, device: torch.device, record_event: Callable[[], Event]) -> None:
        self._device, self._record_event = device, record_event
        self._buffers = [self._new(0), self._new(0)]
        self._read: list[Event | None] = [None, None]  # of each buffer, when the device has read it
        self._turn = 0

    def next_host_buffer(self, size: int) -> IntArray:
        """The next buffer, int32 [size], to be filled and uploaded. Waits if the device has not read it yet."""
        self._turn = 1 - self._turn
        if (read := self._read[self._turn]) is not None:
            read.synchronize()
            self._read[self._turn] = None
        if self._buffers[self._turn].numel() < size:
            self._buffers[self._turn] = self._new(2 * size)
        return self._buffers[self._turn][:size].numpy()

    def upload(self, to: Tensor) -> None:
        """Starts to copy the buffer into `to`, contiguous, as far as that reaches."""
        flat = to.view(-1).view(torch.int32)
        flat.copy_(self._buffers[self._turn][: flat.numel()], non_blocking=True)
        self._read[self._turn] = self._record_event()

    def _new(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int32, pin_memory=self._device.type == "cuda")
