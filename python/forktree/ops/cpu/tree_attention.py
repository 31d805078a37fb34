"""`forktree.ops.tree_attention` by `csrc/cpu/tree_attention`."""

import torch
from torch import Tensor

from forktree import _core
from forktree.ops import params
from forktree.ops.plan_tensors import PlanTensors
from forktree.ops.pool import AttentionOptions, KVPool


def launch(q: Tensor, pool: KVPool, plan: PlanTensors, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    return params.tree_attention(_core.tree_attention, torch.get_num_threads(), q, pool, plan, options)
