"""`forktree.ops.tree_attention` by `csrc/cpu/tree_attention.cpp`, which validates the plan and its slots."""

from torch import Tensor

from forktree import _core
from forktree.ops import params
from forktree.ops.cpu import run
from forktree.ops.plan_tensors import PlanTensors
from forktree.ops.pool import AttentionOptions, KVPool


def launch(q: Tensor, pool: KVPool, plan: PlanTensors, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    call, out, lse = params.tree_attention(q, pool, plan, options)
    run(_core.tree_attention, call)
    return out, lse
