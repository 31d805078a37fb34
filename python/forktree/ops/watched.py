"""When a call goes through torch's dispatcher."""

import torch
from torch import Tensor


def is_watched(x: Tensor) -> bool:
    """Whether someone must see the call: a tracer, autograd, a subclass. Else the detour is saved."""
    return torch.compiler.is_compiling() or x.requires_grad or type(x) is not Tensor
