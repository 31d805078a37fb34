"""Backends that take CPU tensors in this build, and tensors that are hard on them."""

import mmap
from typing import Any

import torch
from torch import Tensor

from forktree import _core
from forktree.ops import AttentionOptions, KVPool
from forktree.ops.dispatch import launcher
from forktree.ops.plan_tensors import PlanTensors
from forktree.plan.plan import AttentionPlan

COMPILED = ["cpu"] + ["cuda"] * (_core.build["cuda"] == "emulated")  # leave fp64 to others
BACKENDS = ["reference", "torch", *COMPILED]


def by_reference(operation: str, *arguments: Any) -> Any:
    """What the specification of an operation gives for the arguments of `launch`."""
    return launcher("reference", operation)(*arguments)


def specified(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, options: AttentionOptions | None = None
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of `tree_attention` by its specification."""
    options = AttentionOptions() if options is None else options
    out, lse = by_reference("tree_attention", q, KVPool(k, v), PlanTensors.of(plan, q.device), options)
    return out, lse


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
