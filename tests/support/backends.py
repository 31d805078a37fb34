"""Backends that take CPU tensors in this build, and tensors that are hard on them."""

import mmap

import torch
from torch import Tensor

from forktree import _core

COMPILED = ["cpu"] + ["cuda"] * (_core.build["cuda"] == "emulated")  # leave fp64 to others
BACKENDS = ["reference", "torch", *COMPILED]


def off_alignment(x: Tensor) -> Tensor:
    """A copy at an address that is a multiple of one element only."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)


# Copies with other strides, dense in the last dimension: pools as people have them.
DENSE = {
    "K and V beside each other in a slot": lambda x: torch.stack([x, x], 1)[:, 1],
    "K and V beside each other in a head": lambda x: torch.stack([x, x], 2)[:, :, 1],
    "heads first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "slots an odd number apart": lambda x: torch.cat([x.flatten(1), x[:, 0, :1]], 1)[:, :-1].unflatten(1, x.shape[1:]),
    "heads an odd number apart": lambda x: torch.cat([x, x[..., :1]], 2)[..., :-1],
    "off alignment": off_alignment,
}


def sparse(*shape: int, dtype: torch.dtype) -> Tensor:
    """Zeros that take memory where they are written or read."""
    size = torch.Size(shape).numel() * dtype.itemsize
    return torch.frombuffer(mmap.mmap(-1, size), dtype=dtype).view(shape)
