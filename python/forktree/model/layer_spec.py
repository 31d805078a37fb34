"""What one layer needs in a step: its kind, a plan of that kind, and a pool of keys and values."""

from dataclasses import dataclass

import torch
from torch import Tensor

from forktree.ops import append_kv, tree_attention
from forktree.ops.dispatch import choose
from forktree.plan.layout import TreeLayout
from forktree.plan.plan import AttentionPlan, plan

Pool = tuple[Tensor, Tensor]  # K [slots, Hk, Dk], V [slots, Hk, Dv]


@dataclass(frozen=True)
class LayerKind:
    """Layers of one kind share a plan; each has a pool of its own."""

    window: int | None
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype  # of keys and values

    @property
    def bytes_per_slot(self) -> int:
        """Keys and values of one token in one layer."""
        return self.num_kv_heads * (self.head_dim + self.value_dim) * self.dtype.itemsize

    def plan(self, layout: TreeLayout, device: torch.device, max_partials: int | None = None) -> AttentionPlan:
        """Invariant, so that a prompt's result does not depend on what else is in the batch; but not with a cap,
        which strangers share."""
        return plan(
            layout,
            num_qo_heads=self.num_qo_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            value_dim=self.value_dim,
            bytes_per_token=self.bytes_per_slot,
            device=str(device),
            window=self.window,
            max_partials=max_partials,
            invariant=max_partials is None,
        )

    def max_partials(self, scratch: int) -> int:
        """How many rows of partials fit so many bytes."""
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
    """query [T, Hq, Dk], key [T, Hk, Dk], value [T, Hk, Dv], slots [T] -> [T, Hq, Dv]."""
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
    """`append_and_attend` with what a captured step has in place of a plan: where plans will be, and most partials."""
    if (backend := choose("tree_attention", query, *pool)) in ("reference", "torch"):
        raise RuntimeError(f"the {backend} backend follows plans on the host")
    torch.ops.forktree.append_kv.default(key, value, slots, *pool)
    out, _ = torch.ops.forktree.tree_attention.default(
        query, *pool, *plan, query.shape[0], max_partials, scale, softcap or 0.0, sinks, None
    )
    return out
