"""Element types as the kernels number them."""

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # Dtype in csrc/numeric.hpp


def dtype_number(name: str, x: Tensor) -> int:
    number = DTYPES.get(x.dtype)
    if number is None:
        raise ValueError(f"{name} must be fp32, bf16 or fp16 (fp64 is left to the torch backend), got {x.dtype}")
    return number
