"""Tensors of random trees, and `tree_attention` on them by a backend, beside naive attention in fp64."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backends import Backend, on, sentinels, specified
from forktree import ops
from forktree.ops import AttentionOptions, KVPool
from forktree.plan.layout import TreeLayout
from forktree.plan.plan import AttentionPlan, plan_attention
from layouts import Case, naive_attention

# on outputs of size 1: rounding the output, and the weights before they are multiplied with values
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def case_of(layout: TreeLayout) -> Case:
    """A layout whose slots are those of a pool just large enough."""
    return Case(layout, [], int(layout.slot_index.max()) + 1, set(layout.slot_index.tolist()))


def tensors(
    case: Case,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 8,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """q and pools whose unused slots are NaN."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(case.layout.num_rows, heads, dim, generator=g, dtype=torch.float64).to(dtype)
    k, v = (
        torch.randn(case.num_slots, kv_heads, d, generator=g, dtype=torch.float64).to(dtype)
        for d in (dim, value_dim or dim)
    )
    unused = [s for s in range(case.num_slots) if s not in case.used]
    k[unused] = v[unused] = torch.nan
    return q, k, v


def planned(case: Case, q: Tensor, k: Tensor, **options: Any) -> AttentionPlan:
    return plan_attention(case.layout, num_qo_heads=q.shape[1], num_kv_heads=k.shape[1], head_dim=q.shape[2], **options)


def attend(
    backend: Backend, case: Case, q: Tensor, k: Tensor, v: Tensor, *, window=None, cost_model=None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, on the CPU."""
    made = planned(case, q, k, window=window, cost_model=cost_model, device=backend.device)
    chosen = AttentionOptions(**dict(zip(options, on(backend.device, *options.values()), strict=True)))
    with sentinels(backend.device):
        q, k, v = on(backend.device, q, k, v)
        out, lse = ops.tree_attention(q, KVPool(k, v), made, chosen, return_lse=True)
    return out.cpu(), lse.cpu()


def by_fp64(case: Case, q: Tensor, k: Tensor, v: Tensor, *, window=None, **options: Any) -> tuple[Tensor, Tensor]:
    """The reference in fp64: faster than `naive_attention`, against which a suite holds it as well."""
    made = planned(case, q, k, window=window)
    return specified(q.double(), k.double(), v.double(), made, AttentionOptions(**options))


def compare(
    backend: Backend,
    case: Case,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    expected: Callable[..., Any] = naive_attention,
    cost_model=None,
    **options: Any,
) -> None:
    out, lse = attend(backend, case, q, k, v, cost_model=cost_model, **options)
    right, right_lse = expected(case, q, k, v, **options)
    assert out.dtype == q.dtype and lse.dtype == torch.float32 and out.shape == right.shape
    near, near_lse = dict(rtol=TOLERANCE[q.dtype], atol=TOLERANCE[q.dtype]), dict(rtol=2e-5, atol=2e-5)
    if backend.device == "cuda":  # its exponentials are approximate
        near, near_lse = dict(rtol=0, atol=max(TOLERANCE[q.dtype], 5e-5)), dict(rtol=1e-4, atol=2e-4)
    np.testing.assert_allclose(out.double(), right, **near)
    np.testing.assert_allclose(lse.double(), right_lse, **near_lse)
