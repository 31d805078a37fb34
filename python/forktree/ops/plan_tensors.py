"""`PlanTensors`: a plan where its kernels read it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from forktree.plan.plan import AttentionPlan


class PlanTensors(NamedTuple):
    """A plan on a device. All but `host` may have room for a larger one: a captured graph outlives its first plan.

    Attributes:
        buffer: int32 [size], see `csrc/plan/plan_view.hpp`.
        slot_index: int32 [M], the layout's.
        num_tokens: T, outputs; those beyond the plan's are cleared.
        max_partials: rows of partials there is room for.
        host: the plan itself; None where only the device knows it. The PyTorch backends cannot do without.
    """

    buffer: Tensor
    slot_index: Tensor
    num_tokens: int
    max_partials: int
    host: AttentionPlan | None = None


def plan_tensors(plan: AttentionPlan, device: torch.device) -> PlanTensors:
    """A plan made on the host, uploaded once."""
    return PlanTensors(*plan.on(device), plan.layout.num_tokens, plan.num_partials, plan)
