"""The compiled kernels of `forktree._core` for the CPU: fp32, bf16 and fp16."""

from collections.abc import Callable
from typing import Any

import torch

from forktree.ops.params import Params


def run(function: Callable[[int, int], Any], params: Params) -> None:
    """Calls a function of the core on as many threads as PyTorch uses."""
    function(params.address, torch.get_num_threads())
