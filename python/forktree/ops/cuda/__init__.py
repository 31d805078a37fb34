"""The CUDA kernels of `forktree._core`, fp32, bf16 and fp16: `csrc/cuda`.

Kernels go to the current stream of the tensors' device. In a core built with FORKTREE_CUDA=emulate they take CPU
tensors.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from forktree.ops.params import Params


def stream_of(x: Tensor) -> int:
    """Address of the current stream of x's device; 0 on the CPU, where kernels are emulated."""
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0


def run(function: Callable[[int, int], None], params: Params, x: Tensor) -> None:
    """Calls a function of the core on the current stream of x's device."""
    with torch.cuda.device_of(x):
        function(params.address, stream_of(x))
