"""`LayerSpec`: what is known of a layer, from which its plans and its pool are made."""

from dataclasses import dataclass

import torch
from torch import Tensor

from forktree.ops import AttentionOptions, KVFormat, KVPool, append_kv, tree_attention
from forktree.ops.dispatch import PYTORCH, select_backend
from forktree.plan.layout import TreeLayout
from forktree.plan.plan import AttentionPlan, plan_attention


@dataclass(frozen=True)
class LayerSpec:
    """What is known of a layer. Layers of one spec share a plan; each has a pool of its own.

    Attributes:
        window: how many positions a token sees, itself included; None = all earlier ones.
        num_qo_heads: heads of queries and outputs.
        format: how the layer's keys and values are stored.
    """

    window: int | None
    num_qo_heads: int
    format: KVFormat

    def plan(self, layout: TreeLayout, device: torch.device, max_partials: int | None = None) -> AttentionPlan:
        """The plan of a step for layers of this spec.

        It is invariant, so that a prompt's result does not depend on what else is in the batch, unless max_partials
        limits it: that limit is shared with strangers.
        """
        return plan_attention(
            layout,
            num_qo_heads=self.num_qo_heads,
            num_kv_heads=self.format.num_kv_heads,
            head_dim=self.format.k_dim,
            value_dim=self.format.v_dim,
            bytes_per_token=self.format.bytes_per_token,
            device=str(device),
            window=self.window,
            max_partials=max_partials,
            invariant=max_partials is None,
        )

    def max_partials(self, scratch: int) -> int:
        """How many rows of partials fit `scratch` bytes."""
        return scratch // (4 * self.num_qo_heads * (self.format.v_dim + 2))


def append_and_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slots: Tensor,
    pool: KVPool,
    plan: AttentionPlan,
    options: AttentionOptions,
) -> Tensor:
    """Takes query [T, Hq, Dk], key [T, Hk, Dk], value [T, Hk, Dv] and slots [T]; returns [T, Hq, Dv]."""
    append_kv(key, value, slots, pool)
    out = tree_attention(query, pool, plan, options)
    assert isinstance(out, Tensor)  # not (out, lse)
    return out


def append_and_attend_captured(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slots: Tensor,
    pool: KVPool,
    plan: tuple[Tensor, Tensor],
    options: AttentionOptions,
    *,
    max_partials: int,
) -> Tensor:
    """`append_and_attend` of a captured step: plan is the memory that plans will be in, max_partials their limit."""
    if (backend := select_backend("tree_attention", query, pool)) in PYTORCH:
        raise RuntimeError(f"the {backend} backend follows plans on the host")
    torch.ops.forktree.append_kv.default(key, value, slots, pool.k, pool.v)
    out, _ = torch.ops.forktree.tree_attention.default(
        query, pool.k, pool.v, *plan, query.shape[0], max_partials, *options.values
    )
    return out
