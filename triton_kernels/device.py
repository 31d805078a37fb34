"""Where the kernels run: an NVIDIA GPU, or the CPU under Triton's interpreter (TRITON_INTERPRET=1)."""

from contextlib import AbstractContextManager
from functools import lru_cache

import torch
from torch import Tensor


def device_of(x: Tensor) -> AbstractContextManager[None]:
    """Makes x's GPU the current one, as launches go there."""
    guard: AbstractContextManager[None] = torch.cuda.device_of(x)
    return guard


@lru_cache
def architecture(device: torch.device) -> int:
    """Compute capability, 10 * major + minor."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
