"""Argument checks of the operations: every message names the argument, what it must be, and what it is.

They run at every call, so what is read of a tensor is read once: attributes are not free.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from forktree.ops.pool import KVPool
from forktree.ops.token_request import RaggedIds, TokenRequest

if TYPE_CHECKING:
    from forktree.ops.assemble import LmHead, VocabPass
    from forktree.ops.plan_tensors import PlanTensors
    from forktree.plan.plan import AttentionPlan

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int32, torch.int64)


def math_dtype(x: Tensor) -> torch.dtype:
    """The type that operations on x compute in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_tree_attention(q: Tensor, pool: KVPool, per_head: dict[str, Tensor]) -> None:
    """q and the options' tensors [Hq], by name."""
    stored, shape, dtype, device = pool.format, q.shape, q.dtype, q.device
    if dtype not in FLOATS:
        raise ValueError(f"q must be fp32, bf16, fp16 or fp64, got {dtype}")
    if stored.dtype != dtype or pool.k.device != device:
        raise ValueError(f"k of the pool must be {dtype} on {device} as q is, got {stored.dtype} on {pool.k.device}")
    kv_heads, dim = stored.num_kv_heads, stored.k_dim
    if not stored.v_dim:
        raise ValueError(f"v of the pool must be [slots, Hk, Dv] with Dv at least 1, got {list(pool.v.shape)}")
    if len(shape) != 3 or shape[2] != dim or not kv_heads or shape[1] % kv_heads:
        raise ValueError(
            f"q must be [R, Hq, {dim}] with Hq a multiple of the {kv_heads} heads of the pool, got {list(shape)}"
        )
    for name, x in per_head.items():
        check_tensor(name, x, (shape[1],), device)


def check_plan_tensors(plan: PlanTensors, device: torch.device) -> None:
    """Of a plan and its slots as tensors."""
    buffer, slot_index, num_tokens, max_partials, _ = plan
    same = buffer.dtype is slot_index.dtype is torch.int32 and buffer.ndim == slot_index.ndim == 1
    if not same or buffer.device != device or slot_index.device != device:
        raise ValueError(
            f"plan and slot_index must be int32 [size] on {device}, got {buffer.dtype} {list(buffer.shape)} on "
            f"{buffer.device} and {slot_index.dtype} {list(slot_index.shape)} on {slot_index.device}"
        )
    if num_tokens < 0 or max_partials < 0:
        raise ValueError(f"num_tokens and max_partials must be at least 0, got {num_tokens} and {max_partials}")


def check_fits(q_shape: torch.Size, pool: KVPool, plan: AttentionPlan) -> None:
    """That a plan is one for these shapes: remembered with it, as it serves many layers."""
    shapes = q_shape, pool.k.shape
    if plan.cache.get("fits") == shapes:
        return
    rows = (plan.layout.num_rows, plan.num_qo_heads, plan.head_dim)
    if q_shape != rows:
        raise ValueError(
            f"q must be {list(rows)} (rows of the layout, heads and head_dim of the plan), got {list(q_shape)}"
        )
    num_slots, *rest = pool.k.shape
    if rest != [plan.num_kv_heads, plan.head_dim]:
        raise ValueError(
            f"k of the pool must be [slots, {plan.num_kv_heads}, {plan.head_dim}] (heads and head_dim of the plan), "
            f"got {list(pool.k.shape)}"
        )
    lowest, highest = plan.layout.slot_bounds
    if lowest < 0 or highest >= num_slots:
        raise ValueError(f"slot_index must be in [0, {num_slots}), the pool, got {lowest} to {highest}")
    plan.cache["fits"] = shapes


def check_append_kv(k: Tensor, v: Tensor, slots: Tensor, pool: KVPool) -> None:
    """Of `append_kv`."""
    for name, x in (("k", pool.k), ("v", pool.v)):
        if not x.is_contiguous():
            check_apart(name, x)
    tokens, stored, device = slots.numel(), pool.format, pool.k.device
    check_tensor("k", k, (tokens, stored.num_kv_heads, stored.k_dim), device, stored.dtype)
    check_tensor("v", v, (tokens, stored.num_kv_heads, stored.v_dim), device, stored.dtype)
    check_integers("slots", slots, tokens, device)


