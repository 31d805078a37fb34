"""Operations on a slot pool: attention over a plan, and what belongs to it.

Letters: `T` tokens, `R` query rows, `Hq`/`Hk` query and KV heads, `G = Hq / Hk` (query head h reads KV head
h // G), `Dk`/`Dv` head dims. Every function checks its arguments and hands over to a backend: `reference`
(dense, the specification) or `torch` (any device). `FORKTREE_BACKEND` names one; else the device chooses.
"""

from __future__ import annotations

import importlib
import math
import os
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from forktree.plan import AttentionPlan

__all__ = ["append_kv", "merge_states", "rotate_rows", "tree_attention"]

BACKENDS = {"reference": "forktree.ops.reference", "torch": "forktree.ops.torch_backend"}
ABSENT = {
    "cpu": "the compiled CPU kernels are not part of this build",
    "triton": "the Triton kernels are not part of this build",
    "cuda": "the CUDA kernels are not part of this build",
}
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def tree_attention(
    q: Tensor,
    k_slots: Tensor,
    v_slots: Tensor,
    plan: AttentionPlan,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every query row over what the layout lets it see; rows of one token share one softmax.

    Args:
        q: [R, Hq, Dk], rows in the order of the layout; fp32, bf16, fp16 or fp64.
        k_slots, v_slots: [slots, Hk, Dk] and [slots, Hk, Dv], contiguous, dtype and device of q.
        plan: made by `forktree.plan.plan` for these head counts and head_dim = Dk.
        scale: factor on q·k, default Dk ** -0.5.
        softcap: c > 0 makes scores c * tanh(s / c), after scale and before ALiBi and masks.
        sinks: [Hq], one more logit a head in each token's softmax, without a value; in the log-sum-exp too.
        alibi_slopes: [Hq], adds slope * (key position - row_pos).
        return_lse: also return the log-sum-exp.

    Returns:
        out [T, Hq, Dv] in q's dtype; with return_lse also lse [T, Hq], natural log, fp32. A token that sees
        nothing gets 0 and, without sinks, -inf.

    Math is done in fp32, for fp64 inputs in fp64. Raises ValueError on any mismatch before computing
    anything.
    """
    _check_attention(q, k_slots, v_slots, plan)
    heads = q.shape[1]
    if sinks is not None:
        _check_tensor("sinks", sinks, (heads,), q.device)
    if alibi_slopes is not None:
        _check_tensor("alibi_slopes", alibi_slopes, (heads,), q.device)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be above 0, got {softcap}")
    out, lse = _backend(q).tree_attention(
        q,
        k_slots,
        v_slots,
        plan,
        scale=1 / math.sqrt(q.shape[2]) if scale is None else scale,
        softcap=softcap,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
    )
    return (out, lse) if return_lse else out


def append_kv(k: Tensor, v: Tensor, slots: Tensor, k_slots: Tensor, v_slots: Tensor) -> None:
    """Writes each token's K and V into its slot of the pools, in place.

    Args:
        k, v: [T, Hk, Dk] and [T, Hk, Dv], dtype and device of the pools.
        slots: [T] int32 or int64 on the same device, different from one another; a negative one: not stored.
        k_slots, v_slots: [slots, Hk, Dk] and [slots, Hk, Dv].

    Raises ValueError on any mismatch before anything is written. Slot numbers are checked on the CPU only:
    elsewhere that would wait for the device.
    """
    _check_pools(k_slots, v_slots)
    tokens = slots.numel()
    for name, new, pool in (("k", k, k_slots), ("v", v, v_slots)):
        _check_tensor(name, new, (tokens, *pool.shape[1:]), pool.device, pool.dtype)
    _check_integers("slots", slots, tokens, k_slots.device)
    if slots.device.type == "cpu" and tokens and int(slots.max()) >= k_slots.shape[0]:
        raise ValueError(f"slots must be below the pool's {k_slots.shape[0]}, got {int(slots.max())}")
    _backend(k).append_kv(k, v, slots, k_slots, v_slots)


def rotate_rows(
    q: Tensor, shift: Tensor, inv_freq: Tensor, *, interleaved: bool = False, rotary_dim: int | None = None
) -> Tensor:
    """Moves rotary-encoded rows by a position shift, so that a row can look from another position.

    Args:
        q: [R, H, D].
        shift: [R] int32 or int64, positions to add; angles are computed in fp64.
        inv_freq: [rotary_dim / 2], radians per position.
        interleaved: pairs are (0, 1), (2, 3), …; otherwise (0, rotary_dim / 2), (1, rotary_dim / 2 + 1), …
        rotary_dim: leading elements that rotate, default D.

    Returns: a new tensor [R, H, D] in q's dtype.
    """
    if q.ndim != 3 or q.dtype not in FLOATS:
        raise ValueError(f"q must be a floating-point [R, H, D], got {q.dtype} {tuple(q.shape)}")
    rotary_dim = q.shape[2] if rotary_dim is None else rotary_dim
    if not 0 < rotary_dim <= q.shape[2] or rotary_dim % 2:
        raise ValueError(f"rotary_dim must be even and in [2, {q.shape[2]}] (D), got {rotary_dim}")
    _check_integers("shift", shift, q.shape[0], q.device)
    _check_tensor("inv_freq", inv_freq, (rotary_dim // 2,), q.device)
    rotated: Tensor = _backend(q).rotate_rows(q, shift, inv_freq, interleaved=interleaved, rotary_dim=rotary_dim)
    return rotated


def merge_states(o: Tensor, lse: Tensor, indptr: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Merges attention states over disjoint tokens. Associative up to rounding; the empty state is (0, -inf).

    Args:
        o: [P, Hq, Dv] partial outputs, each normalised by itself.
        lse: [P, Hq] their log-sum-exp, natural log, fp32 (fp64 if o is).
        indptr, index: [T+1] and [P'] int32 or int64, CSR: output t merges o[index[indptr[t] : indptr[t+1]]].

    Returns: out [T, Hq, Dv] in o's dtype, lse [T, Hq]. Nothing but empty states, or none, gives (0, -inf).
    """
    if o.ndim != 3 or o.dtype not in FLOATS:
        raise ValueError(f"o must be a floating-point [P, Hq, Dv], got {o.dtype} {tuple(o.shape)}")
    wide = torch.float64 if o.dtype == torch.float64 else torch.float32
    _check_tensor("lse", lse, tuple(o.shape[:2]), o.device, wide)
    _check_integers("index", index, index.numel(), o.device)
    _check_integers("indptr", indptr, max(indptr.numel(), 1), o.device)
    if int(indptr[0]) or int(indptr[-1]) != index.numel() or bool((indptr[1:] < indptr[:-1]).any()):
        raise ValueError(f"indptr must rise from 0 to {index.numel()} (entries in index), got {indptr.tolist()}")
    if index.numel() and (int(index.min()) < 0 or int(index.max()) >= o.shape[0]):
        raise ValueError(f"index must be in [0, {o.shape[0]}), got {int(index.min())} to {int(index.max())}")
    merged: tuple[Tensor, Tensor] = _backend(o).merge_states(o, lse, indptr, index)
    return merged


# ---------------------------------------------------------------------- dispatch


def _backend(x: Tensor) -> ModuleType:
    return _load(os.environ.get("FORKTREE_BACKEND") or _default(x.device.type))


def _default(device_type: str) -> str:
    return "torch"


@lru_cache
def _load(name: str) -> ModuleType:
    if name in BACKENDS:
        return importlib.import_module(BACKENDS[name])
    why = ABSENT.get(name, "there is no such backend")
    raise ValueError(f"FORKTREE_BACKEND={name}: {why}; available: {', '.join(BACKENDS)}")


# ---------------------------------------------------------------------- argument checks


def _check_attention(q: Tensor, k_slots: Tensor, v_slots: Tensor, plan: AttentionPlan) -> None:
    _check_pools(k_slots, v_slots)
    if q.dtype not in FLOATS:
        raise ValueError(f"q must be fp32, bf16, fp16 or fp64, got {q.dtype}")
    rows = (plan.layout.num_rows, plan.num_qo_heads, plan.head_dim)
    if q.shape != rows:
        raise ValueError(
            f"q must be {list(rows)} (rows of the layout, heads and head_dim of the plan), got {list(q.shape)}"
        )
    if k_slots.shape[1] != plan.num_kv_heads or k_slots.shape[2] != plan.head_dim:
        raise ValueError(
            f"k_slots must be [slots, {plan.num_kv_heads}, {plan.head_dim}] (heads and head_dim of the "
            f"plan), got {list(k_slots.shape)}"
        )
    if k_slots.dtype != q.dtype or k_slots.device != q.device:
        raise ValueError(f"k_slots must be {q.dtype} on {q.device} as q is, got {k_slots.dtype} on {k_slots.device}")
    lowest, highest = plan.layout.slot_bounds
    if lowest < 0 or highest >= k_slots.shape[0]:
        raise ValueError(f"slot_index must be in [0, {k_slots.shape[0]}), the pool, got {lowest} to {highest}")


def _check_pools(k_slots: Tensor, v_slots: Tensor) -> None:
    if k_slots.ndim != 3 or v_slots.ndim != 3 or k_slots.shape[:2] != v_slots.shape[:2]:
        raise ValueError(
            f"k_slots and v_slots must be [slots, Hk, Dk] and [slots, Hk, Dv], got "
            f"{list(k_slots.shape)} and {list(v_slots.shape)}"
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


def _check_tensor(
    name: str, x: Tensor, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype | None = None
) -> None:
    if x.shape != shape or x.device != device or (x.dtype not in FLOATS if dtype is None else x.dtype != dtype):
        wanted = "floating-point" if dtype is None else dtype
        raise ValueError(
            f"{name} must be {wanted} {list(shape)} on {device}, got {x.dtype} {list(x.shape)} on {x.device}"
        )


def _check_integers(name: str, x: Tensor, size: int, device: torch.device) -> None:
    if x.dtype not in (torch.int32, torch.int64) or x.shape != (size,) or x.device != device:
        raise ValueError(
            f"{name} must be int32 or int64 [{size}] on {device}, got {x.dtype} {list(x.shape)} on {x.device}"
        )
