"""Small arrays between host and device, neither waiting for the other."""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def upload(values: NDArray[Any], device: torch.device) -> Tensor:
    """`values` on `device`, there for whatever is launched next. On a CPU it shares their memory."""
    host = torch.from_numpy(values)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


class Download:
    """A device tensor on its way to the host; on a CPU it is there already."""

    def __init__(self, values: Tensor) -> None:
        self._host = values.to("cpu", non_blocking=True)  # pinned, where it comes from a GPU
        self._arrived: torch.cuda.Event | None = None
        if values.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(values.device))

    def read(self) -> NDArray[Any]:
        """The values, once they have arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host.numpy()
