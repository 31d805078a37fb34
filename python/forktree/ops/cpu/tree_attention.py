"""`forktree.ops.tree_attention` by `csrc/tree_attention.cpp`."""

from functools import partial

import torch
from torch import Tensor

from forktree import _core
from forktree.ops.checks import check_plan_tensors, check_scores, check_tree_attention
from forktree.ops.dtypes import dtype_number
from forktree.ops.watched import is_watched
from forktree.plan.plan import AttentionPlan


def tree_attention(
    q: Tensor,
    k_slots: Tensor,
    v_slots: Tensor,
    plan: AttentionPlan,
    *,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
) -> tuple[Tensor, Tensor]:
    call = torch.ops.forktree.tree_attention.default if is_watched(q) else partial(launch, plan_trusted=True)
    state: tuple[Tensor, Tensor] = call(
        q,
        k_slots,
        v_slots,
        *plan.on(q.device),
        plan.layout.num_tokens,
        plan.num_partials,
        scale,
        softcap or 0.0,
        sinks,
        alibi_slopes,
    )
    return state


def launch(
    q: Tensor,
    k_slots: Tensor,
    v_slots: Tensor,
    plan: Tensor,
    slot_index: Tensor,
    num_tokens: int,
    max_partials: int,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    plan_trusted: bool = False,
) -> tuple[Tensor, Tensor]:
    """plan_trusted: the plan and its slots were checked before, for this pool; else they are checked here."""
    check_tree_attention(q, k_slots, v_slots, sinks, alibi_slopes)
    check_scores(scale, softcap or None)
    check_plan_tensors(plan, slot_index, q.device)
    if num_tokens < 0:
        raise ValueError(f"num_tokens must be at least 0, got {num_tokens}")
    dtype = dtype_number("q", q)
    rows, heads, k_dim = q.shape
    num_slots, kv_heads, v_dim = v_slots.shape
    row_stride, head_stride, last_stride = q.stride()
    if last_stride != 1:
        q = q.contiguous()
        row_stride, head_stride, _ = q.stride()
    plan, slot_index = plan.contiguous(), slot_index.contiguous()
    sinks, alibi_slopes = _per_head(sinks), _per_head(alibi_slopes)
    out = q.new_empty(num_tokens, heads, v_dim)
    lse = q.new_empty(num_tokens, heads, dtype=torch.float32)
    _core.tree_attention(
        dtype,
        q.data_ptr(),
        row_stride,
        head_stride,
        rows,
        heads,
        k_dim,
        k_slots.data_ptr(),
        k_slots.stride(0),
        k_slots.stride(1),
        v_slots.data_ptr(),
        v_slots.stride(0),
        v_slots.stride(1),
        num_slots,
        kv_heads,
        v_dim,
        plan.data_ptr(),
        plan.numel(),
        slot_index.data_ptr(),
        slot_index.numel(),
        scale,
        softcap,
        0 if sinks is None else sinks.data_ptr(),
        0 if alibi_slopes is None else alibi_slopes.data_ptr(),
        out.data_ptr(),
        lse.data_ptr(),
        num_tokens,
        max_partials,
        plan_trusted,
        torch.get_num_threads(),
    )
    return out, lse


def _per_head(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()
