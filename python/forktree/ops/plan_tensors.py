"""`PlanTensors`: a plan where its kernels read it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from forktree.plan.plan import AttentionPlan


class PlanTensors(NamedTuple):
    """A plan on a device. All but `host` may have room for a larger one: a captured graph outlives its first plan.

    Attributes:
        buffer: int32 [size], see `forktree.plan.format`.
        slot_index: int32 [M], the layout's.
        num_tokens: T, outputs; those beyond the plan's are cleared.
        max_partials: rows of partials there is room for.
        host: the plan itself, validated when it was made; None where only these tensors are known, which then have to
            be looked at. The PyTorch backends cannot do without.
    """

    buffer: Tensor
    slot_index: Tensor
    num_tokens: int
    max_partials: int
    host: AttentionPlan | None = None

    @classmethod
    def of(cls, plan: AttentionPlan, device: torch.device) -> PlanTensors:
        """A plan made on the host; uploaded once."""
        return cls(*plan.on(device), plan.layout.num_tokens, plan.num_partials, plan)
