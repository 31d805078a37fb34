"""The type all operations compute in."""

import torch
from torch import Tensor


def math_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