def check_apart(name: str, x: Tensor) -> None:
    """That no two heads of slots of a pool's K or V share memory."""
    end = x.shape[2]  # of what lies within the stride looked at
    for stride, size in sorted(zip(x.stride()[:2], x.shape[:2], strict=True)):
        if size > 1 and stride < end:
            raise ValueError(
                f"{name} of the pool must not overlap itself, got {list(x.shape)} with strides {x.stride()}"
            )
        end += (size - 1) * stride


def check_slots(slots: Tensor, pool: KVPool) -> None:
    """Slot numbers, on the CPU: to look at them elsewhere would wait for the device."""
    if slots.is_cpu and slots.numel() and int(slots.max()) >= pool.num_slots:
        raise ValueError(f"slots must be below the pool's {pool.num_slots}, got {int(slots.max())}")


def check_rotate_rows(q: Tensor, shift: Tensor, inv_freq: Tensor, rotary_dim: int) -> None:
    """Of `rotate_rows`."""
    if q.ndim != 3 or q.dtype not in FLOATS:
        raise ValueError(f"q must be a floating-point [R, H, D], got {q.dtype} {tuple(q.shape)}")
    rows, _, dim = q.shape
    if not 0 < rotary_dim <= dim or rotary_dim % 2:
        raise ValueError(f"rotary_dim must be even and in [2, {dim}] (D), got {rotary_dim}")
    check_integers("shift", shift, rows, q.device)
    check_tensor("inv_freq", inv_freq, (rotary_dim // 2,), q.device)


def check_merge_states(o: Tensor, lse: Tensor, indptr: Tensor, index: Tensor) -> None:
    """Of `merge_states`."""
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


def check_lm_head(hidden: Tensor, lm_head: LmHead) -> None:
    """Of hidden states and the head they are multiplied with."""
    (weight, bias, scale, softcap), dtype, device = lm_head, hidden.dtype, hidden.device
    if hidden.ndim != 2 or dtype not in FLOATS or not hidden.shape[1]:
        raise ValueError(f"hidden must be floating-point [T, H] with H at least 1, got {dtype} {list(hidden.shape)}")
    if weight.ndim != 2 or not weight.shape[0]:
        raise ValueError(f"lm_head must be [V, {hidden.shape[1]}] with V at least 1, got {list(weight.shape)}")
    vocab = weight.shape[0]
    check_tensor("lm_head", weight, (vocab, hidden.shape[1]), device, dtype)
    if not weight.is_contiguous():
        raise ValueError(f"lm_head must be contiguous, got strides {weight.stride()}")
    if bias is not None:
        check_tensor("bias", bias, (vocab,), device)
    if not (math.isfinite(scale) and scale):
        raise ValueError(f"scale must be finite and not 0, got {scale}")
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"softcap must be finite and above 0, got {softcap}")


def check_logits(logits: Tensor, hidden: Tensor) -> None:
    """Of logits that stand in for the product with the head."""
    if logits.ndim != 2 or len(logits) != len(hidden) or not logits.shape[1] or not logits.is_floating_point():
        raise ValueError(
            f"logits must be floating-point [{len(hidden)}, V] with V at least 1, got {logits.dtype} "
            f"{list(logits.shape)}"
        )


def check_token_request(request: TokenRequest, hidden: Tensor, vocab: int) -> None:
    """Values on a device are not looked at: that would wait for it."""
    (rows, size), device = hidden.shape, hidden.device
    if isinstance(request.top_k, bool) or not isinstance(request.top_k, int) or request.top_k < 0:
        raise ValueError(f"top_k must be an integer of at least 0, got {request.top_k!r}")
    if request.targets is not None:
        check_integers("targets", request.targets, rows, device)
        check_ids("targets", request.targets, vocab)
    if isinstance(request.select, RaggedIds):
        indptr, ids = request.select.indptr, request.select.ids
        check_integers("ids of select", ids, ids.numel(), device)
        check_integers("indptr of select", indptr, rows + 1, device)
        if indptr.is_cpu and (int(indptr[0]) or int(indptr[-1]) != len(ids) or bool((indptr.diff() < 0).any())):
            raise ValueError(f"indptr of select must rise from 0 to {len(ids)}, got {indptr.tolist()}")
        check_ids("ids of select", ids, vocab)
    elif request.select is not None:
        check_integers("select", request.select, request.select.numel(), device)
        check_ids("select", request.select, vocab)
    if request.rewards is not None:
        check_tensor("rewards", request.rewards, (vocab, size), device)
        if not request.top_k and request.sample is None:
            raise ValueError("rewards are gathered at tokens: expected top_k or sample with them, got neither")
    sample = request.sample
    if sample is None:
        return
    if sample.keys.shape != (rows,):
        raise ValueError(f"seed and position must be one a row, {rows}, got {len(sample.keys)}")
    if sample.settings.shape != (4, rows):
        raise ValueError(f"sampling must be one, or one for each of {rows} rows, got {sample.settings.shape[1]}")
    if sample.edits is not None:
        if len(sample.edits.indptr) != rows + 1:
            raise ValueError(f"indptr of edits must be [{rows + 1}], got [{len(sample.edits.indptr)}]")
        edited = sample.edits.ids
        if len(edited) and not 0 <= edited.min() <= edited.max() < vocab:
            raise ValueError(f"ids of edits must be in [0, {vocab}), got {edited.min()} to {edited.max()}")
    if sample.allowed is not None:
        words = (vocab + 31) // 32
        if sample.allowed.dtype != torch.int32 or sample.allowed.shape != (rows, words):
            raise ValueError(
                f"allowed must be int32 [{rows}, {words}], got {sample.allowed.dtype} {list(sample.allowed.shape)}"
            )


def check_vocab_pass(hidden: Tensor, vocab: int, wanted: VocabPass) -> None:
    """What the registered operation is given instead of a request."""
    rows, device = hidden.shape[0], hidden.device
    if not 0 <= wanted.top_k <= vocab:
        raise ValueError(f"top_k must be in [0, {vocab}] (V), got {wanted.top_k}")
    keys, settings, allowed, edits = wanted.keys, wanted.settings, wanted.allowed, wanted.edits
    if keys is None or settings is None:
        if not keys is settings is allowed is edits[0]:
            raise ValueError("keys and settings must both be there to sample, or neither, nor edits, nor allowed")
        return
    check_tensor("keys", keys, (rows,), device, torch.int64)
    check_tensor("settings", settings, (4, rows), device, torch.float64)
    if allowed is not None:
        check_tensor("allowed", allowed, (rows, (vocab + 31) // 32), device, torch.int32)
    if edits[0] is not None:
        size = -1 if edits[1] is None else edits[1].numel()
        for name, x, shape in zip(
            ("indptr", "ids", "ops", "values"), edits, ((rows + 1,), *[(size,)] * 3), strict=True
        ):
            dtype = torch.float32 if name == "values" else torch.int32
            check_tensor(f"edit_{name}", hidden.new_empty(0) if x is None else x, shape, device, dtype)


def check_ids(name: str, ids: Tensor, vocab: int) -> None:
    """That token ids on the CPU lie in the vocabulary."""
    if ids.is_cpu and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab:
        raise ValueError(f"{name} must be in [0, {vocab}), got {int(ids.min())} to {int(ids.max())}")


def check_tensor(
    name: str, x: Tensor, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype | None = None
) -> None:
    """Of shape, device and dtype; any floating-point dtype by default."""
    if x.shape != shape or x.device != device or (x.dtype not in FLOATS if dtype is None else x.dtype != dtype):
        wanted = "floating-point" if dtype is None else dtype
        raise ValueError(
            f"{name} must be {wanted} {list(shape)} on {device}, got {x.dtype} {list(x.shape)} on {x.device}"
        )


def check_integers(name: str, x: Tensor, size: int, device: torch.device) -> None:
    """That x holds `size` integers on the device."""
    if x.dtype not in INTEGERS or x.shape != (size,) or x.device != device:
        raise ValueError(
            f"{name} must be int32 or int64 [{size}] on {device}, got {x.dtype} {list(x.shape)} on {x.device}"
        )
