"""Copies of small arrays between host and device, during which neither waits for the other."""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def upload(values: NDArray[Any], device: torch.device) -> Tensor:
    """Returns `values` on `device`, in time for whatever is launched next. On a CPU they share memory."""
    host = torch.from_numpy(values)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


class Download:
    """The copy of a device tensor to the host, which starts at once; on a CPU there is nothing to copy."""

    def __init__(self, values: Tensor) -> None:
        self._host = values.to("cpu", non_blocking=True)  # pinned if it comes from a GPU
        self._arrived: torch.cuda.Event | None = None
        if values.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(values.device))

    def read(self) -> NDArray[Any]:
        """Returns the values, once they have arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host.numpy()
