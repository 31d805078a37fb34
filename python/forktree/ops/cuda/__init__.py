"""The CUDA kernels of `forktree._core`, fp32, bf16 and fp16: `csrc/cuda`.

Kernels go to the current stream of the tensors' device. In a core built with FORKTREE_CUDA=emulate they take CPU
tensors.
"""

import torch
from torch import Tensor


def stream_of(x: Tensor) -> int:
    """Address of the current stream of x's device; 0 on the CPU, where kernels are emulated."""
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
