"""Host memory through which integers reach a device without anyone waiting."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from forktree.plan.layout import IntArray


class Event(Protocol):
    """A point in the device's work."""

    def synchronize(self) -> None:
        """Waits until the device has passed it."""
        ...


class Staging:
    """Two buffers taken in turn, so that one can be written while the device still reads the other."""

    def __init__(self, device: torch.device, mark: Callable[[], Event]) -> None:
        """mark: an event behind all work given to the device so far."""
        self._device, self._mark = device, mark
        self._buffers = [self._new(0), self._new(0)]
        self._read: list[Event | None] = [None, None]  # when the device has read each
        self._turn = 0

    def write(self, size: int) -> IntArray:
        """The next buffer, int32 [size], to be filled and sent. Waits if the device has not read it yet."""
        self._turn = 1 - self._turn
        if (read := self._read[self._turn]) is not None:
            read.synchronize()
            self._read[self._turn] = None
        if self._buffers[self._turn].numel() < size:
            self._buffers[self._turn] = self._new(2 * size)
        return self._buffers[self._turn][:size].numpy()

    def send(self, to: Tensor) -> None:
        """Copies as much of what was written as `to`, contiguous, takes."""
        flat = to.view(-1).view(torch.int32)
        flat.copy_(self._buffers[self._turn][: flat.numel()], non_blocking=True)
        self._read[self._turn] = self._mark()

    def _new(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int32, pin_memory=self._device.type == "cuda")
