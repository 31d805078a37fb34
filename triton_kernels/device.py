"""Where the kernels run: an NVIDIA GPU, or the CPU under Triton's interpreter (TRITON_INTERPRET=1)."""

import os
from contextlib import AbstractContextManager
from functools import lru_cache

import torch
import triton.language as tl
from torch import Tensor

# Whether kernels widen operands of products to fp32: the interpreter multiplies bf16 as the integers it keeps them in.
WIDEN = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


def device_of(x: Tensor) -> AbstractContextManager[None]:
    """Makes x's GPU the current one, as launches go there."""
    guard: AbstractContextManager[None] = torch.cuda.device_of(x)
    return guard


@lru_cache
def architecture(device: torch.device) -> int:
    """Compute capability, 10 * major + minor."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
