"""Argument checks of the operations: every message names the argument, what it must be, and what it is.

They run at every call, so what is read of a tensor is read once: attributes are not free.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int32, torch.int64)


def check_pools(k_slots: Tensor, v_slots: Tensor) -> None:
    k_shape, v_shape = k_slots.shape, v_slots.shape
    if len(k_shape) != 3 or len(v_shape) != 3 or k_shape[0] != v_shape[0] or k_shape[1] != v_shape[1]:
        raise ValueError(
            f"k_slots and v_slots must be [slots, Hk, Dk] and [slots, Hk, Dv], got {list(k_shape)} and {list(v_shape)}"
        )
    if v_slots.dtype != k_slots.dtype or v_slots.device != k_slots.device:
        raise ValueError(
            f"v_slots must be {k_slots.dtype} on {k_slots.device} as k_slots is, got {v_slots.dtype} on "
            f"{v_slots.device}"
        )
    if not (k_slots.is_contiguous() and v_slots.is_contiguous()):
        raise ValueError(
            f"k_slots and v_slots must be contiguous, got strides {k_slots.stride()} and {v_slots.stride()}"
        )


def check_tree_attention(
    q: Tensor, k_slots: Tensor, v_slots: Tensor, sinks: Tensor | None, alibi_slopes: Tensor | None
) -> None:
    """All but the plan."""
    check_pools(k_slots, v_slots)
    shape, dtype, device = q.shape, q.dtype, q.device
    if dtype not in FLOATS:
        raise ValueError(f"q must be fp32, bf16, fp16 or fp64, got {dtype}")
    if k_slots.dtype != dtype or k_slots.device != device:
        raise ValueError(f"k_slots must be {dtype} on {device} as q is, got {k_slots.dtype} on {k_slots.device}")
    _, kv_heads, dim = k_slots.shape
    if not v_slots.shape[2]:
        raise ValueError(f"v_slots must be [slots, Hk, Dv] with Dv at least 1, got {list(v_slots.shape)}")
    if len(shape) != 3 or shape[2] != dim or not kv_heads or shape[1] % kv_heads:
        raise ValueError(
            f"q must be [R, Hq, {dim}] with Hq a multiple of the {kv_heads} heads of k_slots, got {list(shape)}"
        )
    if sinks is not None:
        check_tensor("sinks", sinks, (shape[1],), device)
    if alibi_slopes is not None:
        check_tensor("alibi_slopes", alibi_slopes, (shape[1],), device)


def check_plan_tensors(plan: Tensor, slot_index: Tensor, device: torch.device) -> None:
    same = plan.dtype is slot_index.dtype is torch.int32 and plan.ndim == slot_index.ndim == 1
    if not same or plan.device != device or slot_index.device != device:
        raise ValueError(
            f"plan and slot_index must be int32 [size] on {device}, got {plan.dtype} {list(plan.shape)} on "
            f"{plan.device} and {slot_index.dtype} {list(slot_index.shape)} on {slot_index.device}"
        )


def check_append_kv(k: Tensor, v: Tensor, slots: Tensor, k_slots: Tensor, v_slots: Tensor) -> None:
    check_pools(k_slots, v_slots)
    tokens, dtype, device = slots.numel(), k_slots.dtype, k_slots.device
    _, heads, k_dim = k_slots.shape
    check_tensor("k", k, (tokens, heads, k_dim), device, dtype)
    check_tensor("v", v, (tokens, heads, v_slots.shape[2]), device, dtype)
    check_integers("slots", slots, tokens, device)


def check_slots(slots: Tensor, num_slots: int) -> None:
    if slots.numel() and int(slots.max()) >= num_slots:
        raise ValueError(f"slots must be below the pool's {num_slots}, got {int(slots.max())}")


def check_rotate_rows(q: Tensor, shift: Tensor, inv_freq: Tensor, rotary_dim: int) -> None:
    if q.ndim != 3 or q.dtype not in FLOATS:
        raise ValueError(f"q must be a floating-point [R, H, D], got {q.dtype} {tuple(q.shape)}")
    rows, _, dim = q.shape
    if not 0 < rotary_dim <= dim or rotary_dim % 2:
        raise ValueError(f"rotary_dim must be even and in [2, {dim}] (D), got {rotary_dim}")
    check_integers("shift", shift, rows, q.device)
    check_tensor("inv_freq", inv_freq, (rotary_dim // 2,), q.device)


def check_merge_states(o: Tensor, lse: Tensor, indptr: Tensor, index: Tensor) -> None:
    if o.ndim != 3 or o.dtype not in FLOATS:
        raise ValueError(f"o must be a floating-point [P, Hq, Dv], got {o.dtype} {tuple(o.shape)}")
    wide = torch.float64 if o.dtype == torch.float64 else torch.float32
    check_tensor("lse", lse, (o.shape[0], o.shape[1]), o.device, wide)
    check_integers("index", index, index.numel(), o.device)
    check_integers("indptr", indptr, max(indptr.numel(), 1), o.device)


def check_lists(indptr: Tensor, index: Tensor, states: int) -> None:
    """That indptr and index are lists of states, as CSR."""
    if int(indptr[0]) or int(indptr[-1]) != index.numel() or bool((indptr[1:] < indptr[:-1]).any()):
        raise ValueError(f"indptr must rise from 0 to {index.numel()} (entries in index), got {indptr.tolist()}")
    if index.numel() and (int(index.min()) < 0 or int(index.max()) >= states):
        raise ValueError(f"index must be in [0, {states}), got {int(index.min())} to {int(index.max())}")


def check_tensor(
    name: str, x: Tensor, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype | None = None
) -> None:
    if x.shape != shape or x.device != device or (x.dtype not in FLOATS if dtype is None else x.dtype != dtype):
        wanted = "floating-point" if dtype is None else dtype
        raise ValueError(
            f"{name} must be {wanted} {list(shape)} on {device}, got {x.dtype} {list(x.shape)} on {x.device}"
        )


def check_integers(name: str, x: Tensor, size: int, device: torch.device) -> None:
    if x.dtype not in INTEGERS or x.shape != (size,) or x.device != device:
        raise ValueError(
            f"{name} must be int32 or int64 [{size}] on {device}, got {x.dtype} {list(x.shape)} on {x.device}"
        )
