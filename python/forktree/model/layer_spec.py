"""`LayerSpec`: what is known of a layer, from which its plans and its pool are made."""

from dataclasses import dataclass

import torch
from torch import Tensor

from forktree.ops import append_kv, tree_attention
from forktree.ops.dispatch import choose
from forktree.plan.layout import TreeLayout
from forktree.plan.plan import AttentionPlan, plan

Pool = tuple[Tensor, Tensor]  # K [slots, Hk, Dk], V [slots, Hk, Dv]


@dataclass(frozen=True)
class LayerSpec:
    """What is known of a layer. Layers of one spec share a plan; each has a pool of its own.

    Attributes:
        window: how many positions a token sees, itself included; None = all earlier ones.
        num_qo_heads: heads of queries and outputs.
        num_kv_heads: heads of keys and values.
        head_dim: of queries and keys.
        value_dim: of values and outputs.
        dtype: of keys and values.
    """

    window: int | None
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype

    @property
    def bytes_per_slot(self) -> int:
        """Keys and values of one token in one layer."""
        return self.num_kv_heads * (self.head_dim + self.value_dim) * self.dtype.itemsize

    def plan(self, layout: TreeLayout, device: torch.device, max_partials: int | None = None) -> AttentionPlan:
        """The plan of a step for layers of this spec.

        It is invariant, so that a prompt's result does not depend on what else is in the batch, unless max_partials
        limits it: that limit is shared with strangers.
        """
        return plan(
            layout,
            num_qo_heads=self.num_qo_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            device=str(device),
            window=self.window,
            max_partials=max_partials,
            invariant=max_partials is None,
        )

    def max_partials(self, scratch: int) -> int:
        """How many rows of partials fit `scratch` bytes."""
        return scratch // (4 * self.num_qo_heads * (self.value_dim + 2))

    def pool(self, num_slots: int, device: torch.device) -> Pool:
        """Uninitialised: a slot is written before anyone reads it."""
        k, v = (
            torch.empty(num_slots, self.num_kv_heads, dim, dtype=self.dtype, device=device)
            for dim in (self.head_dim, self.value_dim)
        )
        return k, v


def append_and_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slots: Tensor,
    pool: Pool,
    plan: AttentionPlan,
    *,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Takes query [T, Hq, Dk], key [T, Hk, Dk], value [T, Hk, Dv] and slots [T]; returns [T, Hq, Dv]."""
    append_kv(key, value, slots, *pool)
    out = tree_attention(query, *pool, plan, scale=scale, softcap=softcap, sinks=sinks)
    assert isinstance(out, Tensor)  # not (out, lse)
    return out


def append_and_attend_captured(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slots: Tensor,
    pool: Pool,
    plan: tuple[Tensor, Tensor],
    *,
    max_partials: int,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """`append_and_attend` of a captured step: plan is the memory that plans will be in, max_partials their limit."""
    if (backend := choose("tree_attention", query, *pool)) in ("reference", "torch"):
        raise RuntimeError(f"the {backend} backend follows plans on the host")
    torch.ops.forktree.append_kv.default(key, value, slots, *pool)
    out, _ = torch.ops.forktree.tree_attention.default(
        query, *pool, *plan, query.shape[0], max_partials, scale, softcap or 0.0, sinks, None
    )
    return out
