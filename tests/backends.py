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


def sparse(*shape: int, dtype: torch.dtype) -> Tensor:
    """Zeros that take memory where they are written or read."""
    size = torch.Size(shape).numel() * dtype.itemsize
    return torch.frombuffer(mmap.mmap(-1, size), dtype=dtype).view(shape)
